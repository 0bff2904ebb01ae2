"""Linear maps with low-rank changes beside them: LoRA, rsLoRA (arXiv 2312.03732) and DoRA (arXiv 2402.09353).

A change B A is not added to its weight in half precision, where W + B A is W again if its elements are small, whatever
they sum to; in fp32 `merged` may do so. What stands beside is computed in fp32 whatever the dtype of x and W. B starts
at zero, so in fp16 the gradient that passes through it would underflow in the first steps, which are those that matter.
"""

from mindspore import dtype as mstype
from mindspore import ops

from mindsigma.ops.kernels import for_ascend

_matmul = ops.MatMul()
_matmul_transposed = ops.MatMul(transpose_b=True)
_transposed_matmul = ops.MatMul(transpose_a=True)


def regroup(tensors, layout):
    """The weights that a function takes, from a flat tuple of tensors.

    Args:
        tensors: the function's own weights, then those of the changes.
        layout: for each of the own weights a tuple of its changes (empty: none), each (place of A in `tensors`, B
            follows it; place of the magnitude or -1; index; count; scale; kernels).

    Returns:
        tuple: a weight W as it is, or (W, ((A, B, magnitude or None, index, count, scale, kernels), ...)) for `linear`.
    """
    result = ()
    for i in range(len(layout)):
        weight = tensors[i]
        if len(layout[i]) > 0:
            changes = ()
            for place, magnitude, index, count, scale, kernels in layout[i]:
                row = tensors[magnitude] if magnitude >= 0 else None
                changes += ((tensors[place], tensors[place + 1], row, index, count, scale, kernels),)
            weight = (weight, changes)
        result += (weight,)
    return result


def add_changes(y, x, weight, changes):
    """What becomes of y = x W^T with changes of W.

    Args:
        y: (rows, out); x: (rows, in); weight: (out, in).
        changes: tuple of (A (r, in) or any shape that flattens to it, B (out / count, r), magnitude (out / count,) or
            None, index, count, scale, kernels): each of another index of `count` equal ranges of the rows of W.

    Returns:
        (rows, out) in y's dtype: y + scale (x A^T) B^T, with a magnitude times magnitude / norm of the rows of
        W + scale B A, where that norm is a constant for the gradient (DoRA section 4.3, as in peft).
    """
    dtype, count = y.dtype, changes[0][4]
    y, x = y.astype(mstype.float32), x.astype(mstype.float32)
    if count == 1:
        return _changed(y, x, weight, changes[0]).astype(dtype)
    width, pieces = y.shape[1] // count, ()
    for index in range(count):
        begin, end = index * width, (index + 1) * width
        piece = y[:, begin:end]
        for change in changes:
            if change[3] == index:
                piece = _changed(piece, x, weight[begin:end], change)
        pieces += (piece,)
    return ops.concat(pieces, 1).astype(dtype)


def _changed(y, x, weight, change):
    a, b, magnitude, _, _, scale, kernels = change
    a = a.reshape(a.shape[0], -1)
    y = y + _matmul_transposed(_matmul_transposed(x, a), b * scale)
    if magnitude is None:
        return y
    factor = (magnitude / row_norms(weight, a, b, scale)).reshape(1, -1)
    if not for_ascend(kernels):  # as in functional.py, no broadcast on a CPU
        factor = _matmul(ops.fill(mstype.float32, (y.shape[0], 1), 1.0), factor)
    return y * factor


def merged(weight):
    """fp32 weight (out, in) with the changes that `regroup` put beside it, if any, added to it."""
    if not isinstance(weight, tuple):
        return weight
    weight, changes = weight
    count, pieces = changes[0][4], ()
    width = weight.shape[0] // count
    for index in range(count):
        piece = weight[index * width : (index + 1) * width] if count > 1 else weight
        for change in changes:
            if change[3] == index:
                changed, factor = _changed_rows(piece, change)
                piece = changed if factor is None else changed * factor
        pieces += (piece,)
    return pieces[0] if count == 1 else ops.concat(pieces, 0)


def merge(*weights):
    """`merged` of each that has changes."""
    result = ()
    for weight in weights:
        if isinstance(weight, tuple):
            result += (merged(weight),)
    return result


def gradients_of_merge(*tensors):
    """Gradients of A, B and, if there is one, magnitude of each change, in a row.

    `tensors`: gradients of the results of `merge`, and its arguments.
    """
    adapted, found = (), ()
    for tensor in tensors:
        if isinstance(tensor, tuple):
            adapted += (tensor,)
    for i in range(len(adapted)):
        found += _gradients_of_merged(adapted[i], tensors[i])
    return found


def _gradients_of_merged(adapted, gradient):
    weight, changes = adapted
    found = ()
    for change in changes:
        a, b, magnitude, index, count, scale, _ = change
        width = weight.shape[0] // count
        rows = weight[index * width : (index + 1) * width] if count > 1 else weight
        slope = gradient[index * width : (index + 1) * width] if count > 1 else gradient
        changed, factor = _changed_rows(rows, change)
        of_magnitude = ()
        if magnitude is not None:
            of_magnitude = (_row_sums(slope * changed).reshape(-1) / row_norms(rows, a, b, scale),)
            slope = slope * factor
        slope = slope * scale
        found += (_transposed_matmul(b, slope).reshape(a.shape), _matmul_transposed(slope, a.reshape(a.shape[0], -1)))
        found += of_magnitude
    return found


def _changed_rows(rows, change):
    """Rows (out, in) of a weight plus their low-rank change, and the factor of each as (out, in), or None for all 1."""
    a, b, magnitude, _, _, scale, _ = change
    a = a.reshape(a.shape[0], -1)
    changed = rows + _matmul(b * scale, a)
    if magnitude is None:
        return changed, None
    factor = (magnitude / row_norms(rows, a, b, scale)).reshape(-1, 1)
    return changed, _matmul(factor, ops.fill(mstype.float32, (1, rows.shape[1]), 1.0))


def row_norms(weight, a, b, scale):
    """Norms (out,) of the rows of W + scale B A in fp32, without gradient; 1 for a row of zeros.

    From |w|² + 2 scale w·(BA) + scale² |BA|², so that no matrix of W's size is made besides W in fp32.
    """
    weight, a, b = ops.stop_gradient(weight).astype(mstype.float32), ops.stop_gradient(a), ops.stop_gradient(b)
    squares = _row_sums(weight * weight)
    squares = squares + (2.0 * scale) * _row_sums(_matmul_transposed(weight, a) * b)
    squares = squares + (scale * scale) * _row_sums(_matmul(b, _matmul_transposed(a, a)) * b)
    squares = ops.stop_gradient(squares.reshape(-1))
    return ops.sqrt(ops.select(squares > 0, squares, ops.ones_like(squares)))


def _row_sums(x):
    return _matmul(x, ops.fill(x.dtype, (x.shape[1], 1), 1.0))
