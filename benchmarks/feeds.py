"""How soon does a commit of another process wake who waits for it, and what does waiting cost?

A process commits at random moments; this one waits for each commit.  Prints,
for each backend, the time from the end of ``apply`` there to the return of
``wait_for`` here (median and 99th percentile), beside that of asking for the
head every 100 ms, in the same run, and the processor time of a second of idle
waiting.  For PostgreSQL it also compares what a commit costs the writer while
nobody listens, while somebody does, and without any notification; with
several ledgers, whose writers share the lock that a notifying commit takes.
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


def write(url: str, commits: int, longest_pause_s: float, told: Any) -> None:
    """Commit at random moments, telling when each was done."""
    rng = random.Random(commits)  # noqa: S311 - not a secret
    with open_store(url) as store:
        told.put(None)
        for _ in range(commits):
            time.sleep(rng.uniform(0, longest_pause_s))
            store.apply([make_put()])
            told.put(time.monotonic())


def latencies(url: str, wait: Callable[[Any, int], object], commits: int) -> list[float]:
    """Seconds from each commit of a process to its being noticed here."""
    told = _processes.Queue()
    writer = _processes.Process(target=write, args=(url, commits, 0.2, told))
    noticed: dict[int, float] = {}
    with open_store(url, read_only=True) as store:
        first = seen = store.head()
        writer.start()
        told.get()
        while seen < first + commits:
            wait(store, seen)
            now, head = time.monotonic(), store.head()
            noticed.update(dict.fromkeys(range(seen + 1, head + 1), now))
            seen = head
    done = [told.get() for _ in range(commits)]
    writer.join()
    return sorted(max(0.0, noticed[first + 1 + n] - at) for n, at in enumerate(done))


def waiting(store: Any, after: int) -> None:
    while not store.wait_for(after, 60):
        pass


def asking(store: Any, after: int) -> None:
    while store.head() <= after:
        time.sleep(POLL_S)


def idle_share(url: str, seconds: float) -> float:
    """Which share of a second of waiting is computed."""
    with open_store(url, read_only=True) as store:
        head = store.head()
        store.wait_for(head, 0.5)
        started = time.process_time()
        store.wait_for(head, seconds)
        return (time.process_time() - started) / seconds


def compare_latency(name: str, url: str, commits: int) -> None:
    open_store(url).close()
    ours, theirs = latencies(url, waiting, commits), latencies(url, asking, commits)
    median, worst = statistics.median(ours), ours[int(len(ours) * 0.99)]
    print(
        f"{name:11} wait_for: median {1000 * median:6.2f} ms, p99 {1000 * worst:6.2f} ms;"
        f" asking every {1000 * POLL_S:.0f} ms: median {1000 * statistics.median(theirs):6.2f} ms"
        f" ({statistics.median(theirs) / median:.1f} times);"
        f" idle: {100 * idle_share(url, 3):.2f} % of a processor",
        flush=True,
    )


@contextmanager
def claiming(claim: Any) -> Iterator[None]:
    """Let writers claim seqs in another way, with or without a notification."""
    right, PostgreSQLDatabase.claim = PostgreSQLDatabase.claim, claim  # type: ignore[method-assign]
    try:
        yield
    finally:
        PostgreSQLDatabase.claim = right  # type: ignore[method-assign]


def commit_for(url: str, quiet: bool, seconds: float, told: Any) -> None:  # noqa: FBT001 - for a process
    claim = Database.claim if quiet else PostgreSQLDatabase.claim
    with claiming(claim), open_store(url) as store:
        told.put(None)
        count, until = 0, time.monotonic() + seconds
        while time.monotonic() < until:
            store.apply([make_put()])
            count += 1
        told.put(count / seconds)


def rate(urls: list[str], *, quiet: bool, heard: bool, seconds: float) -> float:
    """Commits per second of a writer for each ledger, together."""
    told = _processes.Queue()
    with ExitStack() as open_stores:
        if heard:
            for url in urls:
                store = open_stores.enter_context(open_store(url))
                listener = _processes.Process(target=listen, args=(url, seconds + 3), daemon=True)
                listener.start()
                open_stores.callback(listener.terminate)
                while not listened_to(store):
                    time.sleep(0.02)
        writers = [
            _processes.Process(target=commit_for, args=(url, quiet, seconds, told)) for url in urls
        ]
        for writer in writers:
            writer.start()
        total = sum(told.get() or 0 for _ in range(2 * len(writers)))
        for writer in writers:
            writer.join()
    return total


def listen(url: str, seconds: float) -> None:
    with open_store(url) as store:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            store.wait_for(10**9, 1)  # type: ignore[attr-defined]


def listened_to(store: Any) -> bool:
    locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = "
    here = "(SELECT oid FROM pg_database WHERE datname = current_database())"
    read = store._transactions.read  # noqa: SLF001 - looked at from outside
    return bool(read(lambda session: session.row(locks + here))[0])


def compare_lone_writer(url: str, commits: int) -> None:
    """Commits with and without notifying, in turn, before anybody listens and then."""
    costs: dict[str, list[float]] = {}
    with ExitStack() as stack, open_store(url) as store:
        for way in ("nobody listens", "somebody listens"):
            if way == "somebody listens":
                listener = _processes.Process(target=listen, args=(url, 600), daemon=True)
                listener.start()
                stack.callback(listener.terminate)
                while not listened_to(store):
                    time.sleep(0.02)
            for turn in range(-20, 2 * commits):
                with claiming(Database.claim if turn % 2 else PostgreSQLDatabase.claim):
                    changes = [make_put()]
                    started = time.perf_counter()
                    store.apply(changes)
                if turn >= 0:
                    key = f"{way}, silent" if turn % 2 else way
                    costs.setdefault(key, []).append(time.perf_counter() - started)
    medians = {way: statistics.median(found) for way, found in costs.items()}
    told = ", ".join(
        f"{way}: {medians[f'{way}, silent'] / medians[way]:.2f}"
        for way in medians
        if "," not in way
    )
    base = 1 / medians["nobody listens, silent"]
    print(
        f"postgresql  one ledger, {base:.0f} commits/s without notification = 1; {told}", flush=True
    )


def compare_writers(urls: list[str], rounds: int, seconds: float) -> None:
    ways = {
        "without notification": {"quiet": True, "heard": False},
        "nobody listens": {"quiet": False, "heard": False},
        "somebody listens": {"quiet": False, "heard": True},
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, options in ways.items():
            rates[way].append(rate(urls, seconds=seconds, **options))
    base, *others = ways
    told = statistics.median(rates[base])
    ratios = ", ".join(
        f"{way}: {statistics.median(map(truediv, rates[way], rates[base])):.2f}" for way in others
    )
    print(f"postgresql  {len(urls)} ledgers, {told:.0f} commits/s {base} = 1; {ratios}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commits", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each round of writing")
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
        compare_lone_writer(urls[0], 10 * options.commits)
        compare_writers(urls, options.rounds, options.seconds)


if __name__ == "__main__":
    main()
