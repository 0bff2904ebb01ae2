"""The native kernels where they once brought the process down: tensors without rows, and forks while they compute."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mindsigma.ops.native import operations as native

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(not native.load(), reason="no C++ compiler, or MINDSIGMA_NATIVE=0")


def run(code, seconds=120):
    """Output of a process of its own: what goes wrong here ends a process, or never ends."""
    head = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(code)], capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return done.stdout


# Calls every function with one size after the other set to 0. Results must be of no elements, or zero; or a refusal.
WITHOUT_ROWS = """
import numpy as np
from mindsigma.errors import MindSigmaError
from mindsigma.ops.native import direct, operations
operations.load()
bits = direct.bits

def call(name, inputs, results, sums=False):
    count = 0
    sizes = [(i, axis) for i, value in enumerate(inputs) if value.dtype == np.float32 for axis in range(value.ndim)]
    for i, axis in sizes:
        shape = list(inputs[i].shape)
        size, shape[axis] = shape[axis], 0
        changed = list(inputs)
        changed[i] = np.ones(shape, np.float32)
        outs = [np.full(s, 7, np.float32) for s in results]
        for none in (False, True):  # with results of their own size, and of no size
            shapes = [[0 if n == size and none else n for n in out.shape] for out in outs]
            made = [np.full(s, 7, np.float32) for s in shapes]
            try:
                direct.call(name, (*changed, *made))
                assert all(not out.size or sums and not out.any() for out in made), (name, i, axis)
            except MindSigmaError:
                assert not sums and any(out.size for out in made), (name, i, axis)
            count += 1
    assert count
    print(name, count)

def f(*shape):
    return np.ones(shape, np.float32)

none = bits(0)
x, y = f(2, 3, 8), (2, 3, 8)
linear = (bits(1 | 2 | 8 | 16 | 32, 1e-6, 0), x, f(8, 8), f(8), f(2, 6, 8), f(8), x, x)
call("linear", linear, [y])
call("linear_gradient_of_input", (f(6, 5), f(5, 8)), [(6, 8)], True)
call("linear_gradient_of_weight", (f(6, 5), f(6, 8)), [(5, 8)], True)
call("linear_gradient_of_bias", (f(6, 5),), [(5,)], True)
call("modulated_linear_gradient", (bits(1e-6), f(2, 3, 5), x, f(2, 2, 8), f(5, 8)), [y, (2, 2, 8), (5, 8), (5,)], True)
heads = bits(2, 0.5, 8, 0, 0, 0, 0, 0)
call("attention", (heads, x, f(2, 4, 8), f(2, 4, 8), none), [y])
call("attention_gradient", (heads, x, x, f(2, 4, 8), f(2, 4, 8)), [y, (2, 4, 8), (2, 4, 8)], True)
image = f(2, 8, 4, 4)
call("group_normalisation", (bits(2, 1e-6, 1), image, f(8), f(8)), [image.shape])
for side in (1, 3):
    call("convolution", (bits(0, 1), image, f(5, 8, side, side), f(5), f(2, 5, 4, 4)), [(2, 5, 4, 4)])
call("convolution", (bits(1, 0), image, f(5, 8, 3, 3), f(5), none), [(2, 5, 8, 8)])
call("twice", (x,), [(4, 3, 8)])
call("patch_embedding", (f(2, 4, 8, 8), f(1, 16, 12), f(12, 4, 2, 2), f(12)), [(2, 16, 12)])
call("patch_prediction", (bits(0, 1e-6), f(2, 16, 12), f(2, 2, 12), f(2, 4, 8, 8), f(32, 12), f(32)), [(2, 8, 8, 8)])
latents = f(2, 4, 8, 8)
call("solver_update", (bits(1), latents, f(2, 2, 4, 8, 8), f(6), f(1), f(4, 8, 8, 8)), [latents.shape, (2, 2, 4, 8, 8)])

def weights(*, kv):
    shapes = [(24, 8), (24,), (8, 8), (8,), (8, 8), (8,)] + [(16, 8), (16,)] * kv + [(8, 8), (8,)]
    return [f(*shape) for shape in (*shapes, (32, 8), (32,), (8, 32), (8,))]

block = (2, 1e-6, 0, 0, 0, 0, 0, 0, 0, 0)
call("blocks", (bits(*block), x, f(2, 6, 8), f(2, 4, 8), f(2, 4, 8), *weights(kv=False)), [y])
block = (2, 1e-6, 0, 0, 0, 0, 0, 0, 1, 0)
call("blocks", (bits(*block), x, f(2, 6, 8), f(2, 4, 8), f(2, 4, 8), *weights(kv=False)), [y, (1, *y)])
block = bits(2, 1e-6, 0, 0, 0, 0, 0, 0, 0, 0)
inputs = [x, f(2, 48), f(2, 4, 8), f(2, 4), f(6, 8), *weights(kv=True)]
call("training_block", (block, *inputs), [y])
floats = direct._functions().floats_of_training_block(2, 2, 3, 8, 4, 32)
call("training_block", (block, *inputs), [y, (floats,)])
gradients = [value.shape for i, value in enumerate(inputs) if i != 3]
call("training_block_gradient", (block, x, block, *inputs), gradients, True)
for sizes in ((2, 0, 3, 8, 4, 32), (2, 2, 0, 8, 4, 32), (2, 2, 3, 8, 0, 32), (2, 0, 0, 0, 0, 0)):
    assert direct._functions().floats_of_training_block(*sizes) >= 0
empty = np.ones(0, np.float32).ctypes.data
library = direct._functions()
library.update_adamw(empty, empty, empty, empty, 0, 1.0, 1.0, 1.0, 0.9, 0.99, 1e-8)
library.update_average(empty, empty, 0, 0.5)
library.add_to(empty, empty, 0)
assert library.sum_of_squares(empty, 0) == 0
"""


def test_tensors_without_rows():
    """Nothing to do, a sum over nothing, or a refusal; never a division by zero, never what memory held."""
    names = {line.split()[0] for line in run(WITHOUT_ROWS).splitlines()}
    files = (ROOT / "mindsigma/ops/native/source").glob("*entry.cpp")
    assert names == {name for file in files for name in re.findall(r"^int (\w+)\(int count", file.read_text(), re.M)}


# Children of a process whose threads compute without pause: each computes, too, and gives what the parent gets.
FORKS = """
import os, signal, threading, time
import numpy as np
from mindsigma.ops.native import direct, operations
operations.load()
x, w = (np.random.default_rng(i).standard_normal((300, 300), np.float32) for i in range(2))
heads = direct.bits(2, 0.5, 300, 0, 0, 0, 0, 0)

def compute():
    out, dq = np.empty((300, 300), np.float32), [np.empty((1, 300, 300), np.float32) for _ in range(3)]
    direct.call("linear_gradient_of_input", (x, w, out))
    direct.call("attention_gradient", (heads, x[None], x[None], w[None], w[None], *dq))  # takes the workspace, too
    return out.tobytes() + b"".join(part.tobytes() for part in dq)

expected = compute()
threading.Thread(target=lambda: [compute() for _ in iter(int, 1)], daemon=True).start()
failed = 0
for i in range(16):
    time.sleep(0.002 * (i % 5))
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends a child that waits for ever
        os._exit(0 if compute() == expected and compute() == expected else 1)
    failed += os.waitpid(child, 0)[1] != 0
assert compute() == expected
print("failed", failed)
sys.stdout.flush()
os._exit(0)
"""


def test_forks_while_a_kernel_runs():
    assert run(FORKS).strip() == "failed 0"
