"""How long a server that is away is waited for."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from taskstore import StoreUnavailableError
from taskstore.stores.sql import patience
from taskstore.stores.sql.engines import open_database
from taskstore.stores.sql.patience import Outage, Trouble


@pytest.fixture
def database():
    with_driver = open_database("postgresql+psycopg://nobody@nowhere.invalid/ledger")
    yield with_driver
    with_driver.close()


def gone():
    """What SQLAlchemy raises when a server cannot be reached."""
    import psycopg

    return sa.exc.OperationalError("SELECT 1", None, psycopg.OperationalError("no answer"))


class Time:
    """A clock that goes on when somebody sleeps, and not otherwise."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture(autouse=True)
def time(monkeypatch):
    made = Time()
    monkeypatch.setattr(patience, "time", made)
    return made


@pytest.fixture
def attempts(database, time):
    """How often a call that takes ``seconds`` to fail is made until its caller hears of it."""

    def made(outage, seconds):
        trouble = Trouble(database, outage)
        for number in range(1, 1000):
            time.sleep(seconds)
            try:
                trouble.pause_or_raise(gone())
            except StoreUnavailableError:
                return number
        return None

    return made


def test_an_attempt_that_takes_longer_than_the_patience_counts_all_the_same(attempts, time):
    outage = Outage("here", 5)
    assert attempts(outage, 10) == 2
    with pytest.raises(StoreUnavailableError, match="has been away"):
        attempts(outage, 10)  # at once, without another attempt
    time.sleep(1)
    assert attempts(outage, 10) == 1
    outage.end()
    assert attempts(outage, 10) == 2


def test_many_short_attempts_share_one_patience(attempts, time):
    outage = Outage("here", 5)
    began = time.now
    assert attempts(outage, 0.01) > 50
    assert 5 <= time.now - began < 6


def test_what_nobody_has_looked_at_for_as_long_is_another_outage(attempts, time):
    outage = Outage("here", 5)
    assert attempts(outage, 10) == 2
    time.sleep(6)
    assert attempts(outage, 1) > 2


def test_no_patience_at_all(attempts):
    assert attempts(Outage("here", 0), 0) == 1
