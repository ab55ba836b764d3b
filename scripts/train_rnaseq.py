"""The same as `train.py` and `sedd train`, under the name that scripts of the project use."""

import sys

from sedd.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
