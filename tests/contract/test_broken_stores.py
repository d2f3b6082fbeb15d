"""Every defective store fails the clause that covers its defect."""

from __future__ import annotations

import re

import broken_readers as readers
import broken_writers as writers
import pytest
from hypothesis import Phase, settings
from msgspec.structs import replace

from taskstore.stores.memory import MemoryStorage
from taskstore.testing import NASTY, Ledger, StoreContract
from taskstore.testing.contract.compaction import FOLD, TRIM
from taskstore.testing.contract.machine import MACHINE_SETTINGS, run_store_machine

ROWS = {row.name: row for row in NASTY}

CAUGHT = [
    (writers.KeepsCommitsInTheInstance, "every_call_opens_the_same_storage"),
    (writers.AppliesPartOfABatch, "a_batch_is_all_or_nothing"),
    (writers.IgnoresTheExpectedRevision, "stale_and_skipped_revisions", 2),
    (writers.IgnoresTheExpectedRevision, "delete_of_another_revision", 99),
    (writers.IgnoresTheExpectedRevision, "update_of_absent"),
    (writers.IgnoresTheExpectedRevision, "delete_of_absent"),
    (writers.IgnoresTheExpectedRevision, "the_same_change_again"),
    (writers.IgnoresTheExpectedRevision, "revisions_are_compared_across_instances"),
    (writers.ComparesOutsideTheTransaction, "no_update_is_lost"),
    (writers.SkipsASeq, "seqs_are_contiguous"),
    (writers.TakesASeqForARefusedBatch, "a_refused_batch_takes_no_seq"),
    (writers.ForgetsDeletions, "a_deleted_task_stays_deleted"),
    (writers.ForgetsDeletions, "deletions_hold_across_instances"),
    (writers.ForgetsTasksOfOneBatch, "what_came_and_went_in_one_batch_stays_deleted"),
    (writers.ChecksDedupKeysPerInstance, "dedup_keys_hold_across_instances"),
    (writers.ChecksDedupKeysPerInstance, "one_of_many_gets_the_dedup_key"),
    (writers.NeverFreesADedupKey, "deletion_frees_the_dedup_key"),
    (writers.ComparesRunsIgnoringCase, "runs_that_differ_only_in_case_or_space"),
    (writers.NamesOnlyTheFirstConflict, "every_task_in_the_way_is_named"),
    (writers.LetsTimeGoBack, "the_time_never_goes_back"),
    (writers.LetsTimeGoBack, "times_never_go_back"),
    (writers.LetsTimeGoBackAtSave, "the_time_never_goes_back_over_a_save"),
    (writers.JournalsOnlyTheLastRecords, "entries_are_what_was_committed"),
    (writers.SetsACommitIdPerEntry, "entries_carry_their_commit"),
    (writers.SavesBehindTheHead, "save_behind_the_head_is_refused"),
    (writers.SavesBehindTheHead, "save_of_the_same_snapshot_again_is_refused"),
    (writers.SaveKeepsExistingRecords, "save_replaces_the_whole_content"),
    (writers.SaveKeepsExistingRecords, "save_of_nothing_empties_the_store"),
    (writers.SaveKeepsOldDedupKeys, "save_replaces_the_dedup_keys"),
    (writers.SaveKeepsDeletions, "save_forgets_deletions"),
    (writers.SavesInvalidRecords, "save_validates_every_record"),
    (writers.SavesInvalidRecords, "save_refuses_a_record_under_another_id"),
    (writers.SavesInvalidRecords, "save_refuses_a_repeated_dedup_key"),
    (writers.SavesInvalidRecords, "nasty_value_is_refused", ROWS["nul_in_key"]),
    (writers.SavesInvalidRecords, "nasty_value_is_refused", ROWS["metadata_not_canonical"]),
    (writers.DropsQuarantined, "quarantined_records_travel"),
    (writers.LoadsHeadAndRecordsSeparately, "loading_is_one_moment"),
    (writers.ReturnsTheLiveMapping, "what_was_loaded_stays_as_it_was"),
    (writers.ReturnsAMutableMapping, "what_is_loaded_cannot_be_changed"),
    (writers.AnswersWhenClosed, "a_closed_store_refuses_every_call"),
    (writers.HoldsADescriptor, "a_dropped_store_gives_its_descriptors_back"),
    (writers.ReleasesWithoutAWarning, "a_dropped_store_gives_its_descriptors_back"),
    (writers.WritesWhenOpenedReadOnly, "read_only_reads_and_refuses_to_write"),
    (writers.TurnsAnEmptyStringIntoNull, "nasty_value_is_stored_exactly", ROWS["empty_key"]),
    (writers.TurnsAnEmptyStringIntoNull, "nasty_value_is_stored_exactly", ROWS["empty_error"]),
    (writers.StripsTrailingSpace, "nasty_value_is_stored_exactly", ROWS["trailing_space"]),
    (writers.NormalisesUnicode, "nasty_value_is_stored_exactly", ROWS["combining"]),
    (writers.TruncatesLongKeys, "nasty_value_is_stored_exactly", ROWS["longest_key"]),
    (writers.TruncatesLongTexts, "nasty_value_is_stored_exactly", ROWS["longest_task"]),
    (writers.RoundsTimesToSeconds, "nasty_value_is_stored_exactly", ROWS["times_at_most"]),
    (writers.RoundsIntegersBeyondADouble, "nasty_value_is_stored_exactly", ROWS["metadata_ints"]),
    (writers.MergesIdsThatDifferInCase, "nasty_value_is_stored_exactly", ROWS["case_id"]),
    (writers.MergesIdsThatDifferInCase, "all_nasty_values_together"),
    (writers.DropsTheUnknownFieldsOfANewerPayload, "what_a_newer_minor_version_wrote_is_kept"),
    (readers.ExposesSeqsOutOfOrder, "readers_see_no_gap"),
    (readers.HidesAWrongClock, "a_clock_far_ahead_is_reported"),
    (readers.IgnoresTheLimit, "paging_reads_everything_once", 3),
    (readers.ReadsFromTheSeqInclusive, "reading_from_every_point"),
    (readers.DoesNotExpireCursors, "the_ones_before_the_floor_are_expired"),
    (readers.DoesNotExpireCursors, "a_saved_snapshot_reaches_the_other"),
    (readers.NeverWakes, "a_commit_ends_the_wait"),
    (readers.NeverWakes, "waiting_for_the_other"),
    (readers.SpinsWhileItWaits, "waiting_does_not_spin"),
    (readers.SpinsInASeparateThread, "waiting_does_not_spin"),
    (readers.MissesACommitBeforeTheWait, "no_commit_is_missed"),
    (readers.WakesOneWaiter, "everybody_who_waits_is_woken"),
    (readers.KeepsWaitingAfterClose, "closing_ends_the_wait"),
    (readers.RejectsLongTimeouts, "any_timeout", 10.0**9),
    (readers.ReturnsHistoryOfSimilarIds, "history_of_one_task"),
    (readers.ReusesSeqsAfterTrimming, "seqs_are_not_given_again"),
    (readers.ForgetsTheCommitBeforeTheFloor, "another_history_before_the_floor", TRIM),
    (readers.NeedsASnapshotToTrim, "the_history_that_was_asked_for"),
    (readers.LosesARecordBeforeTheFloor, "the_history_that_was_asked_for"),
    (readers.LosesARecordBeforeTheFloor, "every_number_of_entries", "nothing"),
    (readers.DropsQuarantinedBeforeTheFloor, "quarantined_records_before_the_floor"),
    (readers.IgnoresTheSizeOfHistory, "history_by_bytes"),
    (readers.KeepsWhatIsLaterThanTheClock, "entries_later_than_the_clock"),
    (readers.LosesTheLastEntryAtCompaction, "folding_changes_no_answer"),
    (readers.LosesTheLastEntryAtCompaction, "life_goes_on", FOLD),
    (readers.DropsRetainedSnapshots, "history_by_entries"),
    (readers.DropsRetainedSnapshots, "snapshots_that_are_kept"),
    (readers.KeepsDeletedRecordsInTheSnapshot, "folding_changes_no_answer"),
    (readers.KeepsDeletedRecordsInTheSnapshot, "trimming_keeps_the_records"),
    (readers.CompactsWhenNotDue, "not_due"),
    (readers.CompactsWhenNotDue, "due_by_entries"),
    (readers.KeepsErasedSnapshots, "deleted_text_is_erased"),
    (readers.DropsQuarantinedAtCompaction, "quarantined_records_are_carried"),
    (readers.SetsSnapshotTimeToCompactionTime, "snapshots_know_their_time"),
    (readers.SortsIdsByCollation, "ids_are_ordered_byte_by_byte"),
    (readers.SkipsTiesAcrossPages, "pages", 2),
    (readers.SkipsTiesAcrossPages, "every_cursor"),
    (readers.ReturnsACursorOnTheLastPage, "pages", 28),
    (readers.MatchesAllForAnEmptyFilter, "filter", "label"),
    (readers.ReturnsTheWrongSeq, "the_seq_of_the_answer"),
    (readers.ReadsEachPartAnew, "all_parts_are_of_one_moment"),
    (readers.ForgetsTheCursorOfThePage, "parts_of_a_page", 3),
    (readers.KeepsTheLockBetweenParts, "parts_that_are_not_read"),
    (readers.CountsDeletedTasks, "the_summary_counts_the_records"),
    (readers.CountsEveryRevision, "the_summary_counts_the_records"),
    (readers.CountsQuarantined, "the_summary_of_a_saved_snapshot"),
    (readers.CountsAndReadsTheHeadSeparately, "a_summary_is_one_moment"),
    (readers.FindsIdsIgnoringCase, "ids_by_their_ending"),
    (readers.TakesWildcardsInEndings, "ids_by_their_ending"),
    (readers.FindsDeletedIds, "deleted_ids"),
    (readers.FiltersIgnoringCase, "filter", "label"),
    (readers.FiltersIgnoringCase, "nasty_value_is_stored_exactly", ROWS["case"]),
    (readers.ReportsProblemsInASoundLedger, "a_good_ledger_is_whole"),
    (readers.VerifyCountsWrong, "a_good_ledger_is_whole"),
    (readers.VerifyNeedsWriteAccess, "verifying_changes_nothing"),
    (writers.IgnoresTheBaseCommit, "changes_over_another_history"),
    (writers.RejectsATrimmedBase, "changes_over_what_was_trimmed"),
    (writers.DoesNotExcludeWriters, "others_wait_for_who_keeps_them_out"),
    (writers.DoesNotExcludeWriters, "who_looks_first_conflicts_with_nobody"),
    (readers.LosesCommitsDuringCompaction, "compacting_while_writing"),
]


def run(store_class, clause, *arguments):
    storage = MemoryStorage()
    ledger = Ledger(lambda *, read_only=False: store_class(storage, read_only=read_only))
    try:
        getattr(StoreContract(), f"test_{clause}")(ledger, *arguments)
    finally:
        ledger.close()


def name_of(case):
    store_class, clause, *arguments = case
    return "-".join([store_class.__name__, clause, *(getattr(a, "name", "") for a in arguments)])


@pytest.mark.parametrize("case", CAUGHT, ids=name_of)
def test_the_clause_catches_the_fault(case, monkeypatch):
    store_class, *clause = case
    run(writers.Broken, *clause)
    monkeypatch.setattr("taskstore.testing.contract.core.IDLE_S", 0.5)
    monkeypatch.setattr("taskstore.testing.contract.exclusive.BLOCKED_S", 10.0)
    monkeypatch.setattr("taskstore.testing.contract.journal.TIMEOUT_S", 0.5)
    monkeypatch.setattr("taskstore.testing.contract.shared.TIMEOUT_S", 0.5)
    monkeypatch.setattr("taskstore.testing.threads.TIMEOUT_S", 5.0)
    with pytest.raises((Exception, pytest.fail.Exception)) as caught:
        run(store_class, *clause)
    assert not isinstance(caught.value, TypeError | NameError | AttributeError), (
        "an unrelated error"
    )


@pytest.mark.parametrize("store_class", [writers.Broken, readers.VerifyFindsNothing])
def test_the_clause_about_damage_catches_the_fault(store_class):
    storage = MemoryStorage()
    ledger = Ledger(lambda *, read_only=False: store_class(storage, read_only=read_only))

    def damage(task_id):
        storage.current[task_id] = replace(storage.current[task_id], task="damaged")

    clause = StoreContract().test_a_damaged_record_is_found
    if store_class is writers.Broken:
        clause(ledger, damage)
        return
    with pytest.raises(AssertionError, match="no problem in a damaged ledger"):
        clause(ledger, damage)


FOUND_BY_THE_MACHINE = [
    readers.DropsSomeCommits,
    readers.KeepsDeletedRecordsInTheSnapshot,
    readers.DropsRetainedSnapshots,
    writers.AppliesPartOfABatch,
    writers.MergesIdsThatDifferInCase,
]


@pytest.mark.parametrize("store_class", FOUND_BY_THE_MACHINE)
def test_the_machine_finds_the_fault(store_class):
    storage = MemoryStorage()
    quick = settings(MACHINE_SETTINGS, max_examples=300, phases=[Phase.generate], derandomize=True)
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever the fault leads to
        run_store_machine(
            lambda *, read_only=False: store_class(storage, read_only=read_only), settings=quick
        )
    assert not isinstance(caught.value, TypeError | NameError | AttributeError), (
        "an unrelated error"
    )


def test_every_broken_store_is_caught():
    stores = {
        value
        for value in (vars(writers) | vars(readers)).values()
        if isinstance(value, type) and issubclass(value, writers.Broken)
    }
    assert {case[0] for case in CAUGHT} | set(FOUND_BY_THE_MACHINE) == stores - {
        writers.Broken,
        writers.Rewrites,
        readers.VerifyFindsNothing,  # test_the_clause_about_damage_catches_the_fault
    }


def test_every_clause_cites_its_invariant():
    clauses = [name for name in dir(StoreContract) if name.startswith("test_")]
    assert len(clauses) > 100
    for name in clauses:
        assert re.match(r"(\[\d+\] )+\w", getattr(StoreContract, name).__doc__), name
