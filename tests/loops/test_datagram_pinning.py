"""A reply goes out under the protection of what it answers, or not at all."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
from datagram_tools import HERE, Tokened, close, until

import ipsec_aio
from ipsec_aio import MemoryBackend, ProtectionError, create_datagram_endpoint
from ipsec_aio.net import pinning

SERVER, ALICE, BOB = "127.0.0.1", "127.0.0.2", "127.0.0.3"


def both_ways(backend: MemoryBackend, peer: str = ALICE, local: str = SERVER, **fields: Any) -> Any:
    """Declare an SA in each direction; return the outbound one."""
    backend.add_sa(src=peer, dst=local, **fields)
    return backend.add_sa(src=local, dst=peer, **fields)


class Bench:
    """A server, and clients that ask it something."""

    def __init__(self, backend: MemoryBackend) -> None:
        self.backend = backend
        self.opened: list[Any] = []

    async def serve(self, local: Any = HERE, **options: Any) -> Any:
        self.transport, self.protocol = await create_datagram_endpoint(
            Tokened, local, backend=self.backend, **options
        )
        self.opened.append(self.transport)
        return self.transport

    async def ask(self, source: Any = ALICE, target: Any = SERVER) -> tuple[Any, Any, Any]:
        """Return the question's address and token, and the client's protocol."""
        port = self.transport.get_extra_info("sockname")[1]
        client, protocol = await create_datagram_endpoint(
            Tokened, (source, 0), (target, port), backend=self.backend
        )
        self.opened.append(client)
        before = len(self.protocol.log.of("data"))
        client.sendto(b"?")
        _, addr, ptoken = (await self.protocol.log.until("data", before + 1))[-1]
        return addr, ptoken, protocol

    async def nothing_sent(self, addr: Any, protocol: Any) -> None:
        """What was sent before a plain datagram would come before it."""
        self.transport.sendto(b"plain", addr)
        assert [event[0] for event in await protocol.log.until("data")] == [b"plain"]

    async def end(self) -> None:
        await close(*self.opened)


@pytest.fixture
async def bench() -> Any:
    made = Bench(MemoryBackend())
    yield made
    await made.end()


async def test_it_is_sent_under_the_same_protection(bench: Bench) -> None:
    both_ways(bench.backend)
    transport = await bench.serve()
    addr, ptoken, client = await bench.ask()
    transport.sendto(b"!", addr, ptoken=ptoken)
    ((data, _, answer),) = await client.log.until("data")
    assert data == b"!"
    assert answer.protected
    assert transport.get_extra_info("ipsec_pinning") == "user"


async def test_it_is_not_sent_in_the_clear(bench: Bench) -> None:
    bench.backend.add_sa(src=ALICE, dst=SERVER)
    transport = await bench.serve()
    addr, ptoken, client = await bench.ask()
    with pytest.raises(ProtectionError, match="no policy demands protection") as caught:
        transport.sendto(b"!", addr, ptoken=ptoken)
    assert caught.value.clause == "ptoken"
    await bench.nothing_sent(addr, client)


async def test_every_send_is_checked_anew(bench: Bench) -> None:
    sa = both_ways(bench.backend)
    transport = await bench.serve()
    addr, ptoken, client = await bench.ask()
    transport.sendto(b"1", addr, ptoken=ptoken)
    bench.backend.delete_sa(sa)
    with pytest.raises(ProtectionError):
        transport.sendto(b"2", addr, ptoken=ptoken)
    null = bench.backend.add_sa(src=SERVER, dst=ALICE, authentication="hmac(sha256)")
    with pytest.raises(ProtectionError, match="might be sent under"):
        transport.sendto(b"3", addr, ptoken=ptoken)
    bench.backend.delete_sa(null)
    bench.backend.add_sa(src=SERVER, dst=ALICE)
    transport.sendto(b"4", addr, ptoken=ptoken)
    assert [event[0] for event in await client.log.until("data", 2)] == [b"1", b"4"]


async def test_it_goes_to_the_peer_of_the_token_only(bench: Bench) -> None:
    both_ways(bench.backend)
    both_ways(bench.backend, BOB)
    transport = await bench.serve()
    _, ptoken, _ = await bench.ask()
    addr, _, client = await bench.ask(BOB)
    with pytest.raises(ProtectionError, match="of other addresses"):
        transport.sendto(b"!", addr, ptoken=ptoken)
    await bench.nothing_sent(addr, client)


async def test_and_to_the_same_identity(bench: Bench) -> None:
    bench.backend.add_sa(src=ALICE, dst=SERVER, peer="moon.example.org")
    sa = bench.backend.add_sa(src=SERVER, dst=ALICE, peer="sun.example.org")
    transport = await bench.serve()
    addr, ptoken, client = await bench.ask()
    with pytest.raises(ProtectionError, match=r"sun\.example\.org"):
        transport.sendto(b"!", addr, ptoken=ptoken)
    bench.backend.identify(sa, peer="moon.example.org")
    transport.sendto(b"!", addr, ptoken=ptoken)
    await client.log.until("data")


async def test_a_clear_question_pins_nothing(bench: Bench) -> None:
    transport = await bench.serve()
    addr, ptoken, client = await bench.ask()
    with pytest.raises(ProtectionError, match="not protected: clear"):
        transport.sendto(b"!", addr, ptoken=ptoken)
    await bench.nothing_sent(addr, client)


async def test_a_closed_backend_knows_nothing(bench: Bench) -> None:
    both_ways(bench.backend)
    transport = await bench.serve()
    addr, ptoken, client = await bench.ask()
    await bench.backend.aclose()
    with pytest.raises(ProtectionError, match="closed"):
        transport.sendto(b"!", addr, ptoken=ptoken)
    await bench.nothing_sent(addr, client)


async def test_a_backend_that_fails_knows_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    both_ways(bench.backend)
    transport = await bench.serve()
    addr, ptoken, client = await bench.ask()

    def drain() -> None:
        raise ipsec_aio.BackendUnavailable("gone")

    monkeypatch.setattr(bench.backend, "drain", drain)
    with pytest.raises(ProtectionError, match="gone"):
        transport.sendto(b"!", addr, ptoken=ptoken)
    monkeypatch.undo()
    await bench.nothing_sent(addr, client)


async def test_what_is_pinned_must_be_a_token_and_an_address(bench: Bench) -> None:
    both_ways(bench.backend)
    transport = await bench.serve()
    addr, ptoken, _ = await bench.ask()
    with pytest.raises(TypeError, match="must be a PToken"):
        transport.sendto(b"!", addr, ptoken=addr)
    with pytest.raises(TypeError, match="address"):
        transport.sendto(b"!", ptoken=ptoken)
    with pytest.raises(ValueError, match="localhost"):
        transport.sendto(b"!", ("localhost", addr[1]), ptoken=ptoken)


async def test_a_connected_socket_pins_to_its_peer(bench: Bench) -> None:
    both_ways(bench.backend, ALICE, SERVER)
    transport = await bench.serve()
    addr, _, protocol = await bench.ask()
    transport.sendto(b"question", addr)
    ((_, _, ptoken),) = await protocol.log.until("data")
    protocol.transport.sendto(b"answer", ptoken=ptoken)
    assert (await bench.protocol.log.until("data", 2))[-1][0] == b"answer"


async def test_what_is_no_ip_is_not_pinned(bench: Bench) -> None:
    both_ways(bench.backend)
    await bench.serve()
    _, ptoken, _ = await bench.ask()
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    near.setblocking(False)
    transport, _ = await create_datagram_endpoint(Tokened, sock=near, backend=bench.backend)
    bench.opened.append(transport)
    # It has no peer's name, so it needs an address, which says nothing to IPsec.
    with far, pytest.raises(ProtectionError, match="not an IP socket"):
        transport.sendto(b"!", ("192.0.2.1", 5), ptoken=ptoken)


@pytest.mark.parametrize(
    ("bound", "family", "source", "target"),
    [
        ("0.0.0.0", socket.AF_INET, ALICE, "127.0.0.5"),
        ("::", socket.AF_INET6, ALICE, "127.0.0.5"),
        ("::", socket.AF_INET6, "::1", "::1"),
    ],
)
async def test_it_is_sent_from_where_the_question_went(
    bench: Bench, bound: str, family: int, source: str, target: str
) -> None:
    """The kernel would choose another of this host's addresses."""
    both_ways(bench.backend, source, target)
    own = socket.socket(family, socket.SOCK_DGRAM)
    if family == socket.AF_INET6:
        own.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    own.bind((bound, 0))
    own.setblocking(False)
    transport = await bench.serve(None, sock=own)
    addr, ptoken, client = await bench.ask(source, target)
    assert ptoken.protected
    transport.sendto(b"!", addr, ptoken=ptoken)
    # Its socket is connected: it gets nothing from another address.
    ((data, (host, *_), _),) = await client.log.until("data")
    assert (data, host) == (b"!", target)


class Stuffed:
    """A socket that cannot send for a while."""

    def __init__(self, real: socket.socket) -> None:
        self.real = real
        self.full = True

    def sendmsg(self, *args: Any) -> int:
        if self.full:
            raise BlockingIOError
        return self.real.sendmsg(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


async def test_what_is_buffered_is_checked_when_it_leaves(bench: Bench) -> None:
    sa = both_ways(bench.backend)
    transport = await bench.serve()
    addr, ptoken, client = await bench.ask()
    stuffed = transport._sock = Stuffed(transport._sock)
    transport.sendto(b"1", addr, ptoken=ptoken)
    transport.sendto(b"2", addr, ptoken=ptoken)
    assert transport.get_write_buffer_size()
    bench.backend.delete_sa(sa)
    # What is sent into a buffer is checked as well.
    with pytest.raises(ProtectionError):
        transport.sendto(b"3", addr, ptoken=ptoken)
    stuffed.full = False
    (first,), _ = await bench.protocol.log.until("error", 2)
    assert isinstance(first, ProtectionError)
    await until(lambda: not transport.get_write_buffer_size())
    await bench.nothing_sent(addr, client)


async def test_what_is_buffered_and_still_protected_leaves(bench: Bench) -> None:
    both_ways(bench.backend)
    transport = await bench.serve()
    addr, ptoken, client = await bench.ask()
    stuffed = transport._sock = Stuffed(transport._sock)
    transport.sendto(b"1", addr, ptoken=ptoken)
    transport.sendto(b"2", addr, ptoken=ptoken)
    await asyncio.sleep(0)
    stuffed.full = False
    assert [event[0] for event in await client.log.until("data", 2)] == [b"1", b"2"]


async def test_answers_are_remembered_within_bounds(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pinning, "CACHE_LIMIT", 2)
    both_ways(bench.backend)
    transport = await bench.serve()
    addr, ptoken, client = await bench.ask()
    asked: list[Any] = []
    sends_like = bench.backend.sends_like
    monkeypatch.setattr(
        bench.backend, "sends_like", lambda *args: asked.append(args) or sends_like(*args)
    )
    for _ in range(3):
        transport.sendto(b"!", addr, ptoken=ptoken)
    assert len(asked) == 1
    for port in (1, 2):
        with pytest.raises(ProtectionError):
            transport.sendto(b"!", (BOB, port), ptoken=ptoken)
    transport.sendto(b"!", addr, ptoken=ptoken)
    assert len(asked) == 4
    await client.log.until("data", 4)
