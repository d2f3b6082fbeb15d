"""The child process that runs a command: its output and its signals.

The command runs in a session of its own, so that one signal reaches the command and its child
processes.  The command counts as ended when the command has exited and no process has the
command's output open.  A shell uses the same rule for a pipeline.
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
"""The signals that ``taskstore run`` forwards to the command."""

TIMEOUT, CLOSED = 0, 255
"""Items of a :class:`SignalQueue` for an expired timeout and for a closed stream; no signal has
these numbers."""

MAX_WAIT_S = 3600.0
"""The longest single wait for an item of a :class:`SignalQueue`, in seconds."""

KILL_TIMEOUT_S = 2.0
"""The maximum wait for the end of a process after SIGKILL, in seconds."""

POLL_S = 0.2
"""The interval between two checks whether a process group has ended, in seconds."""

MAX_LINE_BYTES = 4 * SUMMARY_BYTES
"""The size to which an output line is truncated before colours are removed."""

CHUNK_BYTES = 64 * 1024
OUT, ERR = 1, 2

# ECMA-48 escape sequences: CSI sequences, OSC and other strings, two-character sequences.
_ESCAPE_SEQUENCES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_].*?(?:\x07|\x1b\\|\Z)|\x1b[ -/]*[0-~]", re.DOTALL
)


class SignalQueue:
    """A pipe from which the main thread reads bytes: signal numbers and ``CLOSED``."""

    def __init__(self) -> None:
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        self._reading = os.fdopen(reading, "rb", 0)
        self.writing = os.fdopen(writing, "wb", 0)

    def put(self, item: int) -> None:
        """Add an item, from any thread; a closed queue ignores the item."""
        with contextlib.suppress(ValueError):
            self.writing.write(bytes([item]))

    def get(self, timeout: float) -> int | None:
        """Return the next item, or ``None`` if no item arrives before the timeout."""
        ready, _, _ = select.select([self._reading], [], [], timeout)
        return self._reading.read(1)[0] if ready else None

    def close(self) -> None:
        """Close both ends of the pipe."""
        self._reading.close()
        self.writing.close()


@contextlib.contextmanager
def forwarded_signals() -> Iterator[SignalQueue]:
    """Yield a queue that gets the number of each received signal.

    A signal that this process ignores stays ignored.

    A Python signal handler runs only when the main thread executes bytecode.  If
    a signal arrives just before the main thread waits, or in another thread, the
    handler runs too late to end the wait of the main thread.  The interpreter therefore writes the
    signal's number into the queue's pipe at once.
    """
    with contextlib.closing(SignalQueue()) as queue:
        wakeup_before = signal.set_wakeup_fd(queue.writing.fileno())
        handlers_before = {}
        for number in (*FORWARDED, signal.SIGCHLD):
            if number == signal.SIGCHLD or signal.getsignal(number) is not signal.SIG_IGN:
                handlers_before[number] = signal.signal(number, lambda *_: None)
        try:
            yield queue
        finally:
            for number, handler in handlers_before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup_before)


@contextlib.contextmanager
def running_child(
    argv: Sequence[str], queue: SignalQueue, on_line: Callable[[str], object]
) -> Iterator[Child]:
    """Start a command and yield its :class:`Child`; at the block's end, kill a command that still
    runs.

    When output arrives, another thread calls ``on_line`` with a summary of the newest line.
    """
    process = subprocess.Popen(  # noqa: S603 (the user gives the command to run)
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, start_new_session=True
    )
    child = Child(process, queue)
    try:
        for source, sink in ((process.stdout, OUT), (process.stderr, ERR)):
            arguments = (source, sink, queue, on_line)
            threading.Thread(target=_copy_stream, args=arguments, daemon=True).start()
        yield child
    finally:
        if process.returncode is None:
            child.send_signal(signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(KILL_TIMEOUT_S)


class Child:
    """One running command, whose process leads a process group."""

    def __init__(self, process: subprocess.Popen[bytes], queue: SignalQueue) -> None:
        self.pid = process.pid
        self._process = process
        self._queue = queue
        self._gone = False

    def wait(self, *, timeout_s: float, grace_s: float) -> tuple[int, int | None]:
        """Wait until the command has ended; stop the command at the timeout or at a signal.

        If this process gets a forwarded signal, the process group gets the same signal; at the
        timeout, the group gets SIGTERM.  ``grace_s`` seconds later or at a second signal, the
        group gets SIGKILL.  If the group has ended but another process has the output open, the
        method waits at most ``KILL_TIMEOUT_S`` seconds longer.  Returns the return code as
        :mod:`subprocess` defines it, and the reason for the stop: ``TIMEOUT``, a signal
        number, or ``None`` if the command ended by itself.
        """
        deadline = time.monotonic() + timeout_s
        streams, cause, killed = 2, None, False
        while streams or self._process.poll() is None:
            if cause is not None and not killed and self._group_is_gone():
                killed, deadline = True, time.monotonic() + KILL_TIMEOUT_S
            longest_s = MAX_WAIT_S if cause is None or killed else POLL_S
            item = self._queue.get(max(0.0, min(longest_s, deadline - time.monotonic())))
            if item is None and time.monotonic() >= deadline:
                item = TIMEOUT
            if item == CLOSED:
                streams -= 1
            elif item not in (TIMEOUT, *FORWARDED):
                continue
            elif cause is None:
                cause, deadline = item, time.monotonic() + grace_s
                self.send_signal(item or signal.SIGTERM)
            elif not killed:
                killed, deadline = True, time.monotonic() + KILL_TIMEOUT_S
                self.send_signal(signal.SIGKILL)
            elif item == TIMEOUT:
                break  # SIGKILL had no effect, or another session has the output open
        if cause is not None and not killed:
            self.send_signal(signal.SIGKILL)  # processes of the group can outlive the leader
        returncode = self._process.poll()
        return -signal.SIGKILL if returncode is None else returncode, cause

    def send_signal(self, number: int) -> None:
        """Send a signal to the process group of the command.

        The kernel can reuse the group's number after the leader was reaped and all processes
        of the group have ended.  After the kernel has reported that the group does
        not exist, the method sends no more signals.
        """
        if not self._gone:
            try:
                os.killpg(self.pid, number)
                if number in FORWARDED:
                    os.killpg(self.pid, signal.SIGCONT)  # a stopped process handles no signals
            except ProcessLookupError:
                self._gone = True
            except PermissionError:
                pass

    def _group_is_gone(self) -> bool:
        """Return whether the leader was reaped and all processes of the group have ended."""
        if self._process.poll() is not None:
            self.send_signal(0)
        return self._gone


def _copy_stream(
    source: IO[bytes], sink: int, queue: SignalQueue, on_line: Callable[[str], object]
) -> None:
    """Copy the source to the sink as data arrives.  If the sink is closed, close the source.  The
    command then gets SIGPIPE when the command writes, as it would without ``taskstore run``."""
    last = LastLine()
    with source, contextlib.suppress(OSError):
        while chunk := source.read(CHUNK_BYTES):
            if (line := last.feed(chunk)) is not None:
                on_line(line)
            _write_all(sink, chunk)
    if (line := last.close()) is not None:
        on_line(line)
    queue.put(CLOSED)


def _write_all(sink: int, chunk: bytes) -> None:
    """Write a whole chunk to ``sink``, which can be a non-blocking descriptor."""
    rest = memoryview(chunk)
    while rest:
        try:
            rest = rest[os.write(sink, rest) :]
        except BlockingIOError:
            select.select([], [sink], [])


def summarize_line(line: bytes) -> str:
    """Return a summary of an output line, without colours and control characters."""
    text = " ".join(_ESCAPE_SEQUENCES.sub("", line.decode(errors="replace")).split())
    printable = (char for char in text if unicodedata.category(char) not in ("Cc", "Cs"))
    return " ".join("".join(printable).encode()[:SUMMARY_BYTES].decode(errors="ignore").split())


class LastLine:
    """Finds the newest line of a byte stream; a line ends at a newline or carriage return.

    The memory use is bounded, even for very long lines.
    """

    def __init__(self) -> None:
        self._partial = b""

    def feed(self, chunk: bytes) -> str | None:
        """Add output; return a summary of the newest complete line with text, else ``None``."""
        lines, _, partial = (self._partial + chunk).replace(b"\r", b"\n").rpartition(b"\n")
        self._partial = partial[:MAX_LINE_BYTES]
        while lines := lines.rstrip():
            lines, _, line = lines.rpartition(b"\n")
            if summary := summarize_line(line[:MAX_LINE_BYTES]):
                return summary
        return None

    def close(self) -> str | None:
        """Return a summary of the incomplete line at the stream's end; ``None`` if it has no
        text."""
        return summarize_line(self._partial) or None
