"""``python -m taskstore.testing.faults URL``: print the matrix; exit status 1 on a problem."""

from __future__ import annotations

import argparse
import logging
import sys

from taskstore.testing.faults import problems, render, run_matrix
from taskstore.testing.faults.scenarios import SCENARIOS


def main() -> int:
    """Inject the faults, print the table of results, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m taskstore.testing.faults", description=__doc__)
    parser.add_argument("url", metavar="URL", help="a URL of the backend; its data is not changed")
    parser.add_argument("--steps", type=int, help="steps per scenario and fault (default: all)")
    names = [scenario.name for scenario in SCENARIOS]
    parser.add_argument("--scenario", action="append", choices=names, help="can be repeated")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)  # the store logs the injected errors
    cells = run_matrix(options.url, steps=options.steps, scenarios=options.scenario or ())
    print(render(cells))  # noqa: T201 - this is a command
    return 1 if problems(cells) else 0


if __name__ == "__main__":
    sys.exit(main())
