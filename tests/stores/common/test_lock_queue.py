"""The queue of waiters for a lock: killed waiters leave it, stopped waiters are bypassed."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time

import pytest

from taskstore.stores.common import locks
from taskstore.stores.common.locks import LockQueue
from taskstore.testing.crash.processes import Child
from taskstore.testing.threads import meanwhile


@pytest.fixture
def path(tmp_path):
    return tmp_path / "turn"


def test_an_uncontended_lock_creates_no_file(path):
    assert LockQueue(path).poll_in_turn(lambda: True, 1)
    assert not path.exists()


def test_a_wait_ends_with_success_or_timeout(path):
    attempts = []

    def third() -> bool:
        attempts.append(time.monotonic())
        return len(attempts) == 3

    assert LockQueue(path).poll_in_turn(third, 10)
    assert path.stat().st_mode & 0o777 == 0o600
    started = time.monotonic()
    assert not LockQueue(path).poll_in_turn(lambda: False, 0.05)
    assert time.monotonic() - started >= 0.05


def test_an_error_in_an_attempt_ends_the_wait_and_leaves_the_queue(path):
    def broken() -> bool:
        raise LookupError

    one = LockQueue(path)
    assert not one.poll_in_turn(lambda: False, 0.001)
    with pytest.raises(LookupError):
        one.poll_in_turn(broken, 1)
    assert attempts_of(LockQueue(path)) == 1


def attempts_of(lock: LockQueue) -> int:
    """Return how many attempts a free lock takes."""
    attempts: list[None] = []

    def attempt() -> bool:
        attempts.append(None)
        return True

    assert lock.poll_in_turn(attempt, 10)
    return len(attempts)


def test_a_waiter_comes_before_the_last_owner(path, monkeypatch):
    monkeypatch.setattr(locks, "QUEUE_TIMEOUT_S", 1000.0)
    lock, order = threading.Lock(), []
    greedy, patient = LockQueue(path), LockQueue(path)
    assert greedy.poll_in_turn(lambda: lock.acquire(blocking=False), 1)
    waiting = threading.Event()

    attempts: list[None] = []

    def attempt() -> bool:
        # Only the first attempt shows that the lock is not free.
        attempts.append(None)
        if len(attempts) > 1:
            waiting.set()
        return lock.acquire(blocking=False)

    def wait() -> None:
        assert patient.poll_in_turn(attempt, 10)
        order.append("patient")
        lock.release()

    with meanwhile(wait):
        waiting.wait()
        for _ in range(3):
            lock.release()
            assert greedy.poll_in_turn(lambda: lock.acquire(blocking=False), 10)
            order.append("greedy")
        lock.release()
    assert order[0] == "patient"


def waiting(path) -> Child:
    """A process at the front of the queue of a lock that it never gets."""

    def work(report) -> None:
        def never() -> bool:
            if first:
                first.clear()
            else:
                report("waiting")
            return False

        first = [True]
        LockQueue(path).poll_in_turn(never, 60)

    child = Child(work)
    assert child.line() == "waiting"
    return child


def test_a_killed_waiter_leaves_the_queue(path, monkeypatch):
    monkeypatch.setattr(locks, "QUEUE_TIMEOUT_S", 1000.0)
    child = waiting(path)
    child.kill()
    child.finish()
    assert attempts_of(LockQueue(path)) == 1


def test_a_stopped_waiter_delays_others_once_and_briefly(path, monkeypatch):
    child = waiting(path)
    os.kill(child.pid, signal.SIGSTOP)
    lock = LockQueue(path)
    assert attempts_of(lock) == 1
    monkeypatch.setattr(locks, "QUEUE_TIMEOUT_S", 1000.0)
    for _ in range(20):
        assert attempts_of(lock) == 1
    child.kill()
    child.finish()
    assert attempts_of(lock) == 1


def test_a_forked_child_that_closes_its_copy_does_not_leave_the_queue(path):
    held, attempts = LockQueue(path), []

    def attempt() -> bool:
        attempts.append(None)
        if len(attempts) == 1:
            return False  # so that the queue exists and this process is at its front
        assert Child(lambda report: held.close()).finish() == []
        assert not LockQueue(path).poll_in_turn(lambda: True, 0.001)
        return True

    assert held.poll_in_turn(attempt, 10)
    held.close()
    held.close()
    assert attempts_of(held) == 1


def test_a_removed_queue_file_is_replaced(path):
    one, two = LockQueue(path), LockQueue(path)
    assert not one.poll_in_turn(lambda: False, 0.001)
    path.unlink()
    assert not two.poll_in_turn(lambda: False, 0.001)
    assert one.poll_in_turn(lambda: True, 10)
    assert os.path.samestat(os.fstat(one._descriptor), path.stat())
    # The two waiters are in the same queue again.
    fcntl.flock(two._descriptor, fcntl.LOCK_EX)
    assert not one.poll_in_turn(lambda: True, 0.001)
    one.close()
    two.close()
