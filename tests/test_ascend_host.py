"""tools/ascend_host.py and tools/plan.py: a picture, training and plans on MindSpore's Ascend backend, and refusals."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from conftest import GOLDEN, ROOT
from PIL import Image

from mindsigma.ascend_host import environment
from mindsigma.errors import MindSigmaError
from mindsigma.inspect import launches
from mindsigma.inspect.cases import CASES
from mindsigma.inspect.compare import differences, read_report
from mindsigma.inspect.launches import FAST, LEGACY, OTHER, plan, stored_launches
from mindsigma.inspect.parts import Request


def host(*arguments, cwd=None):
    """A run of tools/ascend_host.py."""
    command = [sys.executable, ROOT / "tools" / "ascend_host.py", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=580, env=with_root())


def with_root():
    """The environment with this tree's mindsigma."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def test_a_picture(tmp_path):
    """Two steps in fp16 through every network, against the same in fp32 on the CPU."""
    tool, options = ROOT / "tools" / "generate.py", ["a red apple", "--steps", 2, "--seed", 3]
    trace = tmp_path / "trace"
    ran = host(
        "--trace", trace, "--", sys.executable, tool, *options, "--device", "Ascend", "--out", tmp_path / "a.png"
    )
    assert ran.returncode == 0, ran.stderr
    command = [sys.executable, tool, *options, "--device", "CPU", "--out", tmp_path / "b.png"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, env=with_root())
    found, expected = (np.asarray(Image.open(tmp_path / name), np.float64) for name in ("a.png", "b.png"))
    error = np.mean((found - expected) ** 2)
    assert 10 * np.log10(255**2 / error) > 35
    launched = [line.split(" ", 1)[1] for line in trace.read_text().splitlines()]
    assert not [name for name in launched if name.startswith("legacy")]
    assert launched.count("aclnnFlashAttentionScore") >= 2 * 2 * 8  # steps, attentions of a block, blocks


def test_the_command_is_what_runs(tmp_path):
    ran = host("--", sys.executable, "-c", "import sys; sys.exit(7)")
    assert ran.returncode == 7


SECONDS = """
import os, time
import mindspore as ms
ms.set_device("Ascend")
(ms.Tensor([1.0]) + 1).asnumpy()
time.sleep(1)
print(max(int(open(f"/proc/self/task/{task}/stat").read().rsplit(")", 1)[1].split()[11])
          for task in os.listdir("/proc/self/task") if int(task) != os.getpid()) / os.sysconf("SC_CLK_TCK"))
print("libjemalloc" in open("/proc/self/maps").read())
"""


def test_what_a_dry_run_loads_first():
    """MindSpore's own dry run asks for reports all the time, on a core of its own; its wheel has the allocator."""
    ran = host("--dry", "--", sys.executable, "-c", SECONDS)
    assert ran.returncode == 0, ran.stderr
    seconds, allocator = ran.stdout.splitlines()[:2]
    assert float(seconds) < 0.4
    assert allocator == "True" or os.sysconf("SC_PAGE_SIZE") != 4096


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "give the command after --"),
        (["--", "no-such-command-anywhere"], "no such command"),
        (["--cards", "2", "--", "true"], "--cards goes with --dry"),
        (["--dry", "--cards", "2", "--rank", "2", "--", "true"], "--rank 2 of --cards 2"),
        (["--gib", "0", "--", "true"], "--gib 0"),
    ],
)
def test_refusals(arguments, words):
    ran = host(*arguments)
    assert ran.returncode == 2 and ran.stderr.startswith("error: ") and words in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_beside_a_real_cann_it_refuses(monkeypatch, tmp_path):
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    with pytest.raises(MindSigmaError, match="ASCEND_HOME_PATH=.*real CANN"):
        environment.host_environment()
    monkeypatch.delenv("ASCEND_HOME_PATH")
    monkeypatch.setattr(environment, "PLACES", (str(tmp_path / "davinci[0-9]*"),))
    assert environment.real_cann() is None
    (tmp_path / "davinci0").touch()
    with pytest.raises(MindSigmaError, match="davinci0"):
        environment.host_environment()


def test_a_guided_step_has_no_launch_to_spare_and_each_has_its_line():
    """What MindSpore selects for sigma-mini's 8 blocks and the solver, and which lines of the source ask for it."""
    found = plan(Request("sigma-mini"), lines=True)
    assert found.launches[FAST] == {
        "Dense": 6 * 8 + 2, "FlashAttentionScore": 2 * 8, "AddcmulExt": 2 * 8, "LayerNormExt": 8 + 1,
        "AddLayerNormV2": 8, "SplitTensor": 8 + 1, "GeLU": 8, "Mul": 6, "Add": 5, "Transpose": 2, "Cast": 2, "Sub": 2,
        "Concat": 1, "Div": 1,
    }  # fmt: skip
    assert found.total[LEGACY] == found.total["other"] == 0
    told = sum((Counter(kinds) for kinds in found.lines.values()), Counter())
    assert told == found.launches[FAST]
    for line, kinds in found.lines.items():
        file, number = line.split(":")
        source = (ROOT / file).read_text().splitlines()[int(number) - 1]
        assert "FlashAttentionScore" not in kinds or "attention(" in source
        assert "GeLU" not in kinds or "gelu(" in source


QUICK = "step-1024-kv-bf16"


@pytest.mark.parametrize("name", [QUICK, *(pytest.param(one, marks=pytest.mark.slow) for one in CASES if one != QUICK)])
def test_launches_are_as_stored(name):
    """A launch more, or another line that makes it, is a change of the stored report: tools/export.py --update NAME."""
    stored = read_report(GOLDEN / "graphs" / f"{name}.json")
    lines, _ = differences(stored, {**stored, **stored_launches(CASES[name])})
    assert not lines, "\n".join(lines)
    for types in ("launches", "lines"):
        assert stored[types]
    told = sum((Counter(kinds) for kinds in stored["lines"].values()), Counter())
    assert told == sum((Counter(kinds) for type_, kinds in stored["launches"].items() if type_ != "view"), Counter())


@pytest.mark.slow
def test_a_training_step_on_cards(tmp_path):
    """The tool's words and numbers for two cards with ZeRO; of legacy kernels only those that differentiation makes."""
    file = tmp_path / "plan.json"
    command = [sys.executable, ROOT / "tools" / "plan.py", "--part", "train", "--height", 64, "--width", 64,
               "--tokens", 40, "--optimizer", "adamw", "--cards", 2, "--zero", 1, "--json", file]  # fmt: skip
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=580, env=with_root())
    assert ran.returncode == 0, ran.stderr
    assert (
        "fits       into 64 GiB" in ran.stdout
        and "not measured on an NPU" in ran.stdout
        and re.search(r"\d+ MiB at the peak", ran.stdout)
    )
    found = json.loads(file.read_text())
    assert set(found["launches"][LEGACY]) <= {"AddN", "FillV2"} and found["launches"][LEGACY].get("FillV2", 0) <= 1
    assert sum(found["launches"]["fast"].values()) < 2500
    weights = found["weight_mb"]
    # Beside weights of two bytes: a master and two states of four bytes each, divided among two cards.
    assert found["peak_mb"] > weights and 2.7 < found["state_mb"] / weights < 3.3
    assert 2.2 < found["sent_mb"] / weights < 2.8  # gradients in fp32, and half of the weights
    assert found["collectives"] > 10 and found["early"] >= 1 and found["waits"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "cards", "group"), [(0, 2, 0), (2, 2, 0), (2, 4, 2)])
def test_gradients_are_sent_beside_the_backward_pass(monkeypatch, zero, cards, group):
    """Of two tensors each, so that four blocks are enough: most are launched in it, and it never waits for them.

    So are the sums over groups of cards, which follow those within a group.
    """
    dry_run = "from mindsigma.training import step; step.LARGEST_SENT = 700_000"
    dry_run += "; from mindsigma.inspect.dry_run import main; main()"
    monkeypatch.setattr(launches, "DRY_RUN", ("-c", dry_run))
    request = Request("sigma-mini", "train", 64, 64, dtype="bf16", tokens=16, depth=4, weights=False)
    found = plan(replace(request, optimizer="adamw", recompute=True), cards, zero, zero_group=group)
    sent = found.launches[OTHER] | found.launches[FAST]
    gradients = sent["AllReduce"] - (zero == 2) + sent.get("ReduceScatter", 0)  # beside the sum of the norm
    assert found.early >= 0.8 * gradients > 15 and found.waits == 0
    assert sum(found.tenths[:7]) >= 5


@pytest.mark.slow
def test_blocks_are_computed_again_one_by_one():
    """With `recompute` only what enters a block is kept: not what all blocks make of it, computed again at once."""
    request = Request("sigma-mini", "train", 256, 256, 64, "bf16", 40, depth=4, weights=False, optimizer="lion")
    kept, again = (plan(replace(request, recompute=recompute)) for recompute in (False, True))
    attentions = [found.launches[FAST]["FlashAttentionScore"] for found in (kept, again)]
    assert attentions == [2 * 4, 2 * 2 * 4]
    own = [found.peak_mb - found.weight_mb - found.state_mb for found in (kept, again)]
    assert own[1] < 0.6 * own[0]


@pytest.mark.slow
def test_every_method_is_planned():
    """What a step keeps besides the weights, in numbers a weight: masters, states, averages, other networks."""
    request = Request(
        "PixArt-Sigma-XL-2-256x256",
        "train",
        64,
        64,
        depth=2,
        tokens=16,
        optimizer="adamw",
        dtype="fp16",
        recompute=True,
    )
    kinds = {
        "plain": {}, "lora": {"lora_rank": 4}, "controlnet": {"control_layers": 1},
        "lcm": {"method": "lcm"}, "dmd": {"method": "dmd"},
    }  # fmt: skip
    found = {name: plan(replace(request, **changes)) for name, changes in kinds.items()}
    weights = found["plain"].weight_mb  # of two bytes a number
    assert found["plain"].state_mb / weights == pytest.approx(6, rel=0.05)  # master and two states of four bytes
    assert found["lora"].state_mb < 0.1 * weights  # two states of few numbers
    assert weights < found["controlnet"].weight_mb < 3 * weights
    # A student of four bytes, a teacher of two, an average of four; the fake score instead of it learns, too.
    assert found["lcm"].weight_mb / weights == pytest.approx(2 + 1 + 2, rel=0.05)
    assert found["dmd"].weight_mb / weights == pytest.approx(2 + 1 + 2, rel=0.05)
    assert found["lcm"].state_mb / weights == pytest.approx(4, rel=0.05)
    assert found["dmd"].state_mb / weights == pytest.approx(8, rel=0.05)
    for one in found.values():
        assert one.peak_mb > one.weight_mb and one.launches[FAST]["FlashAttentionScoreGrad"] >= 1


def test_what_does_not_fit_is_told():
    command = [sys.executable, ROOT / "tools" / "plan.py", "--part", "caption", "--gib", 0.001]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=580, env=with_root())
    assert ran.returncode == 1 and ran.stdout.endswith("fits       not into 0.001 GiB\n"), ran.stderr
