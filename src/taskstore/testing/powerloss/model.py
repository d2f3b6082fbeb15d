"""The crash model: the file states that a power loss can leave.

After a power loss, only data that an fsync flushed to disk is certain to be present:

- ``fsync`` or ``fdatasync`` of a file makes its bytes and its length durable, but not its
  name.  ``fsync`` of a directory makes the names in the directory durable, but not the
  content of the files.  (POSIX makes no other guarantee.  The Linux manual page of
  ``fsync(2)`` warns that after an fsync of a file, the name of the file can still be missing.)
- Each change that no fsync flushed can be present or missing, in any combination, because
  the kernel writes changed memory pages to disk at any time, and drives reorder writes.

So a power loss at any moment has these possible results:

- Each **block of 512 bytes** of a file has the content that it had at the latest fsync of
  the file, or after any later write.  A drive writes a block completely or not at all
  (SQLite relies on the same property).  A write of several blocks can be torn at any block
  boundary, and a later block can be present while an earlier block is missing.
- The **length** of a file is one of these: (a) the length at the latest fsync; (b) the length after
  a write or truncation since this fsync; (c) a 512-byte boundary that a write since this fsync
  crossed.  If a byte below this length was not written to disk, the byte is zero, as on ext4
  (``ordered``), XFS and btrfs.  The model does not cover file systems that show old bytes of other
  files in a block (ext4 with ``data=writeback``).
- Any subset of the changes of **names** in a directory (creation, renaming, removal) can be
  present.  ext4 and XFS journal the changes of names in order, so only the most recent changes can
  be missing.  When a program makes an fsync of a file, btrfs logs only the changes of this file, so
  a later change of a name can be present without an earlier change.  The model covers ext4, XFS and
  btrfs, because the model allows any subset of the changes of names.  A rename is atomic: the
  renamed file always has exactly one of the two names.

If an fsync of a file fails and a later fsync succeeds, the model treats all earlier writes as
durable, although Linux can have dropped the data of these writes.  After a failed fsync, a store
must not rely on the writes before this fsync.  The model cannot detect a store that breaks this
rule.

Pillai and others, "All File Systems Are Not Created Equal" (OSDI 2014), list the behaviour of
several file systems.  The model allows more crash states than any of these file systems.  Therefore
a store can need an fsync in the model that the store does not need on a certain file system.

A crash state is one combination of block contents, file lengths and names.  If a crash point has
few combinations, the model builds all combinations.  Otherwise the model builds a sample: the
combination with all changes missing, the combination with all changes present, variants of these
two combinations that differ in one choice, and random combinations with a fixed seed.
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
    Created,
    Expects,
    Operation,
    Removed,
    Renamed,
    Synced,
    SyncOmitted,
    Truncated,
    Written,
)

BLOCK = 512
"""The number of bytes that a drive writes atomically."""

_PAST_IMAGES = 8
"""How many earlier images of a file, since its latest fsync, the model keeps."""

IMAGES = 4
"""The number of images of a block that the model keeps: the image at the latest fsync of the
file, the first image after this fsync, and the most recent images."""

_ROOT = 1

Tree = dict[str, bytes | None]
"""Maps each path, in path order, to the content of the file; maps a directory to ``None``."""


class CrashState(NamedTuple):
    """The files after a power loss, and a text that names the missing changes."""

    tree: Tree
    missing: str

    @property
    def digest(self) -> bytes:
        """The hash of all paths and file contents in ``tree``."""
        digest = hashlib.blake2b(digest_size=16)
        for path, data in self.tree.items():
            kind = b"d" if data is None else b"f%d:" % len(data)
            digest.update(b"%d:%b%b%b" % (len(path), path.encode(), kind, data or b""))
        return digest.digest()


class CrashPoint(NamedTuple):
    """A power loss right after operation ``number`` (from 1) of the recorded trace.

    ``expected`` is the allowed content that the workload recorded most recently before
    the power loss.  ``possible`` counts the crash states that the model allows.  ``states``
    yields the crash states to check: all possible crash states if ``exhaustive`` is true,
    otherwise a sample.
    """

    number: int
    expected: object
    possible: int
    exhaustive: bool
    states: Iterator[CrashState]


class _File:
    """One file, with the contents that the file can have after a power loss."""

    def __init__(self) -> None:
        self.image = bytearray()
        self.sync()

    def sync(self) -> None:
        """Make the present content of the file durable, as an fsync does."""
        self.durable = bytes(self.image)
        self.lengths = [len(self.durable)]
        self.blocks: dict[int, list[bytes]] = {}
        self.past: list[bytes] = []

    def _keep_image(self) -> None:
        """Keep the present image of the file as one of its possible contents."""
        self.past = [*self.past[-_PAST_IMAGES:], bytes(self.image)]

    def write(self, offset: int, data: bytes) -> None:
        self._keep_image()
        before, end = len(self.image), offset + len(data)
        if offset > before:
            self.image.extend(bytes(offset - before))
        self.image[offset:end] = data
        for length in (*range((before // BLOCK + 1) * BLOCK, end, BLOCK), len(self.image)):
            self._add_length(length)
        self._add_block_images(min(offset, before), end)

    def truncate(self, size: int) -> None:
        self._keep_image()
        before = len(self.image)
        del self.image[size:]
        self.image.extend(bytes(size - len(self.image)))
        self._add_length(size)
        self._add_block_images(min(size, before), max(size, before))

    def _add_length(self, length: int) -> None:
        durable, *others = self.lengths
        others = [other for other in others if other != length]
        self.lengths = [durable, *others, length] if others or length != durable else [durable]

    def _add_block_images(self, begin: int, end: int) -> None:
        for number in range(begin // BLOCK, -(-end // BLOCK)):
            image = _block(self.image, number)
            durable, *others = self.blocks.get(number, [_block(self.durable, number)])
            others = [other for other in others if other != image]
            if others or image != durable:
                # Keep the durable image, the first later image, and the most recent images.
                others = [*others[:1], *others[1:][3 - IMAGES :], image]
                self.blocks[number] = [durable, *others]
            else:
                self.blocks.pop(number, None)

    def axes(self) -> list[int]:
        """Return the numbers of choices: of lengths, then of images for each changed block."""
        changed = [len(images) for images in self.blocks.values()]
        return [len(self.lengths), *changed] if changed or len(self.lengths) > 1 else []

    def past_choices(self) -> Iterator[list[int]]:
        """Yield, for each kept image since the latest fsync, the choices that build this image."""
        for image in self.past:
            wanted = [_block(image, number) for number in self.blocks]
            with suppress(ValueError):  # its length or a block image is not kept
                yield [
                    self.lengths.index(len(image)),
                    *map(list.index, self.blocks.values(), wanted),
                ]

    def content(self, choice: Sequence[int]) -> bytes:
        """Return the content of the file, given one choice for each of the :meth:`axes`."""
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
        lengths = [f"length {length} of {len(self.image)}"] if length != len(self.image) else []
        return " and ".join(lengths + ([f"blocks {','.join(blocks)} old"] if blocks else []))


def _block(image: bytes | bytearray, number: int) -> bytes:
    return bytes(image[number * BLOCK : (number + 1) * BLOCK]).ljust(BLOCK, b"\0")


class _Directory:
    """One directory, with the names that the directory can have after a power loss."""

    def __init__(self) -> None:
        self.durable: dict[str, int] = {}
        self.pending: list[Created | Renamed | Removed] = []

    def sync(self) -> None:
        """Make the present names in the directory durable, as an fsync does."""
        self.durable = self.names([1] * len(self.pending))
        self.pending = []

    def axes(self) -> list[int]:
        """Return 2 for each pending change of a name: the change can be applied or missing."""
        return [2] * len(self.pending)

    def names(self, choice: Sequence[int]) -> dict[str, int]:
        """Return the names and their nodes, with only the chosen pending changes applied."""
        names = dict(self.durable)
        for applied, operation in zip(choice, self.pending, strict=True):
            if not applied:
                continue
            match operation:
                case Created(_, name, node, _):
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
        missing_changes = [
            f"{type(operation).__name__.lower()} {getattr(operation, 'name', '')}"
            f"{getattr(operation, 'new', '')}"
            for applied, operation in zip(choice, self.pending, strict=True)
            if not applied
        ]
        return f"not {', '.join(missing_changes)}" if missing_changes else ""


class Model:
    """Computes the crash states at each crash point of a recorded trace."""

    def __init__(self, *, max_states: int, seed: int) -> None:
        self._max_states = max_states
        self._rng = random.Random(seed)  # noqa: S311 - choices, not secrets
        self._nodes: dict[int, _File | _Directory] = {_ROOT: _Directory()}

    def crash_points(self, trace: Sequence[Operation]) -> Iterator[CrashPoint]:
        """Yield the crash points in order.

        Read all states of a crash point before you request the next crash point.  An fsync
        adds no possible crash state, so there is no crash point right after an fsync.
        """
        expected: object = None
        for number, operation in enumerate(trace, 1):
            if isinstance(operation, Expects):
                expected = operation.allowed
            else:
                self._apply(operation)
            if not isinstance(operation, Synced | SyncOmitted):
                yield self._crash_point(number, expected)

    def _apply(self, operation: Operation) -> None:
        match operation:
            case Created(directory, _, node, is_directory):
                self._directory(directory).pending.append(operation)
                self._nodes[node] = _Directory() if is_directory else _File()
            case Renamed(directory) | Removed(directory):
                self._directory(directory).pending.append(operation)
            case Written(node, offset, data):
                self._file(node).write(offset, data)
            case Truncated(node, size):
                self._file(node).truncate(size)
            case Synced(node):
                self._nodes[node].sync()

    def _crash_point(self, number: int, expected: object) -> CrashPoint:
        nodes = self._reachable()
        sizes = [self._nodes[node].axes() for node in nodes]
        axes = [size for axis in sizes for size in axis]
        possible = math.prod(axes)
        exhaustive = possible <= self._max_states
        choices = product(*map(range, axes)) if exhaustive else self._sample(axes, nodes)

        def states() -> Iterator[CrashState]:
            for flat in choices:
                rest = iter(flat)
                yield self._state(
                    {
                        node: [next(rest) for _ in size]
                        for node, size in zip(nodes, sizes, strict=True)
                    }
                )

        return CrashPoint(number, expected, possible, exhaustive, states())

    def _sample(self, axes: Sequence[int], nodes: Sequence[int]) -> Iterator[Sequence[int]]:
        """Yield the combinations that are most likely to break a store, and random combinations."""
        old, new = [0] * len(axes), [size - 1 for size in axes]
        chosen = [old, new, *self._past_states(new, nodes)][: self._max_states // 3]
        for base, share in ((new, 0.7), (old, 0.85)):
            singles = [
                [*base[:axis], other, *base[axis + 1 :]]
                for axis, size in enumerate(axes)
                for other in range(size)
                if other != base[axis]
            ]
            count = min(len(singles), int(self._max_states * share) - len(chosen))
            chosen += self._rng.sample(singles, max(count, 0))
        yield from chosen
        for _ in range(self._max_states - len(chosen)):
            yield [self._rng.randrange(size) for size in axes]

    def _past_states(self, new: list[int], nodes: Sequence[int]) -> Iterator[list[int]]:
        """Yield combinations: one file has an earlier image, all other files have the newest."""
        begin = 0
        for number in nodes:
            node = self._nodes[number]
            width = len(node.axes())
            if isinstance(node, _File) and width:
                for choice in node.past_choices():
                    yield [*new[:begin], *choice, *new[begin + width :]]
            begin += width

    def _reachable(self) -> list[int]:
        """Return the files and directories that have a name in some crash state."""
        reached, todo = dict.fromkeys([_ROOT]), [_ROOT]
        while todo:
            node = self._nodes[todo.pop()]
            if isinstance(node, _Directory):
                named = [*node.durable.values(), *(operation.node for operation in node.pending)]
                todo += [number for number in named if number not in reached]
                reached.update(dict.fromkeys(named))
        return list(reached)

    def _state(self, choices: dict[int, list[int]]) -> CrashState:
        tree: Tree = {}
        missing = []

        def visit(directory: int, prefix: str) -> None:
            parent = self._directory(directory)
            if text := parent.missing(choices[directory]):
                missing.append(text)
            for name, number in sorted(parent.names(choices[directory]).items()):
                node, path = self._nodes[number], f"{prefix}{name}"
                if isinstance(node, _Directory):
                    tree[path] = None
                    visit(number, f"{path}/")
                    continue
                tree[path] = node.content(choices[number])
                if text := node.missing(choices[number]):
                    missing.append(f"{name}: {text}")

        visit(_ROOT, "")
        return CrashState(tree, "; ".join(missing) or "nothing")

    def _file(self, node: int) -> _File:
        file = self._nodes[node]
        assert isinstance(file, _File)
        return file

    def _directory(self, node: int) -> _Directory:
        directory = self._nodes[node]
        assert isinstance(directory, _Directory)
        return directory
