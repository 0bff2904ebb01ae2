"""Draw images from prompts.

python tools/generate.py "a penguin on a yellow background"
"""

from mindsigma.commands.generate import run

if __name__ == "__main__":
    run()
