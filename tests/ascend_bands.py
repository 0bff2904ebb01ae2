"""One process of two under msrun on the Ascend host: latents drawn alone and with bands of tokens, fp32 and fp16.

python ascend_bands.py FOLDER writes FOLDER/rank_N.npz: latents after the last step as "alone-fp32" and the like.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import mindspore as ms  # noqa: E402
import numpy as np  # noqa: E402
from parallel_worker import case_inputs, draw  # noqa: E402

from mindsigma.distributed import join_ranks  # noqa: E402
from mindsigma.runtime import set_device  # noqa: E402
from mindsigma.sampling.denoising import DenoisingGraphs  # noqa: E402
from mindsigma.sampling.parallel import ParallelGraphs, ParallelSampling  # noqa: E402


def main():
    set_device("Ascend")
    ranks = join_ranks()
    parallel, drawn = ParallelSampling("sequence", ranks), {}
    for name, dtype in (("fp32", ms.float32), ("fp16", ms.float16)):
        dit, arguments = case_inputs(32, 32, {"dtype": dtype, "hidden_size": 64, "depth": 4})
        drawn[f"alone-{name}"] = draw(DenoisingGraphs(dit), arguments)[-1]
        drawn[f"bands-{name}"] = draw(ParallelGraphs(dit, parallel), arguments)[-1]
    np.savez(Path(sys.argv[1]) / f"rank_{ranks.rank}.npz", **drawn)


if __name__ == "__main__":
    main()
