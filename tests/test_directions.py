"""Every cell of the table in tools/README.md, with sigma-mini's weights: what from, what to, the same bits."""

import json
import shutil

import numpy as np
import pytest
from conftest import official_checkpoint
from safetensors.numpy import load_file, save_file
from test_loading import diffusers_dit, ldm_vae, old_diffusers_vae

from mindsigma import MindSigmaError
from mindsigma.weights import open_checkpoint
from mindsigma.weights.formats.mindspore_writer import write_mindspore_ckpt
from mindsigma.weights.formats.safetensors_shards import write_sharded_safetensors
from mindsigma.weights.formats.tensor_stream import TensorSpec
from mindsigma.weights.formats.torch_writer import write_torch
from mindsigma.weights.locate import BUNDLED
from mindsigma.weights.names.dit_names import NULL_CAPTION, map_dit
from mindsigma.weights.names.t5_names import map_t5
from mindsigma.weights.names.vae_names import map_vae

MINI = BUNDLED / "sigma-mini"
MAPS = {"dit": map_dit, "vae": map_vae, "t5": map_t5}
PARTS = {"dit": "dit", "vae": "vae", "t5": "text_encoder"}
TARGETS = {  # column of the table -> (--to, name of the target)
    "our folder": ("mindspore", "out"),
    "our .safetensors": ("mindspore", "out.safetensors"),
    "our .ckpt": ("mindspore", "out.ckpt"),
    "diffusers folder": ("diffusers", "out"),
    "official .pth": ("official", "out.pth"),
}


def specs_of(tensors):
    return [TensorSpec(name, array.dtype, array.shape) for name, array in tensors.items()]


def put(path, tensors, config=None):
    """Tensors as one file of the kind its name tells; with config.json beside it, if one is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    elif path.suffix == ".ckpt":
        write_mindspore_ckpt(path, specs_of(tensors), tensors.__getitem__)
    else:
        write_torch(path, specs_of(tensors), tensors.__getitem__, flat=path.suffix == ".bin")
    if config is not None:
        (path.parent / "config.json").write_text(json.dumps(config))
    return path


TRANSFORMER = {
    "_class_name": "PixArtTransformer2DModel",
    "num_attention_heads": 4,
    "sample_size": 32,
    "interpolation_scale": 0.5,
}


def shards(folder):
    tensors = diffusers_dit()
    stem = "diffusion_pytorch_model"
    write_sharded_safetensors(folder, stem, specs_of(tensors), tensors.__getitem__, None, 6_000_000)
    assert len(list(folder.glob(f"{stem}-*.safetensors"))) > 2
    (folder / "config.json").write_text(json.dumps(TRANSFORMER))
    return folder


def official(path):
    source = open_checkpoint(official_checkpoint())
    # Its position embedding holds zeros, which tell no scale.
    return put(path, {name: np.array(source.read(name)) for name in source.names() if name != "pos_embed"})


def own(kind):
    return load_file(MINI / PARTS[kind] / "model.safetensors")


def copied(path, kind):
    path.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(MINI / PARTS[kind] / file, path)
    return path


def own_ckpt(path):
    """As the translator writes it, with its config inside."""
    config = json.loads((MINI / "dit" / "config.json").read_text())
    tensors = own("dit")
    write_mindspore_ckpt(path, specs_of(tensors), tensors.__getitem__, {"config": json.dumps(config)})
    return path


FLAGS = ["--input-size=32"]
DIT_SOURCES = {  # row of the table -> (source made in a folder, flags)
    "official .pth": (lambda folder: official(folder / "dit.pth"), FLAGS),
    "official .safetensors": (lambda folder: official(folder / "dit.safetensors"), FLAGS),
    "diffusers file": (lambda folder: put(folder / "dit.safetensors", diffusers_dit()), FLAGS),
    "diffusers shards": (lambda folder: shards(folder / "transformer"), []),
    "diffusers .bin": (lambda folder: put(folder / "t" / "a.bin", diffusers_dit(), TRANSFORMER).parent, []),
    "our folder": (lambda folder: copied(folder / "dit", "dit"), []),
    "our .safetensors": (lambda folder: put(folder / "a.safetensors", own("dit")), FLAGS),
    "our .ckpt": (lambda folder: own_ckpt(folder / "a.ckpt"), []),
    "foreign .ckpt": (lambda folder: put(folder / "a.ckpt", own("dit")), FLAGS),
}
VAE_CONFIG = json.loads((MINI / "vae" / "config.json").read_text())
T5_CONFIG = json.loads((MINI / "text_encoder" / "config.json").read_text())


def whole_t5():
    """With a decoder and what is tied to the embedding."""
    tensors = own("t5")
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].copy()
    for name in ("layer.0.SelfAttention.q", "layer.1.EncDecAttention.v", "layer.2.DenseReluDense.wo"):
        tensors[f"decoder.block.0.{name}.weight"] = np.zeros((4, 4), np.float16)
    tensors["lm_head.weight"] = np.zeros((4, 4), np.float16)
    return tensors


OTHER_SOURCES = {
    "VAE, LDM": ("vae", lambda folder: put(folder / "vae.safetensors", ldm_vae(), VAE_CONFIG)),
    "VAE, whole LDM .pth": ("vae", lambda folder: put(folder / "a.pth", ldm_vae("first_stage_model."), VAE_CONFIG)),
    "VAE, old diffusers .bin": ("vae", lambda folder: put(folder / "vae.bin", old_diffusers_vae(), VAE_CONFIG)),
    "VAE, present diffusers": ("vae", lambda folder: copied(folder / "vae", "vae")),
    "T5 encoder": ("t5", lambda folder: copied(folder / "t5", "t5")),
    "T5 with decoder": ("t5", lambda folder: put(folder / "t5.safetensors", whole_t5(), T5_CONFIG)),
    "T5 with decoder .bin": ("t5", lambda folder: put(folder / "t5.bin", whole_t5(), T5_CONFIG)),
}


def same_bits(path, kind):
    """Whether a checkpoint has, under our names, the bundled network's tensors and nothing else."""
    tensors, expected = MAPS[kind](open_checkpoint(path)), own(kind)
    assert set(tensors.names()) == set(expected) and not tensors.unexpected
    return all(np.ascontiguousarray(tensors.read(name)).tobytes() == expected[name].tobytes() for name in expected)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", DIT_SOURCES)
def test_dit(convert, tmp_path, source, target):
    make, flags = DIT_SOURCES[source]
    (tmp_path / "in").mkdir()
    to, name = TARGETS[target]
    convert(make(tmp_path / "in"), tmp_path / name, "--to", to, "--verify", *flags)
    assert same_bits(tmp_path / name, "dit")
    result = open_checkpoint(tmp_path / name)
    assert (NULL_CAPTION in result) == (source.startswith("official") and to != "diffusers")
    assert ("pos_embed" in result) == (to == "official")


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "official .pth"])
@pytest.mark.parametrize("source", OTHER_SOURCES)
def test_vae_and_t5(convert, tmp_path, source, target):
    kind, make = OTHER_SOURCES[source]
    (tmp_path / "in").mkdir()
    to, name = TARGETS[target]
    convert(make(tmp_path / "in"), tmp_path / name, "--to", to, "--verify")
    assert same_bits(tmp_path / name, kind)
    if name == "out":
        stored = json.loads((tmp_path / name / "config.json").read_text())
        key = "scaling_factor" if kind == "vae" else "d_model"
        assert stored[key] == (VAE_CONFIG if kind == "vae" else T5_CONFIG)[key]


@pytest.mark.parametrize("kind", ["vae", "t5"])
def test_vae_and_t5_have_no_official_form(convert, tmp_path, kind):
    with pytest.raises(MindSigmaError, match="the official code reads the .* from a diffusers folder"):
        convert(MINI / PARTS[kind], tmp_path / "out.pth", "--to", "official")


def in_hub_cache(tmp_path, monkeypatch, folder):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    root = tmp_path / "hub" / "models--someone--mini"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, root / "snapshots" / ("0" * 40))
    return "someone/mini"


@pytest.mark.parametrize("place", ["folder", "hub id"])
@pytest.mark.parametrize("form", ["ours", "diffusers"])
def test_whole_pipelines(convert, tmp_path, monkeypatch, form, place):
    source = MINI
    if form == "diffusers":
        source = tmp_path / "diffusers"
        convert("sigma-mini", source, "--to", "diffusers")
    if place == "hub id":
        source = in_hub_cache(tmp_path, monkeypatch, source)
    convert(source, tmp_path / "ours", "--to", "mindspore", "--verify")
    convert(source, tmp_path / "theirs", "--to", "diffusers", "--verify")
    for kind, part in PARTS.items():
        assert same_bits(tmp_path / "ours" / part, kind)
        assert same_bits(tmp_path / "theirs" / {"dit": "transformer"}.get(kind, part), kind)
    for root in ("ours", "theirs"):
        spiece = tmp_path / root / "tokenizer" / "spiece.model"
        assert spiece.read_bytes() == (MINI / "tokenizer" / "spiece.model").read_bytes()
    convert(source, tmp_path / "dit.pth", "--to", "official", "--component", "dit", "--verify")
    assert same_bits(tmp_path / "dit.pth", "dit")
    with pytest.raises(MindSigmaError, match="the official code reads the vae .*--component dit"):
        convert(source, tmp_path / "all.pth", "--to", "official")
