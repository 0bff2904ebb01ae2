"""Train PixArt-Sigma from captioned images or stored features, on one process or, under msrun, on many.

python tools/train.py --config configs/train/sigma-mini.yaml --data DATA --output runs/first
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mindsigma import command_line  # noqa: E402
from mindsigma.errors import say  # noqa: E402


def main():
    """Parse, train; returns the exit code."""
    asked = command_line.asked_to_end()
    from mindsigma.config_file import parse_with_config
    from mindsigma.training.arguments import build_parser
    from mindsigma.training.trainer import Trainer

    trainer = Trainer(parse_with_config(build_parser()), asked.is_set)
    path = trainer.run()
    if trainer.ranks.first:
        say(path)
    return 0


if __name__ == "__main__":
    command_line.run(main)
