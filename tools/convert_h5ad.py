"""`python tools/convert_h5ad.py INPUT.h5ad [INPUT2.h5ad ...] OUTPUT.zarr` is `sedd convert`."""

import sys

from sedd.__main__ import run

if __name__ == "__main__":
    sys.argv.insert(1, "convert")
    run()
