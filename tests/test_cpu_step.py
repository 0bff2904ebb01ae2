"""The CPU's passes over all weights in a training step, against the plain step."""

import resource

import numpy as np
import pytest
from conftest import relative_error
from test_training_step import RATE, broken, inputs, same, variables
from training_runs import tiny_dit

from mindsigma.backends.cpu import accelerate, kernels
from mindsigma.backends.cpu.library import library
from mindsigma.backends.cpu.step import FastStep, accelerate_step, keep_freed_memory
from mindsigma.training.optimizers import OptimizerConfig
from mindsigma.training.step import StepConfig, TrainingStep

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler, or MINDSIGMA_NATIVE=0")


def step_of(optimizer, dit):
    """A TrainingStep with all that a step does; eps above the rounding of gradients that are zero by definition."""
    eps = {"adamw": (1e-3,), "came": (1e-4, 1e-8), "lion": None}[optimizer]
    config = StepConfig(accumulation=2, ema_decay=0.9, max_norm=0.5, loss_scale=8.0)
    return TrainingStep(dit, dit.trainable_params(), OptimizerConfig(optimizer, eps=eps, weight_decay=0.1), config)


@pytest.mark.parametrize("optimizer", ["adamw", "came"])
def test_steps_are_those_of_the_plain_one(optimizer):
    """Norm, loss and weights after three steps, one of which overflows and leaves no trace but counts."""
    plain, fast = step_of(optimizer, tiny_dit()), accelerate_step(step_of(optimizer, accelerate(tiny_dit())))
    assert type(fast) is FastStep and type(plain) is TrainingStep
    for i in range(2):
        batches = [inputs(2 * i), inputs(2 * i + 1)]
        np.testing.assert_allclose(fast.run(batches, RATE), plain.run(batches, RATE), rtol=1e-5)
    before = variables(fast)
    assert not fast.run([inputs(4), broken(5)], RATE)[3] and not plain.run([inputs(4), broken(5)], RATE)[3]
    assert same({n: v for n, v in before.items() if ":sum" not in n}, variables(fast))
    fast.run([inputs(6), inputs(7)], RATE), plain.run([inputs(6), inputs(7)], RATE)
    np.testing.assert_array_equal(fast.controls.asnumpy(), plain.controls.asnumpy())
    first, second = variables(plain), variables(fast)
    worst = {name: relative_error(second[name], first[name]) for name in first if first[name].any()}
    assert max(worst.values()) < 1e-5, max(worst, key=worst.get)


def test_freed_memory_is_used_again():
    """A large piece is cleared by the system once, and not each time."""
    keep_freed_memory()
    pages = (64 << 20) // resource.getpagesize()
    kernels.empty(16 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        kernels.empty(16 << 20)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < pages
