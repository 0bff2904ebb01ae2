"""Pickle programs and zip files as torch.save writes them, made without PyTorch and without what they name."""

import io
import pickle
import warnings
import zipfile


class Call:
    """A call of the function named first with the other arguments."""

    def __init__(self, function, *args):
        self.function, self.args = function, args


class Name(str):
    """A global of the pickle, such as `torch.FloatStorage`."""


class Ref(tuple):
    """A persistent reference."""


class Raw(bytes):
    """Opcodes as they are."""


def encode(value):
    """Pickle opcodes that leave `value` on the stack, without needing what they name."""
    if isinstance(value, Raw):
        return bytes(value)
    if isinstance(value, Call):
        return encode(Name(value.function)) + encode(value.args) + b"R"
    if isinstance(value, Name):
        module, _, attribute = value.rpartition(".")
        return b"c%s\n%s\n" % (module.encode(), attribute.encode())
    if isinstance(value, Ref):
        return encode(tuple(value)) + b"Q"
    if isinstance(value, dict):
        return b"}(" + b"".join(encode(item) for pair in value.items() for item in pair) + b"u"
    if isinstance(value, (tuple, list)):
        items = b"".join(map(encode, value))
        return b"(" + items + b"t" if isinstance(value, tuple) else b"](" + items + b"e"
    return pickle.dumps(value, protocol=2)[2:-1]  # a number, text, bool or None, without PROTO and STOP


def write_zip(file, saved, storages, byteorder=b"little", compress=(), more=()):
    """A zip as torch.save writes it into `file` (a path): `saved` as data.pkl beside the storages, key -> bytes."""
    members = [("data.pkl", b"\x80\x02" + encode(saved) + b"."), ("byteorder", byteorder)]
    members += [(f"data/{key}", content) for key, content in storages.items()] + [("version", b"3\n"), *more]
    file.write_bytes(zipped([(f"archive/{name}", content) for name, content in members], compress))
    return file


def zipped(members, compress=()):
    """Bytes of a zip of (name, content) pairs, stored except where the name after `archive/` is in `compress`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile minds duplicate names
        for name, content in members:
            kind = zipfile.ZIP_DEFLATED if name.partition("/")[2] in compress else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(name), content, compress_type=kind)
    return buffer.getvalue()


def unzipped(data):
    """List of (name, content) of a sound zip."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]
