"""Each writer of checkpoints on a disk that is full after some bytes; prints what each of them says."""

import resource
import signal
import sys
from pathlib import Path

import numpy as np

from mindsigma.errors import MindSigmaError
from mindsigma.weights.formats.mindspore_writer import write_mindspore_ckpt
from mindsigma.weights.formats.safetensors_shards import write_sharded_safetensors
from mindsigma.weights.formats.safetensors_writer import write_safetensors
from mindsigma.weights.formats.tensor_stream import TensorSpec
from mindsigma.weights.formats.torch_writer import write_torch


def write_shards(path, specs, read):
    write_sharded_safetensors(path.parent, path.name, specs, read, {}, 100_000)


if __name__ == "__main__":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for limit in (0, 10, 5_000, 70_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        for write in (write_safetensors, write_torch, write_mindspore_ckpt, write_shards):
            try:
                specs = [TensorSpec(str(i), np.float32, (4, 5_000)) for i in range(4)]
                write(Path(sys.argv[1]), specs, lambda name: np.ones((5_000, 4), np.float32).T)
            except MindSigmaError as error:
                print(error)
