"""Runs of tools/distill.py: who learns and who does not, resumed bit for bit, two processes, graph mode, pairs."""

import shutil

import mindspore as ms
import numpy as np
import pytest
from conftest import load_tool, relative_error
from lpips_cases import drawn_weights, two_files, write_weights
from test_training_kills import kill_chain
from training_runs import (
    ROOT,
    assert_same,
    checkpoint,
    largest_difference,
    log_lines,
    options,
    parts_of,
    run_here,
    square_features,
    stored,
    train,
    write_network,
)

from mindsigma.data import FeatureSet
from mindsigma.errors import MindSigmaError
from mindsigma.training.distill_options import build_parser, complete
from mindsigma.training.loss import COLUMNS
from mindsigma.training.pictures import needed_of_pictures
from mindsigma.weights.names.dit_names import NULL_CAPTION

STEPS = 4
DISTILL = ROOT / "tools" / "distill.py"
# AdamW's eps above rounding errors, as in test_training_distributed.py.
COMMON = {"optimizer": "adamw", "eps": 1e-3, "steps": STEPS, "save_every": 1, "ema_decay": None}
KINDS = {
    "lcm": {"method": "lcm"},
    "lcm-lora": {"method": "lcm", "lora_rank": 2, "recompute": None},
    "dmd": {"method": "dmd"},
    "dmd-lora": {"method": "dmd", "lora_rank": 2, "accumulation": 2, "batch_size": 2, "ema_decay": 0.9},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders of a tiny network and of features."""
    folder = tmp_path_factory.mktemp("data")
    return write_network(folder / "network", depth=1), square_features(folder / "features")


def distil(data, output, kind, stop=lambda: False, **changes):
    """Run in this process; the Trainer afterwards."""
    changes = {**COMMON, **KINDS[kind], **changes}
    return run_here(lambda args: complete(build_parser().parse_args(args)), data, output, stop, **changes)


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    """A function that gives the folder of a finished run of a kind, made at the first call."""
    folder, made = tmp_path_factory.mktemp("done"), {}

    def run(kind):
        if kind not in made:
            made[kind] = folder / kind, distil(data, folder / kind, kind)
        return made[kind][0]

    return run


@pytest.fixture
def finished(done, kind):
    """The folder of a finished run, made before what is asked for after it."""
    return done(kind)


@pytest.mark.parametrize("kind", ["lcm", "lcm-lora"])
def test_the_target_is_the_average_of_the_student(data, done, kind):
    """0.95 of the target before, 0.05 of the student after, at every step; the first target is the student."""
    names = ("adapter", "adapter_ema") if "lora" in kind else ("dit", "ema")
    before, after = (parts_of(checkpoint(done(kind), step)) for step in (STEPS - 1, STEPS))
    moved = 0
    for name, value in after[names[1]].items():
        wanted = 0.95 * before[names[1]][name].astype(np.float64) + 0.05 * after[names[0]][name]
        np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-7)
        moved += not np.array_equal(before[names[0]][name], after[names[0]][name])
    assert moved > 10


@pytest.mark.parametrize("kind", ["lcm", "lcm-lora", "dmd"])
def test_the_teacher_stays(data, tmp_path, kind):
    """It has the weights that the run began from, shares none of those that learn, and gets no gradient."""
    trainer = distil(data, tmp_path / "run", kind, steps=2, learning_rate=0.01)
    teacher = trainer.training.objective.teacher
    started = {key.split("/", 1)[1]: value for key, value in stored(data[0]).items()}
    for name, parameter in teacher.parameters_and_names():
        np.testing.assert_array_equal(parameter.asnumpy(), started[name], err_msg=name)
    learning = {id(parameter) for step in trainer.method.steps().values() for parameter in step.parameters}
    assert not [p.name for p in teacher.get_parameters() if id(p) in learning or p.requires_grad]
    assert not teacher.training and trainer.dit.training
    names = [parameter.name for cell in (trainer.dit, teacher) for parameter in cell.get_parameters()]
    assert kind == "lcm-lora" or len(set(names)) == len(names), "a graph wants one name for each"


def test_the_two_steps_of_dmd_leave_each_other_alone(data, tmp_path):
    """A fake score that does not learn changes no bit of the generator's first step; with a rate it learns itself."""
    for name, rate in (("still", 0.0), ("learns", 1e-3)):
        distil(data, tmp_path / name, "dmd", steps=1, dmd_fake_learning_rate=rate)
    still, learns = (parts_of(checkpoint(tmp_path / name, 1)) for name in ("still", "learns"))
    start = {key.split("/", 1)[1]: value for key, value in stored(data[0]).items()}
    del start[NULL_CAPTION]  # which a run replaces
    for name in start:
        assert still["dit"][name].tobytes() == learns["dit"][name].tobytes(), name
        np.testing.assert_array_equal(still["fake"][name], start[name], err_msg=name)
    assert sum((learns["fake"][name] != start[name]).any() for name in start) > 10
    assert sum((learns["dit"][name] != start[name]).any() for name in start) > 10


def test_snr_gamma_weights_the_generator_alone(data, tmp_path):
    trainer = distil(data, tmp_path / "run", "dmd", steps=1, dmd_snr_gamma=1.0)
    mine, others = trainer.method.micro_batches(next(trainer.loader.batches(0, 1)))[0]
    column = COLUMNS.index("weight")
    assert (mine[2].asnumpy()[:, column] < 1).any() and (others[1].asnumpy()[:, column] == 1).all()


def test_what_a_step_of_dmd_tells(done):
    lines = log_lines(done("dmd"))
    assert len(lines) == STEPS
    for line in lines:
        assert line["loss"] == line["matching"] > 0 and line["fake"] > 0
        assert line["grad_norm"] > 0 and line["fake_grad_norm"] > 0 and line["fake_skipped"] == 0
    assert len({line["fake"] for line in lines}) == STEPS


@pytest.mark.parametrize("kind", ["lcm", "lcm-lora", "dmd", "dmd-lora"])
def test_a_stopped_run_goes_on_to_the_same_bits(data, done, tmp_path, kind):
    output = tmp_path / "run"
    distil(data, output, kind, stop=lambda: True)
    assert not checkpoint(output, 2).exists()
    distil(data, output, kind)
    for step in (STEPS - 1, STEPS):
        assert_same(checkpoint(output, step), checkpoint(done(kind), step))
    assert log_lines(output) == log_lines(done(kind))


def test_half_precision(data, done, tmp_path):
    """fp16 activations with loss scales of their own follow fp32; what is kept is fp32."""
    distil(data, tmp_path / "run", "dmd", dtype="fp16", steps=2)
    lines, wanted = log_lines(tmp_path / "run"), log_lines(done("dmd"))[:2]
    assert all(line["loss_scale"] == line["fake_loss_scale"] == 65536 for line in lines)
    np.testing.assert_allclose([line["fake"] for line in lines], [line["fake"] for line in wanted], rtol=0.02)
    assert all(value.dtype == np.float32 for value in stored(checkpoint(tmp_path / "run", 2)).values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lcm", "dmd"])
def test_two_processes_are_one_with_the_doubled_batch(data, done, tmp_path, kind):
    """With states divided among them, clipped by the global norm."""
    arguments = options(*data, tmp_path / "run", **{**COMMON, **KINDS[kind], "batch_size": 2, "zero": 1})
    train(arguments, tmp_path / "logs", ranks=2, script=DISTILL)
    last = checkpoint(tmp_path / "run", STEPS)
    parts = ("dit", "ema" if kind == "lcm" else "fake", "states")
    assert largest_difference(last, checkpoint(done(kind), STEPS), parts) < 1e-5
    assert len(list(last.glob("states-*.safetensors"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lcm-lora", "dmd"])
def test_killed_runs_go_on(data, done, tmp_path, kind):
    """Two kills at random instants, and the bits of the run in one go."""
    output = tmp_path / "run"
    arguments = options(*data, output, **{**COMMON, **KINDS[kind]})
    kill_chain(arguments, output, done(kind), ranks=1, seed=5, kills=2, script=DISTILL)
    train(arguments, output / "logs", script=DISTILL)
    assert_same(checkpoint(output, STEPS), checkpoint(done(kind), STEPS))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lcm", "lcm-lora", "dmd"])
def test_one_graph(data, finished, tmp_path, kind, graph_runs):
    """The step as an NPU runs it, as one graph, the networks beside the student in it."""
    distil(data, tmp_path / "run", kind)
    parts = ("dit", "ema", "adapter", "adapter_ema", "fake", "states")
    assert largest_difference(checkpoint(tmp_path / "run", STEPS), checkpoint(finished, STEPS), parts) < 1e-4


def test_drawn_guidance(data, tmp_path):
    """Each sample has its own, from its draw; a fixed one is the same for all."""
    from mindsigma.training import lcm

    trainer = distil(data, tmp_path / "run", "lcm", steps=1, lcm_guidance=None)
    batch = next(trainer.loader.batches(0, 1))
    column = lcm.COLUMNS.index("guidance")
    assert set(trainer.method.micro_batches(batch)[0][2].asnumpy()[:, column]) == {np.float32(4.5)}
    args = trainer.args
    args.lcm_guidance = [3.0, 15.0]
    inputs = trainer.method.inputs
    inputs.loss = trainer.method.config_of(args)
    found = [trainer.method.micro_batches(batch)[0][2].asnumpy()[:, column] for _ in range(2)]
    np.testing.assert_array_equal(*found)
    assert len(set(found[0])) == len(found[0]) and found[0].min() >= 3 and found[0].max() <= 15


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"method": "lcm", "dmd_time": 300}, "--dmd-time belongs to --method dmd"),
        ({"method": "dmd", "lcm_loss": "l2"}, "--lcm-loss belongs to --method lcm"),
        ({"method": "lcm", "ema_decay": 0}, "--ema-decay of the target"),
        ({"method": "lcm", "fresh": True}, "--fresh: the teacher is"),
        ({"method": "lcm", "lcm_huber": "nan"}, "--lcm-huber"),
        ({"method": "dmd", "validation_data": "x"}, "--validation-data"),
        ({"method": "dmd", "dmd_regression": "l2"}, "tools/make_pairs.py"),
        ({"method": "dmd", "dmd_regression": "lpips"}, "needs --lpips-weights. LPIPS takes two files: vgg16-397923af"),
        ({"method": "dmd", "dmd_regression": "lpips", "lpips_weights": "absent.pth"}, "absent.pth: no such file"),
        ({"method": "dmd", "lpips_weights": "vgg.pth"}, "--lpips-weights belongs to --method dmd --dmd-regression"),
        ({"method": "lcm", "lpips_weights": "vgg.pth"}, "--lpips-weights belongs to --method dmd --dmd-regression"),
        ({"method": "dmd", "dmd_fake_warmup": -1}, "--dmd-fake-warmup"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_wrong_options(data, tmp_path, changes, said):
    with pytest.raises(MindSigmaError, match=said) as caught:
        distil(data, tmp_path / "run", changes["method"], **changes)
    assert "\n" not in str(caught.value) and not list(tmp_path.rglob("state.json"))


def test_another_teacher_is_refused(data, done, tmp_path):
    shutil.copytree(done("lcm-lora"), tmp_path / "run")
    other = write_network(tmp_path / "network", depth=1, seed=6)
    with pytest.raises(MindSigmaError, match="trained with a teacher"):
        distil((other, data[1]), tmp_path / "run", "lcm-lora", steps=STEPS + 1)


def test_held_out_loss_of_lcm(data, done, tmp_path):
    """It is measured with the student's averages and disturbs nothing."""
    distil(data, tmp_path / "run", "lcm", validation_data=data[1], validate_every=2, validation_points=2)
    assert_same(checkpoint(tmp_path / "run", STEPS), checkpoint(done("lcm"), STEPS))
    losses = [line["validation_loss"] for line in log_lines(tmp_path / "run") if "validation_loss" in line]
    assert len(set(losses)) == 3 and np.isfinite(losses).all()


# pairs


@pytest.fixture(scope="module")
def pairs(data, tmp_path_factory):
    """Folder of pairs, made in two goes."""
    folder, tool = tmp_path_factory.mktemp("pairs") / "pairs", load_tool("make_pairs")
    small = square_features(folder.parent / "features", 6)
    arguments = [small, folder, "--model", data[0], "--components", "sigma-mini", "--steps", 2, "--device", "CPU"]
    with pytest.MonkeyPatch.context() as patch:
        for rank in (1, 0):
            patch.setattr("sys.argv", ["make_pairs.py", *map(str, arguments), "--ranks", "2", "--rank", str(rank)])
            assert tool.main() == 0
            assert (folder / "index.jsonl").exists() == (rank == 0)
    return folder


def test_pairs_are_what_the_teacher_draws(data, pairs):
    """The noise follows from the place, the latents are those of the sampler, the captions the source's."""
    from mindsigma import PixArtSigmaPipeline
    from mindsigma.sampling.captions import Caption
    from mindsigma.sampling.options import SamplingOptions

    found, source = FeatureSet(pairs), FeatureSet(pairs.parent / "features")
    assert found.has_noise and not source.has_noise and len(found) == len(source) == 6
    pipeline = PixArtSigmaPipeline.from_pretrained(str(data[0]), components="sigma-mini", device="CPU")
    config = pipeline.components.opened("vae").config
    null, mask = source.null_caption()
    for i in (0, 5):
        moments, states = found.read(i, True)
        mean, deviation = np.split(moments, 2)
        assert not deviation.any()
        np.testing.assert_array_equal(states, source.read(i, True)[1])
        caption = Caption(ms.Tensor(states[None]), ms.Tensor(np.ones((1, len(states)), np.int32)))
        negative = Caption(ms.Tensor(null[None]), ms.Tensor(mask[None]))
        *_, last = pipeline.denoise(found.noise(i)[None], caption, negative, SamplingOptions(num_inference_steps=2))
        wanted = last.latents.asnumpy()[0]
        assert relative_error((mean - config.shift_factor) * config.scaling_factor, wanted) < 1e-4
    assert np.abs(found.noise(0) - found.noise(1)).max() > 1


def test_regression_on_pairs(data, pairs, tmp_path):
    """The generator begins from the stored noise, and its latents are pulled to the stored ones."""
    trainer = distil(data, tmp_path / "run", "dmd", features=pairs, dmd_regression="huber", steps=2)
    lines = log_lines(tmp_path / "run")
    assert all(line["regression"] > 0 for line in lines)
    assert lines[0]["loss"] == pytest.approx(lines[0]["matching"] + lines[0]["regression"])
    batch = next(trainer.loader.batches(0, 1))
    mine, _ = trainer.method.micro_batches(batch)[0]
    np.testing.assert_array_equal(mine[0].asnumpy(), batch.noise)
    mean = np.split(batch.moments, 2, 1)[0]
    config = trainer.components.opened("vae").config
    np.testing.assert_allclose(mine[8].asnumpy(), (mean - config.shift_factor) * config.scaling_factor, rtol=1e-6)


def test_pairs_made_otherwise_are_refused(data, pairs, monkeypatch):
    arguments = [pairs.parent / "features", pairs, "--model", data[0], "--components", "sigma-mini", "--steps", 3]
    monkeypatch.setattr("sys.argv", ["make_pairs.py", *map(str, arguments)])
    with pytest.raises(MindSigmaError, match="holds features made with pairs"):
        load_tool("make_pairs").main()


# LPIPS


@pytest.fixture(scope="module")
def judged(data, pairs, tmp_path_factory):
    """(options, folder of a run of two steps by tools/distill.py): DMD with LPIPS, whose files a config names."""
    folder = tmp_path_factory.mktemp("lpips")
    vgg, heads = two_files(folder)
    config = folder / "lpips.yaml"
    config.write_text(f"method: dmd\ndmd-regression: lpips\nlpips-weights: [{vgg}, {heads}]\n")
    changes = {**COMMON, "config": config, "steps": 2, "batch_size": 2}
    train(options(data[0], pairs, folder / "run", **changes), folder / "logs", script=DISTILL)
    same = {"dmd_regression": "lpips", "lpips_weights": heads.parent / "both.safetensors", "features": pairs}
    write_weights(heads.parent / "both.safetensors", drawn_weights())
    return {**same, "steps": 2, "batch_size": 2}, folder / "run"


@pytest.mark.slow
def test_lpips_in_a_run(data, judged, tmp_path):
    """It is a part of the loss. Stopped, and continued with the same weights from another file, the bits are the same;
    with other weights the run does not go on."""
    changes, run = judged
    lines = log_lines(run)
    assert all(line["regression"] > 0 and line["loss"] > line["regression"] for line in lines) and len(lines) == 2
    distil(data, tmp_path / "run", "dmd", stop=lambda: True, **changes)
    trainer = distil(data, tmp_path / "run", "dmd", **changes)
    assert_same(checkpoint(tmp_path / "run", 2), checkpoint(run, 2))
    pictures = trainer.training.objective.pictures
    assert not any(weight.requires_grad for weight in pictures.get_parameters())
    held = sum(weight.size * 4 for weight in pictures.get_parameters())
    assert needed_of_pictures(trainer.components.opened("vae")).weights == held
    other = {**drawn_weights(), "lin4.model.1.weight": np.ones((1, 512, 1, 1), np.float32)}
    changes = {**changes, "lpips_weights": write_weights(tmp_path / "other.pth", other), "steps": 3}
    with pytest.raises(MindSigmaError, match=r"trained with LPIPS and a VAE \(--lpips-weights"):
        distil(data, tmp_path / "run", "dmd", **changes)


@pytest.mark.slow
def test_lpips_on_two_processes(data, judged, tmp_path):
    changes, run = judged
    changes = {**COMMON, "method": "dmd", **changes, "batch_size": 1}
    pairs = changes.pop("features")
    train(options(data[0], pairs, tmp_path / "run", **changes), tmp_path / "logs", ranks=2, script=DISTILL)
    parts = ("dit", "fake", "states")
    assert largest_difference(checkpoint(tmp_path / "run", 2), checkpoint(run, 2), parts) < 1e-5


@pytest.mark.slow
def test_lpips_in_one_graph(data, judged, tmp_path, graph_runs):
    changes, run = judged
    distil(data, tmp_path / "run", "dmd", **{**changes, "steps": 1})
    found, wanted = (log_lines(folder)[0] for folder in (tmp_path / "run", run))
    assert found["regression"] == pytest.approx(wanted["regression"], rel=1e-5)
    parts = ("dit", "fake", "states")
    assert largest_difference(checkpoint(tmp_path / "run", 1), checkpoint(run, 1), parts) < 1e-4
