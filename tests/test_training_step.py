"""A training step: in a graph and in PyNative, accumulation, clip, averages, overflows, half precision, recompute."""

import mindspore as ms
import numpy as np
import pytest
from conftest import relative_error
from mindspore import Tensor
from training_runs import TOKENS, WIDTH, tiny_dit

from mindsigma.errors import MindSigmaError
from mindsigma.training.loss import LossConfig, coefficients
from mindsigma.training.optimizers import OptimizerConfig
from mindsigma.training.step import StepConfig, TrainingStep
from mindsigma.training.updates import GOOD_STEPS, SCALE, SKIPPED, SKIPPED_IN_A_ROW, UPDATES, unscale_and_clip

RATE = 1e-3


def inputs(seed, count=4, side=8):
    """A micro-batch."""
    random = np.random.default_rng(seed)
    clean, noise = random.standard_normal((2, count, 4, side, side)).astype(np.float32)
    timestep = random.integers(0, 1000, count)
    states = random.standard_normal((count, TOKENS, WIDTH)).astype(np.float32)
    mask = np.ones((count, TOKENS), np.int32)
    mask[0, 3:] = 0
    arrays = clean, noise, coefficients(timestep, LossConfig()), timestep.astype(np.float32), states, mask
    return tuple(Tensor(array) for array in arrays)


def broken(seed):
    """A micro-batch whose loss is not finite."""
    arrays = [tensor.asnumpy() for tensor in inputs(seed)]
    arrays[0][0, 0, 0, 0] = np.inf
    return tuple(map(Tensor, arrays))


def halves(micro_batch):
    """The two halves of a micro-batch."""
    arrays = [tensor.asnumpy() for tensor in micro_batch]
    middle = len(arrays[0]) // 2
    return [tuple(Tensor(array[rows]) for array in arrays) for rows in (slice(middle), slice(middle, None))]


def step_of(optimizer="adamw", dit=None, largest=None, parameters=None, **config):
    """A TrainingStep of the tiny network, or of these parameters of it."""
    dit = dit or tiny_dit()
    # Above the rounding errors of gradients that are zero by definition, those of the keys' biases.
    eps = {"adamw": (1e-3,), "came": (1e-4, 1e-8)}[optimizer]
    constants = OptimizerConfig(optimizer, eps=eps)
    return TrainingStep(dit, parameters or dit.trainable_params(), constants, StepConfig(**config), largest=largest)


def variables(training):
    """All that a step may change, by name."""
    kept = {**{f"{name}:ema": row for name, row in training.averages().items()}, **training.own_states()}
    found = {**(training.weights() or {parameter.name: parameter for parameter in training.parameters}), **kept}
    return {name: value.asnumpy().copy() for name, value in found.items() if name != "controls"}


def same(first, second):
    """Whether two `variables` are equal in every bit."""
    return first.keys() == second.keys() and all(first[n].tobytes() == second[n].tobytes() for n in first)


@pytest.mark.parametrize("optimizer,depth", [("came", 1), pytest.param("adamw", 2, marks=pytest.mark.slow)])
def test_graph_and_pynative_agree(optimizer, depth):
    """Steps of two micro-batches with clipping and averages, and one that overflows and leaves no trace but counts.

    The graph updates the tensors of one shape as one, in groups of a few, as on Ascend.
    """
    found = {}
    for mode, largest in ((ms.PYNATIVE_MODE, None), (ms.GRAPH_MODE, 20000)):
        ms.set_context(mode=mode)
        try:
            config = {"accumulation": 2, "ema_decay": 0.9, "max_norm": 0.5, "loss_scale": 8.0}
            training = step_of(optimizer, tiny_dit(depth=depth), largest, **config)
            results = [training.run([inputs(2 * i), inputs(2 * i + 1)], RATE) for i in range(2)]
            before = variables(training)
            assert not training.run([inputs(4), broken(5)], RATE)[3]
            assert same(before, variables(training))
            results.append(training.run([inputs(6), inputs(7)], RATE))
            found[mode] = variables(training), results, training.controls.asnumpy()
        finally:
            ms.set_context(mode=ms.PYNATIVE_MODE)
        counts = [len(group.names) for group in training.groups]
        assert max(counts) > 1 if largest else max(counts) == 1
    eager, graph = found.values()
    np.testing.assert_allclose(eager[1], graph[1], rtol=1e-5)
    np.testing.assert_array_equal(eager[2], graph[2])
    assert (eager[2][SCALE], eager[2][SKIPPED], eager[2][UPDATES]) == (4, 1, 3)
    worst = {name: relative_error(graph[0][name], eager[0][name]) for name in eager[0] if eager[0][name].any()}
    assert max(worst.values()) < 1e-6, max(worst, key=worst.get)


def test_two_micro_batches_are_one_batch():
    whole, parts = step_of(max_norm=0.5), step_of(max_norm=0.5, accumulation=2)
    for i in range(3):
        one, two = whole.run([inputs(i)], RATE), parts.run(halves(inputs(i)), RATE)
        np.testing.assert_allclose(two[:3], one[:3], rtol=1e-5)
    first, second = variables(whole), variables(parts)
    assert all(relative_error(second[name], first[name]) < 1e-5 for name in first)


def test_clip_and_average():
    """The clipped gradient has the norm asked for; the average moves once a step, towards the weights after it."""
    training = step_of(accumulation=2, ema_decay=0.75, max_norm=0.25)
    before = variables(training)
    _, _, norm, _ = training.run([inputs(1), inputs(2)], RATE)
    after = variables(training)
    moments = np.concatenate([after[name].ravel() for name in after if name.endswith(":m")])
    assert norm > 1
    assert np.linalg.norm(moments) == pytest.approx(0.1 * 0.25, rel=1e-5)  # m after one step is 0.1 g
    for name in [name[: -len(":ema")] for name in after if name.endswith(":ema")]:
        assert not np.array_equal(before[name], after[name])
        wanted = 0.75 * before[name] + 0.25 * after[name]
        np.testing.assert_allclose(after[f"{name}:ema"], wanted, rtol=1e-6, atol=1e-7)


def test_small_gradients_are_not_clipped():
    training = step_of(max_norm=1e6)
    _, _, norm, _ = training.run([inputs(1)], RATE)
    moments = np.concatenate([value.ravel() for name, value in variables(training).items() if name.endswith(":m")])
    assert np.linalg.norm(moments) == pytest.approx(0.1 * norm, rel=1e-5)


def test_loss_scale_changes_nothing_but_itself():
    plain, scaled = step_of(max_norm=0.5), step_of(max_norm=0.5, loss_scale=1024.0)
    for i in range(2):
        np.testing.assert_allclose(scaled.run([inputs(i)], RATE)[:3], plain.run([inputs(i)], RATE)[:3], rtol=1e-6)
    first, second = variables(plain), variables(scaled)
    assert all(relative_error(second[name], first[name]) < 1e-5 for name in first)


def test_overflow():
    """A step with an infinite gradient changes nothing, is counted and halves the scale, which grows back."""
    training = step_of("came", accumulation=2, ema_decay=0.9, loss_scale=1024.0, scale_window=2)
    training.run([inputs(0), inputs(1)], RATE)
    before, controls = variables(training), training.controls.asnumpy()
    *_, finite = training.run([inputs(3), broken(2)], RATE)
    after = training.controls.asnumpy()
    assert not finite
    assert same(before, variables(training))
    assert (after[SCALE], after[SKIPPED], after[SKIPPED_IN_A_ROW], after[GOOD_STEPS]) == (512, 1, 1, 0)
    assert (after[:2] == controls[:2]).all() and after[UPDATES] == 1

    *_, finite = training.run([inputs(4), inputs(5)], RATE)
    after = training.controls.asnumpy()
    assert finite and not same(before, variables(training))
    assert (after[SCALE], after[SKIPPED], after[SKIPPED_IN_A_ROW], after[GOOD_STEPS]) == (512, 1, 0, 1)
    assert training.run([inputs(6), inputs(7)], RATE)[3]
    after = training.controls.asnumpy()
    assert (after[SCALE], after[GOOD_STEPS], after[UPDATES]) == (1024, 0, 3)
    assert all(np.isfinite(value).all() for value in variables(training).values())


def test_limits_of_the_scale():
    """It stays between 1 and 2**24."""
    for start, squares, wanted in ((1.0, np.inf, 1.0), (2.0**24, 1.0, 2.0**24), (4.0, np.nan, 2.0)):
        controls = np.zeros(7, np.float32)
        controls[SCALE] = start
        tensors = [Tensor(np.array(value, np.float32)) for value in ([squares], controls, [RATE])]
        assert unscale_and_clip(*tensors, 0.01, True, 1, 1, ((0.9, 0.1), (0.999, 0.001)))[3].asnumpy()[SCALE] == wanted


def test_half_precision_learns():
    """fp16 activations, fp32 weights: near the fp32 step, and the loss of one batch falls."""
    training = step_of(dit=tiny_dit(depth=1, dtype=ms.float16), loss_scale=1024.0, max_norm=0.5)
    reference = step_of(dit=tiny_dit(depth=1), max_norm=0.5)
    batch = inputs(0)
    first, wanted = training.run([batch], 1e-2), reference.run([batch], 1e-2)
    np.testing.assert_allclose(first[:3], wanted[:3], rtol=2e-2)
    assert all(value.dtype == np.float32 for value in variables(training).values())
    for _ in range(8):
        last = training.run([batch], 1e-2)
    assert last[3] and last[0] < 0.9 * first[0]
    assert training.controls.asnumpy()[SKIPPED] == 0


@pytest.mark.parametrize("network", [{"qk_norm": True}, {"kv_compression": "uniform:2:0-0"}])
def test_masters_change_no_bit(network):
    """A network of half precision weights, made from fp32 ones at each update, is one that casts those when it runs."""
    found = {}
    for masters in (False, True):
        dit = tiny_dit(depth=1, dtype=ms.float16, **network)
        training = step_of(dit=dit, accumulation=2, ema_decay=0.9, loss_scale=64.0, masters=masters)
        results = [training.run([inputs(2 * i), (broken if i == 1 else inputs)(2 * i + 1)], 1e-2) for i in range(3)]
        assert all((weight.dtype == ms.float16) == masters for weight in training.parameters)
        found[masters] = results, variables(training), {p.name: p.float().asnumpy() for p in training.parameters}
    np.testing.assert_array_equal(found[True][0], found[False][0])
    assert same(found[True][1], found[False][1])
    for name, weight in found[True][2].items():
        np.testing.assert_array_equal(weight, found[False][2][name].astype(np.float16))
        training.show({name: Tensor(weight * 0)})
    assert not any(weight.asnumpy().any() for weight in training.parameters)
    training.show(training.weights())
    assert all((p.float().asnumpy() == found[True][2][p.name]).all() for p in training.parameters)


def test_a_scale_too_large_for_half_precision_comes_down():
    training = step_of(dit=tiny_dit(depth=1, dtype=ms.float16), loss_scale=2.0**24)
    before = variables(training)
    assert not training.run([inputs(0)], RATE)[3]
    assert same(before, variables(training))
    steps = 1
    while not training.run([inputs(0)], RATE)[3]:
        steps += 1
        assert steps < 24
    assert training.controls.asnumpy()[SCALE] == 2.0 ** (24 - steps)


@pytest.mark.parametrize(
    "network",
    [
        {"qk_norm": True, "kv_compression": "conv:2:1-1"},
        pytest.param({"dtype": ms.float16, "fp32_attention": True}, marks=pytest.mark.slow),
        pytest.param({"kv_compression": "pool:2:0-0"}, marks=pytest.mark.slow),
    ],
)
def test_recomputed_blocks_give_the_same_gradients(network):
    found, batch = [], (Tensor([256.0], ms.float32), *inputs(0))
    for recompute in (False, True):
        dit = tiny_dit(**network)
        if recompute:
            for block in dit.blocks:
                block.recompute()
        training = step_of(dit=dit)
        (loss, *_), gradients = training.differentiate(*batch)
        found.append((float(loss), {p.name: g.asnumpy() for p, g in zip(training.parameters, gradients)}))
    (loss, kept), (again, recomputed) = found
    assert loss == pytest.approx(again, rel=1e-6)
    size = np.sqrt(sum(np.sum(np.square(value, dtype=np.float64)) for value in kept.values()))
    limit = 2e-3 if "dtype" in network else 1e-6
    for name, value in kept.items():
        assert np.linalg.norm(value.astype(np.float64) - recomputed[name]) < limit * max(
            np.linalg.norm(value), 1e-3 * size
        ), name


@pytest.mark.slow
def test_recomputation_changes_nothing():
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        found = []
        for recompute in (False, True):
            dit = tiny_dit()
            if recompute:
                for block in dit.blocks:
                    block.recompute()
            training = step_of(dit=dit, max_norm=0.5)
            found.append((training.run([inputs(0)], RATE), variables(training)))
        assert found[0][0] == found[1][0]
        assert same(found[0][1], found[1][1])
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)


@pytest.mark.parametrize(
    "fields,said",
    [
        ({"accumulation": 0}, "at least 1"),
        ({"ema_decay": 1.0}, r"\[0, 1\)"),
        ({"max_norm": -1.0}, "negative"),
        ({"zero": 4}, "0, 1, 2 or 3"),
    ],
)
def test_wrong_configs(fields, said):
    with pytest.raises(MindSigmaError, match=said):
        StepConfig(**fields)
