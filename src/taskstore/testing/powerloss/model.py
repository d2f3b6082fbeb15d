"""The model: which states of the files a power loss may leave.

What is known for certain after a power loss is what was synced:

- ``fsync`` or ``fdatasync`` of a file makes its bytes and its length durable,
  not its name; ``fsync`` of a directory makes its names durable, not what is
  in the files.  (POSIX promises no more; ``fsync(2)`` of Linux warns of the
  name.)
- Everything else has reached the disk or not, in any order, because the
  kernel writes back what it likes when it likes, and drives reorder.

So at any moment, of what is not synced:

- Each **block of 512 bytes** holds what it held at the last sync or what any
  write since then has made of it.  A drive writes such a block whole or not at
  all (SQLite relies on the same); a longer write is torn at any boundary, and
  also with a later block there and an earlier one missing.
- The **length** is that of the last sync, of any write or truncation since
  then, or ends at any 512-byte boundary that a write went across.  What lies
  within the length and was not written is zeros, as on ext4 (``ordered``),
  XFS and btrfs; a file system that shows what other files left in a block
  (ext4 with ``data=writeback``) is outside of the model.
- Of the **names** created, renamed and removed in a directory, any subset has
  happened.  ext4 and XFS journal them in order, so that only the last ones can
  be missing; btrfs logs single files at their fsync, so that a later one may
  be there without an earlier one.  Any subset covers all three.  A rename is
  one step: the file is never under both names nor under none.

After a sync that failed, a later one that succeeds is taken at its word, though
Linux may have dropped the pages meanwhile: a store must not go on after the
failure on the strength of what it wrote before.

Pillai and others, "All File Systems Are Not Created Equal" (OSDI 2014), found
this out for each file system; this model allows more than any of them, so
that it may call for a sync that the one at hand would do without.

A state is a choice for each of these.  Where the choices of a moment are few,
every combination is built; where they are many: all old, all new, each choice
by itself against both, and then combinations drawn at random with a fixed seed.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import product
from typing import NamedTuple

from taskstore.testing.powerloss.recorder import (
    Made,
    Omitted,
    Operation,
    Removed,
    Renamed,
    Said,
    Synced,
    Truncated,
    Wrote,
)

BLOCK = 512
"""What a drive writes whole or not at all, in bytes."""

_PAST = 8
"""How many moments of a file are remembered since its last sync."""

IMAGES = 4
"""Of a block that was written more often since the last sync, the images that
are told apart: the durable one, the first, and the last ones."""

_ROOT = 1

Tree = dict[str, bytes | None]
"""The files by their paths, in order; ``None`` for a directory."""


class State(NamedTuple):
    """What one power loss may leave: the files, and what is missing in words."""

    tree: Tree
    missing: str

    @property
    def digest(self) -> bytes:
        """What tells this tree from another."""
        found = hashlib.blake2b(digest_size=16)
        for path, data in self.tree.items():
            kind = b"d" if data is None else b"f%d:" % len(data)
            found.update(b"%d:%b%b%b" % (len(path), path.encode(), kind, data or b""))
        return found.digest()


class Moment(NamedTuple):
    """A power loss right after the operation ``number`` (from 1) of the log.

    ``said`` is the last that the workload had to say.  ``allowed`` is how many
    states the model allows; ``states`` are those that are to be looked at,
    ``exhaustive`` when that is all of them.
    """

    number: int
    said: object
    allowed: int
    exhaustive: bool
    states: Iterator[State]


class _File:
    """What may have become of the bytes of a file."""

    def __init__(self) -> None:
        self.image = bytearray()
        self.settle()

    def settle(self) -> None:
        """What is written is durable."""
        self.durable = bytes(self.image)
        self.lengths = [len(self.durable)]
        self.blocks: dict[int, list[bytes]] = {}
        self.past: list[bytes] = []

    def _remember(self) -> None:
        """Remember the file as it is, which is one of the states that it may be in."""
        self.past = [*self.past[-_PAST:], bytes(self.image)]

    def write(self, offset: int, data: bytes) -> None:
        self._remember()
        before, end = len(self.image), offset + len(data)
        if offset > before:
            self.image.extend(bytes(offset - before))
        self.image[offset:end] = data
        for length in (*range((before // BLOCK + 1) * BLOCK, end, BLOCK), len(self.image)):
            self._note_length(length)
        self._note_blocks(min(offset, before), end)

    def truncate(self, size: int) -> None:
        self._remember()
        before = len(self.image)
        del self.image[size:]
        self.image.extend(bytes(size - len(self.image)))
        self._note_length(size)
        self._note_blocks(min(size, before), max(size, before))

    def _note_length(self, length: int) -> None:
        durable, *others = self.lengths
        others = [other for other in others if other != length]
        self.lengths = [durable, *others, length] if others or length != durable else [durable]

    def _note_blocks(self, begin: int, end: int) -> None:
        for number in range(begin // BLOCK, -(-end // BLOCK)):
            image = _block(self.image, number)
            durable, *others = self.blocks.get(number, [_block(self.durable, number)])
            others = [other for other in others if other != image]
            if others or image != durable:
                # The durable one, the first, and the last ones.
                others = [*others[:1], *others[1:][3 - IMAGES :], image]
                self.blocks[number] = [durable, *others]
            else:
                self.blocks.pop(number, None)

    def axes(self) -> list[int]:
        """How many choices there are: for the length, and for each block."""
        changed = [len(images) for images in self.blocks.values()]
        return [len(self.lengths), *changed] if changed or len(self.lengths) > 1 else []

    def moments(self) -> Iterator[list[int]]:
        """The choices by which the file is as it was at some moment since the last sync."""
        for image in self.past:
            wanted = [_block(image, number) for number in self.blocks]
            with suppress(ValueError):  # that length or block is not told apart any more
                yield [
                    self.lengths.index(len(image)),
                    *map(list.index, self.blocks.values(), wanted),
                ]

    def content(self, choice: Sequence[int]) -> bytes:
        """The bytes of a choice out of :meth:`axes`."""
        if not choice:
            return self.durable
        length = self.lengths[choice[0]]
        data = bytearray(self.durable[:length].ljust(length, b"\0"))
        for chosen, (number, images) in zip(choice[1:], self.blocks.items(), strict=True):
            if number * BLOCK < length:
                data[number * BLOCK : (number + 1) * BLOCK] = images[chosen]
        return bytes(data[:length])

    def missing(self, choice: Sequence[int]) -> str:
        if not choice:
            return ""
        blocks = [
            str(number)
            for chosen, (number, images) in zip(choice[1:], self.blocks.items(), strict=True)
            if chosen < len(images) - 1
        ]
        length = self.lengths[choice[0]]
        told = [f"length {length} of {len(self.image)}"] if length != len(self.image) else []
        return " and ".join(told + ([f"blocks {','.join(blocks)} old"] if blocks else []))


def _block(image: bytes | bytearray, number: int) -> bytes:
    return bytes(image[number * BLOCK : (number + 1) * BLOCK]).ljust(BLOCK, b"\0")


class _Directory:
    """What may have become of the names in a directory."""

    def __init__(self) -> None:
        self.durable: dict[str, int] = {}
        self.pending: list[Made | Renamed | Removed] = []

    def settle(self) -> None:
        """The names are durable."""
        self.durable = self.names([1] * len(self.pending))
        self.pending = []

    def axes(self) -> list[int]:
        """How many choices there are: each name has changed or has not."""
        return [2] * len(self.pending)

    def names(self, choice: Sequence[int]) -> dict[str, int]:
        """The names when of what is pending only the chosen has happened."""
        names = dict(self.durable)
        for happened, operation in zip(choice, self.pending, strict=True):
            if not happened:
                continue
            match operation:
                case Made(_, name, node, _):
                    names[name] = node
                case Renamed(_, old, new, node):
                    if names.get(old) == node:
                        del names[old]
                    names[new] = node
                case Removed(_, name, node):
                    if names.get(name) == node:
                        del names[name]
        return names

    def missing(self, choice: Sequence[int]) -> str:
        undone = [
            f"{type(operation).__name__.lower()} {getattr(operation, 'name', '')}"
            f"{getattr(operation, 'new', '')}"
            for happened, operation in zip(choice, self.pending, strict=True)
            if not happened
        ]
        return f"not {', '.join(undone)}" if undone else ""


class Model:
    """Follows a log and tells what a power loss may leave at each moment."""

    def __init__(self, *, most: int, seed: int) -> None:
        self._most = most
        self._chance = random.Random(seed)  # noqa: S311 - choices, not secrets
        self._nodes: dict[int, _File | _Directory] = {_ROOT: _Directory()}

    def moments(self, log: Sequence[Operation]) -> Iterator[Moment]:
        """The moments of a log, in order; the states of each have to be asked for at once.

        Right after a sync there is no state that was not there before it.
        """
        said: object = None
        for number, operation in enumerate(log, 1):
            if isinstance(operation, Said):
                said = operation.what
            else:
                self._follow(operation)
            if not isinstance(operation, Synced | Omitted):
                yield self._moment(number, said)

    def _follow(self, operation: Operation) -> None:
        match operation:
            case Made(directory, _, node, folder):
                self._directory(directory).pending.append(operation)
                self._nodes[node] = _Directory() if folder else _File()
            case Renamed(directory) | Removed(directory):
                self._directory(directory).pending.append(operation)
            case Wrote(node, offset, data):
                self._file(node).write(offset, data)
            case Truncated(node, size):
                self._file(node).truncate(size)
            case Synced(node):
                self._nodes[node].settle()

    def _moment(self, number: int, said: object) -> Moment:
        nodes = self._within_reach()
        sizes = [self._nodes[node].axes() for node in nodes]
        axes = [size for axis in sizes for size in axis]
        allowed = math.prod(axes)
        exhaustive = allowed <= self._most
        choices = product(*map(range, axes)) if exhaustive else self._some(axes, nodes)

        def states() -> Iterator[State]:
            for flat in choices:
                rest = iter(flat)
                yield self._state(
                    {
                        node: [next(rest) for _ in size]
                        for node, size in zip(nodes, sizes, strict=True)
                    }
                )

        return Moment(number, said, allowed, exhaustive, states())

    def _some(self, axes: Sequence[int], nodes: Sequence[int]) -> Iterator[Sequence[int]]:
        """Not every combination, but those that are most likely to matter, and some others."""
        old, new = [0] * len(axes), [size - 1 for size in axes]
        chosen = [old, new, *self._past(new, nodes)][: self._most // 3]
        for base, share in ((new, 0.7), (old, 0.85)):
            singles = [
                [*base[:axis], other, *base[axis + 1 :]]
                for axis, size in enumerate(axes)
                for other in range(size)
                if other != base[axis]
            ]
            count = min(len(singles), int(self._most * share) - len(chosen))
            chosen += self._chance.sample(singles, max(count, 0))
        yield from chosen
        for _ in range(self._most - len(chosen)):
            yield [self._chance.randrange(size) for size in axes]

    def _past(self, new: list[int], nodes: Sequence[int]) -> Iterator[list[int]]:
        """One file as it was at some moment, everything else as it is."""
        begin = 0
        for number in nodes:
            node = self._nodes[number]
            width = len(node.axes())
            if isinstance(node, _File) and width:
                for choice in node.moments():
                    yield [*new[:begin], *choice, *new[begin + width :]]
            begin += width

    def _within_reach(self) -> list[int]:
        """The files and directories that have a name, whichever names were to remain."""
        found, todo = dict.fromkeys([_ROOT]), [_ROOT]
        while todo:
            node = self._nodes[todo.pop()]
            if isinstance(node, _Directory):
                named = [*node.durable.values(), *(operation.node for operation in node.pending)]
                todo += [number for number in named if number not in found]
                found.update(dict.fromkeys(named))
        return list(found)

    def _state(self, choices: dict[int, list[int]]) -> State:
        tree: Tree = {}
        missing = []

        def look(directory: int, prefix: str) -> None:
            folder = self._directory(directory)
            if told := folder.missing(choices[directory]):
                missing.append(told)
            for name, number in sorted(folder.names(choices[directory]).items()):
                node, path = self._nodes[number], f"{prefix}{name}"
                if isinstance(node, _Directory):
                    tree[path] = None
                    look(number, f"{path}/")
                    continue
                tree[path] = node.content(choices[number])
                if told := node.missing(choices[number]):
                    missing.append(f"{name}: {told}")

        look(_ROOT, "")
        return State(tree, "; ".join(missing) or "nothing")

    def _file(self, node: int) -> _File:
        found = self._nodes[node]
        assert isinstance(found, _File)
        return found

    def _directory(self, node: int) -> _Directory:
        found = self._nodes[node]
        assert isinstance(found, _Directory)
        return found
