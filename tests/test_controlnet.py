"""ControlNets against the official code's outputs and gradients, and SimpleTuner's; files; what does not fit."""

import mindspore as ms
import numpy as np
import pytest
from conftest import relative_error
from control_cases import ControlCase
from mindspore import Tensor

from mindsigma import MindSigmaError
from mindsigma.backends.cpu import accelerate
from mindsigma.models.controlnet import ControlledDiT, ControlNet, ControlNetConfig
from mindsigma.models.dit import DiT, DiTConfig
from mindsigma.training.loss import LossConfig, coefficients, diffusion_loss, noisy_latents
from mindsigma.weights.loading import load_controlnet
from mindsigma.weights.names.controlnet_names import OFFICIAL
from mindsigma.weights.names.name_map import slots
from mindsigma.weights.saving import save_network

LIMIT = 3e-6
GRADIENT_LIMIT = 2e-5


@pytest.fixture(scope="module")
def cases():
    """The cases by name."""
    return {name: ControlCase(name) for name in ("half", "ms", "sigma")}


@pytest.mark.parametrize("name", ["half", "ms", "sigma"])
def test_output_is_the_original_codes(cases, name):
    case = cases[name]
    dit, controlnet = case.networks()
    controlled, inputs = ControlledDiT(dit, controlnet), case.inputs()
    assert relative_error(controlled(*inputs).asnumpy(), case.data["out"]) < LIMIT
    assert relative_error(case.data["out_base"], case.data["out"]) > 0.1  # what there is to miss
    uncontrolled = dit(inputs[0], *inputs[2:]).asnumpy()
    assert relative_error(uncontrolled, case.data["out_base"]) < LIMIT
    fast = ControlledDiT(accelerate(dit), accelerate(controlnet))
    assert relative_error(fast(*inputs).asnumpy(), case.data["out"]) < LIMIT


def test_one_condition_is_for_all_images(cases):
    case = cases["half"]
    inputs = case.inputs()
    inputs[1] = inputs[1][:1]
    out = ControlledDiT(*case.networks())(*inputs).asnumpy()
    assert relative_error(out, case.data["out_c1"]) < LIMIT


def test_in_a_graph(cases, graph_mode):
    case = cases["ms"]
    assert relative_error(ControlledDiT(*case.networks())(*case.inputs()).asnumpy(), case.data["out"]) < LIMIT


def test_each_copy_adds_what_the_official_one_does(cases):
    case = cases["half"]
    dit, controlnet = case.networks()
    seen = []
    x, condition, *rest = case.inputs()
    hook = controlnet.construct

    def construct(*arguments):
        seen.extend(hook(*arguments))
        return tuple(seen)

    controlnet.construct = construct
    ControlledDiT(dit, controlnet)(x, condition, *rest)
    assert len(seen) == 3
    assert relative_error(seen[0][:1].asnumpy(), case.data["skip_first"]) < LIMIT
    assert relative_error(seen[-1][:1].asnumpy(), case.data["skip_last"]) < LIMIT


def test_latents_of_the_condition_times_half(cases):
    """What SimpleTuner's conditioning scale does; ours weighs what the copies add."""
    case = cases["sigma"]
    inputs = case.inputs()
    inputs[1] = inputs[1] * 0.5
    assert relative_error(ControlledDiT(*case.networks())(*inputs).asnumpy(), case.data["out_half"]) < LIMIT


def losses_and_norms(case, dit, controlnet):
    """Official training loss's parts (N,), and the norms of its mean's gradients by official names."""
    data = case.data
    numbers = Tensor(coefficients(data["t_train"], LossConfig()))
    clean, noise = Tensor(data["x0"]), Tensor(data["noise"])
    noisy = noisy_latents(clean, noise, numbers)
    _, condition, _, *rest = case.inputs()
    controlled = ControlledDiT(dit, controlnet)
    named = dict(controlnet.parameters_and_names())
    timestep = Tensor(data["t_train"].astype(np.float32))

    def loss():
        output = controlled(noisy, condition, timestep, *rest)
        mse, bound = diffusion_loss(output, clean, noisy, noise, numbers, True)
        return (mse + bound).mean(), mse, bound

    (_, mse, bound), gradients = ms.value_and_grad(loss, None, list(named.values()), has_aux=True)()
    norms = {slots(OFFICIAL, name)[0]: np.linalg.norm(g.asnumpy()) for name, g in zip(named, gradients)}
    return mse.asnumpy(), bound.asnumpy(), norms


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", ["half", "ms"])
def test_gradients_are_the_official_codes(cases, name, fast):
    case = cases[name]
    dit, controlnet = case.networks()
    if fast:
        dit, controlnet = accelerate(dit.set_train()), accelerate(controlnet.set_train())
    mse, bound, norms = losses_and_norms(case, dit, controlnet)
    assert relative_error(mse, case.data["mse"]) < GRADIENT_LIMIT
    assert relative_error(bound, case.data["vb"]) < GRADIENT_LIMIT
    assert list(norms) and set(norms) == set(case.data["grad_names"])
    expected = dict(zip(case.data["grad_names"], case.data["grad_norms"]))
    for key, norm in norms.items():
        assert abs(norm - expected[key]) < GRADIENT_LIMIT * expected[key], key


@pytest.mark.parametrize("name", ["half", "ms"])
def test_a_fresh_one_is_the_base_and_only_its_last_maps_get_a_gradient(cases, name):
    case = cases[name]
    dit, controlnet = case.networks(draw=False)
    out = ControlledDiT(dit, controlnet)(*case.inputs()).asnumpy()
    inputs = case.inputs()
    np.testing.assert_array_equal(out, dit(inputs[0], *inputs[2:]).asnumpy())
    mse, bound, norms = losses_and_norms(case, dit, controlnet)
    assert relative_error(mse, case.data["fresh_mse"]) < GRADIENT_LIMIT
    assert relative_error(bound, case.data["fresh_vb"]) < GRADIENT_LIMIT
    for key, expected in zip(case.data["grad_names"], case.data["fresh_grad_norms"]):
        assert (norms[key] > 0) == (".after_proj." in key) == (expected > 0), key
        assert abs(norms[key] - expected) <= GRADIENT_LIMIT * expected, key


def test_copies_have_all_of_their_blocks(cases):
    """Also what compresses keys and the norms of queries and keys; and nothing is shared with the base."""
    ms.set_seed(5)
    config = DiTConfig(
        hidden_size=48, depth=3, num_heads=2, caption_channels=16, qk_norm=True, kv_compression="conv:2:1,2"
    )
    dit = DiT(config)
    controlnet = ControlNet.from_dit(dit, 2)
    assert controlnet.config.kv_compression.layers == (1,)
    base = dict(dit.parameters_and_names())
    copied = {name: tensor for name, tensor in controlnet.parameters_and_names() if name.startswith("blocks.")}
    assert set(copied) == {name for name in base if name.startswith(("blocks.0.", "blocks.1."))}
    assert {"blocks.1.attn.sr.weight", "blocks.1.attn.norm.bias", "blocks.0.attn.q_norm.weight"} < set(copied)
    for name, tensor in copied.items():
        np.testing.assert_array_equal(tensor.asnumpy(), base[name].asnumpy())
    copied["blocks.0.attn.qkv.bias"].set_data(copied["blocks.0.attn.qkv.bias"] + 1)
    assert (base["blocks.0.attn.qkv.bias"].asnumpy() == 0).all()


def test_saved_and_loaded(cases, tmp_path):
    case = cases["half"]
    dit, controlnet = case.networks()
    out = ControlledDiT(dit, controlnet)(*case.inputs()).asnumpy()
    save_network(controlnet, tmp_path, "fp32")
    loaded = load_controlnet(tmp_path, base=dit)
    assert loaded.config == controlnet.config
    assert relative_error(ControlledDiT(accelerate(dit), loaded)(*case.inputs()).asnumpy(), out) < LIMIT
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"layers": 3', '"layers": 2'))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b'\\"layers\\":3', b'\\"layers\\":2'))
    with pytest.raises(MindSigmaError, match="'blocks.2.*is not part of the model"):
        load_controlnet(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_size": 192}, "for a model with hidden_size 96, this one has 192"),
        ({"num_heads": 4}, "num_heads 2, this one has 4"),
        ({"qk_norm": True}, "qk_norm False"),
        ({"kv_compression": "ave:2:0-4"}, "kv_compression None"),
        ({"depth": 3}, "3 layers: a base of 3 blocks takes 1 ... 2"),
    ],
)
def test_a_base_that_does_not_fit(cases, changes, message):
    config = ControlNetConfig.of(cases["half"].config, 3)
    ControlNetConfig.check_base(config, cases["half"].config)
    with pytest.raises(MindSigmaError, match=message):
        config.check_base(cases["half"].config.override(**changes))


def test_sizes_that_do_not_fit(cases):
    case = cases["half"]
    controlled, inputs = ControlledDiT(*case.networks()), case.inputs()
    for condition in (inputs[1][:, :3], inputs[1][:, :, :8], inputs[1][0]):
        with pytest.raises(MindSigmaError, match="condition of shape .* expected"):
            controlled(inputs[0], condition, *inputs[2:])
