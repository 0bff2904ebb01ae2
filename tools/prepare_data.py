"""Check a data set of captioned images and, if a target is given, write it in another layout.

python tools/prepare_data.py photos/ photos-official/ --to official --check
"""

from mindsigma.commands.prepare_data import run

if __name__ == "__main__":
    run()
