"""ControlNets in files: the official names, those of diffusers' project and of SimpleTuner, ours; mistakes by name."""

import json

import numpy as np
import pytest
from conftest import drawn_weight, relative_error
from control_cases import ControlCase

from mindsigma import MindSigmaError, load_dit
from mindsigma.conversion.inspection import inspect
from mindsigma.models.controlnet import ControlledDiT
from mindsigma.weights import open_checkpoint
from mindsigma.weights.formats.safetensors_writer import write_safetensors
from mindsigma.weights.formats.tensor_stream import TensorSpec
from mindsigma.weights.loading import load_controlnet, open_controlnet, open_dit
from mindsigma.weights.names import controlnet_names, dit_names
from mindsigma.weights.names.name_map import slots
from mindsigma.weights.saving import save_network

LIMIT = 3e-6


def write(path, arrays):
    """A safetensors file of a dict name -> array."""
    specs = [TensorSpec(name, array.dtype, array.shape) for name, array in arrays.items()]
    write_safetensors(path, specs, lambda name: arrays[name])
    return path


def read(path):
    """dict name -> array of a file or folder."""
    source = open_checkpoint(path)
    return {name: source.read(name) for name in source.names()}


@pytest.fixture(scope="module")
def official():
    """The case "half", and all tensors of its file by the official names, each drawn from its name alone."""
    case = ControlCase("half")
    seed, (dit, controlnet) = int(case.data["seed"]), case.networks()
    shapes = {}
    for network, rules, prefix in (
        (dit, dit_names.OFFICIAL, "base_model."),
        (controlnet, controlnet_names.OFFICIAL, ""),
    ):
        for name, parameter in network.parameters_and_names():
            shapes[prefix + slots(rules, name)[0]] = parameter.shape
    assert {name for name in shapes if name.startswith("controlnet.")} == set(case.data["grad_names"])
    arrays = {name: drawn_weight(seed, name, shape) for name, shape in shapes.items()}
    arrays["base_model.pos_embed"] = np.zeros((1, 64, 96), np.float32)
    arrays["base_model.y_embedder.y_embedding"] = drawn_weight(seed, "base_model.y_embedder.y_embedding", (20, 64))
    return case, arrays


@pytest.fixture(scope="module")
def adapter():
    """The case "sigma", and all tensors of its file by SimpleTuner's names."""
    case = ControlCase("sigma")
    _, controlnet = case.networks()
    arrays = {}
    for name, parameter in controlnet.parameters_and_names():
        theirs = slots(controlnet_names.DIFFUSERS, name)
        shape = (parameter.shape[0] // len(theirs), *parameter.shape[1:])
        arrays.update((one, drawn_weight(int(case.data["adapter_seed"]), one, shape)) for one in theirs)
    assert set(arrays) == set(case.data["adapter_keys"])
    return case, arrays


def test_an_official_file_is_a_base_and_a_controlnet(official, tmp_path, convert):
    case, arrays = official
    whole = write(tmp_path / "whole.safetensors", arrays)
    given = {"num_heads": 2, "input_size": 16, "pe_interpolation": 1.0}
    dit, controlnet = load_dit(whole, multi_scale=False, **given), load_controlnet(whole, num_heads=2)
    assert relative_error(ControlledDiT(dit, controlnet)(*case.inputs()).asnumpy(), case.data["out"]) < LIMIT
    told = "\n".join(inspect(whole))
    assert "DiT" in told and "ControlNet" in told
    # To ours, both or one alone, and back: every tensor, bit for bit.
    options = ("--num-heads", "2", "--input-size", "16", "--pe-interpolation", "1")
    convert(whole, tmp_path / "ours", "--to", "mindspore", "--verify", *options)
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {"dit", "controlnet"}
    config = json.loads((tmp_path / "ours" / "controlnet" / "config.json").read_text())
    assert config["_class_name"] == "ControlNet" and config["layers"] == 3 and len(config["base_digest"]) == 64
    assert open_controlnet(tmp_path / "ours", base=open_dit(tmp_path / "ours")).notes == []
    base = tmp_path / "ours" / "dit"
    convert(tmp_path / "ours" / "controlnet", tmp_path / "back.pth", "--to", "official", "--base", base, "--verify")
    back = read(tmp_path / "back.pth")
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert name == "base_model.pos_embed" or (back[name] == array).all(), name
    convert(tmp_path / "ours", tmp_path / "again.pth", "--to", "official")
    assert {name: value.tobytes() for name, value in read(tmp_path / "again.pth").items()} == {
        name: value.tobytes() for name, value in back.items()
    }
    with pytest.raises(MindSigmaError, match="one file with its base; name the base .--base MODEL"):
        convert(tmp_path / "ours" / "controlnet", tmp_path / "alone.pth", "--to", "official")


def test_simpletuners_folder_there_and_back(adapter, tmp_path, convert):
    case, arrays = adapter
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    write(theirs / "diffusion_pytorch_model.safetensors", arrays)
    sizes = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 48, "cross_attention_dim": 96}
    (theirs / "config.json").write_text(json.dumps({"_class_name": "PixArtControlNetAdapterModel", **sizes}))
    dit, _ = case.networks()
    loaded = load_controlnet(theirs, base=dit)
    assert relative_error(ControlledDiT(dit, loaded)(*case.inputs()).asnumpy(), case.data["out"]) < LIMIT
    convert(theirs, tmp_path / "ours", "--to", "mindspore", "--verify")
    convert(tmp_path / "ours", tmp_path / "back", "--to", "diffusers", "--verify")
    back = read(tmp_path / "back")
    assert back.keys() == arrays.keys() and all((back[name] == arrays[name]).all() for name in arrays)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {name: config[name] for name in sizes} == sizes
    assert any("layers: 3" in line for line in inspect(tmp_path / "ours"))


def test_what_is_missing_or_too_much_is_named(adapter, tmp_path):
    case, arrays = adapter
    dit, _ = case.networks()
    key = "controlnet_blocks.1.transformer_block.ff.net.2.bias"
    for change, message in (
        ({key: None}, "tensor 'blocks.1.mlp.fc2.bias' is missing"),
        (
            {"controlnet_blocks.1.extra": np.zeros(2, np.float32)},
            "'controlnet_blocks.1.extra' is not part of the model",
        ),
        ({key: np.zeros(5, np.float32)}, r"'blocks.1.mlp.fc2.bias' has shape \(5,\), the model needs \(96,\)"),
        ({"controlnet_blocks.1.transformer_block.attn1.to_k.bias": None}, "attn1.to_k.bias' is missing beside"),
    ):
        changed = {name: array for name, array in {**arrays, **change}.items() if array is not None}
        with pytest.raises(MindSigmaError, match=message):
            open_controlnet(write(tmp_path / "changed.safetensors", changed), base=dit)


def test_a_file_of_another_kind(official, tmp_path, mini):
    case, arrays = official
    base = {name.removeprefix("base_model."): array for name, array in arrays.items() if name.startswith("base_model.")}
    with pytest.raises(MindSigmaError, match="this is not a ControlNet of a PixArt model"):
        open_controlnet(write(tmp_path / "base.safetensors", base))
    _, controlnet = case.networks()
    save_network(controlnet, tmp_path / "control", "fp32")
    with pytest.raises(MindSigmaError, match="is a ControlNet: give it as --controlnet"):
        load_dit(tmp_path / "control")
    with pytest.raises(MindSigmaError, match="for a model with hidden_size 96, this one has 288"):
        open_controlnet(tmp_path / "control", base=mini.components.opened("dit"))
