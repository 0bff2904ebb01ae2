"""The released models by name: where they are, how large, and the config that a bare weight file does not tell.

What was looked up, and where: names of repositories and files, and position scales, in the README, tools/download.py
and tools/convert_pixart_to_diffusers.py of PixArt-alpha/PixArt-sigma at 1ce521a and in the README of PixArt-alpha. The
256x256 .pth has no pos_embed (issue 37 of PixArt-sigma), the 512-MS repository holds the transformer alone (issue 113,
and diffusers' tests use it so), those of 1024-MS, Sigma and alpha, are whole pipelines (model cards). Not looked up, as
the hub was out of reach: that the repositories of 256x256 and 2K-MS hold the transformer alone and that the other alpha
ones are whole. Of the two distilled alpha models, from listings of their repositories: LCM's is whole, with a
transformer of 2.45 GB; DMD's is a transformer alone, 2.44 GB in a .bin file. How they are sampled: app_lcm.py of
PixArt-alpha, app/app_pixart_dmd.py of PixArt-sigma. No .pth of them is known.

Sizes: LISTED ones stand with a checksum in a public download script; the others follow from the shapes. A safetensors
file's is exact, header included (the same computation gives the LISTED ones to the byte); a .pth file's is that of its
tensors in fp32, to which the zip container adds some 0.1 MB. A public list gives 2.47 GB for the 1024-MS .pth and
2.44 GB for the 512-MS and 1024-MS transformers, which agrees. Another has a Sigma file of 437 tensors and
1,262,008,531 bytes: that is the 2K-MS one's in fp16, so a file may be half as large as here.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional

from mindsigma.errors import MindSigmaError
from mindsigma.models.dit import DiTConfig
from mindsigma.models.dit_config import preset

SIGMA_COMPONENTS = "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers"
ALPHA_COMPONENTS = "PixArt-alpha/PixArt-XL-2-1024-MS"
LISTED, COMPUTED = "listed", "computed"


@dataclass(frozen=True)
class Release:
    """One released model.

    Attributes:
        name: as its files and repositories are called.
        about: what it is, in a few words.
        repository: hub id of the diffusers folder.
        whole: whether that folder holds T5, VAE and tokenizer too.
        components: hub id of a folder that holds them.
        config: DiTConfig; None of the folder without a transformer.
        official: hub id and name of the .pth file, or None.
        parameters: of the DiT, buffers left out.
        tensors: weights of the DiT under official names; the .pth has up to two buffers more, pos_embed and
            y_embedder.y_embedding.
        diffusers_tensors: names in the diffusers file.
        official_bytes, diffusers_bytes: sizes of the .pth file (its tensors alone) and of the transformer's
            safetensors file in fp32.
        source: LISTED or COMPUTED, of diffusers_bytes.
        scaling_factor: of the VAE.
        sampler: what it was distilled for (sampling/__init__.py), whose steps and guidance are its own; None: nothing.
        weight_file: of the transformer in the diffusers folder.
    """

    name: str
    about: str
    repository: str
    whole: bool
    components: str
    config: Optional[DiTConfig] = None
    official: Optional[str] = None
    parameters: int = 0
    tensors: int = 0
    diffusers_tensors: int = 0
    official_bytes: int = 0
    diffusers_bytes: int = 0
    source: str = COMPUTED
    scaling_factor: float = 0.13025
    sampler: Optional[str] = None
    weight_file: str = "diffusion_pytorch_model.safetensors"

    def files(self):
        """Patterns of what a pipeline needs of the repository."""
        parts = ["transformer"] if self.config is not None else []
        parts += ["vae", "text_encoder", "tokenizer"] if self.whole else []
        return [f"{part}/*" for part in parts]

    def told(self):
        """DiTConfig fields that a file of this name is taken to have, unless it tells them itself."""
        if self.config is None:
            return {}
        names = ("num_heads", "input_size", "pe_interpolation", "model_max_length")
        return {name: getattr(self.config, name) for name in names}


def _transformer(name, family, **fields):
    """Release of an XL/2; `family` names the repository of its .pth file."""
    return Release(
        name=name,
        repository=f"PixArt-alpha/{name}",
        official=f"PixArt-alpha/{family}/{name}.pth",
        parameters=610_856_096,
        tensors=435,
        **fields,
    )


def _sigma(name, about, official_bytes, whole=False):
    return _transformer(
        name,
        "PixArt-Sigma",
        about=about,
        whole=whole,
        components=SIGMA_COMPONENTS,
        config=preset(name),
        diffusers_tensors=603,
        official_bytes=official_bytes,
        diffusers_bytes=2_443_492_488,
    )


def _alpha(name, about, input_size, scale, official_bytes):
    return _transformer(
        name,
        "PixArt-alpha",
        about=about,
        whole=True,
        components=ALPHA_COMPONENTS,
        config=DiTConfig(input_size=input_size, pe_interpolation=scale, model_max_length=120),
        diffusers_tensors=604,
        official_bytes=official_bytes,
        diffusers_bytes=2_445_458_680,
        scaling_factor=0.18215,
    )


_ALPHA_512 = _alpha("PixArt-XL-2-512x512", "alpha, 512 px", 64, 1.0, 2_450_109_056)
_ALPHA_1024 = _alpha("PixArt-XL-2-1024-MS", "alpha, 1024 px bins, micro conditions", 128, 2.0, 2_466_237_056)
_ALPHA_1024 = replace(  # with the two embeddings of image size and aspect ratio
    _ALPHA_1024,
    config=_ALPHA_1024.config.override(micro_condition=True),
    parameters=611_349_152,
    tensors=443,
    diffusers_tensors=612,
    diffusers_bytes=2_447_431_856,
    source=LISTED,
)


def _distilled(base, name, about, **changes):
    """Release of a model distilled from another one, of the same network."""
    return replace(
        base, name=name, about=about, repository=f"PixArt-alpha/{name}", official=None, source=COMPUTED, **changes
    )


RELEASES = (
    _sigma("PixArt-Sigma-XL-2-256x256", "Sigma, 256 px", 2_448_339_584),
    _sigma("PixArt-Sigma-XL-2-512-MS", "Sigma, 512 px bins", 2_453_058_176),
    _sigma("PixArt-Sigma-XL-2-1024-MS", "Sigma, 1024 px bins", 2_467_213_952, whole=True),
    _sigma("PixArt-Sigma-XL-2-2K-MS", "Sigma, 2048 px bins", 2_523_837_056),
    Release(
        name="pixart_sigma_sdxlvae_T5_diffusers",
        about="T5-XXL, SDXL VAE and tokenizer of Sigma",
        repository=SIGMA_COMPONENTS,
        whole=True,
        components=SIGMA_COMPONENTS,
    ),
    _alpha("PixArt-XL-2-SAM-256x256", "alpha, 256 px, before aesthetic tuning", 32, 1.0, 2_446_570_112),
    _alpha("PixArt-XL-2-256x256", "alpha, 256 px", 32, 1.0, 2_446_570_112),
    _ALPHA_512,
    _ALPHA_1024,
    _distilled(_ALPHA_1024, "PixArt-LCM-XL-2-1024-MS", "alpha, 1024 px bins, for 2 to 8 steps of LCM", sampler="lcm"),
    _distilled(
        _ALPHA_512,
        "PixArt-Alpha-DMD-XL-2-512x512",
        "alpha, 512 px, for one step (DMD)",
        sampler="one-step",
        whole=False,
        weight_file="diffusion_pytorch_model.bin",
    ),
)

# Of a folder with T5 and VAE, in fp32: T5's tensors (its two shards' headers add some 30 kB), and the VAE's file.
T5_BYTES, T5_TENSORS, T5_PARAMETERS = 19_049_242_624, 219, 4_762_310_656
VAE_BYTES, VAE_TENSORS, VAE_PARAMETERS = 334_643_268, 248, 83_653_863


def release_named(text):
    """The Release of a bare name or of a hub id, or None."""
    return next((release for release in RELEASES if str(text) in (release.name, release.repository)), None)


def release_of(path):
    """The Release that a weight file or folder is called after, or None.

    A file is known by its own name, a folder by its name or, if it is `transformer` or `dit`, by that of the folder
    it lies in; both by the place of its repository in the hub's cache (`models--owner--name/snapshots/<revision>`).
    """
    path = Path(path).absolute()
    stem = path.name
    for suffix in (".pth", ".safetensors", ".ckpt", ".pt", ".bin"):
        stem = stem.removesuffix(suffix)
    folder = path if path.is_dir() else path.parent
    names = [stem, *([folder.parent.name] if folder.name in ("transformer", "dit") else [])]
    if folder.parent.name in ("transformer", "dit"):
        names.append(folder.parent.parent.name)
    names += [parent.name for parent in path.parents if parent.name.startswith("models--")]
    for name in names:
        for release in RELEASES:
            if release.config and name in (release.name, f"models--{release.repository.replace('/', '--')}"):
                return release
    return None


def default_sampler(model):
    """Name of the sampler that a model, given by name or path, was distilled for, or "dpm"."""
    release = release_named(model) or release_of(model)
    return (release and release.sampler) or "dpm"


def advice(text):
    """What to do about a name or file of a release that is not here: a phrase to end an error with, or ''."""
    release = release_named(text)
    if release is not None:
        rest = "" if release.whole else f"; the same of {release.components} for T5, VAE and tokenizer (--components)"
        part = "" if release.whole else "--include 'transformer/*' "
        return (
            f"; where there is a network: hf download {release.repository} {part}"
            f"--local-dir models/{release.name}, then give models/{release.name}{rest}"
        )
    name = Path(text).name
    release = next((one for one in RELEASES if one.official and Path(one.official).name == name), None)
    if release is None:
        return ""
    repository = release.official.rpartition("/")[0]
    return f"; {name} is a released file: hf download {repository} {name} --local-dir models, then give models/{name}"


def check_release(release, tensors, told, decided):
    """Raise MindSigmaError if a DiT's file contradicts the release that it is called after.

    Args:
        tensors: MappedSource of the file.
        told: DiTConfig fields that its tensors tell.
        decided: fields that a config beside it or the caller's flags tell; those are not questioned.
    """
    path = tensors.path
    found = len(tensors.source.names()) - len(tensors.dropped)
    expected = release.tensors if "pos_embed.proj.weight" not in tensors.source else _weights_of_diffusers(release)
    if found != expected:
        raise MindSigmaError(
            f"{path}: is called after the released {release.name}, which has {expected} weights, but holds {found}; "
            "download it again, or rename it if it is another model"
        )
    for name, value in told.items():
        wanted = getattr(release.config, name)
        if name not in decided and value != wanted:
            raise MindSigmaError(
                f"{path}: is called after the released {release.name} of {name} {wanted}, but its tensors tell "
                f"{value}; download it again, or rename it if it is another model"
            )


def _weights_of_diffusers(release):
    # Alpha's files hold the null caption, a buffer of older diffusers.
    return release.diffusers_tensors - (release.config.model_max_length == 120)


def size_note(release, path):
    """A phrase for an error about an unreadable file that is smaller than the released one, or ''."""
    path = Path(path)
    if release is None or not path.is_file():
        return ""
    expected = release.official_bytes if path.suffix == ".pth" else release.diffusers_bytes
    found = path.stat().st_size
    if found >= expected:
        return ""
    return f"; it has {found:,} bytes, the released {release.name} {expected:,} in fp32: is the download complete?"


def listing():
    """The table of released models as a text."""
    lines = []
    for release in RELEASES:
        lines.append(f"{release.name}: {release.about}")
        if release.official:
            repository, _, file = release.official.rpartition("/")
            lines.append(f"  official   {repository} {file}, {release.official_bytes:,} bytes and the zip container's")
        files = " ".join(release.files())
        size = f", transformer {release.diffusers_bytes:,} bytes ({release.source})" if release.config else ""
        lines.append(f"  diffusers  {release.repository} {files}{size}")
        if release.whole:
            lines.append(
                f"  with       T5-XXL {T5_BYTES:,} bytes (listed; {T5_TENSORS} tensors, {T5_PARAMETERS:,} parameters), "
                f"VAE {VAE_BYTES:,} ({VAE_TENSORS} tensors, {VAE_PARAMETERS:,} parameters)"
            )
        else:
            lines.append(f"  T5, VAE    {release.components}")
        if release.sampler:
            lines.append(f"  sampler    {release.sampler}, by default")
        config = release.config
        if config is not None:
            lines.append(
                f"  config     {release.parameters:,} parameters, {release.tensors} tensors (diffusers "
                f"{release.diffusers_tensors}), depth {config.depth}, heads {config.num_heads}, "
                f"input_size {config.input_size}, pe_interpolation {config.pe_interpolation:g}, base size "
                f"{config.base_size} tokens, captions of {config.model_max_length} tokens, "
                f"micro_condition {str(config.micro_condition).lower()}, VAE scaling factor {release.scaling_factor}"
            )
    return "\n".join(lines)
