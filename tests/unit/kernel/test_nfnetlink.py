"""nf_tables messages: what is sent, what is taken, and what no bytes may do."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipsec_aio.errors import BackendDenied, BackendError, BackendUnavailable, CodecError
from ipsec_aio.kernel import nfnetlink as nft
from ipsec_aio.kernel import stamp_table
from ipsec_aio.kernel.nfnetlink import (
    Attributes,
    EventSocket,
    NftError,
    NftSocket,
    Request,
    be32,
    encode,
    number,
    parse,
    split,
    text,
    unpack_text,
)
from ipsec_aio.kernel.stamp_rules import CHAINS, same

trees: st.SearchStrategy[Attributes] = st.recursive(
    st.lists(st.tuples(st.integers(0, 99), st.binary(max_size=9)), max_size=4).map(tuple),
    lambda inner: st.lists(
        st.tuples(st.integers(0, 99), st.one_of(st.binary(max_size=9), inner)), max_size=3
    ).map(tuple),
    max_leaves=8,
)


@given(trees)
def test_what_is_encoded_is_found_again(tree: Attributes) -> None:
    assert len(encode(tree)) % 4 == 0
    assert same(tree, encode(tree))
    assert [kind for kind, _ in parse(encode(tree))] == [kind for kind, _ in tree]


@given(trees, st.data())
def test_any_other_bytes_are_not_the_same(tree: Attributes, data: st.DataObject) -> None:
    encoded = encode(tree)
    more = encode(((data.draw(st.integers(0, 99)), b"x"),))
    assert not same(tree, encoded + more)
    assert not same((*tree, (5, b"y")), encoded)


@given(st.binary(max_size=80))
def test_no_bytes_break_the_decoders(data: bytes) -> None:
    for decode in (parse, lambda data: list(split(data))):
        with suppress(CodecError):
            decode(data)
    same(CHAINS["input"].rules[0].expressions, data)


@pytest.mark.parametrize(
    "data",
    [
        b"\x04",
        b"\x04\x00\x01",
        struct.pack("=HH", 3, 1),
        struct.pack("=HH", 5, 1),
        encode(((1, b"abcd"),)) + b"\x01",
    ],
)
def test_attribute_lengths(data: bytes) -> None:
    with pytest.raises(CodecError):
        parse(data)
    assert not same((), data)


@pytest.mark.parametrize(
    "data",
    [bytes(15), struct.pack("=IHHII", 15, 0, 0, 0, 0), struct.pack("=IHHII", 17, 0, 0, 0, 0)],
)
def test_message_lengths(data: bytes) -> None:
    with pytest.raises(CodecError):
        list(split(data))


def test_small_values() -> None:
    assert number(None) == 0
    assert number(None, 5) == 5
    assert be32(-450) == b"\xff\xff\xfe\x3e"
    assert unpack_text(None) == ""
    assert unpack_text(b"name\0rest") == "name"
    assert unpack_text(b"\xff") == "\\xff"


def test_a_message_without_its_header_is_an_error() -> None:
    with pytest.raises(CodecError, match="shorter"):
        nft._message(0, 0, b"\x01")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.EPERM, BackendDenied),
        (errno.EACCES, BackendDenied),
        (errno.EOPNOTSUPP, BackendUnavailable),
        (errno.EIO, BackendError),
    ],
)
def test_errors_in_our_terms(code: int, kind: type[BackendError]) -> None:
    error = nft.failure(code, "do it")
    assert type(error) is kind
    assert error.errno == code
    assert "cannot do it" in str(error)


def test_a_kernel_without_nf_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nft, "_NETLINK_NETFILTER", 31)
    with pytest.raises(BackendUnavailable, match="no nf_tables"):
        NftSocket()


@pytest.fixture
def netlink(netns: None) -> Iterator[NftSocket]:
    netlink = NftSocket()
    yield netlink
    netlink.close()


def table(name: str) -> Request:
    return Request(nft.NEWTABLE, ((1, text(name)),), nft.CREATE)


def test_a_transaction_is_carried_out_whole_or_not(netlink: NftSocket) -> None:
    with pytest.raises(NftError) as caught:
        netlink.commit([table("a"), Request(nft.DELTABLE, ((1, text("b")),))])
    assert (caught.value.errno, caught.value.index) == (errno.ENOENT, 1)
    assert netlink.dump(nft.GETTABLE, family=0) == []
    netlink.rehearse([table("a")])
    assert netlink.dump(nft.GETTABLE, family=0) == []
    before = netlink.generation_id()
    netlink.commit([table("a"), table("b")])
    assert netlink.generation_id() != before
    names = {unpack_text(t.attributes[1]) for t in netlink.dump(nft.GETTABLE, family=0)}
    assert names == {"a", "b"}


def test_events_tell_who_changed_what(netlink: NftSocket) -> None:
    events = EventSocket()
    assert events.read() == []
    netlink.commit([table("a")])
    seen = events.read()
    assert seen is not None
    assert [(event.kind, event.portid) for event in seen] == [
        (nft.NEWTABLE, netlink.portid),
        (nft.NEWGEN, netlink.portid),
    ]
    events.close()
    with pytest.raises(OSError, match="Bad file"):
        events.read()


def test_lost_events_are_told(netlink: NftSocket) -> None:
    events = EventSocket()
    events._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    for index in range(50):
        netlink.commit([table(f"t{index}")])
    assert events.read() is None
    assert events.read() == []
    events.close()


class Canned(socket.socket):
    """A socket that receives what a test says, and keeps to itself what is sent."""

    def __init__(self, *received: tuple[bytes, int]) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.received = list(received)

    def send(self, *_: object) -> int:
        return 0

    def recvfrom_into(self, buffer: bytearray, *_: object) -> tuple[int, tuple[int, int]]:  # type: ignore[override]
        if not self.received:
            raise BlockingIOError
        data, sender = self.received.pop(0)
        buffer[: len(data)] = data
        return len(data), (sender, 0)


def canned(netlink: NftSocket | EventSocket, *received: tuple[bytes, int]) -> None:
    netlink._socket.close()
    netlink._socket = Canned(*received)


def frame(kind: int, sequence: int, body: bytes, flags: int = 0) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, sequence, 0) + body


NEWTABLE = 10 << 8
DONE = frame(3, 1, bytes(4))
TABLE = bytes((1, 0, 0, 0)) + encode(((1, text("a")),))


def test_only_the_kernel_and_this_request_are_heard(netlink: NftSocket) -> None:
    forged = frame(NEWTABLE, 1, TABLE)
    stale = frame(NEWTABLE, 0, TABLE)
    canned(netlink, (forged, 4711), (stale, 0), (DONE, 0))
    assert netlink.dump(nft.GETTABLE) == []


def test_a_dump_that_was_interrupted_is_an_error(netlink: NftSocket) -> None:
    canned(netlink, (frame(NEWTABLE, 1, TABLE, 0x10) + DONE, 0))
    with pytest.raises(NftError) as caught:
        netlink.dump(nft.GETTABLE)
    assert caught.value.errno == errno.EINTR


def test_an_answer_that_does_not_end_is_an_error(netlink: NftSocket) -> None:
    canned(netlink, (frame(NEWTABLE, 1, TABLE), 0))
    with pytest.raises(NftError) as caught:
        netlink.dump(nft.GETTABLE)
    assert caught.value.errno == errno.EIO


def test_the_first_failure_of_a_transaction_is_told(netlink: NftSocket) -> None:
    def error(sequence: int, code: int) -> bytes:
        return frame(2, sequence, struct.pack("=i", -code))

    answers = error(99, errno.EIO) + error(2, 0) + error(3, errno.EPERM) + error(4, errno.EIO)
    canned(netlink, (answers + frame(2, 5, b""), 0))
    with pytest.raises(NftError) as caught:
        netlink.commit([table("a"), table("b"), table("c")])
    assert (caught.value.errno, caught.value.index) == (errno.EPERM, 1)


def test_broken_events_count_as_lost(netlink: NftSocket) -> None:
    events = EventSocket()
    canned(events, (b"\x01", 0))
    assert events.read() is None
    events.close()


@pytest.mark.parametrize("code", [errno.EINTR, errno.ENOENT])
def test_tables_that_change_all_the_time_cannot_be_read(netlink: NftSocket, code: int) -> None:
    canned(netlink, *[(frame(2, n, struct.pack("=i", -code)), 0) for n in range(1, 30)])
    with pytest.raises(BackendError, match="change all the time"):
        stamp_table.read(netlink)


def test_another_answer_is_passed_on(netlink: NftSocket) -> None:
    canned(netlink, (frame(2, 1, struct.pack("=i", -errno.EOPNOTSUPP)), 0))
    with pytest.raises(BackendUnavailable, match="no nf_tables"):
        stamp_table.read(netlink)
