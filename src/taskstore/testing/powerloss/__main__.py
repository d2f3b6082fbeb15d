"""Prove the JSON store and the SQLite store against power loss, and show the figures."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from taskstore.testing.powerloss.jsonfile import JSON_LIVES, open_json
from taskstore.testing.powerloss.sqlite import survey_sqlite
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
    found = survey(open_json, lives=JSON_LIVES, most=options.states, seed=options.seed)
    print(f"power loss, the JSON store\n{found}\n")  # noqa: T201 - a command
    with tempfile.TemporaryDirectory(prefix="taskstore-power-") as scratch:
        rounds = max(options.states // 12, 1)
        sqlite = survey_sqlite(Path(scratch), rounds=rounds, seed=options.seed)
    print(f"power loss, the SQLite store\n{sqlite}")  # noqa: T201 - as above
    return 1 if found.problems or sqlite.problems else 0


if __name__ == "__main__":
    sys.exit(main())
