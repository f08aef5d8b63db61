"""Files that one rank of each node opens for all of its ranks.

Every open of a file on a network file system is a request to its servers, and a corpus of thousands of shards that
each of hundreds of ranks opens is a herd of them. So the lowest rank of a node opens every shard, once, and hands the
descriptors to the others over a Unix socket (SCM_RIGHTS, unix(7)); all map the same file, whose pages the node has once
in memory whoever reads them.

Collective: one all-gather of objects on entering. A rank that fails closes its sockets, and none waits for it.
"""

import os
import secrets
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from data_pipeline.shards import CorpusError

# Descriptors a message. Those under way count against the limit of open files, with a rank's others.
_AT_ONCE = 32
_TIMEOUT = 600.0
_READY, _FAILED = b"ready", b"failed"
_TEXT = 1 << 16


def this_node() -> str:
    """Equal where processes can reach each other's Unix sockets: one kernel, one network namespace."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text()}{Path('/proc/self/ns/net').readlink()}"


class NodeFiles:
    """The ranks of a node, for the time in which they open files; a context manager.

    gather: a value of each rank → those of all, by rank; every rank calls it, in `__init__`. rank: this one.
    Raises CorpusError where another rank of the node does not answer.
    """

    def __init__(self, gather: Callable[[Any], list[Any]], rank: int, node: str | None = None) -> None:
        self._others: list[socket.socket] = []
        self._first: socket.socket | None = None
        self._taken: list[int] = []
        listener = _socket()
        # An abstract name: no file is left behind.
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
            raise _silent() from None
        other.settimeout(_TIMEOUT)
        # Whoever finds the socket may knock: only this user's processes are let in.
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
        # Those that nobody took: an error came between.
        while self._taken:
            os.close(self._taken.pop())

    def open(self, open_one: Callable[[int], int], number: int) -> Iterator[int]:
        """Descriptors of open_one(0) … open_one(number − 1), which the node's lowest rank alone calls; as `OpenFiles`.

        Every rank of the node calls this, for the same files in the same order. An error of open_one is raised by all.
        """
        for start in range(0, number, _AT_ONCE):
            count = min(_AT_ONCE, number - start)
            self._taken = self._receive(count) if self._first else self._send(open_one, range(start, start + count))
            while self._taken:
                yield self._taken.pop(0)

    def _send(self, open_one: Callable[[int], int], indices: range) -> list[int]:
        opened: list[int] = []
        try:
            for i in indices:
                opened.append(open_one(i))
        except Exception as error:
            for descriptor in opened:
                os.close(descriptor)
            self._tell([_FAILED + str(error).encode()[: _TEXT - len(_FAILED)]], [])
            raise
        self._tell([_READY], opened)
        return opened

    def _tell(self, message: list[bytes], descriptors: list[int]) -> None:
        """To all, then wait until each has it: descriptors under way are limited in number."""
        for other in list(self._others):
            try:
                socket.send_fds(other, message, descriptors)
            except OSError:
                self._others.remove(other)  # it failed, and says so itself
        for other in list(self._others):
            try:
                if not other.recv(1):
                    self._others.remove(other)
            except ConnectionError:
                self._others.remove(other)
            except TimeoutError:
                raise _silent() from None

    def _receive(self, count: int) -> list[int]:
        assert self._first is not None
        try:
            message, descriptors, _, _ = socket.recv_fds(self._first, _TEXT, _AT_ONCE)
            if message:
                self._first.send(b".")
        except TimeoutError:
            raise _silent() from None
        if message.startswith(_FAILED):
            raise CorpusError(message.removeprefix(_FAILED).decode(errors="replace"))
        if len(descriptors) != count:
            for descriptor in descriptors:
                os.close(descriptor)
            raise CorpusError("the rank of this node that opens the files for all has failed")
        return list(descriptors)


def _socket() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made.settimeout(_TIMEOUT)
    return made


def _silent() -> CorpusError:
    return CorpusError(f"a rank of this node has not answered for {_TIMEOUT:.0f} seconds while files were opened")
