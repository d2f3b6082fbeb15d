"""The waiting room of a fair lock: left by the killed, no obstacle when a waiter stops in it."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from taskstore.stores.common import locks as fairlock
from taskstore.stores.common.locks import FairLock
from taskstore.testing.crash.processes import Child
from taskstore.testing.threads import meanwhile


@pytest.fixture
def path(tmp_path):
    return tmp_path / "turn"


def test_who_need_not_wait_leaves_no_trace(path):
    assert FairLock(path).wait(lambda: True, 1)
    assert not path.exists()


def test_waiting_ends(path):
    tries = []

    def third() -> bool:
        tries.append(time.monotonic())
        return len(tries) == 3

    assert FairLock(path).wait(third, 10)
    assert path.stat().st_mode & 0o777 == 0o600
    started = time.monotonic()
    assert not FairLock(path).wait(lambda: False, 0.05)
    assert time.monotonic() - started >= 0.05


def test_what_an_attempt_raises_ends_the_wait_and_empties_the_waiting_room(path):
    def broken() -> bool:
        raise LookupError

    one = FairLock(path)
    assert not one.wait(lambda: False, 0.001)
    with pytest.raises(LookupError):
        one.wait(broken, 1)
    assert tries_of(FairLock(path)) == 1


def tries_of(lock: FairLock) -> int:
    """How long it takes to get through: the number of looks at a lock that is free."""
    looks: list[None] = []

    def look() -> bool:
        looks.append(None)
        return True

    assert lock.wait(look, 10)
    return len(looks)


def test_who_had_the_lock_comes_after_who_waits_for_it(path, monkeypatch):
    monkeypatch.setattr(fairlock, "PATIENCE_S", 1000.0)
    lock, order = threading.Lock(), []
    greedy, patient = FairLock(path), FairLock(path)
    assert greedy.wait(lambda: lock.acquire(blocking=False), 1)
    waiting = threading.Event()

    looks: list[None] = []

    def attempt() -> bool:
        # Only after the first look is it known that the lock is not free.
        looks.append(None)
        if len(looks) > 1:
            waiting.set()
        return lock.acquire(blocking=False)

    def wait() -> None:
        assert patient.wait(attempt, 10)
        order.append("patient")
        lock.release()

    with meanwhile(wait):
        waiting.wait()
        for _ in range(3):
            lock.release()
            assert greedy.wait(lambda: lock.acquire(blocking=False), 10)
            order.append("greedy")
        lock.release()
    assert order[0] == "patient"


def waiting(path) -> Child:
    """A process in the waiting room of a lock that it never gets."""

    def work(report) -> None:
        def never() -> bool:
            if first:
                first.clear()
            else:
                report("waiting")
            return False

        first = [True]
        FairLock(path).wait(never, 60)

    child = Child(work)
    assert child.line() == "waiting"
    return child


def test_nobody_waits_for_who_was_killed_in_the_waiting_room(path, monkeypatch):
    monkeypatch.setattr(fairlock, "PATIENCE_S", 1000.0)
    child = waiting(path)
    child.kill()
    child.finish()
    assert tries_of(FairLock(path)) == 1


def test_nobody_waits_long_for_who_stopped_in_the_waiting_room_and_only_once(path, monkeypatch):
    child = waiting(path)
    os.kill(child.pid, signal.SIGSTOP)
    lock = FairLock(path)
    assert tries_of(lock) == 1
    monkeypatch.setattr(fairlock, "PATIENCE_S", 1000.0)
    for _ in range(20):
        assert tries_of(lock) == 1
    child.kill()
    child.finish()
    assert tries_of(lock) == 1


def test_a_forked_child_that_closes_its_copy_does_not_empty_the_waiting_room(path):
    held, looks = FairLock(path), []

    def attempt() -> bool:
        looks.append(None)
        if len(looks) == 1:
            return False  # so that the waiting room is made, and we are in it
        assert Child(lambda report: held.close()).finish() == []
        assert not FairLock(path).wait(lambda: True, 0.001)
        return True

    assert held.wait(attempt, 10)
    held.close()
    held.close()
    assert tries_of(held) == 1
