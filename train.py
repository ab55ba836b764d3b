"""Train a model: `python train.py --data_path cells.h5ad` or `accelerate launch train.py ...`; the same as `sedd train`."""

import sys

from sedd.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
