"""The profiling recipe on a CPU: steps are timed, the profiler's tables are read, rows are printed."""

import json

import mindspore as ms
import numpy as np
import pytest
from conftest import load_tool
from mindspore import Tensor, ops

from mindsigma.errors import MindSigmaError
from mindsigma.inspect.profiling import denoising, dit_of, kernels_of, model_name, read_tables, software, timed

# As CANN's profiler writes it, cut to what is read; two files are two devices.
OP_STATISTIC = """Device_id,OP Type,Core Type,Count,Total Time(us),Min Time(us)
0,MatMulV2,AI_CORE,10,2500.5,1
0,FlashAttentionScore,MIX_AIC,2,4000.0,1
"""


def test_tables_of_the_profiler_are_read(tmp_path):
    folder = tmp_path / "run" / "ASCEND_PROFILER_OUTPUT"
    folder.mkdir(parents=True)
    (folder / "op_statistic_1.csv").write_text(OP_STATISTIC)
    (folder / "op_statistic_2.csv").write_text(OP_STATISTIC)
    rows = read_tables(tmp_path)
    assert [row[:2] for row in rows] == [["FlashAttentionScore", 4], ["MatMulV2", 20]]
    assert [row[2] for row in rows] == pytest.approx([8e-3, 5.001e-3])
    assert read_tables(tmp_path / "absent") == []


def test_profiler_counts_the_kernels_of_this_device():
    x = Tensor(np.ones((16, 16), np.float32))
    rows = kernels_of(lambda: ops.matmul(x, x).asnumpy(), 3)
    assert ["MatMul", 3] in [row[:2] for row in rows]
    assert all(seconds > 0 for _, _, seconds in rows)


def test_a_denoising_step_is_timed():
    calls = []
    result = timed(lambda: calls.append(1), 2, 3, 0)
    assert len(calls) == 5 and len(result["seconds"]) == 3 and result["kernels"] == []
    run = denoising("sigma-mini", 64, "fp32", 16)
    first, second = run(), run()
    assert first.shape == (1, 4, 8, 8) and np.isfinite(second).all() and not np.array_equal(first, second)


def test_names():
    assert model_name("xl", 2048) == "PixArt-Sigma-XL-2-2K-MS" and model_name("sigma-mini", 77) == "sigma-mini"
    with pytest.raises(MindSigmaError, match="--sizes 300"):
        model_name("xl", 300)
    with pytest.raises(MindSigmaError, match="--model unet: not a preset"):
        dit_of("unet", ms.float32)
    assert software()["device"] == "CPU" and software()["mindspore"] == ms.__version__


@pytest.mark.slow
def test_tool_writes_rows_and_numbers(monkeypatch, tmp_path, capsys):
    tool = load_tool("profile_npu")
    out = tmp_path / "profile.json"
    options = ["--model", "sigma-mini", "--sizes", "64", "--train-sizes", "64", "--tokens", "16", "--warm-up", "1"]
    monkeypatch.setattr("sys.argv", ["profile_npu.py", *options, "--steps", "2", "--profiled", "1", "--out", str(out)])
    assert tool.main() == 0
    text = capsys.readouterr().out
    assert "| CPU | sigma-mini | guided step, 64 px, float32 |" in text and "training step, batch 1, 64 px" in text
    report = json.loads(out.read_text())
    assert report["versions"]["device"] == "CPU"
    for case in report["cases"]:
        assert len(case["seconds"]) == 2 and case["peak_bytes"] > 1e8
    step, training = ({kind for kind, _, _ in case["kernels"]} for case in report["cases"])
    assert {"Concat", "Mul"} <= step and "Mul" in training, (step, training)  # products are the library's on a CPU
