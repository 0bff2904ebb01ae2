"""float8 weights: numbers wherever they are read, converted by --dtype, multiplied by scales; other forms refused."""

import json
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hostile.encoding import Call, Name, Ref, write_zip
from hostile.sources import BARE, DIT, drawn, foreign

from mindsigma import MindSigmaError, load_dit
from mindsigma.weights import open_checkpoint
from mindsigma.weights.formats.safetensors_writer import write_safetensors
from mindsigma.weights.formats.tensor_stream import TensorSpec
from mindsigma.weights.names.dit_names import DIFFUSERS

E4M3, E5M2, BF16 = (np.dtype(getattr(ml_dtypes, name)) for name in ("float8_e4m3fn", "float8_e5m2", "bfloat16"))
FLAGS = ("--input-size=8", "--pe-interpolation=0.125", *BARE)
DTYPES = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": BF16}


def put(path, arrays, metadata=None):
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    write_safetensors(path, [TensorSpec(n, a.dtype, a.shape) for n, a in arrays.items()], arrays.__getitem__, metadata)
    return path


def in_float8(kind=E4M3):
    """A DiT under our names, its matrices in float8, the rest in fp16."""
    arrays = drawn("dit", DIT)
    return {name: array.astype(kind if array.ndim > 1 else np.float16) for name, array in arrays.items()}


def scaled(arrays, scale="scale_weight", shape=()):
    """The same as scaled float8: (tensors, what they stand for in float32)."""
    result, values = {}, {}
    for i, (name, array) in enumerate(arrays.items()):
        result[name], values[name] = array, array.astype(np.float32)
        if name.endswith(".weight") and array.dtype in (E4M3, E5M2):
            factor = np.full(shape, 0.25 * (i + 1), np.float32)
            result[name[: -len("weight")] + scale] = factor
            values[name] = array.astype(np.float32) * factor.reshape(-1)[0]
    return result, values


def read(path):
    source = open_checkpoint(path)
    return {name: source.read(name) for name in source.names()}


@pytest.mark.parametrize("kind", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", ["mindspore", "diffusers", "official"])
def test_dtype_converts_every_tensor(convert, tmp_path, kind, dtype, target):
    arrays = in_float8(kind)
    out = tmp_path / ("out.pth" if target == "official" else "out")
    file = put(tmp_path / "in.safetensors", arrays)
    convert(file, out, "--to", target, "--dtype", dtype, "--verify", *FLAGS)
    found = read(out)
    assert {array.dtype for array in found.values()} == {DTYPES[dtype]}
    expected = {name: array.astype(np.float32).astype(DTYPES[dtype]) for name, array in arrays.items()}
    for name, array in (foreign(expected, DIFFUSERS) if target == "diffusers" else expected).items():
        assert found[name].tobytes() == array.tobytes(), name


def test_float8_stays_where_nothing_else_is_asked_for(convert, tmp_path):
    arrays = in_float8()
    file = put(tmp_path / "in.safetensors", arrays)
    convert(file, tmp_path / "out", "--to", "mindspore", "--verify", *FLAGS)
    assert {name: array.dtype for name, array in read(tmp_path / "out").items()} == {
        name: array.dtype for name, array in arrays.items()
    }
    for place, to in (("x.ckpt", "mindspore"), ("x.pth", "official")):
        for more in (["--dry-run"], []):  # both refuse, in the same words
            with pytest.raises(MindSigmaError, match=r"float8_e4m3fn, which a .* file cannot hold.*--dtype"):
                convert(file, tmp_path / place, "--to", to, *FLAGS, *more)
        assert not (tmp_path / place).exists()


SCALES = {
    "ComfyUI": ("scale_weight", ()),
    "ComfyUI's of one item": ("scale_weight", (1,)),
    "ModelOpt": ("weight_scale", ()),
    "inverse by name only": ("weight_scale_inv", (1,)),
}


@pytest.mark.parametrize("case", SCALES)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_scaled_float8_is_multiplied(convert, tmp_path, capsys, case, prefix):
    arrays, values = scaled(in_float8(), *SCALES[case])
    arrays["x_embedder.proj.scale_input"] = np.ones((), np.float32)
    arrays["scaled_fp8"] = np.zeros(0, E4M3)
    arrays["t_block.1.comfy_quant"] = np.frombuffer(b'{"format": "float8_e4m3fn"}', np.uint8)
    if prefix:
        arrays = {prefix + name: array for name, array in arrays.items()}
    file = put(tmp_path / "in.safetensors", arrays) if not prefix else put_pth(tmp_path / "in.pth", arrays)
    convert(file, tmp_path / "out", "--to", "mindspore", "--dtype", "bf16", "--verify", *FLAGS)
    found = read(tmp_path / "out")
    assert found.keys() == values.keys()
    for name, array in values.items():
        assert found[name].tobytes() == array.astype(BF16).tobytes(), name
    told = capsys.readouterr().out
    assert "scaled float8" in told and "dropped  3: " in told
    dit = load_dit(file, "fp32", num_heads=1, input_size=8, pe_interpolation=0.125)
    for parameter in dit.get_parameters():
        assert (parameter.asnumpy() == values[parameter.name]).all(), parameter.name


def put_pth(path, arrays):
    """A file as torch.save writes it where it has no storage class for a dtype: bytes, and the dtype beside them."""
    storages, tensors = {}, {}
    names = {E4M3: "torch.float8_e4m3fn", E5M2: "torch.float8_e5m2"}
    kinds = {"float32": "torch.FloatStorage", "float16": "torch.HalfStorage", "uint8": "torch.ByteStorage"}
    for key, (name, array) in enumerate(arrays.items()):
        new = array.dtype in names
        kind = Name("torch.storage.UntypedStorage" if new else kinds[array.dtype.name])
        storage = Ref(("storage", kind, str(key), "cpu", array.nbytes if new else array.size))
        strides = tuple(step // array.itemsize for step in array.strides)
        view = (storage, 0, array.shape, strides, False, Call("collections.OrderedDict"))
        tensors[name] = (
            Call("torch._utils._rebuild_tensor_v3", *view, Name(names[array.dtype]))
            if new
            else Call("torch._utils._rebuild_tensor_v2", *view)
        )
        storages[str(key)] = array.tobytes()
    write_zip(path, tensors, storages)
    return path


def test_a_scale_for_each_row(tmp_path):
    weight = np.arange(12, dtype=np.float32).reshape(4, 3)
    rows = np.array([1, 2, 0.5, 4], np.float32)
    for shape in ((4,), (4, 1)):
        put(tmp_path / "a.safetensors", {"l.weight": weight.astype(E4M3), "l.weight_scale": rows.reshape(shape)})
        assert (open_checkpoint(tmp_path / "a.safetensors").read("l.weight") == weight * rows[:, None]).all()


def test_parts_of_a_layer_in_several_dtypes(convert, tmp_path):
    """q, k, v of one layer, one left in fp16 by the tool that made float8 of the others."""
    arrays = foreign(in_float8(), DIFFUSERS)
    name = "transformer_blocks.0.attn1.to_k.weight"
    arrays[name] = drawn("dit", DIT)["blocks.0.attn.qkv.weight"][72:144].astype(np.float16)
    file = put(tmp_path / "in.safetensors", arrays)
    convert(file, tmp_path / "out", "--to", "diffusers", "--dtype", "fp16", "--verify", *FLAGS)
    for name, array in read(tmp_path / "out").items():
        assert array.dtype == np.float16 and (array == arrays[name].astype(np.float16)).all()
    convert(file, tmp_path / "as it is", "--to", "mindspore", "--verify", *FLAGS)


@pytest.mark.parametrize("kind", [E4M3, E5M2], ids=str)
def test_networks_are_loaded_from_float8(tmp_path, kind):
    arrays = in_float8(kind)
    file = put(tmp_path / "in.safetensors", arrays)
    for dtype, numpy in (("fp32", np.float32), ("fp16", np.float16)):
        dit = load_dit(file, dtype, num_heads=1, input_size=8, pe_interpolation=0.125)
        for parameter in dit.get_parameters():
            assert (parameter.asnumpy() == arrays[parameter.name].astype(numpy)).all()


def test_merging_asks_for_a_dtype_that_holds_it(convert, tmp_path):
    arrays, mixed = in_float8(), drawn("dit", DIT)
    file, other = put(tmp_path / "in.safetensors", arrays), put(tmp_path / "other.safetensors", mixed)
    flags = ("--to", "mindspore", "--merge", other, "--merge-weight", 0.25, *FLAGS)
    with pytest.raises(MindSigmaError, match="--merge would be lost in float8 weights; give --dtype"):
        convert(file, tmp_path / "out", *flags)
    convert(file, tmp_path / "out", *flags, "--dtype", "fp16", "--verify")
    for name, array in read(tmp_path / "out").items():
        exact = arrays[name].astype(np.float64) * 0.75 + mixed[name].astype(np.float64) * 0.25
        assert (array == exact.astype(np.float16)).all()  # rounded once


def test_what_is_made_beside_float8_is_no_float8(convert, tmp_path):
    file = put(tmp_path / "in.safetensors", in_float8())
    convert(file, tmp_path / "kv", "--to", "mindspore", "--kv-compression", "conv:2:1", *FLAGS)
    assert read(tmp_path / "kv")["blocks.1.attn.sr.weight"].dtype == np.float32


def test_values_beyond_fp16_are_refused_by_a_dry_run_too(convert, tmp_path):
    arrays, _ = scaled(in_float8())
    arrays["t_block.1.scale_weight"] = np.float32(1e6)
    file = put(tmp_path / "in.safetensors", arrays)
    for more in (["--dry-run"], []):
        with pytest.raises(MindSigmaError, match="'t_block.1.weight' has values beyond float16"):
            convert(file, tmp_path / "out", "--to", "mindspore", "--dtype", "fp16", *FLAGS, *more)
    assert not (tmp_path / "out").exists()


def test_verify_compares_the_dtype(convert, tmp_path, monkeypatch):
    """A cast that passes a dtype over does not pass."""
    from mindsigma.weights.names import views

    file = put(tmp_path / "in.safetensors", in_float8())
    monkeypatch.setattr(views, "is_float", lambda dtype: dtype != E4M3)
    with pytest.raises(MindSigmaError, match="is float8_e4m3fn .* promised was float16"):
        convert(file, tmp_path / "out", "--to", "mindspore", "--dtype", "fp16", "--verify", *FLAGS)


W = "blocks.0.mlp.fc1"
FORMS = {
    "nf4": ({f"{W}.weight.quant_state.bitsandbytes__nf4": np.zeros(9, np.uint8)}, "bitsandbytes, 4 bits"),
    "nf4 by its maxima": ({f"{W}.weight.absmax": np.zeros(9, np.float32)}, "bitsandbytes, 4 bits"),
    "int8 of bitsandbytes": ({f"{W}.SCB": np.zeros(9, np.float32)}, "bitsandbytes, int8"),
    "int8 with scales": (
        {f"{W}.weight": np.zeros((288, 72), np.int8), f"{W}.weight_scale": np.ones((288, 1), np.float32)},
        "int8 with scales",
    ),
    "int8": ({f"{W}.weight": np.zeros((288, 72), np.int8)}, "int8 weights"),
    "packed": ({f"{W}.qweight": np.zeros((9, 72), np.int32)}, "packed integers"),
    "quanto": ({f"{W}.weight._data": np.zeros((9, 72), np.int8)}, "optimum-quanto"),
    "torchao": ({f"{W}._weight_qdata": np.zeros((9, 72), np.int8)}, "torchao"),
    "blocks": ({f"{W}.weight_scale_inv": np.ones((3, 1), np.float32)}, "scales of blocks"),
    "MXFP8": ({f"{W}.weight_scale": np.zeros((288, 3), np.uint8)}, "MXFP8"),
    "NVFP4": ({f"{W}.weight_scale_2": np.ones((), np.float32)}, "NVFP4"),
    "ComfyUI's other": (
        {f"{W}.comfy_quant": np.frombuffer(json.dumps({"format": "nvfp4"}).encode(), np.uint8)},
        "ComfyUI's nvfp4",
    ),
    "ComfyUI's damaged": ({f"{W}.comfy_quant": np.zeros(9, np.uint8)}, "ComfyUI's unreadable"),
    "two scales": ({f"{W}.weight_scale": np.float32(1), f"{W}.scale_weight": np.float32(1)}, "two scales"),
    "a scale that is none": ({f"{W}.weight_scale": np.float32(np.nan)}, "not finite"),
    "int32": ({f"{W}.bias": np.zeros(288, np.int32)}, "holds int32, not floating-point numbers"),
}


@pytest.mark.parametrize("case", FORMS)
def test_other_forms_are_refused_by_name(convert, tmp_path, case):
    more, words = FORMS[case]
    file = put(tmp_path / "in.safetensors", {**in_float8(), **more})
    for call in (
        lambda: convert(file, tmp_path / "out", "--to", "mindspore", "--dtype", "fp16", *FLAGS),
        lambda: load_dit(file, num_heads=1, input_size=8, pe_interpolation=0.125),
    ):
        with pytest.raises(MindSigmaError, match=words) as caught:
            call()
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_gguf_is_refused_by_name(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\0\0\0" + bytes(64))
    with pytest.raises(MindSigmaError, match="a GGUF file"):
        open_checkpoint(tmp_path / "x.gguf")


def test_float8_of_torch(tmp_path):
    arrays = {"a": np.arange(6).astype(E4M3).reshape(2, 3), "b": np.arange(4).astype(E5M2), "c": np.ones(2, np.float32)}
    found = read(put_pth(tmp_path / "x.pth", arrays))
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and found[name].tobytes() == array.tobytes()
    assert zipfile.ZipFile(tmp_path / "x.pth").testzip() is None


def test_adapters_in_float8_are_read(convert, tmp_path):
    name = "blocks.0.mlp.fc1"
    arrays = {f"{name}.lora_A.weight": np.ones((2, 72)), f"{name}.lora_B.weight": np.full((288, 2), 0.5)}
    put(tmp_path / "a.safetensors", {key: array.astype(E4M3) for key, array in arrays.items()})
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--to", "mindspore", "--verify")
    found = read(tmp_path / "b.safetensors")
    assert found[f"{name}.lora_A"].dtype == np.float16 and (found[f"{name}.lora_B"] == 0.5).all()
