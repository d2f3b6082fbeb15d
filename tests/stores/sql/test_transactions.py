"""Transactions: interrupted bodies, and writes inside of writes."""

from __future__ import annotations

import signal

import pytest
from sqlkit import write

from taskstore import StoreBusyError
from taskstore.testing.factories import create, make_put


def test_an_orphan_is_rolled_back(url, open_):
    """An interrupt between a transaction's BEGIN and its body leaves it without an owner."""
    store, other = open_(url), open_(url)
    begun = store._transactions.write()
    begun.__enter__().execute("UPDATE taskstore_head SET last_at = 99")
    del begun
    create(other)
    create(store)
    assert store.verify().ok
    assert store.load_snapshot().at != 99


def test_a_body_that_raises_is_rolled_back(url, open_):
    store = open_(url)
    with pytest.raises(KeyboardInterrupt), store._transactions.write() as tx:
        tx.execute("UPDATE taskstore_head SET last_at = 99")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), store.exclusive():
        raise KeyboardInterrupt
    create(open_(url))
    assert store.load_snapshot().at != 99


def test_a_signal_handler_that_writes_in_the_middle_of_a_write_is_refused(url, open_):
    store, refused = open_(url), []

    def handler(*_):
        for use in (lambda: create(store), store.exclusive().__enter__):
            try:
                use()
            except StoreBusyError as error:
                refused.append(error)

    def work(tx):
        signal.raise_signal(signal.SIGUSR1)
        tx.execute("UPDATE taskstore_head SET last_at = last_at")

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        write(store, work)
        with store.exclusive():
            store.apply([make_put()])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert ["has not finished another write" in str(error) for error in refused] == [True, True]
    create(store)
    assert (store.head(), store.verify().ok) == (2, True)


def test_reading_in_the_middle_of_a_write_is_fine(url, open_):
    store = open_(url)
    create(store)
    assert write(store, lambda _: store.head()) == 1
