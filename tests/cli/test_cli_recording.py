"""The parts of ``taskstore run``, each by itself."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskstore import Change, Commit, Put, StoreUnavailableError
from taskstore.cli import child as child_module
from taskstore.cli.child import Child, Event, Events, forwarded_signals
from taskstore.cli.lines import LastLine, summary_of
from taskstore.cli.recorder import Recorder
from taskstore.cli.run import new_command_record
from taskstore.records import SUMMARY_BYTES
from taskstore.stores.memory import MemoryStore
from taskstore.validation import check_text


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


def finished(store: Faulty, work: Callable[[Recorder], Any], patience_s: float = 5) -> Recorder:
    done = threading.Event()
    recorder = Recorder(store, store.record, done.set)
    work(recorder)
    recorder.finish("succeeded", error=None, exit_status=0, patience_s=patience_s)
    assert done.wait(20)
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


def test_a_store_that_does_not_recover_is_given_up() -> None:
    recorder = finished(Faulty(refusals=10**6), lambda _: None, patience_s=0.3)
    assert not recorder.recorded
    assert isinstance(recorder.failure, StoreUnavailableError)
    assert recorder.record.status == "running"


def test_nothing_of_a_command_outlives_an_exception() -> None:
    with pytest.raises(RuntimeError, match="of ours"), Child(["sleep", "79"], Events(), print) as c:
        raise RuntimeError("of ours")
    with pytest.raises(ProcessLookupError):
        os.killpg(c.pid, 0)


def test_who_comes_too_late_to_see_a_command_end_tells_of_it_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    late: list[Callable[[], None]] = []
    monkeypatch.setattr(
        Child, "_spawn", lambda _, target, *args: late.append(partial(target, *args))
    )
    events = Events()
    with suppress(RuntimeError), Child(["sleep", "78"], events, print):
        raise RuntimeError("before any thread of the child has begun")
    for begin in late:
        begin()
    told = [events.get_nowait().kind for _ in late]
    assert sorted(told) == ["closed", "closed", "exited"]


@pytest.mark.parametrize("number", child_module.FORWARDED)
def test_a_signal_that_another_thread_gets_is_not_missed(number: signal.Signals) -> None:
    """The kernel may give it to any thread, and the main thread waits without end."""
    events = Events()
    with forwarded_signals(events):
        threading.Thread(target=lambda: signal.pthread_kill(threading.get_ident(), number)).start()
        assert events.get(timeout=60) == Event("signal", number)


def test_signals_are_handled_as_before_when_nothing_is_recorded() -> None:
    handlers = [signal.getsignal(number) for number in child_module.FORWARDED]
    ignored = signal.signal(signal.SIGQUIT, signal.SIG_IGN)
    try:
        with forwarded_signals(Events()):
            assert signal.getsignal(signal.SIGQUIT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGQUIT, ignored)
    assert [signal.getsignal(number) for number in child_module.FORWARDED] == handlers
    assert signal.set_wakeup_fd(-1) == -1


def test_a_child_that_cannot_be_attended_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    popen = child_module.subprocess.Popen

    def noting(*args: Any, **options: Any) -> Any:
        started.append(popen(*args, **options))
        return started[-1]

    def no_threads(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(child_module.subprocess, "Popen", noting)
    monkeypatch.setattr(Child, "_spawn", no_threads)
    with pytest.raises(RuntimeError):
        Child(["sleep", "80"], Events(), print)
    assert started[0].returncode == -signal.SIGKILL
    for pipe in (started[0].stdout, started[0].stderr):
        pipe.close()
