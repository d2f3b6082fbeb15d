# ruff: noqa: RUF012 - what a broken store rewrites is never changed
"""Stores that write wrongly: each the shortest edit of the right one, named by its fault."""

from __future__ import annotations

import time
from contextlib import nullcontext
from types import MappingProxyType

import msgspec
from msgspec.structs import force_setattr, replace

from taskstore.errors import ConflictError
from taskstore.model.journal import Put, Snapshot, plan
from taskstore.model.validation import encode_metadata
from taskstore.stores.memory import MemoryStorage, MemoryStore


class Broken(MemoryStore):
    """The right store; each subclass breaks one thing."""


def rewritten(store, **fields):
    """Change the fields of every stored record, behind everybody's back."""
    storage = store.storage
    for task_id, record in storage.current.items():
        changes = {name: change(getattr(record, name)) for name, change in fields.items()}
        storage.current[task_id] = replace(record, **changes)


class LetsOthersInMeanwhile(Broken):
    def exclusive(self):
        return nullcontext()


# -- apply ------------------------------------------------------------------


class TrustsAnyHistory(Broken):
    """Does not look over which commit the changes were made."""

    def apply(self, changes):
        return super().apply(list(changes))


class DistrustsWhatWasTrimmed(Broken):
    """Wants to see the commit over which the changes were made, always."""

    def apply(self, changes):
        over = getattr(changes, "base", None)
        if over is not None and over.seq and over.seq < self.floor():
            raise ConflictError([], "not to be seen")
        return super().apply(changes)


class AcknowledgesBeforeItIsThere(Broken):
    """Keeps the last commit for itself until the next one comes."""

    def __init__(self, storage=None, **options):
        super().__init__(MemoryStorage(), **options)
        self.real = storage

    def load_snapshot(self):
        if not self.storage.head:
            MemoryStore(self.storage).save_snapshot(MemoryStore(self.real).load_snapshot())
        return super().load_snapshot()


class AppliesHalfABatch(Broken):
    def apply(self, changes):
        try:
            return super().apply(changes)
        except ConflictError:
            for change in changes:
                super().apply([change])
            raise


class IgnoresTheExpectedRevision(Broken):
    def _check(self, steps):
        steps = [step for step in steps if not step.base]
        super()._check(steps)


class ComparesOutsideTheTransaction(Broken):
    def apply(self, changes):
        self._check(plan(changes))
        time.sleep(0.001)
        with self.storage.changed:
            self._check = lambda steps: None
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
    def _check(self, steps):
        self.storage.deleted.clear()
        super()._check(steps)


class ForgetsWhatCameAndWentInOneBatch(Broken):
    def apply(self, changes):
        steps = plan(changes)
        commit = super().apply(changes)
        self.storage.deleted -= {s.task_id for s in steps if s.record is None and not s.base}
        return commit


class BooksTheSameRunTwiceFromTwoInstances(Broken):
    def _check(self, steps):
        shared, self.storage.by_dedup_key = (
            self.storage.by_dedup_key,
            vars(self).setdefault("mine", {}),
        )
        super()._check(steps)
        self.storage.by_dedup_key = shared
        self.mine.update({s.claims: s.task_id for s in steps if s.claims})


class NeverFreesABooking(Broken):
    def _write(self, step):
        bookings = dict(self.storage.by_dedup_key)
        super()._write(step)
        self.storage.by_dedup_key = bookings | self.storage.by_dedup_key


class ComparesRunsWithoutTheirCase(Broken):
    def _check(self, steps):
        super()._check(steps)
        runs = {run.lower() for run, _ in self.storage.by_dedup_key}
        for step in steps:
            if step.claims and step.claims[0].lower() in runs:
                raise ConflictError([], "booked")


class NamesOnlyTheFirstConflict(Broken):
    def _check(self, steps):
        try:
            super()._check(steps)
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


class JournalsTheLastImagesOnly(Broken):
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


class GivesEachEntryACommitIdOfItsOwn(Broken):
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


class SavesOnTopOfWhatIsThere(Broken):
    def save_snapshot(self, snapshot):
        records = {**self.storage.current, **snapshot.records}
        super().save_snapshot(replace(snapshot, records=records))


class SavesWithoutTheBookings(Broken):
    def save_snapshot(self, snapshot):
        bookings = self.storage.by_dedup_key
        super().save_snapshot(snapshot)
        self.storage.by_dedup_key = bookings


class SavesWithoutForgettingDeletions(Broken):
    def save_snapshot(self, snapshot):
        deleted = self.storage.deleted
        super().save_snapshot(snapshot)
        self.storage.deleted = deleted


class SavesWhatIsNotValid(Broken):
    def save_snapshot(self, snapshot):
        super().save_snapshot(Snapshot(snapshot.seq, {}, snapshot.at))
        self.storage.current = dict(snapshot.records)


class DropsWhatWasSetAside(Broken):
    def save_snapshot(self, snapshot):
        super().save_snapshot(replace(snapshot, quarantined=()))


class LoadsHeadAndRecordsFromTwoMoments(Broken):
    def load_snapshot(self):
        self._check_open()
        head = self.storage.head
        time.sleep(0.001)
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


class WritesWhenOpenedReadOnly(Broken):
    def _check_writable(self):
        self._check_open()


# -- values -----------------------------------------------------------------


class Rewrites(Broken):
    fields = {}

    def apply(self, changes):
        commit = super().apply(changes)
        rewritten(self, **self.fields)
        return commit

    def save_snapshot(self, snapshot):
        super().save_snapshot(snapshot)
        rewritten(self, **self.fields)


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


class KeepsTimesInSeconds(Rewrites):
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


class FoldsIdsThatDifferOnlyInCase(Broken):
    def _write(self, step):
        for task_id in list(self.storage.current):
            if task_id.lower() == step.task_id.lower() and task_id != step.task_id:
                del self.storage.current[task_id]
        super()._write(step)
