"""Who enforces a requirement: the kernel, by a policy of the socket's own, or user space alone.

Rules:

* ``enforce="auto"`` is the kernel where it is possible and safe, else user space. ``"kernel"`` is
  the kernel, or an error that says why not. ``"user"`` asks the kernel for nothing. The check of
  each token in user space stays on always: a template says nothing of algorithms or identities.
* A policy is set before bind, listen or connect, and what is told of it as evidence
  (:attr:`Enforcement.template`) holds for all that was received since. Where the port is not known
  before bind, the socket is shut until it is; where the socket was bound before, nothing is told.
* It follows the policies of the SPD: at once, then at most once in ``REFRESH`` seconds. It is
  replaced in place, and kept where there are none any more. Where it cannot be right any more,
  ``"auto"`` first says "user" and then takes it away; ``"kernel"`` keeps it.
* Accepted connections inherit their listener's policy, and get one that is as narrow as the SPD
  is for their addresses.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple
from weakref import WeakSet, WeakValueDictionary

from ipsec_aio.enforcement import Plan, common, derive
from ipsec_aio.enums import Direction, PolicyAction
from ipsec_aio.errors import BackendDenied, BackendUnavailable
from ipsec_aio.evidence import IPPROTO_TCP, IPPROTO_UDP, NEVER
from ipsec_aio.flow import Selector
from ipsec_aio.kernel.sockopts import (
    clear_policies,
    is_v6only,
    netns_cookie,
    protocol_of,
    set_policy,
    socket_cookie,
)
from ipsec_aio.log import net_logger
from ipsec_aio.policy import Policy
from ipsec_aio.protection import TUNNELS
from ipsec_aio.require import Require
from ipsec_aio.wire.sockpolicy import encode

from .listening import run_soon, weakly

if TYPE_CHECKING:
    from ipsec_aio.backends.contract import Backend
    from ipsec_aio.enforcement import Bundle
    from ipsec_aio.evidence import Evidence
    from ipsec_aio.policy import Template

__all__ = [
    "KERNEL",
    "REFRESH",
    "UNSPECIFIED",
    "USER",
    "Enforcement",
    "Where",
    "check_options",
    "enforcement_for",
]

KERNEL: Final = "kernel"
USER: Final = "user"
_AUTO: Final = "auto"
REFRESH = 1.0
"""Seconds from one look at the SPD to the next, however often it changes."""

UNSPECIFIED = {socket.AF_INET: bytes(4), socket.AF_INET6: bytes(16)}
"""By address family: the address that stands for any."""
_NOWHERE = 255
"""An IP protocol that no traffic of a socket has."""
_ONE_WAY = "no single policy governs what the socket sends, and a template names one of them"


class Where(NamedTuple):
    """The traffic of a socket: its local end and, where it has one, its only peer.

    Addresses are packed; the unspecified one is any of its family.
    """

    local: bytes
    port: int
    peer: bytes = b""
    peer_port: int = 0


def check_options(require: Require | None, enforce: str, deadline: float) -> None:
    """Raise ValueError or TypeError for what these arguments of all endpoints cannot be."""
    if require is not None and not isinstance(require, Require):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"require must be a Require, not {require!r}")
    if enforce not in (KERNEL, USER, _AUTO):
        raise ValueError(f"enforce is 'kernel', 'user' or 'auto', not {enforce!r}")
    if enforce == KERNEL and require is None:
        raise ValueError("enforce='kernel' without require=: there is nothing to enforce")
    if isinstance(deadline, bool) or not isinstance(deadline, int | float):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"deadline is in seconds, not {deadline!r}")
    if not 0 <= deadline < float("inf"):
        raise ValueError(f"deadline is in seconds, 0 or more, not {deadline!r}")


def enforcement_for(
    loop: asyncio.AbstractEventLoop,
    backend: Backend,
    require: Require | None,
    enforce: str,
    *,
    stamped: Callable[[], bool] | None = None,
) -> Enforcement | None:
    """Return what may enforce a requirement for one socket; None where user space shall."""
    if require is None or enforce == USER:
        return None
    return Enforcement(loop, backend, require, enforce, stamped or _never)


class Enforcement:
    """A socket's own policies, for as long as the socket is open.

    :meth:`begin` sets them, or decides that user space does it. Nothing of it raises later on.
    """

    __slots__ = (
        "__weakref__",
        "_backend",
        "_both",
        "_cookie",
        "_following",
        "_keeper",
        "_kept",
        "_leaving",
        "_loop",
        "_plan",
        "_policies",
        "_require",
        "_shut",
        "_sock",
        "_stamped",
        "_where",
        "_wish",
        "changed",
        "reason",
        "template",
        "version",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        backend: Backend,
        require: Require,
        wish: str,
        stamped: Callable[[], bool],
    ) -> None:
        self._loop = loop
        self._backend = backend
        self._require = require
        self._wish = wish
        self._stamped = stamped
        self._sock: socket.socket | None = None
        self._cookie: int | None = None
        self._where = Where(b"", 0)
        self._plan: Plan | None = None
        self._policies = NEVER
        self._keeper: _Keeper | None = None
        self._shut = self._kept = self._both = False
        self._leaving = True
        self.template: Template | None = None
        """What all was protected by that was received; None where that is not sure."""
        self.reason = ""
        """Why user space enforces."""
        self.version = 0
        """Changes with what this object says."""
        self.changed: Callable[[], None] = _nothing
        """Called after that."""

    @property
    def place(self) -> str:
        """``"kernel"`` or ``"user"``: where the requirement is enforced at this moment."""
        return USER if self._plan is None else KERNEL

    @property
    def outbound(self) -> Bundle | None:
        """What the socket's own policy demands of all that leaves it; None where it has none."""
        return None if self._plan is None else self._plan.outbound

    def objection(self, evidence: Evidence, *, whole: bool = False) -> str:
        """Say why the SPD, in whose place the socket's policy stands, would not have let it in,
        or why the policy itself proves nothing. ``whole``: it was not put together from fragments.
        """
        template = evidence.enforced
        # A policy is asked of the whole, and content where the first fragment was decrypted.
        mixes = template is not None and template.mode in TUNNELS and not whole
        if mixes and not self._backend.drops_fragments:
            return "decrypted fragments may be put together with clear ones (a stamp drops them)"
        return "" if self._plan is None else self._backend.objection(evidence, self._plan.inbound)

    def shut(self, sock: socket.socket) -> None:
        """Let nothing in from now until :meth:`begin`: for a socket that is about to be bound."""
        if self._unfitness(sock, None):
            return
        try:
            set_policy(sock, _encode(sock, Direction.IN, (), PolicyAction.BLOCK))
        except OSError:
            return  # begin() finds out why
        self._shut = True

    def begin(
        self,
        sock: socket.socket,
        where: Where,
        *,
        early: bool,
        inbound_only: bool = False,
        both: bool = False,
    ) -> None:
        """Set the policies, or leave it to user space.

        ``both``: the kernel does it in both directions, or not at all.
        ``inbound_only``: until :meth:`connected` there is none for what leaves, since under one
        without an SA a datagram socket cannot be connected.
        ``early``: the socket is not bound, listening or connected yet. One that was shut before
        that counts as such. Under ``"kernel"`` raises BackendDenied without CAP_NET_ADMIN,
        BackendUnavailable for a backend or socket of another namespace, ValueError that says what
        stands in the way.
        """
        self._where = where
        self._both = both
        self._leaving = not inbound_only
        early = early or self._shut
        try:
            self._set_up(sock, early)
        except (OSError, ValueError) as error:
            if self._shut:
                self._shut = False
                clear_policies(sock)
            if self._wish == KERNEL:
                raise
            self.reason = str(error)
            net_logger.info("%r: a requirement is enforced in user space: %s", sock, error)

    def _set_up(self, sock: socket.socket, early: bool) -> None:
        error = self._unfitness(sock, self._where.local)
        if error is not None:
            raise error
        self._policies = self._backend.policies
        plan, _ = self._derive(sock)
        if isinstance(plan, Plan) and self._both and plan.outbound is None:
            plan = _ONE_WAY
        if isinstance(plan, str):
            raise ValueError(f"the kernel cannot enforce {self._require!r}: {plan}")
        try:
            self._apply(sock, plan)
        except PermissionError as error:
            raise BackendDenied(
                errno.EPERM,
                "a socket's own policy needs CAP_NET_ADMIN in its network namespace "
                "(setcap cap_net_admin+ep, or systemd's AmbientCapabilities=)",
            ) from error
        except OSError as error:
            clear_policies_quietly(sock)
            raise BackendUnavailable(
                error.errno or errno.ENOPROTOOPT, f"the kernel took no socket policy: {error}"
            ) from error
        self._plan = plan
        self.template = plan.template if early else None
        self._follow(sock)

    def connected(self) -> None:
        """Set the policy for what leaves, too, where there is one."""
        if not self._leaving:
            self._leaving = True
            self._policies = NEVER
            self.refresh()

    def inherit(self, sock: socket.socket, where: Where) -> Enforcement | None:
        """Return that of a connection that was accepted under this one; None without any."""
        plan = self._plan
        if plan is None:
            return None
        child = Enforcement(self._loop, self._backend, self._require, KERNEL, self._stamped)
        child._where = where
        child._plan = plan
        child.template = self.template
        child._follow(sock)
        child.refresh(sock)
        return child

    def handed_over(self, sock: socket.socket, where: Where) -> None:
        """Go on with the object by which a loop knows the same socket, which is connected now."""
        if self._sock is not None and socket_cookie(sock) == self._cookie:
            self._sock = sock
            self._where = where

    def close(self) -> None:
        """Follow the SPD no more: before the socket is closed, or gets other policies. Idempotent.

        The policies stay.
        """
        if self._keeper is not None:
            self._keeper.enforcements.discard(self)
            self._keeper = None
        self._sock = None

    def undo(self) -> None:
        """Take the policies away, and close: the socket goes back to its owner."""
        sock = self._sock
        self.close()
        if sock is not None:
            self._plan = self.template = None
            clear_policies_quietly(sock)

    def refresh(self, sock: socket.socket | None = None) -> None:
        """Have the policies be those that the SPD calls for at this moment."""
        sock = sock or self._sock
        old, state = self._plan, self._backend.policies
        if sock is None or old is None or state == self._policies:
            return
        # A descriptor may be another socket's by now.
        if socket_cookie(sock) != self._cookie:
            self.close()
            return
        self._policies = state
        plan, known = self._derive(sock)
        if not known.inbound:
            return
        if isinstance(plan, str):
            self._give_up(sock, plan)
            return
        if plan.outbound is None and not known.outbound and self._leaving:
            plan = replace(plan, outbound=old.outbound)
        if self._both and plan.outbound is None:
            self._give_up(sock, _ONE_WAY)
            return
        if plan == old:
            return
        template = self.template and common(self.template, plan.template)
        # Told before it is so, where it says less, and in force before it is told, where more.
        self.template = template
        try:
            self._apply(sock, plan)
        except (OSError, ValueError) as error:
            self._keep(f"it could not be replaced: {error}")
        else:
            self._plan = plan
        self._tell()

    def _give_up(self, sock: socket.socket, reason: str) -> None:
        if self._wish == KERNEL:
            self._keep(reason)
            return
        self.reason = reason
        self._plan = self.template = None
        self._tell()
        clear_policies_quietly(sock)
        self.close()

    def _keep(self, reason: str) -> None:
        if not self._kept:
            self._kept = True
            net_logger.warning("%r: its policy stays as it was: %s", self._sock, reason)

    def _tell(self) -> None:
        self.version += 1
        self.changed()

    def _follow(self, sock: socket.socket) -> None:
        self._sock = sock
        self._cookie = socket_cookie(sock)
        self._keeper = _Keeper.of(self._loop, self._backend)
        self._keeper.enforcements.add(self)

    def _unfitness(self, sock: socket.socket, local: bytes | None) -> Exception | None:
        """Why a policy on this socket would be wrong, whatever it says."""
        cookie = self._backend.netns_cookie
        if cookie is None:
            return BackendUnavailable(
                errno.EOPNOTSUPP, f"the {self._backend.name} backend tells of no kernel's policies"
            )
        if cookie != netns_cookie(sock):
            return BackendUnavailable(
                errno.ENXIO, "the socket is in another network namespace than the backend"
            )
        if sock.family not in UNSPECIFIED or protocol_of(sock) not in (IPPROTO_TCP, IPPROTO_UDP):
            return ValueError("the kernel enforces requirements on plain TCP and UDP sockets only")
        if (
            sock.family == socket.AF_INET6
            and local is not None
            and not (len(local) == 16 and any(local))
            and not is_v6only(sock)
        ):
            return ValueError(
                "an IPv6 socket's policy does not cover IPv4-mapped traffic: "
                "set IPV6_V6ONLY, and use another socket for IPv4"
            )
        return None

    def _derive(self, sock: socket.socket) -> tuple[Plan | str, _Known]:
        local, port, peer, peer_port = self._where
        protocol = protocol_of(sock)
        local = local or UNSPECIFIED[socket.AddressFamily(sock.family)]
        known = _Known(
            *(
                self._backend.templates(
                    protocol, port, direction, local=local, peer=peer, peer_port=peer_port
                )
                for direction in (Direction.IN, Direction.OUT)
            )
        )
        plan = derive(self._require.demands, known.inbound, known.outbound)
        if isinstance(plan, Plan) and plan.loose and not self._stamped():
            plan = (
                "the policies for this port name different SAs, and without the stamp nobody "
                "could tell whose a packet came by"
            )
        if isinstance(plan, Plan) and not self._leaving:
            plan = replace(plan, outbound=None)
        return plan, known

    def _apply(self, sock: socket.socket, plan: Plan) -> None:
        inbound = _encode(sock, Direction.IN, plan.inbound)
        outbound = None
        if plan.outbound is not None:
            outbound = _encode(sock, Direction.OUT, plan.outbound)
        elif self.outbound is not None:
            # One direction cannot be taken away alone: this one leaves all to the SPD.
            outbound = _encode(sock, Direction.OUT, (), proto=_NOWHERE)
        set_policy(sock, inbound)
        if outbound is not None:
            set_policy(sock, outbound)


class _Known(NamedTuple):
    inbound: tuple[Bundle, ...]
    outbound: tuple[Bundle, ...]


class _Keeper:
    """Has the enforcements of one backend on one loop follow its policies."""

    __slots__ = (
        "__weakref__",
        "_backend",
        "_due",
        "_last",
        "_loop",
        "_unsubscribe",
        "enforcements",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, backend: Backend) -> None:
        self._unsubscribe: Callable[[], None] = _nothing
        self._loop = loop
        self._backend = backend
        self._due = False
        self._last = float("-inf")
        self.enforcements: WeakSet[Enforcement] = WeakSet()
        self._unsubscribe = backend.subscribe(weakly(self._changed))

    def __del__(self) -> None:
        run_soon(self._loop, self._unsubscribe)

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop, backend: Backend) -> _Keeper:
        # Numbers are safe as keys: an entry keeps its loop and backend alive.
        keeper = _keepers.get((id(loop), id(backend)))
        if keeper is None:
            keeper = _keepers[id(loop), id(backend)] = cls(loop, backend)
        return keeper

    def _changed(self) -> None:
        if self._due:
            return
        wait = self._last + REFRESH - self._loop.time()
        if wait > 0:
            self._due = True
            self._loop.call_later(wait, weakly(self._refresh))
        else:
            self._refresh()

    def _refresh(self) -> None:
        self._due = False
        self._last = self._loop.time()
        for enforcement in list(self.enforcements):
            enforcement.refresh()


_keepers: WeakValueDictionary[tuple[int, int], _Keeper] = WeakValueDictionary()


def clear_policies_quietly(sock: socket.socket) -> None:
    """Take a socket's policies away; where that fails they stay, which refuses more, not less."""
    try:
        clear_policies(sock)
    except (OSError, ValueError) as error:
        net_logger.warning("%r: its policies could not be taken away: %s", sock, error)


def _encode(
    sock: socket.socket,
    direction: Direction,
    templates: Bundle,
    action: PolicyAction = PolicyAction.ALLOW,
    proto: int = 0,
) -> bytes:
    selector = Selector(family=sock.family, proto=proto)
    return encode(
        Policy(selector=selector, direction=direction, action=action, templates=templates)
    )


def _never() -> bool:
    return False


def _nothing() -> None: ...
