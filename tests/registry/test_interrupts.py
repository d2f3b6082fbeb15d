"""Interrupts, such as Ctrl-C, at every moment: no lock stays locked."""

from __future__ import annotations

import dis
import fcntl
import gc
import math
import os
import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest

import taskstore
from taskstore import TaskRegistry
from taskstore.stores.memory import MemoryStore
from taskstore.stores.sql.sqlite_library import sqlite_module
from taskstore.testing import make_put, removal_of

# After an interrupt between open() and its with, the garbage collector closes the file;
# Python ignores an interrupt in a __del__.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in.*FileIO")

HOME = str(Path(taskstore.__file__).parent)
# CALL_KW is of Python 3.13 and newer.
CALLS = {dis.opmap[name] for name in ("CALL", "CALL_FUNCTION_EX", "CALL_KW") if name in dis.opmap}


class Interrupted(BaseException):
    """What a signal handler raises."""


class Interrupter:
    """Raises at one of the moments at which CPython checks for signals, counted from 1.

    That is when a function begins, and after each call, in the package's own code.
    """

    def __init__(self, moment):
        self.moment = moment
        self.count = 0
        self.where = None
        self._before = {}

    def __call__(self, frame, kind, _):
        code = frame.f_code
        if not code.co_filename.startswith(HOME):
            return None
        if kind == "call":
            # Python 3.13 respects f_trace_opcodes only for a frame that is already traced.
            frame.f_trace = self
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            self._tick(frame)
        elif kind == "opcode":
            before = self._before.get(frame)
            if before is not None and code.co_code[before] in CALLS:
                self._tick(frame)
            self._before[frame] = frame.f_lasti
        return self

    def _tick(self, frame):
        self.count += 1
        if self.count == self.moment:
            sys.settrace(None)
            self._before.clear()
            self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            raise Interrupted


def struck(moment, work):
    """Call ``work``, interrupt it at a moment, and return where; ``None`` if it ended before."""
    interrupter, before = Interrupter(moment), sys.gettrace()
    # Python 3.12 traces opcodes only if a frame requests it before the tracing starts.
    sys._getframe().f_trace_opcodes = True
    sys.settrace(interrupter)
    try:
        work()
    except Interrupted:
        pass
    finally:
        sys.settrace(before)
    return interrupter.where


SAMPLE = """\
def inner(*args, **options):
    return args
class Manager:
    def __enter__(self):
        return self
    def __exit__(self, *error):
        return None
def work():
    inner()
    inner(*(1, 2))
    inner(x=1)
    with Manager():
        len("abc")
    "a".upper()
"""


def test_the_moments_are_the_same_on_every_python():
    """The start of a function and the end of a call, by lines of the sample."""
    names = {}
    exec(compile(SAMPLE, f"{HOME}/sample.py", "exec"), names)
    lines, moment = [], 1
    while where := struck(moment, names["work"]):
        lines.append(int(where.rpartition(":")[2]))
        moment += 1
    assert lines == [8, 1, 9, 1, 10, 1, 11, 12, 4, 13, 6, 12, 14]


def check_no_foreign_tables(path):
    """Raise if another process could not write now: it shares no lock with our threads."""
    if not path.exists():
        return  # the memory of this process
    if path.is_dir():
        directory = os.open(path, os.O_RDONLY)  # the writers lock the directory
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(directory)
    else:
        connection = sqlite_module().connect(path, timeout=0, isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
        connection.close()


@pytest.mark.parametrize("contended", [False, True], ids=["lone", "contended"])
@pytest.mark.parametrize("url", ["sqlite:///", "json:///", "memory:"])
def test_an_interrupt_at_any_moment_leaves_no_lock(url, contended, tmp_path):
    heard, moment, where = [], 0, ""
    place = f"{tmp_path}/ledger" if url.endswith("/") else ""
    registry = TaskRegistry.open(url + place, durability="process")
    # Not in a ``with``: a registry whose lock is held does not close either.
    registry.hooks.add(heard.append)
    task_id = registry.create(runtime="cli", task="x", status="running").task_id
    if contended:
        registry._committer._contended_until = math.inf
    while where is not None:
        moment += 1
        text = f"change {moment}"
        where = struck(moment, lambda text=text: registry.record_progress(task_id, text))
        assert gc.isenabled(), f"interrupted at {where}, the garbage collector stays off"
        check_no_foreign_tables(tmp_path / "ledger")
        stored = registry.store.load_snapshot().records
        assert registry.get(task_id) == stored[task_id], f"interrupted at {where}, memory is wrong"
        after = threading.Thread(
            target=registry.record_progress, args=(task_id, f"after {moment}"), daemon=True
        )
        after.start()
        after.join(20)
        assert not after.is_alive(), f"interrupted at {where}, the next caller deadlocks"
        assert registry.get(task_id).progress_summary == f"after {moment}", where
        assert heard[-1].seq == registry.seq, f"interrupted at {where}, hooks get no event"
        stored = registry.store.load_snapshot().records
        assert stored == {record.task_id: record for record in registry.list()}, where
    assert not registry.store.verify().problems
    for before, event in pairwise(heard):
        # An interrupted change may cause a reload; all other events come once and in order.
        assert event.kind == "restored" or event.seq == before.seq + 1
    registry.close()
    assert moment > 100


def test_an_interrupt_during_refresh_skips_no_commit(tmp_path):
    url, heard, moment, where = f"sqlite:///{tmp_path}/ledger", [], 0, ""
    with (
        TaskRegistry.open(url, durability="process") as other,
        TaskRegistry.open(url, durability="process", hooks=[heard.append]) as registry,
    ):
        while where is not None:
            moment += 1
            task = other.create(runtime="cli", task="x", label=f"{moment}", owner_key="o")
            other.mark_running(task.task_id)
            where = struck(moment, registry.refresh)
            registry.refresh()
            stored = registry.store.load_snapshot().records
            assert stored == {record.task_id: record for record in registry.list()}, where
            assert registry.summary().by_status == {"running": len(stored)}, where
            assert heard[-1].seq == registry.seq, f"interrupted at {where}, hooks get no event"
        for before, event in pairwise(heard):
            assert event.kind == "restored" or event.seq == before.seq + 1
    assert moment > 50


def test_an_interrupted_batch_is_stored_completely_or_not(tmp_path):
    store, moment, where = MemoryStore(), 0, ""
    while where is not None:
        moment += 1
        one, two = make_put(run_id=f"r{moment}", run_digest="b"), make_put()
        before = store.apply([one]).last_seq
        changes = [removal_of(one.record), make_put(run_id=f"r{moment}", run_digest="b"), two]
        where = struck(moment, lambda changes=changes: store.apply(changes))
        assert store.head() in (before, before + 3), where
        assert not store.verify().problems, where
        there = two.task_id in store.load_snapshot().records
        assert there == (store.head() == before + 3), where
    assert moment > 20
