"""The graphs whose reports are stored under tests/golden/graphs, by name: seconds-long ones and whole presets."""

from dataclasses import replace

from mindsigma.inspect.parts import Request

XL = "PixArt-Sigma-XL-2-1024-MS"
_STEP = Request(XL, "step", depth=2)
_KV = replace(_STEP, kv_compression="conv:2:1")

# Exported by the default tests: XL/2's width, few blocks, small T5 and VAE by way of sigma-mini.
SMALL = {
    "step-1024-fp16": _STEP,
    "step-1024-kv-bf16": replace(_KV, dtype="bf16"),
    "step-mini-control-fp16": Request("sigma-mini", "step", 256, 256, depth=3, weights=False, control_layers=2),
    "caption-fp16": Request(XL, "caption", depth=2),
    "train-mini-fp16": Request("sigma-mini", "train", 256, 256, depth=1, tokens=40, weights=False),
    "vae-decode-mini-fp16": Request("sigma-mini", "vae-decode", 256, 256, weights=False),
    "t5-mini-bf16": Request("sigma-mini", "t5", dtype="bf16", tokens=64, weights=False),
}


def _whole(pixels, name):
    plain = Request(f"PixArt-Sigma-XL-2-{name}", "step")
    return {f"xl-{pixels}-fp16": plain, f"xl-{pixels}-kv-fp16": replace(plain, model=f"{plain.model}-KV")}


# Every preset's guided step with all its blocks, half a minute each.
WHOLE = {
    **_whole(256, "256x256"),
    **_whole(512, "512-MS"),
    **_whole(1024, "1024-MS"),
    **_whole(2048, "2K-MS"),
    **_whole(4096, "4K-MS"),
}

CASES = {**SMALL, **WHOLE}
