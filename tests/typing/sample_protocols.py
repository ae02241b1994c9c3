"""Users' protocols as they write them: no checker may object to any."""

from __future__ import annotations

import asyncio
from typing import Any

import ipsec_aio
from ipsec_aio import PToken


class Echo(ipsec_aio.DatagramProtocol):
    """All parameters annotated, with asyncio's own transport."""

    transport: asyncio.DatagramTransport

    def connection_made(self, transport: asyncio.DatagramTransport, ptoken: PToken | None) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int], ptoken: PToken) -> None:
        if ptoken.protected:
            self.transport.sendto(data, addr)

    def error_received(self, exc: Exception) -> None:
        raise exc

    def datagram_refused(self, addr: tuple[str, int], error: ipsec_aio.ProtectionError) -> None:
        print(addr, error.clause)


class LouderEcho(Echo):
    """A subclass of a subclass."""

    def datagram_received(self, data: bytes, addr: tuple[str, int], ptoken: PToken) -> None:
        super().datagram_received(data.upper(), addr, ptoken)


class Base(ipsec_aio.DatagramProtocol):
    """The widest transport, and IPv6 addresses."""

    def connection_made(self, transport: asyncio.BaseTransport, ptoken: PToken | None) -> None:
        super().connection_lost(None)

    def datagram_received(
        self, data: bytes, addr: tuple[str, int, int, int], ptoken: PToken
    ) -> None:
        print(data, addr, ptoken)


class Stream(ipsec_aio.Protocol):
    def connection_made(self, transport: asyncio.Transport, ptoken: PToken) -> None:
        transport.write(ptoken.audit_string.encode())

    def data_received(self, data: bytes) -> None:
        token = ipsec_aio.current_ptoken()
        if token is not None:
            print(token.privacy_protected)

    def eof_received(self) -> bool:
        return True


class Buffered(ipsec_aio.BufferedProtocol):
    def __init__(self) -> None:
        self.buffer = bytearray(4096)

    def connection_made(self, transport: asyncio.BaseTransport, ptoken: PToken) -> None:
        print(transport, ptoken)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        print(self.buffer[:nbytes])


class Plain(asyncio.DatagramProtocol):
    def datagram_received(self, data: bytes, addr: Any) -> None:
        print(data, addr)


class PlainStream(asyncio.Protocol):
    def data_received(self, data: bytes) -> None:
        print(data)
