"""The contract suite, and tests of the file and its directory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from msgspec import msgpack
from taskstore import (
    CorruptStoreError,
    OutcomeUnknownError,
    Snapshot,
    StoreUnavailableError,
    TaskRegistry,
    ValidationError,
    open_store,
)
from taskstore.store import checksum, encode_record
from taskstore.testing import OpenStore, StoreContract, create, make_record, update

import taskstore_msgpack
from taskstore_msgpack import MsgpackStore


class TestMsgpackStore(StoreContract):
    @pytest.fixture
    def make_store(self, tmp_path: Path) -> OpenStore:
        return lambda *, read_only=False: MsgpackStore(tmp_path / "ledger", read_only=read_only)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger"


def test_the_backend_is_found_by_its_scheme(path: Path) -> None:
    with TaskRegistry.open(f"msgpack:///{path}") as registry:
        task = registry.create(runtime="cli", task="Try a backend")
        registry.finish(task.task_id, "succeeded")
        assert isinstance(registry.store, MsgpackStore)
    with TaskRegistry.open(f"MSGPACK:///{path}", read_only=True) as registry:
        assert registry.get(task.task_id).status == "succeeded"
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_path_is_not_decoded(tmp_path: Path) -> None:
    with open_store(f"msgpack:///{tmp_path}/two words%20") as store:
        create(store)
    assert (tmp_path / "two words%20").exists()


def test_read_only_creates_no_file(path: Path) -> None:
    with open_store(f"msgpack:///{path}", read_only=True) as store:
        assert store.load_snapshot() == Snapshot(0)
    assert list(path.parent.iterdir()) == []


def test_every_damaged_byte_is_found(path: Path) -> None:
    with MsgpackStore(path) as store:
        create(store, label="whole")
        good = path.read_bytes()
        for offset in range(len(good)):
            path.write_bytes(good[:offset] + bytes([good[offset] ^ 1]) + good[offset + 1 :])
            with pytest.raises(CorruptStoreError, match=str(path)):
                store.load_snapshot()
            with pytest.raises(CorruptStoreError):
                create(store)


@pytest.mark.parametrize("content", [b"", b"not msgpack", b"\x92\x00\xc4\x00", msgpack.encode([])])
def test_a_file_of_another_format_is_not_changed(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with MsgpackStore(path) as store, pytest.raises(CorruptStoreError):
        create(store)
    assert path.read_bytes() == content


def test_a_record_of_a_newer_version_is_kept(path: Path) -> None:
    known = make_record(label="known")
    newer = b'{"v":"9.0","task_id":"future","revision":3}'
    data = msgpack.encode((7, 0, [encode_record(known), newer], ()))
    path.write_bytes(msgpack.encode((checksum(data), data)))
    with MsgpackStore(path) as store:
        assert [item.raw for item in store.load_snapshot().quarantined] == [newer]
        update(store, known)
        assert [item.raw for item in store.report().quarantined] == [newer]
    with MsgpackStore(path) as store:
        assert [item.task_id for item in store.load_snapshot().quarantined] == ["future"]


def test_a_file_that_cannot_be_created(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with MsgpackStore(path) as store:
        record = create(store)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "touch", refuse)  # root may write to any directory
            with pytest.raises(StoreUnavailableError, match=str(path)):
                update(store, record)
        assert dict(store.load_snapshot().records) == {record.task_id: record}


@contextmanager
def not_writable(directory: Path) -> Iterator[None]:
    """Make a directory read-only; in the ``with`` block, a root process runs as another user."""
    is_root = os.geteuid() == 0
    directory.chmod(0o555)
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        directory.chmod(0o700)


def test_a_read_only_directory() -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "ledger"
        with MsgpackStore(path) as store:
            record = create(store)
            path.chmod(0o444)
            with (
                not_writable(path.parent),
                pytest.raises(StoreUnavailableError, match=str(path)),
            ):
                update(store, record)
            assert dict(store.load_snapshot().records) == {record.task_id: record}


def test_a_missing_directory(tmp_path: Path) -> None:
    with MsgpackStore(tmp_path / "nowhere" / "ledger") as store:
        with pytest.raises(StoreUnavailableError):
            create(store)
        (tmp_path / "file").touch()
    with (
        MsgpackStore(tmp_path / "file" / "ledger") as store,
        pytest.raises(StoreUnavailableError),
    ):
        store.load_snapshot()


@pytest.mark.parametrize("synced", ["file", "directory"])
def test_a_failed_sync(path: Path, monkeypatch: pytest.MonkeyPatch, synced: str) -> None:
    with MsgpackStore(path) as store:
        record = create(store)
        fails = path.parent if synced == "directory" else Path(f"{path}.new")
        real = taskstore_msgpack._sync

        def sync(target: Path) -> None:
            if target == fails:
                raise OSError(5, "Input/output error")
            real(target)

        monkeypatch.setattr(taskstore_msgpack, "_sync", sync)
        error = OutcomeUnknownError if synced == "directory" else StoreUnavailableError
        with pytest.raises(error):
            update(store, record)
        expected = record.revision + (synced == "directory")
        assert store.load_snapshot().records[record.task_id].revision == expected


def test_the_module_has_at_most_sixty_lines() -> None:
    source = Path(taskstore_msgpack.__file__).read_text()
    assert sum(bool(line.strip()) for line in source.splitlines()) <= 60


def test_an_option_of_the_url_is_refused(path: Path) -> None:
    with pytest.raises(ValidationError, match="unknown option 'nonsense'"):
        open_store(f"msgpack:///{path}?nonsense=1")
    assert not path.exists()
