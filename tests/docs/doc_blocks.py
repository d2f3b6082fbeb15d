"""The code blocks of Markdown documents, and a runner for them.

A comment on the line before a fence changes the treatment of the block:
``<!-- not run: why -->`` skips it, ``<!-- file: name -->`` writes it to a file of that
name instead.
"""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_REMARK = re.compile(r"<!-- (not run|file): (.+?) -->\n\Z")
_DOCTEST_OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Block(NamedTuple):
    """One fenced block: its location, language, text, and the comment before it."""

    path: Path
    line: int
    language: str
    text: str
    remark: str
    value: str

    @property
    def location(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def blocks_of(path: Path) -> Iterator[Block]:
    document = path.read_text()
    for fence in _FENCE.finditer(document):
        before = document[: fence.start()]
        remark = _REMARK.search(before)
        kind, value = remark.groups() if remark else ("", "")
        yield Block(path, before.count("\n") + 2, fence[1], fence[2], kind, value)


class BlockRunner:
    """Runs the blocks of a document in the current directory, which should be empty."""

    def __init__(self) -> None:
        self.namespace: dict[str, Any] = {"__name__": "__main__"}
        self.exported: dict[str, str] = {}

    def run(self, block: Block) -> None:
        if block.remark == "not run":
            return
        if block.remark == "file":
            Path(block.value).write_text(block.text)
        elif block.language == "python":
            self._python(block)
        elif block.language == "console":
            self._console(block)

    def _python(self, block: Block) -> None:
        # The empty lines give a traceback the line numbers of the document.
        source = "\n" * (block.line - 1) + block.text
        exec(compile(source, str(block.path), "exec"), self.namespace)

    def _console(self, block: Block) -> None:
        checker = doctest.OutputChecker()
        for session in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            command, _, expected = session.partition("\n")
            if command.startswith("export "):
                name, _, value = command.removeprefix("export ").partition("=")
                self.exported[name] = value
                continue
            result = self._shell(command)
            assert result.returncode == 0, f"{block.location}: {command}\n{result.stdout}"
            if expected.strip():
                assert checker.check_output(expected, result.stdout, _DOCTEST_OPTIONS), (
                    f"{block.location}: {command}\n"
                    f"--- expected\n{expected}\n--- actual\n{result.stdout}"
                )

    def _shell(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a command with the programs of this environment and a temporary home."""
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        state = {"HOME": str(Path.cwd()), "XDG_STATE_HOME": str(Path.cwd() / "state")}
        return subprocess.run(
            ["bash", "-c", command],
            env={**os.environ, **state, "PATH": programs, "COLUMNS": "100", **self.exported},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            check=False,
        )
