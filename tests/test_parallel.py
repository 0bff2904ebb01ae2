"""Sampling by several processes gives what one process gives; the bytes they send are those foretold."""

import os
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from conftest import load_tool, relative_error
from mindspore import Tensor
from mindspore.nn.utils import no_init_parameters
from mindspore.train import mind_ir_pb2
from parallel_worker import CASES, CONTROLS, PAG, SAMPLERS, UNGUIDED, alone, tiny_vae
from PIL import Image
from training_runs import ROOT, Run, free_port, tiny_dit

from mindsigma import MindSigmaError, PixArtSigmaPipeline
from mindsigma.backends.ascend import align_heads
from mindsigma.backends.cpu import is_accelerated
from mindsigma.distributed import Collectives, Ranks
from mindsigma.models.controlnet import ControlNetConfig
from mindsigma.models.dit import DiT, DiTConfig, KVCompression
from mindsigma.models.vae_tiling import decode_tiled
from mindsigma.ops.operators import composing_for
from mindsigma.sampling.controls import ControlSum
from mindsigma.sampling.dpm_solver import DPMSolver
from mindsigma.sampling.parallel import ParallelGraphs, ParallelSampling, Part, PartStep, bands_of, bytes_sent, keys_of

WORKER = Path(__file__).with_name("parallel_worker.py")


def run(folder, ranks, *jobs):
    """Run the jobs of parallel_worker.py; returns what each process wrote."""
    processes = Run([str(folder), *jobs], folder / "logs", ranks, script=WORKER)
    code = processes.wait(1800)
    assert code == 0, "\n".join(processes.text(rank) for rank in range(ranks))
    return [np.load(folder / f"rank_{rank}.npz") for rank in range(ranks)]


def check(results):
    """Every case of every process against one process, and the bytes it sent against the closed form."""
    names = [name for name in results[0].files if "/" in name and not name.endswith("-sent")]
    expected = alone({name.split("/")[1] for name in names})
    for name in names:
        mode, case = name.removeprefix("graph-").split("/")
        for rank, result in enumerate(results):
            assert relative_error(result[name], expected[case]) < 1e-5, (name, rank)
            if name.startswith("graph-"):
                continue
            height, width, changes = CASES[case]
            config = tiny_dit(**changes).config
            part = ParallelSampling(mode, Ranks(rank, len(results))).part(config, True, height // 2, width // 2)
            layers = PAG[case].layers if case in PAG else ()
            blocks, guess = CONTROLS.get(case, ((), False))
            copies = [ControlNetConfig.of(config, count) for count in blocks]
            how = {"guided": case not in UNGUIDED, "guess": guess}
            foretold = bytes_sent(config, part, 2, 4, case in SAMPLERS, layers, copies, **how)
            assert result[f"{name}-sent"] == sum(foretold.values()), (name, rank)
    vae, latents = tiny_vae()
    tiles = decode_tiled(vae, latents, tile=16)
    for result in results:  # MindSpore rounds a convolution by its threads, of which this process has fewer
        assert relative_error(result["tiles"], tiles) < 1e-6
        assert np.array_equal(result["tiles"], results[0]["tiles"])
    return names


def test_two_processes_are_one(tmp_path):
    """Bands with compressed keys, square and not, equal and not; halves of guidance; tiles of the decoder."""
    jobs = "sequence:conv,uneven,variance,pag,control,control-guess,control-unguided", "cfg:control-two"
    assert len(check(run(tmp_path, 2, *jobs))) == 8


@pytest.mark.slow
def test_two_processes_with_every_compression(tmp_path):
    jobs = ["sequence:" + ",".join(CASES), "cfg:micro,variance", "graph-sequence:conv,uneven", "graph-cfg:conv"]
    check(run(tmp_path, 2, *jobs))


@pytest.mark.slow
def test_four_processes_are_one(tmp_path):
    """Bands of four, and two bands of each half; of 6, 4, 4 and 5 rows in one case."""
    jobs = (
        "sequence:conv,uneven-tall,control-unguided",
        "both:uneven,micro,control,control-two",
        "graph-both:uneven,control",
    )
    check(run(tmp_path, 4, *jobs))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sequence", "cfg"])
def test_launcher_draws_the_picture_of_one_process(mini, tmp_path, mode):
    environment = {**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    environment.update(MASTER_PORT=str(free_port()), LOG_DIR=str(tmp_path / "logs"))
    command = [ROOT / "tools" / "launch" / "generate_cpu.sh", "a red apple", "--parallel", mode, "--verbose"]
    command += ["--steps", "4", "--seed", "3", "--out", tmp_path / "apple.png"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    part = ParallelSampling(mode, Ranks(0, 2)).part(mini.components.opened("dit").config, True, 16, 16)
    how = {"aligned": not is_accelerated(mini.dit)}
    sent = sum(bytes_sent(mini.components.opened("dit").config, part, 1, 4, **how).values()) / 1e6
    assert f"parallel {mode}: 2 processes, each sends {sent:.2f} MB a step" in done.stdout
    expected = mini("a red apple", seed=3, num_inference_steps=4, progress=False).images[0]
    with Image.open(tmp_path / "apple.png") as image:
        difference = np.abs(np.asarray(image).astype(int) - np.asarray(expected).astype(int))
    assert difference.max() <= 1


COMPRESSIONS = [None] + [KVCompression(mode, 2, (0,)) for mode in ("conv", "uniform")] + [
    KVCompression("uniform_every", factor, (0,)) for factor in (2, 3, 6)
]  # fmt: skip


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_bands_keep_what_the_image_keeps(compression):
    """All bands together contribute the keys of the whole image, for grids of every shape."""
    for rows, columns, count in [(256, 256, 8), (64, 64, 4), (19, 6, 4), (15, 9, 2), (12, 5, 2), (36, 7, 3)]:
        bands = bands_of(rows, columns, count, compression)
        assert sum(bands) == rows and len(bands) == count and min(bands) > 0
        assert sum(keys_of(bands, columns, compression)) == keys_of((rows,), columns, compression)[0]
        assert min(keys_of(bands, columns, compression)) > 0
        for i in range(1, count):  # token that a band begins with: the first of a cell
            first = sum(bands[:i])
            if compression is not None and compression.sampling == "uniform_every":
                assert first * columns % compression.factor == 0
            elif compression is not None:
                assert first % compression.factor == 0


def test_compression_sends_a_quarter():
    """XL/2 at 4K on eight processes, fp16, one guided image: keys and values of 65536 tokens, 16 heads of 80."""
    part = Part(bands_of(256, 256, 8), 0, 256)
    plain = bytes_sent(DiTConfig(), part, 1, 2)
    assert plain["keys"] == 28 * 2 * (65536 // 8) * 2 * 16 * 80 * 2 * 7
    assert plain["noise"] == 2 * 4 * (512 // 8) * 512 * 2 * 7
    narrow = bytes_sent(DiTConfig(), part, 1, 2, aligned=False)  # 72 columns, as the accelerator on a CPU has them
    assert narrow["keys"] * 80 == plain["keys"] * 72 and narrow["noise"] == plain["noise"]
    everywhere = bytes_sent(DiTConfig(kv_compression=KVCompression(layers=tuple(range(28)))), part, 1, 2)
    assert everywhere["keys"] * 4 == plain["keys"] and everywhere["noise"] == plain["noise"]
    released = bytes_sent(DiTConfig(kv_compression="conv:2:14-27"), part, 1, 2)
    assert released["keys"] * 8 == plain["keys"] * 5  # the upper half of the layers is compressed
    halves = bytes_sent(DiTConfig(), Part((256,), 0, 256, half=1), 1, 2)
    assert halves == {"keys": 0, "noise": 4 * 512 * 512 * 2}


@pytest.mark.parametrize(
    "mode, count, text",
    [
        ("sequence", 1, "generate_cpu.sh"),
        ("cfg", 4, "takes 2 processes, not 4"),
        ("both", 6, None),
        ("both", 3, "even number of at least 4"),
        ("rows", 2, "one of sequence, cfg, both"),
    ],
)
def test_numbers_of_processes(mode, count, text):
    if text is None:
        assert ParallelSampling(mode, Ranks(4, count)).half == 1
        return
    with pytest.raises(MindSigmaError, match=text):
        ParallelSampling(mode, Ranks(0, count))


def test_what_cannot_be_divided():
    with pytest.raises(MindSigmaError, match="guidance scale is at most 1"):
        ParallelSampling("cfg", Ranks(0, 2)).part(DiTConfig(), False, 16, 16)
    with pytest.raises(MindSigmaError, match="5 bands of rows: the image has 9 rows of tokens, in units of 2"):
        bands_of(9, 9, 5, KVCompression())
    graphs = ParallelGraphs(tiny_dit(), ParallelSampling("cfg", Ranks(0, 2)))
    with pytest.raises(MindSigmaError, match="pag_scale .* makes more than two halves of guidance"):
        graphs.step(DPMSolver(), True, (1, 4, 16, 16), perturbed=(1,))
    with pytest.raises(MindSigmaError, match="guess_mode .* controls one half of guidance alone"):
        graphs.step(DPMSolver(), True, (1, 4, 16, 16), control=ControlSum((), guess=True))
    with pytest.raises(MindSigmaError, match="there is one process only"):
        PixArtSigmaPipeline.from_pretrained("sigma-mini", parallel="sequence")


def test_tool_asks_for_a_mode_under_msrun(monkeypatch):
    tool = load_tool("generate")
    monkeypatch.setenv("MS_WORKER_NUM", "2")
    with pytest.raises(MindSigmaError, match="give --parallel"):
        tool.check(tool.build_parser().parse_args(["an apple"]), 1)
    tool.check(tool.build_parser().parse_args(["an apple", "--parallel", "cfg"]), 1)


@pytest.mark.parametrize(
    "flags, variables, text",
    [
        ([], {}, "give --parallel"),
        (["--parallel=cfg"], {"PROCESSES": "1"}, "PROCESSES is '1', it must be a whole number of at least 2"),
        (["--parallel", "cfg"], {"MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
    ],
)
def test_launcher_refuses(flags, variables, text):
    command = [ROOT / "tools" / "launch" / "generate_cpu.sh", "an apple", *flags]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and text in done.stderr


@pytest.mark.parametrize("compressed", [False, True])
def test_step_exports_as_one_graph(compressed, tmp_path):
    """A guided step of one of eight processes, as on Ascend, exported by one process: gathers after compression."""
    config = DiTConfig(hidden_size=144, num_heads=2, depth=2, kv_compression="conv:2:0,1" if compressed else None)
    with no_init_parameters():
        dit = DiT(config, ms.float16)
    for parameter in dit.get_parameters():
        parameter.set_data(Tensor(np.zeros(parameter.shape, np.float16)))
    parallel = ParallelSampling("sequence", Ranks(3, 8))
    step = PartStep(dit, DPMSolver(), True, parallel.part(config, True, 64, 64), parallel.collectives.gather)
    align_heads(dit)
    arrays = [np.zeros((1, 4, 128, 128)), np.zeros((2, 1, 4, 128, 128)), np.zeros(6), np.zeros(())]
    inputs = [Tensor(array.astype(np.float32)) for array in arrays]
    text_kv = tuple((Tensor(np.zeros((2, 16, 2 * 80), np.float16)),) * 2 for _ in range(2))
    modulation, position = (Tensor(np.zeros(shape, np.float16)) for shape in ((1, 14, 144), (1, 8 * 64, 144)))
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        inputs += [ms.mutable(text_kv), modulation, position]
        with composing_for("Ascend"):
            ms.export(step, *inputs, file_name=str(tmp_path / "step"), file_format="MINDIR")
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)
    model = mind_ir_pb2.ModelProto()
    model.ParseFromString((tmp_path / "step.mindir").read_bytes())
    gathers = []
    for function in [model.graph, *model.functions]:
        for node in function.node:
            if node.op_type.split("::")[-1].split(":")[0] == "AllGather":
                shape = next(attribute for attribute in node.attribute if attribute.name == "shape")
                gathers.append(tuple(shape.tensors[0].dims))
    tokens = 8 * 64 // (4 if compressed else 1)
    assert sorted(gathers) == sorted([(8, 2, tokens, 2 * 160)] * 2 + [(8, 2, 4, 16, 128)])


def test_alone_a_collective_gives_its_input():
    collectives = Collectives(Ranks())
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    assert np.array_equal(collectives.array_from_rank(0, array), array)
    assert np.array_equal(collectives.gather(Tensor(array)).asnumpy(), array[None])
    assert [int(value[0]) for value in collectives.spread(lambda x: [2 * x], [1, 2, 3])] == [2, 4, 6]
