"""Compiling ahead of time: shapes are told, compiled once, and then cost nothing."""

import mindspore as ms
import pytest
from conftest import load_tool

from mindsigma.errors import MindSigmaError
from mindsigma.pipeline.phases import PhaseClock, compiled_graphs
from mindsigma.pipeline.warm_up import Shape, warm_up
from mindsigma.sampling.options import SamplingOptions


def test_shapes_are_read_or_refused():
    assert Shape.parse("1024x768", 300) == Shape(1024, 768, 1, 300)
    assert Shape.parse("256x256:4", 120) == Shape(256, 256, 4, 120)
    assert Shape.parse("256x256:4:64", 300) == Shape(256, 256, 4, 64)
    for text in ("256", "256x", "256x256:0", "256x256:1:2:3", "0x256", "axb"):
        with pytest.raises(MindSigmaError, match="HEIGHTxWIDTH"):
            Shape.parse(text, 300)


@pytest.mark.slow
def test_a_warm_shape_compiles_nothing_more(plain_mini, graph_mode):
    """An odd batch, which no other test of this process has drawn; 13 tokens share the bucket of 16."""
    options = SamplingOptions(num_inference_steps=2)
    assert warm_up(plain_mini, Shape(256, 256, 3, 13), options) > 0
    assert warm_up(plain_mini, Shape(256, 256, 3, 16), options) == 0
    caption = plain_mini.encode_prompts(["a red apple"] * 3)
    before = compiled_graphs()
    arguments = {"prompt_embeds": caption.states.asnumpy(), "prompt_mask": caption.mask.asnumpy()}
    negative = {f"negative_{name}": value[:1] for name, value in arguments.items()}
    plain_mini(**arguments, **negative, height=256, width=256, num_inference_steps=2, progress=False)
    assert compiled_graphs() == before


class Twice(ms.nn.Cell):
    def construct(self, x):
        return x + x


@pytest.mark.slow
def test_whole_networks_count_in_graph_mode():
    clock, cell = PhaseClock(), Twice()
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        with clock.phase("one"):
            for size in (3, 4, 3):
                cell(ms.ops.zeros((size,), ms.float32))
        with clock.phase("two"):
            cell(ms.ops.zeros((4,), ms.float32))
        assert "one" in clock.table()
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)
    assert clock.phases["one"].graphs == 2 and clock.phases["two"].graphs == 0


def test_tool_warms_up_without_a_prompt(monkeypatch, tmp_path, capsys):
    tool = load_tool("generate")
    monkeypatch.setattr("sys.argv", ["generate.py", "--warm-up", "256x256:1:16", "--out", str(tmp_path / "new")])
    assert tool.main() == 0
    assert "warm-up: 256 x 256, batch 1, 16 tokens: " in capsys.readouterr().out
    assert list(tmp_path.glob("**/*.png")) == []
    monkeypatch.setattr("sys.argv", ["generate.py", "--warm-up", "256"])
    with pytest.raises(MindSigmaError, match="--warm-up '256'"):
        tool.main()
