"""What waits in a socket's queue when the policies change was judged by those before."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import datagram_tools
import pytest
from datagram_tools import close
from stream_tools import HOST, Plain, Tokened, client_tls, connected, port_of, server_tls, serving

import ipsec_aio
from ipsec_aio import Assurance
from ipsec_aio.kernel import sockopts
from ipsec_aio.net import connection, listening, witness

PEER = "127.0.0.2"
COUNT = 200
Change = Callable[[ipsec_aio.MemoryBackend], None]


def add(backend: ipsec_aio.MemoryBackend) -> None:
    backend.add_policy(src=PEER, dst=HOST, priority=20)


def bypass_goes(backend: ipsec_aio.MemoryBackend) -> None:
    backend.delete_policy(next(p for p in backend.mirror.spd if not p.templates))


def backend_with(change: Change) -> ipsec_aio.MemoryBackend:
    """A backend without a stamp that protects what comes from the peer, after this change."""
    backend = ipsec_aio.MemoryBackend(trust_policy=True)
    backend.lose_stamp()
    backend.add_sa(src=PEER, dst=HOST)
    if change is bypass_goes:
        add(backend)
        backend.add_policy(src="127.0.0.0/8", dst=HOST, priority=10, template=None)
    return backend


@pytest.fixture(params=[add, bypass_goes])
def change(request: pytest.FixtureRequest) -> Change:
    """Each ends with a policy that protects, and was not the first before."""
    return request.param


@pytest.fixture
def sender() -> Any:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((PEER, 0))
        yield sock


async def stays_in_doubt(made: Tokened, seconds: float) -> None:
    """Have a paused connection looked at several times, then read what waits there."""
    await asyncio.sleep(seconds)
    assert not made.transport.get_extra_info("ptoken").protected
    made.transport.resume_reading()
    assert await made.log.bytes(5) == b"clear"
    assert not made.log.of("data")[0][1].protected


async def turn(times: int = 5) -> None:
    for _ in range(times):
        await asyncio.sleep(0)


@pytest.mark.usefixtures("way")
class TestDatagrams:
    async def endpoint(self, backend: Any, **options: Any) -> Any:
        return await ipsec_aio.create_datagram_endpoint(
            datagram_tools.Tokened, backend=backend, **options
        )

    async def test_what_was_queued_is_never_protected(self, change: Change, sender: Any) -> None:
        backend = backend_with(change)
        transport, protocol = await self.endpoint(backend, local_addr=(HOST, 0))
        to = transport.get_extra_info("sockname")
        for n in range(COUNT):
            sender.sendto(bytes([n]), to)
        change(backend)
        queued = await protocol.log.until("data", COUNT)
        assert not any(token.protected for _, _, token in queued)
        # Whatever it takes, and however long: only an empty queue ends it.
        await turn()
        sender.sendto(b"later", to)
        *_, (data, _, token) = await protocol.log.until("data", COUNT + 1)
        assert (data, token.protected, token.assurance) == (b"later", True, Assurance.POLICY)
        await close(transport)

    async def test_an_idle_endpoint_follows(self, change: Change, sender: Any) -> None:
        backend = backend_with(change)
        transport, protocol = await self.endpoint(backend, local_addr=(HOST, 0))
        change(backend)
        await turn()
        sender.sendto(b"x", transport.get_extra_info("sockname"))
        [(_, _, token)] = await protocol.log.until("data")
        assert token.protected
        await close(transport)

    async def test_a_socket_that_is_brought_along(self, change: Change, sender: Any) -> None:
        backend = backend_with(change)
        own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        own.bind((HOST, 0))
        sender.sendto(b"x", own.getsockname())
        change(backend)
        transport, protocol = await self.endpoint(backend, sock=own)
        [(_, _, token)] = await protocol.log.until("data")
        assert token.assurance is Assurance.UNKNOWN
        await turn()
        sender.sendto(b"y", transport.get_extra_info("sockname"))
        *_, (_, _, token) = await protocol.log.until("data", 2)
        assert token.protected
        await close(transport)

    async def test_a_connected_socket_is_of_this_moment(self, change: Change, sender: Any) -> None:
        backend = backend_with(change)
        transport, _ = await self.endpoint(
            backend, local_addr=(HOST, 0), remote_addr=sender.getsockname()
        )
        change(backend)
        assert transport.get_extra_info("ptoken").protected
        await close(transport)

    async def test_nothing_is_asked_of_the_kernel_while_policies_stay(
        self, change: Change, sender: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = []
        look = witness.is_readable
        monkeypatch.setattr(witness, "is_readable", lambda sock: asked.append(1) or look(sock))
        backend = backend_with(change)
        transport, protocol = await self.endpoint(backend, local_addr=(HOST, 5999))
        for n in range(1, 10):
            sender.sendto(b"x", transport.get_extra_info("sockname"))
            await protocol.log.until("data", n)
            backend.rekey(backend.add_sa(src=PEER, dst=HOST))
            await turn()
        assert not asked
        change(backend)
        await turn()
        asked.clear()
        sender.sendto(b"x", transport.get_extra_info("sockname"))
        await protocol.log.until("data", 10)
        assert not asked
        await close(transport)


class TestStreams:
    async def test_what_waited_to_be_accepted_is_not_protected(self, change: Change) -> None:
        backend, made = backend_with(change), Tokened()
        async with serving(lambda: made, backend) as server:
            with socket.socket() as client:
                client.bind((PEER, 0))
                client.connect((HOST, port_of(server)))
                client.send(b"clear")
                change(backend)
                await made.log.bytes(5)
                [(token, _)] = made.log.of("made")
                [(_, shown)] = made.log.of("data")
                assert not token.protected
                assert not shown.protected
            with socket.socket() as client:
                client.bind((PEER, 0))
                client.connect((HOST, port_of(server)))
                *_, (token, _) = await made.log.until("made", 2)
                assert token.protected

    async def test_an_idle_listener_follows(self, change: Change) -> None:
        backend, made = backend_with(change), Tokened()
        async with serving(lambda: made, backend) as server:
            change(backend)
            await turn()
            with socket.socket() as client:
                client.bind((PEER, 0))
                client.connect((HOST, port_of(server)))
                [(token, _)] = await made.log.until("made")
                assert token.protected

    async def test_a_listener_that_is_brought_along(self, change: Change) -> None:
        backend, made = backend_with(change), Tokened()
        own = socket.create_server((HOST, 0))
        with socket.socket() as first, socket.socket() as second:
            for client in (first, second):
                client.bind((PEER, 0))
            first.connect(own.getsockname())
            change(backend)
            server = await ipsec_aio.create_server(lambda: made, sock=own, backend=backend)
            [(token, _)] = await made.log.until("made")
            assert not token.protected
            await turn()
            second.connect(server.sockets[0].getsockname())
            *_, (token, _) = await made.log.until("made", 2)
            assert token.protected
            server.close()

    async def test_what_waits_to_be_read_keeps_it_in_doubt(
        self, change: Change, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(connection, "_AGAIN", 0.01)

        class Told(Tokened):
            def protection_changed(self, old: Any, new: Any) -> None:
                self.log.note("changed", new)

        backend, made = backend_with(change), Told()
        async with serving(lambda: made, backend) as server:
            with socket.socket() as client:
                client.bind((PEER, 0))
                client.connect((HOST, port_of(server)))
                await made.log.until("made")
                made.transport.pause_reading()
                await turn()
                client.send(b"clear")
                change(backend)
                await stays_in_doubt(made, 0.05)
                while not made.transport.get_extra_info("ptoken").protected:
                    made.log.events[:] = [e for e in made.log.events if e[0] != "changed"]
                    await made.log.until("changed")

    async def test_what_waits_in_tls_keeps_it_in_doubt(
        self, change: Change, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """TLS reads on while its user has paused: the socket looks empty."""
        monkeypatch.setattr(connection, "_AGAIN", 0.05)
        backend, made = backend_with(change), Tokened()
        tls = {"ssl": client_tls(), "server_hostname": "localhost"}
        async with (
            serving(lambda: made, backend, ssl=server_tls()) as server,
            connected(port_of(server), source=PEER, **tls) as client,
        ):
            await made.log.until("made")
            sock = made.transport.get_extra_info("socket")
            made.transport.pause_reading()
            received = sockopts.examine(sock, sockopts.bytes_received)
            client.transport.write(b"clear")
            await datagram_tools.until(
                lambda: (
                    sockopts.examine(sock, sockopts.bytes_received) != received
                    and not sockopts.is_readable(sock)
                )
            )
            change(backend)
            await stays_in_doubt(made, 0.2)
            await datagram_tools.until(lambda: made.transport.get_extra_info("ptoken").protected)

    async def test_numbers_tell_what_was_on_its_way(self) -> None:
        loop = asyncio.get_running_loop()
        backend = ipsec_aio.MemoryBackend()
        with socket.socket() as sock:
            sock.bind((HOST, 0))
            made = listening.Listener(loop, backend, await backend.register(6, 1), [sock])
            made.about_to_listen()
            sock.listen()
            first, before = next(listening.arrivals), backend.policies
            assert made.emptied_before(first) == before
            add(backend)
            accepted = loop.create_future()

            def accept() -> None:
                # Before, asyncio has only made a task for it.
                accepted.set_result(next(listening.arrivals))

            loop.call_soon(accept)
            await turn()
            assert made.emptied_before(accepted.result()) == before
            assert made.emptied_before(next(listening.arrivals)) == backend.policies > before
            assert made.emptied_before(first) == before
            for _ in range(2):
                backend.flush_policies()
                add(backend)
                await turn()
            assert made.emptied_before(first) < 0
            made.close()

    async def test_an_outgoing_connection_is_of_the_moment_at_which_it_is_made(
        self, change: Change
    ) -> None:
        backend = backend_with(change)
        backend.add_sa(src=HOST, dst=PEER)
        backend.add_policy(src=HOST, dst=PEER, priority=20)
        async with serving(Plain, ipsec_aio.MemoryBackend()) as server:
            loop = asyncio.get_running_loop()
            loop.call_soon(backend.add_policy)
            transport, client = await ipsec_aio.create_connection(
                Tokened, HOST, port_of(server), local_addr=(PEER, 0), backend=backend
            )
            assert transport.get_extra_info("ptoken").protected
            transport.close()
            await client.log.until("lost")

    async def test_a_connected_socket_that_is_brought_along(self) -> None:
        backend = ipsec_aio.MemoryBackend(trust_policy=True)
        backend.lose_stamp()
        with socket.create_server((HOST, 0)) as greeting, socket.socket() as own:
            own.bind((PEER, 0))
            own.connect(greeting.getsockname())
            peer, _ = greeting.accept()
            with peer:
                peer.send(b"clear")
                backend.add_sa(src=HOST, dst=PEER)
                backend.add_policy(src=HOST, dst=PEER)
                own.setblocking(False)
                transport, client = await ipsec_aio.create_connection(
                    Tokened, sock=own, backend=backend
                )
                [(token, _)] = await client.log.until("made")
                assert token.assurance is Assurance.UNKNOWN
                assert await client.log.bytes(5) == b"clear"
                assert not client.log.of("data")[0][1].protected
                transport.close()
                await client.log.until("lost")


@pytest.mark.usefixtures("way")
async def test_a_queue_that_is_never_empty_outlives_no_sa() -> None:
    """Its program pauses often, and never for long."""
    backend = datagram_tools.Witnessing()
    now = 0.0
    backend.resolver.clock = backend.clock = lambda: now
    weak = backend.add_sa(src=HOST, dst=HOST, spi=0x1001, encryption="cbc(aes)")
    transport, protocol = await ipsec_aio.create_datagram_endpoint(
        datagram_tools.Tokened, (HOST, 0), backend=backend
    )
    there = transport.get_extra_info("sockname")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, sockopts.SO_MARK, (0x1001).to_bytes(4, "big"))
        except PermissionError:
            await close(transport)
            pytest.skip("setting a mark needs CAP_NET_ADMIN")
        await turn()
        transport.pause_reading()
        sock.sendto(b"under the weak one", there)
        backend.delete_sa(weak)
        await turn()
        now += 60
        backend.drain()
        backend.add_sa(src=HOST, dst=HOST, spi=0x1001)
        transport.resume_reading()
        *_, (_, _, token, *_) = await protocol.log.until("data")
        assert token.assurance is Assurance.UNKNOWN
        sock.sendto(b"under the good one", there)
        *_, (_, _, token, *_) = await protocol.log.until("data", 2)
        assert token.protected
    await close(transport)


async def test_a_change_makes_nobody_wait_whom_the_kernel_holds_to_it() -> None:
    """The SPD is asked as it is now, for what a socket's own policy let in under the stamp."""
    backend = ipsec_aio.MemoryBackend()
    backend.add_sa(src=PEER, dst=HOST)
    registration = await backend.register(17, 5000)
    template = ipsec_aio.policy.Template()
    ends = bytes([127, 0, 0, 1]), 5000, bytes([127, 0, 0, 2]), 1
    evidence = datagram_tools.Evidence(
        17, *ends, None, registration.generation, after=backend.policies
    )
    assert backend.objection(evidence, (template,)) == ""
    add(backend)
    assert backend.objection(evidence, (template,)) == ""
    assert backend.resolve(replace(evidence, enforced=template)).protected
