"""What the tests of training runs share: a tiny network, features of noise, processes of tools/train.py."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor

from mindsigma import heartbeat
from mindsigma.data.conditions import Condition
from mindsigma.data.features import CONDITION, MOMENTS, STATES, FeatureFolder
from mindsigma.data.record import Record
from mindsigma.data.resolution import Resolution
from mindsigma.models.dit import DiT, DiTConfig
from mindsigma.training.learner import WholeLearner
from mindsigma.weights.formats.safetensors_file import read_safetensors

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "tools" / "train.py"
WIDTH, TOKENS = 256, 8  # channels of T5's states, longest caption
# The gradient of the keys' part of these is zero but for rounding; CAME divides it by its size.
OF_KEYS = (".attn.qkv.bias", ".kv_linear.bias")


def tiny_dit(seed=5, **changes):
    """A DiT of two blocks with random weights of a sane size, in training mode."""
    config = {
        "hidden_size": 32,
        "depth": 2,
        "num_heads": 2,
        "caption_channels": WIDTH,
        "input_size": 8,
        "pe_interpolation": 0.125,
        "model_max_length": TOKENS,
        **changes,
    }
    options = {name: config.pop(name) for name in ("dtype", "fp32_attention") if name in config}
    dit = DiT(DiTConfig(**config), parameter_dtype=ms.float32, **options)
    random = np.random.default_rng(seed)
    for parameter in dit.trainable_params():
        value = random.standard_normal(parameter.shape) / max(parameter.shape[-1], 8) ** 0.5
        parameter.set_data(Tensor(value.astype(np.float32)))
    return dit.set_train()


def write_network(folder, **changes):
    """A folder of `tiny_dit` that tools/train.py takes as --model."""
    folder.mkdir(parents=True)
    WholeLearner(tiny_dit(**changes), np.zeros((TOKENS, WIDTH), np.float32)).write(folder)
    return folder


def write_features(folder, sizes, resolution, max_length=TOKENS, condition=False):
    """A folder of features as tools/extract_features.py writes it, of noise, for images of these (height, width).

    `condition`: with moments of conditions, too.
    """
    config = {
        "resolution": resolution.as_dict(),
        "max_length": max_length,
        "latent_channels": 4,
        "downsampling": 8,
        "state_width": WIDTH,
    }
    of_condition = Condition("canny") if condition else None
    features, random = FeatureFolder(folder, config, of_condition), np.random.default_rng(7)
    features.write_null_caption(random.standard_normal((max_length, WIDTH)).astype(np.float32), 1)
    buckets, records, tokens = resolution.buckets(), [], []
    for i, (size, bucket) in enumerate(zip(sizes, resolution.assign(np.array(sizes)))):
        record = Record(f"{i}.png", f"picture {i}", "", *size, f"{i}.png")
        length = int(random.integers(2, max_length + 1))
        mean = random.standard_normal((4, buckets[bucket].height // 8, buckets[bucket].width // 8))
        moments = np.concatenate([mean * 7.0, np.full_like(mean, 0.1)]).astype(np.float32)
        tensors = {MOMENTS: moments, STATES: random.standard_normal((length, WIDTH)).astype(np.float32)}
        if condition:
            tensors[CONDITION] = np.flip(moments, -1) + np.float32(0.01)
        features.write(record, tensors)
        records.append(record)
        tokens.append((length, 0))
    features.write_index(records, tokens)
    return folder


def square_features(folder, count=24, **options):
    """Features of `count` images of 64 x 64 pixels; options of `write_features`."""
    return write_features(folder, [(64, 64)] * count, Resolution(64), **options)


def options(network, features, output, **changes):
    """Arguments of tools/train.py for a tiny run; a value of None leaves an option out, True gives it no value."""
    values = {
        "model": network,
        "components": "sigma-mini",
        "data": features,
        "output": output,
        "resolution": 64,
        "max_length": TOKENS,
        "batch_size": 4,
        "steps": 6,
        "learning_rate": 1e-3,
        "max_norm": 0.5,
        "ema_decay": 0.9,
        "save_every": 2,
        "log_every": 1,
        "threads": 1,
        "device": "CPU",
        "recompute": True,  # a third fewer graphs to compile, in every process
        **changes,
    }
    result = []
    for name, value in values.items():
        if value is not None and value is not False:
            result += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return result


def run_here(parse, folders, output, stop=lambda: False, **changes):
    """Train in this process; the Trainer afterwards.

    Args:
        parse: function of the arguments of a tool to their namespace.
        folders: of the network and of the features, in place of which `changes` may have others (features=).
        stop: of Trainer.
        changes: of `options`.
    """
    from mindsigma.training.trainer import Trainer

    features = changes.pop("features", folders[1])
    trainer = Trainer(parse(options(folders[0], features, output, **changes)), stop)
    trainer.run()
    return trainer


class Run:
    """Processes of one start of a script: the training tool, or a test's wrapper around it.

    With `ranks` > 1 they are what msrun starts, a scheduler and workers, from the environment variables that it sets;
    msrun itself, which waits in a loop that takes a whole core, is left to one test of its own. As with a launcher
    (mindsigma/commands/launch.py), workers end without MindSpore's exit hooks, which crash now and then.
    """

    def __init__(self, arguments, log, ranks=1, script=TRAIN, environment=None):
        log.mkdir(parents=True, exist_ok=True)
        common = {**os.environ, "GLOG_v": "3", **(environment or {})}
        common.pop("MS_WORKER_NUM", None)
        command = [sys.executable, str(script), *arguments]
        self.logs = [log / f"worker_{rank}.log" for rank in range(ranks)]
        roles = [(path, {}) for path in self.logs]
        self.scheduler = self.watched = None
        if ranks > 1:
            common.update(MS_WORKER_NUM=str(ranks), MS_SCHED_HOST="127.0.0.1", MS_SCHED_PORT=str(free_port()))
            common["RANK_SIZE"] = str(ranks)
            watched = log / "heartbeats"
            watched.mkdir(exist_ok=True)
            self.watched, common[heartbeat.FOLDER] = watched, str(watched)
            port = int(common["MS_SCHED_PORT"])
            roles = [
                (path, {"MS_ROLE": "MS_WORKER", "MS_NODE_ID": str(i), "RANK_ID": str(i), "DEVICE_ID": str(i)})
                for i, path in enumerate(self.logs)
            ]
            role = {**common, "MS_ROLE": "MS_SCHED", "RANK_ID": "0"}
            self.scheduler = _start(command, log / "scheduler.log", role, everywhere=True)
            # Workers that find no scheduler at their first try wait long before the next.
            while self.scheduler.poll() is None and not _listening(port):
                time.sleep(0.05)
        self.workers = [_start(command, path, {**common, **role}, ranks > 1) for path, role in roles]

    def wait(self, seconds=900):
        """Exit code of the first worker that ended other than with 0, after which the others are killed; else 0."""
        end = time.monotonic() + seconds
        try:
            while True:
                codes = [worker.poll() for worker in self.workers]
                failed = [code for code in codes if code]
                if failed:
                    return failed[0]
                if not any(code is None for code in codes):
                    return 0
                self._let_go(codes)
                assert time.monotonic() < end, f"still running after {seconds} s:\n{self.text()}"
                time.sleep(0.02)
        finally:
            self.kill()

    def _let_go(self, codes):
        """Tell workers that all have finished: one that had left would break the last exchange of the others."""
        if self.watched is None or (self.watched / heartbeat.LEAVE).exists():
            return
        beats = [heartbeat.last_beat(self.watched, rank) for rank in range(len(codes))]
        if all(code == 0 or beat and beat["state"] == heartbeat.FINISHED for code, beat in zip(codes, beats)):
            (self.watched / heartbeat.LEAVE).touch()

    def kill(self, number=signal.SIGKILL):
        """End whatever still runs."""
        for process in [*self.workers, self.scheduler]:
            if process and process.poll() is None:
                process.send_signal(number)
        for process in [*self.workers, self.scheduler]:
            if process and number == signal.SIGKILL:
                process.wait()

    def until(self, condition, seconds=120):
        """Wait until condition() holds; returns False if a worker ends before it does."""
        end = time.monotonic() + seconds
        while not condition():
            if any(worker.poll() is not None for worker in self.workers):
                return False
            assert time.monotonic() < end, f"waited for {seconds} s:\n{self.text()}"
            time.sleep(0.005)
        return True

    def text(self, rank=0):
        """What a worker wrote so far."""
        return self.logs[rank].read_text(errors="replace")


def _start(command, log, environment, everywhere=False):
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment
        )
    if everywhere:  # on all cores, not on this process's share alone (conftest.py)
        os.sched_setaffinity(process.pid, range(os.cpu_count()))
    return process


def _listening(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def train(arguments, log, ranks=1, expect=0, seconds=900, **keywords):
    """Run to the end, which must come within `seconds`, and check the exit code; returns the Run."""
    run = Run(arguments, log, ranks, **keywords)
    code = run.wait(seconds)
    assert code == expect, f"exit code {code}:\n" + "\n".join(run.text(rank) for rank in range(ranks))
    return run


def free_port():
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def checkpoint(output, step):
    """Path of a checkpoint of a run."""
    return output / "checkpoints" / f"step_{step:08d}"


def stored(folder):
    """All tensors of a checkpoint by part and name, the optimiser's states of all processes together."""
    result = {}
    for file in sorted(folder.rglob("*.safetensors")):
        part = file.parent.name if file.parent != folder else file.stem.split("-")[0]
        for name, value in read_safetensors(file)[0].items():
            value = np.array(value)
            key = f"{part}/{name}"
            assert key not in result or np.array_equal(result[key], value), f"processes disagree about {key}"
            result[key] = value
    return result


def parts_of(folder):
    """dict part -> dict name -> array of a checkpoint, or of a folder with a network in it."""
    parts = {}
    for key, value in stored(folder).items():
        part, name = key.split("/", 1)
        parts.setdefault(part, {})[name] = value
    return parts


def log_lines(output):
    """Lines of log.jsonl without what differs from run to run."""
    times = ("seconds", "images_per_second")
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in times} for line in lines]


def assert_same(first, second):
    """Two checkpoints hold the same bits."""
    first, second = stored(first), stored(second)
    assert sorted(first) == sorted(second)
    differing = [name for name in first if first[name].tobytes() != second[name].tobytes()]
    assert not differing, f"{len(differing)} tensors differ, such as {differing[:5]}"


def largest_difference(first, second, parts=("dit", "ema", "states"), but=()):
    """Largest relative difference (norm of the difference over norm) of the tensors of two checkpoints.

    `but`: parts of the names of tensors that are left out.
    """
    first, second = stored(first), stored(second)
    assert sorted(first) == sorted(second)
    largest = 0.0
    for name in first:
        left_out = name == "states/controls" or any(part in name for part in but)
        if name.split("/")[0] in parts and not left_out:
            a, b = first[name].astype(np.float64), second[name].astype(np.float64)
            norm = np.linalg.norm(b)
            largest = max(largest, np.linalg.norm(a - b) / norm if norm else float(np.any(a)))
    return largest
