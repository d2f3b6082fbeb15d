"""Memory stores with one defect each in reading, compaction or verification."""

from __future__ import annotations

import re
import threading
import time

from broken_writers import Broken, let_another_commit
from msgspec.structs import replace

from taskstore.errors import CursorExpiredError, StoreBusyError
from taskstore.model.journal import Commit, plan
from taskstore.model.query import Page, Summary, decode_cursor, encode_cursor

# -- journal ----------------------------------------------------------------


class ExposesSeqsOutOfOrder(Broken):
    def apply(self, changes):
        commit = super().apply(changes)
        with self.storage.changed:
            hidden = self.storage.journal.pop()
            last_visible = self.storage.head
        time.sleep(0.0005)
        with self.storage.changed:
            self.storage.journal.append(hidden)
            self.storage.head = last_visible
        return commit

    def read_journal(self, after, limit):
        visible = [e for e in list(self.storage.journal) if e.seq <= self.storage.head]
        return tuple(visible[after : after + limit])


class HidesAWrongClock(Broken):
    def report(self):
        return replace(super().report(), notices=())


class IgnoresTheLimit(Broken):
    def read_journal(self, after, limit):
        return super().read_journal(after, 10**9)


class ReadsFromTheSeqInclusive(Broken):
    def read_journal(self, after, limit):
        return super().read_journal(max(after - 1, self.floor() - 1), limit)


class DoesNotExpireCursors(Broken):
    def read_journal(self, after, limit):
        try:
            return super().read_journal(after, limit)
        except CursorExpiredError:
            return ()


class NeverWakes(Broken):
    def wait_for(self, after, timeout):
        self._check_open()
        answer = self.storage.head > after
        if not answer:
            time.sleep(timeout)
        return answer


class SpinsWhileItWaits(Broken):
    def wait_for(self, after, timeout):
        self._check_open()
        end = time.monotonic() + timeout
        busy_until = time.process_time() + timeout / 2
        while self.storage.head <= after:
            if time.monotonic() > end and time.process_time() > busy_until:
                return False
        return True


class SpinsInASeparateThread(Broken):
    def wait_for(self, after, timeout):
        spinning = threading.Thread(target=SpinsWhileItWaits.wait_for, args=(self, after, timeout))
        spinning.start()
        spinning.join()
        self._check_open()
        return self.storage.head > after


class MissesACommitBeforeTheWait(Broken):
    """Misses a commit between the read of the head and the wait."""

    def wait_for(self, after, timeout):
        self._check_open()
        if self.storage.head <= after and timeout:
            let_another_commit(self.storage)
            with self.storage.changed:
                self.storage.changed.wait(min(timeout, 1000))
        return self.storage.head > after


class WakesOneWaiter(Broken):
    def apply(self, changes):
        changed = self.storage.changed
        notify_all, changed.notify_all = changed.notify_all, changed.notify
        try:
            return super().apply(changes)
        finally:
            changed.notify_all = notify_all


class KeepsWaitingAfterClose(Broken):
    def wait_for(self, after, timeout):
        self._check_open()
        storage = self.storage
        with storage.changed:
            return storage.changed.wait_for(lambda: storage.head > after, min(timeout, 1000))


class RejectsLongTimeouts(Broken):
    def wait_for(self, after, timeout):
        if timeout > 10**6:
            raise OverflowError("timeout value is too large")
        return super().wait_for(after, timeout)


class ReturnsHistoryOfSimilarIds(Broken):
    def read_history(self, task_id):
        return [e for e in self.storage.journal if e.task_id.lower() == task_id.lower()]


# -- compaction -------------------------------------------------------------


class ReusesSeqsAfterTrimming(Broken):
    def compact(self, policy):
        report = super().compact(policy)
        if not self.storage.journal and not self.storage.current:
            self.storage.head = 0
            self.storage.snapshots = {}
        return report


class ForgetsTheCommitBeforeTheFloor(Broken):
    def commit_id(self, seq):
        return super().commit_id(seq) if seq >= self.floor() else ""


class NeedsASnapshotToTrim(Broken):
    def compact(self, policy):
        if not self.storage.snapshots:
            policy = replace(policy, history_entries=10**9)
        return super().compact(policy)


class LosesARecordBeforeTheFloor(Broken):
    def compact(self, policy):
        report = super().compact(policy)
        for seq, snapshot in self.storage.snapshots.items():
            if seq != report.seq:
                fewer = dict(list(snapshot.records.items())[1:])
                self.storage.snapshots[seq] = replace(snapshot, records=fewer)
        return report


class DropsQuarantinedBeforeTheFloor(Broken):
    def compact(self, policy):
        report = super().compact(policy)
        for seq, snapshot in self.storage.snapshots.items():
            if seq != report.seq:
                self.storage.snapshots[seq] = replace(snapshot, quarantined=())
        return report


class IgnoresTheSizeOfHistory(Broken):
    def compact(self, policy):
        return super().compact(replace(policy, history_bytes=10**15))


class KeepsWhatIsLaterThanTheClock(Broken):
    def compact(self, policy):
        if policy.history_s and self.storage.last_at > self.clock():
            policy = replace(policy, history_entries=10**9)
        return super().compact(policy)


class LosesTheLastEntryAtCompaction(Broken):
    def compact(self, policy):
        report = super().compact(policy)
        del self.storage.journal[-1:]
        return report


class DropsRetainedSnapshots(Broken):
    def compact(self, policy):
        report = super().compact(policy)
        kept = {max(report.snapshots, default=0)}
        self.storage.snapshots = {s: v for s, v in self.storage.snapshots.items() if s in kept}
        return report


class KeepsDeletedRecordsInTheSnapshot(Broken):
    def compact(self, policy):
        deleted = {e.task_id: e.record for e in self.storage.journal if e.record is not None}
        report = super().compact(policy)
        for seq, snapshot in self.storage.snapshots.items():
            self.storage.snapshots[seq] = replace(snapshot, records={**deleted, **snapshot.records})
        return report


class LosesCommitsDuringCompaction(Broken):
    """Behaves as if a commit always came in between."""

    def compact(self, policy):
        report = super().compact(policy)
        if report.compacted:
            whole = self.storage.snapshots[report.seq]
            all_but_one = dict(list(whole.records.items())[:-1])
            self.storage.snapshots = {report.seq: replace(whole, records=all_but_one)}
        return report


class CompactsWhenNotDue(Broken):
    def compact(self, policy):
        return super().compact(policy.forced())


class KeepsErasedSnapshots(Broken):
    def compact(self, policy):
        before = dict(self.storage.snapshots)
        report = super().compact(policy)
        self.storage.snapshots = before | self.storage.snapshots
        return report


class DropsQuarantinedAtCompaction(Broken):
    def compact(self, policy):
        self.storage.quarantined = ()
        return super().compact(policy)


class SetsSnapshotTimeToCompactionTime(Broken):
    def compact(self, policy):
        report = super().compact(policy)
        for seq, snapshot in self.storage.snapshots.items():
            self.storage.snapshots[seq] = replace(snapshot, at=self.clock())
        return report


# -- query and integrity ----------------------------------------------------


class SortsIdsByCollation(Broken):
    def query(self, query):
        page = super().query(query)
        ordered = sorted(page, key=lambda r: (r.created_at, r.task_id.casefold()), reverse=True)
        return Page(ordered, next_cursor=page.next_cursor, seq=page.seq)


class SkipsTiesAcrossPages(Broken):
    def query(self, query):
        if query.cursor is not None:
            created_at, _ = decode_cursor(query.after)
            query.cursor = (created_at, "")
        return super().query(query)


class ReturnsACursorOnTheLastPage(Broken):
    def query(self, query):
        page = super().query(query)
        cursor = page.next_cursor or (encode_cursor(page[-1].sort_key) if page else None)
        return Page(page, next_cursor=cursor, seq=page.seq)


class MatchesAllForAnEmptyFilter(Broken):
    def query(self, query):
        pairs = zip(query._predicates, query.where.values(), strict=True)
        query._predicates = [predicate for predicate, values in pairs if values]
        return super().query(query)


class ReturnsTheWrongSeq(Broken):
    def query(self, query):
        page = super().query(query)
        return Page(page, next_cursor=page.next_cursor, seq=max(page.seq - 1, 0))


class ReadsEachPartAnew(Broken):
    """Reads the parts of a page from different states of the ledger."""

    def stream(self, query, batch_size):
        first = super().query(query)
        read = 0
        while True:
            page = super().query(query)
            records = page.records[read : read + batch_size]
            read += batch_size
            last = read >= len(page)
            cursor = page.next_cursor if last else encode_cursor(records[-1].sort_key)
            yield Page(records, next_cursor=cursor, seq=first.seq)
            if last:
                return


class ForgetsTheCursorOfThePage(Broken):
    def stream(self, query, batch_size):
        parts = list(super().stream(query, batch_size))
        parts[-1] = Page(parts[-1], seq=parts[-1].seq)
        return iter(parts)


class KeepsTheLockBetweenParts(Broken):
    """A writer waits until a reader has read all parts, also if the reader has given up."""

    reading = False

    def stream(self, query, batch_size):
        self.reading = True
        yield from super().stream(query, batch_size)
        self.reading = False

    def apply(self, changes):
        if self.reading:
            raise StoreBusyError("a reader has not finished")
        return super().apply(changes)


class CountsDeletedTasks(Broken):
    def summary(self):
        counted = [entry.record for entry in self.storage.journal if entry.record is not None]
        newest = {record.task_id: record for record in counted}
        return Summary.from_records(newest.values(), self.storage.head)


class CountsEveryRevision(Broken):
    def summary(self):
        counted = [entry.record for entry in self.storage.journal if entry.record is not None]
        return Summary.from_records(counted, self.storage.head)


class CountsQuarantined(Broken):
    def summary(self):
        found = super().summary()
        return replace(found, total=found.total + len(self.storage.quarantined))


class CountsAndReadsTheHeadSeparately(Broken):
    def summary(self):
        counted = super().summary()
        let_another_commit(self.storage)
        return replace(counted, seq=self.head())


class FindsIdsIgnoringCase(Broken):
    def find_ids(self, endings, limit, *, deleted=False):
        ids = self._deleted_ids() if deleted else self.load_snapshot().records
        wanted = tuple(ending.lower() for ending in endings if ending)
        return sorted(i for i in ids if i.lower().endswith(wanted))[:limit]


class TakesWildcardsInEndings(Broken):
    def find_ids(self, endings, limit, *, deleted=False):
        ids = self._deleted_ids() if deleted else self.load_snapshot().records
        patterns = [
            re.compile(".*" + re.escape(e).replace("%", ".*").replace("_", ".") + r"\Z", re.DOTALL)
            for e in endings
            if e
        ]
        return sorted(i for i in ids if any(p.match(i) for p in patterns))[:limit]


class FindsDeletedIds(Broken):
    def find_ids(self, endings, limit, *, deleted=False):
        found = [*super().find_ids(endings, limit), *super().find_ids(endings, limit, deleted=True)]
        return sorted(found)[:limit]


class FiltersIgnoringCase(Broken):
    def query(self, query):
        found = {
            field: {v.lower() if isinstance(v, str) else v for v in values}
            for field, values in query.where.items()
        }
        query._predicates = [
            lambda r, field=field, values=values: (
                (v.lower() if isinstance(v := getattr(r, field, None), str) else v) in values
            )
            for field, values in found.items()
        ]
        return super().query(query)


class ReportsProblemsInASoundLedger(Broken):
    def verify(self):
        report = super().verify()
        return replace(report, problems=("nothing in particular",) if report.entries else ())


class VerifyFindsNothing(Broken):
    def verify(self):
        return replace(super().verify(), problems=())


class VerifyCountsWrong(Broken):
    def verify(self):
        return replace(super().verify(), records=0)


class VerifyNeedsWriteAccess(Broken):
    def verify(self):
        self._check_writable()
        return super().verify()


class DropsSomeCommits(Broken):
    """Drops a rare kind of commit that only the model machine finds."""

    def apply(self, changes):
        if len(changes) > 1 and self.storage.deleted and self.storage.snapshots:
            plan(changes)
            self._check(plan(changes))
            head = self.storage.head
            return Commit(head + 1, head + len(changes), self.storage.last_at)
        return super().apply(changes)
