"""Stand-ins for the mint operators without a CPU kernel in MindSpore 2.7.1 that mindone's PixArt transformer calls.

As shipped it cannot be built on a CPU. What is changed is what does not run, by the fastest equivalent of MindSpore's
that was found; the network stays mindone's. Import `install` before mindone.diffusers.
"""

import importlib.util
import sys
import tempfile
from pathlib import Path

import numpy as np
from mindspore import Parameter, Tensor, mint, nn, ops
from mindspore.common.initializer import initializer


@ops.constexpr
def number_range(start, end, step, dtype):
    """Tensor of a range."""
    value = np.arange(start, end, step)
    return Tensor(value) if dtype is None else Tensor(value, dtype)


def arange(start=0, end=None, step=1, dtype=None):
    """mint.arange."""
    if end is None:
        return number_range(0, start, step, dtype)
    return number_range(start, end, step, dtype)


def einsum(equation, x):
    """mint.einsum of one operand whose axes are permuted."""
    before, after = equation.split("->")
    return x.transpose(tuple(before.index(axis) for axis in after))


def split(tensor, split_size_or_sections, dim=0):
    """mint.split."""
    return ops.split(tensor, split_size_or_sections, dim)


def gelu(x, approximate="none"):
    """mint.nn.functional.gelu."""
    return ops.gelu(x, "tanh" if approximate == "tanh" else "none")


class GELU(nn.Cell):
    """mint.nn.GELU."""

    def __init__(self, approximate="none"):
        super().__init__()
        self.approximate = approximate

    def construct(self, x):
        """Any shape."""
        return gelu(x, self.approximate)


class LayerNorm(nn.Cell):
    """mint.nn.LayerNorm over the last axis."""

    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, bias=True, dtype=None):
        super().__init__()
        width = normalized_shape if isinstance(normalized_shape, int) else normalized_shape[-1]
        ones, zeros = initializer("ones", (width,)), initializer("zeros", (width,))
        self.weight = Parameter(ones, name="weight") if elementwise_affine else ones.init_data()
        self.bias = Parameter(zeros, name="bias") if elementwise_affine and bias else zeros.init_data()
        self.norm = ops.LayerNorm(-1, -1, eps)

    def construct(self, x):
        """(..., C)."""
        return self.norm(x, self.weight, self.bias)[0]


class Identity(nn.Cell):
    """mint.nn.Dropout outside training."""

    def __init__(self, p=0.5, inplace=False):
        super().__init__()

    def construct(self, x):
        """As it is."""
        return x


class Conv2d(nn.Conv2d):
    """mint.nn.Conv2d."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, bias=True, **_):
        super().__init__(in_channels, out_channels, kernel_size, stride, "pad", padding, has_bias=bias)


def prepare_attention_mask(self, attention_mask, target_length, batch_size, out_dim=3):
    """Attention.prepare_attention_mask: (N, 1, L) to (N * heads, 1, L)."""
    if attention_mask is None:
        return None
    length = attention_mask.shape[-1]
    mask = ops.broadcast_to(attention_mask.reshape(batch_size, 1, 1, length), (batch_size, self.heads, 1, length))
    return mask.reshape(-1, 1, length)


def math_attention_op(self, query, key, value, attn_mask=None):
    """Attention.math_attention_op for (N, heads, T, D) and an additive mask (N, heads, 1, L); theirs fails with one."""
    scores = ops.BatchMatMul(transpose_b=True)(query * self.scale, key)
    if attn_mask is not None:
        scores = scores + attn_mask
    return ops.BatchMatMul()(ops.softmax(scores, -1), value)


def install():
    """Put the stand-ins in place and return mindone's PixArtTransformer2DModel."""
    functions = {
        "arange": arange,
        "einsum": einsum,
        "meshgrid": lambda *grids, indexing="ij": ops.meshgrid(*grids, indexing=indexing),
        "stack": lambda tensors, dim=0: ops.stack(list(tensors), dim),
        "outer": lambda a, b: a.reshape(-1, 1) * b.reshape(1, -1),
        "split": split,
        "randn": lambda *shape: Tensor(np.random.default_rng(0).standard_normal(shape, np.float32)),
    }
    for name, function in functions.items():
        setattr(mint, name, function)
    for name, cell in {"Conv2d": Conv2d, "LayerNorm": LayerNorm, "GELU": GELU, "Dropout": Identity}.items():
        setattr(mint.nn, name, cell)
    mint.nn.functional.gelu = gelu

    import mindone.diffusers.models  # noqa: F401

    folder = Path(tempfile.mkdtemp(prefix="mindone-"))
    for name in ("attention", "transformers.pixart_transformer_2d"):
        _load_edited(f"mindone.diffusers.models.{name}", folder)
    from mindone.diffusers.models.attention_processor import Attention
    from mindone.diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

    Attention.prepare_attention_mask = prepare_attention_mask
    Attention.math_attention_op = math_attention_op
    return PixArtTransformer2DModel


def _load_edited(name, folder):
    """Import a module with `.chunk(n, dim=1)`, which graph mode has no kernel for, as a split.

    From a file, since MindSpore compiles what it reads in the source.
    """
    spec = importlib.util.find_spec(name)
    source = Path(spec.origin).read_text(encoding="utf-8")
    for count, width in ((6, 1), (2, 1)):
        source = source.replace(f".chunk({count}, dim=1)", f".split({width}, axis=1)")
    path = folder / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
