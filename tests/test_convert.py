"""The translator: every pair of formats gives the same bits back, changes are recorded, mistakes end in one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDEN, Case, official_checkpoint, relative_error
from mindspore import Tensor
from safetensors.numpy import load_file

from mindsigma import MindSigmaError, PixArtSigmaPipeline, command_line, load_dit
from mindsigma.weights import open_checkpoint
from mindsigma.weights.formats.safetensors_writer import write_safetensors
from mindsigma.weights.formats.tensor_stream import TensorSpec
from mindsigma.weights.locate import BUNDLED

MINI = BUNDLED / "sigma-mini"
TOOL = Path(__file__).parents[1] / "tools" / "convert.py"
PEAK = Path(__file__).with_name("convert_peak.py")
DTYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}


def contents(path):
    """dict name -> (dtype, shape, bytes) of a checkpoint."""
    source = open_checkpoint(path)
    return {
        name: (str(source.dtype(name)), source.shape(name), np.ascontiguousarray(source.read(name)).tobytes())
        for name in source.names()
    }


# Variants of the DiT, as the official code saves them, and what their files do not tell.
VARIANTS = {
    "plain": (None, {}),
    "kv": ("ms_kv_conv", {"num_heads": 2}),
    "qk norm and kv": ("ms_qk_norm", {"num_heads": 2}),
    "micro": ("ms_micro", {"num_heads": 2}),
}


def official(variant, dtype, folder):
    """An official checkpoint of a variant in a dtype, written by this project's safetensors writer; path and flags."""
    name, config = VARIANTS[variant]
    source = open_checkpoint(GOLDEN / f"{name}.pth" if name else official_checkpoint())
    kind = np.dtype(DTYPES[dtype])
    if variant == "plain":
        read = {n: source.read(n).astype(kind) for n in source.names() if n != "pos_embed"}
    else:
        read = {n: source.read(n).astype(kind) for n in source.names()}
    file = folder / "official.safetensors"
    write_safetensors(file, [TensorSpec(n, kind, tuple(a.shape)) for n, a in read.items()], read.__getitem__)
    flags = [f"--num-heads={config['num_heads']}"] if config else ["--input-size=32"]
    return file, flags


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("way", ["folder", "safetensors", "ckpt", "pth", "diffusers"])
def test_there_and_back_is_bit_identical(convert, tmp_path, way, variant, dtype):
    """official -> `way` -> official: every tensor has the same bits, except a position embedding made anew."""
    file, flags = official(variant, dtype, tmp_path)
    to = {"pth": "official", "diffusers": "diffusers"}.get(way, "mindspore")
    suffix = {"safetensors": ".safetensors", "ckpt": ".ckpt", "pth": ".pth"}.get(way, "")
    middle, back = tmp_path / f"middle{suffix}", tmp_path / "back.pth"
    if way == "diffusers" and variant.endswith("kv"):
        with pytest.raises(MindSigmaError, match="cannot hold tensor .*attn.sr"):
            convert(file, middle, "--to", to, *flags)
        return
    convert(file, middle, "--to", to, "--verify", *flags)
    own = way in ("folder", "safetensors", "ckpt")  # keeps the config
    convert(middle, back, "--to", "official", "--verify", *([] if own else flags))
    before, after = contents(file), contents(back)
    if way == "diffusers":
        assert before.pop("y_embedder.y_embedding")  # a diffusers pipeline computes it
    if variant == "plain":
        after.pop("pos_embed")  # sigma-mini's official file holds zeros there
    assert before == after


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_pipelines(convert, tmp_path, dtype, mini):
    """bundled -> diffusers -> ours: T5, VAE and tokenizer too; the result draws."""
    convert("sigma-mini", tmp_path / "diffusers", "--to", "diffusers", "--dtype", dtype, "--verify")
    convert(tmp_path / "diffusers", tmp_path / "ours", "--to", "mindspore", "--verify")
    for part in ("dit", "vae", "text_encoder"):
        expected = {
            n: a.astype(DTYPES[dtype]).tobytes() for n, a in load_file(MINI / part / "model.safetensors").items()
        }
        assert {n: data for n, (_, _, data) in contents(tmp_path / "ours" / part).items()} == expected
    pipeline = PixArtSigmaPipeline.from_pretrained(tmp_path / "ours")
    assert pipeline.dit.config == mini.dit.config and pipeline.vae.config == mini.vae.config
    if dtype == "fp32":
        arguments = {"seed": 1, "num_inference_steps": 2, "progress": False, "output_type": "np"}
        assert (pipeline("a cat", **arguments).images == mini("a cat", **arguments).images).all()


def test_shards_and_header(convert, tmp_path):
    convert(
        "sigma-mini", tmp_path / "t5", "--to", "mindspore", "--component", "t5", "--shard-size", "0.002", "--verify"
    )
    files = sorted(file.name for file in (tmp_path / "t5").iterdir())
    assert len(files) > 3 and "model.safetensors.index.json" in files and "config.json" in files
    metadata = open_checkpoint(tmp_path / "t5").metadata
    assert metadata["format"] == "mindsigma" and metadata["source"] == "text_encoder" and metadata["kind"] == "t5"
    assert json.loads(metadata["config"])["d_model"] == 256 and len(metadata["fingerprint"]) == 64


def test_compression_added_to_a_plain_model(convert, tmp_path):
    """Conv Avg Init: the convolution starts as the mean of its cell, and the record says what was done."""
    convert("sigma-mini", tmp_path / "kv", "--to", "mindspore", "--component", "dit", "--kv-compression", "conv:2:4-7")
    dit = load_dit(tmp_path / "kv")
    assert dit.config.kv_compression.layers == (4, 5, 6, 7)
    weights = {parameter.name: parameter.asnumpy() for parameter in dit.get_parameters()}
    assert (weights["blocks.5.attn.sr.weight"] == 0.25).all() and (weights["blocks.5.attn.norm.weight"] == 1).all()
    record = json.loads(open_checkpoint(tmp_path / "kv").metadata["record"])
    assert record == ["kv_compression conv:2:4-7, average init"]
    plain = load_dit("sigma-mini")
    for parameter in plain.get_parameters():
        assert (weights[parameter.name] == parameter.asnumpy()).all()
    with pytest.raises(MindSigmaError, match="compresses keys already"):
        convert(tmp_path / "kv", tmp_path / "no", "--to", "mindspore", "--kv-compression", "conv:2:1")
    with pytest.raises(MindSigmaError, match="--drop-unsupported"):
        convert(tmp_path / "kv", tmp_path / "no", "--to", "diffusers")
    convert(tmp_path / "kv", tmp_path / "dropped", "--to", "diffusers", "--drop-unsupported", "--verify")
    for a, b in zip(load_dit(tmp_path / "dropped").get_parameters(), plain.get_parameters()):
        assert (a.asnumpy() == b.asnumpy()).all()


def test_resolution_grown(convert, tmp_path):
    convert("sigma-mini", tmp_path / "512", "--to", "mindspore", "--component", "dit", "--grow-to", 512)
    config = load_dit(tmp_path / "512").config
    assert (config.input_size, config.pe_interpolation) == (64, 1.0)  # the grid spans the same range as before


def test_vae_scaling_factor(convert, tmp_path):
    convert("sigma-mini", tmp_path / "vae", "--to", "mindspore", "--component", "vae", "--vae-scaling-factor", 0.5)
    assert json.loads((tmp_path / "vae" / "config.json").read_text())["scaling_factor"] == 0.5
    with pytest.raises(MindSigmaError, match="--vae-scaling-factor is about a vae"):
        convert(MINI / "dit", tmp_path / "x", "--to", "mindspore", "--vae-scaling-factor", 0.5)


def test_null_caption_from_t5(convert, tmp_path):
    """T5 of the empty prompt, as the stored official checkpoint holds it, also at another length."""
    flags = ("--to", "official", "--component", "dit", "--null-caption", "sigma-mini")
    convert("sigma-mini", tmp_path / "a.pth", *flags)
    stored = open_checkpoint(official_checkpoint()).read("y_embedder.y_embedding")
    made = open_checkpoint(tmp_path / "a.pth").read("y_embedder.y_embedding")
    assert made.shape == stored.shape and relative_error(made, stored) < 1e-3  # both in fp16
    convert("sigma-mini", tmp_path / "b.pth", *flags, "--caption-length", 120)
    assert load_dit(tmp_path / "b.pth").config.model_max_length == 120


def test_merge(convert, tmp_path):
    grown = tmp_path / "other"
    convert("sigma-mini", grown, "--to", "mindspore", "--component", "dit", "--dtype", "fp32")
    tensors = load_file(grown / "model.safetensors")
    other = {name: value + 1 for name, value in tensors.items()}
    write_safetensors(
        grown / "model.safetensors",
        [TensorSpec(n, np.dtype(np.float32), a.shape) for n, a in other.items()],
        other.__getitem__,
    )
    flags = ("--to", "mindspore", "--component", "dit", "--dtype", "fp32", "--merge", grown, "--merge-weight", 0.25)
    convert("sigma-mini", tmp_path / "mixed", *flags)
    for name, value in load_file(tmp_path / "mixed" / "model.safetensors").items():
        assert np.allclose(value, tensors[name] + 0.25, atol=2e-3)  # the first is in fp16
    with pytest.raises(MindSigmaError, match="merge-weight"):
        convert("sigma-mini", tmp_path / "no", *flags[:-1], 2)


def test_overwriting_takes_what_has_changed(convert, tmp_path):
    """The shards of a merge are not taken for finished when the network that was mixed in is another one now."""
    shutil.copytree(MINI / "dit", tmp_path / "other")
    flags = ("--to", "mindspore", "--component", "dit", "--merge", tmp_path / "other", "--merge-weight", 1)
    convert("sigma-mini", tmp_path / "mixed", *flags)
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    specs = [TensorSpec(name, array.dtype, array.shape) for name, array in tensors.items()]
    write_safetensors(tmp_path / "other" / "model.safetensors", specs, lambda name: tensors[name] * 0)
    convert("sigma-mini", tmp_path / "mixed", *flags, "--overwrite")
    assert not any(array.any() for array in load_file(tmp_path / "mixed" / "model.safetensors").values())


def test_golden_survives_the_journey(convert, tmp_path):
    """A compressed, q-k-normed official network through our folder and back computes what it did."""
    case = Case("ms_qk_norm")
    convert(GOLDEN / "ms_qk_norm.pth", tmp_path / "ours", "--to", "mindspore", "--num-heads", 2)
    convert(tmp_path / "ours", tmp_path / "back.pth", "--to", "official")
    for path, flags in ((tmp_path / "ours", {}), (tmp_path / "back.pth", {"num_heads": 2})):
        assert relative_error(load_dit(path, **flags)(*case.inputs()).asnumpy(), case.out) < 3e-5


def test_dry_run_writes_nothing(convert, tmp_path, capsys):
    convert("sigma-mini", tmp_path / "x", "--to", "diffusers", "--dry-run")
    printed = capsys.readouterr().out
    assert "mapped   135 tensors to 183 names" in printed and "nothing written" in printed
    assert list(tmp_path.iterdir()) == []


def test_verify_notices_a_changed_bit(tmp_path):
    from mindsigma.conversion.component import open_component
    from mindsigma.conversion.targets import prepare
    from mindsigma.conversion.writing import verify, write

    output = prepare(open_component(MINI / "vae", "vae"), "mindspore")
    write([output], tmp_path / "vae", "mindspore")
    assert verify(output, tmp_path / "vae") == 184
    file = tmp_path / "vae" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(MindSigmaError, match="differs from the source"):
        verify(output, tmp_path / "vae")


def test_overflow_to_fp16_is_refused(convert, tmp_path):
    shutil.copytree(MINI / "vae", tmp_path / "vae")
    tensors = {name: value.astype(np.float32) for name, value in load_file(MINI / "vae" / "model.safetensors").items()}
    tensors["decoder.conv_in.bias"] = tensors["decoder.conv_in.bias"] + 1e6
    write_safetensors(
        tmp_path / "vae" / "model.safetensors",
        [TensorSpec(n, np.dtype(np.float32), a.shape) for n, a in tensors.items()],
        tensors.__getitem__,
    )
    with pytest.raises(MindSigmaError, match="'decoder.conv_in.bias' has values beyond float16"):
        convert(tmp_path / "vae", tmp_path / "out", "--to", "mindspore", "--dtype", "fp16")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    convert(tmp_path / "vae", tmp_path / "bf16", "--to", "mindspore", "--dtype", "bf16")


WRONG = {
    "same target": (("sigma-mini", MINI, "--to", "mindspore"), "is the source"),
    "target in source": (("sigma-mini", MINI / "dit" / "x", "--to", "mindspore"), "is the source"),
    "no source": (("absent", "x", "--to", "mindspore"), "no such file"),
    "several into one file": (("sigma-mini", "x.ckpt", "--to", "mindspore"), "one file holds one network"),
    "official VAE": ((MINI / "vae", "x.pth", "--to", "official"), "use --to diffusers"),
    "official folder": ((MINI / "dit", "x", "--to", "official"), "writes .pth"),
    "no such part": ((MINI / "vae", "x", "--to", "mindspore", "--component", "dit"), "holds no dit"),
    "bad compression": ((MINI / "dit", "x", "--to", "mindspore", "--kv-compression", "conv"), "conv:2:14-27"),
    "bad growth": ((MINI / "dit", "x", "--to", "mindspore", "--grow-to", "500"), "multiple of 64"),
    "bad shards": ((MINI / "dit", "x", "--to", "mindspore", "--shard-size", "0"), "--shard-size"),
    "unknown heads": ((GOLDEN / "ms_kv_conv.pth", "x", "--to", "mindspore"), "num_heads"),
    "target exists": ((MINI / "dit", "exists", "--to", "mindspore"), "is not empty"),
    "file exists": ((MINI / "dit", "exists/a.ckpt", "--to", "mindspore"), "exists; give another"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_end_in_one_line(convert_tool, case, monkeypatch, tmp_path, capsys):
    arguments, words = WRONG[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exists").mkdir()
    (tmp_path / "exists" / "a.ckpt").write_text("good")
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        command_line.run(convert_tool.main)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert caught.value.code == 2 and len(errors) == 1 and words in errors[0]
    assert (tmp_path / "exists" / "a.ckpt").read_text() == "good"
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["a.ckpt", "exists"]


def big_checkpoint(folder):
    """A DiT-less T5 of 0.2 GB in a sparse file, so that a conversion lasts long enough to be killed."""
    config = {"vocab_size": 1000, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 16, "num_heads": 8}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, "feed_forward_proj": "gated-gelu"}))
    from mindspore.nn.utils import no_init_parameters

    from mindsigma.models.t5 import T5Config, T5Encoder

    with no_init_parameters():
        shapes = {p.name: tuple(p.shape) for p in T5Encoder(T5Config(**config)).get_parameters()}
    rng = np.random.default_rng(0)
    specs = [TensorSpec(name, np.dtype(np.float32), shape) for name, shape in shapes.items()]
    write_safetensors(folder / "model.safetensors", specs, lambda name: rng.random(shapes[name], np.float32))
    return folder


def test_killed_conversions_are_resumed(tmp_path):
    """SIGKILL at several instants: never a broken target, and the last run's result is that of an undisturbed one."""
    source = big_checkpoint(tmp_path / "t5")
    target = tmp_path / "out"
    command = [sys.executable, str(TOOL), str(source), str(target), "--to", "mindspore", "--shard-size", "0.02"]
    survived = 0
    for delay in (0.0, 0.05, 0.1, 0.2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not target.exists():
            time.sleep(0.005)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        survived += process.wait() == 0
        if (target / "model.safetensors.index.json").exists():
            assert contents(target).keys() == contents(source).keys()
        for shard in target.glob("model-*.safetensors"):
            load_file(shard)  # whole, under its final name
    done = subprocess.run(command + (["--overwrite"] if survived else []), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(target) == contents(source)
    assert not (target / ".converting").exists()


def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """Peak memory of a translation with a cast is far below the checkpoint's size plus the libraries."""
    source = big_checkpoint(tmp_path / "t5")
    peaks = []
    for path in (MINI / "text_encoder", source):
        out = tmp_path / f"out{len(peaks)}"
        command = [sys.executable, str(PEAK), str(path), str(out), "--to", "mindspore", "--dtype", "bf16"]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(TOOL.parents[1])}
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.splitlines()[-1]) * 1024)
    size = (source / "model.safetensors").stat().st_size
    assert size > 2e8 and peaks[1] - peaks[0] < 0.35 * size


@pytest.mark.parametrize("dtype", DTYPES)
def test_pipeline_saved_in_every_dtype(tmp_path, mini, dtype):
    mini.save_pretrained(tmp_path / "mini", dtype)
    stored, bundled = open_checkpoint(tmp_path / "mini" / "vae"), open_checkpoint(MINI / "vae")
    for name in bundled.names():
        assert stored.dtype(name) == DTYPES[dtype]
        assert (np.array(stored.read(name)) == bundled.read(name).astype(DTYPES[dtype])).all()
    with pytest.raises(MindSigmaError, match="fp32, fp16, bf16"):
        mini.save_pretrained(tmp_path / "mini", "int8")


def test_tensors_train_on(convert, tmp_path):
    """What was converted can be loaded and written to without touching the file."""
    convert("sigma-mini", tmp_path / "dit", "--to", "mindspore", "--component", "dit")
    before = (tmp_path / "dit" / "model.safetensors").read_bytes()
    parameter = next(load_dit(tmp_path / "dit").get_parameters())
    parameter.set_data(Tensor(parameter.asnumpy() * 0))
    assert (tmp_path / "dit" / "model.safetensors").read_bytes() == before
