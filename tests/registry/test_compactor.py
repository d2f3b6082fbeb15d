"""The compactor hook: it counts entries, and compacts when the policy is due."""

from __future__ import annotations

from taskstore import CompactionPolicy, Compactor

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


def test_it_asks_the_store_when_a_ledger_is_opened(open_ledger):
    with open_ledger() as registry:
        for n in range(20):
            registry.create(runtime="cli", task=str(n))
    registry = open_ledger()
    compactor = Compactor(registry.store, POLICY)
    registry.hooks.add(compactor)
    task = registry.create(runtime="cli", task="x")
    compactor.close()
    assert compactor.runs == 0
    registry.mark_running(task.task_id)
    assert compactor.runs == 0


def test_a_closed_compactor_starts_nothing(open_ledger):
    registry = open_ledger()
    compactor = Compactor(registry.store, POLICY.forced())
    compactor.close()
    registry.hooks.add(compactor)
    registry.create(runtime="cli", task="x")
    assert compactor.wait()
    assert compactor.runs == 0
