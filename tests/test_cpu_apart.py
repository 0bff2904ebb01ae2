"""Images that threads compute apart, against all of them at once, and guidance on arrays against tensors."""

import contextlib
import os
import threading
import time
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from conftest import relative_error
from mindspore import Tensor, ops
from test_cpu_networks import dits, drawn

from mindsigma.backends.cpu import dit as fast_dit
from mindsigma.backends.cpu import kernels
from mindsigma.backends.cpu.apart import each_share
from mindsigma.backends.cpu.library import library
from mindsigma.backends.cpu.sampler import FastGuidedStep, accelerate_graphs
from mindsigma.sampling.denoising import DenoisingGraphs, GuidedStep
from mindsigma.sampling.dpm_solver import DPMSolver

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler, or MINDSIGMA_NATIVE=0")


def shares(images):
    """What each thread was given, in order, and the threads."""
    given, threads = [], set()
    each_share(images, lambda *share: (given.append(share), threads.add(threading.get_ident())))
    return sorted(given), threads


def test_shares_make_up_all_images():
    count = library().threads()
    for images in (count, 2 * count, 2 * count + 1, 5 * count - 1):
        given, threads = shares(images)
        assert len(given) == len(threads) == count
        assert [i for share in given for i in range(*share)] == list(range(images))
        sizes = [last - first for first, last in given]
        assert max(sizes) - min(sizes) <= 1
    if count > 1:
        assert shares(count - 1) == ([(0, count - 1)], {threading.get_ident()})


def test_an_error_of_any_share_is_told_when_all_have_ended():
    images, ended = 2 * library().threads(), []

    def compute(first, last, failing):
        if first <= failing < last:
            raise ArithmeticError(failing)
        ended.append(first)

    for failing in (0, images - 1):
        ended.clear()
        with pytest.raises(ArithmeticError, match=str(failing)):
            each_share(images, lambda first, last, failing=failing: compute(first, last, failing))
        assert len(ended) == library().threads() - 1
    assert len(shares(images)[0]) == library().threads()


def denoised(dit, latents, caption, mask):
    text_kv, position = dit.text_kv(caption, mask), dit.position(latents.shape)
    modulation = ops.concat(dit.modulations(Tensor(np.array([300.0], np.float32))), 1)
    return dit.denoise(latents, modulation, text_kv, position).asnumpy()


@pytest.mark.parametrize("kind", [{}, {"low_rank": True}, {"qk_norm": True}])
def test_a_network_gives_the_same_bits(kind, monkeypatch):
    """As when its images are computed together; only a network that is all in kernels is computed apart."""
    images = 2 * library().threads() + 1  # uneven shares: who has less helps the other
    latents, caption = Tensor(drawn(1, images, 4, 18, 14)), Tensor(drawn(2, images, 9, 32))
    mask = np.ones((images, 9), np.int32)
    mask[0, 1:], mask[-1, 4:] = 0, 0
    dit, calls = dits(depth=3, **kind)[1].set_train(False), []
    monkeypatch.setattr(fast_dit, "each_share", lambda *given: calls.append(given) or each_share(*given))
    found = denoised(dit, latents, caption, Tensor(mask))
    assert len(calls) == (0 if kind else 1)
    monkeypatch.setattr(fast_dit, "each_share", lambda images, compute: compute(0, images))
    assert np.array_equal(found, denoised(dit, latents, caption, Tensor(mask)))


def test_a_fork_has_threads_of_its_own():
    images = library().threads()
    x, weight = drawn(0, images, 512, 256), drawn(1, 512, 256)
    out = np.empty((images, 512, 512), np.float32)

    def compute(first, last):
        kernels.linear(x[first:last], weight, out=kernels.memory(out).images(first, last))

    each_share(images, compute)
    expected = out.copy()
    child = os.fork()
    if child == 0:
        out[:] = 0
        each_share(images, compute)
        os._exit(int((out != expected).any()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("scale", [4.5, np.array([3.0, 3.0, 3.0, 1.0], np.float32).reshape(1, 4, 1, 1)])
def test_guidance_on_arrays(guided, scale):
    """What surrounds the network in a step, with a scale of all channels and one of each."""
    dit, images = dits()[1], 3
    plain, fast = (kind(dit, DPMSolver(), guided) for kind in (GuidedStep, FastGuidedStep))
    latents, scale = Tensor(drawn(1, images, 4, 16, 16)), Tensor(scale, ms.float32)
    prediction = Tensor(drawn(2, images * (2 if guided else 1), 8, 16, 16))
    found = fast.guided_noise(prediction, scale, None).asnumpy()
    assert relative_error(found, plain.guided_noise(prediction, scale, None).asnumpy()) < 1e-7
    assert np.array_equal(fast.both(latents).asnumpy(), plain.both(latents).asnumpy())


def test_graphs_guide_on_arrays_where_the_network_is_accelerated():
    plain, fast = map(DenoisingGraphs, dits())
    assert accelerate_graphs(plain).guided_step is GuidedStep
    assert isinstance(accelerate_graphs(fast).step(DPMSolver(), True, (1, 4, 16, 16)), FastGuidedStep)


def test_graphs_put_side_by_side_on_arrays():
    """Modulations with micro conditions, and the halves of guidance."""
    plain, fast = map(DenoisingGraphs, dits(micro_condition=True))
    for graphs in (plain, fast):
        graphs.dit.set_train(False)
        assert accelerate_graphs(accelerate_graphs(graphs)) is graphs
    given = Tensor([999.0, 3.5]), Tensor(np.array([[512.0, 768.0]], np.float32)), Tensor([[0.667]])
    found, expected = (graphs.modulations(*given).asnumpy() for graphs in (fast, plain))
    assert found.shape == (2, 6 * 2 + 2, 96) and relative_error(found, expected) < 2e-6
    states, masks = [Tensor(drawn(i, 1, 9, 32)) for i in range(2)], [Tensor(np.ones((1, 9), np.int32))] * 2
    for pair in (states, masks):
        found, expected = (graphs.halves(*pair) for graphs in (fast, plain))
        assert found.dtype == expected.dtype and np.array_equal(found.asnumpy(), expected.asnumpy())


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="Linux tells how often a thread ran")
def test_a_picture_wakes_no_thread_of_mindspore(mini):
    """One operator would: it turns in a loop for a fifth of a second then (mindsigma/backends/README.md)."""

    def woken():
        found = {}
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):  # it has ended
                if (task / "comm").read_text().startswith(("ActorThread", "KernelThread")):
                    found[task.name] = int((task / "schedstat").read_text().split()[2])  # times it was given a core
        return found

    samplers = ("dpm", "ddim", "euler", "euler-ancestral", "lcm", "sa", "unipc")
    options = {"num_inference_steps": 2, "seed": 1, "progress": False}
    for sampler in samplers:
        mini("a red apple", sampler=sampler, **options)
    (Tensor(np.ones(1 << 20, np.float32)) * 2.0).asnumpy()
    assert woken()  # now there is such a thread
    before = {}
    for _ in range(60):  # until it stands still, which takes longer beside other processes
        before, last = woken(), before
        if before == last:
            break
        time.sleep(1)
    else:
        pytest.skip("MindSpore's threads do not come to rest beside what else runs here")
    for sampler in samplers:
        mini("a red apple", sampler=sampler, **options)
        assert woken() == before, sampler
