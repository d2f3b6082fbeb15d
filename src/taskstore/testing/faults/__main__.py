"""``python -m taskstore.testing.faults URL``: print the matrix; exit status 1 if it is wrong."""

from __future__ import annotations

import argparse
import logging
import sys

from taskstore.testing.faults import problems, render, run_matrix
from taskstore.testing.faults.scenarios import SCENARIOS


def main() -> int:
    """Read the arguments, run the matrix and print it."""
    parser = argparse.ArgumentParser(prog="python -m taskstore.testing.faults", description=__doc__)
    parser.add_argument("url", metavar="URL", help="a URL of the backend; what is there stays")
    parser.add_argument(
        "--steps", type=int, help="at how many steps of a scenario each fault strikes"
    )
    names = [scenario.name for scenario in SCENARIOS]
    parser.add_argument("--scenario", action="append", choices=names, help="may be repeated")
    wanted = parser.parse_args()
    logging.disable(logging.CRITICAL)  # what goes wrong here does so on purpose
    cells = run_matrix(wanted.url, steps=wanted.steps, scenarios=wanted.scenario or ())
    print(render(cells))  # noqa: T201 - this is a command
    return 1 if problems(cells) else 0


if __name__ == "__main__":
    sys.exit(main())
