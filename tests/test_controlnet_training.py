"""Training of a ControlNet: who learns, the losses, runs that are stopped, killed, shared; from features and images."""

import mindspore as ms
import numpy as np
import pytest
from control_cases import ControlCase
from mindspore import Tensor
from PIL import Image
from test_training_kills import kill_chain
from training_runs import (
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

from mindsigma.backends.cpu import accelerate
from mindsigma.backends.cpu.step import accelerate_step
from mindsigma.data.conditions import Condition
from mindsigma.data.images import to_array
from mindsigma.errors import MindSigmaError
from mindsigma.training.controlnet import ControlledDenoising
from mindsigma.training.learner import ControlNetLearner
from mindsigma.training.loss import LossConfig, coefficients
from mindsigma.training.optimizers import OptimizerConfig
from mindsigma.training.run_options import build_parser
from mindsigma.training.step import StepConfig, TrainingStep
from mindsigma.training.trainer import Trainer
from mindsigma.weights.loading import load_controlnet

STEPS = 4
COMMON = {
    "method": "controlnet",
    "controlnet_layers": 2,
    "optimizer": "adamw",
    "eps": 1e-3,  # above rounding errors, as in test_training_distributed.py
    "learning_rate": 0.01,
    "steps": STEPS,
    "save_every": 1,
    "keep": STEPS,
    "recompute": None,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders of a network of three blocks and of features with conditions."""
    folder = tmp_path_factory.mktemp("data")
    return write_network(folder / "network", depth=3), square_features(folder / "features", condition=True)


def learn(data, output, stop=lambda: False, **changes):
    """Run in this process; the Trainer afterwards."""
    return run_here(build_parser().parse_args, data, output, stop, **{**COMMON, **changes})


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    """Folder of a finished run."""
    output = tmp_path_factory.mktemp("done") / "run"
    trainer = learn(data, output)
    assert not [p.name for p in trainer.dit.get_parameters() if p.requires_grad]
    return output


def test_a_fresh_one_begins_as_the_base_and_learns_from_its_last_maps(data, done):
    """The first loss is the base's own; the first step moves what follows the copies alone; then all learns."""
    base = parts_of(data[0].parent)["network"]
    first, second = (parts_of(checkpoint(done, step))["controlnet"] for step in (1, 2))
    for name, value in first.items():
        moved = name.startswith("after_proj")
        start = np.zeros_like(value) if "_proj." in name and not name.startswith("blocks.") else base[name]
        assert np.array_equal(value, start) != moved, name
        assert not np.array_equal(second[name], value), name
    assert {name.split(".")[0] for name in first} == {"blocks", "before_proj", "after_proj"}
    assert {key.split("/")[0] for key in stored(checkpoint(done, 1))} == {"controlnet", "controlnet_ema", "states"}


def test_the_first_loss_is_that_of_the_base_alone(data, done, tmp_path):
    changes = dict.fromkeys(("method", "controlnet_layers"))
    learn(data, tmp_path / "run", **changes, steps=1)
    lines = [log_lines(folder)[0] for folder in (done, tmp_path / "run")]
    for name in ("mse", "bound"):
        assert lines[0][name] == pytest.approx(lines[1][name], rel=1e-6)


def test_the_base_stays(data, tmp_path):
    trainer = learn(data, tmp_path / "run", steps=2)
    for name, value in parts_of(data[0].parent)["network"].items():
        if name in dict(trainer.dit.parameters_and_names()):
            parameter = dict(trainer.dit.parameters_and_names())[name]
            assert parameter.asnumpy().tobytes() == value.tobytes(), name
    names = [p.name for cell in (trainer.dit, trainer.method.controlnet) for p in cell.get_parameters()]
    assert len(set(names)) == len(names), "a graph wants one name for each"


@pytest.mark.parametrize("name", ["half", "ms"])
def test_a_step_has_the_official_loss_and_norm(name):
    """Of drawn networks, the base frozen; with micro conditions, too (golden/controlnet.npz)."""
    case = ControlCase(name)
    dit, controlnet = case.networks()
    for parameter in dit.get_parameters():
        parameter.requires_grad = False
    objective = ControlledDenoising(accelerate(dit.set_train()), accelerate(controlnet.set_train()))
    parameters = ControlNetLearner(controlnet).parameters
    training = accelerate_step(TrainingStep(objective, parameters, OptimizerConfig("adamw"), StepConfig(max_norm=0.0)))
    data, (_, condition, _, caption, mask, *micro) = case.data, case.inputs()
    numbers, times = coefficients(data["t_train"], LossConfig()), data["t_train"].astype(np.float32)
    arrays = map(Tensor, (data["x0"], data["noise"], numbers, times))
    mse, bound, norm, finite = training.run([(*arrays, caption, mask, condition, *micro)], 0.0)
    assert finite
    assert mse == pytest.approx(data["mse"].mean(), rel=2e-5) and bound == pytest.approx(data["vb"].mean(), rel=2e-5)
    assert norm == pytest.approx(np.linalg.norm(data["grad_norms"].astype(np.float64)), rel=2e-5)


def test_a_stopped_run_goes_on_to_the_same_bits(data, done, tmp_path):
    output = tmp_path / "run"
    learn(data, output, stop=lambda: True)
    assert not checkpoint(output, 2).exists()
    learn(data, output)
    for step in (STEPS - 1, STEPS):
        assert_same(checkpoint(output, step), checkpoint(done, step))
    assert log_lines(output) == log_lines(done)


def test_recompute_accumulation_and_averages(data, done, tmp_path):
    """Micro-batches and computing again change nothing but roundings; the averages are those of the weights."""
    learn(data, tmp_path / "run", batch_size=2, accumulation=2, recompute=True)
    last = checkpoint(tmp_path / "run", STEPS)
    assert largest_difference(last, checkpoint(done, STEPS), ("controlnet", "controlnet_ema", "states")) < 1e-4
    before, after = (checkpoint(done, step) for step in (STEPS - 1, STEPS))
    old, now = parts_of(before)["controlnet_ema"], parts_of(after)
    weights, new = now["controlnet"], now["controlnet_ema"]
    for name, value in new.items():
        wanted = 0.9 * old[name].astype(np.float64) + 0.1 * weights[name]
        np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-7)


def test_half_precision(data, done, tmp_path):
    """fp16 with a frozen base in fp16 follows fp32; what is kept is fp32."""
    trainer = learn(data, tmp_path / "run", dtype="fp16", steps=2)
    assert trainer.dit.blocks[0].attn.qkv.weight.dtype == ms.float16
    lines, wanted = log_lines(tmp_path / "run"), log_lines(done)[:2]
    assert all(line["loss_scale"] == 65536 for line in lines)
    np.testing.assert_allclose([line["mse"] for line in lines], [line["mse"] for line in wanted], rtol=0.02)
    assert all(value.dtype == np.float32 for value in stored(checkpoint(tmp_path / "run", 2)).values())


def test_going_on_from_a_trained_one(data, done, tmp_path):
    """--init-controlnet begins with the weights of a checkpoint, which loads by itself."""
    folder = checkpoint(done, STEPS) / "controlnet"
    learn(data, tmp_path / "run", controlnet_layers=None, init_controlnet=folder, learning_rate=0.0, steps=1)
    ends = checkpoint(done, STEPS), checkpoint(tmp_path / "run", 1)
    wanted, found = (parts_of(end)["controlnet"] for end in ends)
    assert sorted(found) == sorted(wanted)
    for name, value in found.items():
        np.testing.assert_array_equal(value, wanted[name])
    loaded = dict(load_controlnet(folder, "fp32").parameters_and_names())
    for name, value in wanted.items():
        np.testing.assert_array_equal(loaded[name].asnumpy(), value)


def test_conditions_are_drawn_anew_and_dropped(data, tmp_path):
    """Mean + deviation * noise times the scale, the noise another one at each draw and than the image's."""
    trainer = learn(data, tmp_path / "run", steps=1, condition_dropout=0.5, batch_size=8)
    config, seen = trainer.components.opened("vae").config, 0
    for batch in trainer.loader.batches(0, 2):
        (inputs,) = trainer.method.micro_batches(batch)
        clean, found = inputs[0].asnumpy(), inputs[6].asnumpy()
        dropped = batch.control_dropped
        seen += dropped.sum()
        assert not found[dropped].any()
        (mean, deviation), (image_mean, image_deviation) = (
            np.split(moments, 2, 1) for moments in (batch.control_moments, batch.moments)
        )
        noise = (found / config.scaling_factor + config.shift_factor - mean) / deviation
        image_noise = (clean / config.scaling_factor + config.shift_factor - image_mean) / image_deviation
        assert 0.8 < noise[~dropped].std() < 1.2 and np.abs(noise - image_noise)[~dropped].max() > 1
        again = trainer.method.micro_batches(batch)[0][6].asnumpy()
        np.testing.assert_array_equal(again, found)
    assert 0 < seen < 16


def test_held_out_loss_disturbs_nothing(data, done, tmp_path):
    learn(data, tmp_path / "run", validation_data=data[1], validate_every=2, validation_points=2)
    assert_same(checkpoint(tmp_path / "run", STEPS), checkpoint(done, STEPS))
    losses = [line["validation_loss"] for line in log_lines(tmp_path / "run") if "validation_loss" in line]
    assert len(set(losses)) == 3 and np.isfinite(losses).all()


def test_from_images(data, mini, tmp_path):
    """Conditions are computed of the images as they are cut, and pass through the VAE."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST).save(photos / f"{i}.png")
        (photos / f"{i}.txt").write_text(f"picture {i}")
    changes = {"condition": "canny:50:100", "components": "sigma-mini", "flip": 1.0, "steps": 1}
    trainer = learn(data, tmp_path / "run", features=photos, **changes)
    batch = next(trainer.loader.batches(0, 1))
    order = [int(text.split()[1]) for text in batch.captions]
    for row, i in enumerate(order):
        edges = to_array(Condition.of("canny:50:100").computed(Image.open(photos / f"{i}.png").convert("RGB")))
        np.testing.assert_array_equal(batch.control_images[row], edges[:, :, ::-1])
    found = trainer.method.micro_batches(batch)[0][6].asnumpy()
    mean, log_variance = np.split(mini.vae.encode(Tensor(batch.control_images)).asnumpy(), 2, 1)
    config = mini.vae.config
    offset = found / config.scaling_factor + config.shift_factor - mean
    assert (np.abs(offset) <= 6 * np.exp(log_variance / 2) + 1e-4).all()


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"lora_rank": 2}, "--lora-rank: a ControlNet learns beside"),
        ({"fresh": True}, "--fresh: a ControlNet learns beside"),
        ({"condition": "canny"}, "features hold their conditions"),
        ({"controlnet_layers": 3}, "takes 1 ... 2"),
        ({"init_controlnet": "x"}, "leave out --controlnet-layers"),
        ({"evaluate": "x"}, "--evaluate draws without"),
        ({"zero": 3, "recompute": True}, "--zero 3 divides the weights of --model"),
        ({"method": None}, "--controlnet-layers belongs to --method controlnet"),
        ({"condition_dropout": 2}, "condition_dropout must lie in 0 ... 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_wrong_options(data, tmp_path, changes, said):
    with pytest.raises(MindSigmaError, match=said) as caught:
        learn(data, tmp_path / "run", **changes)
    assert "\n" not in str(caught.value) and not list(tmp_path.rglob("state.json"))


def test_features_without_conditions_are_refused(data, tmp_path):
    plain = square_features(tmp_path / "plain", 4)
    with pytest.raises(MindSigmaError, match="holds no conditions; extract them with"):
        learn(data, tmp_path / "run", features=plain)


def test_another_base_is_refused(data, done, tmp_path):
    import shutil

    shutil.copytree(done, tmp_path / "run")
    other = write_network(tmp_path / "network", depth=3, seed=6)
    with pytest.raises(MindSigmaError, match="trained with a network"):
        learn((other, data[1]), tmp_path / "run", steps=STEPS + 1)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_two_processes_are_one_with_the_doubled_batch(data, done, tmp_path, zero):
    """Clipped by the global norm; with states divided among them, and with gradients, too."""
    arguments = options(*data, tmp_path / "run", **{**COMMON, "batch_size": 2, "zero": zero})
    train(arguments, tmp_path / "logs", ranks=2)
    last = checkpoint(tmp_path / "run", STEPS)
    assert largest_difference(last, checkpoint(done, STEPS), ("controlnet", "controlnet_ema", "states")) < 1e-5
    assert len(list(last.glob("states-*.safetensors"))) == (1 if zero == 0 else 2)


@pytest.mark.slow
def test_killed_runs_go_on(data, done, tmp_path):
    """Two kills at random instants, and the bits of the run in one go."""
    output = tmp_path / "run"
    arguments = options(*data, output, **COMMON)
    kill_chain(arguments, output, done, ranks=1, seed=5, kills=2)
    train(arguments, output / "logs")
    assert_same(checkpoint(output, STEPS), checkpoint(done, STEPS))


@pytest.mark.slow
def test_one_graph(data, done, tmp_path, graph_runs):
    """The step as an NPU runs it, as one graph."""
    learn(data, tmp_path / "run")
    parts = ("controlnet", "controlnet_ema", "states")
    assert largest_difference(checkpoint(tmp_path / "run", STEPS), checkpoint(done, STEPS), parts) < 1e-4


def test_images_of_prompts_are_guided(data, tmp_path):
    """At first as without control, then by the picture that belongs to each prompt; the run is not disturbed."""
    pictures = []
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 2, (8, 8), np.uint8) * 255
        pictures.append(tmp_path / f"{i}.png")
        Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST).save(pictures[-1])
    output = tmp_path / "run"
    network = write_network(tmp_path / "network", depth=3, input_size=32, pe_interpolation=0.5)  # of a trained size
    arguments = options(network, data[1], output, **{**COMMON, "steps": 2, "sample_every": 2, "sample_steps": 2})
    arguments += ["--prompts", "a cat", "a cat", "--control-images", *map(str, pictures)]
    Trainer(build_parser().parse_args(arguments)).run()
    images = [np.asarray(Image.open(output / "samples" / f"step_{s:08d}_{i}.png")) for s in (0, 2) for i in range(2)]
    assert images[0].shape == (256, 256, 3)
    np.testing.assert_array_equal(images[0], images[1])
    assert (images[2] != images[3]).any() and (images[2] != images[0]).any()
    learn((network, data[1]), tmp_path / "without", steps=2)
    assert_same(checkpoint(output, 2), checkpoint(tmp_path / "without", 2))


@pytest.mark.parametrize("prompts,controls", [(2, 0), (0, 1), (2, 3)])
def test_each_prompt_has_its_picture(data, tmp_path, prompts, controls):
    arguments = options(*data, tmp_path / "run", **COMMON)
    for name, count in (("--prompts", prompts), ("--control-images", controls)):
        arguments += [name, *["x.png"] * count] if count else []
    with pytest.raises(MindSigmaError, match=f"{controls} --control-images for {prompts} --prompts"):
        Trainer(build_parser().parse_args(arguments))
