"""What it takes to let a peer run the same cases: its script, its inputs, its training step, the comparison."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from measure import problems
from measure.commands import DIFFUSERS_COMMANDS, PEERS, TOOLS, available_bytes, peer_environment, run_tool
from measure.turns import Command, Worker
from mindsigma.errors import MindSigmaError

# Cases of each peer that run in one process; the commands and the training step come beside them.
PEER_CASES = {
    "diffusers": (
        "mini-warm", "mini-warm-4", "mini-step", "xl-256", "xl-512", "xl-1024", "vae-512", "t5-mini", "t5-xxl-2",
    ),
    "mindone": ("mini-step", "xl-256"),
}  # fmt: skip
SAME_WEIGHTS = ("mini-warm", "mini-warm-4", "mini-step", "t5-mini")  # whose results are compared
MINDONE_XL_BYTES = 16e9
TRAINING_STEPS = 12  # two of them warm up


def write_inputs(folder):
    """sigma-mini as a diffusers folder, and the token ids of the prompts, as folder / "mini"."""
    from mindsigma.weights.locate import locate
    from mindsigma.weights.tokenizer import Tokenizer

    mini = folder / "mini"
    run_tool("convert.py", "sigma-mini", mini, "--to", "diffusers", "--dtype", "fp32")
    tokenizer = Tokenizer(locate("sigma-mini") / "tokenizer")
    rows = tokenizer.encode([*problems.PROMPTS, ""], problems.CAPTION_TOKENS)
    ids = np.zeros((len(rows), problems.CAPTION_TOKENS), np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    np.savez(mini / "tokens.npz", ids=ids[:-1], mask=mask[:-1], empty=ids[-1:], empty_mask=mask[-1:])


def peer_contestant(peer, case, folder, python):
    """Worker or Command of a peer for a case; None if it has none."""
    if peer == "diffusers" and case in DIFFUSERS_COMMANDS:
        return Command(lambda: DIFFUSERS_COMMANDS[case](folder, python))
    if case not in PEER_CASES[peer]:
        return None
    script, options = PEERS / f"{peer}_cases.py", {"folder": str(folder / "mini")}
    if peer == "mindone":
        free = available_bytes()
        if case.startswith("xl") and free < MINDONE_XL_BYTES:
            raise MindSigmaError(
                f"mindone's XL/2 as one graph needs {MINDONE_XL_BYTES / 1e9:.0f} GB, {free / 1e9:.1f} GB are free; "
                "leave it out with --cases"
            )
        return Worker(sys.executable, script, case, options)
    return Worker(python, script, case, options, peer_environment())


def difference(ours, theirs):
    """How far two results of a case are apart: relative error; for pictures PSNR in dB and the largest step of 255."""
    if ours.shape != theirs.shape:
        raise MindSigmaError(f"results of shapes {ours.shape} and {theirs.shape}: not the same work")
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    result = {"relative_error": float(np.linalg.norm(a - b) / np.linalg.norm(b))}
    if ours.dtype == np.uint8:
        square = float(np.mean((a - b) ** 2))
        result["psnr_db"] = 10 * np.log10(255**2 / square) if square else None  # None: identical
        result["largest_difference"] = int(np.abs(a - b).max())
    return result


def training_step(folder, python, repeats):
    """Results of both, as of `in_turn`, of tools/compare_training.py; one after the other, not in turn."""
    out = folder / "training.json"
    steps = TRAINING_STEPS if repeats is None else repeats + 2
    command = [sys.executable, str(TOOLS / "compare_training.py"), "--peer-python", str(python)]
    command += ["--steps", str(steps), "--output", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise MindSigmaError(f"compare_training.py: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    report = json.loads(Path(out).read_text(encoding="utf-8"))
    results = []
    for name in ("here", "torch"):
        seconds, peak = [line["seconds"] for line in report[name]["lines"]], report[name]["peak_gb"]
        counted = seconds[2:]
        results.append(
            {
                "seconds": counted,
                "median_seconds": float(np.median(counted)),
                "first_seconds": seconds[0],
                "peak_bytes": int(peak * 1e9),
            }
        )
    worst = max(abs(a["loss"] - b["loss"]) for a, b in zip(report["here"]["lines"], report["torch"]["lines"]))
    return *results, {"loss_difference": worst}
