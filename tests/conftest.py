"""What the tests share: where the reference cases are, how their weights are drawn, both execution modes."""

import importlib.util
import json
import os
import zlib
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

GOLDEN = Path(__file__).parent / "golden"

# Modules of more than half a minute, longest first: two processes share the modules, and should end together.
LONGEST = ["test_training_kills", "test_training_distributed", "test_training_adapter_runs", "test_training_lora"]
LONGEST += ["test_training_step", "test_dit", "test_sampling", "test_convert", "test_training_options"]


def pytest_collection_modifyitems(items):
    """Long modules first."""
    order = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


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


def load_tool(name):
    """tools/{name}.py as a module."""
    spec = importlib.util.spec_from_file_location(f"{name}_tool", GOLDEN.parents[1] / "tools" / f"{name}.py")
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
        from mindsigma.models.dit.config import canonical_fields

        kernels = changes.pop("kernels", None)
        config = DiTConfig(**{**canonical_fields(self.config), "multi_scale": self.multi_scale, **changes})
        dit = DiT(config, kernels=kernels)
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


@pytest.fixture(scope="session")
def mini():
    """The bundled pipeline."""
    from mindsigma import PixArtSigmaPipeline

    return PixArtSigmaPipeline.from_pretrained("sigma-mini")


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
