"""URL schemes, options, and passwords that messages must not contain."""

from __future__ import annotations

import pytest

from taskstore.cli.app import main
from taskstore.errors import BackendNotFoundError, ValidationError
from taskstore.store.opening import installed_backends, open_store, redacted, scheme_of
from taskstore.stores.memory import MemoryStore


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql+psycopg://ann:secret@host/db", "postgresql+psycopg://ann:***@host/db"),
        ("postgresql://ann:se/cret@host/db", "postgresql://ann:***@host/db"),
        ("postgresql://ann:se?c#ret@host/db", "postgresql://ann:***@host/db"),
        ("postgresql://ann:se cret@host/db", "postgresql://ann:***@host/db"),
        ("postgresql://ann:sec@ret@host/db", "postgresql://ann:***@host/db"),
        ("postgresql://ann:sec:ret@host/db", "postgresql://ann:***@host/db"),
        ("postgresql://:secret@host/db", "postgresql://:***@host/db"),
        ("postgresql://ann%40x:s%2Fecret@host", "postgresql://ann%40x:***@host"),
        ("postgresql://host/db?password=secret&x=1", "postgresql://host/db?password=***&x=1"),
        ("mysql+pymysql://host/db?x=1&passwd=secret", "mysql+pymysql://host/db?x=1&passwd=***"),
        ("postgresql://h/db?sslpassword=secret", "postgresql://h/db?sslpassword=***"),
        ("postgresql://ann@host:5432/db", "postgresql://ann@host:5432/db"),
        ("postgresql://host:5432/db", "postgresql://host:5432/db"),
        ("sqlite:////home/a:b@c/tasks.db", "sqlite:////home/a:b@c/tasks.db"),
        ("sqlite:///tasks.db", "sqlite:///tasks.db"),
        ("memory:", "memory:"),
    ],
)
def test_passwords_are_not_shown(url, shown):
    assert redacted(url) == shown
    assert "secret" not in redacted(url)


@pytest.mark.parametrize(
    ("url", "scheme"),
    [
        ("memory:", "memory"),
        ("SQLite:///x", "sqlite"),
        ("postgresql+psycopg://h/d", "postgresql+psycopg"),
        ("a.b-c+d1:x", "a.b-c+d1"),
        ("postgresql+psycopg_async://h/d", "postgresql+psycopg_async"),
    ],
)
def test_scheme(url, scheme):
    assert scheme_of(url) == scheme


@pytest.mark.parametrize("url", ["", "tasks.db", "/tmp/x", "1x:y", ":x", "//h:secret@x/y", " a:"])
def test_values_that_are_not_urls(url):
    with pytest.raises(ValidationError) as caught:
        scheme_of(url)
    assert caught.value.field == "url"


@pytest.mark.parametrize("url", [None, 5, b"memory:"])
def test_urls_that_are_not_text(url):
    with pytest.raises(ValidationError):
        open_store(url)


def test_memory_opens():
    with open_store("memory:") as store:
        assert isinstance(store, MemoryStore)
    with open_store("MEMORY:", read_only=True) as store:
        assert store.read_only


def test_memory_has_no_name():
    with pytest.raises(ValidationError):
        open_store("memory:name")


@pytest.mark.parametrize("options", [{"durability": "maybe"}, {"migrate": "always"}])
def test_wrong_options(options):
    with pytest.raises(ValidationError) as caught:
        open_store("memory:", **options)
    assert caught.value.field in options


def test_an_unknown_scheme_lists_the_installed():
    with pytest.raises(BackendNotFoundError) as caught:
        open_store("redis9://ann:secret@host/0")
    assert caught.value.scheme == "redis9"
    assert {"memory", "json", "sqlite", "postgresql+psycopg"} <= set(caught.value.installed)
    for name in caught.value.installed:
        assert f"{name}:" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_scheme_without_its_driver_gets_a_hint():
    with pytest.raises(BackendNotFoundError) as caught:
        open_store("postgresql://ann:secret@host/db")
    assert "did you mean 'postgresql+psycopg:'" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_scheme_with_an_underscore_is_not_a_path():
    with pytest.raises(BackendNotFoundError, match="did you mean 'postgresql") as caught:
        open_store("postgresql+psycopg_async://ann:secret@host/db")
    assert caught.value.scheme == "postgresql+psycopg_async"
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "rest",
    [
        "//ann:secret@host/x",
        "//ann:se/cret?secret@host/x",
        "//ann:secret@host/x?nonsense=1",
        "///x?password=secret",
        "///x?nonsense=1&password=secret",
        "//host?password=secret",
    ],
)
@pytest.mark.parametrize("scheme", ["sqlite", "json", "memory", "SQLite"])
def test_urls_without_a_server_show_no_password(scheme, rest, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    url = f"{scheme}:{rest}"
    for call in (open_store, lambda url: open_store(url, read_only=True)):
        with pytest.raises(ValidationError) as caught:
            call(url)
        assert "secret" not in repr(caught.value) + str(caught.value)
    for words in ("list", "verify", "compact --vacuum", "db current", "run -- true"):
        command, *arguments = words.split()
        assert main([command, "--url", url, *arguments]) != 0
        shown = capsys.readouterr()
        assert "secret" not in shown.out + shown.err, words
    assert list(tmp_path.iterdir()) == []


class FakeDist:
    def __init__(self, name):
        self.name = name


class FakeEntry:
    def __init__(self, name, value, dist, load):
        self.name, self.value, self.dist, self.load = name, value, FakeDist(dist), load


def fake_entries(monkeypatch, *entries):
    monkeypatch.setattr("taskstore.store.opening.entry_points", lambda group: entries)


def test_two_packages_for_one_scheme(monkeypatch):
    fake_entries(
        monkeypatch,
        FakeEntry("x", "one:open", "package-one", None),
        FakeEntry("x", "two:open", "package-two", None),
    )
    with pytest.raises(Exception, match="package-one, package-two") as caught:
        open_store("x:")
    assert "uninstall" in str(caught.value)


def test_the_same_package_found_twice_is_one(monkeypatch):
    entry = FakeEntry("x", "one:open", "package-one", None)
    fake_entries(monkeypatch, entry, entry)
    assert len(installed_backends()["x"]) == 1


def test_a_plugin_that_does_not_import(monkeypatch):
    def broken():
        raise ImportError("no module named driver")

    fake_entries(
        monkeypatch,
        FakeEntry("x", "one:open", "package-one", broken),
        FakeEntry("y", "two:open", "package-two", lambda: lambda url, **_: url),
    )
    assert open_store("y:") == "y:"
    with pytest.raises(BackendNotFoundError, match="package-one cannot be imported") as caught:
        open_store("x:")
    assert caught.value.installed == ("y",)
    assert isinstance(caught.value.__cause__, ImportError)
