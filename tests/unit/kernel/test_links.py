"""Interfaces that hide IPsec, addresses of this host, and the socket options."""

from __future__ import annotations

import asyncio
import errno
import socket
import subprocess
from collections.abc import Iterator

import pytest
import xfrm_messages as m
from fake_netlink import FakeKernel, done, error, link, route
from hypothesis import given
from hypothesis import strategies as st

from ipsec_aio.errors import BackendOverrun, CodecError
from ipsec_aio.flow import pack_address
from ipsec_aio.kernel import sockopts
from ipsec_aio.kernel.links import Links
from ipsec_aio.wire import netlink as wire
from ipsec_aio.wire import rtnetlink

NEWLINK, DELLINK, NEWADDR = 16, 17, 20


def ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True)


@pytest.fixture
def kernel() -> Iterator[FakeKernel]:
    kernel = FakeKernel()
    yield kernel
    assert all(s.closed for s in kernel.opened)


@pytest.fixture
def links(kernel: FakeKernel) -> Iterator[Links]:
    links = Links(factory=kernel.socket)
    yield links
    links.close()


def emit(kernel: FakeKernel, kind: int, payload: bytes) -> None:
    kernel.emit(m.message(kind, payload), protocol=0)


@pytest.mark.usefixtures("netns")
async def test_this_kernel() -> None:
    links = Links()
    before_load = links.opaque
    assert before_load
    await links.load()
    assert not links.opaque
    assert links.fileno() >= 0
    before = links.changes
    ip("link set lo up")
    ip("link add w0 type veth peer name w1")
    ip("addr add 10.5.0.1/24 dev w0")
    ip("link set w0 up")
    links.drain()
    assert links.changes > before
    assert not links.opaque
    for address in ("10.5.0.3/24", "2001:db8:5::1/64"):
        links.drain()
        before = links.changes
        ip(f"addr add {address} dev w0")
        links.drain()
        assert links.changes > before, address
    assert links.is_local(pack_address("10.5.0.1"))
    assert links.is_local(pack_address("127.3.4.5"))
    assert links.is_local(pack_address("::1"))
    assert not links.is_local(pack_address("10.5.0.2"))
    assert not links.is_local(pack_address("198.51.100.1"))
    assert not links.is_local(pack_address("2001:db8::1"))
    links.close()
    links.close()


@pytest.mark.parametrize("kind", ["xfrm", "vti", "vti6"])
async def test_opaque_interfaces_come_and_go(kernel: FakeKernel, links: Links, kind: str) -> None:
    kernel.links = [link(1), link(2, "veth"), link(3, kind)]
    await links.load()
    assert links.interfaces == {3}
    emit(kernel, NEWLINK, link(4, kind))
    emit(kernel, DELLINK, link(3, kind))
    emit(kernel, DELLINK, link(2, "veth"))
    emit(kernel, NEWLINK, link(5, "bridge"))
    links.drain()
    assert links.interfaces == {4}
    assert links.opaque
    emit(kernel, DELLINK, link(4))
    links.drain()
    assert not links.opaque


async def test_a_bridge_port_is_no_interface(kernel: FakeKernel, links: Links) -> None:
    kernel.links = [link(3, "xfrm")]
    await links.load()
    emit(kernel, DELLINK, link(3, family=7))
    links.drain()
    assert links.interfaces == {3}


async def test_events_during_a_dump_are_played_after_it(kernel: FakeKernel, links: Links) -> None:
    kernel.links = [link(3, "xfrm")]
    usual = kernel.answer

    def answer(protocol: int, kind: int, sequence: int, payload: bytes) -> list[bytes | OSError]:
        emit(kernel, DELLINK, link(3))
        links.drain()
        return usual(protocol, kind, sequence, payload)

    kernel.answer = answer
    loading = links.load()
    await loading
    assert not links.opaque


async def test_asking_during_a_dump_does_not_disturb_it(kernel: FakeKernel, links: Links) -> None:
    kernel.links = [link(n) for n in range(1, 5)] + [link(5, "xfrm")]
    kernel.local.add(m.A)
    loading = asyncio.ensure_future(links.load())
    while not loading.done():
        assert links.is_local(m.A)
        await asyncio.sleep(0)
    await loading
    assert links.interfaces == {5}


async def test_an_interrupted_dump_is_repeated(kernel: FakeKernel, links: Links) -> None:
    rounds = iter([wire.NLM_F_DUMP_INTR, wire.NLM_F_DUMP_INTR, 0])
    kernel.answer = lambda protocol, kind, sequence, payload: [
        m.message(NEWLINK, link(3, "xfrm"), sequence=sequence),
        done(sequence, flags=next(rounds)),
    ]
    await links.load()
    assert links.interfaces == {3}


async def test_interfaces_that_never_rest(kernel: FakeKernel, links: Links) -> None:
    kernel.answer = lambda protocol, kind, sequence, payload: [
        done(sequence, flags=wire.NLM_F_DUMP_INTR)
    ]
    with pytest.raises(BackendOverrun, match="faster"):
        await links.load()
    assert links.opaque


async def test_a_full_queue(kernel: FakeKernel, links: Links) -> None:
    await links.load()
    kernel.emit(OSError(errno.ENOBUFS, "No buffer space available"), protocol=0)
    with pytest.raises(BackendOverrun):
        links.drain()


@pytest.mark.parametrize(
    ("reply", "local"),
    [
        (m.message(24, route(2), sequence=1), True),
        (m.message(24, route(1), sequence=1), False),
        (m.message(25, route(2), sequence=1), False),
        (m.message(24, route(2), sequence=9) + m.message(24, route(1), sequence=1), False),
        (error(errno.ENETUNREACH, sequence=1), False),
        (error(errno.ENOMEM, sequence=1), True),
        (m.message(24, b"", sequence=1), True),
        (OSError(errno.ENOBUFS, "No buffer space available"), True),
    ],
)
def test_an_address_is_local_in_doubt(
    kernel: FakeKernel, links: Links, reply: bytes | OSError, local: bool
) -> None:
    kernel.answer = lambda protocol, kind, sequence, payload: [reply]
    assert links.is_local(m.A) is local


def test_no_answer_and_no_address_are_local(kernel: FakeKernel, links: Links) -> None:
    kernel.answer = lambda protocol, kind, sequence, payload: []
    assert links.is_local(m.A6)
    assert links.is_local(b"")


@pytest.mark.parametrize("opened", [0, 1, 2])
def test_half_opened_is_closed(kernel: FakeKernel, opened: int) -> None:
    def factory(family: int, kind: int, protocol: int) -> socket.socket:
        if len(kernel.opened) == opened:
            raise OSError(errno.EMFILE, "Too many open files")
        return kernel.socket(family, kind, protocol)

    with pytest.raises(OSError, match="Too many"):
        Links(factory=factory)


def only(data: bytes) -> wire.Message:
    (found,) = wire.messages(data, len(data))
    return found


def test_link_cut_short() -> None:
    data = m.message(NEWLINK, bytes(12))
    with pytest.raises(CodecError, match="link message has 12 bytes, 16 expected"):
        rtnetlink.decode_link(data, only(data))


def test_route_cut_short() -> None:
    data = m.message(24, bytes(8))
    with pytest.raises(CodecError, match="route has 8 bytes, 12 expected"):
        rtnetlink.is_local_route(data, only(data))


def test_other_messages_are_no_links() -> None:
    data = m.message(NEWADDR, b"")
    assert rtnetlink.decode_link(data, only(data)) is None
    assert rtnetlink.changes_addresses(only(data))


def test_link_information_without_a_kind() -> None:
    payload = link(3) + wire.attribute(18, wire.attribute(2, b"data"))
    data = m.message(NEWLINK, payload)
    assert rtnetlink.decode_link(data, only(data)) == (3, "", False)


@given(st.sampled_from([NEWLINK, DELLINK, NEWADDR, 24]), st.binary(max_size=100))
def test_arbitrary_bytes_give_codec_errors_only(kind: int, payload: bytes) -> None:
    data = m.message(kind, payload)
    for read in (rtnetlink.decode_link, rtnetlink.is_local_route):
        try:
            read(data, only(data))
        except CodecError as caught:
            text = str(caught)
        else:
            text = ""
        assert len(text) < 100


# Socket options


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_socket_options(family: int) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        assert sockopts.read_mark(sock) == 0
        assert sockopts.protocol_of(sock) == socket.IPPROTO_TCP
        assert not sockopts.is_listening(sock)
        sock.listen()
        assert sockopts.is_listening(sock)
        assert sockopts.socket_cookie(sock)
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        assert sockopts.receive_marks(sock)
        assert sockopts.receive_packet_info(sock)
        assert sockopts.receive_fragment_sizes(sock)


def test_the_namespaces_cookie_tells_namespaces_apart(request: pytest.FixtureRequest) -> None:
    with socket.socket() as outside:
        request.getfixturevalue("netns")
        with socket.socket() as one, socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as other:
            cookie = sockopts.netns_cookie(one)
            assert cookie is not None
            assert cookie == sockopts.netns_cookie(other) != sockopts.netns_cookie(outside)


def test_sockets_without_these_options() -> None:
    one, other = socket.socketpair()
    with one, other:
        assert not sockopts.receive_packet_info(one)
        assert not sockopts.receive_fragment_sizes(one)
    assert sockopts.read_mark(one) is None
    assert sockopts.netns_cookie(one) is None


class _StandIn:
    """What uvloop shows of a socket: its descriptor, and answers that cost more."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def fileno(self) -> int:
        return self._sock.fileno()


def test_a_socket_is_examined_and_stays_its_owners() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        cookie = sockopts.socket_cookie(sock)
        for face in (sock, _StandIn(sock)):
            assert sockopts.examine(face, sockopts.read_mark) == 0
            assert sockopts.examine(face, sockopts.socket_cookie) == cookie
            with pytest.raises(ZeroDivisionError):
                sockopts.examine(face, lambda sock: 1 // 0)
            # Still open, still the same.
            assert sockopts.socket_cookie(sock) == cookie
    with pytest.raises((OSError, ValueError)):
        sockopts.examine(_StandIn(sock), sockopts.read_mark)
    assert sockopts.examine(sock, sockopts.read_mark) is None
    assert sockopts.examine(sock, sockopts.socket_cookie) is None
