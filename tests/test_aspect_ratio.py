"""Aspect-ratio tables against the published numbers, and the choice of a bin."""

import pytest

from mindsigma.data.aspect_ratio import bin_base, closest_bin, inference_bins, official_test_bins, training_bins
from mindsigma.errors import MindSigmaError

BASES = (256, 512, 1024, 2048, 2880, 4096)
SIDE_MULTIPLES = {256: 16, 512: 32, 1024: 64, 2048: 128, 2880: 64, 4096: 256}

# Tables as published: key:height x width.
TRAINING_1024 = """
0.25:512x2048 0.26:512x1984 0.27:512x1920 0.28:512x1856 0.32:576x1792 0.33:576x1728 0.35:576x1664 0.4:640x1600
0.42:640x1536 0.48:704x1472 0.5:704x1408 0.52:704x1344 0.57:768x1344 0.6:768x1280 0.68:832x1216 0.72:832x1152
0.78:896x1152 0.82:896x1088 0.88:960x1088 0.94:960x1024 1.0:1024x1024 1.07:1024x960 1.13:1088x960 1.21:1088x896
1.29:1152x896 1.38:1152x832 1.46:1216x832 1.67:1280x768 1.75:1344x768 2.0:1408x704 2.09:1472x704 2.4:1536x640
2.5:1600x640 2.89:1664x576 3.0:1728x576 3.11:1792x576 3.62:1856x512 3.75:1920x512 3.88:1984x512 4.0:2048x512
"""

TRAINING_2880 = """
0.25:1408x5760 0.26:1408x5568 0.27:1408x5376 0.28:1408x5184 0.32:1600x4992 0.33:1600x4800 0.34:1600x4672 0.4:1792x4480
0.42:1792x4288 0.47:1920x4096 0.49:1920x3904 0.51:1920x3776 0.55:2112x3840 0.59:2112x3584 0.68:2304x3392 0.72:2304x3200
0.78:2496x3200 0.83:2496x3008 0.89:2688x3008 0.93:2688x2880 1.0:2880x2880 1.07:2880x2688 1.12:3008x2688 1.21:3008x2496
1.28:3200x2496 1.39:3200x2304 1.47:3392x2304 1.7:3584x2112 1.82:3840x2112 2.03:3904x1920 2.13:4096x1920 2.39:4288x1792
2.5:4480x1792 2.92:4672x1600 3.0:4800x1600 3.12:4992x1600 3.68:5184x1408 3.82:5376x1408 3.95:5568x1408 4.0:5760x1408
"""

INFERENCE_256 = """
0.25:128x512 0.28:128x464 0.32:144x448 0.33:144x432 0.35:144x416 0.4:160x400 0.42:160x384 0.48:176x368
0.5:176x352 0.52:176x336 0.57:192x336 0.6:192x320 0.68:208x304 0.72:208x288 0.78:224x288 0.82:224x272
0.88:240x272 0.94:240x256 1.0:256x256 1.07:256x240 1.13:272x240 1.21:272x224 1.29:288x224 1.38:288x208
1.46:304x208 1.67:320x192 1.75:336x192 2.0:352x176 2.09:368x176 2.4:384x160 2.5:400x160 3.0:432x144
4.0:512x128
"""

INFERENCE_512 = """
0.25:256x1024 0.28:256x928 0.32:288x896 0.33:288x864 0.35:288x832 0.4:320x800 0.42:320x768 0.48:352x736
0.5:352x704 0.52:352x672 0.57:384x672 0.6:384x640 0.68:416x608 0.72:416x576 0.78:448x576 0.82:448x544
0.88:480x544 0.94:480x512 1.0:512x512 1.07:512x480 1.13:544x480 1.21:544x448 1.29:576x448 1.38:576x416
1.46:608x416 1.67:640x384 1.75:672x384 2.0:704x352 2.09:736x352 2.4:768x320 2.5:800x320 3.0:864x288
4.0:1024x256
"""

INFERENCE_2048 = """
0.25:1024x4096 0.26:1024x3968 0.27:1024x3840 0.28:1024x3712 0.32:1152x3584 0.33:1152x3456 0.35:1152x3328 0.4:1280x3200
0.42:1280x3072 0.48:1408x2944 0.5:1408x2816 0.52:1408x2688 0.57:1536x2688 0.6:1536x2560 0.68:1664x2432 0.72:1664x2304
0.78:1792x2304 0.82:1792x2176 0.88:1920x2176 0.94:1920x2048 1.0:2048x2048 1.07:2048x1920 1.13:2176x1920 1.21:2176x1792
1.29:2304x1792 1.38:2304x1664 1.46:2432x1664 1.67:2560x1536 1.75:2688x1536 2.0:2816x1408 2.09:2944x1408 2.4:3072x1280
2.5:3200x1280 2.89:3328x1152 3.0:3456x1152 3.11:3584x1152 3.62:3712x1024 3.75:3840x1024 3.88:3968x1024 4.0:4096x1024
"""


def parsed(table):
    rows = [row.replace("x", ":").split(":") for row in table.split()]
    return {key: (int(height), int(width)) for key, height, width in rows}


def test_training_tables_are_the_published_ones():
    assert list(training_bins(1024).items()) == list(parsed(TRAINING_1024).items())
    assert list(training_bins(2880).items()) == list(parsed(TRAINING_2880).items())
    assert list(training_bins(2048).items()) == list(parsed(INFERENCE_2048).items())
    assert training_bins(256)["0.26"] == (128, 496)
    assert training_bins(512)["3.88"] == (992, 256)
    assert training_bins(4096)["0.25"] == (2048, 8192)


def test_inference_tables_are_the_published_ones():
    assert list(inference_bins(256).items()) == list(parsed(INFERENCE_256).items())
    assert list(inference_bins(512).items()) == list(parsed(INFERENCE_512).items())
    assert list(inference_bins(2048).items()) == list(parsed(INFERENCE_2048).items())
    assert list(inference_bins(1024)) == list(inference_bins(256))
    assert inference_bins(1024)["0.28"] == (512, 1856)


def test_inference_table_of_4096():
    bins = inference_bins(4096)
    assert len(bins) == 33
    assert set(training_bins(2048)) - set(bins) == {"0.27", "0.28", "2.89", "3.11", "3.62", "3.75", "3.88"}
    assert official_test_bins(4096) == bins
    assert bins["0.26"] == (2048, 7936) and bins["1.0"] == (4096, 4096) and bins["4.0"] == (8192, 2048)


def test_official_test_tables():
    for base in (256, 512, 1024):
        assert official_test_bins(base) == inference_bins(base)
    bins = official_test_bins(2048)
    assert len(bins) == 33 and bins.items() <= training_bins(2048).items() and set(bins) == set(inference_bins(4096))
    with pytest.raises(MindSigmaError, match="2048"):
        official_test_bins(2880)


@pytest.mark.parametrize("base", BASES)
def test_every_training_size_is_sound(base):
    bins = training_bins(base)
    assert len(bins) == 40 and bins["1.0"] == (base, base)
    # The 2880 table is looser: its 0.28 has 87 % of the pixels and its 4.0 is 4.09.
    least_area, key_error = (0.87, 0.1) if base == 2880 else (0.9, 0.00501)
    for key, (height, width) in bins.items():
        assert height % SIDE_MULTIPLES[base] == 0 and width % SIDE_MULTIPLES[base] == 0
        assert least_area * base**2 <= height * width <= base**2
        assert abs(float(key) - height / width) < key_error


@pytest.mark.parametrize("table, base", [(training_bins, b) for b in BASES] + [(inference_bins, 1024)])
def test_every_key_is_found(table, base):
    bins = table(base)
    for key, size in bins.items():
        assert closest_bin(float(key) * 1000, 1000, bins) == (float(key), size)
    assert closest_bin(9000, 1000, bins) == (4.0, bins["4.0"])
    assert closest_bin(1000, 9000, bins) == (0.25, bins["0.25"])


@pytest.mark.parametrize("base", [256, 512, 1024, 2048, 4096])
def test_sizes_in_the_table_are_their_own_bin(base):
    bins = inference_bins(base)
    for key, (height, width) in bins.items():
        assert closest_bin(height, width, bins) == (float(key), (height, width))


def test_first_of_two_equally_near():
    assert closest_bin(100, 100, {"0.5": (1, 2), "1.5": (3, 2)}) == (0.5, (1, 2))


def test_tables_are_copies():
    training_bins(2880).clear()
    inference_bins(1024).clear()
    assert len(training_bins(2880)) == 40 and len(inference_bins(1024)) == 33


def test_base_of_a_latent_side():
    assert [bin_base(side) for side in (32, 64, 128, 256, 512)] == [256, 512, 1024, 2048, 4096]


def test_what_has_no_table_is_refused():
    with pytest.raises(MindSigmaError, match="32, 64, 128, 256, 512"):
        bin_base(96)
    with pytest.raises(MindSigmaError, match="2880"):
        training_bins(768)
    with pytest.raises(MindSigmaError, match="256, 512, 1024, 2048, 4096"):
        inference_bins(2880)
    with pytest.raises(MindSigmaError):
        closest_bin(0, 512, inference_bins(512))
    with pytest.raises(MindSigmaError):
        closest_bin(512, -1, inference_bins(512))
