"""Linear maps and norms with the names and shapes of the published checkpoints, and low-rank changes beside them."""

import math

import mindspore as ms
from mindspore import Parameter, nn, ops
from mindspore.common.initializer import Normal, Uniform, initializer

from mindsigma.ops.operators import dense, layer_norm, rms_norm

_matmul = ops.MatMul()
_matmul_transposed = ops.MatMul(transpose_b=True)


def xavier_uniform(fan_in, fan_out):
    """Uniform initializer with variance 2 / (fan_in + fan_out)."""
    return Uniform(math.sqrt(6.0 / (fan_in + fan_out)))


def normal(sigma):
    """Zero-mean normal initializer."""
    return Normal(sigma)


def parameter(shape, init="zeros", dtype=ms.float32):
    """A Parameter whose random values are only drawn when no weights follow."""
    return Parameter(initializer(init, shape, dtype))


class Linear(nn.Cell):
    """x weight^T + bias, in x's dtype whatever that of the weights.

    Args:
        in_features, out_features: of the weight (out, in) and the bias (out,).
        init: initializer of the weight; by default Xavier's uniform.
        dtype: of the weights.
    """

    def __init__(self, in_features, out_features, init=None, dtype=ms.float32):
        super().__init__()
        init = xavier_uniform(in_features, out_features) if init is None else init
        self.weight = parameter((out_features, in_features), init, dtype)
        self.bias = parameter((out_features,), "zeros", dtype)
        self.changes = ()

    def change(self, changes):
        """Compute with a list of LowRank beside the weight from now on."""
        names = [(parameter, parameter.name) for change in changes for parameter in change.get_parameters()]
        self.changes = nn.CellList(changes, auto_prefix=False)
        for parameter, name in names:  # by which an optimiser tells them apart; the assignment prefixed all alike
            parameter.name = name

    def weights(self, dtype):
        """Weight (out, in) and bias (out,) or None in a dtype, without the changes."""
        return ops.cast(self.weight, dtype), ops.cast(self.bias, dtype)

    def merged_weight(self):
        """The weight (out, in) with its changes added to it, fp32."""
        weight = self.weights(ms.float32)[0]
        if len(self.changes) == 0:
            return weight
        count = self.changes[0].count
        rows = weight.shape[0] // count
        pieces = ()
        for index in range(count):
            piece = weight[index * rows : (index + 1) * rows]
            for change in self.changes:
                if change.index == index:
                    piece = change.added_to(piece)
            pieces += (piece,)
        return ops.concat(pieces, 0)

    def construct(self, x):
        """x (..., in) to (..., out)."""
        weight, bias = self.weights(x.dtype)
        if len(self.changes) == 0:
            return dense(x, weight, bias)
        return self.changed(x, weight, bias)

    def changed(self, x, weight, bias):
        """What `construct` gives with the changes; weight and bias in x's dtype."""
        # A change is computed in fp32: added to a weight in half precision it would be rounded away.
        wide, y = x.astype(ms.float32), dense(x, weight).astype(ms.float32)
        count = self.changes[0].count
        rows = weight.shape[0] // count
        pieces = ()
        for index in range(count):
            piece = y[..., index * rows : (index + 1) * rows] if count > 1 else y
            for change in self.changes:
                if change.index == index:
                    piece = change(piece, wide, weight[index * rows : (index + 1) * rows])
            pieces += (piece,)
        y = (ops.concat(pieces, -1) if count > 1 else pieces[0]).astype(x.dtype)
        return y if bias is None else y + bias


class UnbiasedLinear(Linear):
    """x weight^T."""

    def __init__(self, in_features, out_features, init=None, dtype=ms.float32):
        super().__init__(in_features, out_features, init, dtype)
        del self.bias
        self.bias = None

    def weights(self, dtype):
        """See Linear."""
        return ops.cast(self.weight, dtype), None


class FlattenedLinear(Linear):
    """A Linear whose weight has another shape in the checkpoints, one that flattens to (out, in)."""

    def __init__(self, shape, init=None, dtype=ms.float32):
        super().__init__(math.prod(shape[1:]), shape[0], init, dtype)
        self.weight = parameter(shape, init, dtype)

    def weights(self, dtype):
        """See Linear."""
        return ops.cast(self.weight.reshape(self.weight.shape[0], -1), dtype), ops.cast(self.bias, dtype)


class LowRank(nn.Cell):
    """A change scale * B A of some rows W of a weight: LoRA, rsLoRA (arXiv 2312.03732), DoRA (arXiv 2402.09353).

    Args:
        a, b: Parameters (r, in, or any shape that flattens to it) and (rows, r), fp32. B starts at zero.
        magnitude: Parameter (rows,) of DoRA, the norms of the rows of what W becomes, or None.
        index, count: the rows are the `index`-th of `count` equal ranges.
        scale: of the change.
    """

    def __init__(self, a, b, magnitude, index, count, scale):
        super().__init__(auto_prefix=False)
        self.a, self.b, self.magnitude = a, b, magnitude
        self.index, self.count, self.scale = index, count, scale

    def construct(self, y, x, weight):
        """What becomes of y = x W^T (..., rows), fp32; x (..., in) fp32, weight the rows W."""
        a = self.a.reshape(self.a.shape[0], -1)
        y = y + dense(dense(x, a), self.b * self.scale)
        return y if self.magnitude is None else y * (self.magnitude / self.row_norms(weight))

    def added_to(self, weight):
        """The rows W (rows, in) fp32 with the change added to them."""
        weight_norms = None if self.magnitude is None else self.row_norms(weight)
        weight = weight + _matmul(self.b * self.scale, self.a.reshape(self.a.shape[0], -1))
        return weight if weight_norms is None else weight * (self.magnitude / weight_norms).reshape(-1, 1)

    def row_norms(self, weight):
        """Norms (rows,) of the rows of W + scale B A in fp32, without gradient (DoRA 4.3); 1 for a row of zeros.

        From |w|² + 2 scale w·(BA) + scale² |BA|², so that no matrix of W's size is made besides W in fp32.
        """
        weight = ops.stop_gradient(weight).astype(ms.float32)
        a, b, scale = ops.stop_gradient(self.a), ops.stop_gradient(self.b), self.scale
        a = a.reshape(a.shape[0], -1)
        squares = (weight * weight).sum(-1)
        squares = squares + (2.0 * scale) * (_matmul_transposed(weight, a) * b).sum(-1)
        squares = squares + (scale * scale) * (_matmul(b, _matmul_transposed(a, a)) * b).sum(-1)
        return ops.stop_gradient(ops.sqrt(ops.select(squares > 0, squares, ops.ones_like(squares))))


class LayerNorm(nn.Cell):
    """LayerNorm over the last axis with weight and bias (channels,)."""

    def __init__(self, channels, eps, dtype=ms.float32):
        super().__init__()
        self.weight, self.bias = parameter((channels,), "ones", dtype), parameter((channels,), "zeros", dtype)
        self.eps = eps

    def construct(self, x):
        """x (..., channels)."""
        return layer_norm(x, ops.cast(self.weight, x.dtype), ops.cast(self.bias, x.dtype), self.eps)


class RMSNorm(nn.Cell):
    """x / rms(x) * weight (channels,) over the last axis, in fp32."""

    def __init__(self, channels, eps):
        super().__init__()
        self.weight = parameter((channels,), "ones")
        self.eps = eps

    def construct(self, x):
        """x (..., channels)."""
        return rms_norm(x, self.weight, self.eps)
