"""nf_tables over NETLINK_NETFILTER: requests, transactions, dumps and events.

Rules:

* Every call is synchronous and short. The kernel answers a netlink request before ``send``
  returns, so nothing here waits, and it works the same inside any event loop.
* A socket belongs to the network namespace of the thread that opened it.
* Attributes are kept as raw bytes: verification compares them whole, so that an attribute that we
  do not know counts as a difference. (pyroute2's decoder leaves such attributes out, its
  synchronous sockets cannot be used inside a running loop and its asynchronous ones not on uvloop.)

Numbers: linux/netlink.h, linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

from ipsec_aio.errors import BackendDenied, BackendError, BackendUnavailable, CodecError

__all__ = [
    "Attributes",
    "EventSocket",
    "Message",
    "NftError",
    "NftSocket",
    "Request",
    "be32",
    "encode",
    "number",
    "parse",
    "text",
    "unpack_text",
]

NFPROTO_INET = 1

NEWTABLE, GETTABLE, DELTABLE = 0, 1, 2
NEWCHAIN, GETCHAIN, DELCHAIN = 3, 4, 5
NEWRULE, GETRULE, DELRULE = 6, 7, 8
NEWSET, GETSET, DELSET = 9, 10, 11
NEWSETELEM, GETSETELEM, DELSETELEM = 12, 13, 14
NEWGEN, GETGEN = 15, 16

CREATE = 0x400
EXCL = 0x200
APPEND = 0x800

_REQUEST, _MULTI, _ACK, _DUMP_INTR, _DUMP = 0x1, 0x2, 0x4, 0x10, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_SUBSYS = 10
_NETLINK_NETFILTER = 12
_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_NFNLGRP_NFTABLES = 7
_SO_RCVBUFFORCE = 33
_EVENT_BUFFER = 1 << 20
# The kernel fills at most 32 KiB of a dump; what is cut off fails to decode.
_RECEIVE = 1 << 16
_NESTED, _TYPE_MASK = 0x8000, 0x3FFF

_HEADER = struct.Struct("=IHHII")
_GENMSG = struct.Struct("!BBH")
_ATTRIBUTE = struct.Struct("=HH")

Attributes: TypeAlias = "tuple[tuple[int, bytes | Attributes], ...]"
"""Attributes in order: type and value, nested where the value is a tuple."""


class NftError(Exception):
    """The kernel refused a request. ``index`` is the message's place in its transaction, or -1."""

    def __init__(self, code: int, index: int = -1) -> None:
        super().__init__(os.strerror(code))
        self.errno = code
        self.index = index


class Message(NamedTuple):
    """An answer or an event. ``kind`` is an NFT_MSG_* number, ``portid`` who asked for it."""

    kind: int
    family: int
    portid: int
    attributes: dict[int, bytes]


class Request(NamedTuple):
    """One message of a transaction. ``label`` names in errors what it was for."""

    kind: int
    attributes: Attributes
    flags: int = 0
    label: str = ""
    family: int = NFPROTO_INET


def be32(value: int) -> bytes:
    """Encode an attribute's unsigned or negative 32-bit number."""
    return (value & 0xFFFFFFFF).to_bytes(4, "big")


def number(value: bytes | None, default: int = 0) -> int:
    """Decode an unsigned attribute; absent is ``default``."""
    return default if value is None else int.from_bytes(value, "big")


def text(value: str) -> bytes:
    """Encode a name."""
    return value.encode() + b"\0"


def unpack_text(value: bytes | None) -> str:
    """Decode a name; absent is ``""``."""
    return (value or b"").split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def encode(attributes: Attributes) -> bytes:
    """Encode attributes, padded to four bytes each."""
    parts: list[bytes] = []
    for kind, value in attributes:
        if isinstance(value, tuple):
            kind, value = kind | _NESTED, encode(value)
        parts.append(_ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind))
        parts.append(value + bytes(-len(value) % 4))
    return b"".join(parts)


def parse(data: bytes) -> list[tuple[int, bytes]]:
    """Split attributes, one level deep. Raises CodecError for lengths that cannot be."""
    found: list[tuple[int, bytes]] = []
    offset = 0
    while offset < len(data):
        if offset + _ATTRIBUTE.size > len(data):
            raise CodecError("nf_tables attribute is cut off in its header")
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < _ATTRIBUTE.size or offset + length > len(data):
            raise CodecError(f"nf_tables attribute says {length} bytes where it cannot")
        found.append((kind & _TYPE_MASK, data[offset + _ATTRIBUTE.size : offset + length]))
        offset += length + -length % 4
    return found


def split(data: bytes) -> Iterator[tuple[int, int, int, int, bytes]]:
    """Split a datagram into messages: type, flags, sequence number, port id and payload.

    Raises CodecError for lengths that cannot be.
    """
    offset = 0
    while offset < len(data):
        if offset + _HEADER.size > len(data):
            raise CodecError("netlink message is cut off in its header")
        length, kind, flags, sequence, portid = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size or offset + length > len(data):
            raise CodecError(f"netlink message says {length} bytes where it cannot")
        yield kind, flags, sequence, portid, data[offset + _HEADER.size : offset + length]
        offset += length + -length % 4


def _message(kind: int, portid: int, payload: bytes) -> Message:
    if len(payload) < _GENMSG.size:
        raise CodecError("nf_tables message is shorter than its header")
    attributes = dict(parse(payload[_GENMSG.size :]))
    return Message(kind & 0xFF, payload[0], portid, attributes)


def _frame(kind: int, flags: int, sequence: int, family: int, resource: int, body: bytes) -> bytes:
    length = _HEADER.size + _GENMSG.size + len(body)
    return (
        _HEADER.pack(length, kind, flags | _REQUEST, sequence, 0)
        + _GENMSG.pack(family, 0, resource)
        + body
    )


def _open_socket() -> socket.socket:
    try:
        return socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, _NETLINK_NETFILTER
        )
    except OSError as error:
        raise BackendUnavailable(
            error.errno, f"this kernel has no nf_tables (NETLINK_NETFILTER: {error.strerror})"
        ) from None


def _from_kernel(sock: socket.socket, buffer: bytearray) -> bytes:
    size, sender = sock.recvfrom_into(buffer)
    return bytes(memoryview(buffer)[:size]) if sender[0] == 0 else b""


class NftSocket:
    """Requests and transactions. Its ``portid`` is what a table's owner is known by."""

    def __init__(self) -> None:
        self._buffer = bytearray(_RECEIVE)
        self._socket = _open_socket()
        self._socket.bind((0, 0))
        self._sequence = 0
        self.portid: int = self._socket.getsockname()[0]

    def close(self) -> None:
        """Close the socket; the kernel then removes the tables that it owns. Idempotent."""
        self._socket.close()

    def get(self, kind: int, attributes: Attributes = (), family: int = NFPROTO_INET) -> Message:
        """Return the one object asked for. Raises NftError (ENOENT where there is none)."""
        return self._request(kind, _ACK, attributes, family)[0]

    def dump(
        self, kind: int, attributes: Attributes = (), family: int = NFPROTO_INET
    ) -> list[Message]:
        """Return all objects of a kind; family 0 (NFPROTO_UNSPEC) is every family's.

        Raises NftError, with EINTR where the tables changed meanwhile.
        """
        return self._request(kind, _DUMP, attributes, family)

    def generation_id(self) -> int:
        """Return the number that every transaction in this namespace changes."""
        return number(self.get(GETGEN, family=0).attributes.get(1))

    def commit(self, requests: Sequence[Request]) -> None:
        """Carry out all requests, or none and raise NftError."""
        self._transact(requests, finish=True)

    def rehearse(self, requests: Sequence[Request]) -> None:
        """Have all requests checked and none carried out. Raises NftError as :meth:`commit`."""
        self._transact(requests, finish=False)

    def _transact(self, requests: Sequence[Request], finish: bool) -> None:
        first = self._sequence + 1
        frames = [_frame(_BATCH_BEGIN, 0, first, 0, _SUBSYS, b"")]
        for place, request in enumerate(requests, first + 1):
            kind = _SUBSYS << 8 | request.kind
            body = encode(request.attributes)
            frames.append(_frame(kind, request.flags | _ACK, place, request.family, 0, body))
        self._sequence = first + len(requests) + 1
        # The kernel takes everything back where the end is missing.
        if finish:
            frames.append(_frame(_BATCH_END, 0, self._sequence, 0, _SUBSYS, b""))
        self._socket.send(b"".join(frames))
        failure: NftError | None = None
        while (data := self._receive()) is not None:
            for kind, _, sequence, _, payload in split(data):
                code = _error(kind, payload)
                if code and first <= sequence <= self._sequence and failure is None:
                    failure = NftError(code, sequence - first - 1)
        if failure is not None:
            raise failure

    def _receive(self) -> bytes | None:
        try:
            return _from_kernel(self._socket, self._buffer)
        except BlockingIOError:
            return None

    def _request(self, kind: int, flags: int, attributes: Attributes, family: int) -> list[Message]:
        self._sequence += 1
        wanted, body = self._sequence, encode(attributes)
        self._socket.send(_frame(_SUBSYS << 8 | kind, flags, wanted, family, 0, body))
        found: list[Message] = []
        interrupted = False
        while (data := self._receive()) is not None:
            for received, message_flags, sequence, portid, payload in split(data):
                if sequence != wanted:
                    continue
                interrupted = interrupted or bool(message_flags & _DUMP_INTR)
                if received in (_NLMSG_DONE, _NLMSG_ERROR):
                    if code := _error(received, payload):
                        raise NftError(code)
                    if interrupted:
                        raise NftError(errno.EINTR)
                    return found
                found.append(_message(received, portid, payload))
        raise NftError(errno.EIO)


def _error(kind: int, payload: bytes) -> int:
    if kind not in (_NLMSG_ERROR, _NLMSG_DONE) or len(payload) < 4:
        return 0
    return -int.from_bytes(payload[:4], "little" if _LITTLE else "big", signed=True)


_LITTLE = struct.pack("=H", 1) == b"\1\0"


class EventSocket:
    """What changes in the tables of this namespace (NFNLGRP_NFTABLES)."""

    def __init__(self) -> None:
        self._buffer = bytearray(_RECEIVE)
        self._socket = _open_socket()
        try:
            self._socket.bind((0, 0))
            self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _NFNLGRP_NFTABLES)
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _EVENT_BUFFER)
        except OSError as error:
            self._socket.close()
            raise failure(error.errno or 0, "watch nf_tables") from None

    def fileno(self) -> int:
        """The descriptor that becomes readable when there are events."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self._socket.close()

    def read(self) -> list[Message] | None:
        """Return the events that have arrived, or None where some were lost (ENOBUFS)."""
        found: list[Message] = []
        complete = True
        while True:
            try:
                data = _from_kernel(self._socket, self._buffer)
            except BlockingIOError:
                return found if complete else None
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                complete = False
                continue
            try:
                found += [_message(kind, pid, body) for kind, _, _, pid, body in split(data)]
            except CodecError:
                complete = False


def failure(code: int, what: str) -> BackendError:
    """Say in our terms why the kernel refused something of nf_tables."""
    if code in (errno.EPERM, errno.EACCES):
        return BackendDenied(
            code,
            f"cannot {what}: CAP_NET_ADMIN is needed in the user namespace that owns this "
            "network namespace",
        )
    if code in (errno.EOPNOTSUPP, errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT):
        return BackendUnavailable(code, f"cannot {what}: this kernel has no nf_tables")
    return BackendError(code, f"cannot {what}: {os.strerror(code)}")
