"""Prove the JSON store against power loss, and show the figures."""

from __future__ import annotations

import argparse
import sys

from taskstore.testing.powerloss.jsonfile import live_in_json, open_json
from taskstore.testing.powerloss.survey import MOST, survey


def main() -> int:
    """Survey, print, and return 1 when something is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m taskstore.testing.powerloss", description=__doc__
    )
    parser.add_argument(
        "--states", type=int, default=MOST, help="at most of one moment (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=20261122, help="of what is drawn")
    options = parser.parse_args()
    found = survey(open_json, life=live_in_json, most=options.states, seed=options.seed)
    print(f"power loss, the JSON store\n{found}")  # noqa: T201 - a command
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main())
