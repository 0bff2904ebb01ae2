"""What a run tells while it goes: a progress line, a JSON-lines log, TensorBoard events, a picture of the curves."""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

from mindsigma.errors import LONGEST_LINE as LONGEST_SHOWN
from mindsigma.errors import MindSigmaError, bounded, say
from mindsigma.foreign import load_json, open_regular, understanding
from mindsigma.progress import duration
from mindsigma.weights.formats.atomic import naming, replacing

LOG = "log.jsonl"
LONGEST_LINE = 1 << 16  # bytes of a line of the log


def read_log(path):
    """list of dicts of a JSON-lines file, each with a whole number `step` and other numbers.

    A line that a kill cut off ends the list, others are left out. Raises MindSigmaError where the file cannot be read.
    """
    lines = []
    if not os.path.lexists(path):
        return lines
    with open_regular(path) as file, understanding(path):
        while (text := file.readline(LONGEST_LINE)).endswith(b"\n"):
            try:
                line = load_json(path, text, "a line")
            except MindSigmaError:
                break
            if type(line.get("step")) is int and all(type(value) in (int, float) for value in line.values()):
                lines.append(line)
    return lines


class Report:
    """Writes into the folder of a run; only the first process has one.

    Args:
        folder: Path of the run.
        total: steps of the run.
        start: step that the run goes on from; what an earlier run logged beyond it is forgotten.
        tensorboard: whether to write events.
        tracker: of open_tracker, which is told the same, or None.
    """

    def __init__(self, folder, total, start=0, tensorboard=True, tracker=None):
        from tqdm import tqdm

        self.folder, self.start, self.total = Path(folder), start, total
        for leftover in self.folder.glob(".*.part"):  # of a run that was killed: the folder is this run's alone
            if leftover.is_file():
                leftover.unlink(missing_ok=True)
        # A run that starts anew measures step 0 again, too.
        self.lines = [line for line in read_log(self.folder / LOG) if line["step"] <= start] if start else []
        with replacing(self.folder / LOG) as file:
            file.write("".join(json.dumps(line) + "\n" for line in self.lines).encode())
        with naming(self.folder / LOG):
            self._log = open(self.folder / LOG, "a", encoding="utf-8")
        self._events, self._tracker = None, tracker
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(self.folder / "tensorboard"), purge_step=start + 1)
        self._bar = tqdm(
            total=total,
            initial=start,
            desc="train",
            unit="step",
            dynamic_ncols=True,
            disable=None,
            file=sys.stderr,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}",
        )
        self._began = self._last = time.perf_counter()
        self._images = 0
        self._apart = [0.0, 0]  # seconds and number of the steps that compiled, which tell nothing about the others

    def step(self, step, values, images, show):
        """A step is done.

        Args:
            step: its number, the first being 1.
            values: dict of floats.
            images: images it took, over all processes.
            show: whether to log it and to refresh the line.
        """
        self._images += images
        self._bar.update(1)
        if not show:
            return
        now = time.perf_counter()
        rate = self._images / max(now - self._last, 1e-9)
        self._last, self._images = now, 0
        left = self._left(step, now)
        self.log({"step": step, **values, "images_per_second": round(rate, 3), "seconds": round(now - self._began, 2)})
        text = f"loss {values['loss']:.4f} norm {values['grad_norm']:.3g} lr {values['lr']:.2e} {rate:.2f} images/s"
        if self._bar.disable:
            say(f"step {step}/{self.total} {text}{left}")
        else:
            self._bar.set_postfix_str(f"{text}{left}")

    def compiled(self, seconds):
        """The step that comes next to `step` took so long because something was compiled for it."""
        self._apart = [self._apart[0] + seconds, self._apart[1] + 1]

    def _left(self, step, now):
        """Text about the time that is left, "" where nothing can be said yet."""
        steps = step - self.start - self._apart[1]
        if steps < 1 or step >= self.total:
            return ""
        return f", {duration((self.total - step) * (now - self._began - self._apart[0]) / steps)} to go"

    def log(self, line):
        """Append a dict with `step` to the log and its numbers to the events."""
        self.lines.append(line)
        with naming(self.folder / LOG):
            self._log.write(json.dumps(line) + "\n")
            self._log.flush()
        if self._events:
            for name, value in line.items():
                if name not in ("step", "seconds") and isinstance(value, (int, float)):
                    self._events.add_scalar(name, value, line["step"])
        if self._tracker:
            numbers = {name: value for name, value in line.items() if name not in ("step", "seconds")}
            self._tracker.log(line["step"], numbers)

    def images(self, step, prompts, images):
        """Validation images, uint8 (H, W, 3) each, go to the events; the caller writes the files."""
        if self._events:
            for i, (prompt, image) in enumerate(zip(prompts, images)):
                self._events.add_image(f"{i}: {prompt}", image, step, dataformats="HWC")
        if self._tracker:
            self._tracker.images(step, prompts, images)

    def say(self, text):
        """Print a line without disturbing the progress line."""
        self._bar.write(bounded(text, LONGEST_SHOWN), file=sys.stdout)
        sys.stdout.flush()

    def curves(self):
        """Draw loss.png from the log; nothing before there are two points."""
        points = [(line["step"], line["loss"]) for line in self.lines if "loss" in line]
        held_out = [(line["step"], line["validation_loss"]) for line in self.lines if "validation_loss" in line]
        if len(points) > 1:
            draw_curves(self.folder / "loss.png", points, held_out)

    def sync(self):
        """Bring the log to the disk, before a checkpoint that the run can go on from."""
        with naming(self.folder / LOG):
            os.fsync(self._log.fileno())

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """Finish all files; what fails then does not hide why the run ends."""
        self._bar.close()
        with contextlib.suppress(MindSigmaError, OSError) if kind else contextlib.nullcontext():
            self.curves()
            self.sync()
            if self._events:
                self._events.close()
            if self._tracker:
                self._tracker.close()
        with contextlib.suppress(OSError):
            self._log.close()


def smoothed(values, decay=0.95):
    """Exponential average of a list, corrected for its start."""
    result, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = mean * decay + value * (1 - decay), weight * decay + (1 - decay)
        result.append(mean / weight)
    return result


def draw_curves(path, points, held_out=()):
    """PNG of the training loss, raw and smoothed, and of the validation loss: lists of (step, loss)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps, losses = zip(*points)
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps, smoothed(losses), color="tab:blue", label="training, smoothed")
    if held_out:
        axes.plot(*zip(*held_out), color="tab:orange", marker="o", markersize=3, label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=100)
