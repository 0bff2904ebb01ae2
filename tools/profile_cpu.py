"""Where the time of a CPU goes, and how far each part is from the fastest matrix product of this machine.

python tools/profile_cpu.py mini xl-256 --depth 4
"""

import argparse
import sys
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mindsigma import command_line  # noqa: E402
from mindsigma.errors import MindSigmaError  # noqa: E402

CASES = ("mini", "xl-256", "xl-512", "xl-1024", "xl-2048", "vae-512", "t5")
XL = {
    "xl-256": "PixArt-Sigma-XL-2-256x256",
    "xl-512": "PixArt-Sigma-XL-2-512-MS",
    "xl-1024": "PixArt-Sigma-XL-2-1024-MS",
    "xl-2048": "PixArt-Sigma-XL-2-2K-MS",
}
CAPTION_TOKENS = 300


def fill(network):
    """Give every weight of a network random values."""
    import numpy as np
    from mindspore import Tensor

    rng = np.random.default_rng(0)
    for parameter in network.get_parameters():
        parameter.set_data(Tensor(rng.standard_normal(parameter.shape, np.float32) * np.float32(0.02)))
    return network


def random_tensor(*shape):
    """Standard normal fp32 Tensor."""
    import numpy as np
    from mindspore import Tensor

    return Tensor(np.random.default_rng(1).standard_normal(shape, np.float32))


def prepare(case, depth, kernels):
    """A function without arguments that does the work of a case once."""
    import dataclasses

    import numpy as np
    from mindspore import Tensor
    from mindspore.nn.utils import no_init_parameters

    from mindsigma.models.dit import DiT
    from mindsigma.models.dit.config import preset
    from mindsigma.models.t5 import T5Config, T5Encoder
    from mindsigma.models.vae import VAE
    from mindsigma.models.vae_config import VAEConfig
    from mindsigma.pipeline.pipeline import PixArtSigmaPipeline

    if case == "mini":
        pipeline = PixArtSigmaPipeline.from_pretrained("sigma-mini")
        return lambda: pipeline("a penguin on a yellow background", seed=0, progress=False)
    if case == "vae-512":
        vae, latents = fill(VAE(VAEConfig(), kernels=kernels)), random_tensor(1, 4, 64, 64)
        return lambda: vae(latents).asnumpy()
    with no_init_parameters():
        if case == "t5":
            network = T5Encoder(T5Config(num_layers=depth or 2), kernels=kernels)
        else:
            config = preset(XL[case])
            network = DiT(dataclasses.replace(config, depth=depth or config.depth), kernels=kernels)
    fill(network)
    if case == "t5":
        ids, mask = Tensor(np.arange(CAPTION_TOKENS, dtype=np.int32)[None]), Tensor(np.ones((1, CAPTION_TOKENS)))
        return lambda: network(ids, mask).asnumpy()
    side = int(case.split("-")[1]) // 8
    latents, rows = random_tensor(2, 4, side, side), network.modulations(Tensor(np.full(1, 500.0, np.float32)))
    keys = network.encode_caption(random_tensor(2, CAPTION_TOKENS, network.config.caption_channels))
    position = network.position(latents.shape)
    return lambda: network.denoise(latents, rows, keys, position).asnumpy()


class Watch:
    """Counts calls, seconds and operations of the shared graphs; each call is waited for."""

    def __init__(self):
        self.rows = defaultdict(lambda: [0, 0.0, 0.0])  # name of the function: calls, seconds, operations

    def install(self):
        """Watch every shared graph from now on."""
        from mindsigma.ops.shared_graph import SharedGraph

        original, rows = SharedGraph.__call__, self.rows

        def watched(graph, *inputs):
            start = time.perf_counter()
            result = original(graph, *inputs)
            for value in result if isinstance(result, tuple) else (result,):
                value.asnumpy()
            row = rows[graph.function.__name__]
            row[0] += 1
            row[1] += time.perf_counter() - start
            row[2] += operations(graph, inputs, result)
            return result

        SharedGraph.__call__ = watched


def operations(graph, inputs, result):
    """Floating-point operations of the products and convolutions of one call."""
    import math

    x = inputs[0]
    output = result[0] if isinstance(result, tuple) else result
    total, name = 0, graph.function.__name__
    for weight in graph.weights:
        if weight.ndim == 4 and weight.shape[2] > 1 and output.ndim == 4 and name != "predict":  # convolutions
            total += 2 * weight.size * output.shape[0] * math.prod(output.shape[2:])
        elif weight.ndim >= 2 and "table" not in weight.name:
            rows = x.size // x.shape[-1] if x.ndim == 3 else x.shape[0]
            rows = math.prod(x.shape[2:]) * rows if x.ndim == 4 and output.ndim == 4 and weight.ndim == 4 else rows
            total += 2 * weight.size * rows
    if name in ("block_of_rows", "self_attention_branch", "encoder_layer"):
        total += 4 * x.size * x.shape[1]  # every row with every row
    if name == "block_of_rows":
        total += 4 * x.size * inputs[2].size // (x.shape[0] * x.shape[-1])
    if name == "cross_attention_branch":
        total += 4 * x.size * inputs[1].size // (x.shape[0] * x.shape[-1])
    if name == "pixel_attention":
        total += 4 * x.size * math.prod(x.shape[2:])
    return total


def fastest_product():
    """Operations a second of a large matrix product: the better of MindSpore's and, where it can be had, ours."""
    import mindspore as ms
    from mindspore import ops

    from mindsigma.ops.native import operations as native

    x, weight = random_tensor(1, 2048, 1152), random_tensor(4608, 1152)
    product = ms.jit(ops.MatMul(transpose_b=True))
    ways = [lambda: product(x.reshape(-1, 1152), weight)]
    if native.load():
        ways.append(lambda: native.linear(x, weight))
    best = []
    for way in ways:
        seconds = []
        for _ in range(8):
            start = time.perf_counter()
            way().asnumpy()
            seconds.append(time.perf_counter() - start)
        best.append(2 * x.size * 4608 / min(seconds))
    names = ("MindSpore", "native")
    print("large product: " + ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in zip(names, best)))
    return max(best)


def main():
    """Run each case once to compile, once watched; print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default mini")
    parser.add_argument("--depth", type=int, help="blocks of XL/2, layers of T5-XXL (default: all, and 2 of T5)")
    parser.add_argument("--kernels", choices=("math", "native"), help="default: what the CPU offers")
    args = parser.parse_args()
    for case in args.cases:
        if case not in CASES:
            raise MindSigmaError(f"case {case!r} is unknown; choose from {', '.join(CASES)}")
    if args.depth is not None and args.depth < 1:
        raise MindSigmaError(f"--depth must be at least 1, not {args.depth}")
    from mindsigma.runtime import set_device

    set_device("CPU")
    limit = fastest_product()
    watch = Watch()
    watch.install()
    for case in args.cases or ["mini"]:
        work = prepare(case, args.depth, args.kernels)
        work()
        watch.rows.clear()
        start = time.perf_counter()
        work()
        show(case, time.perf_counter() - start, watch.rows, limit)
    return 0


def show(case, seconds, rows, limit):
    """Print the table of one case."""
    print(f"\n{case}: {seconds:.3f} s")
    print(f"{'graph':<24} {'calls':>6} {'s':>8} {'share':>6} {'GFLOP':>8} {'GFLOP/s':>8} {'of limit':>8}")
    spent = 0.0
    for name, (calls, each, work) in sorted(rows.items(), key=lambda item: -item[1][1]):
        spent += each
        rate = work / each
        print(
            f"{name:<24} {calls:>6} {each:>8.3f} {each / seconds:>6.0%} {work / 1e9:>8.1f} {rate / 1e9:>8.0f} "
            f"{rate / limit:>8.0%}"
        )
    print(f"{'between the graphs':<24} {'':>6} {seconds - spent:>8.3f} {(seconds - spent) / seconds:>6.0%}")


if __name__ == "__main__":
    command_line.run(main)
