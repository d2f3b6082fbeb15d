"""Crash and contention tests: killed writers, failed servers, competing processes."""

from taskstore.testing.crash.kills import KillHarness as KillHarness
from taskstore.testing.crash.kills import kill_round as kill_round
