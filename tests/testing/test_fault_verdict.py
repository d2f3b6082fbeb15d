"""The verdict on a store after a failed fsync."""

from __future__ import annotations

import pytest

from taskstore.errors import StoreUnavailableError
from taskstore.testing.faults.injection import Fault, Step, always
from taskstore.testing.faults.verdict import Outcome, check_failed_sync

FAULT = Fault("EIO", "before", lambda step, call, arguments: None, fails_sync=always)
NEW_FILE = Step("fsync", "ledger.tmp", "/there/ledger.tmp", is_new=True)
EXISTING_FILE = NEW_FILE._replace(is_new=False)
OK, FAILED = Outcome(None), Outcome(StoreUnavailableError("no"))


@pytest.mark.parametrize(
    ("step", "later", "outcomes", "writable", "problem"),
    [
        (NEW_FILE, [], [FAILED], True, None),
        (NEW_FILE, [], [OK], True, "no caller got an error"),
        (NEW_FILE, [NEW_FILE], [OK], True, "no caller got an error"),
        (NEW_FILE, [], [OK, OK], True, "no caller got an error"),
        (NEW_FILE, [NEW_FILE], [OK, OK], True, None),
        (EXISTING_FILE, [EXISTING_FILE], [OK, OK], False, "no caller got an error"),
        (EXISTING_FILE, [], [FAILED], True, "still accepts writes"),
        (EXISTING_FILE, [], [FAILED], False, None),
    ],
)
def test_a_failed_sync(step, later, outcomes, writable, problem):
    found = check_failed_sync(FAULT, step, later, outcomes, writable=writable)
    assert [problem in sentence for sentence in found] == ([True] if problem else [])
