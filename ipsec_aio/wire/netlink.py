"""Netlink framing: messages and attributes inside a receive buffer (netlink(7), linux/netlink.h).

Rules:

* Nothing is copied out of the buffer: messages and attributes are told by their positions.
* Whatever the bytes, a walk ends, stays inside the given bounds, or raises CodecError.
* No error message carries bytes of a payload: only types, positions and lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple

from ..errors import CodecError

__all__ = [
    "NLMSG_DONE",
    "NLMSG_ERROR",
    "NLMSG_NOOP",
    "NLMSG_OVERRUN",
    "NLM_F_DUMP",
    "NLM_F_DUMP_INTR",
    "NLM_F_MULTI",
    "NLM_F_REQUEST",
    "Buffer",
    "Message",
    "attribute",
    "attributes",
    "error_number",
    "messages",
    "request",
]

Buffer = bytes | bytearray | memoryview

NLMSG_NOOP = 1
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLMSG_OVERRUN = 4

NLM_F_REQUEST = 0x1
NLM_F_MULTI = 0x2
NLM_F_DUMP_INTR = 0x10
NLM_F_DUMP = 0x300

_HEADER = Struct("=IHHII")
_ATTRIBUTE = Struct("=HH")
_CODE = Struct("=i")
_TYPE_MASK = 0x3FFF


class Message(NamedTuple):
    """A ``struct nlmsghdr``; the payload lies in the buffer from ``start`` up to ``end``."""

    kind: int
    flags: int
    sequence: int
    port: int
    start: int
    end: int

    @property
    def interrupted(self) -> bool:
        """Whether the kernel says that a dump missed changes and must be repeated."""
        return bool(self.flags & NLM_F_DUMP_INTR)


def messages(buffer: Buffer, length: int) -> Iterator[Message]:
    """Walk over the messages in the first ``length`` bytes of a buffer.

    Raises CodecError, after the messages before, where a header is cut or its length is wrong.
    """
    make = Message._make  # several times faster than the class
    offset = 0
    while offset < length:
        if length - offset < _HEADER.size:
            raise CodecError(f"{length - offset} bytes where a netlink header should be")
        size, kind, flags, sequence, port = _HEADER.unpack_from(buffer, offset)
        if not _HEADER.size <= size <= length - offset:
            raise CodecError(f"netlink message of {size} bytes with {length - offset} received")
        yield make((kind, flags, sequence, port, offset + _HEADER.size, offset + size))
        offset += size + 3 & ~3


def attributes(buffer: Buffer, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Walk over ``struct nlattr``: type without its flags, start and end of the payload.

    Raises CodecError, after the attributes before, where one is cut or its length is wrong.
    """
    while start < end:
        if end - start < _ATTRIBUTE.size:
            raise CodecError(f"{end - start} bytes where an attribute's header should be")
        size, kind = _ATTRIBUTE.unpack_from(buffer, start)
        if not _ATTRIBUTE.size <= size <= end - start:
            raise CodecError(
                f"attribute {kind & _TYPE_MASK} of {size} bytes with {end - start} left"
            )
        yield kind & _TYPE_MASK, start + _ATTRIBUTE.size, start + size
        start += size + 3 & ~3


def error_number(buffer: Buffer, message: Message) -> int:
    """Return the errno, 0 for success, of an NLMSG_ERROR, or of an NLMSG_DONE that has one.

    Raises CodecError for an NLMSG_ERROR without a code, or for a code that is no errno.
    """
    if message.end - message.start < _CODE.size:
        if message.kind == NLMSG_DONE:
            return 0
        raise CodecError("netlink error without a code")
    (code,) = _CODE.unpack_from(buffer, message.start)
    if not -4095 <= code <= 0:
        raise CodecError("netlink error with a code that is none")
    return -int(code)


def request(kind: int, flags: int, sequence: int, payload: bytes = b"") -> bytes:
    """Build one message to the kernel."""
    return (
        _HEADER.pack(_HEADER.size + len(payload), kind, NLM_F_REQUEST | flags, sequence, 0)
        + payload
    )


def attribute(kind: int, payload: bytes) -> bytes:
    """Build one attribute, padded."""
    size = _ATTRIBUTE.size + len(payload)
    return _ATTRIBUTE.pack(size, kind) + payload + bytes(-size % 4)
