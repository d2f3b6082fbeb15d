"""[5] A changed byte of a closed ledger is detected, or changes no answer.

``TASKSTORE_BYTE_FLIPS`` sets the number of flips per backend (default 50); ``make soak`` sets more.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from taskstore import (
    CompactionPolicy,
    CorruptStoreError,
    TaskQuery,
    TaskRegistry,
    TaskStoreError,
    compact,
    open_store,
)
from taskstore.testing.contract.base import state_of

FLIPS = int(os.environ.get("TASKSTORE_BYTE_FLIPS", "50"))
SEED = 12
TASKS = 300
RETAIN_SOME = CompactionPolicy(force=True, history_s=0, history_entries=200, keep_snapshots=2)
FILTERS: dict[str, tuple[Any, ...]] = {
    "owner_key": ("owner-0", "owner-3", None),
    "status": ("queued", "running", "succeeded", "failed"),
    "runtime": ("cli", "cron"),
    "child_session_key": ("child-7",),
    "requester_session_key": ("requester-2",),
    "session_key": ("child-7", "requester-2"),
    "parent_flow_id": ("flow-1",),
    "label": ("label-4",),
}


class Original(NamedTuple):
    """A closed ledger: its URL without the path, its files and its answers."""

    scheme: str
    path: Path
    answers: dict[str, Any]

    def files(self) -> list[Path]:
        """The files that hold the ledger, without locks, in a fixed order."""
        if self.path.is_file():
            return [self.path]
        return [path for path in sorted(self.path.iterdir()) if path.suffix in (".json", ".jsonl")]


def fill(registry: TaskRegistry) -> None:
    """Record 300 tasks, some of which end or are deleted, with compactions in between."""
    ids: list[str] = []

    def create(number: int) -> None:
        parent = {"parent_task_id": ids[number // 2]} if number % 3 == 1 else {}
        run = {"run_id": f"run-{number}"} if number % 2 else {}
        record = registry.create(
            runtime="cron" if number % 4 else "cli",
            task=f"Task {number}: " + "x" * (number % 50),
            owner_key=f"owner-{number % 5}" if number % 6 else None,
            scope_kind="session" if number % 6 else "system",
            child_session_key=f"child-{number % 30}" if number % 3 else None,
            requester_session_key=f"requester-{number % 12}",
            parent_flow_id=f"flow-{number % 9}",
            label=f"label-{number % 40}",
            metadata={"number": number},
            **parent,
            **run,
        )
        ids.append(record.task_id)

    for number in range(0, TASKS, 5):
        create(number)
        with registry.batch():
            for later in range(number + 1, number + 5):
                create(later)
        registry.mark_running(ids[number + 1])
        registry.finish(ids[number + 2], "succeeded", summary="done")
        registry.finish(ids[number + 3], "failed", error="no disk")
        if number % 20 == 0:
            registry.delete(ids[number + 4])
        if number in (100, 180, 240):
            compact(registry.store, RETAIN_SOME)


def answers_of(url: str) -> dict[str, Any]:
    """Return what every lookup, query, history and read of the journal of a ledger returns."""
    found: dict[str, Any] = {}
    with TaskRegistry.open(url) as registry:
        store: Any = registry.store
        found["state"] = state_of(store)
        entries = list(registry.changes(store.floor() - 1))
        found["changes"] = entries
        ids = sorted({entry.task_id for entry in entries} | found["state"].records.keys())
        for task_id in ids:
            found[f"find {task_id}"] = registry.find(task_id)
            found[f"children {task_id}"] = list(registry.children(task_id))
            found[f"history {task_id}"] = list(registry.history(task_id))
        for number in range(TASKS):
            found[f"run {number}"] = registry.find_by_run(f"run-{number}")
        for name, values in FILTERS.items():
            for value in values:
                found |= pages_of(store, f"{name} {value}", **{name: value})
        found |= pages_of(store, "all") | pages_of(store, "active", status={"queued", "running"})
        for task_id in ids[::20]:
            found |= pages_of(store, f"children of {task_id}", parent_task_id=task_id)
            found |= pages_of(store, f"row of {task_id}", task_id=task_id)
            record = found[f"find {task_id}"]
            if record is not None and record.run_id is not None:
                found |= pages_of(store, f"run of {task_id}", run_id=record.run_id)
        for seq in range(store.floor() - 1, store.head() + 1, 40):
            found[f"as of {seq}"] = dict(registry.as_of(seq).records)
        for entry in entries[::80]:
            found[f"as of time {entry.at}"] = dict(registry.as_of(entry.at).records)
        snapshot = store.read_snapshot(store.head())
        while snapshot is not None:
            found[f"snapshot {snapshot.seq}"] = (snapshot.at, dict(snapshot.records))
            snapshot = store.read_snapshot(snapshot.seq - 1)
    return found


def pages_of(store: Any, name: str, **filters: Any) -> dict[str, Any]:
    """Return all records that match the filters, read at once and in pages."""
    found: dict[str, Any] = {f"{name} at once": store.query(TaskQuery(**filters))}
    after, pages = None, []
    while not pages or after is not None:
        page = store.query(TaskQuery(**filters, limit=40, after=after))
        pages.append(page)
        after = page.next_cursor
        assert len(pages) < TASKS, "the pages do not end"
    found[f"{name} in pages"] = pages
    return found


@pytest.fixture(scope="module", params=["sqlite", "json"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Original:
    path = tmp_path_factory.mktemp(request.param) / "ledger"
    url = f"{request.param}:///{path}"
    seconds = count(1_700_000_000)
    with TaskRegistry.open(url, clock=lambda: next(seconds) * 1000) as registry:
        fill(registry)
    return Original(request.param, path, answers_of(url))


@contextlib.contextmanager
def flipped(original: Original, rng: random.Random, copy: Path) -> Iterator[str]:
    """Copy the ledger and change one byte of the copy; yield the description of the change."""
    if original.path.is_file():
        shutil.copyfile(original.path, copy)
    else:
        shutil.copytree(original.path, copy)
    files = original.files()
    file = rng.choices(files, [path.stat().st_size for path in files])[0]
    offset, mask = rng.randrange(file.stat().st_size), rng.randrange(1, 256)
    target = copy if copy.is_file() else copy / file.name
    with target.open("r+b") as stream:
        stream.seek(offset)
        [byte] = stream.read(1)
        stream.seek(offset)
        stream.write(bytes([byte ^ mask]))
    yield f"{file.name}, offset {offset}: {byte:#x} -> {byte ^ mask:#x}"
    if copy.is_file():
        for path in copy.parent.glob(f"{copy.name}*"):
            path.unlink()
    else:
        shutil.rmtree(copy)


def detected(url: str) -> str | None:
    """Return how the damage of a ledger is detected, or ``None``."""
    try:
        store: Any = open_store(url)
    except CorruptStoreError:
        return "opening raises CorruptStoreError"
    except TaskStoreError as error:
        return f"opening raises {type(error).__name__}"
    with store:
        try:
            report = store.verify()
        except CorruptStoreError:
            return "verify raises CorruptStoreError"
        if not report.ok:
            return "verify reports a problem"
        if any("the last line" in notice for notice in store.report().notices):
            return "the last line counts as torn"
    return None


def judged(url: str, original: Original) -> str:
    """Return what the flip of a byte does to a ledger."""
    how = detected(url)
    if how is not None:
        return how
    answers = answers_of(url)
    if answers == original.answers:
        return "every answer is the same"
    names = [name for name in original.answers if answers.get(name) != original.answers[name]]
    return f"NOT DETECTED: other answers for {names[:3]}"


@pytest.mark.usefixtures("quiet")
def test_a_changed_byte_is_detected_or_changes_no_answer(original, tmp_path, report):
    rng = random.Random(SEED)
    outcomes: Counter[str] = Counter()
    bad: list[str] = []
    for number in range(FLIPS):
        copy = tmp_path / f"copy-{number}"
        with flipped(original, rng, copy) as change:
            try:
                outcome = judged(f"{original.scheme}:///{copy}", original)
            except Exception as error:  # noqa: BLE001 - any error is a finding
                outcome = f"NOT DETECTED: {type(error).__name__}: {error}"
            if outcome.startswith("NOT DETECTED"):
                bad.append(f"{change}: {outcome}")
                outcome = "not detected"
            outcomes[outcome] += 1
    report(f"{FLIPS} single-byte flips, {original.scheme}", dict(outcomes))
    assert not bad, "\n".join(bad)
