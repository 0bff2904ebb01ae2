"""Train PixArt-Sigma from captioned images or stored features, on one process or, under msrun, on many.

python tools/train.py --config configs/train/sigma-mini.yaml --data DATA --output runs/first
"""

from mindsigma import command_line
from mindsigma.errors import say


def main():
    """Parse, train; returns the exit code."""
    asked = command_line.asked_to_end()
    from mindsigma.config_file import parse_with_config, require_model
    from mindsigma.training.run_options import build_parser, check

    args = parse_with_config(build_parser())
    require_model(args)
    check(args)
    from mindsigma.training.trainer import Trainer  # which imports MindSpore: not before the arguments are judged

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
