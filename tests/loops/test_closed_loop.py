"""Endpoints that outlive their loop: clear errors, the loop's own warnings, nothing left open."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import datagram_tools
import pytest
import uvloop
from stream_tools import HOST, Tokened, port_of, protecting

import ipsec_aio

Loop = asyncio.AbstractEventLoop
Factory = Callable[[], Loop]

factories = pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop])


def sockets() -> set[str]:
    gc.collect()
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found.add(os.readlink(f"/proc/self/fd/{descriptor}"))
    return {name for name in found if name.startswith("socket:")}


@pytest.fixture(autouse=True)
def nothing_is_left_open() -> Iterator[None]:
    before = sockets()
    yield
    assert not sockets() - before


@contextmanager
def collecting() -> Iterator[list[str]]:
    """Give the texts of the ResourceWarnings until the end, when garbage is collected."""
    told: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield told
        gc.collect()
    assert all(warning.category is ResourceWarning for warning in caught)
    told += (str(warning.message) for warning in caught)


@factories
@pytest.mark.parametrize("protocol", [asyncio.DatagramProtocol, ipsec_aio.DatagramProtocol])
def test_a_datagram_transport(factory: Factory, protocol: Any) -> None:
    loop = factory()
    transport, _ = loop.run_until_complete(
        ipsec_aio.create_datagram_endpoint(protocol, (HOST, 0), backend=datagram_tools.memory())
    )
    loop.close()
    address = transport.get_extra_info("sockname")
    assert isinstance(transport.get_extra_info("socket").fileno(), int)
    transport.sendto(b"nobody reads this", address)
    with pytest.raises(RuntimeError, match="loop is closed"):
        transport.close()
    assert transport.is_closing()
    transport.close()
    transport.abort()
    with collecting() as told:
        del transport, _, loop
    assert [text.partition(" <")[0] for text in told] == ["unclosed transport"]


@factories
def test_a_datagram_transport_that_is_just_dropped(factory: Factory) -> None:
    loop = factory()
    transport, _ = loop.run_until_complete(
        ipsec_aio.create_datagram_endpoint(
            ipsec_aio.DatagramProtocol, (HOST, 0), backend=datagram_tools.memory()
        )
    )
    loop.close()
    with collecting() as told:
        del transport, _, loop
    assert [text.partition(" <")[0] for text in told] == ["unclosed transport"]


@factories
def test_a_server_gives_its_port_back(factory: Factory) -> None:
    backend = protecting()
    loop = factory()
    server = loop.run_until_complete(ipsec_aio.create_server(Tokened, HOST, 0, backend=backend))
    address = HOST, port_of(server)
    with collecting() as told:
        loop.close()
        server.close()
        server.close()
    assert not server.is_serving()
    assert backend.registrations[0].closed.is_set()
    assert told == [] if factory is asyncio.new_event_loop else len(told) == 1
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(address)


@factories
def test_a_server_that_is_just_dropped(factory: Factory) -> None:
    backend = protecting()
    loop = factory()
    with collecting() as told:
        server = loop.run_until_complete(ipsec_aio.create_server(Tokened, HOST, 0, backend=backend))
        loop.close()
        del server, loop
    assert len(told) == 1
    assert told[0].startswith("unclosed ")


def connect(loop: Loop, ours: bool, address: Any) -> Any:
    if ours:
        connecting = ipsec_aio.create_connection(Tokened, *address, backend=protecting())
    else:
        connecting = loop.create_connection(asyncio.Protocol, *address)
    transport, _ = loop.run_until_complete(connecting)
    return transport


@factories
@pytest.mark.parametrize("closes", [False, True])
def test_a_connection_is_as_the_loop_s_own(factory: Factory, closes: bool) -> None:
    """It says what the loop's own transport says, and warns as often."""
    said: list[Any] = []
    with socket.create_server((HOST, 0)) as listener:
        for ours in (False, True):
            loop = factory()
            with collecting() as told:
                transport = connect(loop, ours, listener.getsockname())
                listener.accept()[0].close()
                loop.close()
                raised: list[str] = []
                for call in (transport.close, transport.abort) if closes else ():
                    try:
                        call()
                    except RuntimeError as error:
                        raised.append(str(error))
                if ours:
                    assert isinstance(transport.get_extra_info("ptoken"), ipsec_aio.PToken)
                call = None
                del transport, loop
            said.append((raised, sorted(text.partition(" <")[0] for text in told)))
    assert said[0] == said[1]
    assert said[0][1], "stock transports warn"


@factories
def test_a_connection_accepted_by_us(factory: Factory) -> None:
    """The server's side; its token stays readable, and its registration ends with it."""
    backend = protecting()
    accepted: list[Tokened] = []

    def protocol() -> Tokened:
        accepted.append(Tokened())
        return accepted[-1]

    loop = factory()
    server = loop.run_until_complete(ipsec_aio.create_server(protocol, HOST, 0, backend=backend))
    with collecting() as told, socket.create_connection((HOST, port_of(server))):
        loop.run_until_complete(_made(accepted))
        server.close()
        loop.close()
        token = accepted[0].log.of("made")[0][0]
        assert token.protected
        accepted.clear()
        del server, loop
    assert backend.registrations[0].closed.is_set()
    kinds = sorted(text.partition(" <")[0] for text in told)
    assert kinds == (
        ["unclosed", "unclosed transport"]
        if factory is asyncio.new_event_loop
        else ["unclosed resource"]
    )


async def _made(accepted: list[Tokened]) -> None:
    await datagram_tools.until(lambda: accepted)
    await accepted[0].log.until("made")
