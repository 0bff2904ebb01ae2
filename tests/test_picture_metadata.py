"""What a picture tells: everything that made it, in words, for other tools, and to draw it again; nothing is lost."""

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import load_tool
from PIL import Image, PngImagePlugin
from test_generate_cli import MINI, TOOL, pixels

from mindsigma.commands.generate_options import build_parser, options_of_picture, parse
from mindsigma.errors import MindSigmaError
from mindsigma.pipeline.metadata import parameters, read
from mindsigma.sampling.options import SamplingOptions
from mindsigma.weights import digests
from mindsigma.weights.digests import Digests, digest_of

CSV = """prompt,seed,steps,guidance_scale,sampler,negative_prompt,lora,guidance_interval
"a cat, black",3,2,3.5,euler,ä,,
a dog,4,3,,dpm,,style.safetensors:0.5,0 0.5
"""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Folder, and printed lines by name, of runs in this process.

    `first` draws two pictures, each of its own options, and `like 0` and `like 1` each of them again: under the name of
    the first, which is taken, and over a file that is there.
    """
    folder, printed = tmp_path_factory.mktemp("told"), {}
    (folder / "prompts.csv").write_text(CSV)
    (folder / "again.png").write_text("in the way")
    write_adapter(folder / "style.safetensors")
    runs = {
        "first": ["--prompts-file", "prompts.csv", "--text-encoder-memory", "int8", "--out", "out", "--grid"]
        + ["--name-template", "{number}-{sampler}"],
        "like 0": ["--like", "out/1-euler.png", "--out", "out/1-euler.png"],
        "like 1": ["--like", "out/2-dpm.png", "--out", "again.png", "--overwrite"],
    }
    main, kept = load_tool("generate").main, sys.argv
    with moved(folder):
        for name, flags in runs.items():
            sys.argv = ["generate.py", *flags]
            with contextlib.redirect_stdout(io.StringIO()) as out:
                assert main() == 0
            printed[name] = [line for line in out.getvalue().splitlines() if line.endswith(".png")]
    sys.argv = kept
    return folder, printed


@contextlib.contextmanager
def moved(folder):
    """In this folder."""
    before = os.getcwd()
    os.chdir(folder)
    yield
    os.chdir(before)


def write_adapter(path):
    """A LoRA of the first block, of drawn numbers."""
    from safetensors.numpy import save_file

    rng, name = np.random.default_rng(0), "base_model.model.blocks.0.attn.proj"
    tensors = {f"{name}.lora_A.weight": (4, 288), f"{name}.lora_B.weight": (288, 4), f"{name}.alpha": ()}
    save_file({key: np.asarray(rng.standard_normal(shape), np.float32) for key, shape in tensors.items()}, path)


def test_nothing_is_overwritten(drawn):
    """A picture of a taken name gets another one, which is printed; unless it is to be replaced."""
    folder, printed = drawn
    assert printed["first"] == ["out/1-euler.png", "out/2-dpm.png", "out/grid.png"]
    assert printed["like 0"] == ["out/1-euler-2.png"] and printed["like 1"] == ["again.png"]
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "1-euler-2.png", "1-euler.png", "2-dpm.png", "grid.png",
    ]  # fmt: skip


def test_a_picture_is_drawn_again(drawn):
    """Its options are those of its line in the table, its adapter is merged, and flags override what it tells."""
    folder, _ = drawn
    for first, second in (("out/1-euler.png", "out/1-euler-2.png"), ("out/2-dpm.png", "again.png")):
        np.testing.assert_array_equal(pixels(folder / first), pixels(folder / second))
        assert read(folder / first) == read(folder / second)
    args, _ = parse(["--like", str(folder / "out/2-dpm.png"), "--seed", "9"])
    assert (args.prompt, args.seed, args.steps, args.guidance_interval) == (["a dog"], 9, 3, [0.0, 0.5])
    assert (args.lora, args.text_encoder_memory, args.sampler) == (["style.safetensors:0.5"], "int8", "dpm")


def test_everything_is_told(drawn):
    folder, _ = drawn
    with Image.open(folder / "out/2-dpm.png") as image:
        text = dict(image.text)
    expected = {
        "prompt": "a dog", "seed": "4", "steps": "3", "sampler": "dpm", "guidance_interval": "0.0 0.5",
        "model": "sigma-mini", "components": "sigma-mini", "lora": "style.safetensors:0.5", "convention": "diffusers",
        "text_encoder_memory": "int8", "dtype": "fp32", "device": "CPU", "size": "256x256",
    }  # fmt: skip
    assert {name: text.get(name) for name in expected} == expected
    sums = {line.split(" ", 1)[1]: line.split(" ")[0] for line in text["sha256"].splitlines()}
    files = {"dit": "dit", "vae": "vae", "t5": "text_encoder"}
    for part, name in files.items():
        assert sums[part] == hashlib.sha256((MINI / name / "model.safetensors").read_bytes()).hexdigest()
    adapter = hashlib.sha256((folder / "style.safetensors").read_bytes()).hexdigest()
    assert sums["lora: style.safetensors"] == adapter
    assert "mindspore 2.7.1" in text["versions"]
    with Image.open(folder / "out/1-euler.png") as image:
        assert "lora" not in image.text and "style" not in image.text["sha256"] and image.text["negative_prompt"] == "ä"
    with Image.open(folder / "out/grid.png") as image:
        assert image.text["prompts"] == "a cat, black\na dog" and "mindsigma" not in image.text


def test_parameters_of_other_tools(drawn):
    """Two lines or three, the last of `Name: value` pairs with the names that such tools read."""
    with Image.open(drawn[0] / "out/2-dpm.png") as image:
        first, last = image.text["parameters"].splitlines()
        dit = image.text["sha256"].split(" ")[0]
    assert first == "a dog"
    assert last.startswith("Steps: 3, Sampler: DPM++ 2M, CFG scale: 4.5, Seed: 4, Size: 256x256, Model hash: ")
    assert f'Model hash: {dit[:10]}, Model: sigma-mini, Lora hashes: "style.safetensors: ' in last
    options = SamplingOptions(sampler="euler", num_inference_steps=5, guidance_scale=2)
    text = parameters("a\nb", "no", 1, options, (64, 32), {"model": "/x/y, z"}, {})
    assert text == "a\nb\nNegative prompt: no\nSteps: 5, Sampler: euler, CFG scale: 2, Seed: 1, Size: 64x32, " + (
        f'Model: "y, z", Version: {text.rpartition("Version: ")[2]}'
    )


def test_other_weights_under_the_same_name_are_told():
    differing = load_tool("generate").differing
    assert differing({"dit": "a", "vae": "b", "lora: x": "c"}, {"dit": "a", "vae": "d"}) == ["vae"]
    assert differing({}, {"dit": "a"}) == []


def png(folder, text, key="mindsigma"):
    info = PngImagePlugin.PngInfo()
    info.add_text(key, text)
    Image.new("RGB", (4, 4)).save(folder / "x.png", pnginfo=info)
    return folder / "x.png"


def told(**options):
    return json.dumps({"format": 1, "sha256": {}, "options": options})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is not a JSON object"),
        (json.dumps({"format": 2, "options": {}, "sha256": {}}), "written by another version"),
        (json.dumps({"format": 1, "options": [], "sha256": {}}), "written by another version"),
        (told(stepz=3), "tells an option 'stepz' that is not known here"),
        (told(out="/etc"), "tells an option 'out'"),
        (told(config="x.yaml"), "tells an option 'config'"),
        (told(steps="many"), "steps has a value of the wrong kind"),
        (told(steps=[2]), "steps has a value of the wrong kind"),
        (told(prompt=[1]), "prompt has a value of the wrong kind"),
        (told(seed=10**30), "a number of 31 digits"),
    ],
)
def test_pictures_of_strangers(tmp_path, text, words):
    with pytest.raises(MindSigmaError, match=words):
        options_of_picture(png(tmp_path, text), build_parser())


def test_what_is_no_picture(tmp_path):
    with pytest.raises(MindSigmaError, match="does not tell how it was drawn"):
        read(png(tmp_path, "x", "parameters"))
    with pytest.raises(MindSigmaError, match="is no PNG"):
        read(b"GIF89a")
    (tmp_path / "cut.png").write_bytes(png(tmp_path, told(steps=2)).read_bytes()[:30])
    with pytest.raises(MindSigmaError, match="cut.png"):
        read(tmp_path / "cut.png")


# digests


def test_digests_of_folders_and_shards(tmp_path):
    from safetensors.numpy import save_file

    folder = tmp_path / "model"
    folder.mkdir()
    for i in (1, 2):
        save_file({f"t{i}": np.full(3, i, np.float32)}, folder / f"model-0000{i}-of-00002.safetensors")
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"t1": names[0], "t2": names[1]}}))
    sums = "".join(f"{name} {hashlib.sha256((folder / name).read_bytes()).hexdigest()}\n" for name in names)
    assert digest_of(folder) == hashlib.sha256(sums.encode()).hexdigest()
    assert digest_of(folder / names[0]) == digest_of(folder)  # a shard stands for all of them
    file = tmp_path / "one.safetensors"
    file.write_bytes(b"weights")
    found = Digests({"one": file, "gone": tmp_path / "absent"}).result()
    assert found == {"one": hashlib.sha256(file.read_bytes()).hexdigest()}


def test_digests_of_large_files_are_remembered_until_they_change(tmp_path, monkeypatch):
    monkeypatch.setenv("MINDSIGMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "REMEMBERED", 1)
    file, reads = tmp_path / "x.safetensors", []
    file.write_bytes(b"one")
    real = digests.hashlib.sha256
    monkeypatch.setattr(digests.hashlib, "sha256", lambda *given: reads.append(1) or real(*given))
    assert digest_of(file) == digest_of(file) == real(b"one").hexdigest() and len(reads) == 1
    file.write_bytes(b"other")
    assert digest_of(file) == real(b"other").hexdigest() and len(reads) == 2


def test_the_tool_reads_no_more_than_the_head_of_a_picture():
    """--like is judged before MindSpore is imported."""
    code = (
        f"import sys; sys.argv = ['x', '--like', {str(Path(TOOL))!r}]\n"
        "from mindsigma.commands.generate_options import parse\n"
        "try:\n    parse()\nexcept ValueError as error:\n"
        "    print('is no PNG' in str(error), 'mindspore' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=Path(TOOL).parents[1]
    )
    assert done.stdout == "True False\n", done.stderr
