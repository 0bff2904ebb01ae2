"""Reports of the exported Ascend graphs: equal to the stored ones, true to closed forms, legal, comparable."""

import json
from dataclasses import replace
from functools import cache

import mindspore as ms
import numpy as np
import pytest
from conftest import GOLDEN, load_tool
from mindspore import Tensor
from mindspore.nn.utils import no_init_parameters
from mindspore.train import mind_ir_pb2

from mindsigma.errors import MindSigmaError
from mindsigma.inspect.cases import CASES, SMALL, WHOLE
from mindsigma.inspect.compare import as_json, differences, read_report
from mindsigma.inspect.cost import Cost, attention_shape, cost_of, peak_memory
from mindsigma.inspect.export import ROOT, export_graph
from mindsigma.inspect.flat import FlatInputs
from mindsigma.inspect.graph import Array, Graph, Node, Value
from mindsigma.inspect.legality import attention_violations
from mindsigma.inspect.parts import Request, export_part
from mindsigma.inspect.report import _runs, compact, report_of
from mindsigma.inspect.report_text import text_of
from mindsigma.models.controlnet import ControlNet, ControlNetConfig
from mindsigma.models.dit import DiT
from mindsigma.models.dit_config import preset
from mindsigma.training.updates import CONTROLS
from mindsigma.weights.loading import open_dit

GRAPHS = GOLDEN / "graphs"
STORED = sorted(file.stem for file in GRAPHS.glob("*.json"))
STORED_WHOLE = [name for name in STORED if name in WHOLE]


@cache
def exported(name):
    """Full report of a case."""
    return report_of(*export_part(CASES[name]))


@pytest.mark.parametrize("name", SMALL)
def test_graph_is_as_stored(name):
    """A change of a graph is a change of its stored report, which a review sees: tools/export.py --update NAME."""
    lines, _ = differences(read_report(GRAPHS / f"{name}.json"), compact(exported(name)))
    assert not lines, "\n".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_whole_graph_is_as_stored(name):
    lines, _ = differences(read_report(GRAPHS / f"{name}.json"), compact(report_of(*export_part(CASES[name]))))
    assert not lines, "\n".join(lines)


@pytest.mark.parametrize("name", STORED)
def test_stored_graphs_are_legal_and_need_no_host(name):
    report = read_report(GRAPHS / f"{name}.json")
    assert report["violations"] == []
    assert not set(report["nodes"]) & {"PyExecute", "Switch", "TensorToScalar"}


def matmul_flops_of_a_block(config, rows):
    """Multiplications and additions of a block's weights for `rows` tokens: qkv, proj, q, proj, fc1, fc2."""
    width = config.hidden_size
    return 2 * rows * width * (3 * width + width + width + width + 2 * int(config.mlp_ratio * width))


@pytest.mark.parametrize("name", STORED_WHOLE)
def test_work_of_the_presets_follows_from_their_configs(name):
    """Operations of all blocks of a guided step, to what is outside of them.

    Heads count as wide as the kernel takes them; products may do so, too, which makes them 5 % larger.
    """
    report, config = read_report(GRAPHS / f"{name}.json"), preset(CASES[name].model)
    tokens, rows = config.base_size**2, 2
    padded = -(-(config.hidden_size // config.num_heads) // 16) * 16
    matmul = attention = 0
    for layer in range(config.depth):
        compression = config.layer_compression(layer)
        keys = tokens if compression is None else tokens // compression.factor**2
        matmul += matmul_flops_of_a_block(config, rows * tokens)
        attention += 4 * rows * config.num_heads * tokens * (keys + config.model_max_length) * padded
    assert report["flops"]["attention"] == pytest.approx(attention, rel=1e-9)
    assert matmul < report["flops"]["matmul"] < matmul * 1.06


@pytest.mark.parametrize("name", STORED_WHOLE)
def test_parameters_of_the_presets(name):
    """What the step reads, and what only the caption's graph does, are the network's 0.6 billion (heads unpadded)."""
    report, config = read_report(GRAPHS / f"{name}.json"), preset(CASES[name].model)
    width = config.hidden_size
    keys = config.depth * (2 * width * width + 2 * width)
    caption = config.caption_channels * width + width + width * width + width
    with no_init_parameters():
        total = sum(parameter.size for parameter in DiT(config).get_parameters())
    assert total <= report["parameters"]["elements"] + keys + caption < total * 1.05
    assert 0.6e9 < total < 0.62e9


@pytest.mark.slow
def test_a_controlnet_alone_has_states_in_its_training_step():
    """Weights, AdamW's two states and the step's controls are its own; the base has weights alone, in the dtype."""
    request = Request("sigma-mini", "train", 256, 256, depth=2, tokens=40, weights=False, optimizer="adamw")
    report = report_of(*export_part(replace(request, control_layers=1)))
    base = DiT(replace(open_dit("sigma-mini", "fp32").config, depth=2))
    control = ControlNet(ControlNetConfig.of(base.config, 1))
    numbers = [sum(parameter.size for parameter in cell.get_parameters()) for cell in (base, control)]
    elements, size = report["parameters"]["elements"], report["parameters"]["bytes"]
    assert 0 <= elements - (numbers[0] + 3 * numbers[1]) <= CONTROLS
    assert size == 2 * numbers[0] + 4 * (elements - numbers[0])
    assert report["violations"] == [] and report["host"] == []


def test_blocks_are_alike_and_hold_their_own_nodes():
    report = exported("step-1024-fp16")
    first, second = (report["blocks"][f"blocks.{i}"] for i in range(2))
    assert first == second
    assert first["nodes"]["FlashAttentionScore"] == 2
    assert sum(first["nodes"].get(kind, 0) for kind in ("LayerNormExt", "LayerNorm", "AddLayerNormV2")) == 2
    config = preset("PixArt-Sigma-XL-2-1024-MS")
    attention = 4 * 2 * 16 * 4096 * (4096 + 300) * 80
    assert 1 <= (first["flops"] - attention) / matmul_flops_of_a_block(config, 2 * 4096) < 1.06


@pytest.mark.parametrize("name", [name for name in ("step-1024-fp16", "xl-1024-fp16") if name in STORED])
def test_a_block_is_lean(name):
    """At 1024 px in fp16: two fused attentions, at most eight products, nothing padded, transposed or cast."""
    report = read_report(GRAPHS / f"{name}.json")
    blocks = [block for names, block in report["blocks"].items() if names.startswith("blocks.")]
    assert blocks
    for block in blocks:
        nodes, moving = block["nodes"], block["moving_activations"]
        assert nodes["FlashAttentionScore"] <= 2
        assert (
            sum(nodes.get(kind, 0) for kind in ("MatMul", "MatMulExt", "BatchMatMul", "BatchMatMulExt", "Dense")) <= 8
        )
        for kind in ("Pad", "PadV3", "ConstantPadND", "Transpose", "TransposeExtView", "Cast", "Concat", "Tile"):
            assert moving.get(kind, 0) == 0, kind


def test_nodes_name_the_line_that_made_them():
    report = exported("step-1024-fp16")
    casts = [row for row in report["movements"] if row["kind"] == "Cast"]
    assert casts
    for row in casts:
        file, _, line = row["source"].rpartition(":")
        assert file.startswith("mindsigma/")
        assert "astype" in (ROOT / file).read_text().splitlines()[int(line) - 1]
    text = text_of(report)
    assert "Cast" in text and casts[0]["source"] in text and "2 FlashAttentionScore" in text
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize("name", SMALL)
def test_every_movement_names_a_line(name):
    for row in exported(name)["movements"]:
        assert row["source"].startswith("mindsigma/"), row


def test_a_launch_more_counts_and_its_line_is_told():
    stored = read_report(GRAPHS / "step-1024-fp16.json")
    more = json.loads(json.dumps(stored))
    more["launches"]["fast"]["Dense"] += 1
    more["launches"]["legacy"] = {"AddN": 1}
    more["launches"]["view"]["Reshape"] += 5  # launches nothing
    line = next(name for name, kinds in more["lines"].items() if "GeLU" in kinds)
    more["lines"][line]["Dense"] += 1
    lines, added = differences(stored, more)
    assert added == 2 and "launch fast: Dense 14 -> 15 (+1)" in lines and "launch legacy: AddN 0 -> 1 (+1)" in lines
    assert any(text.startswith("line   mindsigma/models/dit.py: ") and "gelu" in text for text in lines)
    assert differences(stored, {key: value for key, value in more.items() if key != "launches"}) == ([], 0)
    assert "launched by MindSpore's back end" in text_of(
        {**exported("step-1024-fp16"), "launches": more["launches"], "lines": more["lines"]}
    )


def test_blocks_are_named_as_runs():
    """Upwards as in sampling, downwards as in a backward pass."""
    assert _runs(["x", "blocks.0", "blocks.1", "blocks.2", "blocks.5"]) == "x, blocks.0-2, blocks.5"
    assert _runs(["blocks.3", "blocks.2", "blocks.2", "blocks.1", "x"]) == "blocks.1-3, x"


def array(*dims, dtype="fp16"):
    return Value("node", array=Array(dims, dtype), node=0)


def attention(q, k, v, heads=16, layout=3, mask=None):
    """A FlashAttentionScore as an export holds it; layout 0 is BSH, 3 is BSND."""

    def constant(number):
        return Value("constant", number=number)

    inputs = [q, k, v, None, None, None, mask, None, None, None, constant(heads), constant(1.0), constant(0.1)]
    inputs += [constant(2**31 - 1), constant(2**31 - 1), constant(0), constant(layout), constant(0)]
    return Node("a", "FlashAttentionScore", "s", inputs, (Array((1,), "fp32"), q.array))


def test_what_the_kernel_refuses_is_told():
    q, k = array(2, 64, 16, 80), array(2, 32, 16, 80)
    assert attention_violations(attention(q, k, k)) == []
    assert attention_shape(attention(q, k, k)) == (2, 16, 64, 32, 80)
    cases = {
        "are int8": (array(2, 64, 16, 80, dtype="int8"), *[array(2, 32, 16, 80, dtype="int8")] * 2),
        "different dtypes fp16, bf16": (q, array(2, 32, 16, 80, dtype="bf16"), k),
        "head width 72 of q": (*[array(2, 64, 16, 72)] * 3,),
        "head width 528 of v": (q, k, array(2, 32, 16, 528)),
        "of q 80 and of k 96": (q, array(2, 32, 16, 96), k),
        "batch of q 2 and of v 1": (q, k, array(1, 32, 16, 80)),
        "32 keys but 16 values": (q, k, array(2, 16, 16, 80)),
    }
    for text, tensors in cases.items():
        assert any(text in found for found in attention_violations(attention(*tensors))), text
    assert "do not fit 7 heads" in attention_violations(attention(*[array(2, 64, 1280)] * 3, heads=7, layout=0))[0]
    mask = attention(q, k, k, mask=array(2, 1, 1, 32, dtype="fp16"))
    assert len(attention_violations(mask)) == 2
    assert attention_violations(attention(q, k, k, mask=array(2, 1, 64, 32, dtype="uint8"))) == []


def test_costs_of_single_nodes():
    a, b = array(128, 64), array(32, 64)
    flags = [Value("constant", number=flag) for flag in (False, True)]
    product = Node("p", "MatMul", "s", [a, b, *flags], (Array((128, 32), "fp16"),))
    assert cost_of(product) == Cost("cube", 2 * 128 * 64 * 32, 2 * (128 * 64 + 64 * 32 + 128 * 32))
    flags = flags[::-1]
    other = Node("p", "MatMul", "s", [array(64, 128), array(64, 32), *flags], (Array((128, 32), "fp16"),))
    assert cost_of(other).operations == cost_of(product).operations
    image, kernel = array(1, 8, 16, 16), array(4, 8, 3, 3)
    convolution = Node("c", "Conv2D", "s", [image, kernel], (Array((1, 4, 16, 16), "fp16"),))
    assert cost_of(convolution).operations == 2 * 4 * 16 * 16 * 8 * 9
    part = Node("s", "StridedSlice", "s", [a], (Array((16, 64), "fp16"),))
    assert cost_of(part) == Cost("vector", 0, 2 * 2 * 16 * 64)  # what is left out is not read
    assert cost_of(Node("r", "Reshape", "s", [a], (Array((64, 128), "fp16"),))).bytes == 0


def test_peak_memory_counts_what_is_alive_together():
    """a (100 bytes), b of a (200), view of b, c of the view (50): a ends before c, the view keeps b."""

    def node(name, kind, inputs, size):
        return Node(name, kind, name, inputs, (Array((size,), "bool"),))

    def read(i, size):
        return Value("node", array=Array((size,), "bool"), node=i)

    graph = Graph(
        nodes=[
            node("a", "Exp", [Value("input", "x", Array((100,), "bool"))], 100),
            node("b", "Exp", [read(0, 100)], 200),
            node("v", "Reshape", [read(1, 200)], 200),
            node("c", "Exp", [read(2, 200)], 50),
        ],
        results=read(3, 50),
    )
    assert peak_memory(graph) == (300, 1)
    graph.results = (read(0, 100), read(3, 50))
    assert peak_memory(graph) == (350, 3)


class Sum(ms.nn.Cell):
    """Sum of nested tensors, and a product that no result needs."""

    def construct(self, first, pairs, factor, nothing=None):
        result = first
        for pair in pairs:
            result = result + pair[0] * pair[1] * factor
        return result if nothing is None else nothing


def test_nested_arguments_become_flat_inputs():
    x = Tensor(np.zeros((2, 3), np.float32))
    cell = Sum()
    graph = export_graph(FlatInputs(cell, cell, [x, ((x, x), (x, x)), 2.0, None]))
    assert len(graph.inputs) == 5 and graph.parameters == {}
    assert sorted(node.kind for node in graph.nodes if node.kind.startswith(("Add", "Mul"))) == sorted(
        node.kind for node in graph.nodes
    )
    assert graph.results.array == Array((2, 3), "fp32")


@pytest.fixture
def export(monkeypatch):
    """A function that runs tools/export.py in this process and returns its exit code."""
    tool = load_tool("export")

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["export.py", *map(str, arguments)])
        return tool.main()

    return run


CAPTION = ("--model", "sigma-mini", "--part", "caption", "--tokens", 16)


def test_tool_writes_graph_and_reports_and_compares(export, tmp_path, capsys, mini):
    out, full = tmp_path / "caption.mindir", tmp_path / "caption.json"
    assert export(*CAPTION, "--out", out, "--json", full, "--report", tmp_path / "caption.txt") == 0
    model = mind_ir_pb2.ModelProto()
    model.ParseFromString(out.read_bytes())
    stored = {proto.name.partition(":")[2]: proto for proto in model.graph.parameter}
    for name, parameter in mini.dit.parameters_and_names():
        if name in stored:
            value = np.frombuffer(stored[name].raw_data, np.float16)
            if value.size != parameter.size:  # heads of 72 as 80
                value = value.reshape(2 * 4, 80, -1)[:, :72]
            assert value.tobytes() == parameter.asnumpy().astype(np.float16).tobytes()
    assert "y_embedder.y_proj.fc1.weight" in stored
    assert "Dense" in (tmp_path / "caption.txt").read_text()

    assert export(*CAPTION, "--diff", full) == 0
    assert capsys.readouterr().out.endswith("no differences\n")
    report = read_report(full)
    assert json.loads(as_json(report)) == report
    count = report["nodes"]["Dense"]
    report["nodes"]["Dense"] -= 1
    fewer = tmp_path / "fewer.json"
    fewer.write_text(as_json(report))
    assert export(*CAPTION, "--diff", fewer) == 1
    assert f"Dense: {count - 1} -> {count} (+1)" in capsys.readouterr().out
    report["nodes"]["Dense"] += 2
    fewer.write_text(as_json(report))
    assert export(*CAPTION, "--diff", fewer) == 0  # a node less fails no review
    assert "(-1)" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "tmp"))] == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--part", "unet"), "--part must be one of step, caption"),
        (("--model", "pixart_sigma_sdxlvae_T5_diffusers"), "holds no DiT"),
        (("--height", 250), "--height 250 is not a multiple of 16"),
        (("--depth", 1), "--no-weights"),
        (("--batch", 0), "--batch must be at least 1"),
        (("--update", "nothing"), "known: step-1024-fp16"),
        (("--part", "t5", "--control-layers", 2), "--control-layers is of --part step and train, not of t5"),
        (("--out", "graph.onnx", "--part", "caption"), "graph.onnx: a graph is written as .mindir"),
        (("--diff", "absent.json"), "absent.json"),
    ],
)
def test_bad_options_end_in_one_line(export, arguments, text):
    with pytest.raises(MindSigmaError, match=text) as caught:
        export(*arguments)
    assert "\n" not in str(caught.value)
