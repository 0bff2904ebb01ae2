"""Small real checkpoints in every format the translator reads; drawn weights, a few dozen kilobytes each."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Callable, NamedTuple, Tuple

import ml_dtypes
import numpy as np
from mindspore.nn.utils import no_init_parameters

from hostile.encoding import Call, Name, Ref, write_zip
from mindsigma.conversion.foreign_configs import MODEL_INDEX, diffusers_config
from mindsigma.models.dit import DiT, DiTConfig
from mindsigma.models.t5 import T5Config, T5Encoder
from mindsigma.models.vae import VAE
from mindsigma.models.vae_config import VAEConfig
from mindsigma.weights.formats.mindspore_writer import write_mindspore_ckpt
from mindsigma.weights.formats.reader import TensorSource
from mindsigma.weights.formats.safetensors_shards import write_sharded_safetensors
from mindsigma.weights.formats.safetensors_writer import write_safetensors
from mindsigma.weights.formats.tensor_stream import TensorSpec
from mindsigma.weights.formats.torch_writer import write_torch
from mindsigma.weights.locate import BUNDLED
from mindsigma.weights.names.dit_names import DIFFUSERS, NULL_CAPTION
from mindsigma.weights.names.vae_names import DIFFUSERS_OLD
from mindsigma.weights.names.views import Foreign
from mindsigma.weights.saving import FORMAT, stored_config

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SIDE = {"num_heads": 1, "input_size": 8, "pe_interpolation": 0.125}
DIT = DiTConfig(hidden_size=72, depth=2, caption_channels=16, model_max_length=6, **SIDE)
COMPRESSED = DIT.override(kv_compression="conv:2:1", qk_norm=True)
VAE_SHAPE = VAEConfig(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2)
T5 = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
CELLS = {"dit": DiT, "vae": VAE, "t5": T5Encoder}
BARE = ("--input-size=8", "--num-heads=1")  # what a file with diffusers' names, or a .ckpt, does not tell


class Source(NamedTuple):
    """How to build a checkpoint.

    Attributes:
        build: writes it below a folder (Path).
        entry: what is to be converted, relative to that folder.
        files: what it consists of.
        targets: formats that it can be converted to, with the name of the result.
        flags: options that the conversion needs.
    """

    build: Callable
    entry: str
    files: Tuple[str, ...]
    targets: Tuple[Tuple[str, str], ...]
    flags: Tuple[str, ...] = ()


def kind_of_file(name):
    """Which mutations suit a file, told by its name."""
    for kind, endings in {
        "index": (".index.json",),
        "config": ("config.json",),
        "safetensors": (".safetensors",),
        "torch": (".pth", ".bin", ".pt"),
        "mindspore": (".ckpt",),
        "tokenizer": ("tokenizer.json",),
    }.items():
        if name.endswith(endings):
            return kind
    return "other"


def drawn(kind, config, dtype=np.float32):
    """dict name -> array under our names."""
    with no_init_parameters():
        shapes = {p.name: tuple(p.shape) for p in CELLS[kind](config).get_parameters()}
    rng = np.random.default_rng(1)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def specs(arrays):
    """TensorSpecs of arrays."""
    return [TensorSpec(name, array.dtype, array.shape) for name, array in arrays.items()]


def official(config=DIT, dtype=np.float32):
    """Tensors of an official checkpoint, buffers included."""
    from mindsigma.models.embeddings import position_embedding

    arrays = drawn("dit", config, dtype)
    side = config.base_size
    arrays["pos_embed"] = position_embedding(side, side, config.hidden_size, side, config.pe_interpolation)
    arrays[NULL_CAPTION] = np.ones((config.model_max_length, config.caption_channels), dtype)
    return {name: array.astype(dtype) for name, array in arrays.items()}


def foreign(arrays, table):
    """The same under the names of a rule table."""
    view = Foreign(TensorSource("drawn", arrays), table)
    return {name: view.read(name) for name in view.names()}


def folder_of(kind, config, stem="model", table=None, shards=None, ours=True):
    """A builder of config.json and weights: ours, or diffusers', whose DiT has other names."""

    def build(folder):
        folder.mkdir(parents=True, exist_ok=True)
        about = stored_config(CELLS[kind].__name__, config) if ours else diffusers_config(kind, config)
        (folder / "config.json").write_text(json.dumps(about))
        arrays = drawn(kind, config, np.float16)
        arrays = foreign(arrays, table) if table else arrays
        metadata = {**FORMAT, "config": json.dumps(about)} if ours else {"format": "pt"}
        write_sharded_safetensors(folder, stem, specs(arrays), arrays.__getitem__, metadata, shards or 10**9)

    return build


def _official_pth(folder):
    arrays = official(dtype=np.float16)
    write_torch(folder / "dit.pth", specs(arrays), arrays.__getitem__)


def _flat_pth(folder):
    arrays = official(COMPRESSED)
    arrays = {f"module.{name}": array for name, array in arrays.items()}
    write_torch(folder / "flat.pth", specs(arrays), arrays.__getitem__, flat=True)


def _training_pth(folder):
    """What the official trainer saves: weights, averaged weights, optimizer, scheduler."""
    arrays = official()
    storages, tensors = {}, {}
    for key, (name, array) in enumerate(arrays.items()):
        steps = [stride // array.itemsize for stride in np.ascontiguousarray(array).strides]
        storage = Ref(("storage", Name("torch.FloatStorage"), str(key), "cpu", array.size))
        view = (storage, 0, array.shape, tuple(steps), False, Call("collections.OrderedDict"))
        tensors[name] = Call("torch._utils._rebuild_tensor_v2", *view)
        storages[str(key)] = array.tobytes()
    state = {"state": {0: {"step": 3, "exp_avg": next(iter(tensors.values()))}}, "param_groups": [{"lr": 1e-4}]}
    saved = {"state_dict": tensors, "state_dict_ema": tensors, "optimizer": state, "epoch": 3}
    write_zip(folder / "training.pth", saved, storages)


def _diffusers_bin(folder):
    arrays = foreign(drawn("dit", DIT), DIFFUSERS)
    (folder / "config.json").write_text(json.dumps(diffusers_config("dit", DIT)))
    write_torch(folder / "diffusion_pytorch_model.bin", specs(arrays), arrays.__getitem__, flat=True)


def _safetensors(folder):
    arrays = official(dtype=np.dtype(ml_dtypes.bfloat16))
    write_safetensors(folder / "dit.safetensors", specs(arrays), arrays.__getitem__)


def _ckpt(folder):
    arrays = drawn("dit", DIT)
    write_mindspore_ckpt(folder / "dit.ckpt", specs(arrays), arrays.__getitem__)


def _old_vae(folder):
    arrays = foreign(drawn("vae", VAE_SHAPE), DIFFUSERS_OLD)
    (folder / "config.json").write_text(json.dumps(diffusers_config("vae", VAE_SHAPE)))
    write_torch(folder / "diffusion_pytorch_model.bin", specs(arrays), arrays.__getitem__, flat=True)


def _whole_t5(folder):
    """A T5 file without config, with the tied embedding and a decoder beside the encoder."""
    arrays = drawn("t5", T5)
    arrays["encoder.embed_tokens.weight"] = arrays["shared.weight"]
    arrays["lm_head.weight"] = arrays["shared.weight"]
    arrays["decoder.block.0.layer.0.SelfAttention.q.weight"] = np.ones((16, 16), np.float32)
    write_torch(folder / "pytorch_model.bin", specs(arrays), arrays.__getitem__, flat=True)


def _small_tokenizer():
    """The text of a tokenizer.json: the golden one's first pieces."""
    document = json.loads(gzip.decompress((GOLDEN / "tokenizer_t5.json.gz").read_bytes()))
    del document["model"]["vocab"][T5.vocab_size :]
    document["added_tokens"] = [token for token in document["added_tokens"] if token["id"] < T5.vocab_size]
    return json.dumps(document)


def _pipeline(ours, tokenizer="spiece.model"):
    def build(folder):
        stem = "model" if ours else "diffusion_pytorch_model"
        folder_of("dit", DIT, stem, None if ours else DIFFUSERS, ours=ours)(folder / ("dit" if ours else "transformer"))
        folder_of("vae", VAE_SHAPE, stem, ours=ours)(folder / "vae")
        folder_of("t5", T5, ours=ours)(folder / "text_encoder")
        (folder / "tokenizer").mkdir()
        if tokenizer == "spiece.model":
            shutil.copy(BUNDLED / "sigma-mini" / "tokenizer" / tokenizer, folder / "tokenizer")
        else:
            (folder / "tokenizer" / tokenizer).write_text(_small_tokenizer())
        (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX))

    return build


FILES = (("mindspore", "out"), ("mindspore", "out.safetensors"), ("mindspore", "out.ckpt"))
ALL = (*FILES, ("diffusers", "out"), ("official", "out.pth"))
FOLDERS = (("mindspore", "out"), ("diffusers", "out"))
WEIGHTS = ("config.json", "model.safetensors")

SOURCES = {
    "official": Source(_official_pth, "dit.pth", ("dit.pth",), ALL),
    "flat": Source(_flat_pth, "flat.pth", ("flat.pth",), (*FILES, ("official", "out.pth")), ("--num-heads=1",)),
    "training": Source(_training_pth, "training.pth", ("training.pth",), ALL),
    "averaged": Source(_training_pth, "training.pth", ("training.pth",), ALL, ("--ema",)),
    "safetensors": Source(_safetensors, "dit.safetensors", ("dit.safetensors",), ALL),
    "ckpt": Source(_ckpt, "dit.ckpt", ("dit.ckpt",), ALL, BARE),
    "ours": Source(folder_of("dit", COMPRESSED), ".", WEIGHTS, (*FILES, ("official", "out.pth"))),
    "diffusers": Source(folder_of("dit", DIT, "diffusion_pytorch_model", DIFFUSERS, ours=False), ".", WEIGHTS, ALL),
    "diffusers bin": Source(_diffusers_bin, ".", ("config.json", "diffusion_pytorch_model.bin"), ALL),
    "shards": Source(
        folder_of("dit", DIT, "diffusion_pytorch_model", DIFFUSERS, 200_000, ours=False),
        ".",
        (*WEIGHTS, "diffusion_pytorch_model.safetensors.index.json"),
        ALL,
    ),
    "vae": Source(folder_of("vae", VAE_SHAPE), ".", WEIGHTS, FOLDERS),
    "old vae": Source(_old_vae, ".", ("config.json", "diffusion_pytorch_model.bin"), FOLDERS),
    "t5": Source(folder_of("t5", T5), ".", WEIGHTS, FOLDERS),
    "whole t5": Source(_whole_t5, "pytorch_model.bin", ("pytorch_model.bin",), FOLDERS),
    "pipeline": Source(_pipeline(True), ".", (*WEIGHTS, "spiece.model"), FOLDERS),
    "diffusers pipeline": Source(_pipeline(False), ".", (*WEIGHTS, "spiece.model"), FOLDERS),
    "newer pipeline": Source(_pipeline(False, "tokenizer.json"), ".", (*WEIGHTS, "tokenizer.json"), FOLDERS),
}


def build_all(folder):
    """Write every source below `folder` (Path)."""
    for name, source in SOURCES.items():
        (folder / name).mkdir(parents=True)
        source.build(folder / name)
