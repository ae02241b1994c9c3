"""Sockets' own policies: what was set, as values, whether or not a kernel took it."""

from __future__ import annotations

import socket
import sys
from dataclasses import replace
from typing import Any

from stream_tools import RecordingBackend

from ipsec_aio.backends.tables import TableBackend
from ipsec_aio.enforcement import Bundle
from ipsec_aio.enums import Direction
from ipsec_aio.evidence import Evidence
from ipsec_aio.kernel import sockopts
from ipsec_aio.net import enforce, latching
from ipsec_aio.policy import Policy
from ipsec_aio.truth import fits
from ipsec_aio.wire import sockpolicy


def permitted() -> bool:
    """Whether this process may set policies here."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sockopts.clear_policies(sock)
        except OSError:
            return False
    return True


class _Value(bytes):
    policy: Policy


class Policies:
    """Stands between the package and the kernel, and notes what each socket was given.

    With ``real`` the kernel gets it, too. ``refuse`` is raised in its place, where that is set.
    """

    def __init__(self, monkeypatch: Any, *, real: bool) -> None:
        self._real = real
        self._set: dict[int | None, dict[Direction, Policy]] = {}
        self.refuse: OSError | None = None
        self.calls: list[str] = []
        for module in (enforce, latching):
            monkeypatch.setattr(module, "encode", self._encode)
            monkeypatch.setattr(module, "set_policy", self._take)
        monkeypatch.setattr(enforce, "clear_policies", self._clear)

    def on(self, sock: Any, direction: Direction = Direction.IN) -> Policy | None:
        """Return what a socket, a transport's, or a server's only one has."""
        if hasattr(sock, "get_extra_info"):
            sock = sock.get_extra_info("socket")
        elif hasattr(sock, "sockets"):
            (sock,) = sock.sockets
        return self._set.get(sockopts.socket_cookie(sock), {}).get(direction)

    def templates(self, sock: Any, direction: Direction = Direction.IN) -> Any:
        """Return its templates, None where it has no policy."""
        policy = self.on(sock, direction)
        return None if policy is None else policy.templates

    def _encode(self, policy: Policy) -> bytes:
        value = _Value(sockpolicy.encode(policy))
        value.policy = policy
        return value

    def _take(self, sock: Any, value: _Value) -> None:
        policy = value.policy
        self.calls.append(f"{policy.action.name} {policy.direction.name}".lower())
        if self.refuse is not None:
            raise self.refuse
        if self._real:
            sockopts.set_policy(sock, bytes(value))
        self._set.setdefault(sockopts.socket_cookie(sock), {})[policy.direction] = policy

    def _clear(self, sock: Any) -> None:
        self.calls.append("clear")
        if self.refuse is not None:
            raise self.refuse
        if self._real:
            sockopts.clear_policies(sock)
        self._set.pop(sockopts.socket_cookie(sock), None)


class KernelBackend(RecordingBackend):
    """Memory's tables, told of as if they were this namespace's, without a stamp."""

    templates = TableBackend.templates

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            self.cookie = sockopts.netns_cookie(sock)
        self.lose_stamp()

    def objection(self, evidence: Evidence, inbound: Bundle) -> str:
        """Answer for the stamp that the datagram or connection would have got."""
        spi = next((sa.spi for sa in self._sas.values() if fits(sa, evidence)), 0)
        mark = int.from_bytes(spi.to_bytes(4, "big"), sys.byteorder)
        return super().objection(replace(evidence, mark=mark), inbound)
