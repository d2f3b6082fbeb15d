"""A taskstore backend that keeps a whole ledger in one msgpack file, for one process."""

import os
from pathlib import Path
from urllib.parse import unquote

from msgspec import MsgspecError, Struct, msgpack
from taskstore import ConflictError, CorruptStoreError, OutcomeUnknownError, SetAside, Snapshot
from taskstore import StoreReport, StoreUnavailableError, TaskRegistryStore
from taskstore.codec import decode_or_set_aside, encode_record
from taskstore.journal import validated_snapshot


class Document(Struct):
    """What is in the file, as one msgpack map."""

    seq: int
    at: int
    records: list[bytes]
    set_aside: list[SetAside]


class MsgpackStore(TaskRegistryStore):
    """A ledger in the file at ``path``, which is replaced as a whole at each commit."""

    def __init__(self, path: Path, *, durability: str = "full", read_only: bool = False) -> None:
        super().__init__(read_only=read_only)
        self.path, self.location, self.durability = path, str(path), durability
        self._report = StoreReport()

    def load_snapshot(self) -> Snapshot:
        self._check_open()
        try:
            document = msgpack.decode(self.path.read_bytes(), type=Document)
        except FileNotFoundError:
            document = Document(0, 0, [], [])
        except OSError as error:
            raise StoreUnavailableError(f"cannot read {self.path}: {error.strerror}") from error
        except MsgspecError as error:
            raise CorruptStoreError(self.location, f"is not a ledger: {error}") from error
        found = [decode_or_set_aside(payload, self.location) for payload in document.records]
        aside = (*document.set_aside, *(item for item in found if isinstance(item, SetAside)))
        records = {item.task_id: item for item in found if not isinstance(item, SetAside)}
        self._report = StoreReport(set_aside=aside)
        return Snapshot(document.seq, records, document.at, aside)
