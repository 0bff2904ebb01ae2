"""Trains diffusers' PixArt transformer with the official loss on inputs that tools/compare_training.py wrote.

Runs in a virtual environment of its own, with torch, diffusers and safetensors; nothing else of the project needs them.

python tools/peers/train_torch.py FOLDER
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import PixArtTransformer2DModel


def mean_of_rest(x):
    """Mean over all but the first axis."""
    return x.flatten(1).mean(1)


def loss_of(output, clean, noisy, noise, numbers, columns):
    """Squared error of the noise and variance bound in bits, means over the batch."""
    number = {name: numbers[:, i].reshape(-1, 1, 1, 1) for i, name in enumerate(columns)}
    epsilon, place = output.chunk(2, 1)
    mse = mean_of_rest((noise - epsilon) ** 2) * numbers[:, columns.index("weight")]
    predicted = (noisy - number["noise"] * epsilon.detach()) / number["signal"]
    mean = number["mean_x0"] * predicted + number["mean_xt"] * noisy
    true = number["mean_x0"] * clean + number["mean_xt"] * noisy
    fraction = (place + 1) / 2
    log_variance = fraction * number["max_log"] + (1 - fraction) * number["min_log"]
    low = number["min_log"]
    divergence = 0.5 * (
        log_variance - low - 1 + torch.exp(low - log_variance) + (true - mean) ** 2 * torch.exp(-log_variance)
    )

    def cdf(x):
        return 0.5 * (1 + torch.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))

    inverse = torch.exp(-0.5 * log_variance * number["first"])
    upper, lower = (cdf(inverse * (clean - mean + offset / 255)) for offset in (1, -1))
    inside = (upper - lower).clamp(min=1e-12).log()
    tails = torch.where(clean < -0.999, upper.clamp(min=1e-12).log(), (1 - lower).clamp(min=1e-12).log())
    likelihood = torch.where(clean.abs() > 0.999, tails, inside)
    bound = number["first"] * -likelihood + (1 - number["first"]) * divergence
    return mse.mean(), (mean_of_rest(bound) / np.log(2)).mean()


def main(folder):
    """Train as FOLDER/run.json says; writes FOLDER/torch_RANK.json.

    Several processes share a step if RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say so.
    """
    run = json.loads((folder / "run.json").read_text())
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(max(1, run["threads"] // count))
    model = PixArtTransformer2DModel.from_pretrained(folder / "diffusers", torch_dtype=torch.float32).train()
    if run["recompute"]:
        model.enable_gradient_checkpointing()
    if count > 1:
        torch.distributed.init_process_group("gloo")
        model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    rows = slice(rank * run["batch_size"], (rank + 1) * run["batch_size"])
    optimizer = torch.optim.AdamW(model.parameters(), run["rate"], betas=run["betas"], eps=run["eps"], weight_decay=0.0)
    lines = []
    for step in range(run["steps"]):
        data = {name: torch.from_numpy(array[rows]) for name, array in np.load(folder / f"step_{step}.npz").items()}
        start, cpu = time.perf_counter(), time.process_time()
        number = {name: data["numbers"][:, i].reshape(-1, 1, 1, 1) for i, name in enumerate(run["columns"])}
        noisy = number["signal"] * data["clean"] + number["noise"] * data["noise"]
        output = model(
            noisy,
            encoder_hidden_states=data["states"],
            timestep=data["timestep"],
            encoder_attention_mask=data["mask"],
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        mse, bound = loss_of(output, data["clean"], noisy, data["noise"], data["numbers"], run["columns"])
        optimizer.zero_grad()
        (mse + bound).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run["max_norm"])
        optimizer.step()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        losses = {"loss": float(mse + bound), "grad_norm": float(norm)}
        lines.append({**losses, "seconds": seconds, "cpu_seconds": cpu})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    result = {"lines": lines, "peak_gb": peak, "version": torch.__version__}
    (folder / f"torch_{rank}.json").write_text(json.dumps(result))
    if count > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
