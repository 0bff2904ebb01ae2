"""Kinds of files that people keep images in and that are not read, with the remedy: told, never passed over."""

_CONVERT = "its format is not read; save it as PNG or JPEG"
_DECOMPRESS = "compressed shards cannot be read in place; decompress it to .tar"
_UNPACK = "archives are not read; unpack it"
_EXPORT = "such tables are not read; export its images and captions"

_KINDS = {
    _CONVERT: ".heic .heif .hif .jxl .jxr .svg .svgz .eps .ps .ai .psb .xcf .exr .hdr .dng .cr2 .cr3 .nef .arw .orf "
    ".rw2 .raf .ico .icns .cur .dds .blp .xbm .xpm .wmf .emf .fits .pcd .fli .flc .dcx .msp .djvu .pict .im",
    _DECOMPRESS: ".tar.gz .tgz .tar.bz2 .tbz .tbz2 .tar.xz .txz .tar.zst .tar.zstd .tzst .tar.lz4 .tar.lzma .tar.br",
    _UNPACK: ".zip .7z .rar",
    _EXPORT: ".parquet .arrow .feather .tfrecord .lmdb .mdb",
}
_REMEDIES = {suffix: remedy for remedy, suffixes in _KINDS.items() for suffix in suffixes.split()}


def remedy_for(name):
    """What to do with a file of this name that may hold images and is not read; "" for other names."""
    parts = name.lower().rsplit(".", 2)
    endings = ["." + ".".join(parts[-count:]) for count in (2, 1) if len(parts) > count]
    return next((_REMEDIES[ending] for ending in endings if ending in _REMEDIES), "")


def remedy_for_compressed(path):
    """What to do with a compressed file, by its name."""
    return _DECOMPRESS if ".t" in path.name.lower() else "compressed files cannot be read in place; decompress it"
