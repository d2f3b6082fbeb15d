"""Core: load, save, open, close, and what may never be shared or changed by reading."""

from __future__ import annotations

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
from taskstore.model.journal import Quarantined, Snapshot
from taskstore.model.policies import CompactionPolicy
from taskstore.model.query import TaskQuery
from taskstore.model.records import TaskRecord, TaskStatus
from taskstore.store.interface import (
    SupportsCompaction,
    SupportsHistory,
    SupportsIntegrity,
    SupportsJournal,
    SupportsQuery,
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


def snapshot_of(seq: int, *records: TaskRecord, at: int = EPOCH_MS) -> Snapshot:
    """A snapshot of these records."""
    return Snapshot(seq, {record.task_id: record for record in records}, at)


class CoreContract(ContractBase):
    """Loading and saving: what every store can do."""

    def test_a_new_store_is_empty(self, ledger: Ledger) -> None:
        """[5] A new store holds seq 0 and nothing else."""
        for store in ledger.twice():
            assert store.load_snapshot() == Snapshot(0)

    def test_every_call_opens_the_same_storage(self, ledger: Ledger) -> None:
        """[4] What one instance acknowledged, the next one on the same storage has."""
        record = create(ledger.store)
        for store in ledger.twice():
            assert dict(store.load_snapshot().records) == {record.task_id: record}, (
                "each call of what make_store returns has to open the same storage"
            )

    def test_records_are_what_was_written(self, ledger: Ledger) -> None:
        """[5] After each commit the store holds exactly the records that follow from it."""
        model = play(ledger.store)
        for store in ledger.twice():
            loaded = store.load_snapshot()
            assert loaded.seq == model.head
            assert dict(loaded.records) == dict(model.records)

    def test_records_are_the_same_bytes(self, ledger: Ledger) -> None:
        """[5] A record comes back as the same payload, its enums as members."""
        record = create(ledger.store, status="running", metadata={"b": 1, "a": [True, None, 2.5]})
        for store in ledger.twice():
            (loaded,) = store.load_snapshot().records.values()
            assert encode_record(loaded) == encode_record(record)
            assert type(loaded.status) is TaskStatus
            assert type(loaded) is TaskRecord

    def test_what_a_newer_minor_version_wrote_is_kept(self, ledger: Ledger) -> None:
        """[12] Fields that this version does not know survive an update by it."""
        payload = encode_record(make_record(label="new", metadata={"m": 1}))
        payload = payload.replace(b'{"v":"1.1"', b'{"v":"1.7","colour":["red",{"deep":1}]', 1)
        record = decode_record(payload)
        ledger.store.apply([make_put(task_id="other")])
        changed = next_of(replace(record, revision=1), error="changed here")
        for change in (record, changed.record):
            ledger.store.apply([next_of(change, revision=change.revision)])
        for store in ledger.twice():
            loaded = store.load_snapshot().records[record.task_id]
            assert loaded == changed.record
            assert b'"colour":["red",{"deep":1}]' in encode_record(loaded)
            assert b'{"v":"1.7"' in encode_record(loaded)

    # -- save -------------------------------------------------------------

    @pytest.mark.parametrize("seq", [0, 1, 1000])
    def test_save_on_a_new_store(self, ledger: Ledger, seq: int) -> None:
        """[5] A new store takes a snapshot of any seq and is then at that seq."""
        records = [make_record(), make_record(status=TaskStatus.FAILED, revision=7)]
        ledger.store.save_snapshot(snapshot_of(seq, *records))
        for store in ledger.twice():
            loaded = store.load_snapshot()
            assert loaded.seq == seq
            assert dict(loaded.records) == {record.task_id: record for record in records}
            assert loaded.at >= EPOCH_MS

    def test_save_replaces_the_whole_content(self, ledger: Ledger) -> None:
        """[5] What is not in the snapshot is gone; what is changes to it."""
        play(ledger.store)
        before = ledger.store.load_snapshot()
        kept, changed = list(before.records.values())[:2]
        changed = replace(changed, revision=changed.revision + 5, label="saved")
        ledger.store.save_snapshot(snapshot_of(before.seq + 1, kept, changed))
        for store in ledger.twice():
            loaded = store.load_snapshot()
            assert loaded.seq == before.seq + 1
            assert dict(loaded.records) == {kept.task_id: kept, changed.task_id: changed}
        assert update(ledger.store, changed, label="on").revision == changed.revision + 1

    def test_save_of_nothing_empties_the_store(self, ledger: Ledger) -> None:
        """[2] An empty snapshot empties the store, but its seqs are not given again."""
        head = play(ledger.store).head
        ledger.store.save_snapshot(Snapshot(head + 1))
        for store in ledger.twice():
            assert (store.load_snapshot().seq, dict(store.load_snapshot().records)) == (
                head + 1,
                {},
            )
        assert ledger.store.apply([make_put()]).first_seq == head + 2

    def test_save_behind_the_head_is_refused(self, ledger: Ledger) -> None:
        """[2] A snapshot has to be ahead of the head, or acknowledged seqs would come again."""
        head = play(ledger.store).head
        for seq in (head, head - 1, 1, 0):
            with ledger.unchanged(), pytest.raises(ConflictError):
                ledger.store.save_snapshot(snapshot_of(seq, make_record()))

    def test_save_of_the_same_snapshot_again_is_refused(self, ledger: Ledger) -> None:
        """[2] The second save of the same seq finds the head there already."""
        snapshot = snapshot_of(5, make_record())
        ledger.store.save_snapshot(snapshot)
        with ledger.unchanged(), pytest.raises(ConflictError):
            ledger.store.save_snapshot(snapshot)

    def test_apply_goes_on_after_save(self, ledger: Ledger) -> None:
        """[2] Seqs go on from the snapshot's, and times from its time."""
        record, later = make_record(), EPOCH_MS * 2
        ledger.store.save_snapshot(snapshot_of(41, record, at=later))
        commit = ledger.store.apply([next_of(record, label="on"), make_put()])
        assert (commit.first_seq, commit.last_seq) == (42, 43)
        assert commit.at >= later
        for store in ledger.twice():
            assert store.load_snapshot().seq == 43

    def test_save_validates_every_record(self, ledger: Ledger) -> None:
        """[11] A snapshot with one record that may not be stored is refused whole."""
        play(ledger.store)
        bad = make_record(label="nul \0")
        with ledger.unchanged(), pytest.raises(ValidationError) as caught:
            ledger.store.save_snapshot(snapshot_of(1000, make_record(), bad))
        assert caught.value.field == "label"

    def test_save_refuses_a_record_under_another_id(self, ledger: Ledger) -> None:
        """[11] The mapping's key is the record's id."""
        with ledger.unchanged(), pytest.raises(ValidationError):
            ledger.store.save_snapshot(Snapshot(1, {"other": make_record()}))

    def test_save_refuses_a_run_booked_twice(self, ledger: Ledger) -> None:
        """[11] Two records of a snapshot may not hold the same booking."""
        twins = [make_record(run_id="run-1"), make_record(run_id="run-1")]
        with ledger.unchanged(), pytest.raises(ValidationError):
            ledger.store.save_snapshot(snapshot_of(1, *twins))

    def test_save_replaces_the_bookings(self, ledger: Ledger) -> None:
        """[3] A booking that the snapshot dropped is free, one that it brought is taken."""
        create(ledger.store, run_id="run-1")
        holder = make_record(run_id="run-2")
        ledger.store.save_snapshot(snapshot_of(10, holder))
        for store in ledger.twice():
            with pytest.raises(ConflictError) as caught:
                store.apply([make_put(run_id="run-2")])
            assert caught.value.conflicts[0].existing_task_id == holder.task_id
        create(ledger.store, run_id="run-1")

    def test_save_forgets_deletions(self, ledger: Ledger) -> None:
        """[3] With the journal gone, a deleted id may be created again."""
        record = create(ledger.store)
        delete(ledger.store, record)
        ledger.store.save_snapshot(Snapshot(10))
        for store in ledger.twice():
            assert dict(store.load_snapshot().records) == {}
        create(ledger.store, task_id=record.task_id)

    def test_what_was_set_aside_travels(self, ledger: Ledger) -> None:
        """[12] What could not be decoded is kept as bytes, reported, and never dropped."""
        aside = (
            Quarantined(b'{"v":"9.0","task_id":"future"}', "elsewhere", "format 9", "future", 3),
            Quarantined(b"\x00\xff not even JSON \xfe", "elsewhere", "damaged"),
        )
        record = make_record()
        ledger.store.save_snapshot(Snapshot(1, {record.task_id: record}, EPOCH_MS, aside))
        create(ledger.store)
        for store in ledger.twice():
            loaded = store.load_snapshot()
            assert {item.raw for item in loaded.quarantined} == {item.raw for item in aside}
            assert len(loaded.records) == 2
            assert {item.raw for item in store.report().quarantined} == {item.raw for item in aside}
        with ledger.unchanged(), pytest.raises(ConflictError) as caught:
            ledger.store.apply([make_put(task_id="future")])
        assert caught.value.conflicts[0].found == 3

    # -- hand-over --------------------------------------------------------

    def test_a_mapping_handed_over_is_copied(self, ledger: Ledger) -> None:
        """[10] Changing what was handed over changes nothing in the store."""
        record, intruder = make_record(), make_record()
        records = {record.task_id: record}
        snapshot = Snapshot(1, records, EPOCH_MS)
        records[intruder.task_id] = intruder
        ledger.store.save_snapshot(snapshot)
        view = dict(snapshot.records)
        ledger.store.save_snapshot(Snapshot(2, MappingProxyType(view), EPOCH_MS))
        view[intruder.task_id] = intruder
        for store in ledger.twice():
            assert dict(store.load_snapshot().records) == {record.task_id: record}
            if isinstance(store, SupportsJournal):
                kept = store.read_snapshot(2)
                assert kept is not None
                assert dict(kept.records) == {record.task_id: record}

    def test_a_list_of_changes_is_copied(self, ledger: Ledger) -> None:
        """[10] Emptying the list of changes after apply empties nothing else."""
        changes = [make_put()]
        expected = {changes[0].task_id: changes[0].record}
        ledger.store.apply(changes)
        changes.clear()
        for store in ledger.twice():
            assert dict(store.load_snapshot().records) == expected

    def test_what_is_loaded_cannot_be_changed(self, ledger: Ledger) -> None:
        """[10] The mapping refuses assignment, metadata is decoded afresh each time."""
        record = create(ledger.store, metadata={"list": [1]})
        for store in ledger.twice():
            loaded = store.load_snapshot()
            with pytest.raises(TypeError):
                loaded.records["x"] = record  # type: ignore[index]
            with pytest.raises(AttributeError):
                loaded.records[record.task_id].label = "x"  # type: ignore[misc]
            loaded.records[record.task_id].metadata["list"].append(2)
            assert store.load_snapshot().records[record.task_id].metadata == {"list": [1]}

    def test_what_was_loaded_stays_as_it_was(self, ledger: Ledger) -> None:
        """[10] A later commit does not show in a snapshot that was loaded before."""
        record = create(ledger.store)
        for store in ledger.twice():
            loaded = store.load_snapshot()
            before = (loaded.seq, dict(loaded.records))
            record = update(store, record, label="later")
            assert (loaded.seq, dict(loaded.records)) == before

    # -- open and close ---------------------------------------------------

    def test_a_closed_store_refuses_every_call(self, ledger: Ledger) -> None:
        """[4] After close every call raises StoreClosedError, but close itself."""
        play(ledger.store)
        store = ledger.open()
        store.close()
        store.close()
        for call in calls_of(store):
            with pytest.raises(StoreClosedError):
                call()
        create(ledger.store)

    def test_close_before_any_use(self, ledger: Ledger) -> None:
        """[4] A store that was opened for nothing closes without a trace."""
        with ledger.unchanged():
            ledger.open().close()

    def test_a_store_is_a_context_manager(self, ledger: Ledger) -> None:
        """[4] The end of the block closes the store; an error in it passes through."""
        with ledger.open() as store:
            create(store)
        with pytest.raises(StoreClosedError):
            store.load_snapshot()
        with pytest.raises(LookupError), ledger.open() as store:
            raise LookupError

    def test_read_only_reads_and_refuses_to_write(self, ledger: Ledger) -> None:
        """[13] A store opened read-only answers everything and writes nothing."""
        model = play(ledger.store)
        for writer in ledger.twice():
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
        """[13] Reading leaves the content as it was."""
        play(ledger.store)
        with ledger.unchanged():
            for call in reads_of(ledger.store):
                call()

    def test_report_never_raises(self, ledger: Ledger) -> None:
        """[12] The report says what was set aside, before and after anything was read."""
        assert ledger.store.report().quarantined == ()
        play(ledger.store)
        for store in ledger.twice():
            assert store.report().quarantined == ()
            store.load_snapshot()
            assert store.report().quarantined == ()

    def test_it_says_what_it_is(self, ledger: Ledger) -> None:
        """[4] The durability is named, and a place for messages to name too."""
        assert ledger.store.durability in {"full", "process", "none"}
        assert (ledger.store.durability == "none") <= (
            "crash-safe" in ledger.store.unsupported_guarantees
        )
        assert ledger.store.location
        assert ledger.store.location in repr(ledger.store)

    def test_a_long_life(self, ledger: Ledger) -> None:
        """[2] History goes on over many restarts as if there had been none."""
        model = Model()
        for _ in range(4):
            play(ledger.reopened(), model)
        for store in ledger.twice():
            loaded = store.load_snapshot()
            assert (loaded.seq, dict(loaded.records)) == (model.head, dict(model.records))


def reads_of(store: TaskRegistryStore) -> list[Any]:
    """Every reading call that this store has, ready to be made."""
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
        asked: SupportsQuery = store
        calls.append(lambda: asked.query(TaskQuery(limit=1)))
    if isinstance(store, SupportsIntegrity):
        calls.append(store.verify)
    return calls


def writes_of(store: TaskRegistryStore) -> list[Any]:
    """Every writing call that this store has, ready to be made."""
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
    """Every call that this store has."""
    return [*reads_of(store), *writes_of(store)]
