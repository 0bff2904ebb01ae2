"""The kernels of the native library as MindSpore operations: fp32, for PyNative and for graphs.

The first tensor of most operations is an int32 plan that chooses a variant. The plan also stands in the place of the
optional tensors that are absent.
"""

from mindspore import Tensor, ops
from mindspore import dtype as mstype
from mindspore.common.api import _pynative_executor

from mindsigma.ops.native import direct
from mindsigma.ops.native.library import library

# Bits of a linear map's plan: which of the optional tensors are there, and GELU.
BIAS, MODULATION, NORM_WEIGHT, FACTOR, GATE, RESIDUAL, GELU = 1, 2, 4, 8, 16, 32, 64

# Made by `load`, as they need the library.
_linear = _attention = _attention_of_qkv = _blocks = _group_norm = _convolution = _enlarged_convolution = None
_group_norm_over = _twice = _patch_embedding = _patch_prediction = _solver_update = None
_of_input = _of_weight = _of_bias = None
_training_block = _training_block_gradient = None
_modulated_linear_gradient = _attention_gradient = _keeping_blocks = None


class _Operation(ops.Custom):
    """A function of the library. Called outside a graph it computes at once in the calling thread, past MindSpore:
    there is nothing to compile, and what lies between two calls is freed as Python lets go of it.

    Args:
        symbol: its name.
        shapes: from the shapes of the inputs to that of the result, or a tuple of them.
        results: number of results from the number of inputs, or None for one.
        over: index of the input that the result is written over, where it is computed at once; that must not share
            its memory with another tensor.
    """

    def __init__(self, symbol, shapes, results=None, over=None):
        def dtypes(*inputs):
            of_one = inputs[-1 if len(inputs) == 1 else 1]  # the first may be a plan
            return of_one if results is None else (of_one,) * results(len(inputs))

        super().__init__(f"{library()}:{symbol}", shapes, dtypes, "aot")
        self.symbol, self.shapes, self.over = symbol, shapes, over

    def __call__(self, *inputs):
        if _pynative_executor.requires_grad():
            return super().__call__(*inputs)
        if self.over is not None and inputs[self.over].is_contiguous():
            direct.call(self.symbol, (*inputs, inputs[self.over]))
            return inputs[self.over]
        shapes = self.shapes(*(list(value.shape) for value in inputs))
        if not isinstance(shapes, tuple):
            out = direct.tensor(shapes)
            direct.call(self.symbol, (*inputs, out))
            return out
        outs = tuple(direct.tensor(shape) for shape in shapes)
        direct.call(self.symbol, (*inputs, *outs))
        return outs


def load():
    """Make the operations. Returns whether there is a library."""
    global _linear, _attention, _attention_of_qkv, _blocks, _keeping_blocks, _group_norm, _convolution
    global _enlarged_convolution, _of_input, _of_weight, _of_bias, _training_block, _training_block_gradient
    global _modulated_linear_gradient, _attention_gradient, _group_norm_over, _twice, _patch_embedding
    global _patch_prediction, _solver_update
    if library() is None:
        return False
    if _linear is None:
        _linear = _Operation("linear", lambda plan, x, weight, *rest: x[:-1] + [weight[0]])
        _attention = _Operation("attention", lambda plan, q, *rest: q)
        _attention_of_qkv = _Operation("attention", lambda plan, q, *rest: q[:-1] + [q[-1] // 3])
        _blocks = _Operation("blocks", lambda plan, x, *rest: x)
        _keeping_blocks = _Operation("blocks", lambda plan, x, *rest: (x, [plan[0] - OF_ALL, *x]), lambda n: 2)
        _group_norm = _Operation("group_normalisation", lambda plan, x, *rest: x)
        _group_norm_over = _Operation("group_normalisation", lambda plan, x, *rest: x, over=1)
        _convolution = _Operation("convolution", lambda plan, x, w, *rest: [x[0], w[0], x[2], x[3]])
        _enlarged_convolution = _Operation("convolution", lambda plan, x, w, *rest: [x[0], w[0], 2 * x[2], 2 * x[3]])
        _twice = _Operation("twice", lambda x: [2 * x[0], *x[1:]])
        _patch_embedding = _Operation(
            "patch_embedding", lambda x, position, w, bias: [x[0], x[2] // w[2] * (x[3] // w[3]), w[0]]
        )
        _patch_prediction = _Operation(
            "patch_prediction", lambda plan, x, rows, z, w, bias: [z[0], w[0] * x[1] // (z[2] * z[3]), *z[2:]]
        )
        _solver_update = _Operation("solver_update", lambda plan, x, history, *rest: (x, history), lambda n: 2)
        _of_input = _Operation("linear_gradient_of_input", lambda dy, weight: [dy[0], weight[1]])
        _of_weight = _Operation("linear_gradient_of_weight", lambda dy, x: [dy[1], x[1]])
        _of_bias = _Operation("linear_gradient_of_bias", lambda dy: [dy[1]])
        _modulated_linear_gradient = _Operation(
            "modulated_linear_gradient", lambda eps, dy, x, rows, weight: (x, rows, weight, [weight[0]]), lambda n: 4
        )
        _attention_gradient = _Operation("attention_gradient", lambda plan, dy, q, k, v: (q, k, v), lambda n: 3)
        _training_block = _Operation("training_block", lambda plan, x, *rest: x)
        _training_block_gradient = _Operation("training_block_gradient", _shapes_of_block_gradient, lambda n: n - 4)
    return True


def _shapes_of_block_gradient(plan, dy, kept, x, modulation, caption, kept_tokens, table, *weights):
    return x, modulation, caption, table, *weights


def takes(x):
    """Whether the kernels compute in the dtype of x."""
    return x.dtype == mstype.float32


@ops.constexpr
def _plan(*numbers):
    """`direct.bits` as a tensor."""
    return Tensor(direct.bits(*numbers))


def linear(
    x, weight, bias=None, rows=None, shift_row=None, gate_row=None, eps=0.0, norm_weight=None, gelu=False, factor=None,
    residual=None,
):  # fmt: skip
    """x (N, T, in) through a linear map, with what comes before and after it in the same pass.

    Before: LayerNorm modulated by rows[:, shift_row] and the scale in the row after it, if `shift_row` is given; or
    x / rms(x) * norm_weight, if that is given. After, in this order, each if given: plus bias (out,), GELU (tanh),
    times factor (N, T, out), times rows[:, gate_row], plus residual (N, T, out).

    Args:
        weight: (out, in).
        rows: (N or 1, R, in or out).

    Returns:
        (N, T, out).
    """
    variant, index = (GELU if gelu else 0), 0
    if bias is not None:
        variant += BIAS
    if shift_row is not None:
        variant, index = variant + MODULATION, shift_row
    if norm_weight is not None:
        variant += NORM_WEIGHT
    if factor is not None:
        variant += FACTOR
    if gate_row is not None:
        variant, index = variant + GATE, gate_row
    if residual is not None:
        variant += RESIDUAL
    plan = _plan(variant, float(eps), index)
    return _linear(
        plan, x, weight, plan if bias is None else bias, plan if rows is None else rows,
        plan if norm_weight is None else norm_weight, plan if factor is None else factor,
        plan if residual is None else residual,
    )  # fmt: skip


def gradient_of_input(gradient, weight):
    """Gradient (rows, in) of a linear map's input from that of its output (rows, out); weight (out, in)."""
    return _of_input(gradient, weight)


def gradient_of_weight(gradient, x):
    """Gradient (out, in) of a linear map's weight from that of its output (rows, out) and its input x (rows, in)."""
    return _of_weight(gradient, x)


def gradient_of_bias(gradient):
    """Gradient (out,) of a linear map's bias from that of its output (rows, out)."""
    return _of_bias(gradient)


def modulated_linear_gradient(gradient, x, rows, weight, eps):
    """Gradients of x (N, T, in), rows (N or 1, 2, in), weight (out, in), bias (out,) of a `linear` of modulated x."""
    return _modulated_linear_gradient(_plan(float(eps)), gradient, x, rows, weight)


def attention_gradient(gradient, q, k, v, num_heads, scale, masked):
    """Gradients of q, k and v, as `attention` takes them without a bias, from that of its result."""
    plan = _plan(num_heads, float(scale), q.shape[-1], 0, 0, 0, int(masked), 0)
    return _attention_gradient(plan, gradient, q, k, v)


def attention(q, k, v, num_heads, scale, masked=False, bias=None):
    """Attention of q (N, S, C) over k and v (N, L, C): (N, S, C).

    Args:
        masked: k is (N, L, C + 1); a key whose last column is below 0 is dropped.
        bias: (N or 1, heads, S, L), added to the scaled products of queries and keys, or None.
    """
    plan = _plan(num_heads, float(scale), q.shape[-1], 0, 0, 0, int(masked), 0 if bias is None else 1)
    return _attention(plan, q, k, v, plan if bias is None else bias)


def attention_of_qkv(qkv, num_heads, scale):
    """Attention among the rows of qkv (N, T, 3 * C), queries, keys and values side by side: (N, T, C)."""
    channels = qkv.shape[-1] // 3
    plan = _plan(num_heads, float(scale), channels, 0, channels, 2 * channels, 0, 0)
    return _attention_of_qkv(plan, qkv, qkv, qkv, plan)


REDUCTIONS = {None: 0, "conv": 1, "pool": 2, "ave": 3, "uniform": 3, "uniform_every": 3}  # of kv_compression.py

OF_ALL = 9  # numbers of `block_plan` before those of each block
TEXT = {"": 0, "keep": 1, "take": 2}


@ops.constexpr
def block_plan(tokens, heads, eps, qk_norm, sampling, factor, height, width, compressed, text=""):
    """Numbers that tell what blocks of a DiT are.

    Args:
        text: "keep" or "take" the changes by cross-attention, or "".
        tokens: of an image, on a grid of height x width, which may be 0 without compression.
        sampling, factor: as of kv_compression.py; qk_norm: whether there are q/k norms.
        compressed: for each block, whether it has compression.
    """
    down = factor
    if sampling == "uniform_every":
        height, width, down = 1, tokens, 1
    numbers = (heads, float(eps), int(qk_norm), REDUCTIONS[sampling], height, width, down, factor, TEXT[text])
    return numbers + tuple(int(flag) for flag in compressed)


def block_plan_tensor(*arguments):
    """`block_plan` as a tensor, which graphs keep as a constant."""
    return _plan(*block_plan(*arguments))


def blocks(x, rows, tensors, heads, eps, qk_norm, sampling, factor, height, width, compressed, text=""):
    """Blocks of a DiT one after the other: tokens x (N, T, C) to (N, T, C); other arguments as of `block_plan`.

    Args:
        rows: (N or 1, R, C): six for each block, see models/dit/branches.py.
        tensors: for each block keys and values of the caption, (N, L, C or, with a mask, C + 1) and (N, L, C), with
            text "take" what cross-attention is to add (N, T, C), then weight and bias of qkv, proj, q/k norms,
            compression and its norm, q, the projection after it, fc1, fc2.

    Returns:
        the tokens; with text "keep" a tuple of them and of what cross-attention added in each block (N, T, C).
    """
    plan = block_plan_tensor(x.shape[1], heads, eps, qk_norm, sampling, factor, height, width, compressed, text)
    if text == "keep":
        y, changes = _keeping_blocks(plan, x, rows, *tensors)
        return (y,) + tuple(changes[i] for i in range(len(compressed)))
    return _blocks(plan, x, rows, *tensors)


def training_block(x, modulation, caption, kept, table, plan, weights):
    """A block of a DiT, of which there is a gradient: x (N, T, C) to (N, T, C); see models/dit/branches.py.

    Args:
        modulation: (N, 6 * C), of the timestep; table: (6, C).
        caption: (N, L, C); kept: (N, L), a token is dropped if below 0.
        plan: of `block_plan_tensor`.
        weights: weight and bias of qkv, proj, q/k norms, compression and its norm, q, kv, the projection of
            cross-attention, fc1, fc2.
    """
    return _training_block(plan, x, modulation, caption, kept, table, *weights)


def training_block_gradient(gradient, x, modulation, caption, kept, table, plan, weights):
    """Gradients of x, modulation, caption, table and the weights, from that of `training_block`'s result.

    Computes the block again first; `direct.training_block_gradient` does not.
    """
    # The plan also stands in the place of what the block saved.
    return _training_block_gradient(plan, gradient, plan, x, modulation, caption, kept, table, *weights)


def group_norm(x, groups, weight, bias, eps, silu, last_use=False):
    """GroupNorm of x (N, C, H, W), and SiLU of that if asked for.

    With `last_use` it may be written over x, which must not share its memory with another tensor.
    """
    plan = _plan(groups, float(eps), int(silu))
    return _group_norm_over(plan, x, weight, bias) if last_use else _group_norm(plan, x, weight, bias)


def convolution(x, weight, bias, residual=None, enlarge=False):
    """1x1 or 3x3 convolution of x (N, C, H, W) inside a border of zeros, plus bias, plus residual if given.

    With `enlarge`, of x with every pixel repeated twice along both axes: (N, out, 2 * H, 2 * W).
    """
    plan = _plan(int(enlarge), 0 if residual is None else 1)
    last = plan if residual is None else residual
    if enlarge:
        return _enlarged_convolution(plan, x, weight, bias, last)
    return _convolution(plan, x, weight, bias, last)


def twice(x):
    """x (N, ...) two times: (2 * N, ...)."""
    return _twice(x)


def patch_embedding(latents, position, weight, bias):
    """Tokens (N, T, C) of latents (N, c, h, w): their patches through weight (C, c, p, p), bias, position (1, T, C)."""
    return _patch_embedding(latents, position, weight, bias)


def patch_prediction(x, rows, latents, shift_row, eps, weight, bias):
    """(N, out, h, w) of tokens x (N, T, C), after LayerNorm modulated by two of the rows.

    Args:
        rows: (N or 1, R, C), the shift in `shift_row` and the scale in the one after it.
        latents: (N, c, h, w), of whose patches the tokens are.
        weight: (p * p * out, C), channels innermost.
    """
    return _patch_prediction(_plan(shift_row, float(eps)), x, rows, latents, weight, bias)


def solver_update(latents, history, numbers, guidance_scale, prediction, guided):
    """See pipeline/denoising.py, `advance`."""
    return _solver_update(_plan(int(guided)), latents, history, numbers, guidance_scale, prediction)
