"""Networks on the CPU's kernels against the plain ones."""

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from conftest import relative_error
from mindspore import Parameter, ParameterTuple, Tensor, ops

from mindsigma.backends.cpu import accelerate, is_accelerated, kernels
from mindsigma.backends.cpu.library import library
from mindsigma.models.dit import DiT, DiTConfig, KVCompression
from mindsigma.models.linear import LowRank
from mindsigma.models.t5 import T5Config, T5Encoder, T5Layer
from mindsigma.models.vae import VAE
from mindsigma.models.vae_config import VAEConfig

LIMIT = 2e-6

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler, or MINDSIGMA_NATIVE=0")


def drawn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def filled(network):
    for i, parameter in enumerate(network.get_parameters()):
        parameter.set_data(Tensor(drawn(i, *parameter.shape) * np.float32(max(parameter.shape[-1], 8) ** -0.5)))
    return network


def dits(low_rank=False, **changes):
    """A plain DiT and an accelerated one of the same weights."""
    both = []
    for _ in range(2):
        config = {"input_size": 16, "hidden_size": 96, "depth": 2, "num_heads": 3, "caption_channels": 32, **changes}
        dit = filled(DiT(DiTConfig(**config)))
        if low_rank:
            for linear, index, count in ((dit.blocks[0].attn.qkv, 1, 3), (dit.blocks[1].mlp.fc1, 0, 1)):
                rows, inner = linear.weight.shape[0] // count, linear.weight.shape[1]
                shapes = ((4, inner), (rows, 4), (rows,))
                tensors = [Parameter(Tensor(drawn(i, *shape)), name=f"{rows}.{i}") for i, shape in enumerate(shapes)]
                linear.change([LowRank(*tensors, index, count, 0.3)])
        both.append(dit)
    fast = accelerate(both[1])
    assert is_accelerated(fast) and not is_accelerated(both[0])
    names = [[parameter.name for parameter in dit.get_parameters()] for dit in both]
    assert names[0] == names[1]
    return both[0], fast


IMAGES, TOKENS = 4, 9
MASK = np.ones((IMAGES, TOKENS), np.int32)
MASK[:2, 1:] = 0  # who attends to one token, attends to several, to all
MASK[3, 4:] = 0
KINDS = {
    "plain": {},
    "low rank": {"low_rank": True},
    "q/k norm": {"qk_norm": True},
    "conv": {"kv_compression": KVCompression("conv", 2, (1,))},
    "pool and q/k norm": {"qk_norm": True, "kv_compression": KVCompression("pool", 2, (1,))},
    "uniform": {"kv_compression": KVCompression("uniform", 3, (0, 1))},
    "uniform_every": {"qk_norm": True, "kv_compression": KVCompression("uniform_every", 2, (0,))},
}


def inputs():
    return Tensor(drawn(1, IMAGES, 4, 16, 16)), Tensor(drawn(2, IMAGES, TOKENS, 32))


@pytest.mark.parametrize("kind", KINDS)
def test_a_dit_in_sampling(kind):
    latents, caption = inputs()
    results = []
    for dit in dits(**KINDS[kind]):
        dit.set_train(False)
        for mask in (None, Tensor(MASK)):
            text_kv, position = dit.text_kv(caption, mask), dit.position(latents.shape)
            for timesteps in ([300.0], [3.0, 50.0, 700.0, 999.0]):
                modulation = ops.concat(dit.modulations(Tensor(np.array(timesteps, np.float32))), 1)
                results.append(dit.denoise(latents, modulation, text_kv, position).asnumpy())
    for found, expected in zip(results[4:], results[:4]):
        assert relative_error(found, expected) < LIMIT


def gradients(dit, latents, caption):
    parameters = ParameterTuple(dit.trainable_params())
    timestep, weights = Tensor(np.array([3.0, 50.0, 700.0, 999.0], np.float32)), Tensor(drawn(5, IMAGES, 8, 16, 16))

    def scalar(latents, caption):
        return (dit(latents, timestep, caption, Tensor(MASK)) * weights).sum()

    _, (of_inputs, of_parameters) = ms.value_and_grad(scalar, (0, 1), parameters)(latents, caption)
    return [value.asnumpy() for value in (*of_inputs, *of_parameters)]


@pytest.mark.parametrize("kind", ["plain", "low rank", "conv", "uniform_every"])
def test_a_dit_in_training(kind):
    plain, fast = (dit.set_train() for dit in dits(**KINDS[kind]))
    expected = gradients(plain, *inputs())
    size = max(np.linalg.norm(value) for value in expected)
    for again in (False, True):
        for block in fast.blocks if again else ():
            block.recompute()
        for value, exact in zip(gradients(fast, *inputs()), expected):
            # Gradients that are 0 but for rounding, as that of the bias of keys, have no digits of their own.
            assert np.linalg.norm(value - exact) < 5e-6 * max(np.linalg.norm(exact), 1e-2 * size)


@pytest.mark.parametrize("kind", ["plain", "conv"])
def test_frozen_blocks_hand_on_the_same_gradients(kind, monkeypatch):
    """To what lies before them; those of their weights are not computed."""
    plain, fast = (dit.set_train() for dit in dits(**KINDS[kind]))
    for dit in (plain, fast):
        for parameter in dit.blocks.get_parameters():
            parameter.requires_grad = False
    calls, backward = [], kernels.block_backward
    monkeypatch.setattr(kernels, "block_backward", lambda *given: calls.append(given[3]) or backward(*given))
    expected = gradients(plain, *inputs())
    size = max(np.linalg.norm(value) for value in expected)
    for value, exact in zip(gradients(fast, *inputs()), expected):
        assert np.linalg.norm(value - exact) < 5e-6 * max(np.linalg.norm(exact), 1e-2 * size)
    assert calls == [True, True]


def test_what_cross_attention_adds_is_given_and_taken():
    latents, caption = inputs()
    x, gathered = Tensor(drawn(3, IMAGES, 64, 96)), []
    modulation = Tensor(drawn(4, 1, 6, 96))
    results = []

    def gather(k, v):
        gathered.append(k.shape)
        return ops.concat((k, k[:, :3]), 1), ops.concat((v, v[:, :3]), 1)

    for dit in dits():
        block = dit.set_train(False).blocks[0]
        text_kv = block.text_kv(dit.y_embedder(caption), Tensor(MASK))
        out, change = block(x, modulation, *text_kv, 8, 8, gather)
        again, taken = block(x, modulation, *text_kv, 8, 8, gather, change * 2.0)
        assert (taken.asnumpy() == change.asnumpy() * 2).all()
        halves = [tuple(part[first : first + 2] for part in text_kv) for first in (0, 2)]
        parts = [block(x[2 * i : 2 * i + 2], modulation, *halves[i], 8, 8)[0].asnumpy() for i in range(2)]
        whole = block(x, modulation, *text_kv, 8, 8)[0].asnumpy()
        assert relative_error(np.concatenate(parts), whole) < 1e-6
        results.append([value.asnumpy() for value in (out, change, again)])
    assert gathered[-1] == (IMAGES, 64, 96)
    for found, expected in zip(*results):
        assert relative_error(found, expected) < LIMIT


def test_halves_of_guidance_are_those_of_one():
    """Before they saw their captions they are the same; each is what it is alone.

    To the bit, but for processors without AVX-512, where the library sums a product of another height in another order.
    """
    _, dit = dits(depth=3)
    dit.set_train(False)
    latents, caption = drawn(0, 2, 4, 16, 16), Tensor(drawn(1, 4, 9, 32))
    modulation = ops.concat(dit.modulations(Tensor([300.0])), 1)
    text_kv, position = dit.text_kv(caption), dit.position((4, 4, 16, 16))
    both = dit.denoise(Tensor(np.concatenate([latents, latents])), modulation, text_kv, position).asnumpy()
    for half in (slice(0, 2), slice(2, 4)):
        of_half = tuple((k[half], v[half]) for k, v in text_kv)
        alone = dit.denoise(Tensor(latents), modulation, of_half, position).asnumpy()
        assert relative_error(alone, both[half]) < 1e-6
        if "avx512f" in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
            assert (alone == both[half]).all()
    assert relative_error(both[:2], both[2:]) > 1e-3


def test_weights_may_change():
    latents, caption = inputs()
    timestep = Tensor(np.full(IMAGES, 5.0, np.float32))
    plain, fast = (dit.set_train(False) for dit in dits())
    fast(latents, timestep, caption)
    for dit in (plain, fast):
        weight = dit.blocks[0].mlp.fc1.weight
        weight.set_data(weight * 2.0)
        ops.assign_add(dit.blocks[1].attn.qkv.weight, ops.ones_like(dit.blocks[1].attn.qkv.weight))
    found, expected = (dit(latents, timestep, caption).asnumpy() for dit in (fast, plain))
    assert relative_error(found, expected) < LIMIT


def test_t5():
    config = T5Config(vocab_size=100, d_model=48, d_kv=16, d_ff=80, num_layers=3, num_heads=4)
    plain, fast = (filled(T5Encoder(config)).set_train(False) for _ in range(2))
    assert is_accelerated(accelerate(fast)) and is_accelerated(accelerate(T5Layer(config, ms.float32, False)))
    assert not is_accelerated(accelerate(T5Encoder(config, ms.bfloat16)))
    ids, mask = Tensor(np.arange(22, dtype=np.int32).reshape(2, 11)), np.ones((2, 11), np.int32)
    mask[1, 5:] = 0
    found, expected = (network(ids, Tensor(mask)).asnumpy() for network in (fast, plain))
    assert relative_error(found, expected) < LIMIT


def test_vae():
    config = VAEConfig(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, shift_factor=0.3)
    plain, fast = (filled(VAE(config)).set_train(False) for _ in range(2))
    assert is_accelerated(accelerate(fast))
    latents, images = Tensor(drawn(0, 2, 4, 40, 34)), Tensor(drawn(1, 1, 3, 64, 96))
    assert relative_error(fast(latents).asnumpy(), plain(latents).asnumpy()) < LIMIT
    assert relative_error(fast.encode(images).asnumpy(), plain.encode(images).asnumpy()) < LIMIT


def test_graph_mode_and_half_precision_stay_plain(monkeypatch):
    assert not is_accelerated(
        accelerate(DiT(DiTConfig(input_size=8, hidden_size=32, depth=1, num_heads=2), ms.float16))
    )
    monkeypatch.setattr(ms, "get_context", {"mode": ms.GRAPH_MODE, "device_target": "CPU"}.get)
    assert not is_accelerated(accelerate(DiT(DiTConfig(input_size=8, hidden_size=32, depth=1, num_heads=2))))
