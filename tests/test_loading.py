"""From foreign files to networks: names of every peer, the config worked out, nothing missing or left over."""

import json
import zlib

import numpy as np
import pytest
from conftest import GOLDEN, Case, official_checkpoint
from mindspore import Tensor
from safetensors.numpy import load_file, save_file

from mindsigma import MindSigmaError, PixArtSigmaPipeline, load_dit
from mindsigma.backends.cpu import accelerate
from mindsigma.weights import open_checkpoint
from mindsigma.weights.loading import open_t5, open_vae
from mindsigma.weights.locate import BUNDLED, locate
from mindsigma.weights.names.dit_names import DIFFUSERS, map_dit
from mindsigma.weights.names.t5_names import map_t5

MINI = BUNDLED / "sigma-mini"
RECORDED = json.loads((GOLDEN / "sigma_mini_diffusers.json").read_text())


def diffusers_dit():
    """The bundled DiT under diffusers' names, made from the rules read backwards."""
    ours = load_file(MINI / "dit" / "model.safetensors")
    theirs = {}
    for rule in DIFFUSERS:
        for name in [rule.ours] if "{}" not in rule.ours else [rule.ours.format(i) for i in range(8)]:
            if name in ours:
                parts = np.split(ours[name], len(rule.theirs))
                number = name.split(".")[1]
                theirs.update({t.format(number): np.ascontiguousarray(p) for t, p in zip(rule.theirs, parts)})
    return theirs


@pytest.fixture(scope="module")
def diffusers_folder(tmp_path_factory):
    """sigma-mini as diffusers saves it, the transformer in two shards with an index."""
    folder = tmp_path_factory.mktemp("diffusers") / "sigma-mini"
    for component in ("transformer", "vae", "text_encoder"):
        (folder / component).mkdir(parents=True)
        (folder / component / "config.json").write_text(json.dumps(RECORDED[f"{component}/config.json"]))
    tensors = diffusers_dit()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / "transformer" / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    for component, file in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (folder / component / f"{file}.safetensors").write_bytes((MINI / component / "model.safetensors").read_bytes())
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "spiece.model").write_bytes((MINI / "tokenizer" / "spiece.model").read_bytes())
    return folder


def contents(path):
    """dict name -> [shape, dtype, CRC-32 of the bytes] of a checkpoint."""
    source = open_checkpoint(path)
    return {
        name: [list(source.shape(name)), str(source.dtype(name)), zlib.crc32(np.ascontiguousarray(source.read(name)))]
        for name in source.names()
    }


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
def test_the_diffusers_folder_is_the_real_one(diffusers_folder, component):
    """Names, shapes, types and checksums of every tensor as recorded from the folder that diffusers wrote."""
    assert contents(diffusers_folder / component) == RECORDED[component]


def test_the_official_checkpoint_is_the_real_one():
    """Every bit as recorded from the file that PyTorch wrote, though the translator makes it."""
    recorded = json.loads((GOLDEN / "sigma_mini_official.json").read_text())
    assert len(recorded) == 137 and contents(official_checkpoint()) == recorded


def test_diffusers_folder_and_official_checkpoint_load_the_same(diffusers_folder):
    official, diffusers, bundled = (load_dit(path) for path in (official_checkpoint(), diffusers_folder, "sigma-mini"))
    assert official.config == diffusers.config == bundled.config
    for a, b, c in zip(*(dit.get_parameters() for dit in (official, diffusers, bundled))):
        assert a.name == b.name == c.name and (a.asnumpy() == b.asnumpy()).all() and (a.asnumpy() == c.asnumpy()).all()


def test_diffusers_folder_draws_the_same(diffusers_folder, mini):
    other = PixArtSigmaPipeline.from_pretrained(diffusers_folder)
    arguments = {"seed": 4, "num_inference_steps": 2, "output_type": "np", "progress": False}
    assert (other("a cat", **arguments).images == mini("a cat", **arguments).images).all()


def test_saved_pipeline_loads_again(mini, tmp_path):
    mini.save_pretrained(tmp_path / "copy")
    for component in ("dit", "vae", "text_encoder"):
        a, b = (load_file(folder / component / "model.safetensors") for folder in (MINI, tmp_path / "copy"))
        assert a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)
    assert load_dit(tmp_path / "copy").config == mini.dit.config


def ldm_vae(prefix=""):
    """The bundled VAE under LDM's names, written out by hand here."""
    theirs = {}
    for name, value in load_file(MINI / "vae" / "model.safetensors").items():
        parts = name.split(".")
        if parts[1].endswith("_blocks"):
            level = int(parts[2])
            if parts[0] == "decoder":
                level = 3 - level
            head = f"{parts[0]}.{'down' if parts[0] == 'encoder' else 'up'}.{level}."
            if parts[3] == "resnets":
                tail = ".".join(parts[5:]).replace("conv_shortcut", "nin_shortcut")
                name = f"{head}block.{parts[4]}.{tail}"
            else:
                name = f"{head}{'downsample' if parts[0] == 'encoder' else 'upsample'}.conv.{parts[-1]}"
        elif parts[1] == "mid_block":
            if parts[2] == "resnets":
                name = f"{parts[0]}.mid.block_{int(parts[3]) + 1}.{'.'.join(parts[4:])}"
            else:
                renames = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
                name = f"{parts[0]}.mid.attn_1.{renames[parts[4]]}.{parts[-1]}"
                value = value[..., None, None] if value.ndim == 2 else value
        theirs[prefix + name.replace("conv_norm_out", "norm_out")] = np.ascontiguousarray(value)
    return theirs


def old_diffusers_vae():
    """The bundled VAE under the names diffusers used before 0.17."""
    renames = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    theirs = {}
    for name, value in load_file(MINI / "vae" / "model.safetensors").items():
        for new, old in renames.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        theirs[name] = value
    return theirs


@pytest.mark.parametrize("naming", ["ldm", "ldm in a whole checkpoint", "old diffusers"])
def test_vae_namings(naming, tmp_path):
    tensors = (
        old_diffusers_vae() if naming == "old diffusers" else ldm_vae("first_stage_model." if "whole" in naming else "")
    )
    if "whole" in naming:
        tensors["model.diffusion_model.out.0.weight"] = np.zeros(3, np.float32)
        tensors["cond_stage_model.logit_scale"] = np.zeros(1, np.float32)
    save_file(tensors, tmp_path / "vae.safetensors")
    (tmp_path / "config.json").write_text((MINI / "vae" / "config.json").read_text())
    loaded = open_vae(tmp_path).load()
    reference = load_file(MINI / "vae" / "model.safetensors")
    assert {parameter.name for parameter in loaded.get_parameters()} == set(reference)
    for parameter in loaded.get_parameters():
        assert (parameter.asnumpy() == reference[parameter.name].astype(np.float32)).all()


def test_t5_with_decoder_and_tied_embedding(tmp_path):
    tensors = load_file(MINI / "text_encoder" / "model.safetensors")
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].copy()
    tensors["decoder.block.0.layer.1.EncDecAttention.q.weight"] = np.zeros((4, 4), np.float32)
    tensors["lm_head.weight"] = np.zeros((4, 4), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((MINI / "text_encoder" / "config.json").read_text())
    pending = open_t5(tmp_path)
    assert len(pending.tensors.dropped) == 3
    del tensors["shared.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert "shared.weight" in map_t5(open_checkpoint(tmp_path))
    open_t5(tmp_path).load()


def save_changed(path, change):
    """The bundled DiT with `change(tensors)` applied, as one file; returns the file."""
    tensors = load_file(MINI / "dit" / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "dit.safetensors")
    (path / "config.json").write_text((MINI / "dit" / "config.json").read_text())
    return path / "dit.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks.3.mlp.fc1.bias"), "'blocks.3.mlp.fc1.bias' is missing"),
        (lambda t: t.update(surprise=np.zeros(2)), "'surprise' is not part of the model"),
        (lambda t: t.update({"blocks.0.attn.sr.weight": np.zeros((288, 1, 2, 2))}), "blocks.0.attn.sr"),
        (lambda t: t.update({"blocks.0.attn.proj.weight": np.zeros((5, 288))}), "has shape .5, 288.*288, 288"),
        (lambda t: t.pop("x_embedder.proj.weight"), "x_embedder.proj.weight.*not a PixArt transformer"),
    ],
)
def test_every_tensor_is_accounted_for(change, message, tmp_path):
    with pytest.raises(MindSigmaError, match=message):
        load_dit(save_changed(tmp_path, change))


def test_missing_part_of_a_fused_tensor_is_named(tmp_path):
    tensors = diffusers_dit()
    del tensors["transformer_blocks.2.attn1.to_k.weight"]
    save_file(tensors, tmp_path / "t.safetensors")
    with pytest.raises(MindSigmaError, match="transformer_blocks.2.attn1.to_k.weight"):
        map_dit(open_checkpoint(tmp_path / "t.safetensors"))


def test_what_the_file_does_not_tell_comes_from_overrides(tmp_path):
    case = Case("ms_kv_uniform")
    dit = case.build()
    file = tmp_path / "bare.safetensors"
    save_file({parameter.name: parameter.asnumpy() for parameter in dit.get_parameters()}, file)
    with pytest.raises(MindSigmaError, match="num_heads and input_size and pe_interpolation"):
        load_dit(file)
    with pytest.raises(MindSigmaError, match="unknown DiT option 'heads'"):
        load_dit(file, heads=2)
    loaded = load_dit(file, num_heads=2, pe_interpolation=1.0, input_size=16, kv_compression="uniform:2:1")
    assert (loaded(*case.inputs()).asnumpy() == accelerate(dit)(*case.inputs()).asnumpy()).all()
    assert load_dit(file, **case.config).config == loaded.config.override(model_max_length=20)


def test_scale_and_length_can_be_left_to_the_rule(tmp_path):
    """XL's heads are 72 wide, and position scale and latent side of every PixArt-Sigma keep the ratio 1 / 64."""
    tensors = load_file(MINI / "dit" / "model.safetensors")
    save_file(tensors, tmp_path / "bare.safetensors")
    assert load_dit(tmp_path / "bare.safetensors", pe_interpolation=0.5).config.input_size == 32
    assert load_dit(tmp_path / "bare.safetensors", input_size=64).config.pe_interpolation == 1.0
    assert load_dit(tmp_path / "bare.safetensors", base_size=16).config.input_size == 32


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0, 4.0, 8.0])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_position_scale_is_read_off_in_any_precision(dtype, scale):
    import ml_dtypes

    from mindsigma.models.embeddings import position_embedding
    from mindsigma.weights.configs import _config_from_buffers

    side = int(32 * scale)
    stored = position_embedding(side, side, 1152, side, scale)[:, : side * side]
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype

    class Source(dict):
        def shape(self, name):
            return self[name].shape

        def read(self, name):
            return self[name]

    assert _config_from_buffers(Source(pos_embed=stored.astype(kind)), 2) == {
        "input_size": 2 * side,
        "pe_interpolation": scale,
    }


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_stored_dtypes(dtype, tmp_path):
    import ml_dtypes

    kind = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}[dtype]
    tensors = {name: value.astype(kind) for name, value in load_file(MINI / "dit" / "model.safetensors").items()}
    save_file(tensors, tmp_path / "dit.safetensors")
    dit = load_dit(tmp_path / "dit.safetensors", input_size=32)
    for parameter in dit.get_parameters():
        assert (parameter.asnumpy() == tensors[parameter.name].astype(np.float32)).all()


def test_missing_checkpoint_of_a_run_here(tmp_path, monkeypatch):
    """Is not asked of the hub; what is there is told."""
    (tmp_path / "runs" / "first" / "checkpoints" / "step_00000024").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MindSigmaError, match="runs/first/checkpoints holds step_00000024"):
        locate("runs/first/checkpoints/step_00000200/ema")


def test_damaged_and_absent_files(tmp_path):
    data = (MINI / "dit" / "model.safetensors").read_bytes()
    file = tmp_path / "cut.safetensors"
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(MindSigmaError, match="cut.safetensors"):
        load_dit(file)
    with pytest.raises(MindSigmaError, match="no such file or folder"):
        load_dit(tmp_path / "absent")
    with pytest.raises(MindSigmaError, match="not to be had from the hub"):
        locate("nobody/no-such-model")
    with pytest.raises(MindSigmaError, match="components"):
        PixArtSigmaPipeline.from_pretrained(official_checkpoint())
    (tmp_path / "empty").mkdir()
    with pytest.raises(MindSigmaError, match="config.json"):
        PixArtSigmaPipeline.from_pretrained(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(MindSigmaError, match="JSON|no weights"):
        load_dit(tmp_path / "empty")


def test_loaded_weights_can_be_trained(tmp_path):
    """Parameters own their memory: writing into them touches neither the file nor another network."""
    first, second = load_dit("sigma-mini"), load_dit("sigma-mini")
    parameter = next(first.get_parameters())
    before = parameter.asnumpy().copy()
    parameter.set_data(Tensor(before + 1))
    assert (next(second.get_parameters()).asnumpy() == before).all()
    assert (next(load_dit("sigma-mini").get_parameters()).asnumpy() == before).all()


def test_hub_cache_is_read_offline(tmp_path, monkeypatch, diffusers_folder):
    """A hub id is found in huggingface-hub's cache without network."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--someone--mini"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / ("0" * 40)).symlink_to(diffusers_folder)
    assert locate("someone/mini").resolve() == diffusers_folder.resolve()
