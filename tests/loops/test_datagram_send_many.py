"""``sendto_many`` does what as many calls of ``sendto`` would do."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from typing import Any

import pytest
from datagram_tools import HERE, Plain, close, memory, until
from hypothesis import given
from hypothesis import strategies as st

from ipsec_aio import create_datagram_endpoint
from ipsec_aio.net.datagram import DatagramTransport
from ipsec_aio.net.segments import run


async def pair(host: str = "127.0.0.1") -> tuple[Any, socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    far = socket.socket(family, socket.SOCK_DGRAM)
    far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
    far.bind((host, 0))
    far.setblocking(False)
    transport, _ = await create_datagram_endpoint(Plain, (host, 0), backend=memory())
    return transport, far


def come(far: socket.socket) -> list[bytes]:
    got: list[bytes] = []
    try:
        while True:
            got.append(far.recv(65536))
    except BlockingIOError:
        return got


class Calls:
    """The socket, and which of its calls were made."""

    def __init__(self, transport: DatagramTransport, failures: dict[str, list[Exception]]) -> None:
        assert transport._sock is not None
        self.real = transport._sock
        self.failures = failures
        self.made: list[str] = []
        transport._sock = self  # type: ignore[assignment]
        transport._direct = self.sendto  # type: ignore[assignment]

    def _call(self, name: str, *arguments: Any) -> Any:
        self.made.append(name)
        if self.failures.get(name):
            raise self.failures[name].pop(0)
        return getattr(self.real, name)(*arguments)

    def sendto(self, *arguments: Any) -> Any:
        return self._call("sendto", *arguments)

    def sendmsg(self, *arguments: Any) -> Any:
        return self._call("sendmsg", *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


SIZES = [
    [],
    [10],
    [10] * 100,
    [10] * 5 + [3] + [10] * 5,
    [3, 10, 10, 11, 2, 2, 1],
    [1200] * 150 + [7],
    [1, 0, 0, 5, 5, 0],
    [40_000, 40_000, 20, 20],
    [65_507, 65_507],
]


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"{len(sizes)}-{sum(sizes)}")
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_what_is_sent_arrives_in_order(sizes: list[int], host: str) -> None:
    many, far = await pair(host)
    data = [os.urandom(size) for size in sizes]
    many.sendto_many(iter(data), far.getsockname())
    got = come(far)
    for piece in data:
        many.sendto(piece, far.getsockname())
    assert got == come(far)
    assert len(got) >= len([size for size in sizes if size])
    far.close()
    await close(many)


async def test_one_call_sends_many() -> None:
    transport, far = await pair()
    calls = Calls(transport, {})
    transport.sendto_many([b"x" * 100] * 128, far.getsockname())
    assert calls.made == ["sendmsg", "sendmsg"]
    assert len(come(far)) == 128
    far.close()
    await close(transport)


@pytest.mark.parametrize("number", [errno.EIO, errno.EINVAL, errno.EMSGSIZE, errno.ENOPROTOOPT])
async def test_where_the_kernel_will_not_cut(number: int) -> None:
    """As for what IPsec will protect: EIO."""
    transport, far = await pair()
    calls = Calls(transport, {"sendmsg": [OSError(number, "no")]})
    transport.sendto_many([b"%d" % (100 + index) for index in range(64)], far.getsockname())
    assert calls.made == ["sendmsg", *["sendto"] * 64]
    assert come(far) == [b"%d" % (100 + index) for index in range(64)]
    assert not transport.get_protocol().log.of("error")
    far.close()
    await close(transport)


async def test_a_pending_error_costs_one_datagram() -> None:
    transport, far = await pair()
    Calls(transport, {"sendmsg": [ConnectionRefusedError()]})
    transport.sendto_many([b"1", b"2", b"3"], far.getsockname())
    ((error,),) = transport.get_protocol().log.of("error")
    assert isinstance(error, ConnectionRefusedError)
    assert come(far) == [b"2", b"3"]
    far.close()
    await close(transport)


async def test_a_full_socket_buffers() -> None:
    transport, far = await pair()
    transport.set_write_buffer_limits(high=20)
    Calls(
        transport,
        {"sendmsg": [BlockingIOError()], "sendto": [BlockingIOError(), BlockingIOError()]},
    )
    data = [b"%d" % (100 + index) for index in range(30)]
    transport.sendto_many(data, far.getsockname())
    assert transport.get_write_buffer_size()
    log = transport.get_protocol().log
    assert log.of("pause") == [()]
    transport.sendto_many([b"later"] * 2, far.getsockname())
    await log.until("resume")
    assert come(far) == [*data, b"later", b"later"]
    far.close()
    await close(transport)


async def test_anything_like_bytes_and_connected_transports() -> None:
    transport, far = await pair()
    data = [b"1", bytearray(b"2"), memoryview(b"3")]
    transport.sendto_many(data, far.getsockname())
    client, _ = await create_datagram_endpoint(
        Plain, remote_addr=far.getsockname(), backend=memory()
    )
    client.sendto_many([b"4", b"5"])
    assert come(far) == [b"1", b"2", b"3", b"4", b"5"]
    with pytest.raises(TypeError, match="bytes-like"):
        transport.sendto_many(["text"], far.getsockname())
    with pytest.raises(ValueError, match="Invalid address"):
        client.sendto_many([b"6"], HERE)
    far.close()
    await close(transport, client)


async def test_an_address_that_is_none() -> None:
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    transport, far = await pair()
    protocol = transport.get_protocol()
    transport.sendto_many([b"1", b"2"], "no address")
    ((error,),) = await protocol.log.until("lost")
    assert isinstance(error, TypeError)
    far.close()


async def test_a_closed_transport_sends_nothing() -> None:
    transport, far = await pair()
    protocol = transport.get_protocol()
    transport.close()
    await protocol.log.until("lost")
    transport.sendto_many([b"1", b"2"], far.getsockname())
    await until(lambda: True)
    assert come(far) == []
    far.close()


@given(st.lists(st.one_of(st.integers(0, 5), st.integers(0, 65507)), min_size=1, max_size=200))
def test_runs(sizes: list[int]) -> None:
    start = 0
    while start < len(sizes):
        end = run(sizes, start)
        part = sizes[start:end]
        assert 1 <= len(part) <= 64
        if len(part) > 1:
            assert sum(part) <= 65000
            assert set(part[:-1]) == {part[0]}
            assert 0 < part[-1] <= part[0]
        start = end
