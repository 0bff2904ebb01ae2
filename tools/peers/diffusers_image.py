"""Draws one image with diffusers and sigma-mini's weights, from process start to a PNG file.

python tools/peers/diffusers_image.py FOLDER FILE.png
"""

import os
import sys

import torch
from diffusers_cases import draw, pipeline_of, problems


def main(folder, out):
    """FOLDER as in diffusers_cases.py."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    draw(pipeline_of(folder), folder, 1, problems.start_noise(1))[0].save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
