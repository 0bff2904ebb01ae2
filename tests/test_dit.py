"""The DiT against the official code's outputs, in both modes and with aligned heads, and its refusals."""

import mindspore as ms
import numpy as np
import pytest
from conftest import GOLDEN, Case, relative_error
from mindspore import Tensor, ops

from mindsigma import MindSigmaError, load_dit
from mindsigma.backends.ascend import align_heads, published_shapes
from mindsigma.models.dit import DiT, DiTConfig, KVCompression
from mindsigma.models.dit_config import PRESETS, preset
from mindsigma.ops import operators

CASES = [
    "ms_plain",
    "ms_kv_conv",
    "ms_kv_conv_odd",
    "ms_kv_ave",
    "ms_kv_uniform",
    "ms_kv_uniform_every",
    "ms_qk_norm",
    "ms_micro",
    "square_256",
]
LIMIT = 3e-6


@pytest.mark.parametrize("name", CASES)
def test_output_is_the_official_codes(name, mode):
    case = Case(name)
    assert relative_error(case.build()(*case.inputs()).asnumpy(), case.out) < LIMIT


@pytest.mark.parametrize("name", ["ms_kv_conv", "ms_qk_norm", "ms_micro"])
def test_official_checkpoint_gives_the_same(name):
    case = Case(name)
    dit = load_dit(GOLDEN / f"{name}.pth", num_heads=2)  # heads of 48 cannot be told from the tensors
    drawn = {parameter.name: parameter.asnumpy() for parameter in case.build().get_parameters()}
    loaded = {parameter.name: parameter.asnumpy() for parameter in dit.get_parameters()}
    assert drawn.keys() == loaded.keys()
    assert all((drawn[key] == loaded[key]).all() for key in drawn)
    assert dit.config.pe_interpolation == case.config["pe_interpolation"]  # read off the stored position embedding
    assert dit.config.input_size == case.config["input_size"]
    assert relative_error(dit(*case.inputs()).asnumpy(), case.out) < LIMIT


def test_thresholds_notice_small_mistakes():
    """What the limit is worth: one swapped pair of channels, the other half of the position, a wrong GELU all fail."""
    case = Case("ms_plain")
    dit = case.build()
    qkv = dit.blocks[0].attn.qkv.weight
    swapped = qkv.asnumpy().copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    qkv.set_data(Tensor(swapped))
    assert relative_error(dit(*case.inputs()).asnumpy(), case.out) > LIMIT
    assert relative_error(case.build(pe_interpolation=1.01)(*case.inputs()).asnumpy(), case.out) > LIMIT
    case = Case("ms_kv_ave")
    assert relative_error(case.build(kv_compression=None)(*case.inputs()).asnumpy(), case.out) > LIMIT


@pytest.mark.parametrize("name", CASES)
def test_aligned_heads_compute_the_same(name):
    """Weights as published and as Ascend's kernel takes them."""
    case = Case(name)
    dit = case.build()
    published = {name: tensor.asnumpy() for name, tensor in dit.parameters_and_names()}
    align_heads(dit)
    assert dit.blocks[0].attn.proj.weight.shape[1] % 16 == 0
    assert relative_error(dit(*case.inputs()).asnumpy(), case.out) < LIMIT
    with published_shapes(dit):
        assert all((tensor.asnumpy() == published[name]).all() for name, tensor in dit.parameters_and_names())
    assert relative_error(dit(*case.inputs()).asnumpy(), case.out) < LIMIT


def test_query_pieces_change_nothing(monkeypatch):
    case = Case("ms_plain")
    whole = case.build()(*case.inputs()).asnumpy()
    monkeypatch.setattr(operators, "MAX_SCORES", 999)  # uneven pieces
    assert relative_error(case.build()(*case.inputs()).asnumpy(), whole) < 1e-6


def test_masked_tokens_do_not_matter():
    case = Case("ms_plain")
    dit, (x, t, y, mask) = case.build(), case.inputs()
    out = dit(x, t, y, mask).asnumpy()
    changed = y.asnumpy().copy()
    changed[mask.asnumpy() == 0] = 100.0
    assert relative_error(dit(x, t, Tensor(changed), mask).asnumpy(), out) < 1e-6
    longest = int(mask.asnumpy().sum(1).max())
    assert relative_error(dit(x, t, y[:, :longest], mask[:, :longest]).asnumpy(), out) < 1e-6
    ones = np.ones(mask.shape, np.int64)
    assert relative_error(dit(x, t, y, Tensor(ones)).asnumpy(), dit(x, t, y).asnumpy()) < 1e-6


def test_gradients_agree_between_modes_and_with_differences():
    """A directional derivative checks the result."""
    case = Case("ms_kv_conv")
    dit, inputs = case.build().set_train(), case.inputs()
    parameters = dit.trainable_params()

    def loss(*args):
        return (dit(*args) ** 2).mean()

    eager = [g.asnumpy() for g in ms.grad(loss, None, parameters)(*inputs)]
    graph = [g.asnumpy() for g in ms.jit(ms.grad(loss, None, parameters))(*inputs)]
    for parameter, a, b in zip(parameters, eager, graph):
        assert np.abs(a).max() > 0, parameter.name
        assert relative_error(a, b) < 1e-4, parameter.name
    index = [parameter.name for parameter in parameters].index("blocks.1.attn.sr.weight")
    weight = parameters[index]
    before, direction, step = weight.asnumpy().copy(), eager[index] / np.linalg.norm(eager[index]), 1e-2
    values = []
    for sign in (1, -1):
        weight.set_data(Tensor(before + sign * step * direction))
        values.append(float(loss(*inputs)))
    slope = (values[0] - values[1]) / (2 * step)
    assert abs(slope - np.linalg.norm(eager[index])) < 0.02 * np.linalg.norm(eager[index])


@pytest.mark.parametrize("name", ["PixArt-Sigma-XL-2-1024-MS", "PixArt-Sigma-XL-2-1024-MS-KV"])
def test_xl_has_the_published_shapes(name):
    from mindspore.nn.utils import no_init_parameters

    with no_init_parameters():
        dit = DiT(preset(name))
    shapes = {parameter.name: tuple(parameter.shape) for parameter in dit.get_parameters()}
    assert shapes["x_embedder.proj.weight"] == (1152, 4, 2, 2)
    assert shapes["y_embedder.y_proj.fc1.weight"] == (1152, 4096)
    assert shapes["t_block.1.weight"] == (6912, 1152)
    assert shapes["blocks.27.attn.qkv.weight"] == (3456, 1152)
    assert shapes["blocks.27.cross_attn.kv_linear.weight"] == (2304, 1152)
    assert shapes["blocks.27.mlp.fc1.weight"] == (4608, 1152)
    assert shapes["final_layer.linear.weight"] == (32, 1152)
    compressed = [f"blocks.{i}.attn.sr.weight" for i in range(28) if f"blocks.{i}.attn.sr.weight" in shapes]
    assert len(compressed) == (14 if name.endswith("KV") else 0)
    assert all(shapes[key] == (1152, 1, 2, 2) for key in compressed)
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    assert total == 610_856_096 + len(compressed) * (1152 * 4 + 3 * 1152)


def test_new_weights_follow_the_paper():
    ms.set_seed(0)
    dit = DiT(DiTConfig(hidden_size=144, depth=2, num_heads=2, caption_channels=32, kv_compression="conv:2:1"))
    values = {parameter.name: parameter.asnumpy() for parameter in dit.get_parameters()}
    assert (values["blocks.1.attn.sr.weight"] == 0.25).all() and (values["blocks.1.attn.sr.bias"] == 0).all()
    for name in ("blocks.0.cross_attn.proj.weight", "final_layer.linear.weight", "blocks.0.attn.qkv.bias"):
        assert (values[name] == 0).all()
    assert abs(values["t_block.1.weight"].std() - 0.02) < 1e-3
    bound = (6 / (144 + 3 * 144)) ** 0.5
    qkv = values["blocks.0.attn.qkv.weight"]
    assert np.abs(qkv).max() <= bound and abs(qkv.std() - bound / 3**0.5) < 0.02 * bound
    assert np.abs(values["x_embedder.proj.weight"]).max() <= (6 / (16 + 144)) ** 0.5
    assert abs(values["blocks.0.scale_shift_table"].std() * 144**0.5 - 1) < 0.15


@pytest.mark.parametrize(
    ("text", "layers"), [("conv:2:14-27", range(14, 28)), ("uniform:4:0,3", (0, 3)), ("ave:2:1-2,5", (1, 2, 5))]
)
def test_compression_texts(text, layers):
    parsed = KVCompression.parse(text)
    assert parsed.layers == tuple(layers)
    official = {"sampling": parsed.sampling, "scale_factor": parsed.factor, "kv_compress_layer": list(layers)}
    assert KVCompression.parse(official) == parsed


@pytest.mark.parametrize(
    "changes",
    [
        {"kv_compression": "conv:2"},
        {"kv_compression": "median:2:1"},
        {"kv_compression": "conv:0:1"},
        {"kv_compression": "conv:2:1-99"},
        {"num_heads": 7},
        {"pe_interpolation": 0.0},
        {"hidden_size": 0},
    ],
)
def test_bad_configs_are_named(changes):
    with pytest.raises(MindSigmaError, match=next(iter(changes))):
        DiTConfig(**changes)


def test_bad_calls_are_named():
    case = Case("ms_micro")
    dit, (x, t, y, mask, size, ratio) = case.build(), case.inputs()
    with pytest.raises(MindSigmaError, match="image_size"):
        dit(x, t, y, mask)
    with pytest.raises(MindSigmaError, match="multiples of 2"):
        dit(x[:, :, :13], t, y, mask, x, x)
    with pytest.raises(MindSigmaError, match="timestep"):
        dit(x, t[:1], y, mask, x, x)
    with pytest.raises(MindSigmaError, match="modulation of shape"):  # of two images for one
        rows = ops.concat(dit.modulations(t, size, ratio), 1)
        dit.denoise(x[:1], rows, dit.text_kv(y, mask), dit.position(x.shape))
    with pytest.raises(MindSigmaError, match="caption of shape"):
        dit(x, t, y[:, :, :5], mask, x, x)
    with pytest.raises(MindSigmaError, match="caption_mask"):
        dit(x, t, y, mask[:, :5], x, x)
    with pytest.raises(MindSigmaError, match="too small"):
        compressed = Case("ms_kv_conv")
        inputs = compressed.inputs()
        compressed.build(kv_compression="ave:7:1")(inputs[0][:, :, :12, :12], *inputs[1:])
    with pytest.raises(MindSigmaError, match="single-scale"):
        square = Case("square_256")
        inputs = square.inputs()
        square.build()(inputs[0][:, :, :16], *inputs[1:])
    with pytest.raises(MindSigmaError, match="unknown preset"):
        preset("PixArt-Omega")
    assert len(PRESETS) >= 11


def test_pool_is_the_mean_of_each_cell():
    dit = DiT(DiTConfig(hidden_size=48, depth=2, num_heads=3, caption_channels=8, kv_compression="pool:2:1"))
    x = np.random.default_rng(0).standard_normal((2, 5 * 7, 48)).astype(np.float32)
    cells = x.reshape(2, 5, 7, 48)[:, :4, :6].reshape(2, 2, 2, 3, 2, 48).mean((2, 4)).reshape(2, 6, 48)
    np.testing.assert_allclose(dit.blocks[1].attn.compress(Tensor(x), 5, 7).asnumpy(), cells, atol=1e-6)


def test_compression_of_absurdly_many_layers_is_refused():
    with pytest.raises(MindSigmaError, match="expected SAMPLING:FACTOR:LAYERS"):
        KVCompression.parse("conv:2:0-999999999999")
