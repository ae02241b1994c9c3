"""Policy routing that looks at marks: where there is any, TCP cannot be stamped.

An accepted connection keeps its handshake's mark, the SPI, and its replies are routed with it: a
rule that was made for somebody else's marks takes them for its own, as chance has it. Datagrams'
sockets keep no mark.
"""

from __future__ import annotations

import errno
import os
import socket

from ..errors import BackendOverrun, BackendUnavailable, CodecError
from ..wire import rtnetlink
from ..wire.netlink import Message
from .netlink import DumpReader, NetlinkSocket, SocketFactory

__all__ = ["MarkRouting"]

_SHOWN = 3
_NO_RULES = frozenset({errno.EOPNOTSUPP, errno.EAFNOSUPPORT})


class MarkRouting:
    """The rules of the network namespace in which this was built; their changes are told.

    Needs no privilege. Raises BackendUnavailable where there is no rtnetlink.
    """

    def __init__(self, *, factory: SocketFactory = socket.socket) -> None:
        self._problem: str | None = None
        try:
            # Before the first reading: nothing is missed.
            self._events = NetlinkSocket(
                rtnetlink.NETLINK_ROUTE, rtnetlink.RULE_GROUPS, factory=factory
            )
            try:
                self._requests = NetlinkSocket(rtnetlink.NETLINK_ROUTE, factory=factory)
            except BaseException:
                self._events.close()
                raise
        except OSError as error:
            raise BackendUnavailable(
                error.errno, f"cannot watch policy routing: {error.strerror}"
            ) from None

    @property
    def problem(self) -> str:
        """Why TCP cannot be stamped, empty where it can; asked for again after a change only."""
        if self._problem is None:
            try:
                self._problem = _judge(self._read())
            except (OSError, CodecError) as error:
                reason = getattr(error, "strerror", None) or error
                return f"TCP cannot be stamped: the rules of routing cannot be read ({reason})"
        return self._problem

    def fileno(self) -> int:
        """Return the descriptor of the events, to be watched for reading."""
        return self._events.fileno()

    def drain(self) -> None:
        """Take in that something changed. Never blocks, never raises."""
        try:
            while self._events.receive(self._forget):
                pass
        except (OSError, CodecError):
            self._problem = None

    def close(self) -> None:
        """Close the sockets. Idempotent."""
        self._events.close()
        self._requests.close()

    def _forget(self, buffer: memoryview, message: Message) -> None:
        del buffer, message
        self._problem = None

    def _read(self) -> list[rtnetlink.MarkRule]:
        found: list[rtnetlink.MarkRule] = []

        def take(buffer: memoryview, message: Message) -> None:
            rule = rtnetlink.decode_mark_rule(buffer, message)
            if rule is not None:
                found.append(rule)

        reader = DumpReader(self._requests.next_sequence(), take)
        try:
            self._requests.send(rtnetlink.dump_rules(reader.sequence))
            while not reader.done and self._requests.receive(reader):
                pass
        except OSError as error:
            if error.errno in _NO_RULES:
                return []
            raise
        if not reader.done or reader.interrupted:
            raise BackendOverrun(errno.EINTR, os.strerror(errno.EINTR))
        return found


def _judge(rules: list[rtnetlink.MarkRule]) -> str:
    if not rules:
        return ""
    more = f" and {len(rules) - _SHOWN} more" if len(rules) > _SHOWN else ""
    listed = ", ".join(map(str, rules[:_SHOWN])) + more
    return (
        f"TCP cannot be stamped where routing looks at marks ({listed}): accepted connections "
        "would carry SPIs into it; delete what looks at them, or serve TCP by policies of its own "
        "(stamp='use' and enforce=)"
    )
