"""The line before a lock: in order, left by the dead, and no obstacle when somebody in it stops."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from taskstore.stores import turnstile
from taskstore.stores.turnstile import Turnstile
from taskstore.testing.processes import Child
from taskstore.testing.threads import meanwhile, until


@pytest.fixture
def path(tmp_path):
    return tmp_path / "turn"


def test_who_need_not_wait_leaves_no_trace(path):
    assert Turnstile(path).wait(lambda: True, 1)
    assert not path.exists()


def test_waiting_ends(path):
    tries = []

    def third() -> bool:
        tries.append(time.monotonic())
        return len(tries) == 3

    assert Turnstile(path).wait(third, 10)
    assert path.stat().st_mode & 0o777 == 0o600
    started = time.monotonic()
    assert not Turnstile(path).wait(lambda: False, 0.05)
    assert time.monotonic() - started >= 0.05


def test_what_an_attempt_raises_ends_the_wait_and_gives_the_place_free(path):
    def broken() -> bool:
        raise LookupError

    one = Turnstile(path)
    assert not one.wait(lambda: False, 0.001)
    with pytest.raises(LookupError):
        one.wait(broken, 1)
    assert tries_of(Turnstile(path)) == 1


def tries_of(line: Turnstile) -> int:
    """How long it takes to get through: the number of looks at a lock that is free."""
    looks: list[None] = []

    def look() -> bool:
        looks.append(None)
        return True

    assert line.wait(look, 10)
    return len(looks)


def test_who_had_the_lock_comes_after_who_waits_for_it(path, monkeypatch):
    monkeypatch.setattr(turnstile, "PATIENCE_S", 1000.0)
    lock, order = threading.Lock(), []
    greedy, patient = Turnstile(path), Turnstile(path)
    assert greedy.wait(lambda: lock.acquire(blocking=False), 1)
    waiting = threading.Event()

    looks: list[None] = []

    def attempt() -> bool:
        # Only after the first look does one know that one has to wait in line.
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


def in_line(path) -> Child:
    """A process that stands first in line for a lock that it never gets."""

    def work(report) -> None:
        def never() -> bool:
            if first:
                first.clear()
            else:
                report("in line")
            return False

        first = [True]
        Turnstile(path).wait(never, 60)

    child = Child(work)
    assert child.line() == "in line"
    return child


def test_nobody_waits_for_who_was_killed_in_line(path, monkeypatch):
    monkeypatch.setattr(turnstile, "PATIENCE_S", 1000.0)
    child = in_line(path)
    child.kill()
    child.finish()
    assert tries_of(Turnstile(path)) == 1


def test_nobody_waits_long_for_who_stopped_in_line_and_only_once(path, monkeypatch):
    child = in_line(path)
    os.kill(child.pid, signal.SIGSTOP)
    line = Turnstile(path)
    assert tries_of(line) == 1
    monkeypatch.setattr(turnstile, "PATIENCE_S", 1000.0)
    for _ in range(20):
        assert tries_of(line) == 1
    child.kill()
    child.finish()
    assert tries_of(line) == 1


def test_a_place_is_not_inherited(path):
    line = Turnstile(path)
    assert not line.wait(lambda: False, 0.001)
    assert Child(lambda report: report(str(tries_of(line)))).finish() == ["1"]
    line.close()
    line.close()
    assert tries_of(line) == 1


@pytest.mark.skipif(turnstile._LAST == 0, reason="the line is one place long but on Linux")
def test_they_come_in_the_order_in_which_they_joined(path, monkeypatch):
    monkeypatch.setattr(turnstile, "PATIENCE_S", 1000.0)
    lines = [Turnstile(path) for _ in range(4)]
    busy, order, threads = threading.Lock(), [], []
    busy.acquire()
    for number, line in enumerate(lines):

        def attempt(number=number) -> bool:
            if not busy.acquire(blocking=False):
                return False
            order.append(number)
            return True

        def wait(line=line, attempt=attempt) -> None:
            assert line.wait(attempt, 30)
            busy.release()

        thread = threading.Thread(target=wait)
        threads.append(thread)
        thread.start()
        until(lambda line=line, number=number: line._place == number)
    busy.release()
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3]


def test_without_places_of_their_own(path, monkeypatch):
    monkeypatch.setattr(turnstile, "_LAST", 0)
    one, two = Turnstile(path), Turnstile(path)
    assert not one.wait(lambda: False, 0.001)
    assert tries_of(one) == tries_of(two) == 1
