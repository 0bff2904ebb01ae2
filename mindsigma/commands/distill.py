"""Distil PixArt-Sigma into a network that draws in a few steps (LCM) or in one (DMD), from images or features.

python tools/distill.py --config configs/train/distill-lcm-sigma-mini.yaml --data FEATURES --output runs/lcm
"""

from mindsigma import command_line
from mindsigma.errors import say


def main():
    """Parse, train; returns the exit code."""
    asked = command_line.asked_to_end()
    from mindsigma.config_file import parse_with_config
    from mindsigma.training.distill_options import build_parser, complete

    args = complete(parse_with_config(build_parser()))
    from mindsigma.training.trainer import Trainer

    trainer = Trainer(args, asked)
    asked.saves = True
    path = trainer.run()
    asked.saves = False
    if trainer.ranks.first:
        say(path)
    return 130 if asked.interrupted else 0


def run():
    """`main` as a command: one line and exit code 2 for what the user can mend."""
    command_line.run(main)
