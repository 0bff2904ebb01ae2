"""What the tests share: where the reference cases are, how their weights are drawn, both execution modes."""

import atexit
import importlib
import importlib.util
import json
import os
import shutil
import tempfile
import zlib
from dataclasses import replace
from functools import cache
from pathlib import Path

os.environ.setdefault("GLOG_v", "3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Each of pytest's processes keeps to its share of the cores: threads that wait for each other's core would spin.
if "PYTEST_XDIST_WORKER" in os.environ:
    _number, _count = int(os.environ["PYTEST_XDIST_WORKER"][2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, _cores[_number::_count] or _cores)

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mindsigma.ascend_host.environment import TUNABLES
from mindsigma.runtime import set_device

# For the processes started from here on: MindSpore copies lists of kernels at every call, which the C library's
# allocator does three times faster with larger caches once graphs have been compiled.
os.environ.setdefault("GLIBC_TUNABLES", TUNABLES)

ROOT = Path(__file__).parents[1]
ON_THE_HOST = "test_ascend_"  # files whose tests build the Ascend host, all but the one of exported graphs
GOLDEN = ROOT / "tests" / "golden"


def pytest_configure():
    """Choose the device, as every tool does before it computes; not in programs of tests, which choose their own."""
    set_device("CPU")


def pytest_collection_modifyitems(items):
    """Without a C++ compiler there is no Ascend host."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        for item in items:
            if item.path.name.startswith(ON_THE_HOST) and item.path.name != "test_ascend_graph.py":
                item.add_marker(pytest.mark.skip(reason="no C++ compiler for the Ascend host"))


def drawn_weight(seed, name, shape):
    """The value of one tensor of a reference case, float32, from the case's seed and the tensor's official name."""
    value = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape).astype(np.float32)
    value = value / np.float32((shape[-1] if len(shape) > 1 else 8) ** 0.5)
    return value + np.float32(1) if name.endswith("norm.weight") else value


def relative_error(value, reference):
    """Norm of the difference over the norm of the reference."""
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    return np.linalg.norm(value - reference) / np.linalg.norm(reference)


def psnr(value, reference, peak):
    """Peak signal-to-noise ratio in dB."""
    error = np.mean((np.asarray(value, np.float64) - np.asarray(reference, np.float64)) ** 2)
    return 10 * np.log10(peak**2 / error)


@cache
def official_checkpoint():
    """Path of sigma-mini's DiT as the official code saves it, made from the bundled weights; test_loading.py proves it.

    It holds the null caption, T5's states of the empty prompt by PyTorch, and a position embedding of zeros.
    """
    from mindsigma.conversion import writing as convert
    from mindsigma.conversion.component import open_source
    from mindsigma.conversion.surgery import set_null_caption
    from mindsigma.conversion.targets import prepare
    from mindsigma.weights.names.dit_names import NULL_CAPTION
    from mindsigma.weights.names.views import Extended

    folder = Path(tempfile.mkdtemp(prefix="official-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (component,) = open_source("sigma-mini", "dit").components
    output = prepare(set_null_caption(component, np.load(GOLDEN / "null_caption.npy")), "official")
    assert NULL_CAPTION in output.view.names()
    zeros = np.zeros(output.view.shape("pos_embed"), output.view.dtype("pos_embed"))
    output = replace(output, view=Extended(output.view, {"pos_embed": zeros}))
    return convert.write([output], folder / "sigma-mini-official.pth", "official")[0]


def load_tool(name):
    """The command of this name, or tools/{name}.py, as a module."""
    if (ROOT / "mindsigma" / "commands" / f"{name}.py").exists():
        return importlib.import_module(f"mindsigma.commands.{name}")
    spec = importlib.util.spec_from_file_location(f"{name}_tool", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Case:
    """One forward pass of a small network of the official code: config, inputs, output."""

    def __init__(self, name):
        self.data = np.load(GOLDEN / f"{name}.npz")
        self.config = json.loads(str(self.data["config"]))
        self.multi_scale = self.config.pop("cls") == "PixArtMS"
        self.config.pop("latent_hw")
        self.seed = int(self.data["seed"])
        self.out = self.data["out"]

    def build(self, **changes):
        """The DiT with the case's weights."""
        from mindsigma.models.dit import DiT, DiTConfig
        from mindsigma.models.dit_config import canonical_fields

        config = DiTConfig(**{**canonical_fields(self.config), "multi_scale": self.multi_scale, **changes})
        dit = DiT(config)
        for parameter in dit.get_parameters():
            parameter.set_data(Tensor(drawn_weight(self.seed, parameter.name, parameter.shape)))
        return dit

    def inputs(self):
        """Arguments of the DiT's call."""
        names = ["x", "timestep", "y", "mask"]
        if self.config.get("micro_condition"):
            names += ["img_hw", "aspect_ratio"]
        arrays = [self.data[name] for name in names]
        arrays[2] = arrays[2][:, 0]  # (N, 1, L, C) in the official code
        return [Tensor(array) for array in arrays]


@pytest.fixture(params=["pynative", "graph"])
def mode(request):
    """Run the test in PyNative and in graph mode."""
    ms.set_context(mode=ms.GRAPH_MODE if request.param == "graph" else ms.PYNATIVE_MODE)
    yield request.param
    ms.set_context(mode=ms.PYNATIVE_MODE)


# For `mode`, where the same is held in graph mode elsewhere and a graph takes long to compile.
GRAPH_IS_SLOW = pytest.mark.parametrize(
    "mode", ["pynative", pytest.param("graph", marks=pytest.mark.slow)], indirect=True
)


@pytest.fixture
def graph_mode():
    """Run the test in graph mode, as networks run on Ascend."""
    ms.set_context(mode=ms.GRAPH_MODE)
    yield
    ms.set_context(mode=ms.PYNATIVE_MODE)


@pytest.fixture
def graph_runs(graph_mode, monkeypatch):
    """Let training runs in this process keep to graph mode, which choosing a CPU would leave."""
    from mindsigma.training import trainer

    monkeypatch.setattr(trainer, "set_device", lambda name: None)
    yield
    assert ms.get_context("mode") == ms.GRAPH_MODE


@pytest.fixture(scope="session")
def mini():
    """The bundled pipeline."""
    from mindsigma import PixArtSigmaPipeline

    return PixArtSigmaPipeline.from_pretrained("sigma-mini")


@pytest.fixture(scope="session")
def plain_mini():
    """The bundled pipeline as an NPU has it, but for the insides of operators: not accelerated, with aligned heads."""
    from mindsigma import PixArtSigmaPipeline
    from mindsigma.backends.ascend import is_aligned
    from mindsigma.backends.cpu import is_accelerated

    before = ms.get_context("mode")
    pipeline = PixArtSigmaPipeline.from_pretrained("sigma-mini")
    ms.set_context(mode=ms.GRAPH_MODE)  # where nothing is accelerated
    networks = pipeline.dit, pipeline.vae, pipeline.text_encoder.encoder
    assert not any(map(is_accelerated, networks)) and is_aligned(pipeline.dit)
    ms.set_context(mode=before)
    return pipeline


@pytest.fixture
def either_mini(mode, request):
    """The bundled pipeline as it is in each mode: accelerated in PyNative, plain in graph mode."""
    return request.getfixturevalue("plain_mini" if mode == "graph" else "mini")


@pytest.fixture(scope="session")
def convert_tool():
    """tools/convert.py as a module."""
    return load_tool("convert")


@pytest.fixture
def convert(convert_tool, monkeypatch):
    """A function that runs tools/convert.py in this process and raises what it raises."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["convert.py", *map(str, arguments)])
        assert convert_tool.main() == 0

    return run
