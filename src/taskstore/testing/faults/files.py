"""Faults of the operating system: every call that a store makes on its files.

The functions of :mod:`os` and :mod:`fcntl` and the built-in ``open`` are
replaced while :class:`Files` is entered.  What concerns files below ``root``
goes through the door; everything else goes on as if nothing were there.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from taskstore.testing.crash.processes import STEPS
from taskstore.testing.faults.door import DELAY, Call, Door, Fault, Step

_BY_PATH = ("link", "listdir", "mkdir", "open", "remove", "rename", "replace", "rmdir", "scandir",
            "stat", "truncate", "unlink")  # fmt: skip
_BY_DESCRIPTOR = ("close", "fdatasync", "fstat", "fsync", "ftruncate", "pread", "pwrite", "read",
                  "write", "writev")  # fmt: skip
_WRITES = ("pwrite", "write")
_SYNCS = ("fdatasync", "fsync", "fcntl")
_VARYING = re.compile(r"(?<=taskstore-contract-).*|[0-9]+")
"""What of a file's name is different every time."""

_READ_BUFFER = io.DEFAULT_BUFFER_SIZE


class Files:
    """Takes what is done to the files below a directory through a door."""

    def __init__(self, door: Door, root: str) -> None:
        self._door = door
        self._root = root.rstrip("/") + "/"
        self._paths: dict[int, str] = {}
        self._born: dict[str, int] = {}

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Replace the functions while the body runs."""
        with ExitStack() as stack:
            for names, wrap in ((_BY_PATH, self._by_path), (_BY_DESCRIPTOR, self._by_descriptor)):
                for name in names:
                    if hasattr(os, name):
                        wrapped = wrap(name, getattr(os, name))
                        stack.enter_context(mock.patch.object(os, name, wrapped))
            for name in ("flock", "fcntl"):
                wrapped = self._by_descriptor(name, getattr(fcntl, name))
                stack.enter_context(mock.patch.object(fcntl, name, wrapped))
            for module in (builtins, io):
                stack.enter_context(mock.patch.object(module, "open", self._opening(io.open)))
            yield

    def _by_path(self, name: str, real: Call) -> Call:
        def call(path: Any = ".", *arguments: Any, **options: Any) -> Any:
            where = self._below(path) if name == "open" or self._door.is_open else None
            if where is None:
                return real(path, *arguments, **options)
            if not self._door.is_open:
                self._paths[result := real(path, *arguments, **options)] = where
                return result
            new = name == "mkdir" or (name == "open" and arguments and arguments[0] & os.O_CREAT)
            if new and not os.path.lexists(where):
                self._born[where] = self._door.life
            result = self._door.through(
                self._step(name, where), lambda *a: real(*a, **options), path, *arguments
            )
            if name == "open":
                self._paths[result] = where
            return result

        return call

    def _by_descriptor(self, name: str, real: Call) -> Call:
        def call(descriptor: Any, *arguments: Any, **options: Any) -> Any:
            where = self._paths.get(descriptor) if isinstance(descriptor, int) else None
            if where is None:
                return real(descriptor, *arguments, **options)
            if name == "close":
                del self._paths[descriptor]
            if not self._door.is_open:
                return real(descriptor, *arguments, **options)
            return self._door.through(
                self._step(name, where), lambda *a: real(*a, **options), descriptor, *arguments
            )

        return call

    def _opening(self, real: Call) -> Call:
        def opening(
            file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **more: Any
        ) -> Any:
            known = isinstance(file, int)
            where = None
            if self._door.is_open:
                where = self._paths.get(file) if known else self._below(file)
            if where is None:
                return real(file, mode, buffering, *rest, **more)
            if not known and not os.path.lexists(where):
                self._born[where] = self._door.life
            raw_mode = mode.replace("b", "").replace("t", "")

            def make() -> _RawFile:
                return _RawFile(self, where, file, raw_mode, more.get("opener"))

            raw = make() if known else self._door.through(self._step("open", where), make)
            self._paths[raw.fileno()] = where
            if buffering == 0:
                return raw
            size = buffering if buffering > 1 else _READ_BUFFER
            buffered: Any = (
                io.BufferedRandom(raw, size)
                if "+" in mode
                else io.BufferedReader(raw, size)
                if "r" in mode
                else io.BufferedWriter(raw, size)
            )
            return buffered if "b" in mode else io.TextIOWrapper(buffered, *rest, **more)

        return opening

    def through(self, name: str, where: str, call: Call, *arguments: Any) -> Any:
        """Take a call on an open file through the door."""
        return self._door.through(self._step(name, where), call, *arguments)

    def forget(self, descriptor: int) -> None:
        """Note that a descriptor was closed."""
        self._paths.pop(descriptor, None)

    def _below(self, path: Any) -> str | None:
        if isinstance(path, int):
            return self._paths.get(path)
        try:
            where = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 - what pathlib calls ends here
        except (TypeError, ValueError):
            return None
        return where if where.startswith(self._root) else None

    def _step(self, name: str, where: str) -> Step:
        about = _VARYING.sub("#", os.path.basename(where))  # noqa: PTH119 - as above
        return Step(name, about, where, self._born.get(where) == self._door.life)


class _RawFile(io.FileIO):
    """A file that ``open`` has opened, whose reads and writes are steps."""

    def __init__(
        self, files: Files, where: str, file: Any, mode: str, opener: Callable[..., int] | None
    ) -> None:
        super().__init__(file, mode, opener=opener)
        self._files = files
        self._where = where

    def write(self, data: Any) -> Any:
        return self._files.through("write", self._where, super().write, data)

    def readinto(self, buffer: Any) -> Any:
        return self._files.through("read", self._where, super().readinto, buffer)

    def readall(self) -> bytes:
        found: bytes = self._files.through("read", self._where, super().readall)
        return found

    def close(self) -> None:
        if not self.closed:
            self._files.forget(self.fileno())
        super().close()


# -- what can go wrong ---------------------------------------------------------


def _error(number: int, step: Step) -> OSError:
    return OSError(number, os.strerror(number), step.on)


def _instead(number: int) -> Callable[[Step, Call, tuple[Any, ...]], Any]:
    def strike(step: Step, call: Call, arguments: tuple[Any, ...]) -> Any:
        if step.name == "close":  # the descriptor is gone, whatever close says
            call(*arguments)
        raise _error(number, step)

    return strike


def _afterwards(number: int) -> Callable[[Step, Call, tuple[Any, ...]], Any]:
    def strike(step: Step, call: Call, arguments: tuple[Any, ...]) -> Any:
        result = call(*arguments)
        if step.name == "open":  # an open that fails gives nobody a descriptor
            (result.close if hasattr(result, "close") else lambda: os.close(result))()
        elif step.name == "scandir":
            result.close()
        raise _error(number, step)

    return strike


def _half(step: Step, call: Call, arguments: tuple[Any, ...]) -> Any:
    """Write half of the data, and say so."""
    position = 1 if step.name == "pwrite" or len(arguments) > 1 else 0
    data = memoryview(arguments[position])
    shorter = data[: max(1, len(data) // 2)]
    return call(*arguments[:position], shorter, *arguments[position + 1 :])


def _torn(step: Step, call: Call, arguments: tuple[Any, ...]) -> Any:
    _half(step, call, arguments)
    raise _error(errno.ENOSPC, step)


def _durable(step: Step) -> bool:
    return step.name in STEPS or step.name in {"open", "mkdir"}


def _durable_but_writing(step: Step) -> bool:
    # A write that is interrupted has written nothing, or says how much it has.
    return _durable(step) and step.name not in {*_WRITES, "writev"}


def _writes(step: Step) -> bool:
    return step.name in _WRITES


def _syncs(step: Step) -> bool:
    return step.name in _SYNCS


def _closes_not(step: Step) -> bool:
    return step.name != "close"


FAULTS: Sequence[Fault] = (
    Fault("ENOSPC", "before", _instead(errno.ENOSPC), _durable, _syncs),
    Fault("ENOSPC", "after", _afterwards(errno.ENOSPC), _durable, _syncs),
    Fault("EIO", "before", _instead(errno.EIO), grave=_syncs),
    Fault("EIO", "after", _afterwards(errno.EIO), _durable, _syncs),
    Fault("EIO stays", "before", _instead(errno.EIO), _closes_not, _syncs, stays=True),
    Fault("EINTR", "before", _instead(errno.EINTR), _closes_not),
    Fault("EINTR", "after", _afterwards(errno.EINTR), _durable_but_writing),
    Fault("short", "", _half, _writes),
    Fault("short, then ENOSPC", "", _torn, _writes),
    DELAY,
)
