"""Prompts as people write them: lines of a file, and the size of the picture in the prompt itself."""

import sys

import pytest
from conftest import load_tool
from PIL import Image

from mindsigma.errors import MindSigmaError
from mindsigma.pipeline.pictures import image_grid
from mindsigma.pipeline.pipeline import PipelineOutput, PixArtSigmaPipeline
from mindsigma.pipeline.prompts import Prompt, read_lines


def test_only_line_feeds_end_a_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa\u2028b\r\n\r\n  c\x85d\x0be\x1cf\u2029 \n\ng\rh".encode())
    assert read_lines(file) == ["a\u2028b", "c\x85d\x0be\x1cf", "g\rh"]
    file.write_bytes("a".encode("utf-16"))
    for path, words in ((file, "not UTF-8"), (tmp_path / "absent", "no such file"), ("/dev/zero", "not a regular")):
        with pytest.raises(MindSigmaError, match=words) as caught:
            read_lines(path)
        assert str(caught.value).startswith(f"--prompts-file {path}: ")


@pytest.mark.parametrize(
    "text, prompt",
    [
        ("a cat", Prompt("a cat")),
        ("a cat --ar 16:9", Prompt("a cat", None, 16 / 9)),
        ("a cat --aspect_ratio 9:16", Prompt("a cat", None, 9 / 16)),
        ("a cat --aspect-ratio=1 : 2", Prompt("a cat", None, 0.5)),
        ("a cat --AR 1.5:1", Prompt("a cat", None, 1.5)),
        ("a cat —ar 1:1", Prompt("a cat", None, 1.0)),
        ("a cat --hw 512:768", Prompt("a cat", (512, 768))),
        ("a cat --hw 512 768", Prompt("a cat", (512, 768))),
        ("a cat --hw 512x768, oil", Prompt("a cat, oil", (512, 768))),
        ("--hw 512:768 a  cat", Prompt("a  cat", (512, 768))),
        ("a cat --ar 1:2 --hw 512:768 --hw 1:1", Prompt("a cat", (512, 768))),
        ("--art deco, --hwy 5:3, x--ar 5:3", Prompt("--art deco, --hwy 5:3, x--ar 5:3")),
    ],
)
def test_sizes_in_prompts(text, prompt):
    assert Prompt.parse(text) == prompt


@pytest.mark.parametrize("flag", ["--ar", "--ar 16", "--ar x:y", "--ar 0:1", "--hw 5:0", "--hw 1.5:2", "--hw 123456:7"])
def test_sizes_that_are_not_understood_are_named(flag):
    with pytest.raises(MindSigmaError, match=rf"a cat.*{flag[:4]} must be followed by HEIGHT:WIDTH"):
        Prompt.parse(f"a cat {flag}")


def test_a_ratio_is_the_nearest_trained_size(mini):
    assert mini.size_of_ratio(1.0) == (256, 256)
    assert mini.size_of_ratio(16 / 9) == (336, 192) and mini.size_of_ratio(9 / 16) == (192, 336)
    assert mini.size_of_ratio(1e5) == (512, 128)
    assert mini.size_of_ratio(4.0, use_resolution_binning=False) == (512, 128)
    height, width = mini.size_of_ratio(1e9, use_resolution_binning=False)
    assert height % 16 == width % 16 == 0 and height == 16 * width


def test_pictures_of_a_file_have_their_sizes(tmp_path, monkeypatch, capsys):
    """Drawing itself, which compiles for every size, is left out."""

    def draw(pipeline, height, width, seed, **_):
        return PipelineOutput([Image.new("RGB", (width, height)) for _ in seed], seed)

    monkeypatch.setattr(PixArtSigmaPipeline, "__call__", draw)
    file, out = tmp_path / "prompts.txt", tmp_path / "out"
    file.write_bytes("a red\u2028apple --hw 64:48\r\na cat --ar 1:4\n".encode())
    flags = ["--prompts-file", file, "--steps", 1, "--height", 64, "--width", 64, "--guidance-scale", 1, "--grid"]
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, flags), "--out", str(out), "--batch-size", "3", "a dog"])
    assert load_tool("generate").main() == 0
    sizes = {}
    for path in out.iterdir():
        with Image.open(path) as image:
            sizes[path.name] = image.size
            assert "--" not in image.text.get("prompt", "")
    assert sizes == {
        "a-dog-0.png": (64, 64),
        "a-red-apple-0.png": (48, 64),
        "a-cat-0.png": (512, 128),
        "grid.png": (1024, 256),
    }
    assert "size: 128 x 512 (height x width), as the prompt's HEIGHT:WIDTH has it: a cat" in capsys.readouterr().out


def test_a_grid_of_several_sizes():
    grid = image_grid([Image.new("RGB", size, "red") for size in ((8, 4), (2, 6))], columns=1)
    assert grid.size == (8, 12)
    assert [grid.getpixel(place) == (255, 0, 0) for place in ((7, 3), (7, 4), (1, 11), (2, 11))] == [True, False] * 2
