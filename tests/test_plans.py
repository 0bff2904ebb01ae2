"""tools/plan.py without a plan: the search for the largest batch, and what a recipe asks of a card."""

import math
from types import SimpleNamespace

import pytest
from conftest import ROOT, load_tool

from mindsigma.errors import MindSigmaError
from mindsigma.inspect import launches
from mindsigma.inspect.launches import _reason, beside_backward, largest_that_fits, number_in
from mindsigma.inspect.parts import Request, build_part
from mindsigma.inspect.recipe import of_recipe


def asked(size):
    """A function like `size`, and the list of what it was asked for."""
    numbers = []

    def count(number):
        numbers.append(number)
        return size(number)

    return count, numbers


@pytest.mark.parametrize("room", [100.0, 1000.0, 31_000.0, 62_000.0])
@pytest.mark.parametrize("base, each", [(90.0, 3.0), (8000.0, 410.5), (9.0, 90.0)])
def test_on_a_line_two_more_plans_are_enough(room, base, each):
    """base + each * number <= room, solved: the largest number, and the next one, seen to be too large."""
    size, numbers = asked(lambda number: base + each * number)
    expected = max(int((room - base) // each), 0)
    assert largest_that_fits(size, [2, 4], room) == (expected, expected + 1)
    assert len(numbers) <= 4 and min(numbers) >= 1


@pytest.mark.parametrize(
    "size",
    [
        lambda number: 10 * number + 7 * (number % 3 == 1),  # pages
        lambda number: 5 * number + (30 if number > 40 else 0),  # another kernel's workspace
        lambda number: 10 * number + number**2 / 100,
    ],
)
def test_beside_a_line_a_few_more(size):
    for room in (250.0, 505.0, 999.0):
        found, numbers = asked(size)
        fits, refused = largest_that_fits(found, [2, 4], room)
        assert refused == fits + 1 and size(fits) <= room < size(refused)
        assert len(numbers) <= 2 + 5


def test_what_is_expected_saves_plans_if_it_is_so():
    """Two plans at what a line says are enough for two rooms; a line that is wrong costs plans, not the result."""
    for expected, most in (((100.0, 10.0), 2), ((40.0, 10.2), 4), ((500.0, 3.0), 7), ((0.0, 40.0), 7)):
        for rooms in ((1005.0, 505.0), (1000.5, 505.0)):
            size, numbers = asked(lambda number: 100.0 + 10.0 * number)
            known = [number_in(expected, room) for room in rooms]
            found = [largest_that_fits(size, known, room, expected=expected) for room in rooms]
            assert found == [(90, 91), (40, 41)]
            assert len(set(numbers)) <= most + (rooms[0] == 1000.5)  # 91 would take 1010: near to the room, but known
    size, numbers = asked(lambda number: 100.0 + 10.0 * number)
    assert largest_that_fits(size, [3], 124.0, expected=(94.0, 10.0)) == (2, 3)


def test_tries_are_bounded_and_what_is_not_known_is_told():
    size, numbers = asked(lambda number: 100.0 + number**0.5)  # ever flatter
    fits, refused = largest_that_fits(size, [1, 2], 200.0, tries=3)
    assert len(numbers) == 5 and size(fits) <= 200.0 and (refused is None or refused > fits + 1)


def test_what_cannot_be_planned_is_halved():
    """Beyond a card of 64 GiB a plan has no size."""
    size, numbers = asked(lambda number: 10.0 * number if number <= 30 else math.inf)
    assert largest_that_fits(size, [64, 32], 250.0) == (25, 26)
    assert len(numbers) <= 7
    assert largest_that_fits(lambda number: math.inf, [8, 4], 250.0) == (0, 1)


def test_few_blocks_alone_tell_the_largest_batches(monkeypatch):
    """Peaks that grow evenly with blocks and images: the line of all 28 blocks, and what it leaves of each card."""

    def plan(request, *_, **__):
        return SimpleNamespace(peak_mb=500 + 100 * request.depth + request.batch * (10 + 2 * request.depth))

    monkeypatch.setattr(launches, "plan", plan)
    request = Request("PixArt-Sigma-XL-2-256x256", "train", batch=8)
    line, batches = launches.batches_by_few_blocks(request, [32.0, 64.0, 3.0])
    assert line == (500 + 28 * 100, 10 + 28 * 2)
    assert batches == [(32 * 900 - 3300) // 66, (64 * 900 - 3300) // 66, 0]  # (15 / 16)^2 of 1024 is 900
    with pytest.raises(MindSigmaError, match="--few-blocks: a network of few blocks"):
        launches.batches_by_few_blocks(Request("sigma-mini", "train"), [32.0])
    with pytest.raises(MindSigmaError, match="--few-blocks: .* ControlNet"):
        launches.batches_by_few_blocks(Request("PixArt-Sigma-XL-2-1024-MS", "train", control_layers=13), [32.0])


def test_few_blocks_of_a_model_with_weights_have_no_values(monkeypatch):
    asked = []

    def plan(request, *_):
        asked.append(request)
        raise launches.TooLarge("not planned here")

    monkeypatch.setattr(launches, "plan", plan)
    for options, weights in (["--depth", "3"], False), ([], True):
        monkeypatch.setattr("sys.argv", ["plan.py", *options])
        load_tool("plan").main()
        assert asked[-1].has_weights() == weights


def test_what_runs_beside_the_backward_pass():
    """Two graphs, of which the longer counts: the stream that computes waits for the first of three collectives."""

    def row(index, name, stream=0, event=None):
        tail = "" if event is None else f", event id[{event}]"
        told = f"Index[{index}], node name[{name}-op{index}], logic id[4294967295], stream id[{stream}], node info[x]"
        return f"[INFO] SESSION(1,2,python) PrintGraphExecuteOrder] {told}{tail}\n"

    begins = "[INFO] SESSION(1,2,python) PrintGraphExecuteOrder] Graph 0 execution order:\n"
    names = [
        ("Default/Mul",), ("Gradients/Default/a/MatMul",), ("Gradients/Default/a/Cast",), ("Default/StreamSend", 0, 5),
        ("Default/StreamRecv", 2, 5), ("Default/AllReduce", 2), ("Default/StreamSend", 2, 6),
        ("Gradients/Default/b/MatMul",), ("Default/AllReduce", 2), ("Default/StreamRecv", 0, 6),
        ("Gradients/Default/c/MatMul",), ("Default/ReduceScatter", 2), ("Default/StreamSend", 2, 7),
        ("Default/StreamRecv", 0, 7), ("Default/Muls",),
    ]  # fmt: skip
    text = begins + row(0, "Default/AllReduce", 2) + begins + "".join(row(i, *name) for i, name in enumerate(names))
    found = beside_backward(text)
    assert found == {"collectives": 3, "early": 2, "tenths": [0, 0, 0, 0, 0, 1, 0, 1, 0, 0], "waits": 1}
    assert beside_backward(begins + row(0, "Default/Mul")) == {"collectives": 0}


def recipe(name):
    """`of_recipe` of a config of this project."""
    return of_recipe(ROOT / "configs" / "train" / f"{name}.yaml")


def test_a_recipe_tells_its_method():
    assert recipe("512-MS")["method"] == "denoising" and recipe("512-MS")["ema"]
    found = recipe("controlnet-canny")
    assert (found["control_layers"], found["accumulation"]) == (13, 4)
    found = recipe("distill-lcm")
    assert (found["method"], found["lcm_substeps"], found["recompute"]) == ("lcm", 1, True)
    assert recipe("distill-lcm-sigma-mini")["lcm_substeps"] == 3
    assert (recipe("distill-dmd")["method"], recipe("distill-dmd")["height"]) == ("dmd", 512)
    found = recipe("dora")
    assert found["dora"] and found["lora_rank"] == 8 and "attn.qkv" in found["lora_targets"]
    assert recipe("lora")["accumulation"] == 1 and recipe("dreambooth")["accumulation"] == 2  # beside the class's


def test_a_recipe_of_neither_tool_is_refused(tmp_path):
    file = tmp_path / "strange.yaml"
    file.write_text("method: unheard\n")
    with pytest.raises(MindSigmaError, match="strange.yaml: method must be one of"):
        of_recipe(file)


METHODS = {
    "kept sums": {"accumulation": 2}, "dora": {"lora_rank": 2, "dora": True},
    "controlnet": {"control_layers": 1}, "lcm": {"method": "lcm", "lcm_substeps": 2}, "dmd": {"method": "dmd"},
    "dmd of pictures": {"method": "dmd", "dmd_regression": "lpips", "batch": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_the_step_of_every_method_takes_the_inputs_that_it_is_planned_with(name):
    """Computed on a CPU, operation by operation, with two blocks of sigma-mini's shape and zeros for weights."""
    given = {"batch": 2, "dtype": "fp32", "tokens": 4, "depth": 2, "weights": False, "optimizer": "adamw"}
    request = Request("sigma-mini", "train", 64, 64, **{**given, **METHODS[name]})
    cell, found = build_part(request)
    assert found.depth == 2 and len(cell.beside) == name.startswith("dmd")
    for one in (cell, *cell.beside):
        loss, *_, finite = one(*one.inputs)
        assert loss.shape == () and finite.shape == (1,)  # of zeros they are no numbers
    kept = {parameter.name: parameter.requires_grad for parameter in cell.get_parameters()}
    assert any("lora_A" in one for one in kept) == ("lora_rank" in METHODS[name])
    assert any(one.startswith("teacher.") for one in kept) == (name[:3] in ("lcm", "dmd"))
    pictures = {one: learns for one, learns in kept.items() if one.startswith(("lpips.", "vae."))}
    assert bool(pictures) == (name == "dmd of pictures") and not any(pictures.values())


def test_why_a_dry_run_failed():
    """The line of an error; a process that was killed left none."""
    assert _reason("[INFO] all is well\nValueError: bad\n", 1) == "ValueError: bad"
    assert _reason("[INFO] all is well\n", -9).startswith("its process was ended by signal 9")
    assert _reason("", 1) == "it said nothing"
