"""Retries: a shared outage, contention, and unconfirmed commits."""

from __future__ import annotations

import pytest

from taskstore import StoreBusyError, StoreUnavailableError
from taskstore.stores.common import retry
from taskstore.stores.common.retry import (
    Backoff,
    CircuitBreaker,
    Contention,
    FailureKind,
    RetryPolicy,
    UnconfirmedCommitError,
)


class DriverError(Exception):
    def __init__(self, kind):
        super().__init__(kind.value)
        self.kind = kind


class Translation:
    errors = (DriverError,)

    def failure_kind(self, error):
        return error.kind

    def translate(self, error):
        if error.kind in (
            FailureKind.LOCK_BUSY,
            FailureKind.LOCK_TIMEOUT,
            FailureKind.SERIALIZATION,
        ):
            return StoreBusyError("here is locked")
        return StoreUnavailableError("here cannot be used")

    def cause(self, error):
        return error

    def text(self, error):
        return str(error)


class Time:
    """A clock that only advances in ``sleep``."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture(autouse=True)
def time(monkeypatch):
    made = Time()
    monkeypatch.setattr(retry, "time", made)
    return made


def policy_of(breaker, **others):
    return RetryPolicy(Translation(), breaker, **others)


@pytest.fixture
def attempts(time):
    """How many attempts a call makes before it raises, if each one fails after ``seconds``."""

    def made(breaker, seconds):
        number = 0
        with pytest.raises(StoreUnavailableError):
            for attempt in policy_of(breaker).attempts():
                with attempt:
                    number += 1
                    time.sleep(seconds)
                    raise DriverError(FailureKind.UNAVAILABLE)
        return number

    return made


def test_an_attempt_that_takes_longer_than_the_timeout_counts(attempts, time):
    breaker = CircuitBreaker("here", 5)
    assert attempts(breaker, 10) == 2
    assert attempts(breaker, 10) == 0  # at once, without another attempt
    with pytest.raises(StoreUnavailableError, match=r"has been unavailable for .* s: unavailable"):
        breaker.check()
    time.sleep(1)
    assert attempts(breaker, 10) == 1
    breaker.close()
    assert attempts(breaker, 10) == 2


def test_many_short_attempts_share_one_timeout(attempts, time):
    breaker = CircuitBreaker("here", 5)
    began = time.now
    assert attempts(breaker, 0.01) > 50
    assert 5 <= time.now - began < 6


def test_a_failure_after_a_long_time_without_attempts_is_another_outage(attempts, time):
    breaker = CircuitBreaker("here", 5)
    assert attempts(breaker, 10) == 2
    time.sleep(6)
    assert attempts(breaker, 1) > 2


def test_a_timeout_of_zero(attempts):
    assert attempts(CircuitBreaker("here", 0), 0) == 1


def test_a_success_ends_the_outage_for_all_calls():
    breaker = CircuitBreaker("here", 5)
    policy, errors = policy_of(breaker), [DriverError(FailureKind.UNAVAILABLE)]

    def work():
        for attempt in policy.attempts():
            with attempt:
                if errors:
                    raise errors.pop()
                return "done"
        raise AssertionError

    assert work() == "done"
    assert breaker.outage is None


def test_other_errors_pass_through():
    tried = []
    with pytest.raises(LookupError):
        for attempt in policy_of(CircuitBreaker("here", 5)).attempts():
            with attempt:
                tried.append(1)
                raise LookupError
    assert len(tried) == 1


def test_a_permanent_error_is_raised_at_once():
    with pytest.raises(StoreUnavailableError, match="here cannot be used") as caught:
        for attempt in policy_of(CircuitBreaker("here", 5)).attempts():
            with attempt:
                raise DriverError(FailureKind.PERMANENT)
    assert isinstance(caught.value.__cause__, DriverError)


@pytest.mark.parametrize(
    "kind", [FailureKind.LOCK_BUSY, FailureKind.SERIALIZATION, FailureKind.LOCK_TIMEOUT]
)
def test_a_write_waits_while_other_writers_make_progress(kind, time):
    position = 0
    policy = policy_of(
        CircuitBreaker("here", 5), position=lambda: position, owners=lambda: ["pid 1"]
    )
    started = time.now
    with pytest.raises(StoreBusyError, match="here is locked; held by pid 1") as caught:
        for attempt in policy.attempts():
            with attempt:
                time.sleep(1)
                if time.now < started + 200:
                    position += 1
                raise DriverError(kind)
    assert caught.value.owners == ("pid 1",)
    assert 200 <= time.now - started < 200 + 2 * retry.BUSY_TIMEOUT_S


def test_without_a_position_the_wait_is_bounded(time):
    started = time.now
    with pytest.raises(StoreBusyError):
        for attempt in policy_of(CircuitBreaker("here", 5)).attempts():
            with attempt:
                time.sleep(1)
                raise DriverError(FailureKind.LOCK_BUSY)
    assert retry.BUSY_TIMEOUT_S <= time.now - started < retry.BUSY_TIMEOUT_S + 2


def commit_unconfirmed(works):
    works.append(1)
    raise UnconfirmedCommitError from DriverError(FailureKind.UNAVAILABLE)


def test_an_unconfirmed_commit_is_left_to_a_caller_that_reads_back():
    policy, works = policy_of(CircuitBreaker("here", 0)), []
    for attempt in policy.attempts(reads_back=True):
        with attempt:
            commit_unconfirmed(works)
        assert attempt.unconfirmed
        break
    assert len(works) == 1


def test_an_unconfirmed_commit_is_retried_otherwise(time):
    policy, works = policy_of(CircuitBreaker("here", 5)), []
    with pytest.raises(StoreUnavailableError):
        for attempt in policy.attempts():
            with attempt:
                commit_unconfirmed(works)
    assert len(works) > 2


def test_the_second_reading_of_the_position_shows_progress():
    positions = [1, 1, 2, None]
    contention = Contention(lambda: positions.pop(0))
    assert [contention.made_progress() for _ in range(4)] == [True, False, True, False]


def test_pauses_double_up_to_the_longest():
    backoff = Backoff(1.0, 8.0)
    for due in (1, 2, 4, 8, 8):
        assert due / 4 <= backoff.next_s() <= due
    backoff.reset()
    assert backoff.next_s() <= 1
