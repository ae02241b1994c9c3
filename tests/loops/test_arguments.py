"""What is no requirement or no open backend every function refuses, before it opens anything."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

import ipsec_aio

HOST = "127.0.0.1"


async def never(*_: Any) -> None:
    raise AssertionError


def token_of_a_connected_socket(**options: Any) -> Any:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((HOST, 9))
        ipsec_aio.get_ptoken(sock, **options)


OPENING: dict[str, Callable[..., Awaitable[Any]]] = {
    "create_datagram_endpoint": lambda **options: ipsec_aio.create_datagram_endpoint(
        ipsec_aio.DatagramProtocol, (HOST, 0), **options
    ),
    "create_server": lambda **options: ipsec_aio.create_server(
        ipsec_aio.Protocol, HOST, 0, **options
    ),
    "create_connection": lambda **options: ipsec_aio.create_connection(
        ipsec_aio.Protocol, HOST, 9, **options
    ),
    "start_server": lambda **options: ipsec_aio.start_server(never, HOST, 0, **options),
    "open_connection": lambda **options: ipsec_aio.open_connection(HOST, 9, **options),
}
PLAIN: dict[str, Callable[..., Any]] = {
    "get_ptoken": token_of_a_connected_socket,
    "set_default_backend": lambda backend: ipsec_aio.set_default_backend(backend),
}


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


async def call(name: str, **options: Any) -> None:
    if name in PLAIN:
        PLAIN[name](**options)
    else:
        await OPENING[name](**options)


@pytest.mark.parametrize("name", OPENING)
@pytest.mark.parametrize(
    "wrong",
    [True, "encrypted", ipsec_aio.Require, {"encrypted": True}],
    ids=["bool", "text", "class", "dict"],
)
async def test_what_is_no_requirement(name: str, wrong: Any) -> None:
    before = descriptors()
    with pytest.raises(TypeError, match=r"require must be a Require, not .*(True|encrypt|Require)"):
        await call(name, backend=ipsec_aio.MemoryBackend(), require=wrong)
    assert descriptors() == before


@pytest.mark.parametrize("name", [*OPENING, *PLAIN])
@pytest.mark.parametrize(
    "wrong",
    ["memory", ipsec_aio.open_backend("memory"), ipsec_aio.MemoryBackend],
    ids=["name", "not entered", "class"],
)
async def test_what_is_no_open_backend(name: str, wrong: Any) -> None:
    before = descriptors()
    with pytest.raises(
        TypeError, match=r"not an open backend: .*async with ipsec_aio.open_backend"
    ):
        await call(name, backend=wrong)
    assert descriptors() == before
