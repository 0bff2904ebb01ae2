"""The machine in a line, and the results as text and as Markdown."""

import os
import platform
from importlib import metadata
from pathlib import Path

from mindsigma import __version__

TITLES = {
    "mini-warm": "sigma-mini, 256 px, 20 steps, one image, warm",
    "mini-warm-4": "the same, four images in a batch",
    "mini-cold": "one image, process start to file",
    "mini-cold-cached": "the same, started before (compile cache)",
    "mini-step": "sigma-mini's DiT, one call (batch 2, 300 text tokens)",
    "mini-decode-4k": "sigma-mini's VAE, tiled decode of 4096 x 4096 px",
    "xl-256": "XL/2, one guided step, 256 px",
    "xl-512": "XL/2, one guided step, 512 px",
    "xl-1024": "XL/2, one guided step, 1024 px",
    "xl-1024-kv": "XL/2, one guided step, 1024 px, KV compression",
    "image-1024": "one picture of 1024 px by XL/2, two steps, T5-XXL by layers, start to file",
    "image-1024-tiled": "the same, decoded in tiles",
    "vae-512": "SDXL's VAE, decode of 512 x 512 px",
    "t5-mini": "sigma-mini's T5, 300 tokens",
    "t5-xxl-2": "T5-XXL, two of its layers, 300 tokens",
    "train-mini": "training step of sigma-mini, 256 px, batch 8",
    "convert-t5-xxl": "translation of a T5-XXL of zeros, fp32 to fp16",
    "convert-t5-part": "translation of its first 10 layers, a .pth",
    "torch-t5-part": "the same by PyTorch",
    "torch-t5-part-mmap": "the same by PyTorch, mmap=True",
}


def machine():
    """Processor, cores, memory, versions and what of the environment bears on speed."""
    model = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    tuned = ("OPENBLAS_CORETYPE", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 1e9, 1),
        "python": platform.python_version(),
        "mindsigma": __version__,
        **{name: metadata.version(name) for name in ("mindspore", "numpy")},
        **{name: os.environ[name] for name in tuned if name in os.environ},
    }


def text_line(case, result, peer=None):
    """A line of the table on the terminal."""
    line = f"{case:<18} {peer or 'here':<10} {result['median_seconds']:9.2f} {result['first_seconds']:9.2f}"
    line += f" {result['peak_bytes'] / 1e9:8.2f}"
    if "ratio" in result:
        line += f" {result['ratio']:9.2f}"
    if "source_bytes" in result:
        line += f" {result['source_bytes'] / 1e6 / result['median_seconds']:.0f} MB/s"
    return line


TEXT_HEAD = f"{'case':<18} {'by':<10} {'median s':>9} {'first s':>9} {'peak GB':>8} {'peer/here':>9}"


def markdown(report):
    """The whole report as Markdown: a table for each peer, one without if there is none."""
    cases = report["cases"]
    peers = list(dict.fromkeys(peer for result in cases.values() for peer in result.get("peers", {})))
    parts = []
    for peer in peers:
        rows = [(case, r["peers"][peer]) for case, r in cases.items() if peer in r.get("peers", {})]
        version = report["machine"].get(peer, "")
        head = ["case", "here, s", f"{peer} {version}, s", f"{peer} / here", "peak here", peer, "runs", "difference"]
        parts.append(table(head, [peer_cells(case, theirs) for case, theirs in rows]))
    alone = [(case, result) for case, result in cases.items() if not result.get("peers")]
    if alone:
        head = ["case", "seconds", "first run", "peak memory"]
        parts.append(table(head, [own_cells(case, result) for case, result in alone]))
    return "\n\n".join([*parts, _machine_line(report["machine"])]) + "\n"


def own_cells(case, result):
    """Row of a case that has no peer."""
    return [TITLES[case], seconds(result["median_seconds"]), seconds(result["first_seconds"]), gigabytes(result)]


def peer_cells(case, theirs):
    """Row of a case beside a peer's."""
    ours = theirs["here"]
    return [
        TITLES[case],
        seconds(ours["median_seconds"]),
        seconds(theirs["median_seconds"]),
        f"**{theirs['ratio']:.2f}**",
        gigabytes(ours),
        gigabytes(theirs),
        str(len(ours["seconds"])),
        _difference(theirs.get("difference")),
    ]


def table(head, rows):
    """Markdown of rows of cells."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _difference(value):
    if not value:
        return ""
    if "loss_difference" in value:
        return f"loss {value['loss_difference']:.0e}"
    if "largest_difference" in value:
        db = "identical" if value["psnr_db"] is None else f"{value['psnr_db']:.0f} dB"
        return f"{db}, at most {value['largest_difference']} of 255"
    return f"{value['relative_error']:.0e}"


def _machine_line(info):
    return "(" + ", ".join(f"{name} {value}" for name, value in info.items()) + ")"


def seconds(value):
    """Three digits at most."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def gigabytes(result):
    """Peak memory."""
    return f"{result['peak_bytes'] / 1e9:.1f} GB"
