"""Shared opening of files: one rank per node opens each file and passes the descriptor to the node's other ranks.

Every open on a network file system is a request to its servers, and thousands of shards opened by each of hundreds of
ranks would overload them. The lowest rank of a node therefore opens every shard once and passes the descriptors to the
others over a Unix socket (SCM_RIGHTS, unix(7)); all of them map the same file, whose pages the node keeps in memory
once.

Collective: one all-gather of objects at construction. A rank that fails closes its sockets; no rank waits for it.
"""

import os
import secrets
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from data_pipeline.shards import CorpusError

# Descriptors per message. Descriptors in flight count towards a process's limit of open files.
_AT_ONCE = 32
_TIMEOUT = 600.0
_READY, _FAILED = b"ready", b"failed"
_TEXT = 1 << 16


def this_node() -> str:
    """Node id, equal for processes that can reach each other's Unix sockets: same kernel and network namespace."""
    return (
        f"{Path('/proc/sys/kernel/random/boot_id').read_text(encoding='utf-8')}{Path('/proc/self/ns/net').readlink()}"
    )


class NodeFiles:
    """Connections between the ranks of a node while they open files; a context manager.

    gather: collective, a value of each rank → the values of all ranks, in order; called in `__init__`. rank: this
    rank. node: id of this node, default `this_node()`.

    Raises CorpusError if another rank of the node does not respond.
    """

    def __init__(self, gather: Callable[[Any], list[Any]], rank: int, node: str | None = None) -> None:
        self._others: list[socket.socket] = []
        self._first: socket.socket | None = None
        self._received: list[int] = []
        listener = _socket()
        # Abstract name: leaves no file behind.
        listener.bind(f"\0maskvr-{secrets.token_hex(16)}")
        listener.listen(1024)
        node = this_node() if node is None else node
        ranks = gather((node, listener.getsockname()))
        here = [(other, name) for other, (theirs, name) in enumerate(ranks) if theirs == node]
        with listener:
            if here[0][0] == rank:
                while len(self._others) < len(here) - 1:
                    self._accept(listener)
                return
        self._first = _socket()
        self._first.connect(here[0][1])

    def _accept(self, listener: socket.socket) -> None:
        try:
            other, _ = listener.accept()
        except TimeoutError:
            raise _no_response() from None
        other.settimeout(_TIMEOUT)
        # Any local user can connect to an abstract socket; check the peer's uid.
        _, user, _ = struct.unpack("3i", other.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        if user == os.getuid():
            self._others.append(other)
        else:
            other.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in (*self._others, *([self._first] if self._first else [])):
            connection.close()
        # Descriptors left over after an error.
        while self._received:
            os.close(self._received.pop())

    def open(self, open_one: Callable[[int], int], number: int) -> Iterator[int]:
        """Descriptors of open_one(0) … open_one(number − 1), each called on the node's lowest rank only.

        Has the signature of `OpenFiles`. Collective over the node: call on all its ranks, with the same files in the
        same order. An error of open_one is raised on all of them.
        """
        for start in range(0, number, _AT_ONCE):
            count = min(_AT_ONCE, number - start)
            self._received = self._receive(count) if self._first else self._send(open_one, range(start, start + count))
            while self._received:
                yield self._received.pop(0)

    def _send(self, open_one: Callable[[int], int], indices: range) -> list[int]:
        opened: list[int] = []
        try:
            for i in indices:
                opened.append(open_one(i))
        except Exception as error:
            for descriptor in opened:
                os.close(descriptor)
            self._broadcast([_FAILED + str(error).encode()[: _TEXT - len(_FAILED)]], [])
            raise
        self._broadcast([_READY], opened)
        return opened

    def _broadcast(self, message: list[bytes], descriptors: list[int]) -> None:
        """Send to all, then wait for their acknowledgements: the number of descriptors in flight is limited."""
        for other in list(self._others):
            try:
                socket.send_fds(other, message, descriptors)
            except OSError:
                self._others.remove(other)  # it failed and reports its own error
        for other in list(self._others):
            try:
                if not other.recv(1):
                    self._others.remove(other)
            except ConnectionError:
                self._others.remove(other)
            except TimeoutError:
                raise _no_response() from None

    def _receive(self, count: int) -> list[int]:
        assert self._first is not None
        try:
            message, descriptors, _, _ = socket.recv_fds(self._first, _TEXT, _AT_ONCE)
            if message:
                self._first.send(b".")
        except TimeoutError:
            raise _no_response() from None
        if message.startswith(_FAILED):
            raise CorpusError(message.removeprefix(_FAILED).decode(errors="replace"))
        if len(descriptors) != count:
            for descriptor in descriptors:
                os.close(descriptor)
            raise CorpusError("the rank that opens files for all ranks of this node has failed")
        return list(descriptors)


def _socket() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made.settimeout(_TIMEOUT)
    return made


def _no_response() -> CorpusError:
    return CorpusError(f"a rank of this node has not responded for {_TIMEOUT:.0f} seconds while files were opened")
