"""What a power loss may leave of a store that keeps files, and the proof that it is enough.

A store that changes its files through a :class:`~taskstore.store.disk.Disk` can be
lived through on a recorder; from its log every state is built that a power loss
may leave at any moment, and the ledger in it is opened::

    def open_on(directory, disk, *, read_only):
        return MyStore(directory, disk=disk, read_only=read_only)

    found = survey(open_on)
    print(found)
    assert not found.problems

What is allowed is in :mod:`~taskstore.testing.powerloss.model`, what has to
hold in each state in :mod:`~taskstore.testing.powerloss.survival`.
``python -m taskstore.testing.powerloss`` shows it on our own store.
"""

from taskstore.testing.powerloss.life import Life
from taskstore.testing.powerloss.lives import LIVES
from taskstore.testing.powerloss.recorder import KilledError, RecordedDisk, Recorder, Trap
from taskstore.testing.powerloss.survey import Survey, survey
from taskstore.testing.powerloss.survival import OpenOn

__all__ = [
    "LIVES",
    "KilledError",
    "Life",
    "OpenOn",
    "RecordedDisk",
    "Recorder",
    "Survey",
    "Trap",
    "survey",
]
