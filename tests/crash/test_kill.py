"""[4] [7] Writers are killed at random moments, compactions going on: nothing acknowledged is lost.

``TASKSTORE_KILL_ROUNDS`` sets how many kills (default 10); ``make soak`` sets many.
"""

from __future__ import annotations

import os
import random

import pytest

from taskstore import open_store
from taskstore.testing.crash import kill_round

ROUNDS = int(os.environ.get("TASKSTORE_KILL_ROUNDS", "10"))


@pytest.mark.parametrize("scheme", ["json", "sqlite", "mariadb"])
@pytest.mark.parametrize("seed", [20261122])
def test_nothing_acknowledged_is_lost_to_sigkill(tmp_path, request, scheme, seed):
    url = f"{scheme}:///{tmp_path / 'ledger'}"
    if scheme == "mariadb":
        url = request.getfixturevalue("mariadb_url")
    chance = random.Random(seed)
    # On a busy machine, ten short lives may be too short for any compaction.
    for number in range(ROUNDS * 5):
        problems = kill_round(url, after_s=chance.uniform(0.01, 0.4), seed=seed + number)
        assert not problems, f"round {number}: {problems}"
        with open_store(url) as store:
            if number >= ROUNDS - 1 and store.floor() > 1:
                return
    raise AssertionError("no compaction ever moved the floor")
