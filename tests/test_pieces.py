"""Rows in pieces: their lengths. Networks with them are in test_ascend_graph.py and test_ascend_backend.py."""

import pytest

from mindsigma.ops.pieces import MOST_NUMBERS, piece_lengths


@pytest.mark.parametrize(
    "shape, width, most, lengths",
    [
        ((2, 8, 3), 10, 160, (16,)),
        ((2, 8, 3), 10, 159, (8, 8)),
        ((17, 3), 10, 100, (9, 8)),
        ((17, 3), 10, 60, (6, 6, 5)),
        ((3, 1), 10, 1, (1, 1, 1)),
    ],
)
def test_lengths(shape, width, most, lengths):
    assert piece_lengths(shape, width, most) == lengths
    assert max(lengths) * width <= max(most, width)


def test_4096_px_take_two_and_a_step_of_1024_px_one():
    """Two captions an image, the hidden tokens of XL/2."""
    assert piece_lengths((2, 256 * 256, 1152), 4608, MOST_NUMBERS) == (65536, 65536)
    assert piece_lengths((2, 64 * 64, 1152), 4608, MOST_NUMBERS) == (8192,)
