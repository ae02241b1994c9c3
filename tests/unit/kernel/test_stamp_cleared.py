"""Whose marks the stamp clears, on packets that this kernel delivers to itself over loopback."""

from __future__ import annotations

import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from ipsec_aio.kernel import stamp_table
from ipsec_aio.kernel.nfnetlink import NftSocket
from ipsec_aio.kernel.sockopts import SO_MARK, SO_RCVMARK
from ipsec_aio.kernel.stamp_table import Port

pytestmark = pytest.mark.usefixtures("netns")

FOREIGN = 0x4000
SERVED, UNSERVED = 5000, 5001
NO_NEXT_HEADER = 59


@pytest.fixture
def sockets(netns: None) -> Iterator[ExitStack]:
    for words in ("link set lo up", "link set lo mtu 1280"):
        subprocess.run(["ip", *words.split()], check=True)
    netlink = NftSocket()
    stamp_table.install(netlink, [Port(socket.IPPROTO_UDP, SERVED)], owned=True)
    with ExitStack() as opened:
        yield opened
    netlink.close()


def pair(
    sockets: ExitStack, family: int, kind: int, protocol: int, port: int
) -> tuple[socket.socket, socket.socket]:
    """Open one that receives marks, and one that sends to it what bears a foreign mark."""
    receiver, sender = (sockets.enter_context(socket.socket(family, kind, protocol)) for _ in "ab")
    receiver.settimeout(5)
    receiver.setsockopt(socket.SOL_SOCKET, SO_RCVMARK, 1)
    address = "::1" if family == socket.AF_INET6 else "127.0.0.1"
    receiver.bind((address, port))
    sender.setsockopt(socket.SOL_SOCKET, SO_MARK, FOREIGN)
    sender.connect((address, port))
    return receiver, sender


def received(receiver: socket.socket) -> tuple[int, int]:
    """Return the length of a datagram and its mark."""
    data, control, _, _ = receiver.recvmsg(65536, 256)
    (mark,) = (value for _, kind, value in control if kind == SO_MARK)
    return len(data), struct.unpack("=I", mark)[0]


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize("size", [5, 4000])
@pytest.mark.parametrize(("port", "mark"), [(SERVED, 0), (UNSERVED, FOREIGN)])
def test_datagrams_whole_and_in_fragments(
    sockets: ExitStack, family: int, size: int, port: int, mark: int
) -> None:
    """Later fragments of IPv6 lose their marks; the datagram has that of its first."""
    receiver, sender = pair(sockets, family, socket.SOCK_DGRAM, 0, port)
    sender.send(bytes(size))
    assert received(receiver) == (size, mark)


@pytest.mark.parametrize(("size", "mark"), [(0, 0), (3, 0), (4, FOREIGN)])
def test_packets_too_short_for_a_port_lose_their_marks(
    sockets: ExitStack, size: int, mark: int
) -> None:
    receiver, sender = pair(sockets, socket.AF_INET6, socket.SOCK_RAW, NO_NEXT_HEADER, 0)
    sender.send(bytes(size))
    assert received(receiver) == (size, mark)
