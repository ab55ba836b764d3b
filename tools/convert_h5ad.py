"""`python tools/convert_h5ad.py INPUT.h5ad [INPUT2.h5ad ...] OUTPUT.zarr` is `sedd convert`."""

import sys

from sedd.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
