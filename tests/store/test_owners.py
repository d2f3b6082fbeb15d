"""New files belong to the users of the files that they continue or replace."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from pathlib import Path

import pytest
from other_users import (
    COLLEAGUE,
    SERVICE,
    STRANGER,
    TEAM,
    import_everything,
    require_root,
    run_as,
    scratch_directory,
)

from taskstore import (
    CompactionPolicy,
    Snapshot,
    StoreBusyError,
    StoreUnavailableError,
    TaskRegistry,
    open_store,
)
from taskstore.store.disk import Disk
from taskstore.stores.jsonfile import JSONStore
from taskstore.testing.crash.processes import Child
from taskstore.testing.factories import create, make_record
from taskstore.testing.threads import meanwhile

TRIM = CompactionPolicy(force=True, history_s=0, history_entries=0, keep_snapshots=1)


@pytest.fixture(scope="module", autouse=True)
def _imports():
    require_root()
    import_everything()


@pytest.fixture
def base():
    path = scratch_directory()
    yield path
    shutil.rmtree(path)


@pytest.fixture(params=["json", "sqlite"])
def scheme(request):
    return request.param


def home_of(base, owner=SERVICE, group=None, mode=0o700):
    home = base / "home"
    home.mkdir()
    os.chown(home, owner, owner if group is None else group)
    home.chmod(mode)
    return home


def url_of(scheme, home):
    return f"json:///{home}/ledger" if scheme == "json" else f"sqlite:///{home}/t.db"


def access_of(path):
    status = path.stat()
    return status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)


def accesses(directory):
    return {path.name: access_of(path) for path in directory.rglob("*")}


def write(url):
    with TaskRegistry.open(url) as registry:
        registry.create(runtime="cli", task="x")
        assert registry.store.verify().ok


def use_fully(url):
    """Write in every way that creates a file: contention, compactions, a replacement."""
    with open_store(url) as store:
        for _ in range(2):
            create(store)
            store.compact(TRIM)
        with (
            store.exclusive(),
            contextlib.suppress(StoreBusyError),
            open_store(url, **({"lock_timeout_s": 0.01} if url.startswith("json") else {})) as two,
        ):
            if url.startswith("json"):
                two.compact(TRIM)
        record = make_record()
        store.save_snapshot(Snapshot(store.head() + 5, {record.task_id: record}))
        create(store)
        store.compact(CompactionPolicy(force=True))


@pytest.mark.parametrize("creator", [0, SERVICE], ids=["root", "service"])
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_what_root_creates_belongs_to_the_service(base, scheme, creator, umask):
    url = url_of(scheme, home_of(base))
    run_as(creator, lambda: write(url), umask=umask)
    run_as(0, lambda: use_fully(url), umask=umask)
    found = accesses(base / "home")
    assert len(found) > (3 if scheme == "json" else 0)
    for name, access in found.items():
        assert access == (SERVICE, SERVICE, 0o700 if name == "ledger" else 0o600), name
    run_as(SERVICE, lambda: (write(url), use_fully(url)))
    run_as(0, lambda: write(url))
    run_as(SERVICE, lambda: write(url))


def test_root_works_while_the_service_has_the_ledger_open(base, scheme):
    url = url_of(scheme, home_of(base))

    def service():
        with TaskRegistry.open(url) as registry:
            for _ in range(3):
                registry.create(runtime="cli", task="x")
                go.write(b".")
                assert came.read(1) == b"."
            assert len(registry.list()) >= 3

    here, there = os.pipe(), os.pipe()
    with (
        os.fdopen(here[0], "rb", 0) as came,
        os.fdopen(there[1], "wb", 0) as go,
        os.fdopen(there[0], "rb", 0) as root_came,
        os.fdopen(here[1], "wb", 0) as root_go,
        meanwhile(lambda: run_as(SERVICE, service)),
    ):
        for _ in range(3):
            assert root_came.read(1) == b"."
            with open_store(url) as store:
                create(store)
                store.compact(TRIM)
            root_go.write(b".")


@pytest.mark.parametrize("mode", [0o770, 0o2770], ids=["plain", "set-group-ID"])
@pytest.mark.parametrize("owner", [0, SERVICE], ids=["of root", "of the first user"])
def test_a_group_shares_a_json_directory(base, mode, owner):
    home = home_of(base, owner, TEAM, mode)
    url = url_of("json", home)
    for umask in (0o077, 0o022):
        for uid in (SERVICE, COLLEAGUE):
            run_as(uid, lambda: (write(url), use_fully(url)), groups=[TEAM], umask=umask)
            assert access_of(home / "ledger") == (SERVICE, TEAM, 0o2770)
            for name, (_, gid, file_mode) in accesses(home / "ledger").items():
                assert (gid, file_mode) == (TEAM, 0o660), name
    with pytest.raises(AssertionError, match="Permission denied"):
        run_as(STRANGER, lambda: TaskRegistry.open(url, read_only=True))


def test_a_group_shares_an_sqlite_file(base):
    home = home_of(base, 0, TEAM, 0o2770)
    url = url_of("sqlite", home)
    for uid in (SERVICE, COLLEAGUE, 0, SERVICE):
        run_as(uid, lambda: (write(url), use_fully(url)), groups=[TEAM])
        for name, (_, gid, file_mode) in accesses(home).items():
            assert (gid, file_mode) == (TEAM, 0o660), name


def test_modes_that_an_operator_set_are_kept(base):
    home = home_of(base)
    ledger = home / "ledger"
    url = url_of("json", home)
    run_as(SERVICE, lambda: (write(url), use_fully(url)))
    for path in ledger.iterdir():
        os.chown(path, SERVICE, TEAM)
        path.chmod(0o640)
    (ledger / "lock").unlink()
    for uid in (SERVICE, 0):
        run_as(uid, lambda: use_fully(url), groups=[TEAM])
        found = accesses(ledger)
        assert len(found) > 3
        for name, access in found.items():
            assert access == (SERVICE, TEAM, 0o640), name


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o750, 0o1777, 0o1770])
def test_files_in_other_directories_are_private(base, scheme, mode):
    home = home_of(base, SERVICE, TEAM, mode)
    url = url_of(scheme, home)
    run_as(SERVICE, lambda: (write(url), use_fully(url)), groups=[TEAM], umask=0)
    for name, (uid, _, file_mode) in accesses(home).items():
        assert uid == SERVICE, name
        assert not file_mode & 0o077, name


def test_a_torn_line_belongs_to_the_users_of_its_segment(base):
    home = home_of(base)
    url = url_of("json", home)
    run_as(SERVICE, lambda: write(url))
    [segment] = (home / "ledger").glob("journal-*")
    with segment.open("ab") as file:
        file.write(b'{"crc":"torn')
    run_as(0, lambda: write(url))
    [torn] = (home / "ledger").glob("*.torn")
    assert access_of(torn) == (SERVICE, SERVICE, 0o600)
    run_as(SERVICE, lambda: write(url))


class WithoutChown(Disk):
    """The disk of a root user in a container without the capability CAP_CHOWN."""

    def chown(self, descriptor, uid, gid):
        raise PermissionError(1, "Operation not permitted")


def test_a_file_that_the_users_could_not_use_is_not_created(base):
    home = home_of(base)
    url = url_of("json", home)
    run_as(SERVICE, lambda: write(url))
    before = accesses(home / "ledger")
    with JSONStore(home / "ledger", disk=WithoutChown()) as store:
        create(store)
        with pytest.raises(StoreUnavailableError, match=str(SERVICE)) as caught:
            store.compact(TRIM)
        assert "owners" in caught.value.hint
    assert accesses(home / "ledger") == before
    run_as(SERVICE, lambda: (write(url), use_fully(url)))


class Watching(Disk):
    """Records each access that a new file has, after every operation."""

    def __init__(self, directory):
        self.directory = directory
        self.seen = {}

    def __getattribute__(self, name):
        operation = super().__getattribute__(name)
        if name not in ("open", "chown", "chmod", "pwrite", "rename", "close"):
            return operation

        def call(*arguments, **options):
            result = operation(*arguments, **options)
            if self.directory.exists():
                for path in self.directory.iterdir():
                    self.seen.setdefault(path.name, []).append(access_of(path))
            return result

        return call


def test_no_file_is_more_accessible_than_its_predecessor_at_any_time(base):
    home = home_of(base)
    ledger = home / "ledger"
    run_as(SERVICE, lambda: write(url_of("json", home)))
    disk = Watching(ledger)
    with JSONStore(ledger, disk=disk) as store:
        create(store)
        store.compact(TRIM)
        create(store)
        store.compact(TRIM)
    assert len(disk.seen) > 4
    for name, states in disk.seen.items():
        assert {mode for _, _, mode in states} == {0o600}, name
        assert {(uid, gid) for uid, gid, _ in states} <= {(0, 0), (SERVICE, SERVICE)}, name


@pytest.mark.parametrize("name", ["lock", "compact.lock"])
def test_lock_files_that_were_removed_are_made_for_the_users(base, name):
    home = home_of(base)
    url = url_of("json", home)
    run_as(SERVICE, lambda: (write(url), use_fully(url)))
    (home / "ledger" / name).unlink()
    run_as(0, lambda: use_fully(url), umask=0o022)
    assert access_of(home / "ledger" / name) == (SERVICE, SERVICE, 0o600)
    run_as(SERVICE, lambda: use_fully(url))


def test_the_queue_file_of_sqlite_belongs_to_the_users(base):
    home = home_of(base)
    url = url_of("sqlite", home)
    run_as(SERVICE, lambda: write(url))
    queue = Path(f"{home}/t.db-turn")

    ready, go = os.pipe()

    def write_in_turn(_):
        os.read(ready, 1)
        write(url)

    waiting = Child(write_in_turn)  # forked before this process opens the file
    with open_store(url) as store, store.exclusive():
        os.write(go, b".")
        while not queue.exists():
            os.sched_yield()
    assert waiting.finish() == []
    os.close(ready)
    os.close(go)
    assert access_of(queue) == (SERVICE, SERVICE, 0o600)


def refusal(url, work):
    """The error of a colleague who calls ``work`` with the URL."""

    def attempt(report):
        os.setgroups([TEAM])
        os.setgid(COLLEAGUE)
        os.setuid(COLLEAGUE)
        with pytest.raises(StoreUnavailableError) as caught:
            work(url)
        report(str(caught.value))

    [error] = Child(attempt).finish()
    return error


def compact_fully(url):
    with open_store(url) as store:
        store.compact(TRIM)


def read(url):
    open_store(url, read_only=True).close()


def test_a_sticky_directory_is_named_to_the_second_user(base, scheme):
    home = home_of(base, 0, TEAM, 0o3770)
    url = url_of(scheme, home)
    run_as(SERVICE, lambda: write(url), groups=[TEAM])
    file = home / ("ledger" if scheme == "json" else "t.db")
    for work in (write, read):
        error = refusal(url, work)
        assert f"{file} belongs to user {SERVICE}" in error
        assert f"this process runs as user {COLLEAGUE}" in error
        assert f"{home} is sticky" in error
        assert f"chmod -t {home}" in error
        assert "read-only" not in error
    home.chmod(0o2770)
    assert "sticky" not in refusal(url, write)


def test_a_file_that_a_sticky_directory_keeps_is_named(base):
    home = home_of(base, 0, TEAM, 0o2770)
    url = f"json:///{home}"
    run_as(SERVICE, lambda: write(url), groups=[TEAM])
    home.chmod(0o3770)
    run_as(COLLEAGUE, lambda: write(url), groups=[TEAM])
    error = refusal(url, compact_fully)
    [segment, _] = sorted(home.glob("journal-*"))
    assert f"{segment} belongs to user {SERVICE}" in error
    assert f"chmod -t {home}" in error


def test_a_directory_for_everybody_stays_sticky(base, scheme):
    home = home_of(base, 0, 0, 0o1777)
    run_as(SERVICE, lambda: write(url_of(scheme, home)))
    error = refusal(url_of(scheme, home), write)
    assert f"belongs to user {SERVICE}" in error
    assert "chmod" not in error
