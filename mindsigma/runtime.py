"""The one place that decides the device, the dtype and the execution mode."""

import mindspore as ms

from mindsigma.errors import MindSigmaError

DEVICES = ("CPU", "Ascend")
DTYPES = {"fp32": ms.float32, "fp16": ms.float16, "bf16": ms.bfloat16}


def device():
    """Name of the device that networks run on."""
    return ms.get_context("device_target")


def set_device(name=None):
    """Select "CPU" or "Ascend" and the mode that fits it; None takes what MindSpore finds. Returns the device's name.

    On a CPU that is PyNative, operation by operation; on Ascend graph mode, one graph a network. The mode is
    MindSpore's global one.

    On a CPU each operation has been computed when its call returns. MindSpore would hand it to threads of its own,
    which wait by turning in loops and take the cores from those that compute (mindsigma/backends/README.md).
    """
    found = device()
    name = found if name is None else name
    if name not in DEVICES:
        raise MindSigmaError(f"device {name!r} is unknown; choose from {', '.join(DEVICES)}")
    if name != found:
        try:
            ms.set_device(name)
        except (RuntimeError, ValueError):
            raise MindSigmaError(
                f"device {name!r} is not available to this MindSpore, which runs on {found}; "
                "on an NPU box check the driver and CANN (README, On an Ascend box)"
            ) from None
    ms.set_context(mode=ms.GRAPH_MODE if name == "Ascend" else ms.PYNATIVE_MODE)
    if name == "CPU":
        ms.runtime.launch_blocking()
    return name


def resolve_dtype(name):
    """MindSpore dtype for "fp32", "fp16", "bf16" or a MindSpore dtype; None is fp32 on the CPU and fp16 on Ascend."""
    on_cpu = device() == "CPU"
    if name is None:
        return ms.float32 if on_cpu else ms.float16
    if name in DTYPES.values():
        dtype = name
    elif isinstance(name, str) and name in DTYPES:
        dtype = DTYPES[name]
    else:
        raise MindSigmaError(f"dtype {name!r} is unknown; choose from {', '.join(DTYPES)}")
    if on_cpu and dtype == ms.bfloat16:
        raise MindSigmaError("dtype bf16: MindSpore's CPU backend has no bf16 matrix product; use fp32")
    return dtype
