"""[4] Power loss on SQLite: every crash state contains all acknowledged changes.

``TASKSTORE_POWER_STATES`` sets the number of rounds (default 12); ``make soak`` sets more.
"""

from __future__ import annotations

import os
import random

from taskstore import open_store
from taskstore.testing.factories import Model
from taskstore.testing.powerloss.expected import Expected
from taskstore.testing.powerloss.sqlite import (
    NAME,
    Files,
    check_files,
    crash_states,
    make_engine,
    plan_commits,
    survey_sqlite,
)

STATES = int(os.environ.get("TASKSTORE_POWER_STATES", "12"))


def test_no_acknowledged_change_is_lost(tmp_path, report):
    found = survey_sqlite(tmp_path, rounds=max(STATES // 12, 1), commits=14, max_states=3)
    report("power loss, the SQLite store", found)
    assert not found.problems
    assert found.opened.total() > 50
    assert len(found.opened) == 5, "commits, WAL restarts and checkpoints must all occur"


def test_an_impossible_state_is_a_problem(tmp_path):
    """A lost acknowledged commit, and a database that is half of another one."""
    path, model, history = tmp_path / NAME, Model(), []
    for batch in plan_commits(random.Random(1), 6):
        with open_store(f"sqlite:///{path}") as store:
            store.apply(batch)
        model.commit(batch)
        history.append(Files.of(path))
    assert check_files(history[-1], [Expected(model)]) is None
    assert "allowed: " in check_files(history[-2], [Expected(model)])
    old, new = history[1].database, history[-1].database
    half = len(old) // 2
    assert check_files(Files(new[:half] + old[half:], b""), [Expected(model)]) is not None


def test_the_engine_of_the_writer_checkpoints_and_syncs(tmp_path):
    open_store(f"sqlite:///{tmp_path / NAME}").close()
    engine = make_engine(tmp_path / NAME)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA wal_autocheckpoint").scalar() == 40
    engine.dispose()


def test_crash_states_are_mixtures_of_written_blocks():
    rng = random.Random(1)
    before = Files(b"d" * 4096, b"h" * 32 + b"a" * 2000)
    after = Files(b"d" * 4096, b"h" * 32 + b"a" * 2000 + b"b" * 3000)
    found = [state.files for state in crash_states(before, after, max_states=30, rng=rng)]
    assert len(set(found)) > 20
    assert {files.database for files in found} == {before.database}
    assert all(files.wal.startswith(before.wal) for files in found)
    assert max(len(files.wal) for files in found) == len(after.wal)


def test_a_restarted_wal_without_frames():
    before = Files(b"d" * 4096, b"h" * 32 + b"a" * 2000)
    after = Files(b"d" * 4096, b"g" * 32 + b"a" * 2000)
    rng = random.Random(1)
    found = [state.files for state in crash_states(before, after, max_states=30, rng=rng)]
    assert set(found) == {before, after}
