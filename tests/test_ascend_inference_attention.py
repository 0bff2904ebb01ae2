"""Attention for inference on the Ascend host, held to NumPy in float64."""

import numpy as np
import pytest
from ascend_kernels import BF16, Refused, Tensor, call, ints, tensors
from ascend_numbers import close, drawn, room
from test_ascend_attention import FAR, LAYOUTS, diagonal, laid_out, put_back

B, N, S, D, SCALE = 2, 4, 6, 16, 0.3


@pytest.fixture
def rng():
    return np.random.default_rng(9)


def prompt(q, k, v, out, layout, shift=None, mask=None, lengths=(None, None), key_heads=0, mode=0, before=FAR,
           after=FAR, precise=0, fused=False):  # fmt: skip
    """Call PromptFlashAttentionV3, or FusedInferAttentionScoreV2 with the same."""
    shared = [shift and shift.tensor, mask, *(given and ints(*given) for given in lengths)]
    settings = [N, SCALE, before, after, layout, key_heads, mode, precise]
    if fused:
        call("aclnnFusedInferAttentionScoreV2", q.tensor, tensors(k.tensor), tensors(v.tensor), *shared,
             *[None] * 17, *settings, 0, 0, False, 0, 0, out.tensor, None)  # fmt: skip
    else:
        call("aclnnPromptFlashAttentionV3", q.tensor, k.tensor, v.tensor, *shared, *[None] * 5, *settings, out.tensor)


def expected_of(q, k, v, hidden=False, shift=0.0):
    k, v = (np.repeat(tensor, N // tensor.shape[1], 1) for tensor in (k, v))
    scores = np.where(hidden, np.finfo(np.float32).min, SCALE * (q @ k.swapaxes(2, 3) + shift))
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True) @ v


def operands(rng, layout, dtype, key_heads=N):
    shapes = [laid_out(np.empty((B, heads, S, D)), layout).shape for heads in (N, key_heads, key_heads)]
    given = [drawn(rng, shape, dtype) for shape in shapes]
    return given, [put_back(tensor.wide, layout, heads) for tensor, heads in zip(given, (N, key_heads, key_heads))]


@pytest.mark.parametrize("dtype", ["float16", BF16])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "SBH"])
@pytest.mark.parametrize("key_heads", [N, 2])
def test_layouts(key_heads, layout, dtype, rng):
    given, wide = operands(rng, layout, dtype, key_heads)
    out = room(given[0].held.shape, dtype)
    for fused in (False, True):
        out.held[:] = 0
        prompt(*given, out, layout, key_heads=key_heads, fused=fused)
        close(out, laid_out(expected_of(*wide), layout))


def test_output_in_another_layout(rng):
    given, wide = operands(rng, "BNSD", "float16")
    out = room((B, S, N, D), "float16")
    prompt(*given, out, "BNSD_BSND")
    close(out, laid_out(expected_of(*wide), "BSND"))


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.bool_])
@pytest.mark.parametrize("shape", [(S, S), (B, S, S), (1, S, S), (B, 1, S, S), (1, 1, S, S)])
def test_masks_and_shifts(shape, kind, rng):
    given, wide = operands(rng, "BNSD", "float16")
    hidden = rng.random(shape) < 0.4
    hidden[..., 0] = False
    shift = drawn(rng, (1, N, S, S), "float16")
    out = room((B, N, S, D), "float16")
    prompt(*given, out, "BNSD", shift, Tensor(hidden.astype(kind)), mode=1)
    close(out, expected_of(*wide, hidden[:, None] if len(shape) == 3 else hidden, shift.wide))


@pytest.mark.parametrize("mode", [0, 3])
def test_sequences_that_end_earlier(mode, rng):
    """Queries beyond the end give 0; keys beyond it are not seen, and the triangle ends at the end."""
    given, wide = operands(rng, "BSND", "float16")
    triangle = Tensor(np.triu(np.ones((2048, 2048), np.uint8), 1))
    lengths = (4, 6), (5, 3)
    out = room((B, S, N, D), "float16")
    prompt(*given, out, "BSND", mask=triangle if mode else None, lengths=lengths, mode=mode, precise=2)
    for image, (queries, keys) in enumerate(zip(*lengths)):
        q, k, v = (tensor[image : image + 1, :, :length] for tensor, length in zip(wide, (queries, keys, keys)))
        hidden = diagonal(queries, keys, keys - queries, FAR, 0) if mode else np.zeros((queries, keys), bool)
        expected = np.where(hidden.all(-1)[:, None], 0, expected_of(q, k, v, hidden))[0]
        found = out.wide[image].swapaxes(0, 1)
        np.testing.assert_allclose(found[:, :queries], expected, rtol=1e-3, atol=1e-5)
        assert (found[:, queries:] == 0).all()


def test_what_cann_refuses(rng):
    given, _ = operands(rng, "BNSD", "float16")
    out = room((B, N, S, D), "float16")

    def refused(match, given=given, layout="BNSD", **rules):
        with pytest.raises(Refused, match=match):
            prompt(*given, out, layout, **rules)

    refused("inputLayout is SBH", [drawn(rng, (S, B, N * D), "float16")] * 3, "SBH")
    refused("query, key or value is float32", [drawn(rng, (B, N, S, D), "float32")] * 3)
    refused("CANN takes 1 to 512", [drawn(rng, (B, N, S, 528), "float16")] * 3)
    refused("a batch of 129; CANN takes 128 with heads of 8", [drawn(rng, (129, N, 1, 8), "float16")] * 3)
    refused("numKeyValueHeads is 2", key_heads=2)
    refused("actualSeqLengths has 7", lengths=((7,), None))
    refused(
        "3 numbers in actualSeqLengthsKv|numbers in",
        [drawn(rng, (4, N, S, D), "float16")] * 3,
        lengths=(None, (1, 2, 3)),
    )
    refused("sparseMode is 5; CANN takes 0 to 4", mode=5)
