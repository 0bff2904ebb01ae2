"""Adapters in training: the effect of merged weights, true gradients, half precision, files, resuming; the prior."""

import sys
from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
from conftest import GOLDEN, Case, load_tool, relative_error
from mindspore import Parameter, Tensor
from PIL import Image
from test_training_step import inputs
from training_runs import TOKENS, WIDTH, checkpoint, tiny_dit, write_features, write_network

from mindsigma import MindSigmaError, PixArtSigmaPipeline, load_dit
from mindsigma.config_file import parse_with_config
from mindsigma.data import Resolution
from mindsigma.models.linear import LowRank, UnbiasedLinear
from mindsigma.pipeline.components import Components, Held
from mindsigma.training.inputs import StepInputs
from mindsigma.training.learner import AdapterLearner
from mindsigma.training.lora import TARGETS, AdapterConfig, attach, chosen, linear_layers, new_adapter
from mindsigma.training.loss import LossConfig
from mindsigma.training.optimizers import OptimizerConfig
from mindsigma.training.prior import class_micro_batches, draw_class_images
from mindsigma.training.run_options import build_parser
from mindsigma.training.step import StepConfig, TrainingStep
from mindsigma.training.trainer import Trainer
from mindsigma.weights.adapters.adapter_file import Adapter, place, read_adapter
from mindsigma.weights.adapters.adapter_reader import open_adapter
from mindsigma.weights.adapters.adapter_view import Adapted
from mindsigma.weights.formats.reader import TensorSource
from mindsigma.weights.formats.safetensors_file import read_safetensors

EVERYWHERE = ("*",)
SOME = ("x_embedder", "attn.proj", "attn.qkv.q", "attn.qkv.v", "cross_attn.kv_linear", "mlp.fc2")
KINDS = {
    "lora": AdapterConfig(2, 3.0, EVERYWHERE),
    "rslora": AdapterConfig(3, 2.0, SOME, rslora=True),
    "dora": AdapterConfig(2, 3.0, SOME, dora=True),
}
SCALE = Tensor([1.0], ms.float32)


def moved(adapter, size=0.1):
    """An Adapter with B, and magnitudes if any, away from where they start."""
    random, entries = np.random.default_rng(3), {}
    for name, entry in adapter.entries.items():
        b = (size * random.standard_normal(entry.b.shape)).astype(np.float32)
        magnitude = entry.magnitude
        if magnitude is not None:
            magnitude = (magnitude * random.uniform(0.8, 1.2, magnitude.shape)).astype(np.float32)
        entries[name] = replace(entry, b=b, magnitude=magnitude)
    return replace(adapter, entries=entries)


def weights(dit):
    """Values of a DiT's own parameters by name, without those of an adapter beside them."""
    return {n: parameter.asnumpy().copy() for n, parameter in dit.parameters_and_names() if ".changes." not in n}


def merged(adapter):
    """The tiny network with an Adapter added to its weights."""
    dit = tiny_dit()
    view = Adapted(TensorSource("tiny", weights(dit)), [(adapter, 1.0)])
    for name, parameter in dit.parameters_and_names():
        parameter.set_data(Tensor(view.read(name)))
    return dit


def learner_of(adapter, **network):
    """AdapterLearner of an Adapter beside the tiny network."""
    return (dit := tiny_dit(**network)), AdapterLearner(dit, adapter)


def adapter_of(kind):
    """An Adapter of the tiny network, one of KINDS."""
    return moved(new_adapter(tiny_dit(), KINDS[kind]))


def step_of(dit, learner, **config):
    """TrainingStep of an adapter."""
    return TrainingStep(dit, learner.parameters, OptimizerConfig("adamw", eps=(1e-3,)), StepConfig(**config))


# forward


def test_forward_is_that_of_merged_weights():
    """Outside of training, whose forward is compared with the gradients below."""
    adapter = adapter_of("dora")
    arrays = inputs(0)
    call = arrays[0], arrays[3], arrays[4], arrays[5]
    reference = merged(adapter).set_train(False)(*call).asnumpy()
    dit, _ = learner_of(adapter)
    assert relative_error(dit.set_train(False)(*call).asnumpy(), reference) < 1e-5
    assert relative_error(tiny_dit().set_train(False)(*call).asnumpy(), reference) > 0.05


@pytest.mark.parametrize("case", ["dora", "rslora"])
def test_goes_on_from_peft(case, tmp_path):
    """Attached, peft's adapters give peft's output, and are written as they were read."""
    dit = Case("ms_plain").build()
    learner = AdapterLearner(dit, open_adapter(GOLDEN / f"peft_{case}").adapter)
    golden = np.load(GOLDEN / "peft_adapters.npz")[case]
    assert relative_error(dit(*Case("ms_plain").inputs()).asnumpy(), golden) < 1e-5
    learner.write(tmp_path / "adapter.safetensors")
    again, first = read_adapter(tmp_path / "adapter.safetensors"), learner.adapter
    assert again.entries.keys() == first.entries.keys() and again.rslora == first.rslora
    for name, entry in again.entries.items():
        assert entry.a.tobytes() == first.entries[name].a.tobytes()
        assert entry.b.tobytes() == first.entries[name].b.tobytes()
        assert entry.scale == first.entries[name].scale


def test_start_is_without_effect_and_the_seed_s():
    """B is zero, A uniform in ±1 / sqrt(in) whatever other layers have one; DoRA's factor is 1."""
    call = [inputs(0)[i] for i in (0, 3, 4, 5)]
    plain = tiny_dit().set_train(False)(*call).asnumpy()
    dit, _ = learner_of(new_adapter(tiny_dit(), KINDS["dora"]))
    assert relative_error(dit.set_train(False)(*call).asnumpy(), plain) < 1e-6
    adapter = new_adapter(tiny_dit(), AdapterConfig(64), seed=5)
    a = adapter.entries["blocks.0.mlp.fc2"].a
    assert a.shape == (64, 128) and np.abs(a).max() < 128**-0.5 and abs(a.std() * (3 * 128) ** 0.5 - 1) < 0.02
    alone = new_adapter(tiny_dit(), AdapterConfig(64, targets=("blocks.0.mlp.fc2",)), seed=5)
    assert alone.entries["blocks.0.mlp.fc2"].a.tobytes() == a.tobytes()
    assert (new_adapter(tiny_dit(), AdapterConfig(64, targets=SOME), 6).entries["blocks.0.mlp.fc2"].a != a).any()


def test_targets():
    layers = linear_layers(Case("ms_kv_conv").build())
    assert {name.split(".", 2)[2] for name in chosen(layers, TARGETS)} == {
        *("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj"),
        *("mlp.fc1", "mlp.fc2"),
    }
    assert chosen(layers, ["attn.qkv.v", "blocks.1.attn.qkv"]) == ["blocks.0.attn.qkv.v", "blocks.1.attn.qkv"]
    assert chosen(layers, ["kv_linear.k", "final_layer"])[-2:] == [
        "blocks.1.cross_attn.kv_linear.k",
        "final_layer.linear",
    ]
    everywhere = chosen(layers, EVERYWHERE)
    assert {"x_embedder.proj", "t_block.1", "t_embedder.mlp.0", "y_embedder.y_proj.fc2"} < set(everywhere)
    assert not [name for name in everywhere if "sr" in name or "norm" in name]
    with pytest.raises(MindSigmaError, match="--lora-targets to_q: no linear layer is called so; there are .*attn.qkv"):
        chosen(layers, ["attn.qkv", "to_q"])


# gradients


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_gradients_follow_from_those_of_merged_weights(kind):
    """With G = dL/dW of the merged weights: dB = s G A^T, dA = s B^T G; DoRA: rows of G times m / n, dm = G·V / n."""
    adapter, micro_batch = adapter_of(kind), inputs(1)
    arguments = (SCALE, *micro_batch)
    whole = merged(adapter)
    training = TrainingStep(whole, whole.trainable_params())
    expected_loss, found = training.differentiate(*arguments)
    of_weights = {parameter.name: value.asnumpy() for parameter, value in zip(training.parameters, found)}

    dit, learner = learner_of(adapter)
    own = weights(dit)
    training = step_of(dit, learner)
    loss, found = training.differentiate(*arguments)
    np.testing.assert_allclose([float(v) for v in loss], [float(v) for v in expected_loss], rtol=1e-5)
    found = {parameter.name: value.asnumpy() for parameter, value in zip(training.parameters, found)}
    for name, entry in adapter.entries.items():
        layer, index, _ = place(name)
        rows = slice(index * len(entry.b), (index + 1) * len(entry.b))
        gradient, weight = (
            tensors[f"{layer}.weight"][rows].reshape(len(entry.b), -1).astype(np.float64)
            for tensors in (of_weights, own)
        )
        a = entry.a.reshape(entry.rank, -1).astype(np.float64)
        if entry.magnitude is not None:
            direction = weight + entry.scale * entry.b @ a
            norms = np.linalg.norm(direction, axis=1)
            expected = (gradient * direction).sum(1) / norms
            assert relative_error(found[f"{name}.magnitude"], expected) < 1e-4, name
            gradient = gradient * (entry.magnitude / norms)[:, None]
        assert relative_error(found[f"{name}.lora_B"], entry.scale * gradient @ a.T) < 1e-4, name
        of_a = found[f"{name}.lora_A"].reshape(a.shape)
        assert relative_error(of_a, entry.scale * entry.b.T @ gradient) < 1e-4, name


@pytest.mark.slow
def test_graph_and_pynative_agree_and_the_base_stays():
    """Three steps with clipping and averages; parts, convolution and magnitudes."""
    found, results = {}, {}
    for mode in (ms.PYNATIVE_MODE, ms.GRAPH_MODE):
        ms.set_context(mode=mode)
        try:
            dit, learner = learner_of(adapter_of("dora"))
            before, start = weights(dit), {name: p.asnumpy().copy() for name, p in learner.named.items()}
            training = step_of(dit, learner, ema_decay=0.9, max_norm=0.5)
            results[mode] = [training.run([inputs(i)], 1e-3) for i in range(3)]
            after = weights(dit)
            assert all(after[name].tobytes() == before[name].tobytes() for name in before)
            found[mode] = {p.name: p.asnumpy() for p in (*training.parameters, *training.averages().values())}
            found[mode].update({name: state.asnumpy() for name, state in training.own_states().items()})
            assert all((found[mode][name] != start[name]).any() for name in start)
        finally:
            ms.set_context(mode=ms.PYNATIVE_MODE)
    np.testing.assert_allclose(*results.values(), rtol=1e-5)
    eager, graph = found.values()
    worst = {name: relative_error(graph[name], eager[name]) for name in eager if eager[name].any()}
    assert max(worst.values()) < 1e-5, max(worst, key=worst.get)


# half precision


def test_small_changes_survive_half_precision():
    """W + B A is W in fp16; what its small elements sum to is there beside W, and the gradients are right."""
    random = np.random.default_rng(1)
    x = random.normal(1.0, 1.0, (512, 1024)).astype(np.float16)
    w = (random.choice([-1, 1], (48, 1024)) * random.uniform(0.125, 0.25, (48, 1024))).astype(np.float16)
    a = random.uniform(0.5, 1.0, (2, 1024)).astype(np.float32) / 32
    b = random.uniform(-1e-3, 1e-3, (48, 2)).astype(np.float32)
    assert ((w + (b @ a)).astype(np.float16) == w).all()
    change = x.astype(np.float64) @ (b @ a).T.astype(np.float64)

    layer = UnbiasedLinear(1024, 48, dtype=ms.float16)
    layer.weight.set_data(Tensor(w))
    plain = layer(Tensor(x)).asnumpy()
    change_of = LowRank(Parameter(Tensor(a), name="a"), Parameter(Tensor(b), name="b"), None, 0, 1, 1.0)
    layer.change([change_of])
    difference = layer(Tensor(x)).asnumpy().astype(np.float64) - plain
    slope = (difference * change).sum() / (change * change).sum()
    assert abs(slope - 1) < 0.02

    # As B is when training begins: in fp16 what passes through it would be zero.
    b *= 1e-3
    change_of.b.set_data(Tensor(b))
    gradient = Tensor(np.full((512, 48), 1e-3, np.float16))
    _, pull = ms.value_and_grad(
        lambda x: (layer(x) * gradient).astype(ms.float32).sum(), None, [change_of.a, change_of.b]
    )(Tensor(x))
    upstream = np.full((512, 48), gradient.asnumpy()[0, 0], np.float64)
    assert relative_error(pull[0].asnumpy(), b.T.astype(np.float64) @ upstream.T @ x) < 1e-3
    assert relative_error(pull[1].asnumpy(), upstream.T @ x @ a.T) < 1e-3


@pytest.mark.slow
def test_training_in_half_precision_follows_fp32():
    """fp16 activations and base weights, fp32 adapter: finite, and close over three steps."""
    results = {}
    for dtype in (ms.float32, ms.float16):
        dit = tiny_dit(dtype=dtype)
        if dtype == ms.float16:
            dit = halved(dit)
        learner = AdapterLearner(dit, moved(new_adapter(tiny_dit(), KINDS["lora"]), 0.01))
        training = step_of(dit, learner, loss_scale=1024.0 if dtype == ms.float16 else 0.0, max_norm=1.0)
        steps = [training.run([inputs(0)], 3e-3) for _ in range(3)]
        assert all(step[3] for step in steps)
        assert all(p.dtype == ms.float32 for p in learner.parameters)
        results[dtype] = np.array([step[:3] for step in steps])
    full, half = results.values()
    assert full[-1, 0] < 0.98 * full[0, 0]
    np.testing.assert_allclose(half, full, rtol=0.02)


def halved(dit):
    """The tiny network with weights in fp16 as well."""
    from mindsigma.models.dit import DiT

    result = DiT(dit.config, dtype=ms.float16)
    values = weights(dit)
    for name, parameter in result.parameters_and_names():
        parameter.set_data(Tensor(values[name].astype(np.float16)))
    return result.set_train()


# files


@pytest.mark.parametrize("kind", KINDS)
def test_trained_adapter_to_peft_and_back(kind, tmp_path, monkeypatch):
    _, learner = learner_of(adapter_of(kind))
    learner.write(tmp_path / "adapter.safetensors")
    tool = load_tool("convert")
    for source, target, to in (("adapter.safetensors", "peft", "peft"), ("peft", "back.safetensors", "mindspore")):
        monkeypatch.setattr(sys, "argv", ["convert.py", str(tmp_path / source), str(tmp_path / target), "--to", to])
        assert tool.main() == 0
    first, back = (read_adapter(tmp_path / name) for name in ("adapter.safetensors", "back.safetensors"))
    assert first.entries.keys() == back.entries.keys()
    for name, entry in first.entries.items():
        other = back.entries[name]
        assert (entry.a.tobytes(), entry.b.tobytes()) == (other.a.tobytes(), other.b.tobytes())
        assert (entry.magnitude is None) == (other.magnitude is None) and entry.scale == other.scale
        assert entry.magnitude is None or entry.magnitude.tobytes() == other.magnitude.tobytes()


@pytest.mark.slow
def test_pictures_while_training_are_those_of_the_file(mini, tmp_path):
    """Merged by the pipeline from its file, an adapter draws what it draws beside the weights."""
    dit = load_dit("sigma-mini")
    learner = AdapterLearner(dit, moved(new_adapter(dit, AdapterConfig(2, 4.0)), 0.02))
    learner.write(tmp_path / "adapter.safetensors")
    components = Components.of_folder("sigma-mini")
    parts = Held(dit, "sigma-mini"), *(components.opened(name) for name in ("vae", "t5", "tokenizer"))
    options = {"num_inference_steps": 2, "output_type": "np", "progress": False, "seed": 1}
    beside = PixArtSigmaPipeline(*parts)
    adapted = PixArtSigmaPipeline.from_pretrained("sigma-mini", lora=[tmp_path / "adapter.safetensors"])
    images = [one(["a cat"], **options).images[0] for one in (beside, adapted, mini)]
    assert np.abs(images[0] - images[1]).max() < 1e-3
    assert np.abs(images[2] - images[1]).mean() > 0.01


# runs


def arguments(folder, output, *more):
    """Options of tools/train.py for the tiny network."""
    listed = ["--data", folder / "features", "--model", folder / "network", "--components", "sigma-mini"]
    listed += ["--output", output, "--resolution", 64, "--max-length", TOKENS, "--batch-size", 4, "--threads", 1]
    listed += ["--optimizer", "adamw", "--eps", 1e-3, "--learning-rate", 1e-2, "--max-norm", 0, "--seed", 3, *more]
    return parse_with_config(build_parser(), list(map(str, listed)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network, features of a subject and features of its class."""
    folder = tmp_path_factory.mktemp("lora")
    write_network(folder / "network")
    for name, count in (("features", 4), ("class", 6)):
        write_features(folder / name, [(64, 64)] * count, Resolution(64))
    return folder


def tensors(folder):
    """Bytes of all tensors of a checkpoint by file and name."""
    files = sorted(folder.rglob("*.safetensors"))
    return {(file.name, name): value.tobytes() for file in files for name, value in read_safetensors(file)[0].items()}


def test_a_run_resumes_and_leaves_an_adapter(folder, tmp_path):
    """DoRA with prior preservation: stopped and resumed it ends with the bits of a run in one go."""
    options = ["--lora-rank", 2, "--lora-alpha", 3, "--dora", "--lora-targets", *SOME, "--class-data", folder / "class"]
    options += ["--ema-decay", 0.9, "--prior-weight", 0.5]
    for name, steps in (("once", 4), ("twice", 2), ("twice", 4)):
        Trainer(arguments(folder, tmp_path / name, "--steps", steps, *options)).run()
    once, twice = (tensors(checkpoint(tmp_path / name, 4)) for name in ("once", "twice"))
    assert once == twice and len(once) == 4 * 33 + 1
    last = checkpoint(tmp_path / "once", 4)
    assert not (last / "dit").exists()
    adapter = open_adapter(last).adapter
    assert adapter.entries.keys() == adapter_of("dora").entries.keys()
    average = read_adapter(last / "adapter_ema.safetensors").entries["blocks.0.mlp.fc2"]
    assert (average.b != adapter.entries["blocks.0.mlp.fc2"].b).any() and average.b.any()

    with pytest.raises(MindSigmaError, match="prior.weight"):
        Trainer(arguments(folder, tmp_path / "once", "--steps", 5, *options[:-1], 1.0))
    Trainer(arguments(folder, tmp_path / "on", "--steps", 1, "--learning-rate", 0, "--init-lora", last)).run()
    again = open_adapter(checkpoint(tmp_path / "on", 1)).adapter
    assert all(entry.b.tobytes() == adapter.entries[name].b.tobytes() for name, entry in again.entries.items())


@pytest.mark.parametrize(
    "options, message",
    [
        (["--dora"], "--dora belongs to an adapter: give --lora-rank"),
        (["--lora-alpha", "2"], "--lora-alpha belongs to an adapter"),
        (["--lora-rank", "0"], "--lora-rank must be at least 1"),
        (["--lora-rank", "2", "--lora-alpha", "-1"], "--lora-alpha must be a positive number"),
        (["--lora-rank", "2", "--lora-targets", "to_q"], "--lora-targets to_q: no linear layer is called so"),
        (["--lora-rank", "2", "--init-lora", "x"], "--init-lora tells rank and layers itself"),
        (["--lora-rank", "2", "--fresh"], "--fresh changes the network"),
        (["--init-lora", str(GOLDEN / "peft_lora")], "it was made for another model"),
        (["--prior-weight", "-1"], "--prior-weight must be"),
    ],
)
def test_refused_with_a_line(folder, tmp_path, options, message):
    with pytest.raises(MindSigmaError, match=message) as caught:
        Trainer(arguments(folder, tmp_path / "run", "--steps", 1, *options))
    assert "\n" not in str(caught.value)


def test_magnitudes_of_inputs_are_not_trained():
    adapter = adapter_of("dora")
    entry = adapter.entries["blocks.0.mlp.fc2"]
    entry = replace(entry, magnitude=np.ones((1, entry.a.shape[1]), np.float32))
    with pytest.raises(MindSigmaError, match="magnitudes of its inputs, which are not trained"):
        attach(tiny_dit(), Adapter({"blocks.0.mlp.fc2": entry}))


# prior preservation


class Drawn:
    """What StepInputs needs of a Batch of features."""

    def __init__(self, seed, count=4):
        random = np.random.default_rng(seed)
        self.draws, self.dropped = np.arange(count), np.zeros(count, bool)
        self.moments = random.uniform(0.1, 1.0, (count, 8, 8, 8)).astype(np.float32)
        self.states = random.standard_normal((count, TOKENS, WIDTH)).astype(np.float32)
        self.mask = np.ones((count, TOKENS), np.int32)
        self.images = None


def test_loss_with_a_prior_is_the_weighted_sum(mini):
    """Loss, squared error and bound, and gradients: subject + 0.3 class."""
    null = np.zeros((TOKENS, WIDTH), np.float32), 1
    subject, of_class = (StepInputs(mini.vae.config, null, LossConfig(), TOKENS, seed) for seed in (1, 2))
    dit, learner = learner_of(adapter_of("lora"))
    training = step_of(dit, learner)

    def measured(micro_batches):
        results = [training.differentiate(SCALE, *m) for m in micro_batches]
        losses = np.mean([[float(value) for value in values] for values, _ in results], 0)
        return losses, [np.mean([g.asnumpy() for g in column], 0) for column in zip(*(r[1] for r in results))]

    first, second = (measured(one.micro_batches(Drawn(i), 1)) for i, one in enumerate((subject, of_class)))
    both = class_micro_batches(
        lambda weight: subject.micro_batches(Drawn(0), 1, weight),
        lambda weight: of_class.micro_batches(Drawn(1), 1, weight),
        0.3,
    )
    losses, gradients = measured(both)
    np.testing.assert_allclose(losses, first[0] + 0.3 * second[0], rtol=1e-5)
    for found, one, two in zip(gradients, first[1], second[1]):
        assert relative_error(found, one + 0.3 * two) < 1e-4


def test_class_images_are_drawn_once(tmp_path):
    """Missing ones alone, each from its own seed; another prompt's are not mixed in."""
    seeds = []

    class Pipeline:
        def __call__(self, prompts, seed, **options):
            assert (prompts, options["height"]) == (["an alien"], 16)
            seeds.append(seed)
            return type("Result", (), {"images": [Image.new("RGB", (16, 16), (seed, 0, 0))]})

    options = {"seed": 40, "height": 16}
    assert draw_class_images(Pipeline(), tmp_path, "an alien", 2, **options) == 2
    (tmp_path / "000000.png").unlink()
    assert draw_class_images(Pipeline(), tmp_path, "an alien", 3, **options) == 2
    assert seeds == [40, 41, 40, 42]
    assert Image.open(tmp_path / "000002.png").getpixel((0, 0)) == (42, 0, 0)
    assert (tmp_path / "000002.txt").read_text() == "an alien\n"
    with pytest.raises(MindSigmaError, match="000000.txt: not the prompt 'a cat'"):
        draw_class_images(Pipeline(), tmp_path, "a cat", 3, **options)
