"""Test the JSON and SQLite stores with simulated power losses; print the results."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from taskstore.testing.powerloss.jsonfile import JSON_SCENARIOS, open_json
from taskstore.testing.powerloss.sqlite import survey_sqlite
from taskstore.testing.powerloss.survey import MAX_STATES, survey


def main() -> int:
    """Check both stores, print the results, and return 1 if there is a problem, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m taskstore.testing.powerloss", description=__doc__
    )
    parser.add_argument(
        "--states",
        type=int,
        default=MAX_STATES,
        help="states per crash point (default %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=20261122, help="seed of the sampled states")
    options = parser.parse_args()
    limits = {"max_states": options.states, "seed": options.seed}
    result = survey(open_json, scenarios=JSON_SCENARIOS, **limits)
    print(f"power loss, the JSON store\n{result}\n")  # noqa: T201 - a command
    with tempfile.TemporaryDirectory(prefix="taskstore-power-") as scratch:
        rounds = max(options.states // 12, 1)
        sqlite = survey_sqlite(Path(scratch), rounds=rounds, seed=options.seed)
    print(f"power loss, the SQLite store\n{sqlite}")  # noqa: T201 - as above
    return 1 if result.problems or sqlite.problems else 0


if __name__ == "__main__":
    sys.exit(main())
