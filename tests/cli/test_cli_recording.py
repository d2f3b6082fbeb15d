"""Unit tests of the parts of ``taskstore run``."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskstore import Change, Commit, OutcomeUnknownError, Put, StoreUnavailableError
from taskstore.cli import child as child_module
from taskstore.cli import run as recorder_module
from taskstore.cli.child import (
    LastLine,
    SignalQueue,
    forwarded_signals,
    running_child,
    summarize_line,
)
from taskstore.cli.run import Recorder, new_command_record
from taskstore.model.records import SUMMARY_BYTES
from taskstore.model.validation import check_text
from taskstore.stores.memory import MemoryStore


@pytest.mark.parametrize(
    ("line", "summary"),
    [
        (b"\x1b[1;32mok\x1b[0m", "ok"),
        (b"\x1b]0;a title\x07done", "done"),
        (b"\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        (b"a\tb  c \x0b d", "a b c d"),
        (b"nul\0 bell\x07 del\x7f c1\xc2\x9b", "nul bell del c1"),
        (b"h\xc3\xa9 \xff", "h\N{LATIN SMALL LETTER E WITH ACUTE} \N{REPLACEMENT CHARACTER}"),
        (b" \x1b[0m ", ""),
    ],
)
def test_a_line_becomes_a_summary(line: bytes, summary: str) -> None:
    assert summarize_line(line) == summary


@given(st.binary(max_size=200) | st.text(max_size=3000).map(lambda text: text.encode() * 3))
def test_every_summary_is_valid(line: bytes) -> None:
    summary = summarize_line(line)
    assert check_text("progress_summary", summary, SUMMARY_BYTES) == summary
    assert summary == " ".join(summary.split())
    assert summarize_line(summary.encode()) == summary


@given(
    st.lists(st.sampled_from([b"a", b"bc", b" ", b"\n", b"\r", b"\r\n", b"\x1b[0m", b"\xc3\xa9"])),
    st.data(),
)
def test_chunks_do_not_change_the_last_line(parts: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(parts)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)))))
    lines = [summarize_line(line) for line in stream.replace(b"\r", b"\n").split(b"\n")]
    expected = next((line for line in reversed(lines) if line), None)
    last, follower = None, LastLine()
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        last = follower.feed(stream[begin:end]) or last
    assert (follower.close() or last) == expected


def test_an_endless_line_takes_bounded_memory() -> None:
    follower = LastLine()
    for _ in range(1000):
        assert follower.feed(b"x" * 10_000) is None
    assert len(follower._partial) < 100_000
    assert follower.close() == "x" * SUMMARY_BYTES


class Faulty(MemoryStore):
    """A store that blocks until its gate is opened, or fails the first commits."""

    def __init__(self, *, refusals: int = 0) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.refusals = 0
        self.record = new_command_record(["true"])
        self.apply([Put(self.record)])
        self.refusals = refusals

    def apply(self, changes: Sequence[Change]) -> Commit:
        assert self.gate.wait(60)
        if self.refusals:
            self.refusals -= 1
            raise StoreUnavailableError("the disk is full")
        return super().apply(changes)


class UnknownOutcome(Faulty):
    """A store that commits the end and then raises :class:`OutcomeUnknownError`."""

    def apply(self, changes: Sequence[Change]) -> Commit:
        commit = super().apply(changes)
        if any(isinstance(change, Put) and change.record.is_terminal for change in changes):
            raise OutcomeUnknownError("the connection died")
        return commit


@pytest.fixture
def queue() -> Iterator[SignalQueue]:
    with closing(SignalQueue()) as opened:
        yield opened


def finished(store: Faulty, work: Callable[[Recorder], Any]) -> Recorder:
    recorder = Recorder(store, store.record)
    work(recorder)
    assert recorder.finish("succeeded", 0)
    return recorder


def test_a_slow_store_does_not_block_the_recorder() -> None:
    store = Faulty()
    store.gate.clear()

    def work(recorder: Recorder) -> None:
        for number in range(10):
            recorder.progress(f"line {number}")
        assert recorder.record.progress_summary is None
        store.gate.set()

    recorder = finished(store, work)
    assert recorder.record.progress_summary == "line 9"
    assert recorder.recorded


def test_the_end_is_retried_until_the_store_recovers() -> None:
    recorder = finished(Faulty(refusals=3), lambda recorder: recorder.progress("half"))
    assert recorder.recorded
    assert recorder.failure is None
    assert recorder.record.status == "succeeded"


def test_the_recorder_gives_up_after_the_retry_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "RETRY_TIMEOUT_S", 0.3)
    recorder = finished(Faulty(refusals=10**6), lambda _: None)
    assert not recorder.recorded
    assert isinstance(recorder.failure, StoreUnavailableError)
    assert recorder.record.status == "running"


def test_the_wait_for_a_hanging_store_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "STORE_TIMEOUT_S", 0.1)
    store = Faulty()
    store.gate.clear()
    recorder = Recorder(store, store.record)
    try:
        assert not recorder.finish("succeeded", 0)
        assert not recorder.recorded
    finally:
        store.gate.set()


def test_an_end_with_unknown_outcome_is_read_back() -> None:
    store = UnknownOutcome()
    recorder = finished(store, lambda recorder: recorder.progress("half"))
    assert recorder.recorded
    assert recorder.failure is None
    [record] = store.load_snapshot().records.values()
    assert record == recorder.record
    assert (record.status, record.terminal_summary) == ("succeeded", "half")


def test_an_exception_kills_the_command(queue: SignalQueue) -> None:
    with (
        pytest.raises(RuntimeError, match="bug"),
        running_child(["sleep", "79"], queue, print) as c,
    ):
        raise RuntimeError("bug")
    with pytest.raises(ProcessLookupError):
        os.killpg(c.pid, 0)


def test_a_stream_whose_thread_starts_late_is_closed(
    queue: SignalQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    late: list[threading.Thread] = []

    def hold_back(thread: threading.Thread) -> None:
        late.append(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", hold_back)
        with suppress(RuntimeError), running_child(["sleep", "78"], queue, print):
            raise RuntimeError("before any thread has begun")
    for thread in late:
        thread.run()
    assert [queue.get(0) for _ in range(3)] == [child_module.CLOSED, child_module.CLOSED, None]


def test_a_closed_queue_ignores_items() -> None:
    queue = SignalQueue()
    queue.put(child_module.CLOSED)
    queue.close()
    queue.put(child_module.CLOSED)


@pytest.mark.parametrize("number", child_module.FORWARDED)
def test_a_signal_in_another_thread_is_queued(number: signal.Signals) -> None:
    """The kernel may deliver a signal to any thread while the main thread waits."""
    with forwarded_signals() as queue:
        threading.Thread(target=lambda: signal.pthread_kill(threading.get_ident(), number)).start()
        assert queue.get(timeout=60) == number


def test_signal_handlers_are_restored() -> None:
    handlers = [signal.getsignal(number) for number in child_module.FORWARDED]
    ignored = signal.signal(signal.SIGQUIT, signal.SIG_IGN)
    try:
        with forwarded_signals():
            assert signal.getsignal(signal.SIGQUIT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGQUIT, ignored)
    assert [signal.getsignal(number) for number in child_module.FORWARDED] == handlers
    assert signal.set_wakeup_fd(-1) == -1


def test_a_child_without_reader_threads_is_killed(
    queue: SignalQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    popen = child_module.subprocess.Popen

    def noting(*args: Any, **options: Any) -> Any:
        started.append(popen(*args, **options))
        return started[-1]

    def no_threads(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(child_module.subprocess, "Popen", noting)
    monkeypatch.setattr(threading.Thread, "start", no_threads)
    with pytest.raises(RuntimeError), running_child(["sleep", "80"], queue, print):
        pass
    assert started[0].returncode == -signal.SIGKILL
    for pipe in (started[0].stdout, started[0].stderr):
        pipe.close()
