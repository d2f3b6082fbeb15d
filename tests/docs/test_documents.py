"""Checks of the documents: blocks run, links resolve, tables are complete."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
from doc_blocks import DOCUMENTS, ROOT, Block, BlockRunner, blocks_of

import taskstore
from taskstore.testing.servers import PostgresServer

LANGUAGES = {"", "python", "console", "sh", "text", "toml", "json", "sql", "ini"}
NOT_RUN = 3
"""The highest allowed number of skipped blocks."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_the_blocks_of_a_document(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TASKSTORE_URL", raising=False)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    runner = BlockRunner()
    for block in blocks_of(path):
        runner.run(block)


def test_a_program_with_its_own_postgresql_database(
    postgres_server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", postgres_server.new_database())
    runner = BlockRunner()
    for block in blocks_of(ROOT / "docs" / "in-your-own-database.md"):
        runner.run(block)
    in_schema = (
        "console",
        "$ python app_with_schema.py\n...0001 []\n$ alembic check\n...No new...\n",
    )
    runner.run(Block(ROOT / "docs", 1, *in_schema, "", ""))


def test_few_blocks_are_skipped() -> None:
    blocks = [block for path in DOCUMENTS for block in blocks_of(path)]
    skipped = [block.location for block in blocks if block.remark == "not run"]
    assert len(skipped) <= NOT_RUN, skipped


def test_every_block_has_a_known_language() -> None:
    unknown = {
        block.location: block.language
        for path in DOCUMENTS
        for block in blocks_of(path)
        if block.language not in LANGUAGES
    }
    assert not unknown


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_have_a_target(path: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), f"{name_of(path)} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            anchors = {
                re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings
            }
            assert anchor in anchors, f"{name_of(path)} links to {target}"


def test_every_table_and_column_is_described() -> None:
    from taskstore.stores.sql.tables import metadata

    described = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "formats.md").read_text()))
    for table in metadata.tables.values():
        assert {table.name, *(column.name for column in table.columns)} <= described, table.name


def test_every_error_is_in_the_operations_guide() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    errors = [name for name in taskstore.__all__ if name.endswith(("Error", "NotFound"))]
    for name in [*errors, "InvalidTransition"]:
        assert name == "TaskStoreError" or f"| `{name}` |" in text, name


def modules() -> list[str]:
    found = pkgutil.walk_packages(taskstore.__path__, "taskstore.")
    return ["taskstore", *(module.name for module in found if "__main__" not in module.name)]


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0
