"""The recipes of 2K and 4K at their real sizes, with a network of one narrow block: 16384 and 65536 tokens.

And their options of precision at a small size, beside fp32.
"""

import numpy as np
import pytest
from training_runs import ROOT, checkpoint, log_lines, options, stored, train, write_features, write_network

from mindsigma.data.resolution import Resolution


@pytest.mark.slow
@pytest.mark.parametrize("side,factor,shapes", [(2048, 2, 2), (4096, 8, 1)], ids=["2K", "4K"])
def test_recipe(side, factor, shapes, tmp_path):
    """Two steps in each bucket, from a network of half the size that compresses its keys already.

    The recipe's own options, but for the batch. 4K compresses by 8 a side instead of 2: a CPU keeps the weights of
    attention for the backward pass, several times.
    """
    network = {
        "hidden_size": 32,
        "depth": 1,
        "num_heads": 1,
        "input_size": side // 16,
        "pe_interpolation": side / 1024,
        "model_max_length": 300,
        "kv_compression": f"conv:{factor}:0",
    }
    network = write_network(tmp_path / "network", **network)
    sizes = [(side, side), (side // 2, side * 2)][:shapes]
    features = write_features(tmp_path / "features", sizes * 2, Resolution(side, True), 300)
    # Left to the recipe: what `options` sets for tiny runs.
    own = ("resolution", "max_length", "learning_rate", "max_norm", "ema_decay", "save_every")
    steps = 2 * shapes
    recipe = ROOT / "configs" / "train" / f"{side // 1024}K-MS-KV.yaml"
    changes = {**dict.fromkeys(own), "config": recipe, "batch_size": 1, "steps": steps}
    output = tmp_path / "run"
    run = train(options(network, features, output, **changes), output, seconds=3600)
    assert f"changed: resolution: input_size {side // 16} to {side // 8}" in run.text()
    lines = log_lines(output)
    assert {(line["height"], line["width"]) for line in lines} == set(sizes)
    assert len(lines) == steps and all(np.isfinite(line["loss"]) for line in lines)
    assert any(line["skipped"] == 0 for line in lines)
    values = stored(checkpoint(output, steps))
    assert all(np.isfinite(value).all() for value in values.values())


def test_half_precision_of_recomputed_blocks(tmp_path):
    """On a CPU, without and with fp32 attention: losses near those in fp32."""
    network = {"hidden_size": 32, "depth": 2, "num_heads": 1, "input_size": 16, "kv_compression": "conv:2:1"}
    network = write_network(tmp_path / "network", **network, model_max_length=20)
    features = write_features(tmp_path / "features", [(128, 128)] * 2, Resolution(128, False), 20)
    losses = []
    for i, changes in enumerate(({}, {"dtype": "fp16"}, {"dtype": "fp16", "fp32_attention": True})):
        output = tmp_path / str(i)
        changes = {"resolution": 128, "batch_size": 2, "steps": 2, "recompute": True, "max_length": 20, **changes}
        train(options(network, features, output, **changes), output)
        losses.append([line["loss"] for line in log_lines(output)])
    assert len(losses[0]) == 2
    for half in losses[1:]:
        assert half == pytest.approx(losses[0], rel=5e-3) and half != losses[0]
