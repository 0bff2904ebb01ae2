"""Times denoising and training steps on the device at hand, and says which kernels take the time."""

import csv
import statistics
import tempfile
import time
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore.nn.utils import no_init_parameters

from mindsigma.errors import MindSigmaError
from mindsigma.models.dit import DiT
from mindsigma.models.dit_config import PRESETS
from mindsigma.pipeline.phases import peak_bytes
from mindsigma.runtime import resolve_dtype
from mindsigma.sampling.denoising import DenoisingGraphs, denoising_steps
from mindsigma.sampling.dpm_solver import DPMSolver
from mindsigma.weights.loading import prepared_for_sampling

# Preset of each resolution of PixArt-Sigma-XL-2, by pixels.
XL = {256: "256x256", 512: "512-MS", 1024: "1024-MS", 2048: "2K-MS", 4096: "4K-MS"}

# Where mindspore.profiler writes a table by kind of operation, and its columns of name, count and microseconds.
TABLES = (
    ("**/op_statistic*.csv", "OP Type", "Count", "Total Time(us)", 1.0),
    ("**/cpu_op_type_info_*.csv", "op_type", "type_occurrences", "total_compute_time", 1000.0),
)


def model_name(model, pixels):
    """Name of the preset to time at a size: `model` itself, or for "xl" the XL/2 of that size."""
    if model != "xl":
        return model
    if pixels not in XL:
        raise MindSigmaError(f"--sizes {pixels}: XL/2 was released for {', '.join(map(str, XL))} px")
    return f"PixArt-Sigma-XL-2-{XL[pixels]}"


def dit_of(model, dtype, **options):
    """DiT of a preset with small random weights."""
    if model not in PRESETS:
        raise MindSigmaError(f"--model {model}: not a preset; choose xl or from {', '.join(PRESETS)}")
    rng = np.random.default_rng(0)
    with no_init_parameters():
        dit = DiT(PRESETS[model], dtype, **options)
    for parameter in dit.get_parameters():
        values = rng.standard_normal(parameter.shape, np.float32) * np.float32(0.02)
        parameter.set_data(Tensor(values).astype(parameter.dtype))
    return dit


def denoising(model, pixels, dtype, tokens):
    """A function that runs one guided step of batch 1 and waits for it."""
    dit = prepared_for_sampling(dit_of(model, resolve_dtype(dtype)))
    rng = np.random.default_rng(1)
    side, channels = pixels // 8, dit.config.in_channels
    tokens = tokens or dit.config.model_max_length
    caption = Tensor(rng.standard_normal((1, tokens, dit.config.caption_channels), np.float32))
    mask = Tensor(np.ones((1, tokens), np.int32))
    latents = Tensor(rng.standard_normal((1, channels, side, side), np.float32))
    graphs, sampler = DenoisingGraphs(dit), DPMSolver()

    def steps():
        while True:
            trajectory = denoising_steps(graphs, latents, sampler, 20, (caption, mask), 4.5, (caption, mask))
            next(trajectory)
            yield from trajectory

    without_end = steps()
    return lambda: next(without_end).latents.asnumpy()


def training(model, pixels, dtype, tokens, batch=1):
    """A function that runs one training step (CAME, fp32 weights) and waits for it."""
    from mindsigma.backends.cpu import accelerate
    from mindsigma.backends.cpu.step import accelerate_step
    from mindsigma.training.loss import COLUMNS
    from mindsigma.training.step import StepConfig, TrainingStep

    dtype = resolve_dtype(dtype)
    dit = accelerate(dit_of(model, dtype, parameter_dtype=ms.float32).set_train())
    config = StepConfig(loss_scale=65536.0 if dtype == ms.float16 else 0.0, masters=True)
    step = accelerate_step(TrainingStep(dit, dit.trainable_params(), None, config))
    rng = np.random.default_rng(1)
    side, tokens = pixels // 8, tokens or dit.config.model_max_length
    latents = (batch, dit.config.in_channels, side, side)
    shapes = (latents, latents, (batch, len(COLUMNS)), (batch,), (batch, tokens, dit.config.caption_channels))
    inputs = [Tensor(np.abs(rng.standard_normal(shape, np.float32))) for shape in shapes]
    inputs.append(Tensor(np.ones((batch, tokens), np.float32)))
    return lambda: step.run([tuple(inputs)], 1e-5)


def timed(run, warm_up, steps, profiled):
    """Seconds of a function that waits for the device, and where they go.

    Args:
        warm_up: calls before, the first of which compiles.
        steps: calls that are timed one by one.
        profiled: further calls under mindspore.profiler; 0: none.

    Returns:
        dict with first_seconds, seconds (list), median_seconds, peak_bytes and kernels: rows (kind, count, seconds) of
        the profiled calls, the most expensive first.
    """
    start = time.perf_counter()
    run()
    first = time.perf_counter() - start
    for _ in range(warm_up - 1):
        run()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return {
        "first_seconds": first,
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "peak_bytes": peak_bytes(),
        "kernels": kernels_of(run, profiled) if profiled else [],
    }


def kernels_of(run, count):
    """Rows (kind, count, seconds) of `count` calls of a function, from mindspore.profiler."""
    from mindspore.profiler import ProfilerActivity, profile, tensorboard_trace_handler

    activities = [ProfilerActivity.CPU]
    if ms.get_context("device_target") == "Ascend":
        activities.append(ProfilerActivity.NPU)
    with tempfile.TemporaryDirectory() as folder:
        with profile(activities=activities, on_trace_ready=tensorboard_trace_handler(folder)) as profiler:
            for _ in range(count):
                run()
                profiler.step()
        return read_tables(Path(folder))


def read_tables(folder):
    """Rows (kind, count, seconds) of the first of TABLES that a profiler's folder holds, summed over its files."""
    for pattern, kind, count, total, unit in TABLES:
        rows = {}
        for file in sorted(folder.glob(pattern)):
            with open(file, encoding="utf-8", newline="") as text:
                for row in csv.DictReader(text, skipinitialspace=True):
                    number, seconds = rows.get(row[kind], (0, 0.0))
                    rows[row[kind]] = number + int(float(row[count])), seconds + float(row[total]) * unit / 1e6
        if rows:
            return sorted(([name, *values] for name, values in rows.items()), key=lambda row: -row[2])
    return []


def software():
    """dict of the device's name and the versions that decide its speed, as far as this host tells."""
    found = {"device": ms.get_context("device_target"), "mindspore": ms.__version__}
    for name, file in (
        ("driver", "/usr/local/Ascend/driver/version.info"),
        ("cann", "/usr/local/Ascend/ascend-toolkit/latest/version.cfg"),
    ):
        try:
            lines = Path(file).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        found[name] = next((line.partition("=")[2].strip("[]\n ") for line in lines if "ersion" in line), "unknown")
    if found["device"] == "Ascend":
        found["device"] = _npu_name() or "Ascend"
    return found


def _npu_name():
    """Name of the first NPU that npu-smi lists, or None."""
    import re
    import subprocess

    try:
        listing = subprocess.run(["npu-smi", "info"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"\|\s*\d+\s+(\S*(?:910|310)\S*)", listing)
    return None if match is None else f"Ascend {match[1]}"
