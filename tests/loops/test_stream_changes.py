"""What protocols are told when the protection of their connection changes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from stream_tools import (
    HOST,
    Buffered,
    Plain,
    Tokened,
    client_tls,
    connected,
    port_of,
    protecting,
    server_tls,
    serving,
)

import ipsec_aio
from ipsec_aio import Assurance, current_ptoken

CLIENT = "127.0.0.20"


class Told(Tokened):
    """Notes changes, with the tokens that are to be seen meanwhile."""

    def protection_changed(self, old: Any, new: Any) -> None:
        shown = self.transport.get_extra_info("ptoken")
        self.log.note("changed", old, new, current_ptoken(), shown)
        self.task = asyncio.ensure_future(self.later())

    async def later(self) -> None:
        await asyncio.sleep(0)
        self.log.note("later", current_ptoken())


class BufferedTold(Buffered):
    """The same with buffers of its own."""

    def protection_changed(self, old: Any, new: Any) -> None:
        shown = self.transport.get_extra_info("ptoken")
        self.log.note("changed", old, new, current_ptoken(), shown)


class Raising(Tokened):
    """Does not want to know."""

    def protection_changed(self, old: Any, new: Any) -> None:
        raise ZeroDivisionError("on purpose")


class LooksAlike(Plain):
    """A plain protocol with a method of that name."""

    def protection_changed(self, *arguments: Any) -> None:
        self.log.note("changed", *arguments)


@pytest.fixture(params=["plain", "tls"])
def tls(request: Any) -> Any:
    """Options of server and client, without and with TLS."""
    if request.param == "plain":
        return {}, {}
    return {"ssl": server_tls()}, {"ssl": client_tls(), "server_hostname": "localhost"}


@pytest.mark.parametrize("kind", [Told, BufferedTold])
async def test_a_lost_stamp_is_told_once(tls: Any, kind: Any) -> None:
    backend, server_side = protecting(), kind()
    async with (
        serving(lambda: server_side, backend, **tls[0]) as server,
        connected(port_of(server), **tls[1]) as client,
    ):
        [(first, _)] = await server_side.log.until("made")
        backend.lose_stamp()
        [(old, new, current, shown)] = await server_side.log.until("changed")
        assert old is first
        assert new is current is shown
        assert new.assurance is Assurance.UNKNOWN
        assert first.protected, "it vouches for what it came with"
        if kind is Told:
            assert await server_side.log.until("later") == [(new,)]
        backend.restore_stamp()
        backend.lose_stamp()
        client.transport.write(b"x")
        await server_side.log.bytes(1)
        assert len(server_side.log.of("changed")) == 1
        assert server_side.log.of("data")[-1][-1] is new
        assert current_ptoken() is None


async def test_rekeys_are_no_change() -> None:
    backend, server_side = protecting(), Told()
    async with (
        serving(lambda: server_side, backend) as server,
        connected(port_of(server)) as client,
    ):
        [(token, _)] = await server_side.log.until("made")
        for _ in range(3):
            old = token.sa
            backend.rekey(old)
            backend.delete_sa(old)
        client.transport.write(b"x")
        await server_side.log.bytes(1)
        assert server_side.transport.get_extra_info("ptoken") is token
        assert "changed" not in server_side.log.kinds


async def test_a_client_is_told_what_policies_come_to() -> None:
    async with serving(Plain, protecting()) as server:
        backend = protecting(trust_policy=True)
        transport, client = await ipsec_aio.create_connection(
            Told, HOST, port_of(server), local_addr=(CLIENT, 0), backend=backend
        )
        [(first, _)] = await client.log.until("made")
        policy = backend.add_policy(src=HOST, dst=CLIENT)
        [(old, _, *_)] = await client.log.until("changed")
        assert old is first
        backend.delete_policy(policy)
        changes = await client.log.until("changed", 2)
        assert changes[0][1] is changes[1][0]
        assert changes[1][1] is transport.get_extra_info("ptoken")
        transport.close()
        await client.log.until("lost")


@pytest.mark.parametrize("kind", [LooksAlike, Raising])
async def test_who_is_not_asked_and_who_raises(kind: Any) -> None:
    backend, server_side = protecting(), kind()
    loop = asyncio.get_running_loop()
    raised: list[Any] = []
    loop.set_exception_handler(lambda loop, context: raised.append(context))
    async with (
        serving(lambda: server_side, backend) as server,
        connected(port_of(server)) as client,
    ):
        await server_side.log.until("made")
        backend.lose_stamp()
        client.transport.write(b"x")
        await server_side.log.bytes(1)
        assert server_side.transport.get_extra_info("ptoken").assurance is Assurance.UNKNOWN
        assert "changed" not in server_side.log.kinds
    assert [type(context["exception"]) for context in raised] == (
        [ZeroDivisionError] if kind is Raising else []
    )
    assert all(context["protocol"] is server_side for context in raised)


async def test_whoever_has_the_transport_now_is_told() -> None:
    backend, server_side, second = protecting(), Told(), Told()
    async with (
        serving(lambda: server_side, backend) as server,
        connected(port_of(server)),
    ):
        await server_side.log.until("made")
        second.transport = server_side.transport
        server_side.transport.set_protocol(second)
        backend.lose_stamp()
        await second.log.until("changed")
        assert "changed" not in server_side.log.kinds


async def test_after_an_upgrade_to_tls_it_goes_on() -> None:
    backend, server_side = protecting(), Told()
    upgraded = asyncio.Event()

    class Upgrading(Told):
        def data_received(self, data: bytes) -> None:
            self.upgrading = asyncio.ensure_future(self.upgrade())

        async def upgrade(self) -> None:
            self.transport.write(b"go")
            made = await ipsec_aio.start_tls(
                self.transport, server_side, server_tls(), server_side=True
            )
            server_side.transport = made
            upgraded.set()

    first = Upgrading()
    async with serving(lambda: first, backend) as server:
        loop = asyncio.get_running_loop()
        raw, plain = await loop.create_connection(Plain, HOST, port_of(server))
        raw.write(b"STARTTLS")
        await plain.log.bytes(2)
        made = await loop.start_tls(raw, plain, client_tls(), server_hostname="localhost")
        async with asyncio.timeout(5):
            await upgraded.wait()
        backend.lose_stamp()
        [(old, new, *_)] = await server_side.log.until("changed")
        assert old is first.log.of("made")[0][0]
        assert server_side.transport.get_extra_info("ptoken") is new
        assert made is not None
        made.abort()
        await server_side.log.until("lost")


async def test_nothing_is_told_from_the_close_on(tls: Any) -> None:
    backend, server_side = protecting(), Told()
    async with (
        serving(lambda: server_side, backend, **tls[0]) as server,
        connected(port_of(server), **tls[1]),
    ):
        await server_side.log.until("made")
        server_side.transport.close()
        backend.lose_stamp()
        server_side.transport.close()
        backend.restore_stamp()
        await server_side.log.until("lost")
        backend.lose_stamp()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert "changed" not in server_side.log.kinds
