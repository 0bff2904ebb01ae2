"""The released models by name: table against cells, files of full size without weights, names in place of ids.

A file "of full size" here is sparse: the header of the real thing and zeros that take no room.
"""

import json
import shutil
import sys

import numpy as np
import pytest
from conftest import load_tool, official_checkpoint
from mindspore.nn.utils import no_init_parameters
from safetensors.numpy import load_file, save_file

from mindsigma import MindSigmaError, PixArtSigmaPipeline
from mindsigma.commands.generate_options import build_parser, check
from mindsigma.conversion.component import open_component, open_source
from mindsigma.models.dit import DiT, DiTConfig
from mindsigma.models.dit_config import preset
from mindsigma.models.embeddings import position_embedding
from mindsigma.models.t5 import T5Config, T5Encoder
from mindsigma.models.vae import VAE
from mindsigma.models.vae_config import VAEConfig
from mindsigma.sampling.options import SamplingOptions
from mindsigma.weights import open_checkpoint, released
from mindsigma.weights.formats.safetensors_writer import safetensors_header
from mindsigma.weights.formats.tensor_stream import TensorSpec
from mindsigma.weights.loading import open_dit
from mindsigma.weights.locate import BUNDLED, locate
from mindsigma.weights.names.dit_names import DIFFUSERS, NULL_CAPTION
from mindsigma.weights.names.name_map import slots
from mindsigma.weights.released import RELEASES, default_sampler, release_named, release_of

MINI = BUNDLED / "sigma-mini"
DITS = {release.name: release for release in RELEASES if release.config is not None}
SIGMA = (
    "PixArt-Sigma-XL-2-256x256",
    "PixArt-Sigma-XL-2-512-MS",
    "PixArt-Sigma-XL-2-1024-MS",
    "PixArt-Sigma-XL-2-2K-MS",
)
ROW = 1152  # channels of a token


def shapes_of(cell, config):
    """dict name -> shape of a cell that is never filled."""
    with no_init_parameters():
        return {p.name: tuple(p.shape) for p in cell(config).get_parameters()}


@pytest.fixture(scope="module")
def xl():
    """Shapes of XL/2, without and with micro conditions."""
    return {micro: shapes_of(DiT, DiTConfig(micro_condition=micro)) for micro in (False, True)}


def in_diffusers_names(shapes):
    """The same shapes under diffusers' names: a fused tensor falls into equal parts."""
    theirs = {}
    for name, shape in shapes.items():
        parts = slots(DIFFUSERS, name)
        theirs.update({part: (shape[0] // len(parts), *shape[1:]) for part in parts})
    return theirs


def elements(shapes):
    return sum(int(np.prod(shape)) for shape in shapes.values())


def as_saved(shapes, dtype=np.float32):
    """Specs in the order of the safetensors library: by name."""
    return [TensorSpec(name, np.dtype(dtype), tuple(shapes[name])) for name in sorted(shapes)]


def sparse(path, shapes, dtype=np.float32, position=None):
    """A safetensors file of these shapes and of zeros; `position`: (side, scale) of a pos_embed's second row."""
    specs = as_saved(shapes, dtype)
    header = safetensors_header(path, specs, {"format": "pt"})
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(header)
        offset = len(header)
        for spec in specs:
            if spec.name == "pos_embed" and position is not None:
                side, scale = position
                file.seek(offset + ROW * np.dtype(dtype).itemsize)
                file.write(position_embedding(side, side, ROW, side, scale)[0, 1].astype(dtype).tobytes())
            offset += spec.nbytes
        file.truncate(offset)
    return path


def official_shapes(xl, release):
    """What the .pth of a release holds, buffers included; the one of 256 px has no position embedding."""
    config = release.config
    shapes = {**xl[config.micro_condition], NULL_CAPTION: (config.model_max_length, 4096)}
    if release.name != "PixArt-Sigma-XL-2-256x256":
        shapes["pos_embed"] = (1, config.base_size**2, ROW)
    return shapes


@pytest.mark.parametrize("name", DITS)
def test_table_of_transformers(xl, name):
    release = DITS[name]
    shapes = xl[release.config.micro_condition]
    assert len(shapes) == release.tensors and elements(shapes) == release.parameters
    official = official_shapes(xl, release)
    assert len(official) == release.tensors + (1 if name == "PixArt-Sigma-XL-2-256x256" else 2)
    assert 4 * elements(official) == release.official_bytes
    theirs = in_diffusers_names(shapes)
    if "Sigma" not in name:  # diffusers kept alpha's null caption
        theirs["caption_projection.y_embedding"] = (120, 4096)
    specs = as_saved(theirs)
    header = len(safetensors_header(None, specs, {"format": "pt"}))
    assert len(specs) == release.diffusers_tensors
    assert header + 4 * elements(theirs) == release.diffusers_bytes  # to the byte what LISTED sizes are


@pytest.mark.parametrize("name", SIGMA)
def test_table_of_sigma_configs(name):
    config = DITS[name].config
    side = {"256x256": 32, "512-MS": 64, "1024-MS": 128, "2K-MS": 256}[name.removeprefix("PixArt-Sigma-XL-2-")]
    assert (config.depth, config.num_heads, config.hidden_size, config.caption_channels) == (28, 16, 1152, 4096)
    assert (config.input_size, config.pe_interpolation, config.base_size) == (side, side / 64, side // 2)
    assert config.model_max_length == 300 and not config.micro_condition and DITS[name].scaling_factor == 0.13025


def test_table_of_text_encoder_and_vae():
    t5, vae = shapes_of(T5Encoder, T5Config()), shapes_of(VAE, VAEConfig())
    assert (len(t5), elements(t5), 4 * elements(t5)) == (
        released.T5_TENSORS,
        released.T5_PARAMETERS,
        released.T5_BYTES,
    )
    assert (len(vae), elements(vae)) == (released.VAE_TENSORS, released.VAE_PARAMETERS)
    header = len(safetensors_header(None, as_saved(vae), {"format": "pt"}))
    assert header + 4 * elements(vae) == released.VAE_BYTES


@pytest.mark.parametrize("name", DITS)
def test_official_file_needs_no_flags(xl, name, tmp_path):
    release = DITS[name]
    position = release.config.base_size, release.config.pe_interpolation
    path = sparse(tmp_path / f"{name}.safetensors", official_shapes(xl, release), position=position)
    pending = open_dit(path)
    assert pending.config == release.config
    assert sorted(pending.tensors.dropped) == sorted(official_shapes(xl, release).keys() - xl[True].keys())


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("name", SIGMA)
def test_diffusers_file_alone_needs_no_flags(xl, name, dtype, tmp_path):
    """Renamed by hand, without its config.json: only the name tells of the resolution."""
    path = sparse(tmp_path / f"{name}.safetensors", in_diffusers_names(xl[False]), dtype)
    assert open_dit(path).config == preset(name)
    assert open_dit(path, input_size=32).config.pe_interpolation == 0.5  # flags win, and the rule follows them
    path.rename(tmp_path / "other.safetensors")
    with pytest.raises(MindSigmaError, match="does not tell input_size and pe_interpolation"):
        open_dit(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("place", "known"),
    [
        ("PixArt-Sigma-XL-2-512-MS.pth", True),
        ("PixArt-Sigma-XL-2-512-MS/transformer/diffusion_pytorch_model.safetensors", True),
        ("models--PixArt-alpha--PixArt-Sigma-XL-2-512-MS/snapshots/0/transformer/a.safetensors", True),
        ("models--someone--PixArt-Sigma-XL-2-512-MS/snapshots/0/transformer/a.safetensors", False),
        ("PixArt-Sigma-XL-2-512-MS/transformer", True),
        ("PixArt-Sigma-XL-2-512-MS", True),
        ("PixArt-Sigma-XL-2-512-MS/epoch_1_step_100.pth", False),
        ("PixArt-Sigma-XL-2-512-MS-mine.pth", False),
        ("pixart_sigma_sdxlvae_T5_diffusers/a.safetensors", False),
    ],
)
def test_what_is_taken_for_a_release(place, known, tmp_path):
    path = tmp_path / place
    if path.suffix in (".pth", ".safetensors"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    else:
        path.mkdir(parents=True)
    assert release_of(path) is (DITS["PixArt-Sigma-XL-2-512-MS"] if known else None)


def test_contradictions_and_cut_files_are_named(xl, tmp_path):
    wrong = tmp_path / "PixArt-Sigma-XL-2-1024-MS.safetensors"
    sparse(wrong, official_shapes(xl, DITS["PixArt-Sigma-XL-2-512-MS"]), position=(32, 1.0))
    with pytest.raises(MindSigmaError, match="1024-MS of input_size 128, but its tensors tell 64"):
        open_dit(wrong)
    assert open_dit(wrong, input_size=64, pe_interpolation=1.0).config == preset("PixArt-Sigma-XL-2-512-MS")
    fewer = {name: shape for name, shape in xl[False].items() if not name.startswith("blocks.27.mlp")}
    sparse(wrong, fewer)
    with pytest.raises(MindSigmaError, match="1024-MS, which has 435 weights, but holds 431; download it again"):
        open_dit(wrong)
    sparse(wrong, in_diffusers_names(xl[False]))
    with open(wrong, "r+b") as file:
        file.truncate(2_000_000_000)
    with pytest.raises(MindSigmaError, match="2,000,000,000 bytes, the released .* 2,443,492,488 in fp32.*complete"):
        open_dit(wrong)
    cut = tmp_path / "PixArt-Sigma-XL-2-256x256.pth"
    cut.write_bytes(official_checkpoint().read_bytes()[:100_000])
    with pytest.raises(MindSigmaError, match="it has 100,000 bytes, the released .* 2,448,339,584"):
        open_dit(cut)
    shutil.copy(official_checkpoint(), cut)
    with pytest.raises(MindSigmaError, match="256x256, which has 435 weights, but holds 135"):
        open_dit(cut)


def test_own_files_may_carry_a_released_name(tmp_path):
    """Their config tells all: a network may have been changed since it was released."""
    folder = tmp_path / "PixArt-Sigma-XL-2-1024-MS" / "dit"
    shutil.copytree(MINI / "dit", folder)
    assert open_dit(folder).config.hidden_size == 288
    assert open_dit(tmp_path / "PixArt-Sigma-XL-2-1024-MS").config.hidden_size == 288


@pytest.mark.parametrize("scale", [None, 0.5])
def test_configs_of_older_diffusers(xl, scale, tmp_path):
    """The class of the time, and 256 px where an open interpolation_scale is not diffusers' 1."""
    folder = tmp_path / "PixArt-Sigma-XL-2-256x256" / "transformer"
    sparse(folder / "diffusion_pytorch_model.safetensors", in_diffusers_names(xl[False]))
    config = {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_single", "num_attention_heads": 16}
    (folder / "config.json").write_text(json.dumps({**config, "sample_size": 32, "interpolation_scale": scale}))
    assert open_dit(folder.parent).config == preset("PixArt-Sigma-XL-2-256x256")
    (folder / "config.json").write_text(json.dumps({**config, "norm_type": "layer_norm"}))
    with pytest.raises(MindSigmaError, match="'Transformer2DModel' is not a PixArt transformer"):
        open_dit(folder.parent)


def test_null_caption_of_older_diffusers_is_kept(tmp_path):
    from test_loading import diffusers_dit

    states = np.arange(7 * 256, dtype=np.float16).reshape(7, 256)
    save_file({**diffusers_dit(), "caption_projection.y_embedding": states}, tmp_path / "dit.safetensors")
    component = open_component(tmp_path / "dit.safetensors", "dit", input_size=32)
    assert component.config.model_max_length == 7 and component.dropped == []
    assert (component.view.read(NULL_CAPTION) == states).all()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function that puts a folder into an offline cache of the hub under an id."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(repository):
        root = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text("0" * 40)
        folder = root / "snapshots" / ("0" * 40)
        folder.mkdir(parents=True)
        return folder

    return put


def test_names_stand_for_hub_ids(xl, hub, tmp_path, monkeypatch):
    """The 512 px folder holds the transformer alone; the rest comes from Sigma's common one."""
    name = "PixArt-Sigma-XL-2-512-MS"
    monkeypatch.chdir(tmp_path)
    folder = hub(f"PixArt-alpha/{name}")
    sparse(folder / "transformer" / "diffusion_pytorch_model.safetensors", in_diffusers_names(xl[False]))
    config = {"_class_name": "PixArtTransformer2DModel", "sample_size": 64, "interpolation_scale": 1}
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    rest = hub(released.SIGMA_COMPONENTS)
    sparse(rest / "vae" / "diffusion_pytorch_model.safetensors", shapes_of(VAE, VAEConfig()))
    sparse(rest / "text_encoder" / "model.safetensors", shapes_of(T5Encoder, T5Config()))
    shutil.copytree(MINI / "tokenizer", rest / "tokenizer")
    assert locate(name) == folder
    for given in (name, f"PixArt-alpha/{name}"):
        pipeline = PixArtSigmaPipeline.from_pretrained(given)
        assert pipeline.default_size == 512
        assert pipeline.components.opened("dit").config == preset(name)
        assert (
            pipeline.components.opened("t5").config == T5Config()
            and pipeline.components.opened("vae").config == VAEConfig()
        )
    assert open_source(name, "dit").components[0].config == preset(name)


def test_an_absent_release_says_what_to_fetch(hub):
    name = "PixArt-Sigma-XL-2-2K-MS"
    with pytest.raises(MindSigmaError) as caught:
        PixArtSigmaPipeline.from_pretrained(name)
    assert "\n" not in str(caught.value)
    fetch = (
        f"hf download PixArt-alpha/{name} --include 'transformer/*' --local-dir models/{name}, then give models/{name}"
    )
    assert fetch in str(caught.value) and f"the same of {released.SIGMA_COMPONENTS}" in str(caught.value)
    with pytest.raises(MindSigmaError, match=f"hf download PixArt-alpha/PixArt-Sigma {name}.pth --local-dir models"):
        open_source(f"{name}.pth")


def test_of_one_component_no_more_is_fetched(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot(repository, allow_patterns, ignore_patterns):
        asked.append(allow_patterns)
        return str(MINI)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert open_source("someone/mini", "vae").components[0].kind == "vae"
    assert asked == [["*.json", "vae/*.json", "vae/*.safetensors", "vae/*.model"]]
    asked.clear()
    assert len(open_source("someone/mini").components) == 3
    assert asked == [["*.json", "*.safetensors", "*.model"]]
    # A repository without subfolders is that one network: its weights were not among the first.
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **k: asked.append(1) or str(MINI / "vae"))
    asked.clear()
    assert open_source("someone/vae", "vae").components[0].kind == "vae" and len(asked) == 2


@pytest.mark.parametrize(
    ("name", "sampler", "steps"),
    [("PixArt-LCM-XL-2-1024-MS", "lcm", 4), ("PixArt-Alpha-DMD-XL-2-512x512", "one-step", 1)],
)
def test_distilled_models_are_sampled_as_they_were_distilled(tmp_path, name, sampler, steps):
    """By name, hub id and folder, unless another sampler is asked for; sigma-mini's weights stand for theirs."""
    assert default_sampler(name) == default_sampler(f"PixArt-alpha/{name}") == sampler
    assert default_sampler("PixArt-Sigma-XL-2-1024-MS") == default_sampler("sigma-mini") == "dpm"
    shutil.copytree(MINI, tmp_path / name)
    pipeline = PixArtSigmaPipeline.from_pretrained(tmp_path / name)
    assert pipeline.sampler == sampler
    call = {"seed": 3, "output_type": "latent", "progress": False}
    drawn = pipeline("a cat", **call).images
    told = {"sampler": sampler, "num_inference_steps": steps, "guidance_scale": 1.0}
    assert (drawn == pipeline("a cat", **call, **told).images).all()
    args = build_parser().parse_args(["a cat", "--model", str(tmp_path / name)])
    assert check(args, 1) == SamplingOptions(**told)
    args = build_parser().parse_args(["a cat", "--model", str(tmp_path / name), "--sampler", "dpm"])
    assert check(args, 1) == SamplingOptions()


def test_a_pickled_transformer_is_fetched(monkeypatch):
    """DMD's repository holds no safetensors file, and no T5."""
    import huggingface_hub

    asked = []

    def snapshot(repository, allow_patterns, ignore_patterns):
        asked.append((repository, allow_patterns))
        return str(MINI)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    PixArtSigmaPipeline.from_pretrained("PixArt-Alpha-DMD-XL-2-512x512")
    assert [repository for repository, _ in asked] == [
        "PixArt-alpha/PixArt-Alpha-DMD-XL-2-512x512",
        released.ALPHA_COMPONENTS,
    ]
    assert "transformer/diffusion_pytorch_model.bin" in asked[0][1] and not any("bin" in one for one in asked[1][1])


def test_listing(monkeypatch, capsys):
    tool = load_tool("convert")
    monkeypatch.setattr(sys, "argv", ["convert.py", "--list"])
    with pytest.raises(SystemExit) as ended:
        tool.main()
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    for release in RELEASES:
        assert release.name in printed and release.repository in printed
    assert "2,447,431,856 bytes (listed)" in printed and "pe_interpolation 0.5" in printed
    assert release_named("PixArt-Sigma-XL-2-4K-MS") is None


def test_mindspore_file_keeps_its_config(tmp_path):
    """MindSpore's own loader reads what is written with the config in it, and drops the texts."""
    import mindspore as ms

    from mindsigma import load_dit
    from mindsigma.conversion.targets import prepare
    from mindsigma.conversion.writing import write

    for kind, part in (("dit", "dit"), ("vae", "vae"), ("t5", "text_encoder")):
        output = prepare(open_component(MINI / part, kind), "mindspore", "fp32")
        path = tmp_path / f"{kind}.ckpt"
        write([output], path, "mindspore")
        assert open_component(path, kind).config == output.component.config
    network = load_dit("sigma-mini")
    for parameter in network.get_parameters():
        parameter.set_data(ms.Tensor(parameter.asnumpy() * 0))
    stored = ms.load_checkpoint(str(tmp_path / "dit.ckpt"))
    assert json.loads(stored["config"])["hidden_size"] == 288
    absent, unused = ms.load_param_into_net(network, stored, strict_load=True)
    assert absent == [] and set(unused) == {name for name, value in stored.items() if isinstance(value, str)}
    weights = load_file(MINI / "dit" / "model.safetensors")
    for parameter in network.get_parameters():
        assert (parameter.asnumpy() == weights[parameter.name].astype(np.float32)).all()
    assert open_checkpoint(tmp_path / "dit.ckpt").metadata["kind"] == "dit"


def test_a_text_cannot_be_called_as_a_tensor_is(tmp_path):
    from mindsigma.weights.formats.mindspore_writer import write_mindspore_ckpt

    spec = TensorSpec("config", np.dtype(np.float32), (1,))
    with pytest.raises(MindSigmaError, match="the text 'config' is called as a tensor is"):
        write_mindspore_ckpt(tmp_path / "a.ckpt", [spec], lambda name: np.zeros(1, np.float32), {"config": "{}"})
    assert list(tmp_path.iterdir()) == []
