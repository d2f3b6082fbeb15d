"""A transaction pooler for PostgreSQL: clients share few server connections.

As in PgBouncer with ``pool_mode=transaction``, a client gets a server connection when it sends
the first message of a transaction, and gives it back when the transaction has ended.  The
settings and prepared statements of a server connection stay when the next client gets it.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from pathlib import Path
from queue import LifoQueue
from typing import NamedTuple

import sqlalchemy as sa

_SSL_REQUEST, _GSS_REQUEST = 80877103, 80877104
_SYNCS = (b"Q", b"S", b"F")
"""The messages that the server answers with a ReadyForQuery."""


class Message(NamedTuple):
    """One message of PostgreSQL's protocol: its type, and all of its bytes."""

    kind: bytes
    data: bytes


def _take(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionError
        data += part
    return data


def _message(connection: socket.socket) -> Message:
    head = _take(connection, 5)
    return Message(head[:1], head + _take(connection, struct.unpack("!I", head[1:])[0] - 4))


class Pooler:
    """A pooler in front of the database of a URL, on a port of this machine.

    ``backends`` is the number of server connections.  If ``replays_greeting`` is false, each
    client gets a process id of its own for its cancel key, as from every pooler in use; otherwise
    each client gets the process id of the first server connection.
    """

    def __init__(self, url: str, *, backends: int = 2, replays_greeting: bool = False) -> None:
        self._url = sa.make_url(url)
        self._replays_greeting = replays_greeting
        self._clients = 0
        self._sockets: list[socket.socket] = []
        # The server connection that was returned last is used first, as in PgBouncer.
        self._free: LifoQueue[socket.socket] = LifoQueue()
        greetings = [self._connect() for _ in range(backends)]
        self._greeting = greetings[-1]
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.statements: list[str] = []
        """The texts of all statements that clients have sent."""
        threading.Thread(target=self._accept, daemon=True).start()

    def url(self, options: str = "") -> str:
        """The URL through the pooler."""
        port = self._listener.getsockname()[1]
        return f"postgresql+psycopg://postgres@127.0.0.1:{port}/{self._url.database}{options}"

    def close(self) -> None:
        # shutdown() also wakes a thread that waits in accept() or recv().
        for one in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def ask(self, query: str) -> set[str]:
        """The answers of all free server connections to a query of one value."""
        found, answers = [], set()
        while not self._free.empty():
            found.append(self._free.get())
        for backend in found:
            backend.sendall(_query(query))
            while (answer := _message(backend)).kind != b"Z":
                if answer.kind == b"D":
                    answers.add(answer.data[11:].decode())
            self._free.put(backend)
        return answers

    def _connect(self) -> list[Message]:
        """Add a server connection; return the server's greeting."""
        host, port = self._url.query.get("host", self._url.host), self._url.port or 5432
        if host.startswith("/"):
            backend = socket.socket(socket.AF_UNIX)
            backend.connect(str(Path(host) / f".s.PGSQL.{port}"))
        else:
            backend = socket.create_connection((host, port))
        self._sockets.append(backend)
        words = ("user", "postgres", "database", self._url.database, "client_encoding", "UTF8")
        body = struct.pack("!I", 196608) + b"".join(f"{word}\0".encode() for word in words) + b"\0"
        backend.sendall(struct.pack("!I", len(body) + 4) + body)
        greeting = []
        while not greeting or greeting[-1].kind != b"Z":
            greeting.append(_message(backend))
            if greeting[-1].kind == b"E":
                raise RuntimeError(greeting[-1].data)
        self._free.put(backend)
        return greeting

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.append(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            self._greet(client)
            while (message := _message(client)).kind != b"X":
                backend = self._free.get()
                try:
                    self._transaction(client, backend, message)
                finally:
                    self._free.put(backend)
        except OSError:
            pass
        finally:
            client.close()

    def _greet(self, client: socket.socket) -> None:
        while True:
            size = struct.unpack("!I", _take(client, 4))[0]
            [code] = struct.unpack("!I", _take(client, size - 4)[:4])
            if code not in (_SSL_REQUEST, _GSS_REQUEST):
                break
            client.sendall(b"N")
        self._clients += 1
        for kind, data in self._greeting:
            if kind == b"K" and not self._replays_greeting:
                client.sendall(data[:5] + struct.pack("!I", 2**30 + self._clients) + data[9:])
            else:
                client.sendall(data)

    def _transaction(self, client: socket.socket, backend: socket.socket, first: Message) -> None:
        """Pass on messages until the server connection is idle and outside a transaction."""
        due = self._pass_on(backend, first)
        while True:
            ready, _, _ = select.select([client, backend], [], [])
            if backend in ready:
                message = _message(backend)
                client.sendall(message.data)
                if message.kind == b"Z":
                    due -= 1
                    if due == 0 and message.data[-1:] == b"I":
                        return
                continue
            try:
                message = _message(client)
            except OSError:
                message = Message(b"X", b"")
            if message.kind == b"X":
                backend.sendall(_query("ROLLBACK"))
                while _message(backend) != (b"Z", b"Z\0\0\0\5I"):
                    pass
                raise ConnectionError
            due += self._pass_on(backend, message)

    def _pass_on(self, backend: socket.socket, message: Message) -> bool:
        """Send a client's message to the server; return whether a ReadyForQuery is due."""
        if message.kind == b"Q":
            self.statements.append(message.data[5:-1].decode())
        elif message.kind == b"P":
            self.statements.append(message.data[5:].split(b"\0")[1].decode())
        backend.sendall(message.data)
        return message.kind in _SYNCS


def _query(text: str) -> bytes:
    body = text.encode() + b"\0"
    return b"Q" + struct.pack("!I", len(body) + 4) + body
