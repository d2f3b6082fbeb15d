"""[4] [7] Writers are killed at random moments, compactions going on: nothing acknowledged is lost.

``TASKSTORE_KILL_ROUNDS`` sets how many kills (default 10); ``make soak`` sets many.
"""

from __future__ import annotations

import os
import random
import time

import pytest

from taskstore.testing.crash.kills import KillHarness

ROUNDS = int(os.environ.get("TASKSTORE_KILL_ROUNDS", "10"))
LONGEST_REST_S = 0.02
"""How long a writer may live after the commit that it is waited for."""
LONGEST_OPENING_S = 0.1
"""How long one may live that is not waited for."""
SEED = 20261122
SERVERS = {"postgresql": "postgres_url", "mariadb": "mariadb_url"}


@pytest.mark.parametrize("scheme", ["json", "sqlite", "postgresql", "mariadb"])
def test_nothing_acknowledged_is_lost_to_sigkill(tmp_path, request, report, scheme):
    url = f"{scheme}:///{tmp_path / 'ledger'}"
    if scheme in SERVERS:
        url = request.getfixturevalue(SERVERS[scheme])
    if scheme == "mariadb":
        url += "?ssl_disabled=true"  # preparing TLS takes longer than most of these lives
    chance, started = random.Random(SEED), time.monotonic()
    harness = KillHarness(url, SEED)
    while harness.kills < ROUNDS or not harness.compacted:
        if harness.kills % 3 == 2:
            # It may die while it opens what the last one left.
            harness.kill_one(chance.uniform(0, LONGEST_OPENING_S), commits=None)
        else:
            harness.kill_one(chance.uniform(0, LONGEST_REST_S), commits=chance.randrange(40))
        assert not harness.problems, harness.problems
        assert harness.kills < ROUNDS * 5, "no writer came through a compaction"
    report(f"writers killed, {scheme}", f"{harness}, in {time.monotonic() - started:.0f} s")
