"""Train a model: `python train.py --data_path cells.h5ad` or `accelerate launch train.py ...`; the same as `sedd train`."""

import sys

from sedd.__main__ import run

if __name__ == "__main__":
    run(["train", *sys.argv[1:]])
