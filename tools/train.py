"""Train PixArt-Sigma from captioned images or stored features, on one process or, under msrun, on many.

python tools/train.py --config configs/train/sigma-mini.yaml --data DATA --output runs/first
"""

from mindsigma.commands.train import run

if __name__ == "__main__":
    run()
