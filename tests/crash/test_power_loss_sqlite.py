"""[4] The power is lost on SQLite: what its protocol may leave holds what was acknowledged.

``TASKSTORE_POWER_STATES`` sets how much is done (default 12); ``make soak`` sets more.
"""

from __future__ import annotations

import os
import random

from taskstore import open_store
from taskstore.testing.factories import Model
from taskstore.testing.powerloss.sqlite import (
    NAME,
    Files,
    engine_of,
    look,
    plan,
    states,
    survey_sqlite,
)
from taskstore.testing.powerloss.survival import Known

STATES = int(os.environ.get("TASKSTORE_POWER_STATES", "12"))


def test_nothing_acknowledged_is_lost_to_power(tmp_path, report):
    found = survey_sqlite(tmp_path, rounds=max(STATES // 12, 1), commits=14, most=3)
    report("power loss, the SQLite store", found)
    assert not found.problems
    assert found.opened.total() > 50
    assert len(found.opened) == 5, "commits, new logs and checkpoints were all met"


def test_what_may_not_be_left_is_noticed(tmp_path):
    """An acknowledged commit that is gone, and a database that is half of another."""
    path, model, past = tmp_path / NAME, Model(), []
    for batch in plan(random.Random(1), 6):
        with open_store(f"sqlite:///{path}") as store:
            store.apply(batch)
        model.commit(batch)
        past.append(Files.of(path))
    assert look(past[-1], [Known(model)]) is None
    assert "allowed were" in look(past[-2], [Known(model)])
    old, new = past[1].database, past[-1].database
    half = len(old) // 2
    assert look(Files(new[:half] + old[half:], b""), [Known(model)]) is not None


def test_the_engine_of_the_writer_checkpoints_and_syncs(tmp_path):
    open_store(f"sqlite:///{tmp_path / NAME}").close()
    engine = engine_of(tmp_path / NAME)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA wal_autocheckpoint").scalar() == 40
    engine.dispose()


def test_states_are_mixtures_of_blocks_that_were_written():
    chance = random.Random(1)
    before = Files(b"d" * 4096, b"h" * 32 + b"a" * 2000)
    after = Files(b"d" * 4096, b"h" * 32 + b"a" * 2000 + b"b" * 3000)
    found = [left.files for left in states(before, after, most=30, chance=chance)]
    assert len(set(found)) > 20
    assert {files.database for files in found} == {before.database}
    assert all(files.log.startswith(before.log) for files in found)
    assert max(len(files.log) for files in found) == len(after.log)


def test_a_log_that_was_begun_anew_and_no_more():
    before = Files(b"d" * 4096, b"h" * 32 + b"a" * 2000)
    after = Files(b"d" * 4096, b"g" * 32 + b"a" * 2000)
    found = [left.files for left in states(before, after, most=30, chance=random.Random(1))]
    assert set(found) == {before, after}
