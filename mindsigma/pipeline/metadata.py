"""What a picture's PNG tells of its making: for people, for other tools (`parameters`), and to draw it again."""

import io
import json
import platform
from importlib import metadata

from PIL import Image, PngImagePlugin

from mindsigma import __version__
from mindsigma.errors import MindSigmaError, one_line
from mindsigma.foreign import load_json, read_bytes, understanding
from mindsigma.sampling.options import CONTROL_NUMBERS, OPTION_NAMES, SamplingOptions

KEY = "mindsigma"  # of the text that `read` reads
FORMAT = 1
LARGEST = 256 << 20  # bytes of a picture that is read
LONGEST = 1 << 20  # characters of its text
SAMPLER_NAMES = {  # what other tools call a sampler
    ("dpm", 1): "DDIM",
    ("dpm", 2): "DPM++ 2M",
    ("dpm", 3): "DPM++ 3M",
}


def versions():
    """dict of the versions that a picture depends on."""
    return {"mindsigma": __version__, "mindspore": metadata.version("mindspore"), "python": platform.python_version()}


def texts(prompt, negative, seed, sampling, size, drawn, about, digests, options):
    """dict of the texts of a PNG.

    Args:
        prompt, negative: texts. seed: number.
        sampling: SamplingOptions that drew it.
        size, drawn: (width, height) of the picture and at which the model worked.
        about: dict of further texts and numbers, such as model, components, lora, convention; None is left out.
        digests: dict part -> SHA-256 of the files that it was read from; "dit" is the model, "lora: NAME" an adapter.
        options: dict of JSON values by which tools/generate.py draws it again.
    """
    from mindsigma.runtime import device  # not above: `read` is for arguments, which are judged before MindSpore loads

    told = {
        "Software": f"mindsigma {__version__}",
        "prompt": prompt,
        "seed": seed,
        "negative_prompt": negative,
        **{name: value for name, value in about.items() if value not in (None, "")},
        **sampling.metadata(),
        "size": f"{size[0]}x{size[1]}",
        "drawn_size": f"{drawn[0]}x{drawn[1]}",
        "device": device(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "sha256": "\n".join(f"{digest} {name}" for name, digest in digests.items()),
    }
    told["parameters"] = parameters(prompt, negative, seed, sampling, size, about, digests)
    again = {"format": FORMAT, "versions": versions(), "sha256": digests, "options": options}
    told[KEY] = json.dumps(again, ensure_ascii=False, separators=(",", ":"))
    return told


def again(sampling, prompt, seed, **values):
    """dict of JSON values: the options by which tools/generate.py draws a picture again; None is left out."""
    options = {OPTION_NAMES.get(name, name): value for name, value in sampling.as_arguments().items()}
    for name in CONTROL_NUMBERS:  # of ControlNets, which a picture may not have
        if options[name] == getattr(SamplingOptions, name):
            del options[name]
    if options["pag_layers"] is not None:
        options["pag_layers"] = ",".join(map(str, options["pag_layers"]))
    options.update(values, prompt=[prompt], seed=seed)
    return {name: value for name, value in options.items() if value is not None}


def parameters(prompt, negative, seed, sampling, size, about, digests):
    """The text `parameters` that other tools write and read: prompt, negative prompt, then names and values."""
    order = sampling.solver_order or 2
    name = SAMPLER_NAMES.get((sampling.sampler, order), sampling.sampler)
    pairs = {
        "Steps": sampling.num_inference_steps,
        "Sampler": name,
        "CFG scale": f"{sampling.guidance_scale:g}",
        "Seed": seed,
        "Size": f"{size[0]}x{size[1]}",
        "Model hash": digests.get("dit", "")[:10],
        "Model": str(about.get("model", "")).rstrip("/").rpartition("/")[2],
    }
    adapters = [(key[6:], digest) for key, digest in digests.items() if key.startswith("lora: ")]
    if adapters:
        hashes = ", ".join(f"{path.rpartition('/')[2]}: {digest[:12]}" for path, digest in adapters)
        pairs["Lora hashes"] = f'"{hashes}"'
    pairs["Version"] = f"mindsigma {__version__}"
    lines = [prompt] + ([f"Negative prompt: {negative}"] if negative else [])
    tail = ", ".join(f"{key}: {_quoted(value)}" for key, value in pairs.items() if value not in ("", None))
    return "\n".join([*lines, tail])


def _quoted(value):
    text = str(value)
    return json.dumps(text) if "," in text and not text.startswith('"') else text


def read(path):
    """(options, digests): dicts by which a picture of this project can be drawn again. Raises MindSigmaError.

    Args:
        path: of a PNG, or its bytes.
    """
    data = path if isinstance(path, bytes) else read_bytes(path, LARGEST)
    name = "the picture" if isinstance(path, bytes) else path
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise MindSigmaError(f"{name}: is no PNG; only pictures that were written here tell how they were drawn")
    with understanding(name, "take another picture"):
        try:
            with Image.open(io.BytesIO(data), formats=["PNG"]) as image:  # what follows the pixels is not read
                text = image.text.get(KEY) if isinstance(image, PngImagePlugin.PngImageFile) else None
        except (Image.DecompressionBombError, SyntaxError) as error:
            raise MindSigmaError(f"{name}: cannot be read ({one_line(error)})") from None
    if not isinstance(text, str) or len(text) > LONGEST:
        raise MindSigmaError(
            f"{name}: does not tell how it was drawn; it is of another program or an earlier version, or something on "
            "its way removed the texts"
        )
    table = load_json(name, text, "what it tells of its making")
    options, digests = table.get("options"), table.get("sha256")
    if table.get("format") != FORMAT or not isinstance(options, dict) or not isinstance(digests, dict):
        raise MindSigmaError(f"{name}: was written by another version of this project; draw it with that")
    return options, {str(part): digest for part, digest in digests.items() if isinstance(digest, str)}
