"""ControlNets in files: the official names, those of diffusers' project and of SimpleTuner, ours; mistakes by name."""

import json

import numpy as np
import pytest
from conftest import GOLDEN, drawn_weight, relative_error
from control_cases import ControlCase
from mindspore import Tensor

from mindsigma import MindSigmaError, load_dit
from mindsigma.conversion.inspection import inspect
from mindsigma.models.controlnet import ControlledDiT, ControlNet
from mindsigma.weights import open_checkpoint
from mindsigma.weights.adapters.adapter_file import Adapter, Entry, write_adapter
from mindsigma.weights.adapters.adapter_reader import open_adapter
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


def trained_by_simpletuner(path, layers=3, rank=3, alpha=6.0, **config):
    """A file of a LoRA of a ControlNet of 96 channels; dict name in it -> array.

    Names: its targets (get_lora_target_layers of its helpers/models/pixart/model.py) with peft's endings, as they are
    saved (save_lora_weights of its pipeline); alpha stands in the header alone.
    """
    attention = [f"attn{k}.{part}" for k in (1, 2) for part in ("to_k", "to_q", "to_v", "to_out.0")]
    arrays = {}
    for i in range(layers):
        maps = ["before_proj", "after_proj"] if i == 0 else ["after_proj"]
        for target in (*maps, *(f"transformer_block.{name}" for name in attention)):
            name = f"controlnet.controlnet_blocks.{i}.{target}"
            for part, shape in (("lora_A", (rank, 96)), ("lora_B", (96, rank))):
                arrays[f"{name}.{part}.weight"] = drawn_weight(8, f"{name}.{part}", shape)
    told = {"r": rank, "lora_alpha": alpha, "use_rslora": False, "use_dora": False, **config}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps({f"controlnet.{k}": v for k, v in told.items()})}
    specs = [TensorSpec(name, array.dtype, array.shape) for name, array in arrays.items()]
    path.parent.mkdir(exist_ok=True)
    write_safetensors(path, specs, lambda name: arrays[name], metadata)
    return arrays


def merged_by_hand(dit, arrays, scale, layers=3):
    """ControlNet of a DiT's blocks and maps of zeros with B A of a file added to them, by its definition."""
    controlnet = ControlNet.from_dit(dit, layers)
    for name, parameter in controlnet.parameters_and_names():
        parts = [f"controlnet.{theirs.removesuffix('.weight')}" for theirs in slots(controlnet_names.DIFFUSERS, name)]
        if not name.endswith(".weight") or f"{parts[0]}.lora_A.weight" not in arrays:
            continue
        pairs = [[arrays[f"{part}.{end}.weight"].astype(np.float64) for end in ("lora_B", "lora_A")] for part in parts]
        change = scale * np.concatenate([b @ a for b, a in pairs])
        parameter.set_data(Tensor((parameter.asnumpy() + change).astype(np.float32)))
    return controlnet


def test_a_lora_of_simpletuner(tmp_path, convert):
    """Copies of the base's blocks with the LoRA in them; a base's own LoRA is not part of them; ours, official."""
    case = ControlCase("sigma")
    dit, _ = case.networks()
    save_network(dit, tmp_path / "base", "fp32")
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    arrays, golden = trained_by_simpletuner(file), np.load(GOLDEN / "controlnet_lora.npz")
    assert sorted(arrays) == list(golden["keys"])
    expected, wanted = merged_by_hand(dit, arrays, 2.0), golden["out"]
    assert relative_error(ControlledDiT(dit, expected)(*case.inputs()).asnumpy(), wanted) < LIMIT
    assert relative_error(wanted, case.data["out_base"]) > 0.1
    write_adapter(tmp_path / "own.safetensors", Adapter({"blocks.0.mlp.fc1": Entry(*own_lora(), 1.0, 0.5)}))
    for lora in ([], [tmp_path / "own.safetensors"]):
        base = open_dit(tmp_path / "base", "fp32", lora=lora)
        opened = open_controlnet(file.parent if lora else file, "fp32", base)
        assert "copies of the first 3 blocks of base" in opened.notes[0] and len(opened.notes) == 1
        assert len(opened.config.base_digest) == 64
        loaded = dict(opened.load().parameters_and_names())
        for name, parameter in expected.parameters_and_names():
            np.testing.assert_allclose(loaded[name].asnumpy(), parameter.asnumpy(), rtol=1e-6, atol=1e-7, err_msg=name)
    convert(file, tmp_path / "ours", "--to", "mindspore", "--base", tmp_path / "base", "--verify")
    ours = load_controlnet(tmp_path / "ours", "fp32", dit)
    assert relative_error(ControlledDiT(dit, ours)(*case.inputs()).asnumpy(), wanted) < LIMIT
    convert(file.parent, tmp_path / "whole.pth", "--to", "official", "--base", tmp_path / "base")
    whole = open_checkpoint(tmp_path / "whole.pth")
    name = "controlnet.2.copied_block.cross_attn.kv_linear.weight"
    np.testing.assert_array_equal(whole.read(name), ours.blocks[2].cross_attn.kv_linear.weight.asnumpy())


def own_lora():
    """A and B of a rank of 2 for a layer of 96 to 384 channels."""
    return drawn_weight(9, "a", (2, 96)), drawn_weight(9, "b", (384, 2))


@pytest.mark.parametrize(
    "config, scale",
    [
        ({"use_rslora": True}, 6 / 3**0.5),
        ({"alpha_pattern": {"attn1.to_q": 3.0, "controlnet_blocks.0.before_proj": 12.0}}, None),
    ],
    ids=["rslora", "pattern"],
)
def test_scales_of_a_lora(config, scale, tmp_path):
    trained_by_simpletuner(tmp_path / "lora.safetensors", **config)
    entries = open_adapter(tmp_path / "lora.safetensors", controlnet=True).adapter.entries
    assert len(entries) == 4 + 3 * 8
    assert {"before_proj", "after_proj.2", "blocks.2.cross_attn.kv_linear.v"} < set(entries)
    if scale:
        assert all(entry.scale == pytest.approx(scale) for entry in entries.values())
    else:
        alphas = {name: entry.alpha for name, entry in entries.items() if entry.alpha != 6.0}
        assert alphas == {"before_proj": 12.0, **{f"blocks.{i}.attn.qkv.q": 3.0 for i in range(3)}}


def test_what_a_lora_of_a_controlnet_does_not_fit(tmp_path, convert):
    dit, _ = ControlCase("sigma").networks()
    save_network(dit, tmp_path / "base", "fp32")
    file = tmp_path / "lora.safetensors"
    arrays = trained_by_simpletuner(file)
    base = open_dit(tmp_path / "base", "fp32")
    with pytest.raises(MindSigmaError, match="an adapter of a ControlNet, not of a DiT: give it as --controlnet"):
        open_dit(tmp_path / "base", "fp32", lora=[file])
    with pytest.raises(MindSigmaError, match="merge it into the copies of its base with tools/convert.py"):
        load_controlnet(file, "fp32", dit)
    with pytest.raises(MindSigmaError, match="name the model that it was trained beside .--base MODEL"):
        convert(file, tmp_path / "ours", "--to", "mindspore")
    trained_by_simpletuner(file, layers=5)
    with pytest.raises(MindSigmaError, match="of a ControlNet of 5 blocks, but .*base has 5; give the model"):
        open_controlnet(file, "fp32", base)
    key, some = "controlnet.controlnet_blocks.1.after_proj.lora_B.weight", np.zeros((3, 96), np.float32)
    for change, message in (
        ({key: None}, "lora_B .lora_up. of 'after_proj.1' is missing"),
        ({key: np.zeros((90, 3), np.float32)}, "'after_proj.1' fits weights of shape .90, 96., .* has .96, 96."),
        ({"transformer.proj_out.lora_A.weight": some}, "no linear layer of a PixArt ControlNet"),
        ({"controlnet.controlnet_blocks.0.extra.lora_A.weight": some}, "no linear layer of a PixArt ControlNet"),
    ):
        changed = {name: array for name, array in {**arrays, **change}.items() if array is not None}
        with pytest.raises(MindSigmaError, match=message) as error:
            open_controlnet(write(file, changed), "fp32", base)
        assert "\n" not in str(error.value)
