"""The parts of ``taskstore run``, each by itself."""

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
from taskstore.cli.child import Events, LastLine, forwarded_signals, running, summary_of
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
    assert summary_of(line) == summary


@given(st.binary(max_size=200) | st.text(max_size=3000).map(lambda text: text.encode() * 3))
def test_any_line_can_be_stored(line: bytes) -> None:
    summary = summary_of(line)
    assert check_text("progress_summary", summary, SUMMARY_BYTES) == summary
    assert summary == " ".join(summary.split())
    assert summary_of(summary.encode()) == summary


@given(
    st.lists(st.sampled_from([b"a", b"bc", b" ", b"\n", b"\r", b"\r\n", b"\x1b[0m", b"\xc3\xa9"])),
    st.data(),
)
def test_how_a_stream_is_cut_makes_no_difference(parts: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(parts)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)))))
    lines = [summary_of(line) for line in stream.replace(b"\r", b"\n").split(b"\n")]
    expected = next((line for line in reversed(lines) if line), None)
    last, follower = None, LastLine()
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        last = follower.feed(stream[begin:end]) or last
    assert (follower.close() or last) == expected


def test_a_line_without_end_takes_no_memory() -> None:
    follower = LastLine()
    for _ in range(1000):
        assert follower.feed(b"x" * 10_000) is None
    assert len(follower._begun) < 100_000
    assert follower.close() == "x" * SUMMARY_BYTES


class Faulty(MemoryStore):
    """A store that does not answer before its gate is opened, or refuses so many commits."""

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


class Unsure(Faulty):
    """A store that commits an end, and cannot tell whether it did."""

    def apply(self, changes: Sequence[Change]) -> Commit:
        commit = super().apply(changes)
        if any(isinstance(change, Put) and change.record.is_terminal for change in changes):
            raise OutcomeUnknownError("the connection died")
        return commit


@pytest.fixture
def events() -> Iterator[Events]:
    with closing(Events()) as opened:
        yield opened


def finished(store: Faulty, work: Callable[[Recorder], Any]) -> Recorder:
    recorder = Recorder(store, store.record)
    work(recorder)
    assert recorder.finish("succeeded", 0)
    return recorder


def test_a_slow_store_holds_nothing_up() -> None:
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


def test_a_store_that_recovers_has_the_end() -> None:
    recorder = finished(Faulty(refusals=3), lambda recorder: recorder.progress("half"))
    assert recorder.recorded
    assert recorder.failure is None
    assert recorder.record.status == "succeeded"


def test_a_store_that_does_not_recover_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "PATIENCE_S", 0.3)
    recorder = finished(Faulty(refusals=10**6), lambda _: None)
    assert not recorder.recorded
    assert isinstance(recorder.failure, StoreUnavailableError)
    assert recorder.record.status == "running"


def test_a_store_that_hangs_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "HANG_S", 0.1)
    store = Faulty()
    store.gate.clear()
    recorder = Recorder(store, store.record)
    try:
        assert not recorder.finish("succeeded", 0)
        assert not recorder.recorded
    finally:
        store.gate.set()


def test_an_end_that_may_be_recorded_is_looked_for() -> None:
    store = Unsure()
    recorder = finished(store, lambda recorder: recorder.progress("half"))
    assert recorder.recorded
    assert recorder.failure is None
    [record] = store.load_snapshot().records.values()
    assert record == recorder.record
    assert (record.status, record.terminal_summary) == ("succeeded", "half")


def test_nothing_of_a_command_outlives_an_exception(events: Events) -> None:
    with pytest.raises(RuntimeError, match="of ours"), running(["sleep", "79"], events, print) as c:
        raise RuntimeError("of ours")
    with pytest.raises(ProcessLookupError):
        os.killpg(c.pid, 0)


def test_streams_that_are_read_too_late_are_closed_all_the_same(
    events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    late: list[threading.Thread] = []

    def hold_back(thread: threading.Thread) -> None:
        late.append(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", hold_back)
        with suppress(RuntimeError), running(["sleep", "78"], events, print):
            raise RuntimeError("before any thread has begun")
    for thread in late:
        thread.run()
    assert [events.get(0) for _ in range(3)] == [child_module.CLOSED, child_module.CLOSED, None]


def test_events_that_come_too_late_are_dropped() -> None:
    events = Events()
    events.put(child_module.CLOSED)
    events.close()
    events.put(child_module.CLOSED)


@pytest.mark.parametrize("number", child_module.FORWARDED)
def test_a_signal_that_another_thread_gets_is_not_missed(number: signal.Signals) -> None:
    """The kernel may give it to any thread, and the main thread waits without end."""
    with forwarded_signals() as events:
        threading.Thread(target=lambda: signal.pthread_kill(threading.get_ident(), number)).start()
        assert events.get(timeout=60) == number


def test_signals_are_handled_as_before_when_nothing_is_recorded() -> None:
    handlers = [signal.getsignal(number) for number in child_module.FORWARDED]
    ignored = signal.signal(signal.SIGQUIT, signal.SIG_IGN)
    try:
        with forwarded_signals():
            assert signal.getsignal(signal.SIGQUIT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGQUIT, ignored)
    assert [signal.getsignal(number) for number in child_module.FORWARDED] == handlers
    assert signal.set_wakeup_fd(-1) == -1


def test_a_child_that_cannot_be_attended_is_ended(
    events: Events, monkeypatch: pytest.MonkeyPatch
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
    with pytest.raises(RuntimeError), running(["sleep", "80"], events, print):
        pass
    assert started[0].returncode == -signal.SIGKILL
    for pipe in (started[0].stdout, started[0].stderr):
        pipe.close()
