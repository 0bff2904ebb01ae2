"""Small real data sets, features, runs, options and adapters, which hostile/data_changes.py makes hostile."""

import csv
import io
import json
import shutil
import sys
import tarfile
from typing import Callable, NamedTuple, Tuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor
from PIL import Image
from training_runs import square_features, tiny_dit

from mindsigma.commands import convert
from mindsigma.data import FeatureSet
from mindsigma.data.feature_shards import Translation
from mindsigma.data.index_building import Building
from mindsigma.distributed import Collectives, Ranks
from mindsigma.training.checkpoints import Contents, RunCheckpoints
from mindsigma.training.learner import WholeLearner
from mindsigma.weights.adapters.adapter_file import Adapter, Entry, write_adapter


class DataSource(NamedTuple):
    """How to build something that a tool reads.

    Attributes:
        build: writes it below a folder (Path).
        entry: what the tool is given, relative to that folder.
        tool: what reads it (hostile/worker.py).
        arguments: of the tool, after the entry.
    """

    build: Callable
    entry: str
    tool: str
    arguments: Tuple[str, ...] = ()


def image(i, kind="PNG"):
    """Bytes of a small picture."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (40 + i, 60, 3), np.uint8)).save(file, kind)
    return file.getvalue()


def _images(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(4):
        (folder / f"{i}.png").write_bytes(image(i))
    return [{"path": f"{i}.png", "prompt": f"a {i}", "height": 40 + i, "width": 60} for i in range(4)]


def _folder(folder):
    for row in _images(folder):
        (folder / row["path"]).with_suffix(".txt").write_text(row["prompt"])


def _official(folder):
    rows = _images(folder / "InternImgs")
    (folder / "InternData").mkdir()
    (folder / "InternData" / "data_info.json").write_text(json.dumps(rows))


def _jsonl(folder):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _images(folder)))


def _csv(folder):
    rows = _images(folder)
    with open(folder / "rows.csv", "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def _shards(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as file:
            for i in range(2):
                for suffix, data in (("jpg", image(i, "JPEG")), ("txt", b"a caption"), ("json", b'{"prompt": "b"}')):
                    info = tarfile.TarInfo(f"{shard}{i}.{suffix}")
                    info.size = len(data)
                    file.addfile(info, io.BytesIO(data))


def _index(folder):
    _shards(folder / "data")
    Building(folder / "data", folder / "index").run()


def _feature_shards(folder):
    square_features(folder.with_name("one-file"), 4)
    Translation(FeatureSet(folder.with_name("one-file")), folder, 2).run()
    shutil.rmtree(folder.with_name("one-file"))


def contents():
    """What a run is restored into."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    learner = WholeLearner(tiny_dit(hidden_size=8, depth=1), np.zeros((8, 256), np.float32))
    means = {name: Parameter(Tensor(value)) for name, value in learner.named.items()}
    states = {f"m:{name}": Parameter(Tensor(value)) for name, value in learner.named.items()}
    states["controls"] = Parameter(Tensor(np.ones(7, np.float32)))
    return Contents({learner.product: (learner, None), learner.average: (learner, means)}, states)


def _run(folder):
    kept = RunCheckpoints(folder / "checkpoints", 3, Collectives(Ranks()))
    whole = contents()
    for step in (1, 2):
        kept.save(step, whole, {"identity": {"seed": 1, "data": "x"}, "ranks": 1, "validation_loss": 0.5})
    lines = [{"step": step, "loss": 1.0 / step} for step in (1, 2)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _options(folder):
    folder.mkdir(parents=True, exist_ok=True)
    text = "steps: 8\nlearning-rate: 1e-4\ndata: photos\noutput: run\nprompts: [a dog, 'a cat']\nmulti-scale: true\n"
    (folder / "options.yaml").write_text(text)


def _adapter(folder):
    random = np.random.default_rng(3)
    entries = {}
    for name, (out, inner) in {"blocks.0.attn.proj": (16, 16), "blocks.1.mlp.fc1": (64, 16)}.items():
        a, b = random.standard_normal((2, inner), np.float32), random.standard_normal((out, 2), np.float32)
        entries[name] = Entry(a, b, 2.0, 1.0)
    folder.mkdir(parents=True, exist_ok=True)
    write_adapter(folder / "style.safetensors", Adapter(entries))


def _converted(to, name):
    def build(folder):
        _adapter(folder)
        kept, sys.argv = sys.argv, ["convert.py", str(folder / "style.safetensors"), str(folder / name), "--to", to]
        try:
            assert convert.main() == 0
        finally:
            sys.argv = kept
        (folder / "style.safetensors").unlink()

    return build


CHECK = ("--check", "--threads=1")

DATA_SOURCES = {
    "folder": DataSource(_folder, ".", "prepare_data", CHECK),
    "official": DataSource(_official, ".", "prepare_data", CHECK),
    "jsonl": DataSource(_jsonl, ".", "prepare_data", CHECK),
    "csv": DataSource(_csv, "rows.csv", "prepare_data", CHECK),
    "shards": DataSource(_shards, ".", "prepare_data", CHECK),
    "features": DataSource(
        lambda folder: square_features(folder, 4), ".", "prepare_data", ("--benchmark=1", "--threads=1")
    ),
    "index": DataSource(_index, "index", "prepare_data", ("--threads=1",)),
    "feature-shards": DataSource(_feature_shards, ".", "prepare_data", ("--benchmark=1", "--check", "--threads=1")),
    "run": DataSource(_run, ".", "resume"),
    "options": DataSource(_options, "options.yaml", "options"),
    "adapter": DataSource(_adapter, "style.safetensors", "convert", ("hostile_out", "--to=peft", "--verify")),
    "peft": DataSource(_converted("peft", "style"), "style", "convert", ("hostile_out.safetensors", "--to=mindspore")),
    "kohya": DataSource(
        _converted("kohya", "style-kohya.safetensors"),
        "style-kohya.safetensors",
        "convert",
        ("hostile_out", "--to=peft"),
    ),
}


def build_data(folder):
    """Write every source below `folder` (Path)."""
    for name, source in DATA_SOURCES.items():
        source.build(folder / name)
