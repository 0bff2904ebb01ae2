"""Translate checkpoints and adapters between this project, diffusers and the official PyTorch code, without PyTorch.

python tools/convert.py PixArt-Sigma-XL-2-1024-MS.pth models/1024-MS/dit --to mindspore --dtype fp16 --verify
python tools/convert.py style.safetensors style-peft --to peft
"""

from mindsigma.commands.convert import run

if __name__ == "__main__":
    run()
