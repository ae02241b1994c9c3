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
from ipsec_aio.kernel import nfnetlink, stamp_table
from ipsec_aio.kernel.nfnetlink import (
    EventSocket,
    NftError,
    NftSocket,
    Request,
    cells,
    expression,
    flags,
    named,
    nft,
    number,
    schema,
    text,
)
from ipsec_aio.wire.netlink import attribute

KINDS = [None, nft.nft_table_msg, nft.nft_rule_msg, schema("meta"), schema("no_such_thing")]


@given(st.sampled_from(KINDS), st.lists(st.tuples(st.integers(0, 99), st.binary(max_size=9))))
def test_no_attribute_is_lost(kind: object, values: list[tuple[int, bytes]]) -> None:
    encoded = b"".join(attribute(*value) for value in values)
    assert cells(encoded) == [value for _, value in values]
    found = named(kind, encoded)
    assert len(found) == len(dict(values))
    assert sorted(found.values()) == sorted(dict(values).values())


@given(st.sampled_from(KINDS), st.binary(max_size=80))
def test_no_bytes_break_the_decoders(kind: object, data: bytes) -> None:
    for decode in (cells, lambda data: named(kind, data)):
        with suppress(CodecError):
            decode(data)


def test_attributes_go_by_the_names_of_pyroute2_or_by_number() -> None:
    encoded = attribute(1, b"a\0") + attribute(7, b"owner") + attribute(99, b"new")
    assert named(nft.nft_table_msg, encoded) == {
        "NFTA_TABLE_NAME": b"a\0",
        "NFTA_TABLE_OWNER": b"owner",
        "99": b"new",
    }
    assert named(None, attribute(1, b"a")) == {"1": b"a"}


def test_small_values() -> None:
    assert number(None) == 0
    assert number(None, 5) == 5
    assert text(None) == ""
    assert text(b"name\0rest") == "name"
    assert text(b"\xff") == "\\xff"


def test_numbers_that_pyroute2_has_for_flags() -> None:
    assert flags(schema("lookup").lookup_flags, 1) == {"NFT_LOOKUP_F_INV"}
    assert flags(schema("xfrm").xfrm_key, 6) == 6


@pytest.mark.parametrize(
    ("name", "values"), [("meta", {"key": 1, "colour": 2}), ("no_such_thing", {"key": 1})]
)
def test_what_pyroute2_would_leave_out_is_an_error(name: str, values: dict[str, int]) -> None:
    with pytest.raises(CodecError, match="pyroute2 has no"):
        expression(name, **values)


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
    error = nfnetlink.failure(code, "do it")
    assert type(error) is kind
    assert error.errno == code
    assert "cannot do it" in str(error)


def test_a_kernel_without_nf_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nfnetlink, "NETLINK_NETFILTER", 31)
    with pytest.raises(BackendUnavailable, match="no nf_tables"):
        NftSocket()


@pytest.fixture
def netlink(netns: None) -> Iterator[NftSocket]:
    netlink = NftSocket()
    yield netlink
    netlink.close()


def table(name: str) -> Request:
    return Request(nft.NFT_MSG_NEWTABLE, [("NFTA_TABLE_NAME", name)], nft.NLM_F_CREATE)


def test_a_transaction_is_carried_out_whole_or_not(netlink: NftSocket) -> None:
    with pytest.raises(NftError) as caught:
        netlink.commit([table("a"), Request(nft.NFT_MSG_DELTABLE, [("NFTA_TABLE_NAME", "b")])])
    assert (caught.value.errno, caught.value.index) == (errno.ENOENT, 1)
    assert netlink.dump(nft.NFT_MSG_GETTABLE, family=0) == []
    netlink.rehearse([table("a")])
    assert netlink.dump(nft.NFT_MSG_GETTABLE, family=0) == []
    before = netlink.generation_id()
    netlink.commit([table("a"), table("b")])
    assert netlink.generation_id() != before
    assert {table.table for table in netlink.dump(nft.NFT_MSG_GETTABLE, family=0)} == {"a", "b"}


def test_events_tell_who_changed_what(netlink: NftSocket) -> None:
    events = EventSocket()
    assert events.read() == []
    netlink.commit([table("a")])
    seen = events.read()
    assert seen is not None
    assert [(event.kind, event.portid) for event in seen] == [
        (nft.NFT_MSG_NEWTABLE, netlink.portid),
        (nft.NFT_MSG_NEWGEN, netlink.portid),
    ]
    events.close()
    with pytest.raises(OSError, match="Bad file"):
        events.read()


def test_lost_events_are_told(netlink: NftSocket) -> None:
    events = EventSocket()
    events._channel._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    for index in range(50):
        netlink.commit([table(f"t{index}")])
    assert events.read() is None
    assert events.read() == []
    events.close()


Sender = tuple[int, int]


class Canned(socket.socket):
    """A socket that receives what a test says, and keeps to itself what is sent."""

    def __init__(self, *received: tuple[bytes, int]) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.received = list(received)

    def send(self, *_: object) -> int:
        return 0

    def recvmsg_into(self, buffers: object, *_: object) -> tuple[int, list[object], int, Sender]:  # type: ignore[override]
        if not self.received:
            raise BlockingIOError
        data, sender = self.received.pop(0)
        (buffer,) = buffers  # type: ignore[misc]
        buffer[: len(data)] = data
        return len(data), [], 0, (sender, 0)


def canned(netlink: NftSocket | EventSocket, *received: tuple[bytes, int]) -> None:
    netlink._channel._socket.close()
    netlink._channel._socket = Canned(*received)


def frame(kind: int, sequence: int, body: bytes, flags: int = 0) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, sequence, 0) + body


NEWTABLE = 10 << 8
DONE = frame(3, 1, bytes(4))
TABLE = bytes((1, 0, 0, 0)) + attribute(1, b"a\0")


def test_only_the_kernel_and_this_request_are_heard(netlink: NftSocket) -> None:
    forged = frame(NEWTABLE, 1, TABLE)
    stale = frame(NEWTABLE, 0, TABLE)
    canned(netlink, (forged, 4711), (stale, 0), (DONE, 0))
    assert netlink.dump(nft.NFT_MSG_GETTABLE) == []


def test_a_dump_that_was_interrupted_is_an_error(netlink: NftSocket) -> None:
    canned(netlink, (frame(NEWTABLE, 1, TABLE, 0x10) + DONE, 0))
    with pytest.raises(NftError) as caught:
        netlink.dump(nft.NFT_MSG_GETTABLE)
    assert caught.value.errno == errno.EINTR


def test_an_answer_that_does_not_end_is_an_error(netlink: NftSocket) -> None:
    canned(netlink, (frame(NEWTABLE, 1, TABLE), 0))
    with pytest.raises(NftError) as caught:
        netlink.dump(nft.NFT_MSG_GETTABLE)
    assert caught.value.errno == errno.EIO


def test_the_first_failure_of_a_transaction_is_told(netlink: NftSocket) -> None:
    def error(sequence: int, code: int) -> bytes:
        return frame(2, sequence, struct.pack("=i", -code))

    answers = error(99, errno.EIO) + error(2, 0) + error(3, errno.EPERM) + error(4, errno.EIO)
    canned(netlink, (answers, 0))
    with pytest.raises(NftError) as caught:
        netlink.commit([table("a"), table("b"), table("c")])
    assert (caught.value.errno, caught.value.index) == (errno.EPERM, 1)


BROKEN = [
    b"\x01",
    frame(NEWTABLE, 1, b"\x01"),
    frame(NEWTABLE, 1, TABLE + b"\x01"),
    frame(11 << 8, 1, TABLE),
]


@pytest.mark.parametrize("data", BROKEN)
def test_broken_events_count_as_lost(netlink: NftSocket, data: bytes) -> None:
    events = EventSocket()
    canned(events, (data, 0), (frame(NEWTABLE, 1, TABLE), 0))
    assert events.read() is None
    assert events.read() == []
    events.close()


@pytest.mark.parametrize("data", [*BROKEN, frame(2, 1, b"")])
def test_a_broken_answer_is_an_error(netlink: NftSocket, data: bytes) -> None:
    canned(netlink, (data, 0))
    with pytest.raises(NftError) as caught:
        netlink.dump(nft.NFT_MSG_GETTABLE)
    assert caught.value.errno == errno.EBADMSG


def test_requests_on_a_closed_socket_are_an_error(netlink: NftSocket) -> None:
    netlink.close()
    with pytest.raises(NftError) as caught:
        netlink.dump(nft.NFT_MSG_GETTABLE)
    assert caught.value.errno == errno.EBADF


@pytest.mark.parametrize("code", [errno.EINTR, errno.ENOENT])
def test_tables_that_change_all_the_time_cannot_be_read(netlink: NftSocket, code: int) -> None:
    canned(netlink, *[(frame(2, n, struct.pack("=i", -code)), 0) for n in range(1, 30)])
    with pytest.raises(BackendError, match="change all the time"):
        stamp_table.read(netlink)


def test_another_answer_is_passed_on(netlink: NftSocket) -> None:
    canned(netlink, (frame(2, 1, struct.pack("=i", -errno.EOPNOTSUPP)), 0))
    with pytest.raises(BackendUnavailable, match="no nf_tables"):
        stamp_table.read(netlink)
