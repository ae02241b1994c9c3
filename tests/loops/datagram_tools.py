"""Protocols that write down what they are told, and a backend that writes down what it is asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from notes import PATIENCE, Log

import ipsec_aio
from ipsec_aio.backends.contract import Registration
from ipsec_aio.backends.tables import TableBackend
from ipsec_aio.evidence import Evidence
from ipsec_aio.tokens import PToken

HERE = ("127.0.0.1", 0)


class Tokened(ipsec_aio.DatagramProtocol):
    """Gets tokens."""

    transport: Any = None

    def __init__(self) -> None:
        self.log = Log()

    def connection_made(self, transport: Any, ptoken: PToken | None) -> None:
        self.transport = transport
        self.log.note("made", ptoken)

    def datagram_received(self, data: bytes, addr: Any, ptoken: PToken) -> None:
        self.log.note("data", data, addr, ptoken)

    def error_received(self, exc: OSError) -> None:
        self.log.note("error", exc)

    def datagram_refused(self, addr: Any, error: ipsec_aio.ProtectionError) -> None:
        self.log.note("refused", addr, error)

    def pause_writing(self) -> None:
        self.log.note("pause")

    def resume_writing(self) -> None:
        self.log.note("resume")

    def connection_lost(self, exc: Exception | None) -> None:
        self.log.note("lost", exc)


class Plain(asyncio.DatagramProtocol):
    """Knows nothing of tokens."""

    transport: Any = None

    def __init__(self) -> None:
        self.log = Log()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.log.note("made")

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.log.note("data", data, addr)

    def error_received(self, exc: Exception) -> None:
        self.log.note("error", exc)

    def pause_writing(self) -> None:
        self.log.note("pause")

    def resume_writing(self) -> None:
        self.log.note("resume")

    def connection_lost(self, exc: Exception | None) -> None:
        self.log.note("lost", exc)


class Stamp(Registration):
    """A stamp whose state the test sets."""

    def __init__(self, port: int, changed: Callable[[], None], generation: int = 7) -> None:
        self.port = port
        self._changed = changed
        self.closed = False
        self._generation = generation
        self.marks = True
        self.fragments = False

    @property
    def generation(self) -> int:
        return self._generation

    @generation.setter
    def generation(self, value: int) -> None:
        self._generation = value
        self._changed()

    @property
    def reads_marks(self) -> bool:
        return self.marks

    @property
    def keeps_fragments(self) -> bool:
        return self.fragments

    def close(self) -> None:
        self.closed = True


class Witnessing(ipsec_aio.MemoryBackend):
    """Memory's tables, but the evidence is the kernel's own, and kept for the test to read.

    Nobody verified its stamp: a test marks packets at the sender, as an adversary would.
    """

    def __init__(self, **stamp: Any) -> None:
        super().__init__()
        self.generation = 7
        self.set_generation(7)
        self.asked: list[Evidence] = []
        self.stamps: list[Stamp] = []
        self.drained = 0
        self.cookie: int | None = None
        self.stamp = stamp

    @property
    def netns_cookie(self) -> int | None:
        return self.cookie

    async def register(self, protocol: int, port: int) -> Registration:
        del protocol
        self.check()
        stamp = Stamp(port, self.mirror.bump)
        for name, value in self.stamp.items():
            setattr(stamp, name, value)
        self.stamps.append(stamp)
        return stamp

    def drain(self) -> None:
        self.drained += 1
        super().drain()

    def resolve(self, evidence: Evidence) -> PToken:
        token = TableBackend.resolve(self, evidence)
        self.asked.append(evidence)
        return token

    @property
    def evidence(self) -> list[Evidence]:
        """Evidence of datagrams and connections, without what is asked to be at hand."""
        return [e for e in self.asked if e.doubt != "the backend is closed"]


def memory() -> ipsec_aio.MemoryBackend:
    """A backend under which 127.0.0.1 and ::1 are protected, and 127.0.0.2 is not."""
    backend = ipsec_aio.MemoryBackend()
    backend.add_sa(src="127.0.0.1", dst="127.0.0.1")
    backend.add_sa(src="::1", dst="::1")
    return backend


async def until(condition: Callable[[], object]) -> None:
    """Let the loop turn until something that nobody tells of has happened."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


async def close(*transports: Any) -> None:
    """Close transports of recording protocols, and wait for the last call."""
    protocols = [transport.get_protocol() for transport in transports]
    for transport in transports:
        transport.close()
    for protocol in protocols:
        await protocol.log.until("lost")
