"""Several processes on one ledger: no change is lost, repeated or skipped."""

from __future__ import annotations

import json

from sqlkit import in_process, output_of

WRITER = """
import json, random, sys
from taskstore import open_store
from taskstore.errors import ConflictError
from taskstore.model.compaction_policy import CompactionPolicy
from taskstore.testing.factories import create, make_put, next_of
from taskstore.errors import StoreBusyError

store, number, rounds = open_store(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
chance = random.Random(number)
policy = CompactionPolicy(force=True, history_s=0, history_entries=20, keep_snapshots=2)
shared = None
done, lost = [], 0
for turn in range(rounds):
    # All processes create the same runs; one process creates each.
    try:
        store.apply([make_put(run_id=f"run-{turn}", run_digest="same", label=str(number))])
        done.append(turn)
    except ConflictError as error:
        [conflict] = error.conflicts
        assert conflict.existing_task_id is not None, conflict
    # All processes count on one task; after a conflict they count again.
    while True:
        record = store.load_snapshot().records.get("counter")
        if record is None:
            try:
                create(store, task_id="counter", progress_summary="0")
            except ConflictError:
                pass
            continue
        try:
            store.apply([next_of(record, progress_summary=str(int(record.progress_summary) + 1))])
            break
        except ConflictError:
            lost += 1
    store.apply([make_put(label=str(number)) for _ in range(chance.randrange(1, 6))])
    if turn % 10 == number:
        try:
            store.compact(policy)
        except StoreBusyError:
            pass
print(json.dumps([done, lost]))
store.close()
"""


def test_four_processes_hammer_one_ledger(url, open_):
    store = open_(url)
    rounds, writers = 40, 4
    processes = [in_process(WRITER, url, number, rounds) for number in range(writers)]
    won = [json.loads(output_of(process)) for process in processes]
    # Each run was created once, by the process that got the acknowledgement.
    booked = sorted(turn for done, _ in won for turn in done)
    assert booked == list(range(rounds))
    records = store.load_snapshot().records
    counter = records["counter"]
    assert counter.progress_summary == str(rounds * writers)
    assert counter.revision == rounds * writers + 1
    holders = {r.run_id: r.label for r in records.values() if r.run_id is not None}
    for number, (done, _) in enumerate(won):
        assert all(holders[f"run-{turn}"] == str(number) for turn in done)
    verdict = store.verify()
    assert verdict.problems == ()
    assert store.floor() > 1


FOLLOWER = """
import json, sys
from taskstore import open_store
store, last = open_store(sys.argv[1], read_only=True), int(sys.argv[2])
after, at, commits = 0, 0, []
while after < last:
    assert store.wait_for(after, 30), after
    for entry in store.read_journal(after, 7):
        assert entry.seq == after + 1, (entry.seq, after)
        assert entry.at >= at
        after, at = entry.seq, entry.at
        commits.append(entry.commit_id)
# The entries of one commit are contiguous.
runs = [c for i, c in enumerate(commits) if i == 0 or commits[i - 1] != c]
print(json.dumps([after, len(runs) == len(set(runs))]))
"""

SIMPLE_WRITER = """
import sys
from taskstore import open_store
from taskstore.testing.factories import make_put
with open_store(sys.argv[1]) as store:
    for turn in range(50):
        store.apply([make_put() for _ in range(turn % 3 + 1)])
"""


def test_a_follower_skips_nothing(url, open_):
    open_(url).close()
    total = sum(turn % 3 + 1 for turn in range(50)) * 3
    follower = in_process(FOLLOWER, url, total)
    writers = [in_process(SIMPLE_WRITER, url) for _ in range(3)]
    for writer in writers:
        output_of(writer)
    assert json.loads(output_of(follower)) == [total, True]
