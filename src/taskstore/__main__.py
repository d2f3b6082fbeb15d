"""``python -m taskstore``: the command line."""

import sys

from taskstore.cli import main

sys.exit(main())
