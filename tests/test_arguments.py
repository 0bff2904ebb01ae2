"""What a caller of the API gets wrong: one line that names the argument, before any work; NaN is told where it is."""

import numpy as np
import pytest
from mindspore import Tensor

from mindsigma import PixArtSigmaPipeline, load_dit
from mindsigma.errors import MindSigmaError
from mindsigma.weights.adapters.adapter_file import Adapter, Entry, write_adapter
from mindsigma.weights.formats.finite import all_finite
from mindsigma.weights.formats.safetensors_file import read_safetensors
from mindsigma.weights.formats.safetensors_writer import write_safetensors
from mindsigma.weights.formats.tensor_stream import TensorSpec
from mindsigma.weights.locate import BUNDLED
from mindsigma.weights.text_memory import MEMORY

ml_dtypes = pytest.importorskip("ml_dtypes")


class Strange:
    """Neither an array nor anything else; its repr is a page."""

    def __repr__(self):
        return "a\n" * 10_000

    def __array__(self, *arguments, **keywords):
        raise ValueError("no array")


STRANGE = Strange()
EMBEDS = {"prompt": None, "prompt_embeds": np.ones((1, 4, 256), np.float32)}
WRONG = [
    ("prompt", None), ("prompt", 7), ("prompt", []), ("prompt", [None]), ("prompt", b"a cat"), ("prompt", STRANGE),
    ("prompt", "\ud800"), ("prompt", {"a": 1}), ("negative_prompt", 7), ("negative_prompt", [1]),
    ("num_inference_steps", "x"), ("num_inference_steps", 0), ("num_inference_steps", 2.0),
    ("num_inference_steps", None), ("num_inference_steps", True), ("num_inference_steps", 10**30),
    ("num_inference_steps", STRANGE),
    ("seed", 1.5), ("seed", "1"), ("seed", -1), ("seed", [0.5]), ("seed", True), ("seed", STRANGE),
    ("guidance_scale", float("nan")), ("guidance_scale", float("inf")), ("guidance_scale", "4"),
    ("guidance_scale", None), ("guidance_scale", True), ("guidance_scale", 10**400), ("guidance_scale", STRANGE),
    ("height", "256"), ("height", 256.0), ("height", True), ("height", -8), ("width", [256]), ("width", 10**9),
    ("num_images_per_prompt", "1"), ("num_images_per_prompt", 0), ("max_sequence_length", 1.5),
    ("max_sequence_length", "300"), ("solver_order", "2"), ("solver_order", True), ("solver_order", [2]),
    ("output_type", None), ("output_type", ["pil"]), ("output_type", "jpeg"), ("output_type", "x" * 10**5),
    ("use_resolution_binning", "false"), ("clean_caption", "no"), ("guidance_halves", 2), ("progress", "yes"),
    ("callback_on_step_end", 3), ("latents", "noise"), ("latents", [[1, "a"]]), ("latents", STRANGE),
    ("latents", np.full((1, 4, 32, 32), np.nan, np.float32)), ("latents", np.zeros((1, 4, 32, 32), complex)),
    ("guidance_interval", 3), ("guidance_interval", ("a", "b")), ("text_reuse", "1"), ("block_reuse", 1.0),
    ("sampler", None), ("sampler", ["dpm"]), ("sampler", STRANGE), ("eta", "1"), ("karras", "no"), ("spacing", 3),
    ("timesteps", 5), ("timesteps", STRANGE), ("timesteps", [[1]]), ("sigmas", "x" * 10**5), ("sigmas", [1e400, 0]),
    ("guided_channels", True), ("guidance_rescale", None), ("guidance_rescale", "0"), ("step_noise", 3),
]  # fmt: skip


@pytest.mark.parametrize("name,value", WRONG, ids=[f"{i}-{name}" for i, (name, _) in enumerate(WRONG)])
def test_wrong_arguments_of_a_call(mini, name, value):
    with pytest.raises(MindSigmaError) as caught:
        mini(**{"prompt": "a cat", "num_inference_steps": 1, name: value})
    message = str(caught.value)
    assert name in message
    assert message.isprintable()
    assert len(message) < 400


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt_mask": None},
        {"prompt_mask": "x"},
        {"prompt_mask": np.ones((1, 5))},
        {"prompt_mask": [[1, 1, 1, "a"]]},
        {"prompt_embeds": "x", "prompt_mask": np.ones((1, 4))},
        {"prompt_embeds": [[["a"]]], "prompt_mask": [[1]]},
        {"prompt_embeds": np.zeros((1, 0, 256)), "prompt_mask": np.zeros((1, 0))},
        {"prompt_embeds": np.full((1, 4, 256), np.inf), "prompt_mask": np.ones((1, 4))},
        {"prompt_embeds": Tensor(np.full((1, 4, 256), np.nan, np.float16)), "prompt_mask": np.ones((1, 4))},
    ],
)
def test_wrong_embeddings(mini, changes):
    with pytest.raises(MindSigmaError, match="prompt_embeds|prompt_mask"):
        mini(**{**EMBEDS, "num_inference_steps": 1, **changes})


@pytest.mark.parametrize(
    "name,value",
    [
        ("name_or_path", None), ("name_or_path", 3), ("name_or_path", b"sigma-mini"), ("name_or_path", ""),
        ("name_or_path", ["sigma-mini"]), ("name_or_path", "a\0b"), ("name_or_path", "x" * 5000),
        ("name_or_path", "~nobody-of-this-name/x"), ("dtype", 16), ("dtype", ["fp16"]), ("device", 0),
        ("device", ["CPU"]), ("components", 3), ("convention", None), ("lora", 3), ("lora", [3]),
        ("lora", [("a", "b")]), ("lora", [None]), ("lora", {"a": 1}), ("parallel", 3), ("text_encoder_memory", None),
        ("num_heads", "x"),
        ("num_heads", -1), ("input_size", "x"), ("base_size", "x"), ("pe_interpolation", "x"), ("kv_compression", 3),
        ("kv_compression", STRANGE), ("no_such_option", 1),
    ],
)  # fmt: skip
def test_wrong_arguments_of_opening(name, value):
    with pytest.raises(MindSigmaError) as caught:
        PixArtSigmaPipeline.from_pretrained(**{"name_or_path": "sigma-mini", name: value})
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1300


@pytest.mark.parametrize("changes", [{"path": None}, {"ema": "no"}, {"kernels": 3}, {"lora": 1.5}, {"dtype": b"fp32"}])
def test_wrong_arguments_of_load_dit(changes):
    with pytest.raises(MindSigmaError):
        load_dit(**{"path": "sigma-mini", **changes})


def test_other_methods(mini, tmp_path):
    for call in (
        lambda: mini.encode_prompts(None),
        lambda: mini.encode_prompts(["a"], "x"),
        lambda: mini.decode("x"),
        lambda: mini.decode(np.zeros((4, 8, 8))),
        lambda: mini.save_pretrained(None),
        lambda: mini.save_pretrained(tmp_path / "x", dtype=["fp16"]),
        lambda: mini.image_size("x"),
    ):
        with pytest.raises(MindSigmaError):
            call()


def test_numbers_of_numpy_are_numbers(mini):
    """A seed, steps or sides from an array are as good as Python's."""
    options = {"num_inference_steps": np.int64(1), "guidance_scale": np.float32(2), "output_type": "latent"}
    one = mini("a cat", seed=np.int32(3), height=np.int64(256), progress=False, **options)
    other = mini("a cat", seed=np.array([3]), width=256, progress=np.bool_(False), **options)
    np.testing.assert_array_equal(one.images, other.images)
    assert one.seeds == other.seeds == [3]


# NaN in latents


def nan_at(step, in_place=False):
    def callback(pipeline, index, timestep, values):
        if index != step:
            return None
        if in_place:
            values["latents"][0, 0, 0, 0] = float("inf")
            return {}
        return {"latents": values["latents"] * float("nan")}

    return callback


@pytest.mark.parametrize("step,in_place,progress", [(0, False, True), (1, True, False), (2, False, False)])
def test_nan_of_a_callback_is_told_with_its_step(mini, step, in_place, progress):
    options = {"num_inference_steps": 3, "seed": 0, "output_type": "np", "progress": progress}
    with pytest.raises(MindSigmaError, match=f"callback_on_step_end left NaN .* of step {step + 1} of 3 .*finite"):
        mini("a cat", callback_on_step_end=nan_at(step, in_place), **options)


@pytest.mark.parametrize("answer", [3, "latents", [1], {"latents": "x"}, {"latents": None}, {"latents": STRANGE}])
def test_wrong_answers_of_a_callback(mini, answer):
    with pytest.raises(MindSigmaError, match="callback_on_step_end"):
        mini("a cat", num_inference_steps=1, seed=0, callback_on_step_end=lambda *_: answer)


def test_nan_of_a_step_is_told_with_its_step(mini, monkeypatch):
    """As of weights or a guidance that overflow, and before the image is decoded."""
    from mindsigma.pipeline import pipeline

    steps = pipeline.denoising_steps

    def overflowing(*arguments, **keywords):
        for i, step in enumerate(steps(*arguments, **keywords)):
            if i == 2:
                step.latents = step.latents / 0
            yield step

    monkeypatch.setattr(pipeline, "denoising_steps", overflowing)
    monkeypatch.setattr(PixArtSigmaPipeline, "decode", None)
    for progress in (False, True):
        with pytest.raises(MindSigmaError, match=r"step 2 of 3 \(timestep .*\) left NaN .* guidance_scale"):
            mini("a cat", num_inference_steps=3, seed=0, progress=progress)


def test_nan_of_the_decoder(mini):
    with pytest.raises(MindSigmaError, match="the decoded images hold NaN"):
        mini.decode(np.full((1, 4, 8, 8), np.nan, np.float32))


# NaN in weights


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_all_finite(dtype):
    """Every place counts, in any layout, and the largest number is one."""
    values = np.ones((3, 100_001), np.float32).astype(dtype)
    largest = ml_dtypes.finfo(dtype).max
    assert all_finite(values)
    assert all_finite(np.full(5, largest, dtype))
    assert all_finite(np.full(5, -largest, dtype))
    assert all_finite(np.zeros((0, 3), dtype))
    for place in ((0, 0), (2, 100_000), (1, 7)):
        for wrong in (np.nan, np.inf, -np.inf):
            if dtype is ml_dtypes.float8_e4m3fn and not np.isnan(wrong):
                continue  # has no infinity
            other = values.copy()
            other[place] = wrong
            assert not all_finite(other)
            assert not all_finite(other.T)
    assert all_finite(np.arange(3))


def spoilt(source, target, value):
    """A copy of a network folder, one number of the last tensor another; the name of that tensor."""
    target.mkdir(parents=True)
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    file = next(source.glob("*.safetensors"))
    arrays = {name: np.array(array) for name, array in read_safetensors(file)[0].items()}
    name = next(name for name in reversed(list(arrays)) if arrays[name].ndim > 1 and "block" in name)
    if abs(value) < np.inf:
        arrays = {key: array.astype(np.float32) for key, array in arrays.items()}
    arrays[name].reshape(-1)[-1] = value
    specs = [TensorSpec(key, array.dtype, array.shape) for key, array in arrays.items()]
    write_safetensors(target / file.name, specs, arrays.__getitem__)
    return name


@pytest.mark.parametrize(
    "part,memory,value",
    [("dit", "whole", np.nan), ("vae", "whole", -np.inf), *(("text_encoder", memory, np.nan) for memory in MEMORY)],
)
def test_weights_that_are_no_numbers(tmp_path, part, memory, value):
    for other in ("dit", "vae", "text_encoder", "tokenizer"):
        if other != part:
            (tmp_path / other).symlink_to(BUNDLED / "sigma-mini" / other)
    name = spoilt(BUNDLED / "sigma-mini" / part, tmp_path / part, value)
    pipeline = PixArtSigmaPipeline.from_pretrained(tmp_path, text_encoder_memory=memory)
    with pytest.raises(MindSigmaError, match="is not finite .NaN or infinity.; copy") as caught:
        pipeline("a cat", num_inference_steps=1, seed=0, progress=False)
    assert str(tmp_path / part) in str(caught.value)
    assert f"'{name}'" in str(caught.value)


def test_weights_beyond_half_precision(tmp_path):
    name = spoilt(BUNDLED / "sigma-mini" / "dit", tmp_path / "dit", 1e6)
    load_dit(tmp_path / "dit", "fp32")
    with pytest.raises(MindSigmaError, match="goes beyond half precision .*use fp32") as caught:
        load_dit(tmp_path / "dit", "fp16")
    assert name in str(caught.value)


def test_adapter_of_no_numbers(tmp_path):
    hidden = load_dit("sigma-mini").config.hidden_size
    a, b = np.ones((2, hidden), np.float32), np.full((hidden, 2), np.nan, np.float32)
    write_adapter(tmp_path / "a.safetensors", Adapter({"blocks.0.attn.proj": Entry(a, b, 2.0, 1.0)}))
    with pytest.raises(MindSigmaError, match="a.safetensors: tensor 'blocks.0.attn.proj.lora_B' is not finite"):
        load_dit("sigma-mini", lora=[tmp_path / "a.safetensors"])
