"""Writers that are killed, servers that fail, processes that compete for one ledger."""

from taskstore.testing.crash.kills import KillHarness as KillHarness
from taskstore.testing.crash.kills import kill_round as kill_round
