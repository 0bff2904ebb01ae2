"""Peak memory of a T5 in every memory that it may be held in: python t5_memory_worker.py SMALL LARGE, two weight files.

Prints a JSON object, name of the memory to bytes; "start" is what the small one takes layer by layer.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np  # noqa: E402
from mindspore import Tensor  # noqa: E402

from mindsigma.pipeline.phases import PhaseClock  # noqa: E402
from mindsigma.runtime import set_device  # noqa: E402
from mindsigma.weights.loading import open_t5  # noqa: E402


def main():
    """Encode one text each way."""
    small, large = sys.argv[1:]
    set_device("CPU")
    ids, mask = Tensor(np.arange(16, dtype=np.int32)[None]), Tensor(np.ones((1, 16), np.int32))
    clock = PhaseClock()
    for name, memory in (("start", "layers"), ("layers", "layers"), ("int8", "int8"), ("whole", "whole")):
        with clock.phase(name):
            encoder = open_t5(small if name == "start" else large, memory=memory).load()
            assert np.isfinite(encoder(ids, mask).asnumpy()).all()
            del encoder
    print(json.dumps({name: phase.peak_bytes for name, phase in clock.phases.items()}))


if __name__ == "__main__":
    main()
