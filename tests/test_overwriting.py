"""`--overwrite`: what stands in the way is told before anything is touched; nothing outside of the target ever is."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import load_tool
from hostile.sources import SOURCES

from mindsigma import MindSigmaError, load_dit
from mindsigma.inspect import export
from mindsigma.weights import open_checkpoint
from mindsigma.weights.adapters.adapter_reader import open_adapter
from mindsigma.weights.formats import atomic, safetensors_writer
from mindsigma.weights.formats.exchange import ASIDE
from mindsigma.weights.formats.folder_writer import MARKER, STAGING
from mindsigma.weights.formats.safetensors_writer import write_safetensors
from mindsigma.weights.formats.tensor_stream import TensorSpec
from mindsigma.weights.saving import save_network


def state(folder):
    """dict path -> what is there, links not followed."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else path.lstat().st_mode
        for path in sorted(folder.rglob("*"))
    }


def weights(folder):
    """dict part -> (names, bytes of all weights) of a pipeline."""
    parts = {}
    for part in ("dit", "vae", "text_encoder"):
        source = open_checkpoint(folder / part)
        parts[part] = {name: (str(source.dtype(name)), source.read(name).tobytes()) for name in source.names()}
    return parts


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A pipeline of tiny networks."""
    folder = tmp_path_factory.mktemp("source")
    SOURCES["pipeline"].build(folder)
    return folder / SOURCES["pipeline"].entry


@pytest.fixture(scope="module")
def older(pipeline, convert_tool, tmp_path_factory):
    """What an earlier conversion wrote, in fp32."""
    folder = tmp_path_factory.mktemp("older") / "target"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["convert.py", str(pipeline), str(folder), "--to", "mindspore", "--dtype", "fp32"])
        assert convert_tool.main() == 0
    return folder


@pytest.fixture
def target(older, tmp_path):
    """A copy of it, beside a file that is not to be touched."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "model.safetensors").write_bytes(b"good")
    return Path(shutil.copytree(older, tmp_path / "target"))


def replace_by_link(target, name):
    shutil.rmtree(target / name)
    (target / name).symlink_to(target.parent / "outside")


def replace_by_folder(target, name):
    (target / name).unlink(missing_ok=True)
    (target / name).mkdir()
    (target / name / "mine").write_text("good")


def fifo(target, name):
    (target / name).unlink()
    os.mkfifo(target / name)


OBSTRUCTIONS = {
    "network in a link": (lambda t: replace_by_link(t, "dit"), "target/dit: a link"),
    "last folder a link": (lambda t: replace_by_link(t, "tokenizer"), "target/tokenizer: a link"),
    "network in a file": (
        lambda t: (shutil.rmtree(t / "vae"), (t / "vae").write_text("x")),
        "target/vae: is not a folder",
    ),
    "weights a folder": (lambda t: replace_by_folder(t, "vae/model.safetensors"), "is a folder where a file"),
    "config a folder": (lambda t: replace_by_folder(t, "text_encoder/config.json"), "is a folder where a file"),
    "stale index a folder": (
        lambda t: replace_by_folder(t, "dit/model.safetensors.index.json"),
        "is a folder where a file",
    ),
    "stale shard a folder": (
        lambda t: replace_by_folder(t, "dit/model-00001-of-00007.safetensors"),
        "is a folder where a file",
    ),
    "weights a FIFO": (lambda t: fifo(t, "vae/model.safetensors"), "no regular file"),
    "staging a link": (lambda t: (t / STAGING).symlink_to(t.parent / "outside"), "no folder of a conversion"),
    "aside a link": (lambda t: (t / ASIDE).symlink_to(t.parent / "outside"), "no folder of a conversion"),
}


@pytest.mark.parametrize("case", OBSTRUCTIONS)
def test_an_obstruction_is_told_beforehand(convert, target, pipeline, case):
    make, words = OBSTRUCTIONS[case]
    make(target)
    before = state(target.parent)
    for more in (["--dry-run"], []):
        with pytest.raises(MindSigmaError, match=words):
            convert(pipeline, target, "--to", "mindspore", "--dtype", "fp16", "--overwrite", *more)
        assert state(target.parent) == before


def test_another_device_is_told_beforehand(convert, target, pipeline, monkeypatch):
    real = os.lstat

    def elsewhere(path, **options):
        found = real(path, **options)
        return os.stat_result([*found[:2], found.st_dev + 1, *found[3:]]) if str(path).endswith("/vae") else found

    monkeypatch.setattr("mindsigma.weights.formats.exchange.os.lstat", elsewhere)
    before = state(target)
    with pytest.raises(MindSigmaError, match="target/vae: lies on another device"):
        convert(pipeline, target, "--to", "mindspore", "--dtype", "fp16", "--overwrite")
    assert state(target) == before


def test_a_folder_without_permission_is_told_beforehand(convert, target, pipeline, monkeypatch):
    allowed = os.access
    monkeypatch.setattr("os.access", lambda path, mode: not str(path).endswith("/dit") and allowed(path, mode))
    before = state(target)
    for more in (["--dry-run"], []):
        with pytest.raises(MindSigmaError, match="target/dit: cannot be written .Permission denied"):
            convert(pipeline, target, "--to", "mindspore", "--dtype", "fp16", "--overwrite", *more)
        assert state(target) == before


def test_links_to_files_are_replaced_themselves(convert, target, pipeline):
    """What they lead to stays, also where an index of the old names files outside."""
    outside = target.parent / "outside"
    (target / "dit" / "model.safetensors").unlink()
    (target / "dit" / "model.safetensors").symlink_to(outside / "model.safetensors")
    (target / "dit" / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../../outside/model.safetensors"}}'
    )
    (target / "vae" / "config.json").unlink()
    (target / "vae" / "config.json").symlink_to("nowhere")
    convert(pipeline, target, "--to", "mindspore", "--dtype", "fp16", "--overwrite", "--verify")
    assert state(outside) == {"model.safetensors": b"good"}
    assert not any(path.is_symlink() for path in target.rglob("*"))
    assert not list(target.rglob("*.index.json")) and not [path for path in target.iterdir() if path.name[0] == "."]


def test_a_target_that_is_a_link(convert, target, pipeline):
    """A folder that it leads to is the target; one file is put in the place of the link."""
    link = target.parent / "link"
    link.symlink_to(target)
    convert(pipeline, link, "--to", "mindspore", "--dtype", "fp16", "--overwrite", "--verify")
    assert link.is_symlink() and {kind for kind, _ in weights(target)["dit"].values()} == {"float16"}
    file = target.parent / "dit.ckpt"
    file.symlink_to(target.parent / "outside" / "model.safetensors")
    with pytest.raises(MindSigmaError, match="exists"):
        convert(pipeline, file, "--to", "mindspore", "--component", "dit")
    convert(pipeline, file, "--to", "mindspore", "--component", "dit", "--overwrite")
    assert not file.is_symlink() and (target.parent / "outside" / "model.safetensors").read_bytes() == b"good"
    for dangling in ("folder", "file.ckpt"):
        (target.parent / dangling).symlink_to("nowhere")
        with pytest.raises(MindSigmaError, match="leads nowhere|exists"):
            convert(pipeline, target.parent / dangling, "--to", "mindspore", "--component", "dit")
        assert (target.parent / dangling).is_symlink()


def test_a_source_in_the_target_or_the_other_way_round(convert, target, pipeline):
    shutil.copytree(pipeline, target.parent / "source")
    source = target.parent / "source"
    shutil.copy(next((source / "vae").glob("*.safetensors")), target / "vae.safetensors")
    shutil.copy(source / "vae" / "config.json", target / "config.json")
    (target.parent / "linked").mkdir()
    for name in ("vae.safetensors", "config.json"):
        (target.parent / "linked" / name).symlink_to(target / name)
    before = state(target.parent)
    for origin, place in (
        (source, source / "vae" / "out"),
        (source / "vae", source),
        (target / "vae.safetensors", target),
        (target / "dit", target),
        (target, target),
    ):
        with pytest.raises(MindSigmaError, match="is the source, or they lie in each other"):
            convert(origin, place, "--to", "mindspore", "--overwrite")
        assert state(target.parent) == before
    with pytest.raises(MindSigmaError, match="a symlink out of its folder|which is read"):
        convert(target.parent / "linked", target, "--to", "mindspore", "--overwrite")
    assert state(target.parent) == before


@pytest.mark.parametrize("call", ["replace", "fsync", "write"])
def test_an_error_on_the_way_leaves_the_old(convert, target, pipeline, monkeypatch, call):
    """A full disk, an input/output error: the old pipeline is as it was, bit for bit."""
    before, count = state(target), [0]
    failing = {"replace": (20, 22, 25), "fsync": (9, 12, 14), "write": (3, 150)}[call]
    name = "mindsigma.weights.formats.safetensors_writer.write_pieces" if call == "write" else f"os.{call}"
    real = safetensors_writer.write_pieces if call == "write" else getattr(os, call)

    def fails(*arguments):
        count[0] += 1
        if count[0] == fails.at:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    for fails.at in failing:
        count[0] = 0
        with monkeypatch.context() as patch:
            patch.setattr(name, fails)
            with pytest.raises(MindSigmaError, match="No space left on device"):
                convert(pipeline, target, "--to", "mindspore", "--dtype", "fp16", "--overwrite")
        assert state(target) == before, fails.at


FIRST_NOTES = {
    "a marker cut short": lambda t: (t / STAGING / MARKER).write_text("3f2"),
    "an empty staging folder": lambda t: None,
    "a partial marker": lambda t: (t / STAGING / f".{MARKER}.4711.part").write_text("3f"),
    "a marker of older versions": lambda t: (t / MARKER).write_text(""),
    "weights of another run": lambda t: (
        (t / STAGING / MARKER).write_text("0" * 64),
        (t / STAGING / "dit").mkdir(),
        (t / STAGING / "dit" / "model-00001-of-00002.safetensors").write_bytes(b"x"),
    ),
    "a partial file": lambda t: (t / ".config.json.4711.part").write_text("{"),
}


@pytest.mark.parametrize("case", FIRST_NOTES)
def test_a_killed_first_write_is_gone_on_with(convert, pipeline, tmp_path, monkeypatch, case):
    monkeypatch.setattr(atomic, "_running", lambda pid: pid != 4711)
    target = tmp_path / "target"
    (target / STAGING).mkdir(parents=True)
    FIRST_NOTES[case](target)
    convert(pipeline, target, "--to", "mindspore", "--dry-run")
    convert(pipeline, target, "--to", "mindspore", "--verify")
    assert not [path for path in target.rglob("*") if path.name.startswith(".")]
    with pytest.raises(MindSigmaError, match="is not empty"):
        convert(pipeline, target, "--to", "mindspore")


REFUSED = {
    "not empty": (("target", "--to", "mindspore"), "is not empty"),
    "a file there": (("target/dit/config.json/x", "--to", "mindspore"), "cannot be written"),
    "several into one file": (("x.ckpt", "--to", "mindspore"), "one file holds one network"),
    "a folder that is absent": (("no/x.ckpt", "--to", "mindspore", "--component", "dit"), "No such file"),
    "a file that is a folder": (
        ("target.ckpt", "--to", "mindspore", "--component", "dit", "--overwrite"),
        "is a folder",
    ),
    "another suffix": (("x", "--to", "official", "--component", "dit"), "writes .pth"),
    "weights of another stem": (
        ("target", "--to", "diffusers", "--component", "dit", "--overwrite"),
        "would stand beside",
    ),
    "another layout": (("target", "--to", "diffusers", "--overwrite"), "target/dit: would be read instead"),
    "one network beside all": (
        ("target", "--to", "mindspore", "--component", "vae", "--overwrite"),
        "target/vae: would be read instead",
    ),
    "no number of bytes": (("x", "--to", "mindspore", "--shard-size", "nan"), "--shard-size"),
    "no end of bytes": (("x", "--to", "mindspore", "--shard-size", "inf"), "--shard-size"),
    "no scale": (("x", "--to", "mindspore", "--vae-scaling-factor", "nan"), "--vae-scaling-factor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_dry_run_refuses_what_the_run_refuses(convert, target, pipeline, monkeypatch, case):
    arguments, words = REFUSED[case]
    monkeypatch.chdir(target.parent)
    (target.parent / "target.ckpt").mkdir()
    if case == "weights of another stem":
        shutil.rmtree(target / "dit")
        (target / "model.safetensors").write_bytes(b"x")
    before, told = state(target.parent), []
    for more in (["--dry-run"], []):
        with pytest.raises(MindSigmaError, match=words) as caught:
            convert(pipeline, *arguments, *more)
        told.append(str(caught.value))
        assert state(target.parent) == before
    assert told[0] == told[1]


class Failing:
    """os.replace that fails once, at the call `at`."""

    def __init__(self, at, real=os.replace):
        self.at, self.real, self.count = at, real, 0

    def __call__(self, source, target):
        self.count += 1
        if self.count == self.at:
            raise OSError(5, "Input/output error")
        self.real(source, target)


def every_failure_leaves(folder, write, monkeypatch, least):
    """Let each rename of `write` fail in turn: the folder stays as it is, until none is left that could."""
    before, failing = state(folder), Failing(0)
    while failing.count >= failing.at:
        failing = Failing(failing.at + 1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", failing)
            try:
                write()
            except MindSigmaError as error:
                assert "Input/output error" in str(error)
                assert state(folder) == before, failing.at
    assert failing.at > least and state(folder) != before


def test_a_saved_network_replaces_all_of_the_old_or_nothing(pipeline, tmp_path, monkeypatch):
    dit = load_dit(pipeline)
    folder = tmp_path / "dit"
    SOURCES["shards"].build(folder)
    shards = sorted(folder.glob("*-of-*.safetensors")) + list(folder.glob("*.index.json"))
    for file in shards:  # as an older checkpoint of the same stem
        file.rename(folder / file.name.replace("diffusion_pytorch_model", "model"))
    every_failure_leaves(folder, lambda: save_network(dit, folder, "fp32"), monkeypatch, 6)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert load_dit(folder).config == dit.config


def test_a_translated_adapter_replaces_all_of_the_old_or_nothing(convert, tmp_path, monkeypatch):
    arrays = {"blocks.0.mlp.fc1.lora_A.weight": np.ones((2, 72)), "blocks.0.mlp.fc1.lora_B.weight": np.ones((288, 2))}
    specs = [TensorSpec(name, np.dtype(np.float32), array.shape) for name, array in arrays.items()]
    for name, factor in (("one", 1), ("two", 2)):
        file = tmp_path / f"{name}.safetensors"
        write_safetensors(file, specs, lambda key, factor=factor: (arrays[key] * factor).astype(np.float32))
    convert(tmp_path / "one.safetensors", tmp_path / "peft", "--to", "peft")
    again = (tmp_path / "two.safetensors", tmp_path / "peft", "--to", "peft", "--overwrite")
    every_failure_leaves(tmp_path / "peft", lambda: convert(*again), monkeypatch, 5)
    assert (open_adapter(tmp_path / "peft").adapter.entries["blocks.0.mlp.fc1"].a == 2).all()
    for more in (["--dry-run"], []):
        with pytest.raises(MindSigmaError, match="is not empty"):
            convert(*again[:-1], *more)


def test_an_exported_graph_replaces_all_of_the_old_or_nothing(tmp_path, monkeypatch):
    def write():
        shutil.rmtree(tmp_path / "made", ignore_errors=True)
        for folder, text in ((tmp_path / "made", "new"), (tmp_path / "out", "old")):
            (folder / "g_variables").mkdir(parents=True, exist_ok=True)
            if text == "new" or not (folder / "g_graph.mindir").exists():
                (folder / "g_graph.mindir").write_text(text)
                (folder / "g_variables" / "data_0").write_text(text)
        export._move(tmp_path / "made", tmp_path / "out" / "g.mindir")

    write()
    (tmp_path / "out" / "g_variables" / "data_0").write_text("old")
    every_failure_leaves(tmp_path / "out", write, monkeypatch, 4)
    assert (tmp_path / "out" / "g_variables" / "data_0").read_text() == "new"


def test_a_picture_is_not_put_where_a_folder_is(tmp_path):
    (tmp_path / "out.png").mkdir()
    with pytest.raises(MindSigmaError, match=r"--out .*out.png: is a folder"):
        load_tool("generate").make_folder(tmp_path / "out.png")
