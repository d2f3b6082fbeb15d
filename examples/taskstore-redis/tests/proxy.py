"""A proxy in front of a Redis server, which injects connection faults."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

from taskstore_redis.scripts import script


class Proxy:
    """Forwards requests to a server; ``faults`` lists the faults of the next requests for one
    script.

    ``lose_request``: break the connection and drop the request.
    ``lose_answer``: forward the request, and break the connection before the answer.
    ``hold``: break the connection, and forward the request when :meth:`deliver` is called.
    ``stall``: drop the request and keep the connection.
    """

    def __init__(self, host: str, port: int, script_name: str = "apply") -> None:
        self._target = (host, port)
        self._digest = script(script_name).digest.encode()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._held: list[Callable[[], None]] = []
        self.port = self._listener.getsockname()[1]
        self.faults: list[str] = []
        self.injected: list[str] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(self._target)
                except OSError:
                    client.close()
                    continue
                self._sockets += [client, server]
                threading.Thread(target=self._requests, args=(client, server), daemon=True).start()

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        forward_answers = threading.Event()
        forward_answers.set()

        def answers() -> None:
            with contextlib.suppress(OSError):
                while data := server.recv(65536):
                    if not forward_answers.is_set():
                        break
                    client.sendall(data)
            _close(client, server)

        threading.Thread(target=answers, daemon=True).start()
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 20):
                if self._digest in data and self.faults:
                    fault = self.faults.pop(0)
                    self.injected.append(fault)
                    if fault == "stall":
                        continue
                    if fault == "hold":
                        self._held.append(lambda data=data: server.sendall(data))
                        client.shutdown(socket.SHUT_RDWR)
                        return  # the server's side stays open
                    forward_answers.clear()
                    if fault == "lose_answer":
                        server.sendall(data)
                        continue
                    break
                server.sendall(data)
        _close(client, server)

    def deliver(self) -> None:
        """Forward the held requests, as a slow network does."""
        while self._held:
            self._held.pop()()

    def close(self) -> None:
        """Break all connections, and accept no new connection."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        _close(*self._sockets)


def _close(*sockets: socket.socket) -> None:
    for each in sockets:
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
        each.close()
