"""[3] What keeps other writers out may break: nobody is told anything wrong, and work goes on."""

from __future__ import annotations

import pytest

from taskstore import ConflictError, TaskRegistry
from taskstore.testing.factories import create, next_of


@pytest.fixture(params=["postgres_url", "mariadb_url"])
def server_url(request) -> str:
    return request.getfixturevalue(request.param)


def cut(store) -> None:
    """The connection that keeps the others out is gone."""
    store._transactions._begun.raw.close()


def test_a_connection_that_is_lost_while_reading(server_url, open_):
    store, other = open_(server_url), open_(server_url)
    record = create(store)
    with store.exclusive():
        cut(store)
        assert store.read_journal(0, 10)[-1].record == record
        # Nobody is kept out any more, and the revisions say so.
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


def test_a_registry_in_company_goes_on_over_lost_connections(server_url):
    with TaskRegistry.open(server_url) as one, TaskRegistry.open(server_url) as two:
        task = one.create(runtime="cli", task="x", status="running")
        for number in range(6):
            registry = (one, two)[number % 2]
            if number > 3:
                registry.store._transactions.pool.writing.raw.close()
            registry.update_metadata(task.task_id, {str(number): number})
        assert len(one.store.load_snapshot().records[task.task_id].metadata) == 6
