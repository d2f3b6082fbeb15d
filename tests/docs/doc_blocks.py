"""The code blocks of a Markdown document, and running them in order, as a reader would.

A comment on the line before a fence says what else to do with the block:
``<!-- not run: why -->`` leaves it alone, ``<!-- file: name -->`` writes it to
a file of that name instead of running it.
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
_LOOSELY = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Block(NamedTuple):
    """One fenced block: where it is, its language, text, and the remark before it."""

    path: Path
    line: int
    language: str
    text: str
    remark: str
    value: str

    @property
    def place(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def blocks_of(path: Path) -> Iterator[Block]:
    document = path.read_text()
    for fence in _FENCE.finditer(document):
        before = document[: fence.start()]
        remark = _REMARK.search(before)
        kind, value = remark.groups() if remark else ("", "")
        yield Block(path, before.count("\n") + 2, fence[1], fence[2], kind, value)


class Reader:
    """Follows a document in the current directory, which should be empty."""

    def __init__(self) -> None:
        self.namespace: dict[str, Any] = {"__name__": "__main__"}
        self.exported: dict[str, str] = {}

    def follow(self, block: Block) -> None:
        if block.remark == "not run":
            return
        if block.remark == "file":
            Path(block.value).write_text(block.text)
        elif block.language == "python":
            self._python(block)
        elif block.language == "console":
            self._console(block)

    def _python(self, block: Block) -> None:
        # As many empty lines in front as put the traceback on the document's own line.
        source = "\n" * (block.line - 1) + block.text
        exec(compile(source, str(block.path), "exec"), self.namespace)

    def _console(self, block: Block) -> None:
        checker = doctest.OutputChecker()
        for session in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            command, _, wanted = session.partition("\n")
            if command.startswith("export "):
                name, _, value = command.removeprefix("export ").partition("=")
                self.exported[name] = value
                continue
            done = self._shell(command)
            assert done.returncode == 0, f"{block.place}: {command}\n{done.stdout}"
            if wanted.strip():
                assert checker.check_output(wanted, done.stdout, _LOOSELY), (
                    f"{block.place}: {command}\n--- wanted\n{wanted}\n--- got\n{done.stdout}"
                )

    def _shell(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a command with this environment's programs first, away from the user's files."""
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
