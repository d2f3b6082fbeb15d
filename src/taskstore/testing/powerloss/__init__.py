"""Power loss tests for file-based stores: possible crash states and their checks.

A store that changes its files through a :class:`~taskstore.store.disk.Disk` can run on a
disk that records all file operations.  From the recorded operations, :func:`survey` builds
the crash states: the files that a power loss at any moment can leave.  Then :func:`survey`
opens the ledger in each crash state::

    def open_on(directory, disk, *, read_only):
        return MyStore(directory, disk=disk, read_only=read_only)

    result = survey(open_on)
    print(result)
    assert not result.problems

:mod:`~taskstore.testing.powerloss.model` defines the crash states, and
:mod:`~taskstore.testing.powerloss.expected` checks each crash state.
``python -m taskstore.testing.powerloss`` checks the JSON and SQLite stores.
"""

from taskstore.testing.powerloss.expected import OpenOn
from taskstore.testing.powerloss.recorder import Failpoint, KilledError, RecordedDisk, Recorder
from taskstore.testing.powerloss.scenarios import SCENARIOS
from taskstore.testing.powerloss.survey import Survey, survey
from taskstore.testing.powerloss.workload import Workload

__all__ = [
    "SCENARIOS",
    "Failpoint",
    "KilledError",
    "OpenOn",
    "RecordedDisk",
    "Recorder",
    "Survey",
    "Workload",
    "survey",
]
