"""[4] [7] Kills at random times, also during compaction, lose no acknowledged change.

``TASKSTORE_KILL_ROUNDS`` sets the number of kills (default 10); ``make soak`` sets many.
"""

from __future__ import annotations

import os
import random
import time

import pytest

from taskstore.testing.crash.kills import KillHarness

ROUNDS = int(os.environ.get("TASKSTORE_KILL_ROUNDS", "10"))
MAX_DELAY_S = 0.02
"""The longest time from the awaited commit to the kill, in seconds."""
MAX_OPENING_S = 0.1
"""The longest time from the start to a kill without an awaited commit, in seconds."""
SEED = 20261122
SERVERS = {"postgresql": "postgres_url", "mariadb": "mariadb_url"}


@pytest.mark.parametrize("scheme", ["json", "sqlite", "postgresql", "mariadb"])
def test_nothing_acknowledged_is_lost_to_sigkill(tmp_path, request, report, scheme):
    url = f"{scheme}:///{tmp_path / 'ledger'}"
    if scheme in SERVERS:
        url = request.getfixturevalue(SERVERS[scheme])
    if scheme == "mariadb":
        url += "?ssl_disabled=true"  # preparing TLS takes longer than most writers run
    rng, started = random.Random(SEED), time.monotonic()
    harness = KillHarness(url, SEED)
    while harness.kills < ROUNDS or not harness.compacted:
        if harness.kills % 3 == 2:
            # The kill may come while the writer opens the ledger.
            harness.kill_one(rng.uniform(0, MAX_OPENING_S), commits=None)
        else:
            harness.kill_one(rng.uniform(0, MAX_DELAY_S), commits=rng.randrange(40))
        assert not harness.problems, harness.problems
        assert harness.kills < ROUNDS * 5, "no writer completed a compaction"
    report(f"writers killed, {scheme}", f"{harness}, in {time.monotonic() - started:.0f} s")
