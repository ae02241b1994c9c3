"""nf_tables over NETLINK_NETFILTER: requests, transactions, dumps and events.

Rules:

* pyroute2 builds what is sent and names what is received. Attributes go by its names.
* What is received stays bytes, one level at a time: verification must see each of them, and
  pyroute2's decoder turns numbers and flags that it does not know into nothing.
* Every call is synchronous and short. The kernel answers a netlink request before ``send``
  returns, so nothing here waits, and it works the same inside any event loop. (pyroute2's
  synchronous sockets run a loop of their own, which a running loop forbids.)
* A socket belongs to the network namespace of the thread that opened it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeAlias

from pyroute2.netlink import nfnetlink as _nfnetlink
from pyroute2.netlink.nfnetlink import nftsocket as _nftsocket
from pyroute2.nftables import expressions as _builders

from ipsec_aio.errors import (
    BackendDenied,
    BackendError,
    BackendOverrun,
    BackendUnavailable,
    CodecError,
)
from ipsec_aio.wire import netlink as wire

from .netlink import WHERE, DumpReader, NetlinkSocket, Take

__all__ = [
    "Attributes",
    "EventSocket",
    "Expression",
    "Message",
    "NftError",
    "NftSocket",
    "Request",
    "cells",
    "data",
    "expression",
    "failure",
    "flags",
    "named",
    "number",
    "schema",
    "sent",
    "text",
    "verdict",
]

nft: Any = _nftsocket
"""pyroute2's nf_tables: NFT_MSG_* and NLM_F_* numbers, enumerations, message classes."""
_expressions: Any = _builders

NFPROTO_INET: int = nft.NFPROTO_INET
NETLINK_NETFILTER: int = nft.NETLINK_NETFILTER
_SUBSYSTEM: int = _nfnetlink.NFNL_SUBSYS_NFTABLES
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_GENMSG = 4
_HEADERS = 16 + _GENMSG
_EVENT_BUFFER = 1 << 20

Attributes: TypeAlias = Sequence[tuple[str, object]]
"""Attributes in order, each by pyroute2's name and in the form that its class takes."""

Expression: TypeAlias = Mapping[str, object]
"""An expression of a rule, as :func:`expression` builds it."""


class NftError(Exception):
    """The kernel refused a request. ``index`` is the message's place in its transaction, or -1."""

    def __init__(self, code: int, index: int = -1) -> None:
        super().__init__(os.strerror(code))
        self.errno = code
        self.index = index


class Message(NamedTuple):
    """An answer or an event. ``kind`` is an NFT_MSG_* number, ``portid`` who asked for it.

    ``table`` is the name of the table that it is about. ``attributes`` are bytes by name; those
    that pyroute2 does not know go by their number, as ``"12"``.
    """

    kind: int
    family: int
    portid: int
    table: str
    attributes: Mapping[str, bytes]


class Request(NamedTuple):
    """One message of a transaction. ``label`` names in errors what it was for."""

    kind: int
    attributes: Attributes
    flags: int = 0
    label: str = ""
    family: int = NFPROTO_INET


_SCHEMAS: dict[int, Any] = nft.AsyncNFTSocket.policy
_MORE_NAMES: dict[Any, dict[int, str]] = {nft.nft_table_msg: {7: "NFTA_TABLE_OWNER"}}


def schema(expression: str) -> Any:
    """Return pyroute2's class of an expression's attributes, None for one that it lacks."""
    return getattr(nft.nft_contains_expr.nft_expr, f"nft_{expression}", None)


def expression(name: str, /, **values: object) -> Expression:
    """Build an expression: ``expression("meta", key=25, dreg=1)``; see :func:`flags`.

    Raises CodecError for what pyroute2 does not know: it would leave that out.
    """
    known = _names(schema(name)).values()
    for key in values:
        if f"NFTA_{name}_{key}".upper() not in known:
            raise CodecError(f"pyroute2 has no {key!r} in {name!r}")
    built: Expression = _expressions.genex(name, values)
    return built


def verdict(code: int) -> Expression:
    """Build the expression that ends a rule's evaluation."""
    built: list[Expression] = _expressions.verdict(code)
    return built[0]


def data(value: bytes) -> Expression:
    """Build a value as cmp, bitwise, immediate and set elements hold it."""
    return {"attrs": [("NFTA_DATA_VALUE", value)]}


def flags(kind: Any, value: int) -> object:
    """Return a number in the form that pyroute2's class of the attribute takes.

    It takes flags by their names, and has some numbers for flags.
    """
    if isinstance(kind.ops, dict):
        return value
    return frozenset(name for bit, name in enumerate(kind.ops) if value >> bit & 1)


def number(value: bytes | None, default: int = 0) -> int:
    """Decode an unsigned attribute; absent is ``default``."""
    return default if value is None else int.from_bytes(value, "big")


def text(value: bytes | None) -> str:
    """Decode a name; absent is ``""``."""
    return (value or b"").split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def cells(encoded: bytes) -> list[bytes]:
    """Split attributes of one kind. Raises CodecError for lengths that cannot be."""
    return [value for _, value in _split(encoded)]


def named(kind: Any, encoded: bytes) -> dict[str, bytes]:
    """Split attributes and name them as a class of pyroute2 does; others go by their number.

    Raises CodecError for lengths that cannot be.
    """
    names = _names(kind)
    return {names.get(number, str(number)): value for number, value in _split(encoded)}


@cache
def _names(kind: Any) -> dict[int, str]:
    entries = enumerate(getattr(kind, "nla_map", ()))
    return {place: entry[0] for place, entry in entries} | _MORE_NAMES.get(kind, {})


def _split(encoded: bytes) -> list[tuple[int, bytes]]:
    walk = wire.attributes(encoded, 0, len(encoded))
    return [(number, encoded[start:end]) for number, start, end in walk]


def _encode(
    kind: Any, header: Mapping[str, int], fields: Mapping[str, int], attributes: Attributes = ()
) -> bytes:
    message = kind()
    message["header"].update(header)
    message.update(fields)
    message["attrs"] = list(attributes)
    message.encode()
    return bytes(message.data)


def _frame(request: Request, sequence: int, flags: int) -> bytes:
    header = {
        "type": _SUBSYSTEM << 8 | request.kind,
        "flags": nft.NLM_F_REQUEST | request.flags | flags,
        "sequence_number": sequence,
    }
    fields = {"nfgen_family": request.family}
    return _encode(_SCHEMAS[request.kind], header, fields, request.attributes)


def _batch(kind: int, sequence: int) -> bytes:
    header = {"type": kind, "flags": nft.NLM_F_REQUEST, "sequence_number": sequence}
    return _encode(_nfnetlink.nfgen_msg, header, {"res_id": _SUBSYSTEM})


def sent(request: Request) -> Mapping[str, bytes]:
    """Return a request's attributes as the kernel gets them, and as it has to give them back."""
    return named(_SCHEMAS[request.kind], _frame(request, 0, 0)[_HEADERS:])


def _message(buffer: wire.Buffer, message: wire.Message) -> Message:
    if message.kind >> 8 != _SUBSYSTEM:
        raise CodecError(f"message of type {message.kind} where one of nf_tables should be")
    if message.end - message.start < _GENMSG:
        raise CodecError("nf_tables message is shorter than its header")
    kind = message.kind & 0xFF
    body = bytes(buffer[message.start + _GENMSG : message.end])
    attributes = named(_SCHEMAS.get(kind), body)
    # The first attribute names the table, whatever the object is.
    table = next((value for number, value in _split(body) if number == 1), None)
    return Message(kind, buffer[message.start], message.port, text(table), attributes)


def _open(groups: Sequence[int], queue_bytes: int, what: str) -> NetlinkSocket:
    try:
        return NetlinkSocket(NETLINK_NETFILTER, groups, queue_bytes=queue_bytes)
    except OSError as error:
        raise failure(error.errno or 0, what) from None


class NftSocket:
    """Requests and transactions. Raises BackendUnavailable where there is no nf_tables."""

    def __init__(self) -> None:
        self._channel = _open((), 0, "reach nf_tables")
        self.portid: int = self._channel.port
        """What the owner of a table is known by."""

    def close(self) -> None:
        """Close the socket; the kernel then removes the tables that it owns. Idempotent."""
        self._channel.close()

    def get(self, kind: int, attributes: Attributes = (), family: int = NFPROTO_INET) -> Message:
        """Return the one object asked for. Raises NftError (ENOENT where there is none)."""
        return self._request(Request(kind, attributes, family=family), nft.NLM_F_ACK)[0]

    def dump(
        self, kind: int, attributes: Attributes = (), family: int = NFPROTO_INET
    ) -> list[Message]:
        """Return all objects of a kind; family 0 (NFPROTO_UNSPEC) is every family's.

        Raises NftError, with EINTR where the tables changed meanwhile.
        """
        return self._request(Request(kind, attributes, family=family), wire.NLM_F_DUMP)

    def generation_id(self) -> int:
        """Return the number that every transaction in this namespace changes."""
        # Asked while packets are judged, where pyroute2 would take as long as all the rest.
        sequence = self._channel.next_sequence()
        kind = _SUBSYSTEM << 8 | nft.NFT_MSG_GETGEN
        frame = wire.request(kind, nft.NLM_F_ACK, sequence, bytes(_GENMSG))
        found = self._ask(frame, sequence)
        return number(found[0].attributes.get("NFTA_GEN_ID"))

    def commit(self, requests: Sequence[Request]) -> None:
        """Carry out all requests, or none and raise NftError."""
        self._transact(requests, finish=True)

    def rehearse(self, requests: Sequence[Request]) -> None:
        """Have all requests checked and none carried out. Raises NftError as :meth:`commit`."""
        self._transact(requests, finish=False)

    def _transact(self, requests: Sequence[Request], finish: bool) -> None:
        next_sequence = self._channel.next_sequence
        first = next_sequence()
        frames = [_batch(_BATCH_BEGIN, first)]
        frames += [_frame(request, next_sequence(), nft.NLM_F_ACK) for request in requests]
        # The kernel takes everything back where the end is missing.
        if finish:
            frames.append(_batch(_BATCH_END, next_sequence()))
        failures: list[NftError] = []

        def take(buffer: memoryview, message: wire.Message) -> None:
            place = message.sequence - first - 1
            if message.kind != wire.NLMSG_ERROR or not -1 <= place < len(frames) - 1:
                return
            if code := wire.error_number(buffer, message):
                failures.append(NftError(code, place))

        self._talk(b"".join(frames), take)
        if failures:
            raise failures[0]

    def _request(self, request: Request, more: int) -> list[Message]:
        sequence = self._channel.next_sequence()
        return self._ask(_frame(request, sequence, more), sequence)

    def _ask(self, frame: bytes, sequence: int) -> list[Message]:
        found: list[Message] = []
        reader = DumpReader(
            sequence, lambda buffer, message: found.append(_message(buffer, message))
        )
        self._talk(frame, reader)
        if not reader.done:
            raise NftError(errno.EIO)
        if reader.interrupted:
            raise NftError(errno.EINTR)
        return found

    def _talk(self, frames: bytes, take: Take) -> None:
        try:
            self._channel.send(frames)
            while self._channel.receive(take):
                pass
        except CodecError:
            raise NftError(errno.EBADMSG) from None
        except OSError as error:
            raise NftError(error.errno or errno.EIO) from None


class EventSocket:
    """What changes in the tables of this namespace. Raises BackendDenied without privilege."""

    def __init__(self) -> None:
        groups = (_nfnetlink.NFNLGRP_NFTABLES,)
        self._channel = _open(groups, _EVENT_BUFFER, "watch nf_tables")

    def fileno(self) -> int:
        """The descriptor that becomes readable when there are events."""
        return self._channel.fileno()

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self._channel.close()

    def read(self) -> list[Message] | None:
        """Return the events that have arrived, or None where some were lost or broken."""
        found: list[Message] = []
        complete = waiting = True
        while waiting:
            try:
                waiting = self._channel.receive(
                    lambda buffer, message: found.append(_message(buffer, message))
                )
            except (BackendOverrun, CodecError):
                complete = False
        return found if complete else None


def failure(code: int, what: str) -> BackendError:
    """Say in our terms why the kernel refused something of nf_tables."""
    if code in (errno.EPERM, errno.EACCES):
        return BackendDenied(
            code,
            f"cannot {what}: CAP_NET_ADMIN is needed {WHERE}",
        )
    if code in (errno.EOPNOTSUPP, errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT):
        return BackendUnavailable(code, f"cannot {what}: this kernel has no nf_tables")
    return BackendError(code, f"cannot {what}: {os.strerror(code)}")
