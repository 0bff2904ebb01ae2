"""Quantised checkpoints: float8 weights with a scale become numbers, every other form is refused by its name.

Facts, with where they are written down:
* ComfyUI (comfy/ops.py, comfy/model_detection.py): beside the float8 `X.weight` stands `X.scale_weight`, one float32,
  and perhaps `X.scale_input`; an empty `scaled_fp8` marks the file. The weight is `weight * scale_weight`; the scale
  of the input is for kernels that multiply in float8. Its newer files have `X.weight_scale`, `X.input_scale` and a
  uint8 text `X.comfy_quant`, {"format": "float8_e4m3fn"}.
* NVIDIA's ModelOpt and vLLM's compressed-tensors: `X.weight_scale`, of one number or of one for each row.
* DeepSeek and transformers' FineGrainedFP8: `X.weight_scale_inv`, a scale for each block of 128 x 128.
* bitsandbytes (functional.py, QuantState.as_dict): `X.weight.absmax`, `.quant_map`,
  `.quant_state.bitsandbytes__nf4`; int8: `X.SCB`, `X.weight_format`.
* GPTQ and AWQ: `X.qweight`, `X.qzeros`, `X.scales`, `X.g_idx`; nunchaku: `X.wscales`; optimum-quanto:
  `X.weight._data`, `X.weight._scale`; torchao: `X._weight_qdata`, `X._weight_scale`.
"""

import json
import re

import numpy as np

from mindsigma.errors import MindSigmaError, one_line
from mindsigma.weights.formats.floats import is_float
from mindsigma.weights.formats.tensor_stream import release

SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")
UNUSED = ("scale_input", "input_scale", "scaled_fp8", "comfy_quant")  # nothing that weights need once they are numbers
LONGEST_NOTE = 2**12  # bytes of a comfy_quant
FORMS = (
    (r".*\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)", "bitsandbytes, 4 bits (nf4, fp4)"),
    (r".*\.(SCB|weight_format)", "bitsandbytes, int8"),
    (r".*\.(qweight|qzeros|g_idx)", "packed integers (GPTQ, AWQ or SVDQuant)"),
    (r".*\.(wscales|smooth_factor(_orig)?)", "SVDQuant of nunchaku"),
    (r".*\.(weight_packed|weight_shape)", "packed integers of compressed-tensors"),
    (r".*\.weight\._(data|scale|shift)", "optimum-quanto"),
    (r".*[.:_]qdata", "torchao"),
    (r".*\.weight_scale_2", "NVFP4, 4 bits in blocks"),
)
_FORMS = [(re.compile(pattern), form) for pattern, form in FORMS]


class ScaledTensor:
    """A weight times its scale, float32, computed when it is read: `shape`, `dtype`, and `numpy.asarray`.

    `scale`: float32, one number or broadcast against the weight.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, weight, scale):
        self.shape = weight.shape
        self._weight, self._scale = weight, scale

    def __array__(self, dtype=None, copy=None):
        stored = np.asarray(self._weight)
        whole = stored.astype(np.float32)
        release(stored)
        whole *= self._scale
        whole.flags.writeable = False
        return whole if dtype is None else whole.astype(dtype, copy=False)


def unscaled(path, tensors):
    """The tensors of a checkpoint with scaled float8 weights as numbers.

    Args:
        path: Path, for messages.
        tensors: dict name -> array, or what `numpy.asarray` makes one.

    Returns:
        (tensors, scaled, left_out): the dict without what only quantised forms have, the names of the weights that are
        multiplied by their scales, and those of the tensors left out.

    Raises:
        MindSigmaError: the weights are in a form that is not read: integers with scales, scales of blocks, 4 bits.
    """
    for pattern, form in _FORMS:
        name = next((name for name in tensors if pattern.fullmatch(name)), None)
        if name is not None:
            raise _refused(path, form, name)
    result, scaled, left_out = dict(tensors), [], []
    for name in tensors:
        module, dot, last = name.rpartition(".")
        if last in SCALES and f"{module}{dot}weight" in tensors:
            weight = f"{module}{dot}weight"
            if weight in scaled:
                raise MindSigmaError(f"{path}: '{one_line(weight)}' has two scales; keep one of them")
            result[weight] = ScaledTensor(tensors[weight], _scale(path, tensors, name, weight))
            scaled.append(weight)
            del result[name]
        elif last in UNUSED:
            if last == "comfy_quant":
                _check_note(path, name, np.asarray(tensors[name]))
            left_out.append(name)
            del result[name]
    for name, tensor in result.items():
        if name.rpartition(".")[2] == "weight" and tensor.dtype.name in ("int8", "uint8"):
            raise _refused(path, f"{tensor.dtype} weights, with scales elsewhere", name)
    return result, scaled, left_out


def _scale(path, tensors, name, weight):
    """The scale of a weight, float32, of a shape that broadcasts against it."""
    scale, stored = np.asarray(tensors[name]), tensors[weight]
    if not is_float(stored.dtype):
        raise _refused(path, f"{stored.dtype} with scales", weight)
    if not is_float(scale.dtype):
        raise _refused(path, "scales of blocks (MXFP8)", name)
    rows = stored.shape[0] if stored.shape else 1
    if scale.size != 1 and (scale.size != rows or scale.shape[:1] != (rows,)):
        raise _refused(path, f"scales of blocks, {scale.shape} for {tuple(stored.shape)}", name)
    scale = scale.astype(np.float32)
    if not np.isfinite(scale).all():
        raise MindSigmaError(f"{path}: the scale '{one_line(name)}' is not finite; copy or download the file again")
    return scale.reshape(()) if scale.size == 1 else scale.reshape((rows,) + (1,) * (len(stored.shape) - 1))


def _check_note(path, name, note):
    """Raise unless ComfyUI's note on a layer speaks of float8 with one scale."""
    try:
        note = json.loads(note.tobytes() if note.nbytes <= LONGEST_NOTE else b"")
        form = note["format"]
    except (ValueError, LookupError, TypeError, RecursionError):
        form = "unreadable"
    if form not in ("float8_e4m3fn", "float8_e5m2"):
        raise _refused(path, f"ComfyUI's {one_line(form, 40)}", name)


def _refused(path, form, name):
    return MindSigmaError(
        f"{path}: quantised weights ({form}; tensor '{one_line(name)}') are not read; "
        "use the fp32, fp16 or bf16 file of the model, or one in float8"
    )
