"""The change feed: its latency between processes, and its cost.

One process commits at random times; this process waits for each commit.  For
each backend the benchmark prints the time from the end of ``apply`` to the
return of ``wait_for`` (median and 99th percentile), the same for a poll of the
head every 100 ms, and the CPU share of an idle wait.  For PostgreSQL it also
compares the writer's commit rate without notifications, with notifications,
and with notifications and a listener; also with several ledgers, whose writers
share the lock that a notifying commit takes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from operator import truediv
from pathlib import Path
from typing import Any

from taskstore import open_store
from taskstore.stores.sql.dialects.base import Database
from taskstore.stores.sql.dialects.postgresql import PostgreSQLDatabase
from taskstore.testing import make_put
from taskstore.testing.servers import MariaDBServer, PostgresServer

POLL_S = 0.1
_processes = multiprocessing.get_context("spawn")


def write(url: str, commits: int, longest_pause_s: float, reports: Any) -> None:
    """Commit at random times, and report the time after each commit."""
    rng = random.Random(commits)  # noqa: S311 - not a secret
    with open_store(url) as store:
        reports.put(None)
        for _ in range(commits):
            time.sleep(rng.uniform(0, longest_pause_s))
            store.apply([make_put()])
            reports.put(time.monotonic())


def latencies(url: str, wait: Callable[[Any, int], object], commits: int) -> list[float]:
    """The seconds from each commit of another process until this one reads it, sorted."""
    reports = _processes.Queue()
    writer = _processes.Process(target=write, args=(url, commits, 0.2, reports))
    read_at: dict[int, float] = {}
    with open_store(url, read_only=True) as store:
        first = known_head = store.head()
        writer.start()
        reports.get()
        while known_head < first + commits:
            wait(store, known_head)
            now, head = time.monotonic(), store.head()
            read_at.update(dict.fromkeys(range(known_head + 1, head + 1), now))
            known_head = head
    done = [reports.get() for _ in range(commits)]
    writer.join()
    return sorted(max(0.0, read_at[first + 1 + n] - at) for n, at in enumerate(done))


def wait_for_commit(store: Any, after: int) -> None:
    while not store.wait_for(after, 60):
        pass


def poll_head(store: Any, after: int) -> None:
    while store.head() <= after:
        time.sleep(POLL_S)


def idle_share(url: str, seconds: float) -> float:
    """The CPU share of an idle wait."""
    with open_store(url, read_only=True) as store:
        head = store.head()
        store.wait_for(head, 0.5)
        started = time.process_time()
        store.wait_for(head, seconds)
        return (time.process_time() - started) / seconds


def compare_latency(name: str, url: str, commits: int) -> None:
    open_store(url).close()
    feed, poll = latencies(url, wait_for_commit, commits), latencies(url, poll_head, commits)
    median, p99 = statistics.median(feed), feed[int(len(feed) * 0.99)]
    print(
        f"{name:11} wait_for: median {1000 * median:6.2f} ms, p99 {1000 * p99:6.2f} ms;"
        f" poll every {1000 * POLL_S:.0f} ms: median {1000 * statistics.median(poll):6.2f} ms"
        f" ({statistics.median(poll) / median:.1f} times);"
        f" idle: {100 * idle_share(url, 3):.2f} % of a CPU",
        flush=True,
    )


@contextmanager
def patched_claim(claim: Any) -> Iterator[None]:
    """Replace the method that claims seqs: with or without a notification."""
    original, PostgreSQLDatabase.claim_seqs = PostgreSQLDatabase.claim_seqs, claim  # type: ignore[method-assign]
    try:
        yield
    finally:
        PostgreSQLDatabase.claim_seqs = original  # type: ignore[method-assign]


def commit_for(url: str, silent: bool, seconds: float, reports: Any) -> None:  # noqa: FBT001 - for a process
    claim = Database.claim_seqs if silent else PostgreSQLDatabase.claim_seqs
    with patched_claim(claim), open_store(url) as store:
        reports.put(None)
        count, until = 0, time.monotonic() + seconds
        while time.monotonic() < until:
            store.apply([make_put()])
            count += 1
        reports.put(count / seconds)


def rate(urls: list[str], *, silent: bool, listener_runs: bool, seconds: float) -> float:
    """The total commits per second, with one writer for each ledger."""
    reports = _processes.Queue()
    with ExitStack() as open_stores:
        if listener_runs:
            for url in urls:
                store = open_stores.enter_context(open_store(url))
                listener = _processes.Process(target=listen, args=(url, seconds + 3), daemon=True)
                listener.start()
                open_stores.callback(listener.terminate)
                while not has_listener(store):
                    time.sleep(0.02)
        writers = [
            _processes.Process(target=commit_for, args=(url, silent, seconds, reports))
            for url in urls
        ]
        for writer in writers:
            writer.start()
        total = sum(reports.get() or 0 for _ in range(2 * len(writers)))
        for writer in writers:
            writer.join()
    return total


def listen(url: str, seconds: float) -> None:
    with open_store(url) as store:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            store.wait_for(10**9, 1)  # type: ignore[attr-defined]


def has_listener(store: Any) -> bool:
    locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = "
    here = "(SELECT oid FROM pg_database WHERE datname = current_database())"
    read = store._transactions.read  # noqa: SLF001 - a benchmark may
    return bool(read(lambda session: session.row(locks + here))[0])


def compare_single_writer(url: str, commits: int) -> None:
    """Compare commits with and without notification, first without a listener, then with one."""
    costs: dict[str, list[float]] = {}
    with ExitStack() as stack, open_store(url) as store:
        for way in ("no listener", "a listener"):
            if way == "a listener":
                listener = _processes.Process(target=listen, args=(url, 600), daemon=True)
                listener.start()
                stack.callback(listener.terminate)
                while not has_listener(store):
                    time.sleep(0.02)
            for turn in range(-20, 2 * commits):
                with patched_claim(
                    Database.claim_seqs if turn % 2 else PostgreSQLDatabase.claim_seqs
                ):
                    changes = [make_put()]
                    started = time.perf_counter()
                    store.apply(changes)
                if turn >= 0:
                    key = f"{way}, silent" if turn % 2 else way
                    costs.setdefault(key, []).append(time.perf_counter() - started)
    medians = {way: statistics.median(values) for way, values in costs.items()}
    ratios = ", ".join(
        f"{way}: {medians[f'{way}, silent'] / medians[way]:.2f}"
        for way in medians
        if "," not in way
    )
    base = 1 / medians["no listener, silent"]
    print(
        f"postgresql  one ledger, {base:.0f} commits/s without notification = 1; {ratios}",
        flush=True,
    )


def compare_writers(urls: list[str], rounds: int, seconds: float) -> None:
    ways = {
        "without notification": {"silent": True, "listener_runs": False},
        "no listener": {"silent": False, "listener_runs": False},
        "a listener": {"silent": False, "listener_runs": True},
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, options in ways.items():
            rates[way].append(rate(urls, seconds=seconds, **options))
    base, *others = ways
    base_rate = statistics.median(rates[base])
    ratios = ", ".join(
        f"{way}: {statistics.median(map(truediv, rates[way], rates[base])):.2f}" for way in others
    )
    print(f"postgresql  {len(urls)} ledgers, {base_rate:.0f} commits/s {base} = 1; {ratios}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commits", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="duration of each round of writing"
    )
    parser.add_argument("--ledgers", type=int, default=4)
    parser.add_argument("--dir", default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        here = Path(folder).resolve()
        compare_latency("json", f"json:///{here}/ledger", options.commits)
        compare_latency("sqlite", f"sqlite:///{here}/tasks.db", options.commits)
    with MariaDBServer() as mariadb, mariadb.ledger() as url:
        compare_latency("mariadb", url, options.commits)
    with PostgresServer(safe=True) as server, ExitStack() as ledgers:
        urls = [ledgers.enter_context(server.ledger()) for _ in range(options.ledgers)]
        compare_latency("postgresql", urls[0], options.commits)
        compare_single_writer(urls[0], 10 * options.commits)
        compare_writers(urls, options.rounds, options.seconds)


if __name__ == "__main__":
    main()
