"""The compactor hook: it counts entries, and compacts when the policy is due."""

from __future__ import annotations

import asyncio
import logging

import pytest
from msgspec.structs import replace

from taskstore import CompactionPolicy, Compactor, ReadOnlyError
from taskstore.aio import AsyncTaskRegistry
from taskstore.testing.factories import EPOCH_MS, make_put
from taskstore.testing.threads import TIMEOUT_S

POLICY = CompactionPolicy(min_entries=10, ratio=0.5, history_entries=5, history_s=0)


def test_it_compacts_after_enough_entries(open_ledger):
    registry = open_ledger()
    with Compactor(registry.store, POLICY) as compactor:
        registry.hooks.add(compactor)
        for n in range(9):
            registry.create(runtime="cli", task=str(n))
        compactor.wait()
        assert compactor.runs == 0
        for n in range(40):
            registry.create(runtime="cli", task=str(n))
            compactor.wait()
    assert compactor.failures == 0
    assert compactor.runs >= 3
    assert compactor.last_report.compacted
    assert registry.store.floor() > 1
    assert registry.store.verify().problems == ()
    assert open_ledger().summary().total == 49


def test_it_finds_the_backlog_when_it_is_attached(open_ledger):
    with open_ledger() as registry:
        for n in range(20):
            registry.create(runtime="cli", task=str(n))
    registry = open_ledger()
    with Compactor(registry.store, POLICY) as compactor:
        registry.hooks.add(compactor)
        assert compactor.wait(TIMEOUT_S)
        assert compactor.runs == 1
        assert registry.store.floor() == 16
        registry.create(runtime="cli", task="x")
    assert (compactor.runs, compactor.failures) == (1, 0)


def test_it_counts_across_restarts(open_ledger):
    compacted = []
    for _ in range(12):
        with open_ledger() as registry, Compactor(registry.store, POLICY) as compactor:
            registry.hooks.add(compactor)
            for _ in range(2):
                task = registry.create(runtime="cli", task="x")
                registry.delete(task.task_id)
                assert compactor.wait(TIMEOUT_S)
        compacted.append(compactor.runs)
    # 48 entries, and the compaction is due after each tenth.
    assert sum(compacted) == 4
    assert max(compacted) == 1


def test_it_does_not_ask_again_until_the_count_says_so(open_ledger, monkeypatch):
    registry = open_ledger()
    for n in range(15):
        registry.create(runtime="cli", task=str(n))
    asked = []
    compact = registry.store.compact
    monkeypatch.setattr(
        registry.store, "compact", lambda policy: asked.append(policy) or compact(policy)
    )
    # Due only at one entry for each of the records, of which this compactor saw none.
    policy = CompactionPolicy(min_entries=10, ratio=2)
    with Compactor(registry.store, policy) as compactor:
        registry.hooks.add(compactor)
        assert compactor.wait(TIMEOUT_S)
        for n in range(10):
            registry.create(runtime="cli", task=str(n))
            assert compactor.wait(TIMEOUT_S)
    assert len(asked) == 1
    assert compactor.runs == 0


def test_it_compacts_when_history_is_too_large(open_ledger):
    registry = open_ledger()
    with Compactor(registry.store, CompactionPolicy(history_bytes=100_000)) as compactor:
        registry.hooks.add(compactor)
        task = registry.create(runtime="cli", task="x" * 20_000, status="running")
        for n in range(12):
            registry.record_progress(task.task_id, str(n))
            assert compactor.wait(TIMEOUT_S)
    assert compactor.runs >= 2
    assert compactor.failures == 0
    head, floor = registry.store.head(), registry.store.floor()
    assert (head - floor + 1) * 20_000 <= 120_000
    assert registry.store.verify().problems == ()


def test_a_full_history_does_not_start_a_compaction_at_every_commit(open_ledger):
    registry, limit = open_ledger(), 20_000
    store = registry.store
    sizes = []
    with Compactor(store, CompactionPolicy(history_bytes=limit)) as compactor:
        registry.hooks.add(compactor)
        task = registry.create(runtime="cli", task="\u65e5" * 100, status="running")
        for n in range(100):
            registry.record_progress(task.task_id, str(n))
            assert compactor.wait(TIMEOUT_S)
            report = store.compact(CompactionPolicy())
            assert not report.compacted
            sizes.append(report.stats.history_bytes)
    assert compactor.failures == 0
    # 100 entries have less than 100,000 bytes, and each run makes room for 5,000 bytes.
    assert 2 <= compactor.runs <= 20
    assert max(sizes) <= 1.1 * limit


@pytest.mark.parametrize("force", [False, True])
def test_only_a_forced_compaction_keeps_all_that_history_bytes_allows(open_ledger, force):
    registry = open_ledger()
    for n in range(10):
        registry.create(runtime="cli", task=str(n) * 20_000)
    policy = CompactionPolicy(history_bytes=85_000, force=force)
    report = registry.store.compact(policy)
    assert report.compacted
    assert report.seq + 1 - report.floor == (4 if force else 3)
    registry.create(runtime="cli", task="x")
    assert registry.store.compact(replace(policy, force=False)).compacted is False


def test_the_report_of_nothing_done_says_how_far_history_reaches(open_ledger):
    store = open_ledger(clock=lambda: EPOCH_MS).store
    for policy in (CompactionPolicy(), POLICY.forced()):
        report = store.compact(policy)
        assert (report.compacted, report.floor, report.floor_at) == (False, 1, None)
        assert report.floor_reason
        assert ("not due" in report.reason) is not policy.force
    for n in range(9):
        store.apply([make_put(task=str(n))])
    at = store.load_snapshot().at
    done = store.compact(POLICY.forced())
    assert (done.floor, done.snapshots) == (5, (4, 9))
    none = replace(POLICY, history_entries=0)
    for policy in (CompactionPolicy(), POLICY.forced(), none, none.forced(), none.forced()):
        report = store.compact(policy)
        if report.compacted:
            done = report
            assert (report.floor, report.snapshots) == (10, (9,))
        assert report.snapshots == done.snapshots
        assert report.floor == done.floor
        assert report.floor_at <= at
        assert report.floor_at == store.read_snapshot(report.floor - 1).at
        assert report.floor_reason


@pytest.mark.parametrize("backend", ["json"], indirect=True)
def test_it_compacts_when_the_new_entries_are_large(open_ledger):
    registry = open_ledger()
    with Compactor(registry.store, CompactionPolicy(max_bytes=50_000)) as compactor:
        registry.hooks.add(compactor)
        for n in range(11):
            registry.create(runtime="cli", task=str(n % 10) * 20_000)
            assert compactor.wait(TIMEOUT_S)
            assert compactor.runs == (n + 1) // 3, "compaction is due at each third entry"
    assert compactor.failures == 0
    assert "bytes since the last snapshot" in compactor.last_report.reason


def test_the_recipe_for_asyncio(ledger_url):
    async def main():
        async with AsyncTaskRegistry.open(ledger_url) as registry:
            for n in range(20):
                await registry.create(runtime="cli", task=str(n))
            async with Compactor(registry.store, POLICY) as compactor:
                registry.hooks.add(compactor)
                for n in range(30):
                    await registry.create(runtime="cli", task=str(n))
                    assert await asyncio.to_thread(compactor.wait, TIMEOUT_S)
            assert compactor.runs >= 2
            assert compactor.failures == 0

    asyncio.run(main())


def test_a_closed_compactor_starts_nothing(open_ledger):
    registry = open_ledger()
    compactor = Compactor(registry.store, POLICY.forced())
    compactor.close()
    registry.hooks.add(compactor)
    registry.create(runtime="cli", task="x")
    assert compactor.wait()
    assert compactor.runs == 0


def test_a_read_only_store_is_refused_at_once(open_ledger, caplog):
    open_ledger().create(runtime="cli", task="x")
    reader = open_ledger(read_only=True)
    caplog.clear()
    with caplog.at_level(logging.DEBUG), pytest.raises(ReadOnlyError) as caught:
        Compactor(reader.store, POLICY)
    assert reader.store.location in str(caught.value)
    assert "opened for writing" in caught.value.hint
    assert caplog.messages == []
