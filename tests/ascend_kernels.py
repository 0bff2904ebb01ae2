"""Calls a kernel of the Ascend host as MindSpore does, on NumPy arrays: two calls, tensors with strides, executors."""

import ctypes
from functools import cache

import numpy as np

from mindsigma.ascend_host.build import build

BF16 = "bfloat16"  # which NumPy lacks: arrays of uint16
CODES = {"float32": 0, "float16": 1, "int8": 2, "int32": 3, "uint8": 4, "int64": 9, "float64": 11, "bool": 12, BF16: 27}
FORMAT_ND = 2


class Refused(Exception):
    """What the kernel said."""


@cache
def library():
    """The host's library as a ctypes.CDLL."""
    loaded = ctypes.CDLL(str(build() / "lib64" / "libascend_host.so"))
    loaded.aclGetRecentErrMsg.restype = ctypes.c_char_p
    for name in ("aclCreateTensor", "aclCreateScalar", "aclCreateIntArray", "aclCreateFloatArray", "aclCreateBoolArray",
                 "aclCreateTensorList", "aclCreateTensorDesc", "aclCreateDataBuffer", "aclopCreateAttr"):  # fmt: skip
        getattr(loaded, name).restype = ctypes.c_void_p
    return loaded


def to_bfloat(array):
    """float32 ndarray rounded to nearest even, as uint16 of bfloat16."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat(array):
    """uint16 of bfloat16 as float32 ndarray."""
    return (array.astype(np.uint32) << 16).view(np.float32)


class Tensor:
    """A NumPy array, of any strides, as an aclTensor. `bfloat`: its uint16 are bfloat16."""

    def __init__(self, array, bfloat=False):
        self.array = array
        self.dtype = dtype = BF16 if bfloat else array.dtype.name
        size = array.dtype.itemsize
        shape = (ctypes.c_int64 * max(array.ndim, 1))(*array.shape)
        strides = (ctypes.c_int64 * max(array.ndim, 1))(*(step // size for step in array.strides))
        self.pointer = ctypes.c_void_p(
            library().aclCreateTensor(
                shape,
                ctypes.c_uint64(array.ndim),
                CODES[dtype],
                strides,
                ctypes.c_int64(0),
                FORMAT_ND,
                shape,
                ctypes.c_uint64(array.ndim),
                ctypes.c_void_p(array.ctypes.data),
            )  # fmt: skip
        )


def scalar(value, dtype="float32"):
    """A number as an aclScalar."""
    held = np.array([value], dtype)
    return ctypes.c_void_p(library().aclCreateScalar(ctypes.c_void_p(held.ctypes.data), CODES[dtype]))


def ints(*values):
    """Numbers as an aclIntArray."""
    return ctypes.c_void_p(
        library().aclCreateIntArray((ctypes.c_int64 * len(values))(*values), ctypes.c_uint64(len(values)))
    )


def tensors(*given):
    """Tensors as an aclTensorList."""
    pointers = (ctypes.c_void_p * len(given))(*(tensor.pointer for tensor in given))
    return ctypes.c_void_p(library().aclCreateTensorList(pointers, ctypes.c_uint64(len(given))))


def call(name, *arguments):
    """Run a kernel once. Python ints are int64_t, floats double, bools bool, None a null pointer, str a char *.

    A C int8_t, int or float is given as its ctypes object. Raises Refused with what the kernel said.
    """
    given = [_argument(argument) for argument in arguments]
    workspace, executor = ctypes.c_uint64(), ctypes.c_void_p()
    code = getattr(library(), f"{name}GetWorkspaceSize")(*given, ctypes.byref(workspace), ctypes.byref(executor))
    if not code:
        code = getattr(library(), name)(None, ctypes.c_uint64(0), executor, None)
    if code:
        raise Refused(library().aclGetRecentErrMsg().decode())


def call_legacy(name, inputs, outputs, **attributes):
    """Run an operator of the older interface on packed Tensors. Attributes: ints, bools, strs or lists of ints."""

    def described(given):
        descriptions = (ctypes.c_void_p * len(given))()
        buffers = (ctypes.c_void_p * len(given))()
        for i, tensor in enumerate(given):
            shape = tensor.array.shape
            dims = (ctypes.c_int64 * max(len(shape), 1))(*shape)
            descriptions[i] = library().aclCreateTensorDesc(CODES[tensor.dtype], len(shape), dims, FORMAT_ND)
            buffers[i] = library().aclCreateDataBuffer(
                ctypes.c_void_p(tensor.array.ctypes.data), ctypes.c_size_t(tensor.array.nbytes)
            )
        return len(given), descriptions, buffers

    made = ctypes.c_void_p(library().aclopCreateAttr())
    for key, value in attributes.items():
        key = key.encode()
        if isinstance(value, str):
            library().aclopSetAttrString(made, key, value.encode())
        elif isinstance(value, list):
            library().aclopSetAttrListInt(made, key, len(value), (ctypes.c_int64 * len(value))(*value))
        else:
            library().aclopSetAttrInt(made, key, ctypes.c_int64(value))
    code = library().aclopCompileAndExecuteV2(
        name.encode(), *described(inputs), *described(outputs), made, 0, 0, None, None
    )
    if code:
        raise Refused(library().aclGetRecentErrMsg().decode())


def _argument(argument):
    if isinstance(argument, Tensor):
        return argument.pointer
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, bool):
        return ctypes.c_bool(argument)
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    if isinstance(argument, float):
        return ctypes.c_double(argument)
    if isinstance(argument, str):
        return ctypes.c_char_p(argument.encode())
    return argument
