"""`python -m sedd` is the `sedd` command."""

import sys

from sedd.cli import main

sys.exit(main())
