"""Measure seconds and peak memory: sigma-mini images cold and warm, guided steps of XL/2, translation of T5-XXL.

    python tools/benchmark.py

Every case runs in a process of its own; the first run of a case compiles and is not counted. Prints a table and
writes JSON with the machine and the versions.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mindsigma import __version__, command_line  # noqa: E402
from mindsigma.errors import MindSigmaError  # noqa: E402

PROMPT = "a penguin on a yellow background"
CAPTION_TOKENS = 300  # XL/2 is measured with the longest caption
XL_CASES = {
    "xl-256": ("PixArt-Sigma-XL-2-256x256", 256),
    "xl-512": ("PixArt-Sigma-XL-2-512-MS", 512),
    "xl-1024": ("PixArt-Sigma-XL-2-1024-MS", 1024),
    "xl-1024-kv": ("PixArt-Sigma-XL-2-1024-MS-KV", 1024),
}
# torch.load + half() + torch.save hold a checkpoint one and a half times, so theirs is one of 10 layers of the 24.
T5_PART_LAYERS = 10
TORCH_CASES = ("torch-t5-part", "torch-t5-part-mmap")
CASES = ("mini-cold", "mini-warm", "mini-decode-4k", "convert-t5-xxl", "convert-t5-part", *TORCH_CASES, *XL_CASES)
DEFAULT_CASES = ("mini-cold", "mini-warm", "xl-256", "xl-512")


def mini_cold(folder):
    """One image from process start to file."""
    return run_tool("generate.py", PROMPT, "--out", f"{folder}/image.png")


def convert_t5_xxl(folder):
    """A checkpoint of T5-XXL's shapes (19 GB in fp32, a sparse file of zeros) to this project's format in fp16."""
    from mindsigma.checkpoints.safetensors_writer import safetensors_header

    specs = t5_specs()
    source = Path(folder) / "t5-xxl.safetensors"
    header = safetensors_header(source, specs, None)
    with open(source, "wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(spec.nbytes for spec in specs))
    return translated(source, folder)


def convert_t5_part(folder):
    """A .pth file of T5-XXL's first layers, of zeros, to this project's format in fp16."""
    return translated(t5_part(folder), folder)


def torch_t5_part(folder, mmap=False):
    """The same file by torch.load, half() and torch.save, in the Python of --peer-python."""
    python = os.environ.get(PEER_VARIABLE)
    if not python:
        raise MindSigmaError("--cases torch-t5-part: give --peer-python, an interpreter that has PyTorch")
    size = sum(spec.nbytes for spec in t5_specs(T5_PART_LAYERS))
    free = available_bytes()
    if free < 1.5 * size + 2e9:
        raise MindSigmaError(f"PyTorch needs {1.5 * size / 1e9:.1f} GB and 2 to spare, {free / 1e9:.1f} GB are free")
    source = t5_part(folder)
    run = run_command([python, "-c", PEER, str(source), str(Path(folder) / "out.pth"), str(int(mmap))], python)
    return {**run, "source_bytes": source.stat().st_size}


PEER_VARIABLE = "MINDSIGMA_PEER_PYTHON"
PEER = """
import sys, torch
state = torch.load(sys.argv[1], map_location="cpu", mmap=sys.argv[3] == "1")
state = {name: tensor.half() for name, tensor in state["state_dict"].items()}
torch.save(state, sys.argv[2])
"""


def t5_specs(layers=24):
    """TensorSpec of each fp32 tensor of a T5-XXL encoder."""
    import numpy as np
    from mindspore.nn.utils import no_init_parameters

    from mindsigma.checkpoints.tensor_stream import TensorSpec
    from mindsigma.models.t5 import T5Config, T5Encoder

    with no_init_parameters():
        encoder = T5Encoder(T5Config(num_layers=layers), kernels="math")
    return [TensorSpec(p.name, np.dtype(np.float32), tuple(p.shape)) for p in encoder.get_parameters()]


def t5_part(folder):
    """A .pth file of zeros in the shapes of the first layers of a T5-XXL encoder."""
    import numpy as np

    from mindsigma.checkpoints.torch_writer import write_torch

    specs = t5_specs(T5_PART_LAYERS)
    shapes = {spec.name: spec.shape for spec in specs}
    source = Path(folder) / "t5-part.pth"
    write_torch(source, specs, lambda name: np.zeros(shapes[name], np.float32))
    return source


def translated(source, folder):
    """Seconds, peak memory and bytes of a translation to fp16."""
    run = run_tool("convert.py", source, Path(folder) / "out", "--to", "mindspore", "--dtype", "fp16")
    return {**run, "source_bytes": source.stat().st_size}


def available_bytes():
    """Memory that can be had without swapping."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def run_tool(name, *arguments):
    """Seconds and peak memory of one of the tools, from process start to end."""
    return run_command([sys.executable, str(ROOT / "tools" / name), *map(str, arguments)], f"tools/{name}")


def run_command(command, name):
    """Seconds and peak memory of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.stderr.close()
    if status != 0:
        lines = errors.decode().strip().splitlines() or [f"it ended with {status}"]
        raise MindSigmaError(f"{name} failed: {lines[-1]}")
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": usage.ru_maxrss * 1024}


TOOL_CASES = {
    "mini-cold": mini_cold,
    "convert-t5-xxl": convert_t5_xxl,
    "convert-t5-part": convert_t5_part,
    "torch-t5-part": torch_t5_part,
    "torch-t5-part-mmap": lambda folder: torch_t5_part(folder, mmap=True),
}


def mini_warm(repeats):
    """One image of 256 px in 20 steps, prompt to picture, in a process that has drawn before."""
    from mindsigma import PixArtSigmaPipeline

    pipeline = PixArtSigmaPipeline.from_pretrained("sigma-mini")
    return timed(lambda: pipeline(PROMPT, seed=0, progress=False), repeats)


def mini_decode_4k(repeats):
    """Tiled decode of 4096 x 4096 pixels by sigma-mini's VAE, without turning them into a picture."""
    import numpy as np

    from mindsigma import PixArtSigmaPipeline
    from mindsigma.models.vae_tiling import decode_tiled

    pipeline = PixArtSigmaPipeline.from_pretrained("sigma-mini")
    latents = np.random.default_rng(0).standard_normal((1, 4, 512, 512), np.float32)
    return timed(lambda: decode_tiled(pipeline.vae, latents), repeats)


def xl_step(name, pixels):
    """A function (repeats) that times one guided step (batch 2) of XL/2 with random weights."""

    def measure(repeats):
        import numpy as np
        from mindspore import Tensor
        from mindspore.nn.utils import no_init_parameters

        from mindsigma.models.dit import DiT
        from mindsigma.models.dit.config import preset
        from mindsigma.runtime import set_device

        set_device()
        rng = np.random.default_rng(0)
        with no_init_parameters():
            dit = DiT(preset(name))
        for parameter in dit.get_parameters():
            parameter.set_data(Tensor(rng.standard_normal(parameter.shape, np.float32) * np.float32(0.02)))
        side = pixels // 8
        latents = Tensor(rng.standard_normal((2, 4, side, side), np.float32))
        rows, position = dit.modulations(Tensor([500.0])), dit.position(latents.shape)
        caption = Tensor(rng.standard_normal((2, CAPTION_TOKENS, dit.config.caption_channels), np.float32))
        keys = dit.encode_caption(caption, Tensor(np.ones((2, CAPTION_TOKENS), np.int32)))

        def step():
            if not np.isfinite(dit.denoise(latents, rows, keys, position).asnumpy()).all():
                raise MindSigmaError(f"{name}: the step gave values that are not finite")

        return timed(step, repeats)

    return measure


def timed(function, repeats):
    """Seconds of `repeats` calls after a first one, which compiles, and peak memory of the process."""
    from mindsigma.pipeline.phases import peak_bytes

    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[1:] or seconds, "first_seconds": seconds[0], "peak_bytes": peak_bytes()}


def run_case(case, repeats):
    """Result of one case, measured in this process."""
    if case in TOOL_CASES:
        runs = []
        for _ in range(max(repeats, 1)):
            with tempfile.TemporaryDirectory() as folder:
                runs.append(TOOL_CASES[case](folder))
        return {
            "seconds": [run["seconds"] for run in runs],
            "first_seconds": runs[0]["seconds"],
            "cpu_seconds": [run["cpu_seconds"] for run in runs],
            "peak_bytes": max(run["peak_bytes"] for run in runs),
            **({"source_bytes": runs[0]["source_bytes"]} if "source_bytes" in runs[0] else {}),
        }
    others = {"mini-warm": mini_warm, "mini-decode-4k": mini_decode_4k}
    return (others[case] if case in others else xl_step(*XL_CASES[case]))(repeats)


def in_new_process(case, repeats):
    """Result of one case, measured in a process of its own."""
    command = [sys.executable, __file__, "--only", case, "--repeats", str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise MindSigmaError(f"case {case} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def machine():
    """Processor, cores, memory and versions."""
    from importlib import metadata

    model = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions = {name: metadata.version(name) for name in ("mindspore", "numpy")}
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
        "python": platform.python_version(),
        "mindsigma": __version__,
        **versions,
    }


def main():
    """Run the cases, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(DEFAULT_CASES), help="what to measure")
    parser.add_argument("--repeats", type=int, default=5, help="counted runs a case; with 0 the first one counts")
    parser.add_argument("--peer-python", metavar="PATH", help="an interpreter with PyTorch, for the torch- cases")
    parser.add_argument("--out", default="outputs/benchmark.json", help="where the numbers go")
    parser.add_argument("--only", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.repeats < 0:
        raise MindSigmaError(f"--repeats must be at least 0, not {args.repeats}")
    if args.only:
        print(json.dumps(run_case(args.only, args.repeats)))
        return 0
    if args.peer_python:
        os.environ[PEER_VARIABLE] = args.peer_python
    report = {"machine": machine(), "cases": {}}
    print(", ".join(f"{name} {value}" for name, value in report["machine"].items()))
    print(f"{'case':<18} {'median s':>9} {'first s':>9} {'peak GB':>8} {'MB/s read':>9}")
    for case in args.cases:
        result = in_new_process(case, args.repeats)
        median = statistics.median(result["seconds"])
        report["cases"][case] = {**result, "median_seconds": median}
        rate = f"{result['source_bytes'] / 1e6 / median:9.0f}" if "source_bytes" in result else ""
        line = f"{case:<18} {median:9.2f} {result['first_seconds']:9.2f} {result['peak_bytes'] / 1e9:8.2f} {rate}"
        print(line.rstrip(), flush=True)
    out = Path(args.out)
    from mindsigma.checkpoints.atomic import write_json

    write_json(out, report)
    print(out)
    return 0


if __name__ == "__main__":
    command_line.run(main)
