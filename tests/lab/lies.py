"""What the tests of lies share: a program on the xfrm backend, and guards that can be taken out."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager, closing, contextmanager, suppress

import pytest
from hosts import PATIENCE, forger

import ipsec_aio
from ipsec_aio import Assurance, BackendError
from ipsec_aio.kernel import stamp_table
from ipsec_aio.kernel.nfnetlink import NftSocket

PORT = 5000
GUARDED = pytest.mark.parametrize("guarded", [False, True], ids=["unguarded", "guarded"])


class Sink(ipsec_aio.DatagramProtocol):
    def __init__(self):
        self.queue = asyncio.Queue()

    def datagram_received(self, data, addr, ptoken):
        self.queue.put_nowait((data, addr[0], ptoken))

    async def next(self, data, peer):
        """Return the token of the next datagram, which must be this one."""
        async with asyncio.timeout(PATIENCE):
            found = await self.queue.get()
        assert found[:2] == (data, peer)
        return found[2]


@asynccontextmanager
async def serving(sock, **options):
    """A datagram endpoint on the xfrm backend; ``sock`` is a socket or an address."""
    where = {"local_addr": sock} if isinstance(sock, tuple) else {"sock": sock}
    options = {"stamp": "install", **options}
    async with ipsec_aio.open_backend("xfrm", **options) as backend:
        transport, sink = await ipsec_aio.create_datagram_endpoint(Sink, backend=backend, **where)
        with closing(transport):
            yield sink


def without(monkeypatch, chain, *purposes):
    """Take rules out of the stamp, as it is installed and as it is verified."""
    whole = getattr(stamp_table, chain)
    left = tuple(rule for rule in whole.rules if rule.purpose not in purposes)
    assert len(left) == len(whole.rules) - len(purposes)
    cut = whole._replace(rules=left)
    monkeypatch.setattr(stamp_table, chain, cut)
    monkeypatch.setitem(stamp_table.CHAINS, whole.name, cut)


@contextmanager
def lasting_stamp(**options):
    """The stamp as an operator installs it, for everybody to change and delete; its socket."""
    with closing(NftSocket()) as netlink:
        stamp_table.install(netlink, owned=False, **options)
        try:
            yield netlink
        finally:
            with suppress(BackendError):
                stamp_table.remove(netlink)


def believed(ptoken):
    return ptoken.assurance is Assurance.EXACT and ptoken.protected


def forge(host, source, target, mark, data):
    """Send over loopback under any source and any mark."""
    with forger(host, source, mark) as local:
        local.sendto(data, (target, PORT))


class Peer(ipsec_aio.Protocol):
    def __init__(self):
        self.made = asyncio.get_running_loop().create_future()
        self.data = asyncio.Queue()

    def connection_made(self, transport, ptoken):
        self.transport = transport
        self.made.set_result(ptoken)

    def data_received(self, data):
        self.data.put_nowait((data, ipsec_aio.current_ptoken()))

    def eof_received(self):
        self.data.put_nowait((b"", ipsec_aio.current_ptoken()))

    async def next(self):
        """Return what comes next (nothing: the end) and its token."""
        async with asyncio.timeout(PATIENCE):
            return await self.data.get()


@asynccontextmanager
async def accepting(where, peer, **options):
    """A server that hands its connection to a Peer; ``where`` is a host or a socket."""
    bound = (
        {"sock": where} if isinstance(where, socket.socket) else {"host": where.v4, "port": PORT}
    )
    async with ipsec_aio.open_backend("xfrm", **{"stamp": "install", **options}) as backend:
        server = await ipsec_aio.create_server(lambda: peer, backend=backend, **bound)
        try:
            yield
        finally:
            if peer.made.done():
                peer.transport.abort()
            server.close()
            await server.wait_closed()


def repeats(client):
    """How often TCP has sent again what it last sent (linux/tcp.h, tcpi_retransmits)."""
    return client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[2]
