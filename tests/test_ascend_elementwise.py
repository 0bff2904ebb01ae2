"""Kernels of the Ascend host that compute element by element, held to NumPy in float64."""

import ctypes
from math import erf

import numpy as np
import pytest
from ascend_kernels import BF16, CODES, Refused, Tensor, call, scalar
from ascend_numbers import DTYPES, Numbers, close, drawn, room


@pytest.fixture
def rng():
    return np.random.default_rng(2)


def turn(array):
    return array.T


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


FUNCTIONS = {
    "Exp": np.exp, "Log": np.log, "Log2": np.log2, "Log1p": np.log1p, "Expm1": np.expm1, "Sqrt": np.sqrt,
    "Rsqrt": lambda x: 1 / np.sqrt(x), "Reciprocal": lambda x: 1 / x, "Sin": np.sin, "Cos": np.cos, "Tanh": np.tanh,
    "Sigmoid": sigmoid, "Erf": np.vectorize(erf), "Neg": np.negative, "Abs": np.abs, "Sign": np.sign,
    "Floor": np.floor, "Ceil": np.ceil, "Trunc": np.trunc, "Relu": lambda x: np.maximum(x, 0),
    "Silu": lambda x: x * sigmoid(x),
}  # fmt: skip
OF_POSITIVE = ("Log", "Log2", "Log1p", "Sqrt", "Rsqrt")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_one_number(name, dtype, rng):
    values = 2 * rng.standard_normal((5, 7))
    x = Numbers(np.abs(values) + 0.1 if name in OF_POSITIVE else values, dtype, turn)
    out = room((5, 7), dtype, turn)
    call(f"aclnn{name}", x.tensor, out.tensor)
    close(out, FUNCTIONS[name](x.wide))


def test_whole_numbers_become_fractions():
    out = room((3,), "float16")
    call("aclnnExp", Numbers([0, 1, 2], "int64").tensor, out.tensor)
    close(out, np.exp([0, 1, 2]))
    with pytest.raises(Refused, match="aclnnSqrt: out is int32; CANN takes float32, float16, bfloat16, double"):
        call("aclnnSqrt", Numbers([4], "int32").tensor, room((1,), "int32").tensor)


SLOPE, CUBE = np.sqrt(2 / np.pi), 0.044715


def gelu(x):
    return 0.5 * x * (1 + np.tanh(SLOPE * (x + CUBE * x**3)))


def derivative(function):
    return lambda x: (function(x + 1e-5) - function(x - 1e-5)) / 2e-5


ACTIVATIONS = {
    "SiluBackward": (lambda x: x * sigmoid(x), ()),
    "GeluBackward": (gelu, ()),
    "GeluBackwardV2": (lambda x: 0.5 * x * (1 + np.vectorize(erf)(x / np.sqrt(2))), ("none",)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_of_activations(name, dtype, rng):
    function, more = ACTIVATIONS[name]
    grad, x, out = drawn(rng, (4, 9), dtype), drawn(rng, (4, 9), dtype), room((4, 9), dtype)
    call(f"aclnn{name}", grad.tensor, x.tensor, *more, out.tensor)
    close(out, grad.wide * derivative(function)(x.wide))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_from_outputs(dtype, rng):
    grad, y, out = drawn(rng, (33,), dtype), drawn(rng, (33,), dtype), room((33,), dtype)
    call("aclnnSigmoidBackward", grad.tensor, y.tensor, out.tensor)
    close(out, grad.wide * y.wide * (1 - y.wide))
    call("aclnnTanhBackward", grad.tensor, y.tensor, out.tensor)
    close(out, grad.wide * (1 - y.wide**2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_in_both_forms(dtype, rng):
    x, out = Numbers(np.linspace(-9, 9, 55), dtype), room((55,), dtype)
    call("aclnnGelu", x.tensor, out.tensor)
    close(out, gelu(x.wide))
    call("aclnnGeluV2", x.tensor, 1, out.tensor)
    close(out, gelu(x.wide))
    call("aclnnGeluV2", x.tensor, 0, out.tensor)
    close(out, 0.5 * x.wide * (1 + np.vectorize(erf)(x.wide / np.sqrt(2))))
    grad = Numbers(np.ones(55), dtype)
    call("aclnnGeluBackwardV2", grad.tensor, x.tensor, "tanh", out.tensor)
    close(out, derivative(gelu)(x.wide))
    with pytest.raises(Refused, match='approximate is "exact"'):
        call("aclnnGeluBackwardV2", grad.tensor, x.tensor, "exact", out.tensor)


BINARY = {
    "Mul": np.multiply, "Div": np.divide, "Maximum": np.maximum, "Minimum": np.minimum,
    "PowTensorTensor": lambda x, y: np.abs(x) ** y, "FloorDivide": lambda x, y: np.floor(x / y),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BINARY)
def test_two_tensors(name, dtype, rng):
    x, y = drawn(rng, (4, 1, 5), dtype), drawn(rng, (3, 1), dtype)
    if name == "PowTensorTensor":
        x = Numbers(np.abs(rng.standard_normal((4, 1, 5))), dtype)
    out = room((4, 3, 5), dtype)
    call(f"aclnn{name}", x.tensor, y.tensor, out.tensor)
    close(out, BINARY[name](x.wide, y.wide))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign,name", [(1, "Add"), (-1, "Sub")])
def test_sums_with_a_factor(sign, name, dtype, rng):
    x, y, out = drawn(rng, (6, 5), dtype), drawn(rng, (5,), dtype), room((6, 5), dtype)
    call(f"aclnn{name}", x.tensor, y.tensor, scalar(1), out.tensor)
    close(out, x.wide + sign * y.wide)
    call(f"aclnn{name}", x.tensor, y.tensor, scalar(0.5), out.tensor)
    close(out, x.wide + sign * 0.5 * y.wide)
    call(f"aclnn{name}s", x.tensor, scalar(0.25), scalar(2.0), out.tensor)
    close(out, x.wide + sign * 0.5)
    before = x.wide
    call(f"aclnnInplace{name}", x.tensor, y.tensor, scalar(1))
    close(x, before + sign * y.wide)


def test_an_output_may_be_an_input(rng):
    x = drawn(rng, (8, 8), "float32")
    expected = x.wide + x.wide.T
    turned = Numbers(np.zeros((8, 8)), "float32")
    turned.held[:] = x.held
    call("aclnnAdd", Tensor(turned.held), Tensor(turned.held.T), scalar(1), Tensor(turned.held))
    close(turned, expected)


@pytest.mark.parametrize("a,b,common", [
    ("float16", BF16, "float32"), ("float16", "int64", "float16"), ("int8", "uint8", "int32"),
    ("int32", "int64", "int64"), ("bool", "int8", "int8"), ("float32", "float16", "float32"), ("bool", "bool", "bool"),
])  # fmt: skip
def test_common_dtypes(a, b, common):
    x, y = Numbers([0, 1, 1], a), Numbers([1, 1, 0], b)
    out = room((3,), common)
    call("aclnnAdd", x.tensor, y.tensor, scalar(1, "int64"), out.tensor)
    np.testing.assert_array_equal(out.wide, [1, 1, 1] if common == "bool" else [1, 2, 1])


def test_what_does_not_convert():
    with pytest.raises(Refused, match="out is bool; CANN converts no float32 to it"):
        call("aclnnMul", Numbers([1], "float32").tensor, Numbers([1], "float32").tensor, room((1,), "bool").tensor)
    with pytest.raises(Refused, match="do not broadcast"):
        call(
            "aclnnMul",
            Numbers([1, 2], "float32").tensor,
            Numbers([1, 2, 3], "float32").tensor,
            room((3,), "float32").tensor,
        )
    with pytest.raises(Refused, match="alpha is float32, the tensors are int32"):
        call(
            "aclnnAdd",
            Numbers([1], "int32").tensor,
            Numbers([1], "int32").tensor,
            scalar(0.5),
            room((1,), "int32").tensor,
        )
    with pytest.raises(Refused, match="instead of"):
        call("aclnnMul", Numbers([1], "float32").tensor, Numbers([1], "float32").tensor, room((2,), "float32").tensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scalars(dtype, rng):
    x, out = drawn(rng, (3, 4), dtype), room((3, 4), dtype)
    call("aclnnMuls", x.tensor, scalar(0.3), out.tensor)
    close(out, x.wide * float(np.float16(0.3) if dtype == "float16" else np.float32(0.3)))
    call("aclnnDivs", x.tensor, scalar(0.5), out.tensor)
    close(out, x.wide / 0.5)
    call("aclnnPowTensorScalar", x.tensor, scalar(2.0), out.tensor)
    close(out, x.wide**2)
    call("aclnnPowScalarTensor", scalar(2.0), x.tensor, out.tensor)
    close(out, 2.0**x.wide)


def test_whole_numbers(rng):
    x, y = Numbers([7, -7, 7, -7], "int32"), Numbers([2, 2, -2, -2], "int32")
    out = room((4,), "int32")
    call("aclnnFloorDivide", x.tensor, y.tensor, out.tensor)
    np.testing.assert_array_equal(out.seen, [3, -4, -4, 3])
    call("aclnnRemainderTensorTensor", x.tensor, y.tensor, out.tensor)
    np.testing.assert_array_equal(out.seen, [1, 1, -1, -1])
    quotient = room((4,), "float32")
    call("aclnnDiv", x.tensor, y.tensor, quotient.tensor)
    close(quotient, [3.5, -3.5, -3.5, 3.5])
    large = Numbers([2**60 + 1], "int64")
    total = room((1,), "int64")
    call("aclnnAdd", large.tensor, large.tensor, scalar(1, "int64"), total.tensor)
    assert total.seen[0] == 2**61 + 2


def test_not_a_number_wins():
    x, y, out = Numbers([np.nan, 1, 2], "float32"), Numbers([0, np.nan, 3], "float32"), room((3,), "float32")
    for name, last in (("Maximum", 3), ("Minimum", 2)):
        call(f"aclnn{name}", x.tensor, y.tensor, out.tensor)
        np.testing.assert_array_equal(out.seen, [np.nan, np.nan, last])


@pytest.mark.parametrize("dtype", DTYPES)
def test_three_operands(dtype, rng):
    x, a, b, out = (drawn(rng, (4, 6), dtype) for _ in range(4))
    row = drawn(rng, (6,), dtype)
    call("aclnnAddcmul", x.tensor, a.tensor, row.tensor, scalar(0.5), out.tensor)
    close(out, x.wide + 0.5 * a.wide * row.wide)
    call("aclnnAddcdiv", x.tensor, a.tensor, b.tensor, scalar(2), out.tensor)
    close(out, x.wide + 2 * a.wide / b.wide)
    call("aclnnLerp", x.tensor, a.tensor, b.tensor, out.tensor)
    close(out, x.wide + b.wide * (a.wide - x.wide))
    call("aclnnLerps", x.tensor, a.tensor, scalar(0.25), out.tensor)
    close(out, x.wide + 0.25 * (a.wide - x.wide))
    call("aclnnClamp", x.tensor, scalar(-0.5), scalar(0.25), out.tensor)
    close(out, np.clip(x.wide, -0.5, 0.25))
    call("aclnnClamp", x.tensor, None, scalar(0.25), out.tensor)
    close(out, np.minimum(x.wide, 0.25))
    call("aclnnClampTensor", x.tensor, row.tensor, None, out.tensor)
    close(out, np.maximum(x.wide, row.wide))
    with pytest.raises(Refused, match="both limits are missing"):
        call("aclnnClamp", x.tensor, None, None, out.tensor)


COMPARISONS = {
    "Eq": np.equal,
    "Ne": np.not_equal,
    "Lt": np.less,
    "Le": np.less_equal,
    "Gt": np.greater,
    "Ge": np.greater_equal,
}


@pytest.mark.parametrize("dtype", [*DTYPES, "int64"])
@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons(name, dtype):
    x, y, out = Numbers([[-1], [0], [1]], dtype), Numbers([-1, 0, 1], dtype), room((3, 3), "bool")
    call(f"aclnn{name}Tensor", x.tensor, y.tensor, out.tensor)
    np.testing.assert_array_equal(out.seen, COMPARISONS[name](x.wide, y.wide))
    if name in ("Eq", "Ne", "Ge"):
        out = room((3,), "bool")
        call(f"aclnn{name}Scalar", y.tensor, scalar(0.0), out.tensor)
        np.testing.assert_array_equal(out.seen, COMPARISONS[name](y.wide, 0))


def test_logic_and_choice(rng):
    a, b, out = Numbers([0, 0, 2, 3], "float32"), Numbers([0, 1, 0, 1], "int8"), room((4,), "bool")
    for name, expected in (("And", [0, 0, 0, 1]), ("Or", [0, 1, 1, 1]), ("Xor", [0, 1, 1, 0])):
        call(f"aclnnLogical{name}", a.tensor, b.tensor, out.tensor)
        np.testing.assert_array_equal(out.seen, np.array(expected, bool))
    call("aclnnLogicalNot", a.tensor, out.tensor)
    np.testing.assert_array_equal(out.seen, [True, True, False, False])
    call("aclnnIsFinite", Numbers([1, np.inf, -np.inf, np.nan], "float16").tensor, out.tensor)
    np.testing.assert_array_equal(out.seen, [True, False, False, False])
    x, y, chosen = drawn(rng, (3, 4), BF16), drawn(rng, (4,), BF16), room((3, 4), BF16)
    which = Numbers(rng.integers(0, 2, (3, 1)), "bool")
    call("aclnnSWhere", which.tensor, x.tensor, y.tensor, chosen.tensor)
    np.testing.assert_array_equal(chosen.wide, np.where(which.seen, x.wide, y.wide))
    with pytest.raises(Refused, match="condition is float32; CANN takes bool, uint8"):
        call("aclnnSWhere", a.tensor, a.tensor, a.tensor, room((4,), "float32").tensor)


@pytest.mark.parametrize("to", [*DTYPES, "int8", "int32", "int64", "bool", "float64"])
@pytest.mark.parametrize("dtype", [*DTYPES, "int32", "bool"])
def test_casts(dtype, to):
    x, out = Numbers([[0, 1, 3.7], [-2.5, 100.25, -0.4]], dtype, turn), room((2, 3), to, turn)
    call("aclnnCast", x.tensor, ctypes.c_int(CODES[to]), out.tensor)
    np.testing.assert_array_equal(out.wide, Numbers(x.wide, to).wide)


def test_rounding_is_to_nearest_even():
    halves = np.array([1 + 2.0**-11, 1 + 3 * 2.0**-11, 65519.9, 65520, 2.0**-25, 2.0**-24 * 1.5])
    out = room((6,), "float16")
    call("aclnnCast", Numbers(halves, "float32").tensor, ctypes.c_int(1), out.tensor)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(out.seen, halves.astype(np.float16))
    with pytest.raises(Refused, match="out is float16, and dtype says float32"):
        call("aclnnCast", Numbers(halves, "float32").tensor, ctypes.c_int(0), out.tensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_flag_for_what_is_not_finite(dtype):
    flag = Numbers([0], "bool")
    for values, expected in (([1, 2], False), ([1, np.nan], True), ([3, 4], True)):  # nothing lowers it again
        call("aclnnAllFinite", Numbers(values, dtype).tensor, flag.tensor)
        assert flag.seen[0] == expected
