"""Estimates from reports and peaks: closed forms, files of peaks, marks."""

import pytest
from conftest import load_tool

from mindsigma.errors import MindSigmaError
from mindsigma.inspect.roofline import Npu, bound_of, lines_of, read_npus

NPU = Npu("910B", fp16_tflops=100.0, bandwidth_gbs=1000.0)
REQUEST = {"model": "m", "part": "step", "height": 1024, "width": 1024, "dtype": "fp16", "kv_compression": None}


def report(*rows):
    return {"request": REQUEST, "costs": [list(row) for row in rows]}


def test_each_node_takes_the_larger_bound():
    heavy = ("MatMul", "cube", "fp16", 100 * 10**9, 10**6, 2)  # 1 ms of arithmetic, 1 us of memory, twice
    light = ("Add", "vector", "fp16", 10**6, 10**9, 3)  # 1 ms of memory, three times
    bound = bound_of(report(heavy, light), NPU)
    assert bound.seconds == pytest.approx(5e-3)
    assert bound.arithmetic == pytest.approx(2e-3)
    assert bound.memory == pytest.approx(3.002e-3)
    assert bound.kinds["Add"] == pytest.approx((3e-3, 3e-3)) and bound.kinds["MatMul"] == pytest.approx((2e-3, 0))
    assert bound_of(report(heavy, light), NPU, 0.5).seconds == pytest.approx(10e-3)
    vector = Npu("x", fp16_tflops=100.0, vector_tflops=1e-4, bandwidth_gbs=1000.0)
    assert bound_of(report(light), vector).seconds == pytest.approx(30e-3)
    assert bound_of(report(heavy), NPU).unbounded == []
    assert bound_of(report(("MatMul", "cube", "fp32", 1, 1, 1)), NPU).unbounded == ["MatMul"]
    with pytest.raises(MindSigmaError, match="--efficiency"):
        bound_of(report(heavy), NPU, 0.0)


def test_lines_are_marked_and_stand_beside_the_published():
    lines = lines_of(report(("MatMul", "cube", "fp16", 100 * 10**9, 10**6, 167)), NPU, kinds=1)
    assert all(line.startswith("estimate") for line in lines) and len(lines) == 2
    assert lines[0].split()[-2:] == ["167.0", "1.0"]  # published seconds of 1024 px, and their ratio
    assert "no bandwidth known" in lines_of(report(), Npu("910A", fp16_tflops=256.0))[0]


def test_the_file_of_peaks_and_its_errors(tmp_path, monkeypatch, capsys):
    tool = load_tool("roofline")
    npus = read_npus(tool.ROOT / "configs" / "npu.yaml")
    assert npus["910B"].fp16_tflops == 320 and npus["910A"].bandwidth_gbs is None
    file = tmp_path / "npu.yaml"
    for text, message in (
        ("- 1", "expected `NAME:`"),
        ("x:\n  tflops: 3", "unknown key 'tflops'"),
        ("x:\n  fp16_tflops: fast", "positive number"),
        ("x: [", "not YAML"),
    ):
        file.write_text(text)
        with pytest.raises(MindSigmaError, match=message):
            read_npus(file)
    with pytest.raises(MindSigmaError, match="cannot be read"):
        read_npus(tmp_path / "absent.yaml")
    monkeypatch.setattr("sys.argv", ["roofline.py", "--npu", "910B"])
    assert tool.main() == 0
    out = capsys.readouterr().out
    assert out.startswith("Estimates, not measurements") and out.count("estimate  910B") >= 2
    monkeypatch.setattr("sys.argv", ["roofline.py", "--npu", "911"])
    with pytest.raises(MindSigmaError, match="known: 910B"):
        tool.main()
