"""The cost of contention: four processes that change the same five tasks.

On each ledger one process changes five tasks alone, then four processes change
them concurrently, in interleaved rounds; see ``taskstore.testing.crash.hammer``.
For each backend it prints the single writer's median; the concurrent writers'
median and 99th percentile as multiples of it, their longest change and their
rate; and whether revisions and journal are consistent.  The numbers are medians
of the runs; brackets show the worst run.
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
    def summary(values: list[float], form: str) -> str:
        return f"{statistics.median(values):{form}} ({max(values):{form}})"

    single = [result.single_median for result in results]
    medians = [statistics.median(result.concurrent) for result in results]
    cells = [
        f"{scheme:<11}",
        f"{statistics.median(single) * 1000:8.2f} ms",
        f"{statistics.median(m / base for m, base in zip(medians, single, strict=True)):7.1f}",
        f"{summary([result.ratio for result in results], '7.1f'):>18}",
        f"{summary([result.longest * 1000 for result in results], '8.0f'):>20} ms",
        f"{statistics.median(len(r.concurrent) / r.elapsed_s for r in results):8.0f}/s",
        "  consistent" if not any(result.problems for result in results) else "  INCONSISTENT",
    ]
    return " ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scheme", nargs="*", default=["json", "sqlite", "postgresql", "mariadb"])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--tasks", type=int, default=5)
    parser.add_argument("--changes", type=int, default=500, help="changes of each process")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dir", default=None)
    options = parser.parse_args()
    print(f"{'':<11} {'single':>11} {'median':>7} {'p99':>18} {'longest':>20}    {'rate':>10}")
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
