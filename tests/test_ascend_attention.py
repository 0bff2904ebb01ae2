"""FlashAttentionScore of the Ascend host and its gradient, held to NumPy in float64."""

import numpy as np
import pytest
from ascend_kernels import BF16, Refused, Tensor, call, ints
from ascend_numbers import DTYPES, Numbers, close, drawn, room

B, N, SQ, SK, D = 2, 4, 5, 7, 8
SCALE = 0.4
FAR = 2**31 - 1
LAYOUTS = {"BSH": (0, 2, 1, 3), "BSND": (0, 2, 1, 3), "SBH": (2, 0, 1, 3), "BNSD": (0, 1, 2, 3)}


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def laid_out(array, layout):
    """(B, N, S, D) in a layout."""
    turned = array.transpose(LAYOUTS[layout])
    return turned.reshape(*turned.shape[:2], -1) if layout in ("BSH", "SBH") else turned


def put_back(array, layout, heads):
    """A layout as (B, N, S, D)."""
    if layout in ("BSH", "SBH"):
        array = array.reshape(*array.shape[:2], heads, -1)
    return array.transpose(np.argsort(LAYOUTS[layout]))


class Case:
    """Operands of one attention; `run` calls the kernel, `expected` is what float64 says of result and statistics."""

    def __init__(self, rng, layout="BNSD", dtype="float32", heads=N, key_heads=N, sq=SQ, sk=SK, width=D, value_width=D):
        self.layout, self.dtype, self.heads, self.key_heads = layout, dtype, heads, key_heads

        def operand(number, rows, columns):
            return drawn(rng, laid_out(np.empty((B, number, rows, columns)), layout).shape, dtype)

        self.q = operand(heads, sq, width)
        self.k, self.v = operand(key_heads, sk, width), operand(key_heads, sk, value_width)
        self.dy = operand(heads, sq, value_width)
        self.out = room(self.dy.held.shape, dtype)
        self.top, self.sum = room((B, heads, sq, 8), "float32"), room((B, heads, sq, 8), "float32")

    def arguments(self, shift, mask, prefix, before, after, mode, precise):
        return [shift and shift.tensor, None, None, mask, prefix and ints(*prefix)], [
            SCALE, 1.0, before, after, self.heads, self.layout, precise, mode]  # fmt: skip

    def run(self, shift=None, mask=None, prefix=None, before=FAR, after=FAR, mode=0, precise=0):
        self.given = self.arguments(shift, mask, prefix, before, after, mode, precise)
        inputs, settings = self.given
        call("aclnnFlashAttentionScore", self.q.tensor, self.k.tensor, self.v.tensor, *inputs, *settings,
             self.top.tensor, self.sum.tensor, None, self.out.tensor)  # fmt: skip

    def wide(self):
        """query, key, value, dy as (B, N, S, D), heads of the key repeated."""
        q, dy = (put_back(tensor.wide, self.layout, self.heads) for tensor in (self.q, self.dy))
        k, v = (put_back(tensor.wide, self.layout, self.key_heads) for tensor in (self.k, self.v))
        return q, *(np.repeat(tensor, self.heads // self.key_heads, 1) for tensor in (k, v)), dy

    def expected(self, hidden=None, shift=0.0):
        q, k, v, _ = self.wide()
        scores = SCALE * (q @ k.swapaxes(2, 3) + shift)
        if hidden is not None:
            scores = np.where(hidden, np.finfo(np.float32).min, scores)
        top = scores.max(-1, keepdims=True)
        powers = np.exp(scores - top)
        total = powers.sum(-1, keepdims=True)
        self.weights = powers / total
        return self.weights @ v, top, total

    def check(self, hidden=None, shift=0.0):
        out, top, total = self.expected(hidden, shift)
        close(self.out, laid_out(out, self.layout))
        close(self.top, top)
        close(self.sum, total, 4)

    def check_gradient(self, hidden=None):
        q, k, v, dy = self.wide()
        dq, dk, dv = (room(tensor.held.shape, self.dtype) for tensor in (self.q, self.k, self.v))
        inputs, settings = self.given
        call("aclnnFlashAttentionScoreGrad", self.q.tensor, self.k.tensor, self.v.tensor, self.dy.tensor, *inputs[:4],
             self.top.tensor, self.sum.tensor, None, self.out.tensor, inputs[4], *settings, dq.tensor, dk.tensor,
             dv.tensor, None)  # fmt: skip
        y = put_back(self.out.wide, self.layout, self.heads)  # as it was rounded
        slopes = self.weights * (dy @ v.swapaxes(2, 3) - (dy * y).sum(-1, keepdims=True)) * SCALE

        def of_keys(gradient):  # repeated heads give to the one that they are
            return gradient.reshape(B, self.key_heads, -1, *gradient.shape[2:]).sum(2)

        close(dq, laid_out(slopes @ k, self.layout))
        close(dk, laid_out(of_keys(slopes.swapaxes(2, 3) @ q), self.layout))
        close(dv, laid_out(of_keys(self.weights.swapaxes(2, 3) @ dy), self.layout))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_gradients(layout, dtype, rng):
    case = Case(rng, layout, dtype)
    case.run()
    case.check()
    case.check_gradient()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fewer_heads_of_the_key_and_narrower_values(layout, rng):
    case = Case(rng, layout, key_heads=2, value_width=6)
    case.run()
    case.check()
    case.check_gradient()


def test_gradient_is_the_slope(rng):
    """A difference quotient of the kernel's own forward, in fp32."""
    case = Case(rng)
    direction = rng.standard_normal(case.q.held.shape).astype(np.float32)
    values = []
    start = case.q.held.copy()
    for step in (1e-2, -1e-2, 0):
        case.q.held[:] = start + step * direction
        case.run()
        values.append((case.out.wide * case.dy.wide).sum())
    case.expected()
    case.check_gradient()
    q, k, v, dy = case.wide()
    slopes = case.weights * (dy @ v.swapaxes(2, 3) - (dy * (case.weights @ v)).sum(-1, keepdims=True)) * SCALE
    assert ((slopes @ k) * direction).sum() == pytest.approx((values[0] - values[1]) / 2e-2, rel=2e-3)


def mask_of(hidden):
    return Tensor(np.ascontiguousarray(hidden).astype(np.uint8))


@pytest.mark.parametrize("shape", [(SQ, SK), (1, 1, SQ, SK), (B, 1, SQ, SK), (B, N, SQ, SK)])
@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("kind", [np.uint8, np.bool_])
def test_a_mask_hides_where_it_is_1(kind, mode, shape, rng):
    hidden = rng.random(shape) < 0.4
    hidden[..., 0] = False
    case = Case(rng, "BSH")
    case.run(mask=Tensor(hidden.astype(kind)), mode=mode)
    case.check(hidden)
    case.check_gradient()


def diagonal(sq, sk, shift, before, after):
    """Hidden where a key is more than `before` behind or `after` ahead of the diagonal."""
    distance = np.arange(sk) - (np.arange(sq)[:, None] + shift)
    return (distance < -before) | (distance > after)


TRIANGLE = np.triu(np.ones((2048, 2048), np.uint8), 1)


@pytest.mark.parametrize("sq,sk", [(5, 7), (7, 5)])
@pytest.mark.parametrize("mode", [2, 3, 4])
def test_a_triangle_stands_for_a_mask(mode, sq, sk, rng):
    case = Case(rng, sq=sq, sk=sk)
    before, after = (2, 1) if mode == 4 else (FAR, FAR)
    case.run(mask=Tensor(TRIANGLE), mode=mode, before=before, after=after)
    hidden = {
        2: diagonal(sq, sk, 0, FAR, 0),
        3: diagonal(sq, sk, sk - sq, FAR, 0),
        4: diagonal(sq, sk, sk - sq, before, after),
    }[mode]
    if mode == 3 and sq > sk:  # its first rows see nothing: 0, not the mean
        out = case.expected(hidden)[0]
        empty = hidden.all(-1)
        close(case.out, np.where(empty[:, None], 0, out))
        assert empty.sum() == 2
        return
    case.check(hidden)
    case.check_gradient()


def test_a_band_and_prefixes(rng):
    case = Case(rng)
    band = diagonal(SQ, SK, 0, 2, 1)
    case.run(mask=mask_of(band), before=2, after=1)
    case.check(band)
    prefix = (4, 6)
    hidden = np.stack([diagonal(SQ, SK, SK - SQ, FAR, 0) & (np.arange(SK) >= number) for number in prefix])[:, None]
    case.run(mask=mask_of(hidden), prefix=prefix, mode=5)
    case.check(hidden)
    block = np.zeros((1024, 2048), np.uint8)
    block[:, 1024:] = 1
    case.run(mask=Tensor(np.concatenate([TRIANGLE, block])), prefix=prefix, mode=6)
    case.check(hidden)
    case.check_gradient()


@pytest.mark.parametrize("precise", [0, 2])
def test_a_row_that_sees_nothing(precise, rng):
    """innerPrecise 2 makes it 0; otherwise it is the mean of the values."""
    hidden = np.zeros((SQ, SK), bool)
    hidden[1] = True
    case = Case(rng)
    case.run(mask=mask_of(hidden), precise=precise)
    out = case.expected(hidden)[0]
    if precise:
        out[:, :, 1] = 0
    close(case.out, out)


@pytest.mark.parametrize("shape", [(B, N, SQ, SK), (1, N, SQ, SK), (B, N, 1, SK)])
def test_what_is_added_before_the_scale(shape, rng):
    shift = drawn(rng, shape, "float32")
    case = Case(rng, "SBH")
    case.run(shift=shift)
    case.check(shift=shift.wide)
    case.check_gradient()


def test_strides_and_blocks_of_rows(rng):
    """Key and value as halves of one product; more scores than a block holds."""
    rows, keys = 600, 2100
    both = rng.standard_normal((1, keys, 2, 2, 16)).astype(np.float32)
    q = drawn(rng, (1, 2, rows, 16), "float32")
    k, v = (Numbers(both, "float32", lambda array, i=i: array[:, :, i].transpose(0, 2, 1, 3)) for i in range(2))
    out, top, total = (
        room((1, 2, rows, 16), "float32"),
        room((1, 2, rows, 8), "float32"),
        room((1, 2, rows, 8), "float32"),
    )
    call("aclnnFlashAttentionScore", q.tensor, k.tensor, v.tensor, *[None] * 5, SCALE, 1.0, FAR, FAR, 2, "BNSD",
         0, 0, top.tensor, total.tensor, None, out.tensor)  # fmt: skip
    scores = SCALE * (q.wide @ k.wide.swapaxes(2, 3))
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    close(out, powers / powers.sum(-1, keepdims=True) @ v.wide)
    close(total, powers.sum(-1, keepdims=True), 4)


def test_what_cann_refuses(rng):
    def refused(match, change=lambda case: None, rules=None, **options):
        case = Case(rng, **options)
        change(case)
        with pytest.raises(Refused, match=match):
            case.run(**(rules or {}))

    refused("CANN takes 1 to 768", width=784, value_width=784)
    refused("inputLayout is TND", lambda case: setattr(case, "layout", "TND"))
    refused("4 heads of the query for 3", key_heads=3)
    refused("wider than those of the key", value_width=9)
    refused("attenMask has the shape", rules={"mask": Tensor(np.zeros((SQ, SK + 1), np.uint8))})
    refused("attenMask has the shape", rules={"mask": Tensor(np.zeros((SQ, SK), np.uint8)), "mode": 2})
    refused("attenMask is float32", rules={"mask": Tensor(np.zeros((SQ, SK), np.float32))})
    refused(
        "query, key and value are float32 and bfloat16",
        lambda case: setattr(case, "k", drawn(rng, (B, N, SK, D), BF16)),
    )
    refused("sparseMode is 7", rules={"mode": 7})
    refused("nothing between them", rules={"mask": Tensor(TRIANGLE), "mode": 4, "before": -3, "after": 2})
    refused(
        "a prefix of 1; CANN takes 2 to 7",
        rules={"mask": mask_of(np.zeros((B, 1, SQ, SK))), "mode": 5, "prefix": (1, 3)},
    )
    refused("softmaxMax or softmaxSum has the shape", lambda case: setattr(case, "top", room((B, N, SQ), "float32")))
