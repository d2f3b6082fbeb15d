# ruff: noqa: RUF012 - the class attributes are never changed
"""Memory stores with one defect each in writing, saving or loading."""

from __future__ import annotations

import os
import time
import weakref
from contextlib import nullcontext
from types import MappingProxyType

import msgspec
from msgspec.structs import force_setattr, replace

from taskstore.errors import ConflictError
from taskstore.model.journal import Put, Snapshot, plan
from taskstore.model.validation import encode_metadata
from taskstore.stores.memory import MemoryStorage, MemoryStore


class Broken(MemoryStore):
    """The correct store; each subclass adds one defect."""


def let_another_commit(storage, within_s=0.05):
    """Return after the next commit of another thread, or after ``within_s`` seconds."""
    head = storage.head
    deadline = time.monotonic() + within_s
    while storage.head == head and time.monotonic() < deadline:
        time.sleep(0.0002)


def rewrite_records(store, **fields):
    """Change fields of every stored record without a commit."""
    storage = store.storage
    for task_id, record in storage.current.items():
        changes = {name: change(getattr(record, name)) for name, change in fields.items()}
        storage.current[task_id] = replace(record, **changes)


class DoesNotExcludeWriters(Broken):
    def exclusive(self):
        return nullcontext()


# -- apply ------------------------------------------------------------------


class IgnoresTheBaseCommit(Broken):
    """Does not check the commit that the changes are based on."""

    def apply(self, changes):
        return super().apply(list(changes))


class RejectsATrimmedBase(Broken):
    """Rejects changes whose base commit was trimmed."""

    def apply(self, changes):
        base = getattr(changes, "base", None)
        if base is not None and base.seq and base.seq < self.floor():
            raise ConflictError([], "the base commit is trimmed")
        return super().apply(changes)


class KeepsCommitsInTheInstance(Broken):
    """Commits to storage that no other instance reads."""

    def __init__(self, storage=None, **options):
        super().__init__(MemoryStorage(), **options)
        self.shared = storage

    def load_snapshot(self):
        if not self.storage.head:
            MemoryStore(self.storage).save_snapshot(MemoryStore(self.shared).load_snapshot())
        return super().load_snapshot()


class AppliesPartOfABatch(Broken):
    def apply(self, changes):
        try:
            return super().apply(changes)
        except ConflictError:
            for change in changes:
                super().apply([change])
            raise


class IgnoresTheExpectedRevision(Broken):
    def _check(self, net_changes):
        net_changes = [net for net in net_changes if not net.expected_revision]
        super()._check(net_changes)


class ComparesOutsideTheTransaction(Broken):
    def apply(self, changes):
        self._check(plan(changes))
        let_another_commit(self.storage)
        with self.storage.changed:
            self._check = lambda net_changes: None
            try:
                return super().apply(changes)
            finally:
                del self._check


class SkipsASeq(Broken):
    def apply(self, changes):
        commit = super().apply(changes)
        self.storage.head += 1
        return commit


class TakesASeqForARefusedBatch(Broken):
    def apply(self, changes):
        try:
            return super().apply(changes)
        except ConflictError:
            self.storage.head += 1
            raise


class ForgetsDeletions(Broken):
    def _check(self, net_changes):
        self.storage.deleted.clear()
        super()._check(net_changes)


class ForgetsTasksOfOneBatch(Broken):
    def apply(self, changes):
        net_changes = plan(changes)
        commit = super().apply(changes)
        self.storage.deleted -= {
            s.task_id for s in net_changes if s.record is None and not s.expected_revision
        }
        return commit


class ChecksDedupKeysPerInstance(Broken):
    def _check(self, net_changes):
        shared, self.storage.by_dedup_key = (
            self.storage.by_dedup_key,
            vars(self).setdefault("own_keys", {}),
        )
        super()._check(net_changes)
        self.storage.by_dedup_key = shared
        self.own_keys.update({s.new_dedup_key: s.task_id for s in net_changes if s.new_dedup_key})


class NeverFreesADedupKey(Broken):
    def _write(self, net):
        dedup_keys = dict(self.storage.by_dedup_key)
        super()._write(net)
        self.storage.by_dedup_key = dedup_keys | self.storage.by_dedup_key


class ComparesRunsIgnoringCase(Broken):
    def _check(self, net_changes):
        super()._check(net_changes)
        runs = {run.lower() for run, _ in self.storage.by_dedup_key}
        for net in net_changes:
            if net.new_dedup_key and net.new_dedup_key[0].lower() in runs:
                raise ConflictError([], "the dedup key is taken")


class NamesOnlyTheFirstConflict(Broken):
    def _check(self, net_changes):
        try:
            super()._check(net_changes)
        except ConflictError as conflict:
            raise ConflictError(conflict.conflicts[:1]) from None


class LetsTimeGoBack(Broken):
    def apply(self, changes):
        self.storage.last_at = 0
        return super().apply(changes)


class LetsTimeGoBackAtSave(Broken):
    def save_snapshot(self, snapshot):
        self.storage.last_at = 0
        super().save_snapshot(snapshot)


class JournalsOnlyTheLastRecords(Broken):
    def apply(self, changes):
        commit = super().apply(changes)
        last = {change.task_id: change for change in changes if isinstance(change, Put)}
        self.storage.journal = [
            replace(e, record=last[e.task_id].record)
            if e.task_id in last and e.record is not None and e.seq >= commit.first_seq
            else e
            for e in self.storage.journal
        ]
        return commit


class SetsACommitIdPerEntry(Broken):
    def apply(self, changes):
        commit = super().apply(changes)
        for entry in self.storage.journal[-len(changes) :]:
            force_setattr(entry, "commit_id", f"commit-{entry.seq}")
        return replace(commit, commit_id=f"commit-{commit.first_seq}")


# -- save and load ----------------------------------------------------------


class SavesBehindTheHead(Broken):
    def save_snapshot(self, snapshot):
        self._check_writable()
        self.storage.head = 0
        super().save_snapshot(snapshot)


class SaveKeepsExistingRecords(Broken):
    def save_snapshot(self, snapshot):
        records = {**self.storage.current, **snapshot.records}
        super().save_snapshot(replace(snapshot, records=records))


class SaveKeepsOldDedupKeys(Broken):
    def save_snapshot(self, snapshot):
        dedup_keys = self.storage.by_dedup_key
        super().save_snapshot(snapshot)
        self.storage.by_dedup_key = dedup_keys


class SaveKeepsDeletions(Broken):
    def save_snapshot(self, snapshot):
        deleted = self.storage.deleted
        super().save_snapshot(snapshot)
        self.storage.deleted = deleted


class SavesInvalidRecords(Broken):
    def save_snapshot(self, snapshot):
        super().save_snapshot(Snapshot(snapshot.seq, {}, snapshot.at))
        self.storage.current = dict(snapshot.records)


class DropsQuarantined(Broken):
    def save_snapshot(self, snapshot):
        super().save_snapshot(replace(snapshot, quarantined=()))


class LoadsHeadAndRecordsSeparately(Broken):
    def load_snapshot(self):
        self._check_open()
        head = self.storage.head
        let_another_commit(self.storage)
        return replace(super().load_snapshot(), seq=head)


class ReturnsTheLiveMapping(Broken):
    def load_snapshot(self):
        loaded = super().load_snapshot()
        force_setattr(loaded, "records", MappingProxyType(self.storage.current))
        return loaded


class ReturnsAMutableMapping(Broken):
    def load_snapshot(self):
        loaded = super().load_snapshot()
        force_setattr(loaded, "records", dict(loaded.records))
        return loaded


class AnswersWhenClosed(Broken):
    def _check_open(self):
        pass


class HoldsADescriptor(Broken):
    """Closes its descriptor only in close()."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.descriptor = os.open(os.devnull, os.O_RDONLY)

    def close(self):
        if not self._closed:
            os.close(self.descriptor)
        super().close()


class ReleasesWithoutAWarning(HoldsADescriptor):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self._finalizer = weakref.finalize(self, os.close, self.descriptor)


class WritesWhenOpenedReadOnly(Broken):
    def _check_writable(self):
        self._check_open()


# -- values -----------------------------------------------------------------


class Rewrites(Broken):
    fields = {}

    def apply(self, changes):
        commit = super().apply(changes)
        rewrite_records(self, **self.fields)
        return commit

    def save_snapshot(self, snapshot):
        super().save_snapshot(snapshot)
        rewrite_records(self, **self.fields)


class TurnsAnEmptyStringIntoNull(Rewrites):
    fields = {"label": lambda text: text or None, "error": lambda text: text or None}


class StripsTrailingSpace(Rewrites):
    fields = {"label": lambda text: text and text.rstrip(" ")}


class NormalisesUnicode(Rewrites):
    fields = {"label": lambda text: text and text.replace("e\u0301", "é")}


class TruncatesLongKeys(Rewrites):
    fields = {"label": lambda text: text and text[:191]}


class TruncatesLongTexts(Rewrites):
    fields = {"task": lambda text: text.encode()[:65535].decode(errors="ignore")}


class RoundsTimesToSeconds(Rewrites):
    fields = {"created_at": lambda at: at // 1000 * 1000}


class RoundsIntegersBeyondADouble(Rewrites):
    fields = {
        "metadata_json": lambda raw: (
            encode_metadata({"n": [float(n) if type(n) is int else n for n in value["n"]]})
            if "n" in (value := msgspec.json.decode(raw)) and isinstance(value["n"], list)
            else raw
        )
    }


class DropsTheUnknownFieldsOfANewerPayload(Rewrites):
    fields = {"unknown_json": lambda _: None}


class MergesIdsThatDifferInCase(Broken):
    def _write(self, net):
        for task_id in list(self.storage.current):
            if task_id.lower() == net.task_id.lower() and task_id != net.task_id:
                del self.storage.current[task_id]
        super()._write(net)
