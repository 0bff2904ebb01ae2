"""convert.py --inspect says what a file holds: networks, adapters, checkpoints of runs, and what is none of these."""

import json

import numpy as np
import pytest
from conftest import GOLDEN, official_checkpoint
from safetensors.numpy import save_file
from test_picture_metadata import write_adapter
from training_runs import write_network

from mindsigma.conversion.inspection import inspect
from mindsigma.errors import MindSigmaError
from mindsigma.weights.locate import BUNDLED


def told(path):
    """dict of the lines (first word: list of the rest)."""
    result = {}
    for line in inspect(path):
        word, _, rest = line.strip().partition(" ")
        result.setdefault(word, []).append(rest.strip())
    return result


def test_a_pipeline():
    found = told("sigma-mini")
    assert [line for line in inspect("sigma-mini") if line[:1] not in ("", " ")][1:] == [
        f"DiT, {BUNDLED}/sigma-mini/dit",
        f"VAE, {BUNDLED}/sigma-mini/vae",
        f"T5 encoder, {BUNDLED}/sigma-mini/text_encoder",
        f"tokenizer, {BUNDLED}/sigma-mini/tokenizer",
        "also     3 beside the networks: LICENSE.md, lcm.safetensors, samples.png",
    ]
    assert found["tensors"][0] == "135, 11,489,216 numbers, 0.023 GB"
    assert found["dtype"][0] == "float16 (11,489,216 numbers)"
    assert {"depth: 8", "input_size: 32", "hidden_size: 288"} <= set(found["config"])
    assert "format: mindsigma" in found["header"]


def test_an_official_file():
    found = told(official_checkpoint())
    assert "model_max_length: 300" in found["config"] and found["dtype"] == ["float16 (11,566,016 numbers)"]


def test_a_file_that_does_not_tell_enough():
    found = told(GOLDEN / "ms_kv_conv.pth")
    assert found["DiT"] == [""] and found["tensors"] == ["51, 416,992 numbers, 0.002 GB"]
    assert "does not tell num_heads" in found["note"][0]


def test_an_adapter(tmp_path):
    write_adapter(tmp_path / "style.safetensors")
    found = told(tmp_path / "style.safetensors")
    assert found["kind"] == ["LoRA, an adapter of a DiT: rank 4, 1 modules"] and found["modules"] == [
        "1: blocks.0.attn.proj"
    ]


def test_a_checkpoint_of_a_run(tmp_path):
    """With the step, from the state.json beside it."""
    write_network(tmp_path / "step_00000007" / "dit")
    state = {"step": 7, "identity": {"batch": 4, "optimizer": "came", "learning_rate": 1e-4}, "validation_loss": 0.25}
    (tmp_path / "step_00000007" / "state.json").write_text(json.dumps(state))
    for path in ("step_00000007", "step_00000007/dit"):
        found = told(tmp_path / path)
        assert found["training"] == ["step 7, validation_loss 0.25, batch 4, optimizer came, learning_rate 0.0001"]
    (tmp_path / "step_00000007" / "state.json").write_text("{")
    assert "is not valid JSON" in told(tmp_path / "step_00000007")["training"][0]


def test_other_things(tmp_path):
    save_file({"a.weight": np.zeros((2, 3), np.float32)}, tmp_path / "x.safetensors", {"who": "a\nb"})
    found = told(tmp_path / "x.safetensors")
    assert found["no"] == ["network that is known here"] and found["names"] == ["1: a.weight"]
    assert found["header"] == ["who: a\\nb"]
    (tmp_path / "text").write_text("no weights")
    with pytest.raises(MindSigmaError, match="neither a safetensors file"):
        inspect(tmp_path / "text")


def test_the_folder_of_a_run(tmp_path):
    """Beside its checkpoints lies a file of tensors, which is not what anybody asks about."""
    save_file({"keys": np.zeros(3)}, tmp_path / "data.safetensors")
    product = tmp_path / "checkpoints" / "step_00000030" / "dit"
    product.mkdir(parents=True)
    with pytest.raises(MindSigmaError, match=f"holds no weights itself; it is the folder of a run: give {product}"):
        inspect(tmp_path)


def test_the_option_needs_nothing_else(convert_tool, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["convert.py", "--inspect", "sigma-mini"])
    with pytest.raises(SystemExit) as caught:
        convert_tool.main()
    assert caught.value.code == 0 and "depth: 8" in capsys.readouterr().out
