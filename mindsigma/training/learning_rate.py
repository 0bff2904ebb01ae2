"""Learning rate as a function of the step: warm-up, then constant, cosine or linear; and its scaling with the batch."""

import math

from mindsigma.errors import MindSigmaError

SCHEDULES = ("constant", "cosine", "linear")
AUTO = ("none", "sqrt", "linear")
BASE_BATCH = 256


def scaled_rate(rate, batch, rule):
    """Learning rate for an effective batch (all ranks, all accumulated) from the one for a batch of 256.

    Args:
        rule: "sqrt": times sqrt(batch / 256); "linear": times batch / 256; "none".
    """
    if rule not in AUTO:
        raise MindSigmaError(f"auto_lr must be one of {', '.join(AUTO)}, not {rule!r}")
    ratio = batch / BASE_BATCH
    return rate * {"none": 1.0, "sqrt": math.sqrt(ratio), "linear": ratio}[rule]


def learning_rate(step, base, schedule="constant", warmup=0, total=None, final=0.0):
    """Learning rate of the step with number `step`, the first being 0.

    The warm-up rises linearly from base / warmup, so that no step is without effect, and reaches `base` in its last
    step. Cosine and linear then fall to `final` * base in the last of `total` steps.
    """
    if schedule not in SCHEDULES:
        raise MindSigmaError(f"lr_schedule must be one of {', '.join(SCHEDULES)}, not {schedule!r}")
    if step < warmup:
        return base * (step + 1) / warmup
    if schedule == "constant":
        return base
    if not total or total <= warmup:
        raise MindSigmaError(f"lr_schedule {schedule} needs more steps ({total}) than warm-up steps ({warmup})")
    done = min((step - warmup + 1) / (total - warmup), 1.0)
    share = 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return base * (final + (1.0 - final) * share)
