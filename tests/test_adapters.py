"""LoRA and DoRA: every spelling read and written with the same bits, merged with the effect that peft gives.

golden/peft_lora, peft_dora, peft_rslora and peft_adapters.npz are peft 0.21.2's on diffusers 0.42.1's
PixArtTransformer2DModel with the weights of golden/ms_plain (`model()` below), made with torch 2.13 by

    OFFICIAL = ["to_k", "to_q", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "proj",
                "linear", "linear_1", "linear_2"]  # of the official train_pixart_lora_hf.py
    CASES = {
        "lora": dict(r=2, lora_alpha=3, target_modules=["proj", "proj_out", "to_k", "to_out.0", "linear_1"]),
        "dora": dict(r=4, lora_alpha=8, target_modules=OFFICIAL, use_dora=True),
        "rslora": dict(r=6, lora_alpha=5, target_modules=["to_q", "to_v", "ff.net.2"], use_rslora=True,
                       rank_pattern={"transformer_blocks.1.attn1.to_q": 3, "attn2.to_v": 2},
                       alpha_pattern={"attn2.to_v": 7, "ff.net.2": 3})}
    for name, case in CASES.items():
        torch.manual_seed(7)
        peft_model = get_peft_model(model(), LoraConfig(**case))
        for key, value in peft_model.named_parameters():
            if "magnitude" in key:
                value.data.mul_(1 + 0.2 * torch.randn_like(value))
            elif "lora_" in key:
                torch.nn.init.normal_(value, std=0.1)
        peft_model.save_pretrained(f"peft_{name}")  # and its output for the inputs of golden/ms_plain
    both = PeftModel.from_pretrained(model(), "peft_lora", adapter_name="lora")
    both.load_adapter("peft_dora", "dora")  # the scalings of lora times 0.5, of dora times 0.8, then "sequence" is
    both.merge_and_unload(safe_merge=True, adapter_names=["lora", "dora"])
"""

import json
import shutil
import sys

import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDEN, Case, load_tool, relative_error
from safetensors.numpy import save_file

from mindsigma import MindSigmaError, load_dit
from mindsigma.weights import open_checkpoint
from mindsigma.weights.adapters.adapter_file import Adapter, Entry, read_adapter, scale_of, write_adapter
from mindsigma.weights.adapters.adapter_reader import is_adapter, open_adapter
from mindsigma.weights.adapters.adapter_view import Adapted
from mindsigma.weights.adapters.merging import parse_adapter, with_adapters
from mindsigma.weights.formats.reader import TensorSource
from mindsigma.weights.saving import save_network

DTYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}


@pytest.fixture
def convert(monkeypatch, capsys):
    """A function that runs tools/convert.py in this process, raises what it raises, returns what it prints."""
    tool = load_tool("convert")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
        assert tool.main() == 0
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Folder of the DiT of golden/ms_plain: hidden size 96, two blocks."""
    folder = tmp_path_factory.mktemp("plain")
    save_network(Case("ms_plain").build(), folder, "fp32")
    return folder


# what peft does


@pytest.mark.parametrize(
    "case, adapters",
    [
        ("lora", ["peft_lora"]),
        ("dora", ["peft_dora"]),
        ("rslora", ["peft_rslora"]),
        ("sequence", ["peft_lora:0.5", "peft_dora:0.8"]),
    ],
)
def test_output_is_that_of_peft(plain, case, adapters):
    """Conv, fused q, k, v, all others; rank and alpha patterns; two adapters with weights: as diffusers with peft."""
    dit = load_dit(plain, "fp32", lora=[f"{GOLDEN / name}" for name in adapters])
    golden = np.load(GOLDEN / "peft_adapters.npz")[case]
    assert relative_error(dit(*Case("ms_plain").inputs()).asnumpy(), golden) < 1e-5
    assert relative_error(Case("ms_plain").out, golden) > 0.05


@pytest.mark.parametrize("case", ["lora", "dora", "rslora"])
@pytest.mark.parametrize("target", ["peft", "official"])
def test_written_for_peft_as_peft_writes(convert, tmp_path, case, target):
    """Names, shapes, bytes of peft's own file, and a config that says the same of rank, alpha, DoRA and rsLoRA."""
    source = GOLDEN / f"peft_{case}"
    convert(source, tmp_path / "ours.safetensors", "--to", "mindspore", "--verify")
    convert(tmp_path / "ours.safetensors", tmp_path / "peft", "--to", target, "--verify")
    assert contents(tmp_path / "peft" / "adapter_model.safetensors") == contents(source / "adapter_model.safetensors")
    one, two = (json.loads((folder / "adapter_config.json").read_text()) for folder in (source, tmp_path / "peft"))
    assert [one[key] for key in ("use_dora", "use_rslora")] == [two[key] for key in ("use_dora", "use_rslora")]
    assert set(two) <= set(one)
    entries, again = open_adapter(source).adapter.entries, open_adapter(tmp_path / "peft").adapter.entries
    assert {n: (e.rank, e.alpha, e.scale) for n, e in entries.items()} == {
        n: (e.rank, e.alpha, e.scale) for n, e in again.items()
    }


def test_patterns_are_peft_s():
    entries = open_adapter(GOLDEN / "peft_rslora").adapter.entries
    told = {name: (entry.rank, entry.alpha, entry.scale) for name, entry in entries.items()}
    assert told["blocks.1.attn.qkv.q"] == (3, 5.0, 5 / np.sqrt(3)) and told["blocks.0.attn.qkv.q"][0] == 6
    assert told["blocks.0.cross_attn.kv_linear.v"] == (2, 7.0, 7 / np.sqrt(2)) and told["blocks.1.mlp.fc2"][1] == 3


# spellings, by hand

LAYERS = {  # of diffusers, with the shape of the weight, rank and alpha
    "transformer_blocks.0.attn1.to_q": ((96, 96), 3, 6.0),
    "transformer_blocks.0.attn1.to_k": ((96, 96), 5, 2.5),
    "transformer_blocks.0.attn1.to_v": ((96, 96), 4, 4.0),
    "transformer_blocks.1.attn1.to_q": ((96, 96), 4, 4.0),
    "transformer_blocks.1.attn1.to_v": ((96, 96), 4, 4.0),
    "transformer_blocks.1.attn1.to_out.0": ((96, 96), 4, 4.0),
    "transformer_blocks.0.attn2.to_q": ((96, 96), 4, 4.0),
    "transformer_blocks.0.attn2.to_k": ((96, 96), 4, 4.0),
    "transformer_blocks.1.attn2.to_k": ((96, 96), 2, 4.0),
    "transformer_blocks.1.attn2.to_v": ((96, 96), 2, 1.0),
    "transformer_blocks.0.ff.net.0.proj": ((384, 96), 4, 4.0),
    "transformer_blocks.0.ff.net.2": ((96, 384), 7, 1.0),
    "adaln_single.linear": ((576, 96), 1, 1.0),
    "adaln_single.emb.timestep_embedder.linear_1": ((96, 256), 4, 4.0),
    "caption_projection.linear_2": ((96, 96), 4, 4.0),
    "pos_embed.proj": ((96, 4, 2, 2), 4, 8.0),
    "proj_out": ((32, 96), 4, 4.0),
}
# keys of A, B, alpha, magnitude
STYLES = {
    "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight", None)
    + ("base_model.model.{}.lora_magnitude_vector",),
    "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight", "transformer.{}.alpha")
    + ("transformer.{}.lora_magnitude_vector",),
    "kohya": ("lora_transformer_{}.lora_down.weight", "lora_transformer_{}.lora_up.weight")
    + ("lora_transformer_{}.alpha", "lora_transformer_{}.dora_scale"),
}


def drawn(dtype, dora=False, layers=None):
    """dict layer -> (A, B, magnitude or None, alpha), arrays as numpy likes them best."""
    rng, made = np.random.default_rng(3), {}
    for name, (shape, rank, alpha) in (layers or LAYERS).items():
        a = rng.standard_normal((rank, *shape[1:])).astype(dtype)
        b = (0.1 * rng.standard_normal((shape[0], rank))).astype(dtype)
        made[name] = a, b, rng.uniform(0.5, 2, shape[0]).astype(dtype) if dora else None, alpha
    return made


def spelled(style, made):
    """dict key -> array of `drawn` adapters in a style."""
    tensors = {}
    for name, (a, b, magnitude, alpha) in made.items():
        down, up, scale, strength = STYLES[style]
        text = name.replace(".", "_") if style == "kohya" else name
        ones = (1,) * (a.ndim - 2)
        tensors[down.format(text)] = a
        tensors[up.format(text)] = b.reshape(b.shape + ones)
        if scale:
            tensors[scale.format(text)] = np.array(alpha, np.float32)
        if magnitude is not None:
            shape = {"kohya": (-1, 1, *ones)}.get(style, (1, -1, 1, 1) if ones else (-1,))
            tensors[strength.format(text)] = magnitude.reshape(shape)
    return tensors


def saved(folder, style, made, **config):
    """A source of a style on disk: its path."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = spelled(style, made)
    if style != "peft":
        save_file(tensors, folder / "adapter.safetensors")
        return folder / "adapter.safetensors"
    save_file(tensors, folder / "adapter_model.safetensors")
    alphas = {name: alpha for name, (_, _, _, alpha) in made.items() if alpha != 4}
    dora = any(magnitude is not None for _, _, magnitude, _ in made.values())
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "alpha_pattern": alphas, "use_dora": dora, **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def contents(path):
    """dict name -> (dtype, shape, bytes) of a weight file, or of a folder's."""
    path = next(path.glob("*.safetensors")) if path.is_dir() else path
    source = open_checkpoint(path)
    return {name: (str(source.dtype(name)), source.shape(name), source.read(name).tobytes()) for name in source.names()}


def file_for(style, folder):
    return folder if style in ("peft", "official") else folder / "adapter.safetensors"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("source", STYLES)
def test_there_and_back_is_bit_identical(convert, tmp_path, source, dora, dtype):
    """A style -> each format -> the style: names, shapes and bits; ranks and alphas differ from layer to layer."""
    first = saved(tmp_path / "source", source, drawn(DTYPES[dtype], dora))
    for middle in ("mindspore", *STYLES):
        folder = tmp_path / middle
        folder.mkdir()
        between, back = file_for(middle, folder / "one"), file_for(source, folder / "two")
        for path in (between, back):
            path.parent.mkdir(exist_ok=True)
        assert "17 modules" in convert(first, between, "--to", middle, "--verify")
        convert(between, back, "--to", source, "--verify")
        assert contents(back) == contents(first), middle
        assert {n: e.scale for n, e in open_adapter(back).adapter.entries.items()} == {
            n: e.scale for n, e in open_adapter(first).adapter.entries.items()
        }


@pytest.mark.parametrize("target", ["diffusers", "kohya"])
def test_rank_stabilised_elsewhere(convert, tmp_path, target):
    """Where only alpha / rank is known the scale stays the same by another alpha, and the table says so."""
    layers = {name: (shape, rank, 4.0) for name, (shape, rank, _) in LAYERS.items()}
    first = saved(tmp_path / "source", "peft", drawn(np.float32, layers=layers), use_rslora=True)
    text = convert(first, tmp_path / "one.safetensors", "--to", target, "--verify")
    assert "rank-stabilised: written with alpha = scale * rank" in text
    one, two = open_adapter(first).adapter, open_adapter(tmp_path / "one.safetensors").adapter
    assert one.rslora and not two.rslora
    for name, entry in one.entries.items():
        assert entry.scale == 4 / np.sqrt(entry.rank)
        assert two.entries[name].scale == pytest.approx(entry.scale, rel=1e-15)
        assert two.entries[name].a.tobytes() == entry.a.tobytes()


def whole_layers(rng, dora):
    """An adapter as the trainer makes it: on the fused layers as they are."""
    entries = {}
    shapes = {
        "blocks.0.attn.qkv": (288, 96),
        "blocks.1.cross_attn.kv_linear": (192, 96),
        "x_embedder.proj": (96, 4, 2, 2),
    }
    for name, shape in shapes.items():
        a = rng.standard_normal((4, *shape[1:])).astype(np.float32)
        b = rng.standard_normal((shape[0], 4)).astype(np.float32)
        magnitude = rng.uniform(0.5, 2, shape[0]).astype(np.float32) if dora else None
        entries[name] = Entry(a, b, 6.0, 1.5, magnitude)
    return Adapter(entries)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("target", ["peft", "diffusers", "kohya"])
def test_fused_layers_elsewhere(convert, tmp_path, plain, target, dora):
    """A fused layer's adapter is three elsewhere, has the same effect there and comes back as one, bit for bit."""
    ours, theirs, back = (
        tmp_path / "ours.safetensors",
        file_for(target, tmp_path / "there"),
        tmp_path / "back.safetensors",
    )
    theirs.parent.mkdir(exist_ok=True)
    write_adapter(ours, whole_layers(np.random.default_rng(1), dora))
    convert(ours, theirs, "--to", target, "--verify")
    assert sum("lora_A" in name or "lora_down" in name for name in contents(theirs)) == 3 + 2 + 1
    convert(theirs, back, "--to", "mindspore", "--verify")
    assert contents(back) == contents(ours)


def test_official_names(tmp_path):
    """Fused under `lora_unet_` and `diffusion_model.`, by number as OneTrainer had it, and older suffixes."""
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((2, 96)).astype(np.float32), rng.standard_normal((288, 2)).astype(np.float32)
    for key_a, key_b, name, rows in (
        ("lora_unet_blocks_1_attn_qkv.lora_down.weight", "lora_unet_blocks_1_attn_qkv.lora_up.weight", "attn.qkv", 288),
        ("diffusion_model.blocks.1.attn.qkv.lora_A.weight",) * 2 + ("attn.qkv", 288),
        ("transformer.blocks.1.attn.qkv.1.lora_A.weight",) * 2 + ("attn.qkv.k", 96),
        ("unet.base_model.model.transformer_blocks.1.attn2.to_q.lora_A.default.weight",) * 2
        + ("cross_attn.q_linear", 96),
        ("transformer.transformer_blocks.1.attn1.to_q.lora.down.weight",) * 2 + ("attn.qkv.q", 96),
        ("transformer_blocks.1.attn1.processor.to_out_lora.down.weight",) * 2 + ("attn.proj", 96),
        ("lycoris_transformer_blocks_1_ff_net_2.lora_down.weight",) * 2 + ("mlp.fc2", 96),
    ):
        if key_a == key_b:
            key_b = key_a.replace("lora_A", "lora_B").replace("down", "up")
        save_file({key_a: a, key_b: b[:rows]}, tmp_path / "one.safetensors")
        opened = open_adapter(tmp_path / "one.safetensors")
        ((found, entry),) = opened.adapter.entries.items()
        assert found == f"blocks.1.{name}" and entry.b.tobytes() == b[:rows].tobytes() and entry.scale == 1
        assert "no alpha" in opened.adapter.record[0]


def test_header_of_diffusers_tells_the_scale(tmp_path):
    tensors = spelled("diffusers", drawn(np.float32))
    tensors = {key: value for key, value in tensors.items() if not key.endswith(".alpha")}
    config = {"transformer.lora_alpha": 3, "transformer.use_rslora": True, "transformer.alpha_pattern": {"to_k": 5}}
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    adapter = open_adapter(tmp_path / "x.safetensors").adapter
    assert adapter.rslora and adapter.entries["blocks.0.attn.qkv.k"].scale == 5 / np.sqrt(5)
    assert adapter.entries["final_layer.linear"].scale == 3 / np.sqrt(4)
    for text in ("\ud800", "3", "[" * 10**5):
        header = json.dumps({"__metadata__": {"lora_adapter_metadata": text}}).encode()
        (tmp_path / "y.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(MindSigmaError, match=r"y\.safetensors: lora_adapter_metadata "):
            open_adapter(tmp_path / "y.safetensors")


def test_text_encoder_is_dropped_and_said(convert, tmp_path):
    tensors = spelled("kohya", drawn(np.float32))
    tensors["lora_te_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight"] = np.ones((2, 8), np.float32)
    tensors["lora_te_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight"] = np.ones((8, 2), np.float32)
    save_file(tensors, tmp_path / "x.safetensors")
    text = convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "--to", "mindspore", "--dry-run")
    assert "dropped  2: lora_te_encoder" in text and "mapped   51 tensors to 34 names" in text
    assert not (tmp_path / "y.safetensors").exists()


# the sum


def made_source(weights):
    return TensorSource("model", weights)


@pytest.mark.parametrize("weight", [1.0, -0.5])
@pytest.mark.parametrize("kind", ["lora", "rows", "columns"])
@pytest.mark.parametrize("shape", [(96, 96), (96, 4, 2, 2)], ids=["linear", "conv"])
def test_closed_form(shape, kind, weight):
    """W + w s B A; brought to magnitudes m: the rows, or columns, of the result have those norms and its directions."""
    rng = np.random.default_rng(5)
    name = "x_embedder.proj" if len(shape) == 4 else "blocks.0.attn.proj"
    w, a, b = (rng.standard_normal(s).astype(np.float32) for s in (shape, (3, *shape[1:]), (96, 3)))
    magnitude = {"lora": None, "rows": rng.uniform(1, 2, 96), "columns": rng.uniform(1, 2, (1, shape[1]))}[kind]
    entry = Entry(a, b, 2.0, scale_of(2, 3), magnitude)
    source = made_source({f"{name}.weight": w, "other": w})
    view = Adapted(source, [(Adapter({name: entry}), weight)])
    expected = w.astype(np.float64)
    expected += weight * 2 / 3 * np.einsum("or,r...->o...", b.astype(np.float64), a.astype(np.float64))
    if kind != "lora":
        axis = 0 if kind == "rows" else 1
        moved = np.moveaxis(expected, axis, 0)  # a view
        for i, m in enumerate(magnitude.reshape(-1)):
            moved[i] *= m / np.linalg.norm(moved[i])
    assert view.read(f"{name}.weight").dtype == np.float32
    assert (view.read(f"{name}.weight") == expected.astype(np.float32)).mean() > 0.99
    assert relative_error(view.read(f"{name}.weight"), expected) < 1e-7
    assert view.read("other").tobytes() == w.tobytes() and w.tobytes() == source.read(f"{name}.weight").tobytes()


def test_absent_parts_stay_as_they_are(tmp_path, plain):
    """An adapter, even a DoRA, of q and v leaves every bit of the keys' rows."""
    layers = {f"transformer_blocks.0.attn1.to_{part}": ((96, 96), 2, 2.0) for part in "qv"}
    path = saved(tmp_path, "kohya", drawn(np.float32, True, layers))
    source = open_checkpoint(plain)
    view = with_adapters(source, [path])
    before, after = source.read("blocks.0.attn.qkv.weight"), view.read("blocks.0.attn.qkv.weight")
    changed = (before != after).reshape(3, -1).mean(1)
    assert changed[1] == 0 and min(changed[0], changed[2]) > 0.99


def test_columns_of_lycoris(convert, tmp_path):
    """`dora_scale` (1, in), which peft and diffusers do not know: kept, and refused there."""
    layers = {name: LAYERS[name] for name in ("transformer_blocks.0.attn1.to_q", "pos_embed.proj")}
    tensors = spelled("kohya", drawn(np.float32, layers=layers))
    tensors["lora_transformer_transformer_blocks_0_attn1_to_q.dora_scale"] = np.ones((1, 96), np.float32)
    tensors["lora_transformer_pos_embed_proj.dora_scale"] = np.ones((1, 4, 1, 1), np.float32)
    save_file(tensors, tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "--to", "mindspore", "--verify")
    assert read_adapter(tmp_path / "y.safetensors").entries["x_embedder.proj"].magnitude.shape == (1, 4)
    convert(tmp_path / "y.safetensors", tmp_path / "z.safetensors", "--to", "kohya", "--verify")
    assert contents(tmp_path / "z.safetensors") == contents(tmp_path / "x.safetensors")
    with pytest.raises(MindSigmaError, match="magnitudes of its inputs, which --to peft cannot hold"):
        convert(tmp_path / "y.safetensors", tmp_path / "p", "--to", "peft")


@pytest.mark.parametrize("dtype", [None, *DTYPES])
def test_merged_by_the_translator(convert, tmp_path, plain, dtype):
    """convert --lora: W + B A, rounded once, with two adapters; the record names them; verified."""
    folder = tmp_path / "half"
    convert(plain, folder, "--to", "mindspore", "--dtype", "fp16")
    flags = [f"--lora={GOLDEN / 'peft_lora'}:0.5", f"--lora={GOLDEN / 'peft_rslora'}"]
    flags += [f"--dtype={dtype}"] if dtype else []
    text = convert(folder, tmp_path / "merged", "--to", "mindspore", "--verify", *flags)
    assert "adapter added: peft_lora, weight 0.5, 14 modules, rank 2" in text
    merged, kind = open_checkpoint(tmp_path / "merged"), DTYPES.get(dtype, np.float16)
    name = "blocks.1.attn.qkv.weight"
    expected = open_checkpoint(folder).read(name).astype(np.float64)
    for case, weight in (("peft_lora", 0.5), ("peft_rslora", 1)):
        entries = open_adapter(GOLDEN / case).adapter.entries
        for i, part in enumerate("qkv"):
            entry = entries.get(f"blocks.1.attn.qkv.{part}")
            if entry is not None:
                change = weight * entry.scale * (entry.b.astype(np.float64) @ entry.a.astype(np.float64))
                expected[96 * i : 96 * (i + 1)] += change
    found = merged.read(name)
    assert found.dtype == kind
    assert relative_error(found, expected) < {4: 1e-7, 2: 5e-3}[found.dtype.itemsize]
    assert (found == expected.astype(kind)).mean() > 0.999
    assert "weight 0.5" in json.loads(merged.metadata["record"])[-2 if not dtype else -3]


def test_pictures_with_an_adapter(tmp_path):
    """tools/generate.py --lora: the bundled model's weights change, the sampler does not; the PNG says it."""
    tool = load_tool("generate")
    rng = np.random.default_rng(0)
    from mindsigma import PixArtSigmaPipeline
    from mindsigma.commands.rows import Row

    mini = PixArtSigmaPipeline.from_pretrained("sigma-mini")
    hidden = mini.dit.config.hidden_size
    a, b = rng.standard_normal((2, hidden)).astype(np.float32), rng.standard_normal((hidden, 2)).astype(np.float32)
    write_adapter(tmp_path / "a.safetensors", Adapter({"blocks.3.attn.proj": Entry(a, b, 2.0, 1.0)}))
    args = tool.build_parser().parse_args(["a cat", "--lora", f"{tmp_path / 'a.safetensors'}:0.25"])
    changed = PixArtSigmaPipeline.from_pretrained("sigma-mini", lora=args.lora)
    before = {parameter.name: parameter.asnumpy() for parameter in mini.dit.get_parameters()}
    for parameter in changed.dit.get_parameters():
        change = parameter.asnumpy() - before[parameter.name]
        if parameter.name.endswith("blocks.3.attn.proj.weight"):
            assert relative_error(change, 0.25 * b @ a) < 1e-5
        else:
            assert (change == 0).all()
    assert tool.about_of(Row(None, args, ""), changed)["lora"] == f"{tmp_path / 'a.safetensors'}:0.25"
    (tmp_path / "options.yaml").write_text("lora: [one.safetensors, 'two.safetensors:2']\n")
    from mindsigma.config_file import parse_with_config

    args = parse_with_config(tool.build_parser(), ["x", "--config", str(tmp_path / "options.yaml"), "--lora", "three"])
    assert args.lora == ["one.safetensors", "two.safetensors:2", "three"]


def test_weights_of_names(tmp_path):
    (tmp_path / "odd:2").write_bytes(b"")
    assert parse_adapter("x/a.safetensors") == ("x/a.safetensors", 1.0)
    assert parse_adapter("x/a.safetensors:-0.5") == ("x/a.safetensors", -0.5)
    assert parse_adapter("C:\\a.safetensors") == ("C:\\a.safetensors", 1.0)
    assert parse_adapter(tmp_path / "odd:2") == (str(tmp_path / "odd:2"), 1.0)
    with pytest.raises(MindSigmaError, match="finite"):
        parse_adapter("a:nan")


# what is refused, with one line


def change_key(old, new):
    return lambda tensors: {key.replace(old, new): value for key, value in tensors.items()}


def put(key, value):
    return lambda tensors: {**tensors, key: value}


ONE = np.ones((4, 96), np.float32)
Q = "transformer.transformer_blocks.1.attn1.to_q"
BAD = {
    "LoKr": (put(f"{Q}.lokr_w1", ONE), "kind LoKr .*merge it"),
    "LoHa": (lambda _: {f"lycoris_x.hada_w{i}": ONE for i in "12"}, "kind LoHa"),
    "Tucker": (put(f"{Q}.lora_mid.weight", ONE), "Tucker"),
    "bias": (put(f"{Q}.lora_B.bias", ONE[0]), "neither A, B, alpha nor magnitude"),
    "saved module": (put("transformer.proj_out.weight", ONE), "modules_to_save"),
    "another model": (change_key("attn1", "attn7"), "another model"),
    "too many blocks": (change_key("blocks.1.", "blocks.2."), "changes 'blocks.2"),
    "no B": (lambda t: {k: v for k, v in t.items() if k != f"{Q}.lora_B.weight"}, "lora_B .* is missing"),
    "ranks": (put(f"{Q}.lora_B.weight", np.ones((96, 3), np.float32)), "do not have one rank"),
    "width": (put(f"{Q}.lora_A.weight", np.ones((4, 95), np.float32)), r"fits weights of shape \(288, 95\)"),
    "rows": (put(f"{Q}.lora_B.weight", np.ones((95, 4), np.float32)), r"fits weights of shape \(285, 96\)"),
    "twice": (put(Q.replace("transformer.", "", 1) + ".lora_A.weight", ONE), "same thing twice"),
    "twice in peft": (put(f"{Q}.lora_A.second.weight", ONE), "same thing twice"),
    "alpha 0": (put(f"{Q}.alpha", np.float32([0])), "alpha 0.0"),
    "alpha nan": (put(f"{Q}.alpha", np.float32([np.nan])), "alpha nan"),
    "alphas": (put(f"{Q}.alpha", np.float32([1, 2])), "expected one number"),
    "integers": (put(f"{Q}.lora_A.weight", ONE.astype(np.int32)), "holds int32"),
    "magnitude": (put(f"{Q}.dora_scale", np.ones((5, 1), np.float32)), r"expected \(96,\)"),
    "empty": (put(f"{Q}.lora_A.weight", np.ones((0, 96), np.float32)), "shapes A"),
    "whole and part": (
        lambda t: {**t, "blocks.1.attn.qkv.lora_A": ONE, "blocks.1.attn.qkv.lora_B": np.ones((288, 4), np.float32)},
        "is a part of",
    ),
    "nan": (put(f"{Q}.lora_A.weight", ONE * np.nan), "not finite"),
    "text only": (
        lambda _: {"text_encoder.q.lora_A.weight": ONE, "text_encoder.q.lora_B.weight": ONE},
        "only 2 tensors",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_refused_with_a_line(tmp_path, plain, fault):
    change, message = BAD[fault]
    tensors = change(spelled("diffusers", drawn(np.float32)))
    save_file(tensors, tmp_path / "x.safetensors")
    assert is_adapter(tmp_path / "x.safetensors")
    with pytest.raises(MindSigmaError, match=message) as error:
        view = with_adapters(open_checkpoint(plain), [tmp_path / "x.safetensors"])
        [view.read(name) for name in view.names()]
    assert "\n" not in str(error.value) and "x.safetensors" in str(error.value)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"peft_type": "LOHA"}, "kind LOHA"),
        ({"use_dora": True}, "says DoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed base weights"),
        ({"lora_alpha": "8"}, "as peft writes it"),
        ({"alpha_pattern": {"(": 3}}, "no regular expression"),
        ({"alpha_pattern": {"(?=a)b": 3}}, "list the modules by name"),
        ({"alpha_pattern": {"(((){900}){900}){900}": 3}}, "too intricate"),
        ({"alpha_pattern": {f".*{'(.*|.?)' * 99}{i}": 3 for i in range(99)}}, "too intricate"),
        ({"alpha_pattern": [1]}, "as peft writes it"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_peft_configs_refused(tmp_path, config, message):
    folder = saved(tmp_path / "peft", "peft", drawn(np.float32), **config)
    with pytest.raises(MindSigmaError, match=message):
        open_adapter(folder)


def test_damaged_or_incomplete(convert, tmp_path):
    """A byte, the config, a tensor changed in our file; peft's weights without their config."""
    good = tmp_path / "good.safetensors"
    adapter = whole_layers(np.random.default_rng(1), True)
    write_adapter(good, adapter)
    again = read_adapter(good)
    assert again.entries.keys() == adapter.entries.keys() and again.entries["blocks.0.attn.qkv"].alpha == 6
    data = bytearray(good.read_bytes())
    data[-5] ^= 1
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(data)
    with pytest.raises(MindSigmaError, match="not those written"):
        open_adapter(bad)
    for old, new in (
        (b'\\"rank\\":4', b'\\"rank\\":5'),
        (b'\\"scale\\":1.5', b'\\"scale\\":2.5'),
        (b"modules", b"modulus"),
    ):
        assert old in good.read_bytes()
        bad.write_bytes(good.read_bytes().replace(old, new, 1))
        with pytest.raises(MindSigmaError, match="damaged|do not give"):
            open_adapter(bad)
    with pytest.raises(MindSigmaError, match="do not have one rank"):
        write_adapter(good, Adapter({"t_block.1": Entry(np.ones((2, 4)), np.ones((4, 3)), 1.0, 0.5)}))
    assert contents(good)  # still there
    shutil.copyfile(GOLDEN / "peft_lora" / "adapter_model.safetensors", tmp_path / "adapter_model.safetensors")
    with pytest.raises(MindSigmaError, match="without their adapter_config.json"):
        convert(tmp_path / "adapter_model.safetensors", tmp_path / "out", "--to", "peft")


def test_flags_that_do_not_fit(convert, tmp_path, plain):
    lora = GOLDEN / "peft_lora"
    for arguments, message in (
        ((plain, tmp_path / "x", "--to", "peft"), "--to peft is for adapters"),
        ((lora, tmp_path / "x", "--to", "peft", "--merge", "sigma-mini"), "--merge is about networks"),
        ((lora, tmp_path / "x", "--to", "kohya"), "one .safetensors file"),
        ((lora, tmp_path / "x.ckpt", "--to", "mindspore"), "written as .safetensors"),
        ((lora, tmp_path / "x.safetensors", "--to", "peft"), "as a folder"),
        ((lora, lora, "--to", "peft", "--overwrite"), "is the source"),
        (
            ("sigma-mini", tmp_path / "x", "--to", "mindspore", "--component", "vae", "--lora", lora),
            "--lora is about a dit",
        ),
        ((plain, tmp_path / "x", "--to", "mindspore", "--lora", tmp_path / "none"), "no such file"),
    ):
        with pytest.raises(MindSigmaError, match=message):
            convert(*arguments)
    convert(lora, tmp_path / "there", "--to", "diffusers")
    assert (tmp_path / "there" / "pytorch_lora_weights.safetensors").is_file()
    with pytest.raises(MindSigmaError, match="not empty"):
        convert(lora, tmp_path / "there", "--to", "peft")
    convert(lora, tmp_path / "there", "--to", "mindspore", "--overwrite", "--verify")
    (tmp_path / "there" / "adapter.safetensors").unlink()
    convert(tmp_path / "there", tmp_path / "half", "--to", "peft", "--dtype", "bf16", "--verify")
    assert {dtype for dtype, _, _ in contents(tmp_path / "half").values()} == {"bfloat16"}
    mixed = saved(
        tmp_path / "mixed",
        "kohya",
        {**drawn(np.float32, True), **drawn(np.float32, layers={"proj_out": ((32, 96), 2, 2.0)})},
    )
    with pytest.raises(MindSigmaError, match="DoRA for all modules or for none"):
        convert(mixed, tmp_path / "peft", "--to", "peft")
    big = saved(tmp_path / "big", "kohya", {"proj_out": (np.full((2, 96), 1e5, np.float32), ONE.T[:32, :2], None, 2.0)})
    with pytest.raises(MindSigmaError, match="beyond float16"):
        convert(big, tmp_path / "small.safetensors", "--to", "kohya", "--dtype", "fp16")


def test_networks_are_no_adapters(plain):
    assert not is_adapter(plain) and not is_adapter(GOLDEN / "ms_micro.pth") and not is_adapter(plain / "none")
