"""Make pairs of noise and the latents that a teacher draws of it, for tools/distill.py --method dmd.

python tools/make_pairs.py FEATURES pairs/ --model sigma-mini
"""

from mindsigma.commands.make_pairs import run

if __name__ == "__main__":
    run()
