"""The memory that is told before the work is what a run then holds; nothing is said of what is small."""

import numpy as np
import pytest
from training_runs import TOKENS, options, square_features, tiny_dit

from mindsigma.pipeline import memory
from mindsigma.training import distill_options, needed, run_options
from mindsigma.training.extraction import Encoders
from mindsigma.training.learner import WholeLearner
from mindsigma.training.needed import Needed
from mindsigma.training.trainer import Trainer

KINDS = {
    "all weights": {"optimizer": "adamw"},
    "no average": {"optimizer": "lion", "ema_decay": None},
    "half precision": {"optimizer": "adamw", "dtype": "fp16", "accumulation": 2},
    "came": {"optimizer": "came"},
    "adapter": {"lora_rank": 2, "recompute": None},
    "controlnet": {"method": "controlnet", "optimizer": "adamw"},
    "lcm": {"method": "lcm", "optimizer": "adamw"},
    "lcm, adapter": {"method": "lcm", "lora_rank": 2, "recompute": None},
    "dmd": {"method": "dmd", "optimizer": "adamw"},
}


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A network whose blocks are most of it, as of those that are trained."""
    folder = tmp_path_factory.mktemp("network")
    dit = tiny_dit(hidden_size=128, depth=4)
    WholeLearner(dit, np.zeros((TOKENS, 256), np.float32)).write(folder)
    return folder


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return square_features(tmp_path_factory.mktemp("data") / "features", 8, condition=True)


def size_of(parameters):
    """Bytes of Parameters, each once."""
    return sum(one.size * one.itemsize for one in {id(one): one for one in parameters}.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_holds_what_was_told(network, features, tmp_path, kind, monkeypatch):
    """All Parameters of its networks and steps, once it is built."""
    seen = []
    monkeypatch.setattr(needed, "told", lambda *found: seen.append(found) or [])
    arguments = options(network, features, tmp_path, **KINDS[kind])
    distilling = KINDS[kind].get("method") in ("lcm", "dmd")
    build = distill_options.build_parser if distilling else run_options.build_parser
    args = build().parse_args(arguments)
    run = Trainer(distill_options.complete(args) if distilling else args)
    ((told, encoders),) = seen
    steps = run.method.steps().values()
    found = [one for step in steps for part in (step.masters, step.ema, step.states, step.sums) for one in part]
    found += [one for step in steps for one in step.objective.get_parameters()]
    found += [one for controlnet in run.method.controlnets() for one in controlnet.get_parameters()]
    assert encoders == []
    small = 0.1 if kind in ("adapter", "controlnet", "lcm, adapter", "came") else 1e-9
    assert told.weights + told.states == pytest.approx(size_of(found), rel=small)
    if "adapter" not in kind and kind != "dmd":
        assert told.gradients == pytest.approx(4 * sum(one.size for one in run.training.parameters), rel=small)


def test_what_is_said_of_a_run():
    xl = Needed(2.44e9, 2.44e9, 4.89e9)
    sizes = "memory: weights 2.4 GB, gradients 2.4 GB and states 4.9 GB, beside what a step computes"
    assert needed.told(xl, free=64e9) == [f"{sizes}; free are 64.0 GB"]
    assert needed.told(xl, free=8e9)[0].endswith("too little: the machine will swap or end this process")
    (line,) = needed.told(xl, [("T5", 19.05e9), ("VAE", 0.33e9)], free=16e9)
    assert ": T5 19.1 GB, VAE 0.3 GB, weights" in line and "too little for T5: extract features first" in line
    assert needed.told(Needed(1e6, 1e6, 2e6), free=8e9) == []


def test_processes_divide():
    flags = ["--data", "x", "--output", "y", "--optimizer", "adamw", "--zero", "2"]
    args = run_options.build_parser().parse_args(flags)
    assert needed.learning(args, 1000, processes=4) == Needed(4000, 1000, 2000)
    args.zero, args.recompute = 3, True
    assert needed.learning(args, 1000, processes=4) == Needed(1000, 1000, 2000)


def test_what_is_said_of_extraction(monkeypatch):
    encoders = Encoders("sigma-mini")
    assert encoders.memory(free=8e9) == []
    t5 = encoders.components.opened("t5")
    monkeypatch.setattr(memory, "weight_bytes", lambda pending: 19.05e9 if pending is t5 else 0.33e9)
    assert encoders.memory(free=8e9) == [
        "memory: weights of T5 19.1 GB and VAE 0.3 GB; free are 8.0 GB, too little for T5: "
        "--text-encoder-memory layers reads it layer by layer"
    ]


def test_states_are_the_same_bits_layer_by_layer():
    whole, layers = (Encoders("sigma-mini", text_encoder_memory=memory) for memory in ("whole", "layers"))
    texts = ["a red apple", "", "two cats on a sofa"]
    found = [encoders.states(texts, 40) for encoders in (whole, layers)]
    assert whole.identity == layers.identity
    np.testing.assert_array_equal(found[0][0], found[1][0])
