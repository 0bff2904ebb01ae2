"""The losses of distillation: against the official trainers', in closed form, and what their gradients may move."""

import json

import mindspore as ms
import numpy as np
import pytest
from conftest import GOLDEN, drawn_weight, relative_error
from mindspore import Tensor

from mindsigma.errors import MindSigmaError
from mindsigma.models.dit import DiT, DiTConfig
from mindsigma.sampling.schedule import alphas_cumprod
from mindsigma.training import dmd, lcm
from mindsigma.training.dmd import DMDConfig, Matching
from mindsigma.training.lcm import Consistency, LCMConfig
from mindsigma.training.loss import COLUMNS, Denoising, LossConfig, coefficients

LIMIT = 1e-5  # relative; measured 2e-6


class Golden:
    """A case: its arrays, its config, its three networks by name, with drawn weights."""

    def __init__(self, name):
        self.data = dict(np.load(GOLDEN / f"{name}.npz"))
        self.config = json.loads(str(self.data["config"]))
        self.networks = {role: self.network(seed) for role, seed in self.config["weight_seeds"].items()}

    def network(self, seed):
        fields = {name: value for name, value in self.config["network"].items() if name != "patch_size"}
        dit = DiT(DiTConfig(**fields, multi_scale=True))
        for parameter in dit.get_parameters():
            parameter.set_data(Tensor(drawn_weight(seed, parameter.name, parameter.shape)))
        return dit

    def tensors(self, *names):
        return [Tensor(self.data[name].astype(np.float32)) for name in names]


@pytest.fixture(scope="module")
def lcm_case():
    return Golden("distill_lcm")


@pytest.fixture(scope="module")
def dmd_case():
    return Golden("distill_dmd")


def bias_of(dit):
    """The last bias of a network."""
    return dit.final_layer.linear.bias


def lcm_inputs(case, config, guidance=4.5):
    """Inputs of Consistency for a case."""
    data = case.data
    numbers = Tensor(lcm.coefficients(data["index"], np.full(4, guidance), config))
    null = Tensor(drawn_weight(case.config["weight_seeds"]["student"], "y_embedder.y_embedding", (20, 64))[None])
    mask = Tensor(data["mask"][:, 0, 0].astype(np.int32))
    times = Tensor(config.times(data["index"]).astype(np.float32))
    return (*case.tensors("latents_in", "noise"), numbers, times, Tensor(data["y"][:, 0]), mask, null, mask)


# LCM


def test_grid_of_lcm(lcm_case):
    start, end = LCMConfig().times(lcm_case.data["index"])
    np.testing.assert_array_equal(start, lcm_case.data["start_timesteps"])
    np.testing.assert_array_equal(end, lcm_case.data["timesteps"])
    assert 0 in lcm_case.data["index"]
    assert LCMConfig().times(np.arange(50))[0].tolist() == list(range(19, 1000, 20))
    assert LCMConfig(skip=3).times([0, 2, 3, 49])[1].tolist() == [0, 0, 19, 939]
    assert LCMConfig(grid=4, substeps=3).times([0, 3]).T.tolist() == [[249, 166, 83, 0], [999, 916, 833, 749]]


@pytest.mark.parametrize("kind", ["huber", "l2"])
def test_official_lcm(lcm_case, kind):
    """Loss, gradient, and every step on the way."""
    data, networks = lcm_case.data, lcm_case.networks
    config = LCMConfig(loss=kind)
    objective = Consistency(networks["student"], networks["teacher"], networks["ema"], (), config)
    inputs = lcm_inputs(lcm_case, config)
    (loss,), (gradient,) = ms.value_and_grad(objective, None, [bias_of(networks["student"])])(*inputs)
    assert float(loss) == pytest.approx(float(data[f"loss_{kind}"]), rel=LIMIT)
    # The other half, the variance's, gets no gradient; the bias holds the 8 channels of each of the 4 pixels.
    assert relative_error(gradient.asnumpy(), data[f"grad_final_bias_{kind}"]) < 1e-4
    assert not gradient.asnumpy().reshape(4, 8)[:, 4:].any()

    numbers, times, caption, mask, null, _ = inputs[2:]
    noisy = data["x_start"]
    earlier = objective.earlier(Tensor(noisy), numbers, times, (caption, mask), (null, mask), ())
    assert relative_error(earlier.asnumpy(), data["x_prev"]) < LIMIT
    target = objective.answer_at_end(Tensor(data["x_prev"]), numbers, times, (caption, mask), ())
    assert relative_error(target.asnumpy(), data["target"]) < LIMIT
    first = data["index"] == 0
    np.testing.assert_array_equal(target.asnumpy()[first], data["x_prev"][first])


def test_no_gradient_beside_the_student(lcm_case, dmd_case):
    """Of LCM's teacher and target, of DMD's teacher and fake score."""
    lcm_networks, dmd_networks = lcm_case.networks, dmd_case.networks
    consistency = Consistency(*(lcm_networks[role] for role in ("student", "teacher", "ema")), (), LCMConfig())
    matching = Matching(*(dmd_networks[role] for role in ("generator", "real", "fake")), DMDConfig())
    for objective, inputs, roles in (
        (consistency, lcm_inputs(lcm_case, LCMConfig()), (lcm_networks["teacher"], lcm_networks["ema"])),
        (matching, dmd_inputs(dmd_case, DMDConfig()), (dmd_networks["real"], dmd_networks["fake"])),
    ):
        biases = [bias_of(objective.dit), *map(bias_of, roles)]
        own, *others = ms.grad(lambda *args, objective=objective: objective(*args)[0], None, biases)(*inputs)
        assert own.asnumpy().any() and not any(other.asnumpy().any() for other in others)


def test_teacher_of_lcm(lcm_case):
    """The step from both predictions."""
    data, ((guidance, *_), path) = lcm_case.data, lcm.columns(lcm_inputs(lcm_case, LCMConfig())[2])
    latents, conditional, unconditional = lcm_case.tensors("x_start", "teacher_cond", "teacher_uncond")
    step = lcm.guided_step(latents, unconditional, conditional, guidance, *path)
    assert relative_error(step.asnumpy(), data["x_prev"]) < LIMIT


@pytest.mark.parametrize("kind", ["huber", "l2"])
def test_weighting_of_lcm(kind):
    """Each sample's mean difference times its signal, in float64."""
    answer, target = np.random.default_rng(4).standard_normal((2, 3, 4, 6, 6)).astype(np.float32)
    signal = np.array([0.01, 0.3, 1.0], np.float32).reshape(-1, 1, 1, 1)
    square = (answer.astype(np.float64) - target) ** 2
    each = (square if kind == "l2" else np.sqrt(square + 1e-6) - 1e-3).mean((1, 2, 3))
    for weighting, wanted in (("none", each.mean()), ("signal", (signal.reshape(-1) * each).mean())):
        config = LCMConfig(loss=kind, weighting=weighting)
        found = lcm.distance(Tensor(answer), Tensor(target), Tensor(signal), config)
        assert float(found) == pytest.approx(wanted, rel=1e-5), weighting


def test_substeps_are_steps(lcm_case):
    """Two substeps over two points of the grid are one step after the other."""
    networks, config = lcm_case.networks, LCMConfig(skip=2, substeps=2)
    twice, once = (
        Consistency(networks["student"], networks["teacher"], networks["ema"], (), one) for one in (config, LCMConfig())
    )
    index = np.array([5, 20, 33, 49])
    inputs = lcm_inputs(lcm_case, config)
    latents, text, null = inputs[0], inputs[4:6], inputs[6:8]

    def moved(objective, latents, index):
        numbers = Tensor(lcm.coefficients(index, np.full(4, 4.5), objective.config))
        times = Tensor(objective.config.times(index).astype(np.float32))
        return objective.earlier(latents, numbers, times, text, null, ())

    one_by_one = moved(once, moved(once, latents, index), index - 1)
    assert relative_error(moved(twice, latents, index).asnumpy(), one_by_one.asnumpy()) < 1e-6


def test_a_perfect_network_is_consistent(lcm_case):
    """Where all three predict the true noise the teacher's step is the true noisy latents, and the loss is small."""
    data, config = lcm_case.data, LCMConfig(loss="l2")
    clean, noise, numbers = lcm_inputs(lcm_case, config, guidance=0.0)[:3]
    (guidance, skip, out, end_skip, end_out), (here, there) = lcm.columns(numbers)
    noisy = here[0] * clean + here[1] * noise
    earlier = lcm.guided_step(noisy, noise, noise, guidance, here, there)
    product = alphas_cumprod()[data["timesteps"]].reshape(-1, 1, 1, 1)
    truth = np.sqrt(product) * data["latents_in"] + np.sqrt(1 - product) * data["noise"]
    np.testing.assert_allclose(earlier.asnumpy(), truth, atol=1e-4)
    answer = lcm.consistent(noisy, noise, *here, skip, out)
    target = lcm.consistent(earlier, noise, *there, end_skip, end_out)
    later = data["index"] > 0
    assert np.abs(answer.asnumpy() - target.asnumpy())[later].max() < 1e-4


@pytest.mark.parametrize(
    "fields,said",
    [
        ({"guidance": (5.0, 3.0)}, "rising"),
        ({"guidance": (-1.0, 3.0)}, "at least 0"),
        ({"loss": "l1"}, "huber, l2"),
        ({"huber": 0.0}, "positive"),
        ({"weighting": "snr"}, "none, signal"),
        ({"grid": 30}, "divide 1000"),
        ({"skip": 51}, "--lcm-skip"),
        ({"substeps": 21}, "--lcm-substeps"),
    ],
)
def test_wrong_configs_of_lcm(fields, said):
    with pytest.raises(MindSigmaError, match=said):
        LCMConfig(**fields)


# DMD


def noise_of(case, k):
    """Draw k of the case's noise."""
    import zlib

    shape = case.data["z"].shape
    key = [case.config["seed"], zlib.crc32(case.config["tag"].encode()), k]
    return np.random.default_rng(key).standard_normal(shape).astype(np.float32)


def dmd_inputs(case, config):
    """Inputs of Matching for a case."""
    data = case.data
    numbers = Tensor(coefficients(data["timesteps"], config.noising))
    null_mask = Tensor(np.repeat(data["null_mask"], 4, 0).astype(np.int32))
    text = Tensor(data["y"]), Tensor(data["mask"].astype(np.int32)), Tensor(data["null_y"]), null_mask
    (timestep,) = case.tensors("timesteps")
    return (Tensor(data["z"]), Tensor(noise_of(case, 0)), numbers, timestep, *text, None)


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_official_dmd(dmd_case, gamma):
    """Latents, loss, gradients in the latents and in the generator's last bias."""
    data, networks, suffix = dmd_case.data, dmd_case.networks, "_snr5" if gamma else ""
    config = DMDConfig(snr_gamma=gamma)
    objective = Matching(networks["generator"], networks["real"], networks["fake"], config)
    inputs = dmd_inputs(dmd_case, config)

    def loss_and_latents(*inputs):
        return objective(*inputs)

    found = ms.value_and_grad(loss_and_latents, None, [bias_of(networks["generator"])], True)
    (loss, latents), (gradient,) = found(*inputs)
    assert relative_error(latents.asnumpy(), data["x0"]) < LIMIT
    assert float(loss) == pytest.approx(float(data[f"dm_loss{suffix}"]), rel=1e-4)
    assert relative_error(gradient.asnumpy(), data[f"grad_final_bias{suffix}"]) < 1e-4

    x0 = Tensor(data["x0"])
    _, fresh, numbers, timestep, caption, mask, null, null_mask, _ = inputs
    difference, weight = objective.direction(x0, fresh, numbers, timestep, (caption, mask), (null, null_mask), ())
    assert relative_error(difference.asnumpy(), data["coeff"]) < 1e-4
    assert relative_error(weight.asnumpy(), data["weight"]) < 1e-4
    if gamma:
        loss = lambda latents: dmd.weighted_loss(latents, difference, numbers)  # noqa: E731
    else:
        loss = lambda latents: dmd.matching_loss(latents, difference, weight)  # noqa: E731
    assert relative_error(ms.grad(loss)(x0).asnumpy(), data[f"grad_x0{suffix}"]) < 1e-4


def test_official_fake_score(dmd_case):
    """Loss and gradient of the fake score on the generator's latents."""
    data, fake = dmd_case.data, dmd_case.networks["fake"]
    numbers = Tensor(coefficients(data["timesteps_fake"], LossConfig(learn_sigma=False)))
    (times,) = dmd_case.tensors("timesteps_fake")
    inputs = Tensor(data["x0"]), Tensor(noise_of(dmd_case, 1)), numbers, times
    inputs += (Tensor(data["y"]), Tensor(data["mask"].astype(np.int32)))
    objective = Denoising(fake, bound=False)
    (loss, bound), (gradient,) = ms.value_and_grad(objective, None, [bias_of(fake)], True)(*inputs)
    assert float(loss) == pytest.approx(float(data["fake_loss"]), rel=LIMIT) and float(bound) == 0
    assert relative_error(gradient.asnumpy(), data["grad_fake_final_bias"]) < 1e-4


def test_gradient_of_matching_is_the_weighted_difference():
    random = np.random.default_rng(2)
    latents, difference = random.standard_normal((2, 3, 4, 6, 6)).astype(np.float32)
    weight = np.array([0.5, 1.0, 3.0], np.float32).reshape(-1, 1, 1, 1)
    loss = lambda x: dmd.matching_loss(x, Tensor(difference), Tensor(weight))  # noqa: E731
    value, gradient = ms.value_and_grad(loss)(Tensor(latents))
    step = weight.astype(np.float64) * difference
    assert float(value) == pytest.approx(np.mean(step**2), rel=1e-5)
    assert relative_error(gradient.asnumpy(), 2 * step / latents.size) < 1e-5


def test_a_fake_score_like_the_teacher_gives_no_gradient(dmd_case):
    """Without guidance, F = R: the generator stays."""
    networks, config = dmd_case.networks, DMDConfig(guidance=1.0)
    objective = Matching(networks["generator"], networks["real"], networks["real"], config)
    loss, _ = objective(*dmd_inputs(dmd_case, config))
    assert float(loss) < 1e-8


@pytest.mark.parametrize("kind", ["l2", "huber"])
def test_regression(kind):
    """In float64; the generator's latents are compared in whole."""
    one, two = np.random.default_rng(3).standard_normal((2, 2, 4, 6, 6)).astype(np.float32)
    square = (one.astype(np.float64) - two) ** 2
    wanted = square.mean() if kind == "l2" else np.mean(np.sqrt(square + 1e-6) - 1e-3)
    assert float(dmd.regression_loss(Tensor(one), Tensor(two), kind)) == pytest.approx(wanted, rel=1e-5)


def test_weight_of_snr_gamma():
    numbers = coefficients([10, 500, 900], DMDConfig(snr_gamma=5.0).noising)
    snr = alphas_cumprod()[[10, 500, 900]] / (1 - alphas_cumprod()[[10, 500, 900]])
    np.testing.assert_allclose(numbers[:, COLUMNS.index("weight")], np.minimum(snr, 5) / snr, rtol=1e-6)


@pytest.mark.parametrize(
    "fields,said",
    [
        ({"time": 1000}, "--dmd-time"),
        ({"last": 1}, "--dmd-last"),
        ({"guidance": -1.0}, "--dmd-guidance"),
        ({"regression_weight": float("nan")}, "--dmd-regression-weight"),
        ({"snr_gamma": 0.0}, "--dmd-snr-gamma"),
        ({"regression": "ssim"}, "none, l2, huber, lpips"),
    ],
)
def test_wrong_configs_of_dmd(fields, said):
    with pytest.raises(MindSigmaError, match=said):
        DMDConfig(**fields)
