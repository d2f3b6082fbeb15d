"""What does it cost to share five tasks with three other processes?

On each ledger one process changes five tasks alone, then four at once, in
interleaved rounds; see ``taskstore.testing.crash.hammer``.  Prints, for each
backend, the lone writer's median, and of all at once the median, the slowest
hundredth, both as medians of the lone writer, and the longest wait; and
whether revisions and journal add up.  Runs are repeated; medians of runs, and
the worst of them in brackets.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from taskstore.testing.crash.hammer import Result, run_stress_test
from taskstore.testing.servers import MariaDBServer, PostgresServer


@contextmanager
def ledger(scheme: str, folder: str | None) -> Iterator[str]:
    with ExitStack() as stack:
        if scheme == "postgresql":
            yield stack.enter_context(stack.enter_context(PostgresServer(safe=True)).ledger())
        elif scheme == "mariadb":
            yield stack.enter_context(stack.enter_context(MariaDBServer()).ledger())
        else:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder))).resolve()
            yield f"{scheme}:///{path}/ledger"


def row(scheme: str, results: list[Result]) -> str:
    def over(values: list[float], form: str) -> str:
        return f"{statistics.median(values):{form}} ({max(values):{form}})"

    lone = [result.single_median for result in results]
    medians = [statistics.median(result.concurrent) for result in results]
    cells = [
        f"{scheme:<11}",
        f"{statistics.median(lone) * 1000:8.2f} ms",
        f"{statistics.median(m / one for m, one in zip(medians, lone, strict=True)):7.1f}",
        f"{over([result.ratio for result in results], '7.1f'):>18}",
        f"{over([result.longest * 1000 for result in results], '8.0f'):>20} ms",
        f"{statistics.median(len(r.concurrent) / r.elapsed_s for r in results):8.0f}/s",
        "  adds up" if not any(result.problems for result in results) else "  DOES NOT ADD UP",
    ]
    return " ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scheme", nargs="*", default=["json", "sqlite", "postgresql", "mariadb"])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--tasks", type=int, default=5)
    parser.add_argument("--changes", type=int, default=500, help="of each process")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dir", default=None)
    options = parser.parse_args()
    print(
        f"{'':<11} {'lone median':>11} {'median':>7} {'p99':>18} {'longest':>20}    "
        f"{'together':>10}"
    )
    for scheme in options.scheme:
        with ledger(scheme, options.dir) as url:
            results = [
                run_stress_test(
                    url,
                    processes=options.processes,
                    tasks=options.tasks,
                    changes=options.changes,
                )
                for _ in range(options.runs)
            ]
        print(row(scheme, results), flush=True)
        for result in results:
            for problem in result.problems:
                print(f"    {problem}")


if __name__ == "__main__":
    main()
