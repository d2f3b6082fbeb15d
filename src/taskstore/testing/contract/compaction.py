"""Compaction clauses: what a compaction keeps, and what it removes."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import pytest

from taskstore.errors import ConflictError, CursorExpiredError
from taskstore.model.compaction_policy import CompactionPolicy, CompactionReport
from taskstore.model.journal import (
    Change,
    ChangeSet,
    Position,
    Quarantined,
    Remove,
    Snapshot,
)
from taskstore.model.query import TaskQuery
from taskstore.store.interface import (
    SupportsCommitIds,
    SupportsCompaction,
    SupportsHistory,
    SupportsIntegrity,
    SupportsJournal,
    SupportsQuery,
    entries_after_position,
)
from taskstore.testing.contract.base import ContractBase, Ledger, as_of, journal_of, needs
from taskstore.testing.contract.journal import entry_fields
from taskstore.testing.factories import (
    EPOCH_MS,
    Model,
    create,
    delete,
    make_put,
    make_record,
    next_of,
    play,
    update,
)
from taskstore.testing.types import FullStore

FOLD = CompactionPolicy(force=True)
"""A policy that forces a new snapshot and keeps all journal entries."""

TRIM = CompactionPolicy(force=True, history_entries=0, history_s=0, keep_snapshots=1)
"""A policy that forces a new snapshot and trims all journal entries."""

ERASE = CompactionPolicy(erase_deleted=True)
"""A policy that erases all deleted tasks; only the live records remain."""

HOUR_MS = 3_600_000


def read_retained(store: FullStore, report: CompactionReport) -> list[Snapshot]:
    """Read all snapshots that the report lists, and return the snapshots."""
    snapshots = []
    for seq in report.snapshots:
        snapshot = store.read_snapshot(seq)
        assert snapshot is not None, f"the snapshot at seq {seq} is missing"
        assert snapshot.seq == seq
        snapshots.append(snapshot)
    return snapshots


def check_against_model(store: FullStore, model: Model) -> None:
    """Check that every read of the store returns the content of the model [7]."""
    loaded = store.load_snapshot()
    assert (loaded.seq, dict(loaded.records)) == (model.head, dict(model.records))
    assert (store.head(), store.floor()) == (model.head, model.floor)
    assert [entry_fields(entry) for entry in journal_of(store)] == model.entries
    for seq in sorted(model.states)[:: max(1, len(model.states) // 12)]:
        assert dict(as_of(store, seq).records) == model.states[seq], f"as of seq {seq}"
    assert dict(as_of(store, model.head).records) == dict(model.records)
    if model.floor > 1:
        with pytest.raises(CursorExpiredError):
            store.read_journal(model.floor - 2, 10)
        kept = store.read_snapshot(model.floor - 1)
        assert kept is not None
        assert kept.seq == model.floor - 1
    if isinstance(store, SupportsHistory):
        for task_id in {entry[2] for entry in model.entries[-3:]} | set(list(model.records)[:1]):
            history = [entry_fields(entry) for entry in store.read_history(task_id)]
            assert history == [entry for entry in model.entries if entry[2] == task_id]
    if isinstance(store, SupportsQuery):
        assert {record.task_id for record in store.query(TaskQuery())} == set(model.records)
    if isinstance(store, SupportsIntegrity):
        assert store.verify().problems == ()


class CompactionContract(ContractBase):
    """The guarantees of ``SupportsCompaction``; the store must also support ``SupportsJournal``."""

    level = "compaction"
    abilities: ClassVar[tuple[type, ...]] = (SupportsJournal, SupportsCompaction)

    def test_not_due(self, ledger: Ledger) -> None:
        """[7] If no compaction is due, compact() changes nothing and reports the reason."""
        play(ledger.store)
        with ledger.unchanged():
            report = ledger.store.compact(CompactionPolicy())
            assert not report.compacted
            assert report.reason
            assert report.floor == 1

    @pytest.mark.parametrize("policy", [FOLD, TRIM], ids=["fold", "trim"])
    def test_nothing_to_compact(self, ledger: Ledger, policy: CompactionPolicy) -> None:
        """[7] A forced compaction of an empty ledger does nothing."""
        for store in ledger.before_and_after_reopen():
            assert not store.compact(policy).compacted
            check_against_model(store, Model())
        assert ledger.store.apply([make_put()]).first_seq == 1

    def test_erasing_from_an_empty_ledger(self, ledger: Ledger) -> None:
        """[7] Compaction of an empty ledger with erase_deleted changes nothing."""
        for store in ledger.before_and_after_reopen():
            store.compact(ERASE)
            check_against_model(store, Model())

    def test_folding_changes_no_answer(self, ledger: Ledger) -> None:
        """[7] A compaction that keeps all history does not change the result of any read."""
        model = play(ledger.store)
        report = ledger.store.compact(FOLD)
        assert report.compacted
        assert (report.seq, report.floor, report.trimmed) == (model.head, 1, 0)
        assert report.records == len(model.records)
        assert report.snapshots == (model.head,)
        for store in ledger.before_and_after_reopen():
            check_against_model(store, model)
            (snapshot,) = read_retained(store, report)
            assert dict(snapshot.records) == dict(model.records)

    def test_trimming_keeps_the_records(self, ledger: Ledger) -> None:
        """[7] A compaction that keeps no history does not change the records or the head."""
        model = play(ledger.store)
        report = ledger.store.compact(TRIM)
        assert report.compacted
        assert (report.seq, report.floor) == (model.head, model.head + 1)
        assert (report.trimmed, report.snapshots) == (model.head, (model.head,))
        model.trim(model.head + 1)
        for store in ledger.before_and_after_reopen():
            check_against_model(store, model)
            assert journal_of(store) == []

    def test_the_second_run_has_nothing_to_do(self, ledger: Ledger) -> None:
        """[7] After a compaction, a second compaction is not due until the ledger changes."""
        model = play(ledger.store)
        ledger.store.compact(FOLD)
        for store in ledger.before_and_after_reopen():
            report = store.compact(FOLD)
            assert not report.compacted
            assert (report.seq, report.floor) == (model.head, 1)
            assert report.snapshots == (model.head,)
            check_against_model(store, model)

    @pytest.mark.parametrize("policy", [FOLD, TRIM, ERASE], ids=["fold", "trim", "erase"])
    def test_life_goes_on(self, ledger: Ledger, policy: CompactionPolicy) -> None:
        """[5] After alternating commits, compactions and restarts, each read matches the model."""
        model = Model()
        for _ in range(3):
            play(ledger.reopened(), model)
            report = ledger.store.compact(policy)
            assert report.compacted
            model.trim(report.floor)
            check_against_model(ledger.store, model)
            play(ledger.store, model)
            for store in ledger.before_and_after_reopen():
                check_against_model(store, model)

    def test_seqs_are_not_given_again(self, ledger: Ledger) -> None:
        """[2] If all records are deleted and all entries are trimmed, the next seq is head + 1."""
        model = play(ledger.store)
        delete(ledger.store, *model.records.values())
        head = ledger.store.head()
        ledger.store.compact(TRIM)
        for store in ledger.before_and_after_reopen():
            assert (store.head(), store.floor()) == (head, head + 1)
            assert store.load_snapshot().seq == head
            assert dict(store.load_snapshot().records) == {}
        assert ledger.store.apply([make_put()]).first_seq == head + 1

    @needs(SupportsCommitIds)
    @pytest.mark.parametrize("policy", [TRIM, ERASE], ids=["trim", "erase"])
    def test_another_history_before_the_floor(
        self, ledger: Ledger, policy: CompactionPolicy
    ) -> None:
        """[2] A position at floor - 1 is refused if its commit id belongs to another history,
        even if the journal has no entry."""
        for _ in range(2):
            ledger.store.apply([make_put(), make_put()])
            commit = ledger.store.apply([make_put(), make_put()])
            if not commit.commit_id:
                pytest.skip("the store keeps no commit ids")
            ledger.store.compact(policy)
            here = Position(commit.last_seq, commit.commit_id)
            elsewhere = Position(commit.last_seq, "of another history")
            entries = 0
            for store in ledger.before_and_after_reopen():
                assert store.commit_id(here.seq) == here.commit_id
                assert store.commit_id(here.seq - 1) == store.commit_id(here.seq + 9) == ""
                for _ in range(2):
                    assert len(entries_after_position(store, here, 10)) == entries
                    with pytest.raises(CursorExpiredError) as caught:
                        entries_after_position(store, elsewhere, 10)
                    assert (caught.value.replaced, caught.value.floor) == (True, here.seq + 1)
                    with pytest.raises(ConflictError):
                        store.apply(ChangeSet([make_put()], elsewhere))
                    store.apply(ChangeSet([make_put()], here))
                    entries += 1

    def test_times_do_not_go_back(self, ledger: Ledger) -> None:
        """[2] Commit times do not decrease after all entries are trimmed."""
        ledger.store.clock = lambda: EPOCH_MS
        delete(ledger.store, create(ledger.store))
        ledger.store.compact(TRIM)
        for store in ledger.before_and_after_reopen():
            assert store.load_snapshot().at == EPOCH_MS
            store.clock = lambda: EPOCH_MS - 5000
            assert store.apply([make_put()]).at == EPOCH_MS

    @pytest.mark.parametrize("policy", [TRIM, ERASE], ids=["trim", "erase"])
    def test_a_deleted_id_is_free_again(self, ledger: Ledger, policy: CompactionPolicy) -> None:
        """[3] After the entry of a deletion is trimmed, the task id can be created again."""
        record = create(ledger.store, task_id="gone", run_id="run-1")
        delete(ledger.store, record)
        ledger.store.compact(policy)
        for store in ledger.before_and_after_reopen():
            assert dict(store.load_snapshot().records) == {}
        create(ledger.store, task_id="gone", run_id="run-1")

    def test_deleted_text_is_erased(self, ledger: Ledger) -> None:
        """[7] If compaction erases deleted tasks, no entry and no snapshot has a deleted task."""
        create(ledger.store, task_id="stays")
        secret = create(ledger.store, task_id="secret", task="a secret")
        ledger.store.compact(FOLD)
        delete(ledger.store, secret)
        ledger.store.compact(FOLD)
        report = ledger.store.compact(ERASE)
        assert report.compacted
        assert (report.floor, report.snapshots) == (4, (3,))
        for store in ledger.before_and_after_reopen():
            assert journal_of(store) == []
            assert store.read_snapshot(2) is None
            kept = store.read_snapshot(3)
            assert kept is not None
            assert set(kept.records) == {"stays"}
            if isinstance(store, SupportsHistory):
                assert list(store.read_history("secret")) == []

    # -- policy -----------------------------------------------------------

    def test_due_by_entries(self, ledger: Ledger) -> None:
        """[7] With min_entries=3, compaction is due three entries after the newest snapshot."""
        policy = CompactionPolicy(min_entries=3, ratio=0)
        for _ in range(2):
            for due in (False, False, True):
                create(ledger.reopened())
                assert ledger.store.compact(policy).compacted is due

    def test_due_by_ratio(self, ledger: Ledger) -> None:
        """[7] With ratio=2, compaction is due when there are two entries per live record."""
        policy = CompactionPolicy(min_entries=1, ratio=2)
        record = create(ledger.store)
        for store in ledger.before_and_after_reopen():
            assert not store.compact(policy).compacted
        update(ledger.store, record)
        assert ledger.reopened().compact(policy).compacted

    def test_due_by_age(self, ledger: Ledger) -> None:
        """[7] Compaction is due when the store's clock is max_age_s after the oldest entry."""
        ledger.store.clock = lambda: EPOCH_MS
        create(ledger.store)
        for age_ms, due in ((0, False), (HOUR_MS - 1, False), (HOUR_MS, True)):
            store = ledger.reopened()
            store.clock = lambda age_ms=age_ms: EPOCH_MS + age_ms  # type: ignore[misc]
            assert store.compact(CompactionPolicy(max_age_s=3600)).compacted is due

    def test_history_by_entries(self, ledger: Ledger) -> None:
        """[7] At least history_entries entries are kept; a snapshot exists at floor - 1."""
        policy = CompactionPolicy(force=True, history_entries=4, history_s=0, keep_snapshots=1)
        model, floors = Model(), []
        for _ in range(5):
            change = make_put()
            ledger.store.apply([change, next_of(change.record)])
            model.commit([change, next_of(change.record)])
            report = ledger.store.compact(policy)
            model.trim(report.floor)
            floors.append(report.floor)
            for store in ledger.before_and_after_reopen():
                check_against_model(store, model)
                assert len(read_retained(store, report)) == len(report.snapshots)
        assert floors == [1, 1, 3, 5, 7]

    def test_history_by_age(self, ledger: Ledger) -> None:
        """[7] An entry is trimmed only if the store's clock is at least history_s after it."""
        policy = CompactionPolicy(force=True, history_entries=0, history_s=3600, keep_snapshots=1)
        model, floors = Model(), []
        for hours in (0.0, 0.5, 1.0, 1.5, 9.0):
            store = ledger.reopened()
            store.clock = lambda hours=hours: EPOCH_MS + int(hours * HOUR_MS)  # type: ignore[misc]
            change = make_put()
            store.apply([change])
            model.commit([change])
            report = store.compact(policy)
            model.trim(report.floor)
            floors.append(report.floor)
            check_against_model(store, model)
        assert floors == [1, 1, 2, 3, 5]

    def test_snapshots_that_are_kept(self, ledger: Ledger) -> None:
        """[7] The report lists at least the newest keep_snapshots snapshots; all can be read."""
        model = Model()
        policy = CompactionPolicy(force=True, keep_snapshots=3)
        for count in range(1, 6):
            play(ledger.store, model)
            report = ledger.store.compact(policy)
            assert len(report.snapshots) >= min(count, 3)
            assert report.snapshots[-1] == model.head
            for store in ledger.before_and_after_reopen():
                for snapshot in read_retained(store, report):
                    assert dict(snapshot.records) == model.states[snapshot.seq]
                check_against_model(store, model)

    def test_one_run_right_after_another(self, ledger: Ledger) -> None:
        """[7] If a compaction dropped data, a second compaction right after it succeeds too."""
        policy = CompactionPolicy(force=True, history_entries=0, keep_snapshots=1)
        model = Model()
        for last in (FOLD, policy, ERASE, ERASE, TRIM):
            for _ in range(3):
                play(ledger.store, model)
                model.trim(ledger.store.compact(policy).floor)
            model.trim(ledger.store.compact(last).floor)
            for store in ledger.before_and_after_reopen():
                check_against_model(store, model)

    def test_the_newest_snapshot_before(self, ledger: Ledger) -> None:
        """[5] read_snapshot returns the newest snapshot at or before the given seq."""
        create(ledger.store)
        first = ledger.store.compact(FOLD).seq
        create(ledger.store)
        create(ledger.store)
        second = ledger.store.compact(FOLD).seq
        assert (first, second) == (1, 3)
        expected = {0: None, 1: 1, 2: 1, 3: 3, 4: 3, 10**9: 3}
        for store in ledger.before_and_after_reopen():
            for seq, expected_seq in expected.items():
                snapshot = store.read_snapshot(seq)
                if expected_seq is None:
                    assert snapshot in (None, Snapshot(0))
                else:
                    assert snapshot is not None
                    assert snapshot.seq == expected_seq

    def test_snapshots_know_their_time(self, ledger: Ledger) -> None:
        """[5] A snapshot at seq n has the time of the commit that contains seq n."""
        ledger.store.clock = lambda: EPOCH_MS
        create(ledger.store)
        ledger.store.clock = lambda: EPOCH_MS + HOUR_MS
        ledger.store.compact(FOLD)
        for store in ledger.before_and_after_reopen():
            snapshot = store.read_snapshot(1)
            assert snapshot is not None
            assert snapshot.at == EPOCH_MS

    def test_compaction_after_save(self, ledger: Ledger) -> None:
        """[7] A compaction works after save_snapshot(), and after another compaction."""
        record = make_record()
        ledger.store.save_snapshot(Snapshot(10, {record.task_id: record}, EPOCH_MS))
        assert not ledger.store.compact(FOLD).compacted
        model = play(ledger.store, Model(ledger.store.load_snapshot()))
        for policy in (FOLD, TRIM):
            report = ledger.store.compact(policy)
            model.trim(report.floor)
            for store in ledger.before_and_after_reopen():
                check_against_model(store, model)
            play(ledger.store, model)

    def test_quarantined_records_are_carried(self, ledger: Ledger) -> None:
        """[12] A compaction never removes the bytes of a quarantined record."""
        raw = b'{"v":"9.0","task_id":"future"}'
        quarantined = Quarantined(raw, "elsewhere", "format 9", "future", 3)
        ledger.store.save_snapshot(Snapshot(1, {}, EPOCH_MS, (quarantined,)))
        for policy in (FOLD, TRIM, ERASE):
            create(ledger.store)
            report = ledger.store.compact(policy)
            assert report.compacted
            for store in ledger.before_and_after_reopen():
                assert [item.raw for item in store.load_snapshot().quarantined] == [raw]
                kept = store.read_snapshot(report.seq)
                assert kept is not None
                assert [item.raw for item in kept.quarantined] == [raw]

    def test_many_records(self, ledger: Ledger) -> None:
        """[7] A snapshot of three thousand records (more than one block or chunk) is complete."""
        puts = [make_put(task_id=f"task-{n:05}", label=f"L{n}") for n in range(3000)]
        model = Model()
        for start in range(0, 3000, 1000):
            ledger.store.apply(puts[start : start + 1000])
            model.commit(list(puts[start : start + 1000]))
        model.states = {model.head: dict(model.records)}
        ledger.store.compact(TRIM)
        model.trim(model.head + 1)
        for store in ledger.before_and_after_reopen():
            check_against_model(store, model)


DAY_MS = 24 * HOUR_MS


def floors_between_commits(store: FullStore) -> list[int]:
    """Return, in ascending order, each possible floor that does not split a commit."""
    entries = journal_of(store)
    floors = [store.floor()]
    for before, entry in pairwise(entries):
        if not entry.commit_id or entry.commit_id != before.commit_id:
            floors.append(entry.seq)
    return [*floors, store.head() + 1]


class RetentionContract(ContractBase):
    """Compaction trims exactly the history that the policy does not retain."""

    level = "compaction"
    abilities: ClassVar[tuple[type, ...]] = (SupportsJournal, SupportsCompaction)
    guarantee: ClassVar[str | None] = "exact-history"

    def test_the_history_that_was_asked_for(self, ledger: Ledger) -> None:
        """[7] The policy alone decides the floor, even if no snapshot existed at floor - 1."""
        model, starts = Model(), []
        for day in range(12):
            store = ledger.reopened() if day == 6 else ledger.store
            store.clock = lambda day=day: EPOCH_MS + day * DAY_MS  # type: ignore[misc]
            starts.append(model.head + 1)
            play(store, model)
        for days in (9, 4, 1):
            store = ledger.store
            store.clock = lambda: EPOCH_MS + 11 * DAY_MS + HOUR_MS
            report = store.compact(
                CompactionPolicy(force=True, history_s=days * 86400, history_entries=0)
            )
            assert report.compacted, report
            assert report.floor == starts[12 - days]
            assert report.floor_reason
            assert report.floor_at == EPOCH_MS + (11 - days) * DAY_MS
            model.trim(report.floor)
            for store in ledger.before_and_after_reopen():
                check_against_model(store, model)
                assert len(read_retained(store, report)) == len(report.snapshots)
        for compacted in (True, False):
            report = ledger.store.compact(TRIM)
            assert (report.compacted, report.floor) == (compacted, model.head + 1)
            assert report.floor_at == EPOCH_MS + 11 * DAY_MS
            assert report.floor_reason
            model.trim(report.floor)
            check_against_model(ledger.reopened(), model)

    @pytest.mark.parametrize("first", ["fold", "nothing"])
    def test_every_number_of_entries(self, ledger: Ledger, first: str) -> None:
        """[7] Compaction keeps the fewest whole commits with at least history_entries entries."""
        model = play(ledger.store)
        if first == "fold":
            ledger.store.compact(FOLD)
        play(ledger.store, model)
        floors = floors_between_commits(ledger.store)
        for entries in range(model.head, -1, -3):
            policy = CompactionPolicy(force=True, history_s=0, history_entries=entries)
            report = ledger.store.compact(policy)
            assert report.floor == max(
                floor for floor in floors if model.head + 1 - floor >= entries
            )
            model.trim(report.floor)
            for store in ledger.before_and_after_reopen():
                check_against_model(store, model)
        play(ledger.store, model)
        check_against_model(ledger.reopened(), model)

    def test_quarantined_records_before_the_floor(self, ledger: Ledger) -> None:
        """[12] The snapshot at floor - 1 contains the bytes of the quarantined records."""
        raw = b'{"v":"9.0","task_id":"future"}'
        changed = Quarantined(b"damaged", "elsewhere", "damaged", "changed", 3)
        quarantined = Quarantined(raw, "elsewhere", "format 9", "future", 3)
        ledger.store.save_snapshot(Snapshot(1, {}, EPOCH_MS, (quarantined, changed)))
        ledger.store.apply([Remove("changed", 4)])
        for _ in range(6):
            create(ledger.store)
        policy = CompactionPolicy(force=True, history_s=0, history_entries=3)
        report = ledger.store.compact(policy)
        assert report.floor == 6
        for store in ledger.before_and_after_reopen():
            assert [item.raw for item in store.load_snapshot().quarantined] == [raw]
            kept = store.read_snapshot(5)
            assert kept is not None
            assert (kept.seq, [item.raw for item in kept.quarantined]) == (5, [raw])
            assert len(kept.records) == 3

    def test_history_by_bytes(self, ledger: Ledger) -> None:
        """[7] The kept entries never exceed history_bytes, even if other limits would keep more.

        Unless the compaction is forced, a store may trim to three quarters of history_bytes.
        """
        policy = CompactionPolicy(history_bytes=100_000, keep_snapshots=1)
        model = Model()
        for _ in range(2):
            for _ in range(8):
                changes: list[Change] = [make_put(task="x" * 19_000)]
                ledger.reopened().apply(changes)
                model.commit(changes)
            report = ledger.store.compact(policy)
            assert report.compacted
            assert model.head + 1 - report.floor in (3, 4, 5)
            model.trim(report.floor)
            for store in ledger.before_and_after_reopen():
                check_against_model(store, model)
                assert not store.compact(policy).compacted
        report = ledger.store.compact(CompactionPolicy(history_bytes=10))
        assert report.floor == model.head + 1

    def test_entries_later_than_the_clock(self, ledger: Ledger) -> None:
        """[7] If entries are far later than the clock, history_entries decides what is trimmed."""
        now = EPOCH_MS
        store = ledger.store
        store.clock = lambda: now
        create(store)
        store.clock = lambda: now + 3650 * DAY_MS
        create(store)
        store.clock = lambda: now
        for _ in range(11):
            store.apply([make_put(task="t") for _ in range(1000)])
        policy = CompactionPolicy(force=True)
        # The first entry has the right time: history_s keeps it and all later entries.
        assert store.compact(policy).floor == 1
        store.clock = lambda: now + 30 * DAY_MS
        create(store)
        assert store.compact(policy).floor in (1003, 1004)  # the end of a commit, if there are ids
        create(store)
        report = store.compact(TRIM)
        assert report.floor == report.seq + 1
        for reader in ledger.before_and_after_reopen():
            assert len(reader.load_snapshot().records) == 11_004
