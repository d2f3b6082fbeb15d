"""A child process that is passed through and ended as a whole.

The command runs in a session of its own, so that it and what it starts can
be ended together.  It is over when it has exited and nobody holds its
output open any more, as in a shell's pipeline.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import NamedTuple, Self

from taskstore.cli.lines import LastLine

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""What the recorder passes on to the command when it gets it."""

LINGER_S = 2.0
"""How long to wait, after SIGKILL, for a process that the kernel does not let go."""

LOOK_S = 0.2
"""How often to look whether a group that was told to end is gone."""

CHUNK = 64 * 1024
OUT, ERR = 1, 2


class Event(NamedTuple):
    """Something that happened to the command: exited, closed (a stream), signal, or recorded."""

    kind: str
    number: int = 0


Events = SimpleQueue[Event]
"""What the main thread waits on; other threads put events into it."""


class Ending(NamedTuple):
    """How a command ended: its return code as :mod:`subprocess` has it, and what we did to it.

    ``signal`` is the one that was forwarded, 0 for none.
    """

    returncode: int | None
    timed_out: bool = False
    signal: int = 0


@contextlib.contextmanager
def forwarded_signals(events: Events) -> Iterator[None]:
    """Turn the signals that are to be forwarded into events; those ignored stay ignored.

    A handler in Python runs only when the main thread executes bytecode.  It would
    be missed while the main thread waits, if the signal came just before the wait
    or was delivered to another thread.  The interpreter also writes a signal's
    number into a pipe at once; a thread reads it there.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    threading.Thread(target=_read_signals, args=(reading, events), daemon=True).start()
    wakeup_before = signal.set_wakeup_fd(writing)
    handlers_before = {}
    for number in FORWARDED:
        if signal.getsignal(number) is not signal.SIG_IGN:
            handlers_before[number] = signal.signal(number, lambda *_: None)
    try:
        yield
    finally:
        for number, handler in handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup_before)
        os.close(writing)


def _read_signals(reading: int, events: Events) -> None:
    """Tell of each signal whose number comes out of the pipe, until its other end is closed."""
    with open(reading, "rb", buffering=0) as pipe:
        while numbers := pipe.read(CHUNK):
            for number in numbers:
                if number in FORWARDED:
                    events.put(Event("signal", number))


class Child:
    """One running command.  Used in a ``with`` block, at whose end nothing of it is left.

    ``on_line`` is called from other threads with each last line worth a summary.
    """

    def __init__(
        self, argv: Sequence[str], events: Events, on_line: Callable[[str], object]
    ) -> None:
        self._events = events
        self._on_line = on_line
        self._over = False
        self._process = subprocess.Popen(  # noqa: S603 (running what it is given is its purpose)
            argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        self.pid = self._process.pid
        try:
            self._spawn(self._await_exit)
            self._spawn(self._pass_on, OUT)
            self._spawn(self._pass_on, ERR)
        except BaseException:
            self.__exit__()
            raise

    def attend(self, *, timeout_s: float | None, grace_s: float) -> Ending:
        """Wait until the command is over, ending it at the timeout or when a signal comes.

        Its group gets the signal (SIGTERM at the timeout), after ``grace_s``
        seconds or at a second signal SIGKILL.  When nothing of the group is left,
        whoever still holds its output is waited for only briefly.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        streams, exited, timed_out, forwarded, killed = 2, False, False, 0, False
        while streams or not exited:
            ending = exited and (timed_out or forwarded) and not killed
            if ending and self._group_is_dead():
                killed = True
                deadline = time.monotonic() + LINGER_S
            event, due = self._next(deadline, patient=not ending or killed)
            if event is None and not due:
                continue
            if event is None and killed:
                break  # not even SIGKILL ended it, or another session holds its output
            if event is None and not (timed_out or forwarded):
                timed_out = True
                self.send(signal.SIGTERM)
                deadline = time.monotonic() + grace_s
            elif event is None or (event.kind == "signal" and (timed_out or forwarded)):
                killed = True
                self.send(signal.SIGKILL)
                deadline = time.monotonic() + LINGER_S
            elif event.kind == "signal":
                forwarded = event.number
                self.send(forwarded)
                deadline = time.monotonic() + grace_s
            elif event.kind == "exited":
                exited = True
            elif event.kind == "closed":
                streams -= 1
        if timed_out or forwarded:
            self.send(signal.SIGKILL)  # whoever of the group outlived its leader
        return Ending(self._reap(), timed_out, forwarded)

    def send(self, number: int) -> None:
        """Send a signal to the command and all that it started, but for other sessions."""
        # Its leader is not reaped before the end, so the number cannot be another group's.
        if not self._over:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)
                if number != signal.SIGKILL:
                    os.killpg(self.pid, signal.SIGCONT)  # one that is stopped has to hear it too

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._over:
            self.send(signal.SIGKILL)
            self._reap()

    def _next(self, deadline: float | None, *, patient: bool) -> tuple[Event | None, bool]:
        """The next event, or ``None`` and whether the deadline has passed.

        Who is not patient gets ``None`` after a moment, too.
        """
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not patient:
            timeout = LOOK_S if timeout is None else min(timeout, LOOK_S)
        try:
            return self._events.get(timeout=timeout), False
        except Empty:
            return None, deadline is not None and time.monotonic() >= deadline

    def _group_is_dead(self) -> bool:
        """Whether nothing of the command's group runs any more, as far as ``/proc`` tells."""
        try:
            processes = [name for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208 (names)
        except OSError:
            return False
        return bool(processes) and not any(_runs_in(name, self.pid) for name in processes)

    def _reap(self) -> int | None:
        self._over = True
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(LINGER_S)
        return None

    def _spawn(self, target: Callable[..., None], *args: int) -> None:
        threading.Thread(target=target, args=args, daemon=True).start()

    def _await_exit(self) -> None:
        """Tell when the leader has exited, without reaping it."""
        if hasattr(os, "waitid"):
            # It may be gone already: killed and reaped while this thread began.
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        else:  # macOS before Python 3.13
            self._process.wait()
        self._events.put(Event("exited"))

    def _pass_on(self, sink: int) -> None:
        """Copy one stream as it comes.  When nobody takes it any more it is not read
        any more: the command then gets the SIGPIPE that it would get without us."""
        source = self._process.stdout if sink == OUT else self._process.stderr
        assert source is not None
        last = LastLine()
        with source, contextlib.suppress(OSError):
            while chunk := source.read(CHUNK):
                self._tell(last.feed(chunk))
                _write(sink, chunk)
        self._tell(last.close())
        self._events.put(Event("closed", sink))

    def _tell(self, line: str | None) -> None:
        if line is not None:
            self._on_line(line)


def _runs_in(process: str, group: int) -> bool:
    try:
        stat = Path("/proc", process, "stat").read_bytes()
    except OSError:
        return False
    # Its name, in parentheses, may hold anything.
    state, _, its_group = stat.rpartition(b")")[2].split()[:3]
    return int(its_group) == group and state not in (b"Z", b"X")


def _write(sink: int, chunk: bytes) -> None:
    """Write all of it, also to a descriptor that somebody made non-blocking."""
    rest = memoryview(chunk)
    while rest:
        try:
            rest = rest[os.write(sink, rest) :]
        except BlockingIOError:
            select.select([], [sink], [])
