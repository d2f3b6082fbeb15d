"""[3] A lost exclusive lock: the store reports no wrong result, and continues to work."""

from __future__ import annotations

import pytest

from taskstore import ConflictError, TaskRegistry
from taskstore.testing.factories import create, next_of


@pytest.fixture(params=["postgres_url", "mariadb_url"])
def server_url(request) -> str:
    return request.getfixturevalue(request.param)


def cut(store) -> None:
    """Close the connection that has the lock."""
    store._transactions._exclusive_tx.raw.close()


def test_a_connection_that_is_lost_while_reading(server_url, open_):
    store, other = open_(server_url), open_(server_url)
    record = create(store)
    with store.exclusive():
        cut(store)
        assert store.read_journal(0, 10)[-1].record == record
        # The lock is lost, and the revisions conflict.
        other.apply([next_of(record)])
        with pytest.raises(ConflictError):
            store.apply([next_of(record)])
    assert store.head() == 2


def test_a_connection_that_is_lost_before_writing(server_url, open_):
    store = open_(server_url)
    record = create(store)
    with store.exclusive():
        cut(store)
        assert store.apply([next_of(record)]).first_seq == 2
    assert open_(server_url).apply([next_of(next_of(record).record)]).first_seq == 3


def test_registries_survive_lost_write_connections(server_url):
    with TaskRegistry.open(server_url) as one, TaskRegistry.open(server_url) as two:
        task = one.create(runtime="cli", task="x", status="running")
        for number in range(6):
            registry = (one, two)[number % 2]
            if number > 3:
                registry.store._transactions.pool.write_session.raw.close()
            registry.update_metadata(task.task_id, {str(number): number})
        assert len(one.store.load_snapshot().records[task.task_id].metadata) == 6
