"""Core clauses: load, save, open, close, immutable results, read-only access."""

from __future__ import annotations

import gc
import os
import warnings
from functools import partial
from types import MappingProxyType
from typing import Any

import pytest
from msgspec.structs import replace

from taskstore.errors import (
    ConflictError,
    ReadOnlyError,
    StoreClosedError,
    ValidationError,
)
from taskstore.model.codec import decode_record, encode_record
from taskstore.model.compaction_policy import CompactionPolicy
from taskstore.model.journal import Quarantined, Snapshot
from taskstore.model.query import TaskQuery
from taskstore.model.records import TaskRecord, TaskStatus
from taskstore.store.interface import (
    SupportsCompaction,
    SupportsHistory,
    SupportsIdSearch,
    SupportsIntegrity,
    SupportsJournal,
    SupportsQuery,
    SupportsStreaming,
    SupportsSummary,
    TaskRegistryStore,
)
from taskstore.testing.contract.base import ContractBase, Ledger
from taskstore.testing.factories import (
    EPOCH_MS,
    Model,
    create,
    delete,
    make_put,
    make_record,
    next_of,
    play,
    removal_of,
    update,
)
from taskstore.testing.threads import until

IDLE_S = 20.0
"""The maximum time, in seconds, that a thread of a dropped store keeps the store."""


def snapshot_of(seq: int, *records: TaskRecord, at: int = EPOCH_MS) -> Snapshot:
    """Return a snapshot that has these records, at the given seq."""
    return Snapshot(seq, {record.task_id: record for record in records}, at)


class CoreContract(ContractBase):
    """Clauses for loading and saving, which every store supports."""

    def test_a_new_store_is_empty(self, ledger: Ledger) -> None:
        """[5] A new store has head 0 and no records."""
        for store in ledger.before_and_after_reopen():
            assert store.load_snapshot() == Snapshot(0)

    def test_every_call_opens_the_same_storage(self, ledger: Ledger) -> None:
        """[4] A record that one instance committed is visible to the next instance."""
        record = create(ledger.store)
        for store in ledger.before_and_after_reopen():
            assert dict(store.load_snapshot().records) == {record.task_id: record}, (
                "each call of the callable that make_store returns must open the same storage"
            )

    def test_records_are_what_was_written(self, ledger: Ledger) -> None:
        """[5] After each commit the store returns exactly the committed records."""
        model = play(ledger.store)
        for store in ledger.before_and_after_reopen():
            loaded = store.load_snapshot()
            assert loaded.seq == model.head
            assert dict(loaded.records) == dict(model.records)

    def test_records_are_the_same_bytes(self, ledger: Ledger) -> None:
        """[5] A loaded record has the same encoded bytes as the written record, and its enum
        fields have enum members."""
        record = create(ledger.store, status="running", metadata={"b": 1, "a": [True, None, 2.5]})
        for store in ledger.before_and_after_reopen():
            (loaded,) = store.load_snapshot().records.values()
            assert encode_record(loaded) == encode_record(record)
            assert type(loaded.status) is TaskStatus
            assert type(loaded) is TaskRecord

    def test_what_a_newer_minor_version_wrote_is_kept(self, ledger: Ledger) -> None:
        """[12] An update keeps the unknown fields that a newer minor version wrote."""
        payload = encode_record(make_record(label="new", metadata={"m": 1}))
        payload = payload.replace(b'{"v":"1.1"', b'{"v":"1.7","colour":["red",{"deep":1}]', 1)
        record = decode_record(payload)
        ledger.store.apply([make_put(task_id="other")])
        changed = next_of(replace(record, revision=1), error="changed here")
        for change in (record, changed.record):
            ledger.store.apply([next_of(change, revision=change.revision)])
        for store in ledger.before_and_after_reopen():
            loaded = store.load_snapshot().records[record.task_id]
            assert loaded == changed.record
            assert b'"colour":["red",{"deep":1}]' in encode_record(loaded)
            assert b'{"v":"1.7"' in encode_record(loaded)

    # -- save -------------------------------------------------------------

    @pytest.mark.parametrize("seq", [0, 1, 1000])
    def test_save_on_a_new_store(self, ledger: Ledger, seq: int) -> None:
        """[5] A new store accepts a snapshot at any seq; the head becomes the snapshot's seq."""
        records = [make_record(), make_record(status=TaskStatus.FAILED, revision=7)]
        ledger.store.save_snapshot(snapshot_of(seq, *records))
        for store in ledger.before_and_after_reopen():
            loaded = store.load_snapshot()
            assert loaded.seq == seq
            assert dict(loaded.records) == {record.task_id: record for record in records}
            assert loaded.at >= EPOCH_MS

    def test_save_replaces_the_whole_content(self, ledger: Ledger) -> None:
        """[5] After save the store contains only the records of the snapshot."""
        play(ledger.store)
        before = ledger.store.load_snapshot()
        kept, changed = list(before.records.values())[:2]
        changed = replace(changed, revision=changed.revision + 5, label="saved")
        ledger.store.save_snapshot(snapshot_of(before.seq + 1, kept, changed))
        for store in ledger.before_and_after_reopen():
            loaded = store.load_snapshot()
            assert loaded.seq == before.seq + 1
            assert dict(loaded.records) == {kept.task_id: kept, changed.task_id: changed}
        assert update(ledger.store, changed, label="on").revision == changed.revision + 1

    def test_save_of_nothing_empties_the_store(self, ledger: Ledger) -> None:
        """[2] Saving an empty snapshot removes all records and reuses no seq."""
        head = play(ledger.store).head
        ledger.store.save_snapshot(Snapshot(head + 1))
        for store in ledger.before_and_after_reopen():
            assert (store.load_snapshot().seq, dict(store.load_snapshot().records)) == (
                head + 1,
                {},
            )
        assert ledger.store.apply([make_put()]).first_seq == head + 2

    def test_save_behind_the_head_is_refused(self, ledger: Ledger) -> None:
        """[2] If a snapshot's seq is not above the head, save_snapshot raises ConflictError."""
        head = play(ledger.store).head
        for seq in (head, head - 1, 1, 0):
            with ledger.unchanged(), pytest.raises(ConflictError):
                ledger.store.save_snapshot(snapshot_of(seq, make_record()))

    def test_save_of_the_same_snapshot_again_is_refused(self, ledger: Ledger) -> None:
        """[2] Saving the same snapshot twice raises ConflictError."""
        snapshot = snapshot_of(5, make_record())
        ledger.store.save_snapshot(snapshot)
        with ledger.unchanged(), pytest.raises(ConflictError):
            ledger.store.save_snapshot(snapshot)

    def test_apply_goes_on_after_save(self, ledger: Ledger) -> None:
        """[2] After a save, a commit gets the next seq and a time not before the snapshot time."""
        record, later = make_record(), EPOCH_MS * 2
        ledger.store.save_snapshot(snapshot_of(41, record, at=later))
        commit = ledger.store.apply([next_of(record, label="on"), make_put()])
        assert (commit.first_seq, commit.last_seq) == (42, 43)
        assert commit.at >= later
        for store in ledger.before_and_after_reopen():
            assert store.load_snapshot().seq == 43

    def test_save_validates_every_record(self, ledger: Ledger) -> None:
        """[11] If one record of a snapshot is invalid, save_snapshot raises and writes nothing."""
        play(ledger.store)
        invalid = make_record(label="nul \0")
        with ledger.unchanged(), pytest.raises(ValidationError) as caught:
            ledger.store.save_snapshot(snapshot_of(1000, make_record(), invalid))
        assert caught.value.field == "label"

    def test_save_refuses_a_record_under_another_id(self, ledger: Ledger) -> None:
        """[11] A snapshot is refused if it maps a key to a record with another task_id."""
        with ledger.unchanged(), pytest.raises(ValidationError):
            ledger.store.save_snapshot(Snapshot(1, {"other": make_record()}))

    def test_save_refuses_a_repeated_dedup_key(self, ledger: Ledger) -> None:
        """[11] Two records of a snapshot must not have the same dedup key."""
        twins = [make_record(run_id="run-1"), make_record(run_id="run-1")]
        with ledger.unchanged(), pytest.raises(ValidationError):
            ledger.store.save_snapshot(snapshot_of(1, *twins))

    def test_save_replaces_the_dedup_keys(self, ledger: Ledger) -> None:
        """[3] After a snapshot is saved, only the dedup keys of its records cause conflicts."""
        create(ledger.store, run_id="run-1")
        existing = make_record(run_id="run-2")
        ledger.store.save_snapshot(snapshot_of(10, existing))
        for store in ledger.before_and_after_reopen():
            with pytest.raises(ConflictError) as caught:
                store.apply([make_put(run_id="run-2")])
            assert caught.value.conflicts[0].existing_task_id == existing.task_id
        create(ledger.store, run_id="run-1")

    def test_save_forgets_deletions(self, ledger: Ledger) -> None:
        """[3] After a snapshot is saved, a task id that was deleted before can be created again."""
        record = create(ledger.store)
        delete(ledger.store, record)
        ledger.store.save_snapshot(Snapshot(10))
        for store in ledger.before_and_after_reopen():
            assert dict(store.load_snapshot().records) == {}
        create(ledger.store, task_id=record.task_id)

    def test_quarantined_records_travel(self, ledger: Ledger) -> None:
        """[12] The store keeps and reports the bytes of all quarantined records."""
        quarantined = (
            Quarantined(b'{"v":"9.0","task_id":"future"}', "elsewhere", "format 9", "future", 3),
            Quarantined(b"\x00\xff not even JSON \xfe", "elsewhere", "damaged"),
        )
        raw = {item.raw for item in quarantined}
        record = make_record()
        ledger.store.save_snapshot(Snapshot(1, {record.task_id: record}, EPOCH_MS, quarantined))
        create(ledger.store)
        for store in ledger.before_and_after_reopen():
            loaded = store.load_snapshot()
            assert {item.raw for item in loaded.quarantined} == raw
            assert len(loaded.records) == 2
            assert {item.raw for item in store.report().quarantined} == raw
        with ledger.unchanged(), pytest.raises(ConflictError) as caught:
            ledger.store.apply([make_put(task_id="future")])
        assert caught.value.conflicts[0].found == 3

    # -- immutable results ------------------------------------------------

    def test_a_mapping_handed_over_is_copied(self, ledger: Ledger) -> None:
        """[10] If the caller changes a saved mapping, the store keeps the content of the save."""
        record, other = make_record(), make_record()
        records = {record.task_id: record}
        snapshot = Snapshot(1, records, EPOCH_MS)
        records[other.task_id] = other
        ledger.store.save_snapshot(snapshot)
        view = dict(snapshot.records)
        ledger.store.save_snapshot(Snapshot(2, MappingProxyType(view), EPOCH_MS))
        view[other.task_id] = other
        for store in ledger.before_and_after_reopen():
            assert dict(store.load_snapshot().records) == {record.task_id: record}
            if isinstance(store, SupportsJournal):
                kept = store.read_snapshot(2)
                assert kept is not None
                assert dict(kept.records) == {record.task_id: record}

    def test_a_list_of_changes_is_copied(self, ledger: Ledger) -> None:
        """[10] If the caller clears the list of changes after apply, the store does not change."""
        changes = [make_put()]
        expected = {changes[0].task_id: changes[0].record}
        ledger.store.apply(changes)
        changes.clear()
        for store in ledger.before_and_after_reopen():
            assert dict(store.load_snapshot().records) == expected

    def test_what_is_loaded_cannot_be_changed(self, ledger: Ledger) -> None:
        """[10] A loaded mapping cannot be changed, and each access to metadata returns a copy."""
        record = create(ledger.store, metadata={"list": [1]})
        for store in ledger.before_and_after_reopen():
            loaded = store.load_snapshot()
            with pytest.raises(TypeError):
                loaded.records["x"] = record  # type: ignore[index]
            with pytest.raises(AttributeError):
                loaded.records[record.task_id].label = "x"  # type: ignore[misc]
            loaded.records[record.task_id].metadata["list"].append(2)
            assert store.load_snapshot().records[record.task_id].metadata == {"list": [1]}

    def test_what_was_loaded_stays_as_it_was(self, ledger: Ledger) -> None:
        """[10] A commit does not change a snapshot that was loaded before the commit."""
        record = create(ledger.store)
        for store in ledger.before_and_after_reopen():
            loaded = store.load_snapshot()
            before = (loaded.seq, dict(loaded.records))
            record = update(store, record, label="later")
            assert (loaded.seq, dict(loaded.records)) == before

    # -- open and close ---------------------------------------------------

    def test_a_closed_store_refuses_every_call(self, ledger: Ledger) -> None:
        """[4] After close every call except close raises StoreClosedError."""
        play(ledger.store)
        store = ledger.open()
        store.close()
        store.close()
        for call in calls_of(store):
            with pytest.raises(StoreClosedError):
                call()
        create(ledger.store)

    def test_close_before_any_use(self, ledger: Ledger) -> None:
        """[4] Opening and closing a store writes nothing."""
        with ledger.unchanged():
            ledger.open().close()

    def test_a_dropped_store_gives_its_descriptors_back(self, ledger: Ledger) -> None:
        """[4] If a program drops a store without close, no descriptor stays open.  If the store
        had an open descriptor, the garbage collector gives a ResourceWarning."""
        play(ledger.store)
        # While a connection has a lock on an SQLite file, SQLite keeps the descriptors of all
        # closed connections to this file open.
        ledger.close()

        def descriptors_in_use(*, read_only: bool) -> int:
            store = ledger.open_store(read_only=True) if read_only else ledger.open_store()
            if not read_only:
                create(store)
            for call in reads_of(store):
                call()
            return open_descriptors()

        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always", ResourceWarning)
            for read_only in (False, True):
                descriptors_in_use(read_only=read_only)  # the first use can open files for ever
                gc.collect()
                given.clear()
                before = open_descriptors()
                highest = max(descriptors_in_use(read_only=read_only) for _ in range(5))
                # A thread of the store keeps the store until the thread has been idle for a while.
                until(partial(_descriptors_are_back, before), IDLE_S)
                if highest > before:
                    assert any(issubclass(item.category, ResourceWarning) for item in given)

    def test_a_store_is_a_context_manager(self, ledger: Ledger) -> None:
        """[4] The end of a with block closes the store; an exception in the block propagates."""
        with ledger.open() as store:
            create(store)
        with pytest.raises(StoreClosedError):
            store.load_snapshot()
        with pytest.raises(LookupError), ledger.open() as store:
            raise LookupError

    def test_read_only_reads_and_refuses_to_write(self, ledger: Ledger) -> None:
        """[13] A read-only store performs every read; every write raises ReadOnlyError."""
        model = play(ledger.store)
        for writer in ledger.before_and_after_reopen():
            with ledger.unchanged():
                store = ledger.open(read_only=True)
                assert store.read_only
                assert dict(store.load_snapshot().records) == dict(model.records)
                for call in reads_of(store):
                    call()
                for call in writes_of(store):
                    with pytest.raises(ReadOnlyError):
                        call()
                store.close()
            assert not writer.read_only

    def test_reading_changes_nothing(self, ledger: Ledger) -> None:
        """[13] Reading does not change the stored data."""
        play(ledger.store)
        with ledger.unchanged():
            for call in reads_of(ledger.store):
                call()

    def test_report_never_raises(self, ledger: Ledger) -> None:
        """[12] report() lists the quarantined records and never fails, even before a load."""
        assert ledger.store.report().quarantined == ()
        play(ledger.store)
        for store in ledger.before_and_after_reopen():
            assert store.report().quarantined == ()
            store.load_snapshot()
            assert store.report().quarantined == ()

    def test_it_says_what_it_is(self, ledger: Ledger) -> None:
        """[4] The store has a valid durability and a location, and repr() shows the location."""
        assert ledger.store.durability in {"full", "process", "none"}
        assert (ledger.store.durability == "none") <= (
            "crash-safe" in ledger.store.unsupported_guarantees
        )
        assert ledger.store.location
        assert ledger.store.location in repr(ledger.store)

    def test_a_long_life(self, ledger: Ledger) -> None:
        """[2] After several restarts, the seqs have no gap and every record is stored."""
        model = Model()
        for _ in range(4):
            play(ledger.reopened(), model)
        for store in ledger.before_and_after_reopen():
            loaded = store.load_snapshot()
            assert (loaded.seq, dict(loaded.records)) == (model.head, dict(model.records))


def _descriptors_are_back(before: int) -> bool:
    gc.collect()
    return open_descriptors() <= before


def open_descriptors() -> int:
    """Return the number of open file descriptors of this process."""
    return len(os.listdir("/dev/fd"))  # noqa: PTH208 - only the number is needed


def reads_of(store: TaskRegistryStore) -> list[Any]:
    """Return one callable per read operation of a store; the callables take no arguments."""
    calls: list[Any] = [store.load_snapshot]
    if isinstance(store, SupportsJournal):
        journal: SupportsJournal = store
        calls += [
            journal.head,
            journal.floor,
            lambda: journal.read_journal(0, 10),
            lambda: journal.read_snapshot(10**6),
            lambda: journal.wait_for(0, 0),
        ]
    if isinstance(store, SupportsHistory):
        history: SupportsHistory = store
        calls.append(lambda: history.read_history("first"))
    if isinstance(store, SupportsQuery):
        querying: SupportsQuery = store
        calls.append(lambda: querying.query(TaskQuery(limit=1)))
    if isinstance(store, SupportsStreaming):
        streaming: SupportsStreaming = store
        calls.append(lambda: [*streaming.stream(TaskQuery(), 1)])
    if isinstance(store, SupportsSummary):
        calls.append(store.summary)
    if isinstance(store, SupportsIdSearch):
        searching: SupportsIdSearch = store
        calls.append(lambda: searching.find_ids(["first"], 1))
        calls.append(lambda: searching.find_ids(["first"], 1, deleted=True))
    if isinstance(store, SupportsIntegrity):
        calls.append(store.verify)
    return calls


def writes_of(store: TaskRegistryStore) -> list[Any]:
    """Return one callable per write operation of a store; the callables take no arguments."""
    record = make_record()
    calls: list[Any] = [
        lambda: store.apply([make_put()]),
        lambda: store.apply([removal_of(record)]),
        lambda: store.save_snapshot(Snapshot(10**6)),
    ]
    if isinstance(store, SupportsCompaction):
        compacting: SupportsCompaction = store
        calls.append(lambda: compacting.compact(CompactionPolicy(force=True)))
        calls.append(lambda: compacting.compact(CompactionPolicy()))
    return calls


def calls_of(store: TaskRegistryStore) -> list[Any]:
    """Return one callable per read or write operation of a store; all take no arguments."""
    return [*reads_of(store), *writes_of(store)]
