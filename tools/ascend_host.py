"""Run a command on MindSpore's Ascend backend without an NPU.

python tools/ascend_host.py -- python tools/generate.py "a penguin on a yellow background" --device Ascend
"""

from mindsigma.commands.ascend_host import run

if __name__ == "__main__":
    run()
