"""The cases that are commands, timed from process start to end: a first picture, translations."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from measure import problems
from measure.turns import run_command, with_tools
from mindsigma.errors import MindSigmaError

TOOLS = Path(__file__).resolve().parents[1]
PEERS = TOOLS / "peers"
# torch.load + half() + torch.save hold a checkpoint one and a half times, so theirs is one of 10 layers of the 24.
T5_PART_LAYERS = 10
TORCH_T5 = """
import sys, torch
state = torch.load(sys.argv[1], map_location="cpu", mmap=sys.argv[3] == "1")
state = {name: tensor.half() for name, tensor in state["state_dict"].items()}
torch.save(state, sys.argv[2])
"""


def run_tool(name, *arguments, environment=None):
    """Seconds and peak memory of one of the tools."""
    return run_command([sys.executable, str(TOOLS / name), *map(str, arguments)], f"tools/{name}", environment)


def mini_cold(folder, peer_python):
    """One image from process start to file."""
    return run_tool("generate.py", problems.PROMPTS[0], "--out", folder / "image.png")


def mini_cold_cached(folder, peer_python):
    """The same with MindSpore's compile cache, which the first run fills."""
    cache = {"MS_COMPILER_CACHE_ENABLE": "1", "MS_COMPILER_CACHE_PATH": str(folder / "compile-cache")}
    environment = {**os.environ, **cache}
    return run_tool("generate.py", problems.PROMPTS[0], "--out", folder / "image.png", environment=environment)


def diffusers_cold(folder, peer_python):
    """One image from process start to file by diffusers; folder holds `mini`."""
    command = [peer_python, str(PEERS / "diffusers_image.py"), str(folder / "mini"), str(folder / "peer.png")]
    return run_command(command, "diffusers", with_tools(peer_environment()))


def peer_environment():
    """This process's environment without what tunes another library than PyTorch's."""
    return {name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE"}


def convert_t5_xxl(folder, peer_python):
    """A checkpoint of T5-XXL's shapes (19 GB in fp32, a sparse file of zeros) to this project's format in fp16."""
    source = folder / "t5-xxl.safetensors"
    write_zeros(source, t5_specs())
    return translated(source, folder)


def image_1024(folder, peer_python, *options):
    """A picture of 1024 px in two steps, T5-XXL layer by layer, from process start to file; all weights are zeros."""
    from mindsigma.models.dit import DiT
    from mindsigma.models.dit_config import preset
    from mindsigma.models.t5 import T5Config, T5Encoder
    from mindsigma.models.vae import VAE
    from mindsigma.models.vae_config import VAEConfig
    from mindsigma.weights.formats.atomic import write_json
    from mindsigma.weights.locate import locate
    from mindsigma.weights.saving import stored_config

    model = folder / "zeros"
    if not model.exists():
        networks = {
            "dit": (DiT, preset("PixArt-Sigma-XL-2-1024-MS")),
            "text_encoder": (T5Encoder, T5Config()),
            "vae": (VAE, VAEConfig()),
        }
        for name, (network, config) in networks.items():
            (model / name).mkdir(parents=True)
            write_json(model / name / "config.json", stored_config(network.__name__, config))
            write_zeros(model / name / "model.safetensors", specs_of(network, config))
        shutil.copytree(locate("sigma-mini") / "tokenizer", model / "tokenizer")
    options += ("--model", model, "--text-encoder-memory", "layers", "--steps", 2, "--out", folder / "image.png")
    return run_tool("generate.py", problems.PROMPTS[0], *options)


def tiled_image_1024(folder, peer_python):
    """The same, decoded in tiles."""
    return image_1024(folder, peer_python, "--vae-tiling")


def convert_t5_part(folder, peer_python):
    """A .pth file of T5-XXL's first layers, of zeros, to this project's format in fp16."""
    return translated(t5_part(folder), folder)


def torch_t5_part(folder, peer_python, mmap=False):
    """The same file by torch.load, half() and torch.save, in the Python of --peer-python."""
    size = sum(spec.nbytes for spec in t5_specs(T5_PART_LAYERS))
    free = available_bytes()
    if free < 1.5 * size + 2e9:
        raise MindSigmaError(f"PyTorch needs {1.5 * size / 1e9:.1f} GB and 2 to spare, {free / 1e9:.1f} GB are free")
    source = t5_part(folder)
    run = run_command([peer_python, "-c", TORCH_T5, str(source), str(folder / "out.pth"), str(int(mmap))], peer_python)
    return {**run, "source_bytes": source.stat().st_size}


def torch_t5_part_mmap(folder, peer_python):
    """The same with torch.load(mmap=True)."""
    return torch_t5_part(folder, peer_python, mmap=True)


def t5_specs(layers=24):
    """TensorSpec of each fp32 tensor of a T5-XXL encoder."""
    from mindsigma.models.t5 import T5Config, T5Encoder

    return specs_of(T5Encoder, T5Config(num_layers=layers))


def specs_of(network, config):
    """TensorSpec of each fp32 tensor of a network."""
    import numpy as np
    from mindspore.nn.utils import no_init_parameters

    from mindsigma.weights.formats.tensor_stream import TensorSpec

    with no_init_parameters():
        cell = network(config)
    return [TensorSpec(p.name, np.dtype(np.float32), tuple(p.shape)) for p in cell.get_parameters()]


def write_zeros(path, specs):
    """A safetensors file of zeros that takes no room on the disk."""
    from mindsigma.weights.formats.safetensors_writer import safetensors_header

    header = safetensors_header(path, specs, None)
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(spec.nbytes for spec in specs))


def t5_part(folder):
    """A .pth file of zeros in the shapes of the first layers of a T5-XXL encoder."""
    import numpy as np

    from mindsigma.weights.formats.torch_writer import write_torch

    source = folder / "t5-part.pth"
    if not source.exists():
        specs = t5_specs(T5_PART_LAYERS)
        shapes = {spec.name: spec.shape for spec in specs}
        write_torch(source, specs, lambda name: np.zeros(shapes[name], np.float32))
    return source


def translated(source, folder):
    """Seconds, peak memory and bytes of a translation to fp16."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        run = run_tool("convert.py", source, Path(out) / "t5", "--to", "mindspore", "--dtype", "fp16")
    return {**run, "source_bytes": source.stat().st_size}


def available_bytes():
    """Memory that can be had without swapping."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


COMMANDS = {
    "mini-cold": mini_cold,
    "mini-cold-cached": mini_cold_cached,
    "image-1024": image_1024,
    "image-1024-tiled": tiled_image_1024,
    "convert-t5-xxl": convert_t5_xxl,
    "convert-t5-part": convert_t5_part,
    "torch-t5-part": torch_t5_part,
    "torch-t5-part-mmap": torch_t5_part_mmap,
}
NEED_TORCH = ("torch-t5-part", "torch-t5-part-mmap")
WARMED = ("mini-cold-cached",)  # whose first run is another thing
DIFFUSERS_COMMANDS = {"mini-cold": diffusers_cold, "mini-cold-cached": diffusers_cold}
