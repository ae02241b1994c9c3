"""VICI, strongSwan's Versatile IKE Control Interface: bytes <-> values.

Source: strongSwan, ``src/libcharon/plugins/vici/README.md``.

Rules:

* A packet is a length (32 bits, network order, at most :data:`MAX_PACKET`), a type (8 bits), for
  some types a name (8-bit length and that many bytes), and for some types a message.
* A message is a sequence of elements that nest: sections, which may hold everything; lists, which
  hold values only; and values, which are bytes of whatever meaning (charon sends text; a
  certificate is DER). Here a section is a dict, a list a list, a value bytes, and order is kept.
* Names are text of at most 255 bytes. Bytes that are not UTF-8 become surrogates (PEP 383) and
  come out again as they were: a configuration's name may be anything.
* Names are unique within their section, as the format demands; a second one is refused, since a
  dict would drop one of the two unseen.
* Whatever is wrong with bytes or with values to encode is a CodecError, nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TypeAlias, cast

from ipsec_aio.errors import CodecError

__all__ = [
    "MAX_DEPTH",
    "MAX_PACKET",
    "Encodable",
    "Message",
    "Packet",
    "PacketReader",
    "PacketType",
    "Value",
    "decode_message",
    "decode_packet",
    "encode_message",
    "encode_packet",
]

MAX_PACKET = 512 * 1024
"""The longest packet in bytes, without its length header."""

MAX_DEPTH = 32
"""How deep sections may nest. The format sets no limit; charon's own messages need five."""

Value: TypeAlias = "bytes | list[bytes] | Message"
Message: TypeAlias = "dict[str, Value]"
"""A decoded message, or a section of one."""

Scalar: TypeAlias = "bytes | str | int | bool"
Encodable: TypeAlias = "Mapping[str, Encodable] | Sequence[Scalar] | Scalar"
"""What can be encoded: text as UTF-8, numbers in decimal, bools as ``yes`` and ``no``. A sequence
is a list or a tuple.
"""


class PacketType(IntEnum):
    """Types of packets."""

    CMD_REQUEST = 0
    """A command: name, message."""
    CMD_RESPONSE = 1
    """The answer to a command: message."""
    CMD_UNKNOWN = 2
    """The answer to a command that charon does not know."""
    EVENT_REGISTER = 3
    """A wish for events of this name."""
    EVENT_UNREGISTER = 4
    """The end of that wish."""
    EVENT_CONFIRM = 5
    """The answer to either."""
    EVENT_UNKNOWN = 6
    """The answer to either where charon does not know the event, or it was not registered."""
    EVENT = 7
    """An event: name, message. It can come at any time, also between a command and its answer."""


_NAMED = frozenset(
    {
        PacketType.CMD_REQUEST,
        PacketType.EVENT_REGISTER,
        PacketType.EVENT_UNREGISTER,
        PacketType.EVENT,
    }
)
_WITH_MESSAGE = frozenset({PacketType.CMD_REQUEST, PacketType.CMD_RESPONSE, PacketType.EVENT})

_SECTION_START = 1
_SECTION_END = 2
_KEY_VALUE = 3
_LIST_START = 4
_LIST_ITEM = 5
_LIST_END = 6


@dataclass(frozen=True, slots=True)
class Packet:
    """A packet. ``name`` is empty where the type has none, and so is ``message``."""

    type: PacketType
    name: str = ""
    message: Message = field(default_factory=dict[str, "Value"])


class PacketReader:
    """Cuts a byte stream into packets.

    ::

        reader = PacketReader()
        for packet in reader.feed(data): ...
        reader.eof()

    It holds at most one incomplete packet. After a CodecError the stream has no more boundaries:
    every later call raises again.
    """

    __slots__ = ("_broken", "_buffer")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._broken = False

    def feed(self, data: bytes | bytearray | memoryview) -> list[Packet]:
        """Take bytes as they arrive, in pieces of any size; return the packets they complete.

        Raises CodecError for a length of 0 or over :data:`MAX_PACKET` (as soon as it is read), and
        for whatever :func:`decode_packet` refuses.
        """
        if self._broken:
            raise CodecError("the stream is broken")
        buffer = self._buffer
        buffer += data
        packets: list[Packet] = []
        position = 0
        try:
            while len(buffer) - position >= 4:
                length = int.from_bytes(buffer[position : position + 4])
                if not 0 < length <= MAX_PACKET:
                    raise CodecError(f"a packet of {length} bytes")
                end = position + 4 + length
                if len(buffer) < end:
                    break
                packets.append(decode_packet(bytes(buffer[position + 4 : end])))
                position = end
        except CodecError:
            self._broken = True
            buffer.clear()
            raise
        del buffer[:position]
        return packets

    def eof(self) -> None:
        """Say that the stream ended. Raises CodecError where it ended inside a packet."""
        if self._buffer:
            raise CodecError(f"the stream ended {len(self._buffer)} bytes into a packet")


def decode_packet(data: bytes) -> Packet:
    """Decode a packet without its length header. Raises CodecError."""
    if not data:
        raise CodecError("an empty packet")
    if len(data) > MAX_PACKET:
        raise CodecError(f"a packet of {len(data)} bytes")
    try:
        type_ = PacketType(data[0])
    except ValueError:
        raise CodecError(f"unknown packet type {data[0]}") from None
    name, position = "", 1
    if type_ in _NAMED:
        name, position = _name(data, position)
        if not name:
            raise CodecError(f"{type_.name} without a name")
    if type_ in _WITH_MESSAGE:
        return Packet(type_, name, decode_message(data[position:]))
    if position != len(data):
        raise CodecError(f"{len(data) - position} bytes too many after {type_.name}")
    return Packet(type_, name)


def encode_packet(type: PacketType, name: str = "", message: Encodable | None = None) -> bytes:
    """Encode a packet with its length header.

    Raises CodecError where name or message do not go with the type, or do not fit.
    """
    if (type in _NAMED) != bool(name):
        raise CodecError(f"{type.name} {'without' if type in _NAMED else 'with'} a name")
    if message and type not in _WITH_MESSAGE:
        raise CodecError(f"{type.name} with a message")
    body = bytearray((type,))
    if name:
        _put_name(body, name)
    if message:
        body += encode_message(message)
    if len(body) > MAX_PACKET:
        raise CodecError(f"a packet of {len(body)} bytes")
    return len(body).to_bytes(4) + bytes(body)


def decode_message(data: bytes) -> Message:
    """Decode a message into dicts, lists and bytes. Raises CodecError."""
    root: Message = {}
    section = root
    parents: list[Message] = []
    position = 0
    while position < len(data):
        element = data[position]
        if element == _SECTION_END:
            if not parents:
                raise CodecError(f"end of no section at {position}")
            section = parents.pop()
            position += 1
            continue
        if element not in (_SECTION_START, _KEY_VALUE, _LIST_START):
            raise CodecError(f"element type {element} at {position}")
        name, position = _name(data, position + 1)
        if name in section:
            raise CodecError(f"{name!r} twice in one section")
        if element == _KEY_VALUE:
            section[name], position = _value(data, position)
        elif element == _LIST_START:
            section[name], position = _items(data, position)
        else:
            if len(parents) == MAX_DEPTH:
                raise CodecError(f"sections more than {MAX_DEPTH} deep")
            parents.append(section)
            inner: Message = {}
            section[name] = inner
            section = inner
    if parents:
        raise CodecError(f"{len(parents)} sections without an end")
    return root


def encode_message(message: Encodable) -> bytes:
    """Encode a mapping of names to values, lists (or tuples) of values, and mappings.

    Raises CodecError for what has no encoding: other types, names over 255 bytes, values over
    65535 bytes, sections deeper than :data:`MAX_DEPTH`.
    """
    out = bytearray()
    _put_section(out, message, 0)
    return bytes(out)


def _name(data: bytes, position: int) -> tuple[str, int]:
    if position >= len(data):
        raise CodecError("the length of a name is missing")
    start = position + 1
    end = start + data[position]
    if end > len(data):
        raise CodecError(f"a name ends {end - len(data)} bytes after the message")
    name = data[start:end]
    if 0 in name:
        raise CodecError(f"a name with a NUL: {name!r}")
    return name.decode("utf-8", "surrogateescape"), end


def _value(data: bytes, position: int) -> tuple[bytes, int]:
    start = position + 2
    if start > len(data):
        raise CodecError("the length of a value is missing")
    end = start + int.from_bytes(data[position:start])
    if end > len(data):
        raise CodecError(f"a value ends {end - len(data)} bytes after the message")
    return data[start:end], end


def _items(data: bytes, position: int) -> tuple[list[bytes], int]:
    items: list[bytes] = []
    while position < len(data):
        element = data[position]
        position += 1
        if element == _LIST_END:
            return items, position
        if element != _LIST_ITEM:
            raise CodecError(f"element type {element} in a list at {position - 1}")
        item, position = _value(data, position)
        items.append(item)
    raise CodecError("a list without an end")


def _put_section(out: bytearray, message: object, depth: int) -> None:
    if not isinstance(message, Mapping):
        raise CodecError(f"{type(message).__name__} is no section")
    if depth > MAX_DEPTH:
        raise CodecError(f"sections more than {MAX_DEPTH} deep")
    for name, value in cast("Mapping[object, object]", message).items():
        if isinstance(value, Mapping):
            out.append(_SECTION_START)
            _put_name(out, name)
            _put_section(out, cast("Mapping[object, object]", value), depth + 1)
            out.append(_SECTION_END)
        elif isinstance(value, list | tuple):
            out.append(_LIST_START)
            _put_name(out, name)
            for item in cast("list[object]", value):
                out.append(_LIST_ITEM)
                _put_value(out, item)
            out.append(_LIST_END)
        else:
            out.append(_KEY_VALUE)
            _put_name(out, name)
            _put_value(out, value)


def _put_name(out: bytearray, name: object) -> None:
    if not isinstance(name, str):
        raise CodecError(f"a name is text, not {type(name).__name__}")
    encoded = _utf8(name)
    if len(encoded) > 0xFF:
        raise CodecError(f"a name of {len(encoded)} bytes")
    if 0 in encoded:
        raise CodecError(f"a name with a NUL: {name!r}")
    out.append(len(encoded))
    out += encoded


def _put_value(out: bytearray, value: object) -> None:
    if isinstance(value, bool):
        encoded = b"yes" if value else b"no"
    elif isinstance(value, int):
        encoded = b"%d" % value
    elif isinstance(value, str):
        encoded = _utf8(value)
    elif isinstance(value, bytes):
        encoded = value
    else:
        raise CodecError(f"{type(value).__name__} is no value")
    if len(encoded) > 0xFFFF:
        raise CodecError(f"a value of {len(encoded)} bytes")
    out += len(encoded).to_bytes(2)
    out += encoded


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise CodecError(f"text that has no UTF-8: {text!r}") from error
