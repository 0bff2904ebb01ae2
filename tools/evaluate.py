"""Evaluate pictures: text that can be read on them, FID, KID, CMMD, precision and recall, CLIP score; other benchmarks.

python tools/evaluate.py textatlas --config configs/evaluate/textatlas.yaml --data TextAtlasEval --output runs/textatlas
"""

from mindsigma.commands.evaluate import run

if __name__ == "__main__":
    run()
