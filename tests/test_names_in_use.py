"""Names, prefixes, files and folders as tools in use write them: found, and what was assumed or left is told."""

import json
import shutil

import numpy as np
import pytest
from hostile.encoding import Call, Name, Ref, write_zip
from PIL import Image
from safetensors.numpy import load_file, save_file

from mindsigma import MindSigmaError, PixArtSigmaPipeline
from mindsigma.weights import open_checkpoint
from mindsigma.weights.loading import open_dit
from mindsigma.weights.locate import BUNDLED
from mindsigma.weights.names.dit_names import map_dit
from mindsigma.weights.names.t5_names import map_t5
from mindsigma.weights.names.vae_names import map_vae

MINI = BUNDLED / "sigma-mini"
MAPS = {"dit": map_dit, "vae": map_vae, "t5": map_t5}
DIT = ("x_embedder.proj.weight", "blocks.0.mlp.fc1.bias", "final_layer.scale_shift_table")
DIFFUSERS = ("pos_embed.proj.weight", "transformer_blocks.0.ff.net.0.proj.bias", "scale_shift_table")
VAE = ("decoder.conv_in.weight", "encoder.conv_in.bias", "quant_conv.weight")
LDM = ("decoder.conv_in.weight", "encoder.conv_in.bias", "quant_conv.weight", "encoder.down.0.block.0.norm1.weight")
T5 = ("shared.weight", "encoder.block.0.layer.0.layer_norm.weight", "encoder.final_layer_norm.weight")
NAMES = {"dit": DIT, "diffusers dit": DIFFUSERS, "vae": VAE, "ldm vae": LDM, "t5": T5}

PREFIXES = {
    "dit": "module. _orig_mod. model. transformer. dit. net. ema. diffusion_model. model.diffusion_model. "
    "module._orig_mod. _orig_mod.module. model.module._orig_mod. model.dit. pipe.transformer. base_model.model. "
    "_forward_module. my_trainer.core.",
    "diffusers dit": "transformer. module. model.diffusion_model. module._orig_mod. unet.",
    "vae": "vae. module. first_stage_model. vae._orig_mod. autoencoder. model.first_stage_model.",
    "ldm vae": "first_stage_model. vae.",
    "t5": "text_encoder. text_encoders.t5xxl.transformer. cond_stage_model.transformer. t5xxl.transformer. module. "
    "text_encoders.t5xxl. conditioner.embedders.0.transformer. text_encoder_3.",
}


def numbered(names, start=1):
    """dict name -> a different (2, 2) array each."""
    return {name: np.full((2, 2), start + i, np.float32) for i, name in enumerate(names)}


def under(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def save_pth(path, saved):
    """A PyTorch file of nested dicts with arrays."""
    storages = {}

    def encoded(value):
        if isinstance(value, dict):
            return {key: encoded(one) for key, one in value.items()}
        if not isinstance(value, np.ndarray):
            return value
        key, strides = str(len(storages)), tuple(step // value.itemsize for step in value.strides)
        storages[key] = value.tobytes()
        storage = Ref(("storage", Name("torch.FloatStorage"), key, "cpu", value.size))
        return Call("torch._utils._rebuild_tensor_v2", storage, 0, value.shape, strides, False, {})

    return write_zip(path, encoded(saved), storages)


def save(path, tensors):
    if path.suffix == ".pth":
        return save_pth(path, tensors)
    save_file(tensors, path)
    return path


def numbers(source):
    """dict name -> the number its array is filled with."""
    return {name: float(source.read(name).flat[0]) for name in source.names()}


# prefixes


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("what", NAMES)
def test_prefixes(tmp_path, what, suffix):
    tensors = numbered(NAMES[what])
    kind = what.rpartition(" ")[2]
    expected = numbers(MAPS[kind](open_checkpoint(save(tmp_path / f"plain{suffix}", tensors))))
    assert len(expected) == len(tensors)
    for prefix in PREFIXES[what].split():
        found = MAPS[kind](open_checkpoint(save(tmp_path / f"a{suffix}", under(prefix, tensors))))
        assert numbers(found) == expected and not found.unexpected, prefix
        assert bool(found.notes) == (prefix in ("ema.", "my_trainer.core.")), prefix


def test_wrappers_of_single_blocks(tmp_path):
    names = [name.replace("blocks.0.", "blocks.0._orig_mod._checkpoint_wrapped_module.") for name in DIT]
    found = map_dit(open_checkpoint(save(tmp_path / "a.safetensors", numbered(names))))
    assert numbers(found) == numbers(map_dit(open_checkpoint(save(tmp_path / "b.safetensors", numbered(DIT)))))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_averages_beside_others(tmp_path, suffix):
    tensors = {**under("model.", numbered(DIT)), **under("ema_model.module.", numbered(DIT, 50))}
    tensors["ema_model.num_updates"] = np.zeros((1, 1), np.float32)
    source = open_checkpoint(save(tmp_path / f"a{suffix}", tensors))
    assert set(numbers(map_dit(source)).values()) == {1, 2, 3} and not map_dit(source).notes
    assert set(numbers(map_dit(open_checkpoint(source.path, ema=True), ema=True)).values()) == {50, 51, 52}
    plain = {**numbered(DIT), **under("ema.", numbered(DIT, 50))}
    source = open_checkpoint(save(tmp_path / f"b{suffix}", plain))
    assert set(numbers(map_dit(source)).values()) == {1, 2, 3} and not map_dit(source).unexpected


@pytest.mark.parametrize(
    "names, message",
    [
        ([*DIT, *(f"module.{name}" for name in DIT)], "several DiTs"),
        ([*(f"module.{name}" for name in DIT), "blocks.0.mlp.fc1.bias"], "clash"),
        ([*DIT, "blocks._orig_mod.0.mlp.fc1.bias"], "clash"),
        ([*(f"a.{name}" for name in DIT), *(f"b.{name}" for name in DIT)], "several DiTs, named 'a.' and 'b.'"),
    ],
)
def test_what_is_not_told_apart(tmp_path, names, message):
    with pytest.raises(MindSigmaError, match=message):
        map_dit(open_checkpoint(save(tmp_path / "a.safetensors", numbered(names))))


def test_unknown_names_beside_a_plain_network_are_still_refused(tmp_path):
    found = map_dit(open_checkpoint(save(tmp_path / "a.safetensors", numbered([*DIT, "controlnet.0.weight"]))))
    assert found.unexpected == ["controlnet.0.weight"]


# what a training script saves


A, B = numbered(DIT), numbered(DIT, 50)


@pytest.mark.parametrize(
    "saved, plain, averaged, noted",
    [
        ({"state_dict": A, "state_dict_ema": B, "epoch": 1}, 1, 50, False),
        ({"model": A, "ema": B, "optimizer": {"state": {}, "param_groups": []}}, 1, 50, False),
        ({"module": A}, 1, None, False),
        ({"state_dict": under("module.", A), "ema_model": under("module.", B)}, 1, 50, False),
        ({"state_dict": {"model": A}, "loops": {}}, 1, None, False),
        ({"state_dict_ema": B, "step": 3}, 50, 50, True),
        ({"ema_model": under("_orig_mod.", B)}, 50, 50, True),
        ({"dit": A, "vae": numbered(VAE, 80), "ema": B}, 1, 50, False),
        ({"transformer": A, "text_encoder": numbered(T5, 80), "scheduler": {"a": 1}}, 1, None, False),
    ],
)
def test_state_dicts(tmp_path, saved, plain, averaged, noted):
    source = open_checkpoint(save_pth(tmp_path / "a.pth", saved))
    found = map_dit(source)
    assert min(numbers(found).values()) == plain and len(found.names()) == 3
    assert bool(found.notes) == noted
    if averaged is None:
        with pytest.raises(MindSigmaError, match="open it without EMA"):
            open_checkpoint(source.path, ema=True)
    else:
        assert min(numbers(map_dit(open_checkpoint(source.path, ema=True), ema=True)).values()) == averaged


# files of a folder

MODEL, FP16, PYTORCH = "diffusion_pytorch_model", "diffusion_pytorch_model.fp16", "pytorch_model"
SHARDED = {  # index, then the shards
    "plain": [f"{MODEL}.safetensors.index.json", f"{MODEL}-00001-of-00002.safetensors"],
    "variant last": [f"{MODEL}.safetensors.index.fp16.json", f"{FP16}-00001-of-00002.safetensors"],
    "variant first": [f"{FP16}.safetensors.index.json", f"{FP16}-00001-of-00002.safetensors"],
    "variant behind": [f"{MODEL}.safetensors.index.fp16.json", f"{MODEL}-00001-of-00002.fp16.safetensors"],
    "transformers": ["model.safetensors.index.fp16.json", "model.fp16-00001-of-00002.safetensors"],
    "bin": [f"{PYTORCH}.bin.index.json", f"{PYTORCH}-00001-of-00002.bin"],
    "bin variant": [f"{PYTORCH}.bin.index.fp16.json", f"{PYTORCH}.fp16-00001-of-00002.bin"],
    "bin variant first": [f"{PYTORCH}.fp16.bin.index.json", f"{PYTORCH}.fp16-00001-of-00002.bin"],
}


def shards(folder, spelling, tensors):
    """A folder of two shards; returns the paths that stand for it."""
    index, first = SHARDED[spelling]
    names, files = list(tensors), [first, first.replace("00001-of", "00002-of")]
    folder.mkdir(exist_ok=True)
    for file, part in zip(files, (names[:1], names[1:])):
        part = {name: tensors[name] for name in part}
        save_pth(folder / file, part) if file.endswith(".bin") else save_file(part, folder / file)
    places = {name: files[i > 0] for i, name in enumerate(names)}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return [folder, *(folder / file for file in files), folder / index]


@pytest.mark.parametrize("spelling", SHARDED)
def test_shards(tmp_path, spelling):
    for path in shards(tmp_path / "t", spelling, numbered(DIFFUSERS)):
        source = open_checkpoint(path)
        assert numbers(source) == numbers_of(DIFFUSERS) and source.path == path and not source.notes


def numbers_of(names):
    return {name: 1.0 + i for i, name in enumerate(names)}


def test_shards_need_their_index(tmp_path):
    """Without it they may be those of two revisions."""
    folder, first, _, index = shards(tmp_path / "t", "variant last", numbered(DIFFUSERS))
    index.unlink()
    for path in (folder, first):
        with pytest.raises(MindSigmaError, match="download the index"):
            open_checkpoint(path)
    save_file(numbered(DIFFUSERS, 9), folder / "model.fp16.safetensors")
    assert open_checkpoint(folder).read(DIFFUSERS[0]).flat[0] == 9


@pytest.mark.parametrize(
    "files, taken",
    [
        (["model.fp16.safetensors"], "model.fp16.safetensors"),
        (["model.fp16.safetensors", "model.safetensors"], "model.safetensors"),
        (["pytorch_model.fp16.bin"], "pytorch_model.fp16.bin"),
        (["pytorch_model.bin", "model.fp16.safetensors"], "model.fp16.safetensors"),
        ([f"{MODEL}.fp16.safetensors", f"{MODEL}.bin"], f"{MODEL}.fp16.safetensors"),
        ([f"{MODEL}.non_ema.safetensors", f"{MODEL}.safetensors"], f"{MODEL}.safetensors"),
        (["model_ema.safetensors", "model.safetensors"], "model.safetensors"),
        (["ema_model.safetensors"], "ema_model.safetensors"),
        (["model.fp16.safetensors", "model.bf16.safetensors"], None),
    ],
)
def test_variants(tmp_path, files, taken):
    for i, file in enumerate(files):
        tensors = {"a": np.full(2, i, np.float32)}
        save_pth(tmp_path / file, tensors) if file.endswith(".bin") else save_file(tensors, tmp_path / file)
    if taken is None:
        with pytest.raises(MindSigmaError, match="2 files could be meant"):
            open_checkpoint(tmp_path)
        return
    source = open_checkpoint(tmp_path)
    assert source.read("a")[0] == files.index(taken)
    assert bool(source.notes) == (taken == "ema_model.safetensors")
    if "model_ema.safetensors" in files:
        assert open_checkpoint(tmp_path, ema=True).read("a")[0] == 0


def test_a_plain_file_wins_over_a_sharded_variant(tmp_path):
    shards(tmp_path, "variant last", numbered(DIFFUSERS, 9))
    save_file(numbered(DIFFUSERS), tmp_path / f"{MODEL}.safetensors")
    assert numbers(open_checkpoint(tmp_path)) == numbers_of(DIFFUSERS)


# whole pipelines, as a user meets them


@pytest.fixture(scope="module")
def networks():
    """dict kind -> tensors of the bundled model."""
    folders = {"dit": "dit", "vae": "vae", "t5": "text_encoder"}
    return {kind: load_file(MINI / folder / "model.safetensors") for kind, folder in folders.items()}


@pytest.fixture
def all_in_one(networks, tmp_path):
    """A file as ComfyUI saves one, with a tensor of no network."""
    prefixes = {"dit": "model.diffusion_model.", "vae": "vae.", "t5": "text_encoders.t5xxl.transformer."}
    tensors = {prefixes[kind] + name: value for kind, own in networks.items() for name, value in own.items()}
    tensors["text_encoders.t5xxl.logit_scale"] = np.ones(1, np.float32)
    save_file(tensors, tmp_path / "all.safetensors", {"modelspec.title": "mini"})
    return tmp_path / "all.safetensors"


FLAGS = ("--input-size", "32", "--pe-interpolation", "0.5")


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_a_file_of_comfyui(convert, capsys, networks, tmp_path, prefix):
    save_file(under(prefix, networks["dit"]), tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "x", "--to", "mindspore", "--dry-run", *FLAGS)
    assert "mapped   135 tensors" in capsys.readouterr().out


def test_all_in_one(convert, capsys, all_in_one, tmp_path, mini):
    """Each network is found; what goes nowhere is said; a picture needs the tokenizer alone beside it."""
    convert(all_in_one, tmp_path / "out", "--to", "mindspore", "--verify", *FLAGS)
    told = capsys.readouterr().out
    assert "left out: 1 tensors: text_encoders.t5xxl.logit_scale" in told
    assert "left out: 1 texts of the header: modelspec.title" in told and "no tokenizer in" in told
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == ["dit", "text_encoder", "vae"]
    convert(all_in_one, tmp_path / "vae", "--to", "diffusers", "--component", "vae", "--verify")
    told = capsys.readouterr().out
    assert "left out: the DiT, 135 tensors 'model.diffusion_model....'" in told and "left out: the T5" in told
    with pytest.raises(MindSigmaError, match="--components"):
        PixArtSigmaPipeline.from_pretrained(all_in_one)
    shutil.copytree(MINI / "tokenizer", tmp_path / "tokenizer")
    for components in (None, tmp_path):
        pipeline = PixArtSigmaPipeline.from_pretrained(
            all_in_one, components=components, input_size=32, pe_interpolation=0.5
        )
        one, two = (p.encode_prompts(["a red apple"]).states.asnumpy() for p in (pipeline, mini))
        assert np.allclose(one, two, atol=1e-5)
    assert pipeline.components.opened("dit").tensors.read("x_embedder.proj.weight").size


@pytest.fixture
def averaged_pipeline(tmp_path):
    """A pipeline folder whose only DiT is averaged, in shards of a variant."""
    folder = tmp_path / "pipeline"
    shutil.copytree(MINI, folder, ignore=shutil.ignore_patterns("dit"))
    tensors = load_file(MINI / "dit" / "model.safetensors")
    shards(folder / "transformer_ema", "variant last", tensors)
    shutil.copy(MINI / "dit" / "config.json", folder / "transformer_ema")
    return folder


def test_a_folder_with_averages_alone(convert, capsys, averaged_pipeline, tmp_path):
    convert(averaged_pipeline, tmp_path / "out", "--to", "mindspore", "--verify")
    told = capsys.readouterr().out
    assert "changed  only averaged (EMA) weights are there: transformer_ema" in told and "mapped   135" in told
    assert "left out: 3 beside the networks: LICENSE.md, lcm.safetensors, samples.png" in told
    convert(averaged_pipeline, tmp_path / "asked", "--to", "mindspore", "--dry-run", "--ema")
    assert "only averaged" not in capsys.readouterr().out
    assert open_dit(averaged_pipeline / "transformer_ema").notes == []
    shutil.copytree(MINI / "dit", averaged_pipeline / "dit")
    assert open_dit(averaged_pipeline).notes == []
    assert open_dit(averaged_pipeline, ema=True).tensors.path.name == "transformer_ema"


def test_settings_of_a_scheduler_that_is_not_ours(convert, capsys, tmp_path):
    convert("sigma-mini", tmp_path / "d", "--to", "diffusers")
    file = tmp_path / "d" / "scheduler" / "scheduler_config.json"
    capsys.readouterr()
    convert(tmp_path / "d", tmp_path / "x", "--to", "mindspore", "--dry-run")
    assert "settings of the scheduler" not in capsys.readouterr().out
    file.write_text(json.dumps({**json.loads(file.read_text()), "_class_name": "EulerDiscreteScheduler"}))
    (tmp_path / "d" / "tokenizer" / "added_tokens.json").write_text("{}")
    convert(tmp_path / "d", tmp_path / "x", "--to", "mindspore", "--dry-run")
    told = capsys.readouterr().out
    assert "left out: 1 settings of the scheduler: _class_name 'EulerDiscreteScheduler'" in told
    assert "left out: 1 files of tokenizer/: added_tokens.json" in told


# adapters


def test_what_an_adapter_left_open_is_told_when_it_is_merged(convert, capsys, tmp_path, networks, generate):
    size = networks["dit"]["blocks.0.mlp.fc2.weight"].shape
    draw = np.random.default_rng(1)
    lora = {
        "transformer.transformer_blocks.0.ff.net.2.lora_A.weight": draw.standard_normal((2, size[1]), np.float32),
        "transformer.transformer_blocks.0.ff.net.2.lora_B.weight": draw.standard_normal((size[0], 2), np.float32),
        "text_encoder.encoder.block.0.q.lora_A.weight": np.ones((2, 2), np.float32),
    }
    save_file(lora, tmp_path / "style.safetensors", {"ss_tag": "x"})
    expected = [
        "style.safetensors: no alpha given for 1 modules: taken as the rank, scale 1",
        "style.safetensors: 1 tensors of a text encoder are left out: text_encoder.encoder.block.0.q.lora_A.weight",
    ]
    file = tmp_path / "style.safetensors"
    assert open_dit("sigma-mini", lora=[file]).notes == expected
    convert("sigma-mini", tmp_path / "x", "--to", "mindspore", "--component", "dit", "--lora", file)
    told = capsys.readouterr().out
    assert all(f"changed  {line}" in told for line in expected)
    convert(tmp_path / "style.safetensors", tmp_path / "y.safetensors", "--to", "mindspore", "--dry-run")
    assert "left out 1: header's ss_tag" in capsys.readouterr().out
    told = generate("a red apple", "--steps", "1", "--lora", file, "--out", tmp_path / "a.png")
    assert all(f"note: {line}" in told for line in expected)
    assert Image.open(tmp_path / "a.png").text["notes"] == "\n".join(expected)


@pytest.fixture
def generate(monkeypatch, capsys):
    """A function that runs tools/generate.py in this process and returns what it prints."""
    from conftest import load_tool

    tool = load_tool("generate")

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["generate.py", *map(str, arguments)])
        assert tool.main() == 0
        return capsys.readouterr().out

    return run
