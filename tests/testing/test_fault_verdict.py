"""Whether a failed sync was taken as seriously as it is."""

from __future__ import annotations

import pytest

from taskstore.errors import StoreUnavailableError
from taskstore.testing.faults.door import Fault, Step, always
from taskstore.testing.faults.verdict import Outcome, judge_sync

FAULT = Fault("EIO", "before", lambda step, call, arguments: None, grave=always)
OF_A_NEW_FILE = Step("fsync", "ledger.tmp", "/there/ledger.tmp", fresh=True)
OF_A_FILE_THAT_STAYS = OF_A_NEW_FILE._replace(fresh=False)
OK, TOLD = Outcome(None), Outcome(StoreUnavailableError("no"))


@pytest.mark.parametrize(
    ("struck", "later", "outcomes", "goes_on", "wrong"),
    [
        (OF_A_NEW_FILE, [], [TOLD], True, None),
        (OF_A_NEW_FILE, [], [OK], True, "nobody was told"),
        (OF_A_NEW_FILE, [OF_A_NEW_FILE], [OK], True, "nobody was told"),
        (OF_A_NEW_FILE, [], [OK, OK], True, "nobody was told"),
        (OF_A_NEW_FILE, [OF_A_NEW_FILE], [OK, OK], True, None),
        (OF_A_FILE_THAT_STAYS, [OF_A_FILE_THAT_STAYS], [OK, OK], False, "nobody was told"),
        (OF_A_FILE_THAT_STAYS, [], [TOLD], True, "goes on writing"),
        (OF_A_FILE_THAT_STAYS, [], [TOLD], False, None),
    ],
)
def test_a_failed_sync(struck, later, outcomes, goes_on, wrong):
    problems = judge_sync(FAULT, struck, later, outcomes, goes_on=goes_on)
    assert [wrong in problem for problem in problems] == ([True] if wrong else [])
