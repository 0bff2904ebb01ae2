"""Other places that a run reports to: Weights & Biases and SwanLab, each an extra of its own."""

import hashlib
import os
from pathlib import Path

from mindsigma.errors import MindSigmaError, one_line

TRACKERS = ("wandb", "swanlab")
PROJECT = "mindsigma"


def open_tracker(name, folder, options):
    """A tracker with log, images and close, or raises MindSigmaError.

    Args:
        name: of TRACKERS. folder: Path of the run, by whose name it is known there.
        options: dict of the run's options.
    """
    try:
        module = __import__(name)
    except ImportError:
        raise MindSigmaError(f"--tracker {name} needs a package: pip install 'mindsigma[{name}]'") from None
    try:
        return {"wandb": weights_and_biases, "swanlab": swanlab}[name](module, Path(folder), options)
    except Exception as error:  # not logged in, no network: whatever the package raises
        offline = {"wandb": "WANDB_MODE=offline", "swanlab": "SWANLAB_MODE=offline"}[name]
        raise MindSigmaError(
            f"--tracker {name}: cannot begin ({one_line(f'{type(error).__name__}: {error}', 200)}); log in there "
            f"({name} login), or set {offline}"
        ) from None


class Tracker:
    """What both packages share once a run has begun there.

    Args:
        module: the package. run: what takes numbers and images.
    """

    def __init__(self, module, run):
        self._module, self._run = module, run

    def log(self, step, numbers):
        """Numbers of a step."""
        self._run.log(numbers, step=step)

    def images(self, step, prompts, images):
        """Images of a step, uint8 (H, W, 3) each."""
        shown = [self._module.Image(image, caption=prompt) for prompt, image in zip(prompts, images)]
        self._run.log({"samples": shown}, step=step)

    def close(self):
        """Send what is left."""
        self._run.finish()


def weights_and_biases(module, folder, options):
    """Tracker of Weights & Biases; a run that goes on continues its curves."""
    run = module.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT), name=folder.name, dir=str(folder), config=options,
        id=identity(folder), resume="allow",
    )  # fmt: skip
    return Tracker(module, run)


def swanlab(module, folder, options):
    """Tracker of SwanLab, whose run is the module itself."""
    module.init(
        project=os.environ.get("SWANLAB_PROJ_NAME", PROJECT), experiment_name=folder.name,
        logdir=str(folder / "swanlab"), config=options,
        **({"mode": os.environ["SWANLAB_MODE"]} if "SWANLAB_MODE" in os.environ else {}),
    )  # fmt: skip
    return Tracker(module, module)


def identity(folder):
    """What a run is known by when it goes on: a short text that follows from its folder."""
    return hashlib.sha256(str(Path(folder).resolve()).encode()).hexdigest()[:16]
