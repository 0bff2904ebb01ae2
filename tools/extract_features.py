"""Store the VAE's moments and T5's states of a data set, so that training runs neither network.

python tools/extract_features.py scenes/ scenes-features/ --model sigma-mini --resolution 256
"""

from mindsigma.commands.extract_features import run

if __name__ == "__main__":
    run()
