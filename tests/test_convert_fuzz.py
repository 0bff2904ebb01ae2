"""Hostile checkpoints: every run of the translator ends well, or in one line with everything as it was before."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_convert import GIVEN, Driver, error_lines, snapshot
from hostile import Case, cases, make, mutations_of, selection
from hostile.sources import SOURCES, specs

from mindsigma.weights import open_checkpoint
from mindsigma.weights.formats.safetensors_writer import write_safetensors

ROOT = Path(__file__).parents[1]
PRIVILEGED = os.geteuid() == 0 and shutil.which("setpriv")
SEED, COUNT, PARTS = 1, 584, 8


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with Driver(tmp_path_factory.mktemp("fuzz")) as driver:
        yield driver


def test_corpus_is_large_and_reproducible(driver, tmp_path):
    """Thousands of cases; the selection that runs here has every mutation, and the same bytes each time."""
    everything, chosen = cases(SEED), selection(SEED, COUNT)
    assert len(set(everything)) == len(everything) > 3500
    assert len(set(chosen)) == COUNT >= 500
    assert {case.mutation for case in chosen} == {case.mutation for case in everything}
    assert {case.source for case in chosen} == set(SOURCES)
    for case in chosen[::40]:
        seen = []
        for _ in range(2):
            make(case, driver.pristine, tmp_path / GIVEN)
            seen.append({name: what[:3] for name, what in snapshot(tmp_path).items()})
            for path in tmp_path.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert seen[0] == seen[1]


def test_every_table_of_mutations_is_used():
    """A source whose files no mutation suits would make the corpus smaller without a word."""
    for source in SOURCES:
        kinds = {name.partition(":")[0] for name in mutations_of(source)}
        assert {"blind", "tree"} < kinds, source


@pytest.mark.parametrize("source", SOURCES)
def test_sound_sources_are_translated(driver, source):
    """Else nothing would be learnt from what the mutations do."""
    for seed in range(3):
        driver.codes.clear()
        assert driver.judge(Case(source, "", seed)) == []
        assert driver.codes == {0: 1}


@pytest.mark.parametrize("part", range(PARTS))
def test_hostile_checkpoints(driver, part):
    """Exit 0 and a result that reads back, or exit 2 and one line; nothing run, nothing left, nothing overwritten."""
    driver.codes.clear()
    broken = {str(case): problems for case in selection(SEED, COUNT)[part::PARTS] if (problems := driver.judge(case))}
    assert broken == {}
    assert driver.codes[2] > 20  # damage is noticed


# Whole processes, with what surrounds them: the disk, permissions, links.


def run(tool, *arguments, folder, limit=None):
    """Exit code and lines of stderr of a tool run in `folder`, its files no larger than `limit`."""

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    # root without its privileges is bound by permissions as everybody is
    plain = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if PRIVILEGED else []
    command = [*plain, sys.executable, str(ROOT / "tools" / f"{tool}.py"), *map(str, arguments)]
    preparation = (
        {} if limit is None else {"preexec_fn": limited, "env": {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}}
    )
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, **preparation)
    return done.returncode, error_lines({"stderr": done.stderr})


def refused(tool, *arguments, folder, words, limit=None):
    """Exit 2, one line with `words`, and nothing changed in `folder`."""
    before = snapshot(folder)
    code, lines = run(tool, *arguments, folder=folder, limit=limit)
    assert code == 2, lines
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert words in lines[0]
    assert snapshot(folder) == before


@pytest.fixture
def place(driver, tmp_path):
    """A folder with a sound pipeline, a sound file and a result worth keeping."""
    for name, copy in (("pipeline", GIVEN), ("official", "official"), ("pipeline", "good"), ("shards", "shards")):
        shutil.copytree(driver.pristine / name, tmp_path / copy)
    (tmp_path / "good.ckpt").write_bytes(b"old and good")
    return tmp_path


PLACES = {
    "below a file": ((GIVEN, "good.ckpt/out", "--to", "mindspore"), "good.ckpt/out: cannot be written"),
    "file below a file": (("official/dit.pth", "good.ckpt/o.ckpt", "--to", "mindspore"), "cannot be written"),
    "in /proc": ((GIVEN, "/proc/hostile_out", "--to", "mindspore"), "/proc/hostile_out: cannot be written"),
    "a device": (("official/dit.pth", "/dev/full", "--to", "official"), "/dev/full"),
    "source by a symlink": ((GIVEN, "link", "--to", "mindspore", "--overwrite"), "is the source"),
    "source by a hard link": (("official/dit.pth", "hard.pth", "--to", "official", "--overwrite"), "is the source"),
    "source file itself": (
        ("official/dit.pth", "official/dit.pth", "--to", "official", "--overwrite"),
        "is the source",
    ),
    "folder by a file": ((GIVEN, "good.ckpt", "--to", "diffusers", "--overwrite"), "good.ckpt"),
    "file by a folder": (("official/dit.pth", "folder.pth", "--to", "official", "--overwrite"), "folder.pth"),
}


def test_places_that_cannot_be_written(driver, place):
    (place / "link").symlink_to(GIVEN)
    os.link(place / "official" / "dit.pth", place / "hard.pth")
    (place / "folder.pth").mkdir()
    before = snapshot(place)
    for case, (arguments, words) in PLACES.items():
        answer = driver.ask({"tool": "convert", "cwd": str(place), "arguments": list(arguments), "compare": None})
        assert answer["code"] == 2, (case, answer)
        assert len(error_lines(answer)) == 1, (case, answer)
        assert error_lines(answer)[0].startswith("error: "), (case, answer)
        assert words in error_lines(answer)[0], (case, answer)
        assert snapshot(place) == before, case


@pytest.mark.parametrize(
    ("source", "limit", "arguments"),
    [
        (GIVEN, 3_000, ("new", "--to", "mindspore")),
        (GIVEN, 45_000, ("good", "--to", "mindspore", "--overwrite")),
        (GIVEN, 45_000, ("deep/new", "--to", "diffusers", "--shard-size", "0.00005")),
        ("shards", 45_000, ("good.ckpt", "--to", "mindspore", "--overwrite")),
        ("shards", 3_000, ("shards.pth", "--to", "official")),
    ],
    ids=["folder", "overwritten folder", "shards", "overwritten file", "file"],
)
def test_a_full_disk_leaves_all_as_it_was(place, source, limit, arguments):
    """With little room the first shard already is too large, with more a later one, or the network behind the first."""
    refused("convert", source, *arguments, folder=place, words="cannot be written (File too large)", limit=limit)


@pytest.mark.parametrize("target", ["new", "good"])
def test_a_second_network_that_cannot_be_written(place, target):
    """The DiT has been written when the VAE turns out to be beyond half precision: the old pipeline stays whole."""
    file = place / GIVEN / "vae" / "model.safetensors"
    source = open_checkpoint(file)
    arrays = {name: source.read(name).astype("float32") * 1e6 for name in source}
    write_safetensors(file, specs(arrays), arrays.__getitem__, source.metadata)
    arguments = (GIVEN, target, "--to", "mindspore", "--dtype", "fp16", "--overwrite")
    refused("convert", *arguments, folder=place, words="has values beyond float16")


def test_a_target_with_other_weights(driver, place):
    """Two checkpoints in one folder could not be told from each other: the second is refused."""
    arguments = ["shards", "other", "--to", "mindspore", "--overwrite"]
    shutil.copytree(place / "shards", place / "other")
    before = snapshot(place)
    answer = driver.ask({"tool": "convert", "cwd": str(place), "arguments": arguments, "compare": None})
    assert answer["code"] == 2
    assert "would stand beside the new model.safetensors" in answer["stderr"]
    assert snapshot(place) == before


def test_a_target_that_is_a_link(place):
    """The link is replaced; the file behind it, which is somebody's, is not written to."""
    (place / "link.ckpt").symlink_to("good.ckpt")
    code, lines = run("convert", "shards", "link.ckpt", "--to", "mindspore", "--overwrite", folder=place)
    assert (code, lines) == (0, [])
    assert (place / "good.ckpt").read_bytes() == b"old and good"
    assert len(open_checkpoint(place / "link.ckpt")) > 30


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root may write everywhere")
def test_no_permission(place):
    (place / "closed").mkdir(mode=0o500)
    refused("convert", GIVEN, "closed/out", "--to", "mindspore", folder=place, words="Permission denied")
    (place / "shut").mkdir(mode=0o000)
    refused("convert", "shards", "shut", "--to", "mindspore", "--overwrite", folder=place, words="Permission denied")
    (place / "official" / "dit.pth").chmod(0)
    refused("convert", "official/dit.pth", "out", "--to", "mindspore", folder=place, words="Permission denied")


HOSTILE_MODELS = [
    ("pipeline", "safetensors: negative size"),
    ("pipeline", "safetensors: config deep network"),
    ("diffusers pipeline", "config: absurd depth"),
    ("pipeline", "tree: weights /dev/zero"),
    ("diffusers pipeline", "config: nested deeply"),
]


@pytest.mark.parametrize(("source", "mutation"), HOSTILE_MODELS)
def test_drawing_with_a_hostile_model(driver, tmp_path, source, mutation):
    make(Case(source, mutation, SEED), driver.pristine, tmp_path / GIVEN)
    refused(
        "generate",
        "a cat",
        "--model",
        GIVEN,
        "--out",
        "drawn.png",
        "--no-resolution-binning",
        folder=tmp_path,
        words=GIVEN,
    )
