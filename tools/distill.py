"""Distil PixArt-Sigma into a network that draws in a few steps (LCM) or in one (DMD), from images or features.

python tools/distill.py --config configs/train/distill-lcm-sigma-mini.yaml --data FEATURES --output runs/lcm
"""

from mindsigma.commands.distill import run

if __name__ == "__main__":
    run()
