"""The training loss: against the official code's, in closed form, and what its gradient may move."""

import json

import mindspore as ms
import numpy as np
import pytest
from conftest import GOLDEN, drawn_weight
from mindspore import Tensor

from mindsigma.errors import MindSigmaError
from mindsigma.models.dit import DiT, DiTConfig
from mindsigma.models.dit_config import canonical_fields
from mindsigma.sampling.schedule import alphas_cumprod
from mindsigma.training.loss import (
    COLUMNS,
    LossConfig,
    coefficient_table,
    coefficients,
    diffusion_loss,
    noisy_latents,
)

LIMIT = 5e-5  # measured 2e-6


@pytest.fixture(scope="module")
def golden():
    """Inputs and losses of the official code, and the output of its small network."""
    data = dict(np.load(GOLDEN / "loss.npz"))
    config = json.loads(str(data["config"]))
    config = {name: value for name, value in canonical_fields(config).items() if name not in ("cls", "latent_hw")}
    dit = DiT(DiTConfig(**{**config, "multi_scale": True}))
    for parameter in dit.get_parameters():
        parameter.set_data(Tensor(drawn_weight(int(data["seed"]), parameter.name, parameter.shape)))
    numbers = Tensor(coefficients(data["timestep"], LossConfig()))
    noisy = noisy_latents(Tensor(data["x0"]), Tensor(data["noise"]), numbers)
    caption = Tensor(data["y"][:, 0]), Tensor(data["mask"])
    data["out"] = dit(noisy, Tensor(data["timestep"].astype(np.float32)), *caption).asnumpy()
    return data


def losses(data, config, output=None):
    """mse and bound (N,) of the golden case or of another output."""
    numbers = Tensor(coefficients(data["timestep"], config))
    clean, noise = Tensor(data["x0"]), Tensor(data["noise"])
    output = Tensor(data["out"]) if output is None else output
    return diffusion_loss(output, clean, noisy_latents(clean, noise, numbers), noise, numbers, config.learn_sigma)


@pytest.mark.parametrize("prefix", ["", "snr_"])
def test_official_loss(golden, prefix):
    mse, bound = (value.asnumpy() for value in losses(golden, LossConfig(snr=bool(prefix))))
    for name, value in (("mse", mse), ("vb", bound), ("loss", mse + bound)):
        np.testing.assert_allclose(value, golden[prefix + name], rtol=LIMIT, err_msg=name)


def test_timesteps_of_the_golden_case_cover_both_kinds_of_bound(golden):
    assert golden["timestep"].min() == 0 and golden["timestep"].max() == 999


def test_bound_in_float64(golden):
    """The Gaussian divergence written out from the DDPM posterior, at a timestep that the golden case lacks."""
    rng = np.random.default_rng(3)
    step = np.array([700, 1])
    clean, noise = rng.standard_normal((2, 2, 4, 6, 6)).astype(np.float32)
    output = np.concatenate([rng.standard_normal((2, 4, 6, 6)), rng.uniform(-1, 1, (2, 4, 6, 6))], 1)
    output = output.astype(np.float32)
    data = {"x0": clean, "noise": noise, "timestep": step}
    mse, bound = (value.asnumpy() for value in losses(data, LossConfig(), Tensor(output)))
    products = alphas_cumprod()
    for i, t in enumerate(step):
        now, before = products[t], products[t - 1]
        beta = 1 - now / before
        x, e = clean[i].astype(np.float64), noise[i].astype(np.float64)
        noisy = now**0.5 * x + (1 - now) ** 0.5 * e
        low, high = np.log(beta * (1 - before) / (1 - now)), np.log(beta)

        def mean(start, t=t, noisy=noisy, beta=beta, now=now, before=before):
            return (before**0.5 * beta * start + (now / before) ** 0.5 * (1 - before) * noisy) / (1 - now)

        guess = (noisy - (1 - now) ** 0.5 * output[i, :4]) / now**0.5
        place = (output[i, 4:].astype(np.float64) + 1) / 2
        variance = np.exp(place * high + (1 - place) * low)
        divergence = 0.5 * (
            np.log(variance) - low - 1 + np.exp(low) / variance + (mean(x) - mean(guess)) ** 2 / variance
        )
        assert bound[i] == pytest.approx(divergence.mean() / np.log(2), rel=2e-5)
        assert mse[i] == pytest.approx(((e - output[i, :4]) ** 2).mean(), rel=1e-5)


@pytest.mark.parametrize("gamma", [5.0, 1.0])
def test_min_snr(golden, gamma):
    config = LossConfig(weighting="min-snr", gamma=gamma)
    mse, bound = (value.asnumpy() for value in losses(golden, config))
    products = alphas_cumprod()[golden["timestep"]]
    snr = products / (1 - products)
    np.testing.assert_allclose(mse, golden["mse"] * np.minimum(snr, gamma) / snr, rtol=LIMIT)
    np.testing.assert_allclose(bound, golden["vb"], rtol=LIMIT)
    weight = coefficient_table(config)[:, COLUMNS.index("weight")]
    assert (weight[np.argmax(weight) :] == 1).all(), "noisy timesteps, of a signal below gamma, keep their weight"


def test_without_variance_the_bound_is_zero(golden):
    config = LossConfig(learn_sigma=False)
    mse, bound = losses(golden, config, Tensor(golden["out"][:, :4]))
    np.testing.assert_allclose(mse.asnumpy(), golden["mse"], rtol=LIMIT)
    assert not bound.asnumpy().any()


@pytest.mark.parametrize("which,silent", [(0, slice(4, 8)), (1, slice(0, 4))], ids=["mse", "bound"])
def test_what_each_term_moves(golden, which, silent):
    """The squared error moves the noise channels alone, the bound the variance channels alone."""
    numbers = Tensor(coefficients(golden["timestep"], LossConfig()))
    clean, noise = Tensor(golden["x0"]), Tensor(golden["noise"])
    noisy = noisy_latents(clean, noise, numbers)

    def term(output):
        return diffusion_loss(output, clean, noisy, noise, numbers, True)[which].sum()

    gradient = ms.grad(term)(Tensor(golden["out"])).asnumpy()
    assert np.isfinite(gradient).all()
    assert not gradient[:, silent].any()
    heard = slice(0, 4) if which == 0 else slice(4, 8)
    assert (np.abs(gradient[:, heard]).max(axis=(1, 2, 3)) > 0).all(), "every sample, t = 0 among them, has a gradient"


def test_gradient_of_the_bound_is_its_slope():
    """Of a good guess of the noise: at t = 0, where the bound is a discretised likelihood, and elsewhere."""
    rng = np.random.default_rng(1)
    shape = (3, 4, 6, 6)
    noise = rng.standard_normal(shape).astype(np.float32)
    clean, noise = Tensor(rng.uniform(-0.9, 0.9, shape).astype(np.float32)), Tensor(noise)
    numbers = Tensor(coefficients([0, 20, 60], LossConfig()))
    noisy = noisy_latents(clean, noise, numbers)
    output = np.concatenate([noise.asnumpy() * 1.3, rng.uniform(-1, 1, shape)], 1).astype(np.float32)
    direction = np.zeros_like(output)
    direction[:, 4:] = rng.uniform(0.5, 1.5, shape)

    def bound(output):
        return diffusion_loss(output, clean, noisy, noise, numbers, True)[1]

    gradient = ms.grad(lambda output: bound(output).sum())(Tensor(output)).asnumpy()
    width = 0.02
    ends = [bound(Tensor(output + sign * width * direction)).asnumpy().astype(np.float64) for sign in (1, -1)]
    slope = (ends[0] - ends[1]) / (2 * width)
    found = (gradient * direction).sum((1, 2, 3))
    np.testing.assert_allclose(found, slope, rtol=5e-3)


@pytest.mark.parametrize(
    "fields,said",
    [
        ({"weighting": "snr"}, "none, min-snr"),
        ({"weighting": "min-snr", "snr": True}, "choose one"),
        ({"weighting": "min-snr", "gamma": 0.0}, "positive"),
        ({"weighting": "min-snr", "gamma": float("nan")}, "positive"),
    ],
)
def test_wrong_variants(fields, said):
    with pytest.raises(MindSigmaError, match=said):
        LossConfig(**fields)
