"""The functions of the native library over tensors in fp32, computed at once in the calling thread.

Results lie in memory of MindSpore, `Tensor(shape=, dtype=)`, although that fills them with zeros first (a pass over
memory, about a hundredth of what the kernels take). `Tensor.from_numpy` would not, but then a thread of MindSpore lets
go of an array, needs Python's lock for that, and may come when who waits for a tensor holds it, or when Python has
ended; `mint.empty` costs a millisecond a call. What lies between the kernels of a block is in memory that MindSpore
never sees.

`data_ptr` waits until a tensor has been computed, and is asked at every call, as weights may change between two.
"""

import ctypes
import threading
from math import prod
from typing import Any, NamedTuple

import numpy as np
from mindspore import Parameter, Tensor
from mindspore import dtype as mstype

from mindsigma.backends.cpu.library import library
from mindsigma.errors import MindSigmaError

LARGEST_KEPT = 64 << 20  # bytes of each piece of memory that is kept for the next call

_local = threading.local()

_POINTER, _COUNT, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int


def _fields(*groups):
    """Decorator of a ctypes.Structure for a struct of source/*.h: pairs of a type and the names of fields."""

    def given(struct):
        struct._fields_ = [(name, kind) for kind, names in groups for name in names.split()]
        return struct

    return given


@_fields(
    (_POINTER, "x weight y"), (_COUNT, "rows inner outer x_step rows_of_image step"),
    (_POINTER, "shift scale norm_weight bias factor gate residual kept gelu_input gelu_output"),
    (_FLOAT, "eps"), (_INT, "gelu turned"),
)  # fmt: skip
class Linear(ctypes.Structure):
    """See source/linear.h."""


@_fields(
    (_POINTER, "q k v out"), (_COUNT, "batch queries keys heads width q_step k_step v_step out_step"),
    (_POINTER, "kept bias"), (_COUNT, "bias_step"), (_POINTER, "logs"), (_FLOAT, "scale"),
)  # fmt: skip
class Attention(ctypes.Structure):
    """See source/attention.h."""


@_fields(
    (_POINTER, "x weight bias residual y"), (_COUNT, "batch inner outer height width side enlarge"),
)  # fmt: skip
class Convolution(ctypes.Structure):
    """See source/images.h."""


@_fields(
    (_POINTER, "dy x rows weight added dx drows dweight dbias"), (_COUNT, "inner outer"), (_FLOAT, "eps"),
    (_COUNT, "images rows_of_image step"),
)  # fmt: skip
class ModulatedGradient(ctypes.Structure):
    """See source/gradients.h."""


@_fields(
    (_POINTER, "weight bias"),
)  # fmt: skip
class Affine(ctypes.Structure):
    """Of a linear map, or its gradients."""


PARTS = ("qkv", "proj", "q", "kv", "cross", "fc1", "fc2")


@_fields(
    (_COUNT, "batch tokens channels heads hidden self_keys caption_keys"),
    (_POINTER, "x modulation caption mask q k v"), (Affine * len(PARTS), "parts"), (_FLOAT, "eps"),
)  # fmt: skip
class Block(ctypes.Structure):
    """See source/block.h."""


@_fields(
    (_POINTER, "x modulation caption q k v"), (Affine * len(PARTS), "parts"),
)  # fmt: skip
class BlockGradients(ctypes.Structure):
    """See source/block.h."""


class Memory(NamedTuple):
    """fp32 numbers that a kernel reads or writes: rows of the last axis of `shape`, `step` floats apart."""

    address: int
    shape: tuple
    step: int
    owner: Any = None  # keeps them alive

    def columns(self, first, count):
        """`count` columns of every row."""
        return Memory(self.address + 4 * first, self.shape[:-1] + (count,), self.step, self.owner)

    def images(self, first, last):
        """Places first ... last - 1 of the first axis."""
        address = self.address + 4 * first * prod(self.shape[1:-1]) * self.step
        return Memory(address, (last - first,) + self.shape[1:], self.step, self.owner)

    def reshaped(self, *shape):
        """The same numbers, which lie in one piece, in another shape."""
        return Memory(self.address, shape, shape[-1], self.owner)


def memory(x):
    """The Memory of a tensor, an array or a Memory; of a tensor that does not lie in one piece a copy."""
    if isinstance(x, Memory):
        return x
    if isinstance(x, np.ndarray):
        return Memory(x.ctypes.data, x.shape, x.shape[-1], x)
    if x.dtype != mstype.float32:
        raise TypeError(f"the native kernels compute in float32, not in {x.dtype}")
    x = x if x.is_contiguous() else x.contiguous()
    return Memory(x.data_ptr(), x.shape, x.shape[-1] if x.shape else 1, x)


def pointer(x):
    """Address of a tensor, an array or a Memory; None of None."""
    if x is None:
        return None
    if isinstance(x, Memory):
        return x.address
    if isinstance(x, Parameter):  # `accelerate` has looked at its dtype; it lies in one piece
        return x.data_ptr()
    return memory(x).address


def array(x):
    """A NumPy view of a tensor or a Memory, whose numbers it keeps alive."""
    x = memory(x)
    floats = (ctypes.c_float * (prod(x.shape[:-1]) * x.step)).from_address(x.address)
    floats.owner = x.owner
    rows = np.frombuffer(floats, np.float32).reshape(x.shape[:-1] + (x.step,))
    return rows[..., : x.shape[-1]]


def as_tensor(x):
    """A copy of a Memory as a tensor; a tensor as it is."""
    return x if isinstance(x, Tensor) else Tensor(np.ascontiguousarray(array(x)))


def kept_tokens(mask, shape):
    """A mask (N, L), or None for ones of that shape, as fp32."""
    return Tensor(np.ones(shape, np.float32) if mask is None else mask.asnumpy().astype(np.float32))


def empty(*shape):
    """A tensor for a result."""
    return Tensor(shape=shape, dtype=mstype.float32)


def spare(name, *shape):
    """Memory for what lies between two kernels, valid until the next one of that name."""
    kept, floats = _local.__dict__, prod(shape)
    found, address = kept.get(name, (None, 0))
    if found is None or found.size < floats + 16:
        found = np.empty(floats + 16, np.float32)
        address = -(-found.ctypes.data // 64) * 64  # a vector of 64 bytes lies in one line of the cache
        if found.nbytes <= LARGEST_KEPT:
            kept[name] = found, address
    return Memory(address, shape, shape[-1], found)


def call(name, *arguments):
    """Call a function of the library; structs by their address."""
    arguments = [ctypes.byref(x) if isinstance(x, ctypes.Structure) else x for x in arguments]
    if getattr(library(), name)(*arguments):
        raise MemoryError(f"no memory for {name}")


class Rows(NamedTuple):
    """Rows of modulation (N or 1, R, C), of which each image has its own, or all the same."""

    address: int
    channels: int
    step: int  # from one image's to the next one's
    owner: Any

    @classmethod
    def of(cls, modulation):
        """Of a tensor; Rows as they are."""
        if isinstance(modulation, Rows):
            return modulation
        source = memory(modulation)
        images, rows, channels = source.shape
        return cls(source.address, channels, rows * channels if images > 1 else 0, source)

    def row(self, index):
        """Address of a row of the first image."""
        return self.address + 4 * index * self.channels

    def from_row(self, index):
        """The rows without the first ones."""
        return Rows(self.row(index), self.channels, self.step, self.owner)

    def from_image(self, index):
        """The rows of the images without the first ones."""
        return Rows(self.address + 4 * index * self.step, self.channels, self.step, self.owner)


def linear(x, weight, bias=None, *, rows=None, norm_row=None, gate_row=None, norm_weight=None, eps=0.0, gelu=False,
           factor=None, residual=None, kept=None, out=None):  # fmt: skip
    """x (..., T, in) through a linear map, with what comes before and after it in the same pass.

    Before: LayerNorm, modulated by the shift in row `norm_row` of `rows` and the scale in the one after it; or
    x / rms(x) * norm_weight. After, in this order, each if given: plus bias (out,), GELU (tanh), times factor, times
    row `gate_row` of `rows`, plus residual; factor and residual are as the result.

    Args:
        weight: (out, in).
        rows: Rows of (N or 1, R, in or out), see `Rows.of`.
        kept: memory to which the result before GELU, factor, gate and residual is written, too.
        out: memory for the result; a new tensor by default.

    Returns:
        (..., T, out).
    """
    source = memory(x)
    outer, inner = weight.shape
    if source.shape[-1] != inner:
        raise ValueError(f"linear: x {tuple(source.shape)} does not fit weight {tuple(weight.shape)}")
    if out is None:
        out = empty(*source.shape[:-1], outer)
    count = prod(source.shape[:-1])
    arguments = Linear(
        source.address, pointer(weight), pointer(out), count, inner, outer, source.step,
        source.shape[-2] if len(source.shape) > 2 else max(count, 1), rows.step if rows else 0,
        norm_weight=pointer(norm_weight), bias=pointer(bias), factor=pointer(factor), residual=pointer(residual),
        kept=pointer(kept), eps=eps, gelu=gelu,
    )  # fmt: skip
    if norm_row is not None:
        arguments.shift, arguments.scale = rows.row(norm_row), rows.row(norm_row + 1)
    if gate_row is not None:
        arguments.gate = rows.row(gate_row)
    call("linear", arguments)
    return out


def attention(q, k, v, heads, scale, kept=None, bias=None, out=None):
    """Attention of q (N, S, C) to k and v (N, L, C): (N, S, C).

    Args:
        q, k, v: tensors, or Memory such as columns of one piece.
        kept: array (N, L) of float32, a key is dropped where it is 0; if it drops all of an image, none is.
        bias: (N or 1, heads, S, L), added to the scaled products.
        out: memory for the result; a new tensor by default.
    """
    q, k, v = memory(q), memory(k), memory(v)
    batch, queries, channels = q.shape
    if k.shape[1] == 0:
        raise MindSigmaError("attention without keys has no answer")
    out = empty(batch, queries, channels) if out is None else out
    a = Attention(
        q.address, k.address, v.address, pointer(out), batch, queries, k.shape[1], heads, channels // heads,
        q.step, k.step, v.step, channels, kept=pointer(kept), scale=scale,
    )  # fmt: skip
    if bias is not None:
        bias = memory(bias)
        a.bias, a.bias_step = bias.address, heads * queries * k.shape[1] if bias.shape[0] > 1 else 0
    call("attention", a)
    return out


def group_norm(x, groups, weight, bias, eps, silu, out=None):
    """GroupNorm of x (N, C, H, W), with SiLU after it if asked for; `out` may be x."""
    source = memory(x)
    batch, channels = source.shape[:2]
    out = empty(*source.shape) if out is None else out
    pointers = [_POINTER(pointer(t)) for t in (source, weight, bias, out)]
    counts = [_COUNT(n) for n in (batch, channels, prod(source.shape[2:]), groups)]
    call("group_normalisation", *pointers, *counts, _FLOAT(eps), _INT(silu))
    return out


def convolution(x, weight, bias, residual=None, enlarge=False, out=None):
    """1x1 or 3x3 convolution of x (N, C, H, W) that keeps its size, plus the residual if there is one.

    With `enlarge` of x with every pixel repeated twice along both axes.
    """
    source, weight = memory(x), memory(weight)
    batch, inner, height, width = source.shape
    outer, _, side, _ = weight.shape
    height, width = (2 * height, 2 * width) if enlarge else (height, width)
    out = empty(batch, outer, height, width) if out is None else out
    c = Convolution(
        source.address, weight.address, pointer(bias), pointer(residual), pointer(out),
        batch, inner, outer, height, width, side, enlarge,
    )  # fmt: skip
    call("convolution", c)
    return out


def modulated_gradient(gradient, x, modulation, row, weight, eps):
    """Gradients of `linear` with a bias and `norm_row=row`: of x (N, T, in), modulation (N, R, in), weight and bias."""
    batch, tokens, inner = x.shape
    outer = weight.shape[0]
    rows = Rows.of(modulation)
    results = empty(*x.shape), empty(*modulation.shape), empty(outer, inner), empty(outer)
    dx, drows, dweight, dbias = map(pointer, results)
    g = ModulatedGradient(
        pointer(gradient), pointer(x), rows.row(row), pointer(weight), None,
        dx, drows + 4 * row * inner, dweight, dbias, inner, outer, eps, batch, tokens, modulation.shape[1] * inner,
    )  # fmt: skip
    call("modulated_gradient", g)
    return results


def block(x, modulation, caption, mask, rest, heads, eps):
    """A block of the DiT in training: its Block for `block_forward` and `block_backward`.

    Args:
        x: tokens (N, T, C); modulation: (N, 6, C), shift, 1 + scale, gate of attention, then of the MLP.
        caption: (N, L, C); mask: array (N, L) of float32, 0 drops a token.
        rest: weight and bias of each of PARTS; or queries, keys and values of self-attention, (N, T, C) and twice
            (N, K, C), then weight and bias of each but the first.
    """
    sources = [memory(t) for t in (x, modulation, caption, *rest)]
    batch, tokens, channels = sources[0].shape
    if sources[1].shape != (batch, 6, channels):
        raise ValueError(f"block: modulation {sources[1].shape} does not fit x {sources[0].shape}")
    given = len(rest) % 2 == 1
    b = Block(
        batch, tokens, channels, heads, sources[-4].shape[0], sources[4].shape[1] if given else tokens,
        sources[2].shape[1], *(source.address for source in sources[:3]), pointer(mask), eps=eps,
    )  # fmt: skip
    if given:
        b.q, b.k, b.v = (source.address for source in sources[3:6])
    _fill(b.parts, sources[6 if given else 3 :])
    b.sources = sources, mask  # alive as long as this
    return b


def block_forward(b, keep=True):
    """Result (N, T, C) of a `block`, and the array that `block_backward` needs, None unless it is to `keep` that."""
    out = empty(b.batch, b.tokens, b.channels)
    saved = _unused(library().block_floats(ctypes.byref(b))) if keep else None
    call("block_forward", b, _POINTER(pointer(out)), _POINTER(pointer(saved)))
    return out, saved


def block_backward(b, gradient, saved, frozen=False):
    """Gradients of all tensors of a `block`, in their order, but for the weights and biases if they are frozen.

    Without what the forward pass saved it runs again.
    """
    sources, first = b.sources[0], 6 if b.q else 3
    results = [empty(*source.shape) for source in (sources[:first] if frozen else sources)]
    addresses = list(map(pointer, results))
    g = BlockGradients(*addresses[:3])
    if b.q:
        g.q, g.k, g.v = addresses[3:6]
    _fill(g.parts, results[first:])
    call("block_backward", b, _POINTER(pointer(gradient)), _POINTER(pointer(saved)), g)
    if saved is not None:
        _give_back(saved)
    return tuple(results)


def _fill(parts, weights):
    """Addresses of weights and biases, to the last of the parts."""
    first = len(PARTS) - len(weights) // 2
    for i in range(0, len(weights), 2):
        parts[first + i // 2] = Affine(pointer(weights[i]), pointer(weights[i + 1]))


# What blocks saved and need no more, all of one size, for the next step: memory that is new to the process is slow.
_saved = []
MOST_SAVED = 512 << 20  # bytes


def _unused(floats):
    return _saved.pop() if _saved and _saved[-1].size == floats else np.empty(floats, np.float32)


def _give_back(saved):
    if _saved and _saved[-1].size != saved.size:
        _saved.clear()
    if (len(_saved) + 1) * saved.nbytes <= MOST_SAVED:
        _saved.append(saved)
