"""Operating system faults at every file call of a store.

While :class:`Files` is installed, it replaces functions of :mod:`os` and
:mod:`fcntl` and the built-in ``open``.  The replacements
pass calls on files below the directory ``root`` to the injection point, and pass all
other calls directly to the original functions.
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

from taskstore.testing.crash.processes import DURABLE_CALLS
from taskstore.testing.faults.injection import DELAY, Call, Fault, Inject, InjectionPoint, Step

_BY_PATH = ("link", "listdir", "mkdir", "open", "remove", "rename", "replace", "rmdir", "scandir",
            "stat", "truncate", "unlink")  # fmt: skip
_BY_DESCRIPTOR = ("close", "fchmod", "fchown", "fdatasync", "fstat", "fsync", "ftruncate", "pread",
                  "pwrite", "read", "write", "writev")  # fmt: skip
_WRITES = ("pwrite", "write")
_SYNCS = ("fdatasync", "fsync", "fcntl")
_VARYING = re.compile(r"(?<=taskstore-contract-).*|[0-9]+")
"""Matches the parts of a file name that are different in each run."""

_READ_BUFFER = io.DEFAULT_BUFFER_SIZE


class Files:
    """Passes the calls on files below a directory to an injection point."""

    def __init__(self, injection: InjectionPoint, root: str) -> None:
        self._injection = injection
        self._root = root.rstrip("/") + "/"
        self._paths: dict[int, str] = {}
        self._created: dict[str, int] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replace the file functions of Python while the ``with`` body runs."""
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
                stack.enter_context(mock.patch.object(module, "open", self._wrap_open(io.open)))
            yield

    def _by_path(self, name: str, real: Call) -> Call:
        def call(path: Any = ".", *arguments: Any, **options: Any) -> Any:
            target = self._below_root(path) if name == "open" or self._injection.is_active else None
            if target is None:
                return real(path, *arguments, **options)
            if not self._injection.is_active:
                self._paths[result := real(path, *arguments, **options)] = target
                return result
            new = name == "mkdir" or (name == "open" and arguments and arguments[0] & os.O_CREAT)
            if new and not os.path.lexists(target):
                self._created[target] = self._injection.activation
            result = self._injection.run_step(
                self._step(name, target), lambda *a: real(*a, **options), path, *arguments
            )
            if name == "open":
                self._paths[result] = target
            return result

        return call

    def _by_descriptor(self, name: str, real: Call) -> Call:
        def call(descriptor: Any, *arguments: Any, **options: Any) -> Any:
            target = self._paths.get(descriptor) if isinstance(descriptor, int) else None
            if target is None:
                return real(descriptor, *arguments, **options)
            if name == "close":
                del self._paths[descriptor]
            if not self._injection.is_active:
                return real(descriptor, *arguments, **options)
            return self._injection.run_step(
                self._step(name, target), lambda *a: real(*a, **options), descriptor, *arguments
            )

        return call

    def _wrap_open(self, real: Call) -> Call:
        def call(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **more: Any) -> Any:
            is_descriptor = isinstance(file, int)
            target = None
            if self._injection.is_active:
                target = self._paths.get(file) if is_descriptor else self._below_root(file)
            if target is None:
                return real(file, mode, buffering, *rest, **more)
            if not is_descriptor and not os.path.lexists(target):
                self._created[target] = self._injection.activation
            raw_mode = mode.replace("b", "").replace("t", "")

            def make() -> _RawFile:
                return _RawFile(self, target, file, raw_mode, more.get("opener"))

            raw = make() if is_descriptor else self.run_step("open", target, make)
            self._paths[raw.fileno()] = target
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

        return call

    def run_step(self, name: str, target: str, call: Call, *arguments: Any) -> Any:
        """Pass a call on a file to the injection point."""
        return self._injection.run_step(self._step(name, target), call, *arguments)

    def forget(self, descriptor: int) -> None:
        """Remove a closed file descriptor from the map of descriptors to paths."""
        self._paths.pop(descriptor, None)

    def _below_root(self, path: Any) -> str | None:
        if isinstance(path, int):
            return self._paths.get(path)
        try:
            target = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 - pathlib uses these calls
        except (TypeError, ValueError):
            return None
        return target if target.startswith(self._root) else None

    def _step(self, name: str, target: str) -> Step:
        detail = _VARYING.sub("#", os.path.basename(target))  # noqa: PTH119 - as above
        return Step(name, detail, target, self._created.get(target) == self._injection.activation)


class _RawFile(io.FileIO):
    """A file object that passes its reads and writes to the injection point."""

    def __init__(
        self, files: Files, target: str, file: Any, mode: str, opener: Callable[..., int] | None
    ) -> None:
        super().__init__(file, mode, opener=opener)
        self._files = files
        self._target = target

    def write(self, data: Any) -> Any:
        return self._files.run_step("write", self._target, super().write, data)

    def readinto(self, buffer: Any) -> Any:
        return self._files.run_step("read", self._target, super().readinto, buffer)

    def readall(self) -> bytes:
        data: bytes = self._files.run_step("read", self._target, super().readall)
        return data

    def close(self) -> None:
        if not self.closed:
            self._files.forget(self.fileno())
        super().close()


# -- the faults ----------------------------------------------------------------


def _error(number: int, step: Step) -> OSError:
    return OSError(number, os.strerror(number), step.resource)


def _fail_before(number: int) -> Inject:
    def inject(step: Step, call: Call, arguments: tuple[Any, ...]) -> Any:
        if step.name == "close":  # even a failed close releases the descriptor
            call(*arguments)
        raise _error(number, step)

    return inject


def _fail_after(number: int) -> Inject:
    def inject(step: Step, call: Call, arguments: tuple[Any, ...]) -> Any:
        result = call(*arguments)
        if step.name == "open":  # a failed open leaves no open file
            (result.close if hasattr(result, "close") else lambda: os.close(result))()
        elif step.name == "scandir":
            result.close()
        raise _error(number, step)

    return inject


def _short_write(step: Step, call: Call, arguments: tuple[Any, ...]) -> Any:
    """Write only half of the data, and return the number of written bytes."""
    position = 1 if step.name == "pwrite" or len(arguments) > 1 else 0
    data = memoryview(arguments[position])
    shorter = data[: max(1, len(data) // 2)]
    return call(*arguments[:position], shorter, *arguments[position + 1 :])


def _short_write_then_full(step: Step, call: Call, arguments: tuple[Any, ...]) -> Any:
    _short_write(step, call, arguments)
    raise _error(errno.ENOSPC, step)


def _may_persist(step: Step) -> bool:
    return step.name in DURABLE_CALLS or step.name in {"open", "mkdir"}


def _may_persist_no_write(step: Step) -> bool:
    # A write that has written bytes cannot fail with EINTR: it returns the number of bytes.
    return _may_persist(step) and step.name not in {*_WRITES, "writev"}


def _writes(step: Step) -> bool:
    return step.name in _WRITES


def _syncs(step: Step) -> bool:
    return step.name in _SYNCS


def _not_close(step: Step) -> bool:
    return step.name != "close"


FAULTS: Sequence[Fault] = (
    Fault("ENOSPC", "before", _fail_before(errno.ENOSPC), _may_persist, _syncs),
    Fault("ENOSPC", "after", _fail_after(errno.ENOSPC), _may_persist, _syncs),
    Fault("EIO", "before", _fail_before(errno.EIO), fails_sync=_syncs),
    Fault("EIO", "after", _fail_after(errno.EIO), _may_persist, _syncs),
    Fault(
        "EIO, persistent", "before", _fail_before(errno.EIO), _not_close, _syncs, persistent=True
    ),
    Fault("EINTR", "before", _fail_before(errno.EINTR), _not_close),
    Fault("EINTR", "after", _fail_after(errno.EINTR), _may_persist_no_write),
    Fault("short", "", _short_write, _writes),
    Fault("short, then ENOSPC", "", _short_write_then_full, _writes),
    DELAY,
)
