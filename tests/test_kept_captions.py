"""Captions of many prompts: those of each alone, in memory that does not grow with their number; memory is told."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import relative_error
from mindspore import Tensor

from mindsigma.pipeline import kept_captions, memory
from mindsigma.pipeline.kept_captions import KeptCaptions

TEXTS = ["a red apple", "two cats on a blue background beside a small rocket and a large sunflower", "a cat", "a cat"]
WORKER = Path(__file__).with_name("many_prompts_worker.py")


@pytest.mark.parametrize("at_once", [1, 64, 2048])
def test_captions_are_those_of_the_encoder(mini, monkeypatch, at_once):
    """However many are encoded together, and in whatever order they are asked for."""
    monkeypatch.setattr(kept_captions, "TOKENS_AT_ONCE", at_once)
    kept, seen = KeptCaptions(mini), []
    kept.encode(TEXTS, progress=seen.append)
    assert sum(seen) == 3 and (len(seen) == {1: 3, 64: 2, 2048: 1}[at_once])
    states, mask = kept.batch([TEXTS[2], TEXTS[0]])
    for row, text in enumerate((TEXTS[2], TEXTS[0])):
        caption = mini.encode_prompts([text])
        count = int(caption.mask.asnumpy().sum())
        assert mask[row].sum() == count and mask[row, :count].all()
        assert relative_error(states[row, :count], caption.states.asnumpy()[0, :count]) < 1e-6
        assert not states[row, count:].any()
    assert states.shape[1] == 16  # the bucket of these two, not of the longest of all
    assert kept.longest == int(mini.encode_prompts([TEXTS[1]]).mask.asnumpy().sum())


def test_negative_captions_are_kept_whole_where_that_is_asked(mini):
    """As the official convention needs them: with the states of padding, up to the longest prompt."""
    kept = KeptCaptions(mini)
    kept.negative.encode([""], 40)
    states, mask = kept.negative.batch([""])
    expected = mini.encode_prompts([""], min_length=40)
    assert states.shape[1] >= 40 and mask.sum() == 1
    assert relative_error(states[0, :40], expected.states.asnumpy()[0, :40]) < 1e-6


def test_states_go_to_a_file(mini, monkeypatch):
    monkeypatch.setattr(kept_captions, "IN_MEMORY", 1000)
    kept = KeptCaptions(mini)
    kept.encode(TEXTS)
    assert kept._file._rolled
    states, _ = kept.batch(TEXTS[:1])
    assert relative_error(states[0, :3], mini.encode_prompts(TEXTS[:1]).states.asnumpy()[0, :3]) < 1e-6


def test_many_prompts_take_the_memory_of_two():
    """Peak of the process, with 2 and with 400 prompts of some 80 tokens: encoded, kept and taken in batches."""
    peaks = {}
    for count in (2, 400):
        done = subprocess.run([sys.executable, WORKER, str(count)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        peaks[count] = json.loads(done.stdout)
    assert peaks[400] < 1.2 * peaks[2], peaks


# memory is told before the work


def test_small_weights_are_not_worth_a_line(mini):
    assert memory.told(mini, free=8e9) == []
    assert "too little" in memory.told(mini, free=1e6)[0]


def test_what_is_said_of_large_weights(mini, monkeypatch):
    sizes = {"t5": 19.05e9, "dit": 2.44e9, "vae": 0.33e9}
    parts = {id(mini.components.opened(name)): size for name, size in sizes.items()}
    monkeypatch.setattr(memory, "weight_bytes", lambda pending: parts[id(pending)])
    assert memory.told(mini, free=62e9) == [
        "memory: weights of T5 19.1 GB, then DiT 2.4 GB and VAE 0.3 GB; free are 62.0 GB"
    ]
    assert memory.told(mini, free=8e9)[0].endswith(
        "free are 8.0 GB, too little for T5: --text-encoder-memory layers reads it layer by layer, int8 in a quarter"
    )
    sizes["t5"] = 1e9
    parts.update((id(mini.components.opened(name)), size) for name, size in sizes.items())
    assert memory.told(mini, free=2e9)[0].endswith("too little: the machine will swap or end this process")


def test_weights_are_counted_as_they_are_held():
    from mindsigma.weights.loading import open_t5
    from mindsigma.weights.locate import BUNDLED

    folder = BUNDLED / "sigma-mini"
    whole, layers, int8 = (memory.weight_bytes(open_t5(folder, memory=kind)) for kind in ("whole", "layers", "int8"))
    assert whole == 4 * 3_180_928
    assert 0.15 * whole < layers < 0.25 * whole  # one of four layers; the embedding is read row by row
    assert 0.15 * whole < int8 < 0.25 * whole
    assert memory.free_bytes() > 1e8 and memory.resident_bytes() > 1e7


def test_bars_over_what_takes_long(mini, monkeypatch, capsys):
    """Over the weights that are read and over T5's layers, in memory and streamed; the states do not change."""
    from mindsigma.pipeline import text
    from mindsigma.weights import loading
    from mindsigma.weights.locate import BUNDLED

    expected = mini.encode_prompts(TEXTS[:1])
    for module in (text, loading):
        monkeypatch.setattr(module, "WORTH_A_BAR", 0)
        monkeypatch.setattr(module, "DELAY_SECONDS", 0)
    found = mini.encode_prompts(TEXTS[:1])
    assert "T5: 100% 4/4 layers in " in capsys.readouterr().err
    np.testing.assert_array_equal(found.states.asnumpy(), expected.states.asnumpy())
    encoder = loading.open_t5(BUNDLED / "sigma-mini", memory="layers").load()
    ids = np.zeros((1, 16), np.int32)
    encoder(Tensor(ids), Tensor(np.ones_like(ids)))
    assert capsys.readouterr().err.startswith("T5: 100% 4/4 layers in ")
    loading.open_t5(BUNDLED / "sigma-mini").load()
    assert "load T5Encoder: 100% 0.01/0.01 GB in " in capsys.readouterr().err
