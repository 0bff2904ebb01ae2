"""LPIPS against the package of its authors, alone and as DMD's regression through a VAE; its weight files."""

import mindspore as ms
import numpy as np
import pytest
from conftest import relative_error
from lpips_cases import drawn_lpips, drawn_pictures, drawn_weights, golden, two_files, write_weights
from mindspore import Tensor
from test_distill_loss import Golden, bias_of, dmd_inputs

from mindsigma.errors import MindSigmaError
from mindsigma.models import lpips
from mindsigma.pipeline.components import Components
from mindsigma.sampling.schedule import alphas_cumprod
from mindsigma.training.dmd import DMDConfig, Matching
from mindsigma.training.pictures import PictureDistance, open_pictures
from mindsigma.weights.lpips_weights import load_lpips, open_lpips

LIMIT, GRADIENT_LIMIT = 1e-5, 1e-4


@pytest.fixture(scope="module")
def network():
    return drawn_lpips()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return two_files(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def pictures():
    """Two pairs, of odd sides."""
    return [Tensor(drawn_pictures(key, tuple(golden()["shape"]))) for key in (1, 2)]


def test_distances_and_gradient_are_the_packages(network, pictures):
    """Of each pair, of each tap, and in the pixels of the first picture."""
    distance, gradient = ms.value_and_grad(network)(*pictures)
    assert relative_error(distance.asnumpy(), golden()["distance"]) < LIMIT
    assert relative_error(gradient.asnumpy(), golden()["gradient"]) < GRADIENT_LIMIT
    each = np.stack([one.asnumpy() for one in network.distances(*pictures)])
    assert relative_error(each, golden()["each"]) < LIMIT
    assert not network(pictures[0], pictures[0]).asnumpy().any()


@pytest.mark.parametrize(
    "name,wrong",
    [
        ("TAPS", (2, 8, 15, 22, 29)),  # a convolution before its ReLU
        ("TAPS", (3, 8, 15, 22, 27)),
        ("TAPS", (4, 9, 16, 23, 29)),  # behind the pools
        ("unit", lambda x: x),
        ("unit", lambda x: x / (lpips.ops.sqrt((x * x).sum((1, 2, 3), keepdims=True)) + 1e-10)),
    ],
    ids=["tap 1", "tap 5", "pools", "not normalised", "normalised over places"],
)
def test_what_would_be_seen(network, pictures, monkeypatch, name, wrong):
    monkeypatch.setattr(lpips, name, wrong)
    assert relative_error(network(*pictures).asnumpy(), golden()["distance"]) > 100 * LIMIT


@pytest.mark.parametrize("name,wrong", [("shift", 0.0), ("scale", 1.0)])
def test_scaling_would_be_seen(network, pictures, monkeypatch, name, wrong):
    monkeypatch.setattr(network, name, Tensor(np.full((1, 3, 1, 1), wrong, np.float32)))
    assert relative_error(network(*pictures).asnumpy(), golden()["distance"]) > 100 * LIMIT


def test_where_nothing_is_heard_the_gradient_is_zero():
    """The package's is NaN there."""
    x = np.random.default_rng(0).standard_normal((1, 4, 3, 3)).astype(np.float32)
    x[:, :, 1] = 0
    value, gradient = ms.value_and_grad(lambda x: (lpips.unit(ms.ops.relu(x)) * x).sum())(Tensor(x))
    assert np.isfinite(gradient.asnumpy()).all() and np.isfinite(float(value))
    assert not lpips.unit(Tensor(x)).asnumpy()[:, :, 1].any()


# DMD's regression


@pytest.fixture(scope="module")
def regression(files):
    """PictureDistance by sigma-mini's VAE."""
    return open_pictures(Components.of_folder("sigma-mini").opened("vae"), files)


def wanted_latents(shape):
    return np.random.default_rng([16, 3]).standard_normal(shape).astype(np.float32)


def in_last_bias(of_latents):
    """float64 (32,): what a gradient in the generator's latents (1, 4, h, w) is in its last bias.

    Latents are (noise - sigma * predicted) / signal. The bias holds the 8 channels of each of the 4 pixels of a patch.
    """
    signal, sigma = (np.sqrt(value) for value in (alphas_cumprod()[400], 1 - alphas_cumprod()[400]))
    predicted = -sigma / signal * of_latents.astype(np.float64)
    _, channels, height, width = predicted.shape
    pixels = predicted.reshape(channels, height // 2, 2, width // 2, 2).sum((1, 3)).transpose(1, 2, 0)
    return np.concatenate([pixels, np.zeros_like(pixels)], -1).reshape(-1)


def test_the_whole_loss_of_dmd(regression):
    """Of the official case's first sample: matching in float64, LPIPS of what diffusers' AutoencoderKL decodes."""
    case, config = Golden("distill_dmd"), DMDConfig(regression="lpips")
    networks, data, stored = case.networks, case.data, golden()
    objective = Matching(*(networks[role] for role in ("generator", "real", "fake")), config, regression)
    noise, fresh, numbers, times, caption, mask, null, null_mask, _ = dmd_inputs(case, config)
    rows = [one[:1] for one in (noise, fresh, numbers, times, caption, mask)]
    inputs = *rows, null, null_mask[:1], Tensor(wanted_latents((1, *data["x0"].shape[1:])))

    def loss(*inputs):
        matching, distance, _ = objective(*inputs)
        return matching + distance, distance

    found = ms.value_and_grad(loss, None, [bias_of(networks["generator"])], True)
    (total, distance), (gradient,) = found(*inputs)
    matching = np.mean(np.square(data["weight"][0].astype(np.float64) * data["coeff"][0]))
    assert float(distance) == pytest.approx(0.25 * float(stored["regression"]), rel=1e-4)
    assert float(total) == pytest.approx(matching + 0.25 * float(stored["regression"]), rel=1e-4)
    of_matching = in_last_bias(len(data["x0"]) * data["grad_x0"][:1])  # the case's loss is a mean over its samples
    of_regression = in_last_bias(0.25 * stored["regression_gradient"])
    assert np.linalg.norm(of_regression) > 0.01 * np.linalg.norm(of_matching)
    assert relative_error(gradient.asnumpy(), of_matching + of_regression) < 1e-4
    # The pictures are clamped, as the official trainer does it; it is seen here.
    assert abs(float(stored["unclamped"]) / float(stored["regression"]) - 1) > 1e-3


@pytest.mark.slow
def test_recomputed(regression):
    """The same mean over the pictures, and the same gradient."""
    latents, wanted = (Tensor(one) for one in np.split(wanted_latents((4, 4, 4, 4)), 2))
    again = PictureDistance(regression.one.vae, regression.one.lpips)
    again.one.recompute()
    (value, gradient), (same, equal) = (ms.value_and_grad(one)(latents, wanted) for one in (regression, again))
    each = [float(regression(latents[i : i + 1], wanted[i : i + 1])) for i in range(2)]
    assert float(value) == float(same) == pytest.approx(np.mean(each), rel=1e-6)
    assert relative_error(equal.asnumpy(), gradient.asnumpy()) < 1e-6


@pytest.mark.slow
def test_in_a_graph(files, graph_mode):
    """The gradient in the latents, as it is operation by operation; the parts are built anew, as a run does."""
    latents, wanted = (Tensor(wanted_latents((2, 4, 8, 8))[i::2]) for i in range(2))
    ms.set_context(mode=ms.PYNATIVE_MODE)
    vae = Components.of_folder("sigma-mini").opened("vae")
    value, gradient = ms.value_and_grad(open_pictures(vae, files))(latents, wanted)
    ms.set_context(mode=ms.GRAPH_MODE)
    for recompute in (False, True):
        distance = open_pictures(vae, files)
        if recompute:
            distance.one.recompute()
        found, of_graph = ms.value_and_grad(distance)(latents, wanted)
        assert float(found) == pytest.approx(float(value), rel=LIMIT)
        assert relative_error(of_graph.asnumpy(), gradient.asnumpy()) < GRADIENT_LIMIT


# weight files


def test_files(files, tmp_path):
    """Two .pth files, one of both, and a state dict of lpips.LPIPS as a whole give the same weights."""
    tensors = drawn_weights()
    one = write_weights(tmp_path / "both.safetensors", tensors)
    slices = {0: 1, 2: 1, 5: 2, 7: 2, 10: 3, 12: 3, 14: 3, 17: 4, 19: 4, 21: 4, 24: 5, 26: 5, 28: 5}
    whole = {"scaling_layer.shift": np.zeros((1, 3, 1, 1), np.float32)}
    for name, array in tensors.items():
        if name.startswith("features."):
            _, number, part = name.split(".")
            whole[f"net.slice{slices[int(number)]}.{number}.{part}"] = array
        else:
            whole.update({name: array, name.replace("lin", "lins."): array})
    whole = write_weights(tmp_path / "whole.pth", whole)
    wanted = list(drawn_lpips().get_parameters())
    for paths in (files, [one], [whole]):
        for weight, same in zip(load_lpips(paths).get_parameters(), wanted):
            np.testing.assert_array_equal(weight.asnumpy(), same.asnumpy(), err_msg=weight.name)


ALEXNET = np.ones((1, 192, 1, 1), np.float32)
BAD = {  # which of the two files, changes to the heads, what is said
    "one file of two": ([0], {}, "'lin0.model.1.weight' is missing, of the linear heads; give weights/v0.1/vgg.pth"),
    "the other": ([1], {}, "'features.0.weight' is missing, of VGG16; give vgg16-397923af.pth"),
    "twice": ([0, 1, 1], {}, "tensor 'lin0.model.1.weight' is in .*vgg.pth, too"),
    "heads of AlexNet": (
        [0, 1],
        {"lin1.model.1.weight": ALEXNET},
        r"has shape \(1, 192, 1, 1\), LPIPS with VGG16 needs \(1, 128, 1, 1\); give weights/v0.1/vgg.pth",
    ),
    "another head": ([0, 1], {"lin5.model.1.weight": ALEXNET}, "'lin5.model.1.weight' is no part"),
    "batch norms": ([0, 1], {"features.1.running_mean": np.ones(64, np.float32)}, "'features.1.running_mean' is no"),
    "numbers": ([0, 1], {"lin0.model.1.weight": np.ones((1, 64, 1, 1), np.int32)}, "holds int32, no floating-point"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files(files, tmp_path, kind):
    chosen, changes, said = BAD[kind]
    heads = {name: array for name, array in drawn_weights().items() if name.startswith("lin")}
    both = [files[0], write_weights(tmp_path / "vgg.pth", {**heads, **changes})]
    with pytest.raises(MindSigmaError, match=said) as caught:
        open_lpips([both[i] for i in chosen])
    assert "\n" not in str(caught.value) and "vgg" in str(caught.value)


def test_files_that_are_none(files, tmp_path):
    with pytest.raises(MindSigmaError, match="no such file; LPIPS takes two files: vgg16-397923af.pth"):
        open_lpips([files[0], tmp_path / "absent.pth"])
    (tmp_path / "noise.pth").write_bytes(b"\x80\x02}q\x00." * 9)
    with pytest.raises(MindSigmaError, match="noise.pth"):
        open_lpips([tmp_path / "noise.pth"])
    heads = {name: array for name, array in drawn_weights().items() if name.startswith("lin")}
    heads["lin4.model.1.weight"] = np.full((1, 512, 1, 1), np.nan, np.float32)
    bad = write_weights(tmp_path / "vgg.safetensors", heads)
    with pytest.raises(MindSigmaError, match="'lin4.model.1.weight' is not finite"):
        load_lpips([files[0], bad])
