"""A child process that is passed through and ended as a whole, and the last line it printed.

The command runs in a session of its own, so that it and what it starts can
be ended together.  It is over when it has exited and no process holds its
output open any more, as in a shell's pipeline.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import IO

from taskstore.model.records import SUMMARY_BYTES

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""The signals that the recorder passes on to the command."""

TIMEOUT, CLOSED = 0, 255
"""The events of a time that is over and of a stream that has ended; no signals have these."""

LONGEST_S = 3600.0
"""The longest single wait for an event."""

LINGER_S = 2.0
"""How long to wait, after SIGKILL, for a process that the kernel does not let go."""

LOOK_S = 0.2
"""How often to look whether a group that was told to end is gone."""

KEPT_BYTES = 4 * SUMMARY_BYTES
"""How much of a line is looked at: enough for a summary after colours are removed."""

CHUNK = 64 * 1024
OUT, ERR = 1, 2

# CSI, OSC and the other string sequences, and the two-character ones (ECMA-48).
_TERMINAL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_].*?(?:\x07|\x1b\\|\Z)|\x1b[ -/]*[0-~]", re.DOTALL
)


class Events:
    """A pipe of bytes that the main thread waits for: numbers of signals, and ``CLOSED``."""

    def __init__(self) -> None:
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        self._reading = os.fdopen(reading, "rb", 0)
        self.writing = os.fdopen(writing, "wb", 0)

    def put(self, event: int) -> None:
        """Tell the main thread, from any thread, as long as it still listens."""
        with contextlib.suppress(ValueError):
            self.writing.write(bytes([event]))

    def get(self, timeout: float) -> int | None:
        """The next event, or ``None`` if there is none in time."""
        ready, _, _ = select.select([self._reading], [], [], timeout)
        return self._reading.read(1)[0] if ready else None

    def close(self) -> None:
        """Listen no more."""
        self._reading.close()
        self.writing.close()


@contextlib.contextmanager
def forwarded_signals() -> Iterator[Events]:
    """Turn the signals that are to be forwarded into events; those ignored stay ignored.

    A handler in Python runs only when the main thread executes bytecode.  It would
    be missed while the main thread waits, if the signal came just before the wait
    or was delivered to another thread.  The interpreter also writes a signal's
    number into a pipe at once.  SIGCHLD is an event as well.
    """
    with contextlib.closing(Events()) as events:
        wakeup_before = signal.set_wakeup_fd(events.writing.fileno())
        handlers_before = {}
        for number in (*FORWARDED, signal.SIGCHLD):
            if number == signal.SIGCHLD or signal.getsignal(number) is not signal.SIG_IGN:
                handlers_before[number] = signal.signal(number, lambda *_: None)
        try:
            yield events
        finally:
            for number, handler in handlers_before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup_before)


@contextlib.contextmanager
def running(
    argv: Sequence[str], events: Events, on_line: Callable[[str], object]
) -> Iterator[Child]:
    """Start a command; at the end of the block nothing of it is left.

    ``on_line`` is called from other threads with each last line worth a summary.
    """
    process = subprocess.Popen(  # noqa: S603 (running what it is given is its purpose)
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, start_new_session=True
    )
    child = Child(process, events)
    try:
        for source, sink in ((process.stdout, OUT), (process.stderr, ERR)):
            arguments = (source, sink, events, on_line)
            threading.Thread(target=_pass_on, args=arguments, daemon=True).start()
        yield child
    finally:
        if process.returncode is None:
            child.send(signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LINGER_S)


class Child:
    """One running command, the leader of its group."""

    def __init__(self, process: subprocess.Popen[bytes], events: Events) -> None:
        self.pid = process.pid
        self._process = process
        self._events = events
        self._gone = False

    def attend(self, *, timeout_s: float, grace_s: float) -> tuple[int, int | None]:
        """Wait until the command is over, ending it at the timeout or when a signal comes.

        Its group gets the signal (SIGTERM at the timeout), after ``grace_s``
        seconds or at a second signal SIGKILL.  When nothing of the group is left,
        another process that still holds its output is waited for only briefly.
        Returns its return code as :mod:`subprocess` has it, and why it was told
        to end: ``TIMEOUT``, the number of a signal, or ``None``.
        """
        deadline = time.monotonic() + timeout_s
        streams, cause, killed = 2, None, False
        while streams or self._process.poll() is None:
            if cause is not None and not killed and self._group_is_gone():
                killed, deadline = True, time.monotonic() + LINGER_S
            longest_s = LONGEST_S if cause is None or killed else LOOK_S
            event = self._events.get(max(0.0, min(longest_s, deadline - time.monotonic())))
            if event is None and time.monotonic() >= deadline:
                event = TIMEOUT
            if event == CLOSED:
                streams -= 1
            elif event not in (TIMEOUT, *FORWARDED):
                continue
            elif cause is None:
                cause, deadline = event, time.monotonic() + grace_s
                self.send(event or signal.SIGTERM)
            elif not killed:
                killed, deadline = True, time.monotonic() + LINGER_S
                self.send(signal.SIGKILL)
            elif event == TIMEOUT:
                break  # not even SIGKILL ended it, or another session holds its output
        if cause is not None and not killed:
            self.send(signal.SIGKILL)  # what of the group outlived its leader
        returncode = self._process.poll()
        return -signal.SIGKILL if returncode is None else returncode, cause

    def send(self, number: int) -> None:
        """Send a signal to the command and all that it started, but for other sessions.

        The group keeps its number while the leader is not reaped or any other
        process is in it; once it is found gone nothing is sent to that number.
        """
        if not self._gone:
            try:
                os.killpg(self.pid, number)
                if number in FORWARDED:
                    os.killpg(self.pid, signal.SIGCONT)  # one that is stopped has to hear it too
            except ProcessLookupError:
                self._gone = True
            except PermissionError:
                pass

    def _group_is_gone(self) -> bool:
        """Whether the leader has exited and is reaped, and nothing of its group is left."""
        if self._process.poll() is not None:
            self.send(0)
        return self._gone


def _pass_on(
    source: IO[bytes], sink: int, events: Events, on_line: Callable[[str], object]
) -> None:
    """Copy one stream as it comes.  When nothing takes it any more it is not read
    any more: the command then gets the SIGPIPE that it would get without us."""
    last = LastLine()
    with source, contextlib.suppress(OSError):
        while chunk := source.read(CHUNK):
            if (line := last.feed(chunk)) is not None:
                on_line(line)
            _write(sink, chunk)
    if (line := last.close()) is not None:
        on_line(line)
    events.put(CLOSED)


def _write(sink: int, chunk: bytes) -> None:
    """Write all of it, also to a descriptor that somebody made non-blocking."""
    rest = memoryview(chunk)
    while rest:
        try:
            rest = rest[os.write(sink, rest) :]
        except BlockingIOError:
            select.select([], [sink], [])


def summary_of(line: bytes) -> str:
    """A line of output as a summary: text without colours and controls, not too long."""
    text = " ".join(_TERMINAL.sub("", line.decode(errors="replace")).split())
    printable = (char for char in text if unicodedata.category(char) not in ("Cc", "Cs"))
    return " ".join("".join(printable).encode()[:SUMMARY_BYTES].decode(errors="ignore").split())


class LastLine:
    """Follows one stream of bytes; a carriage return ends a line too, as in progress bars.

    Memory is bounded however long a line gets.
    """

    def __init__(self) -> None:
        self._begun = b""

    def feed(self, chunk: bytes) -> str | None:
        """Take what was printed; returns the last line that it completed, if it says anything."""
        lines, _, begun = (self._begun + chunk).replace(b"\r", b"\n").rpartition(b"\n")
        self._begun = begun[:KEPT_BYTES]
        while lines := lines.rstrip():
            lines, _, line = lines.rpartition(b"\n")
            if summary := summary_of(line[:KEPT_BYTES]):
                return summary
        return None

    def close(self) -> str | None:
        """The stream has ended: returns its last line if that was not completed."""
        return summary_of(self._begun) or None
