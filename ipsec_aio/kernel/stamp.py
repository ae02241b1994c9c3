"""The stamp as a backend uses it: taken or installed, verified, watched, restored, removed.

Rules:

* ``generation`` is not 0 only while everything that the stamp's truth depends on was read back and
  found right: table, chains, rules, set; no later writer of the mark; nobody else who needs marks.
* Whatever is lost, for however short a time, costs the generation: when the stamp stands again it
  has another number. Loss is learnt from nf_tables' own events, read in :meth:`Stamp.refresh`.
* A stamp on TCP is also a mark on connections: there is none where routing or outbound policies
  look at marks. Rules of routing are told of; policies are looked at when a TCP port is covered.
* What we did not make we do not repair: a table that the command line put there, or another
  process owns, is used as it is. Ports that we added are taken out again, no others.
* Everything is of the network namespace of the thread that called :func:`open_stamp`.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections import Counter
from collections.abc import Callable, Set
from contextlib import suppress
from dataclasses import replace
from enum import IntEnum
from typing import Literal, TypeAlias

from ipsec_aio.errors import BackendError, BackendUnavailable, CodecError

from . import stamp_table
from .nfnetlink import EventSocket, Message, NftError, NftSocket, nft, number
from .sockopts import receive_marks
from .stamp_foreign import ForeignTable, is_late, own_table
from .stamp_marks import MarkUsers
from .stamp_routing import MarkRouting
from .stamp_sysctl import FwmarkAccept
from .stamp_table import PROTOCOLS, Port, TableState

__all__ = ["Coverage", "KernelStamp", "MarkUsers", "Stamp", "StampMode", "open_stamp"]

StampMode: TypeAlias = Literal["use", "install", "require", "off"]
_TCP, _UDP = PROTOCOLS["tcp"], PROTOCOLS["udp"]
_RETRY_SECONDS = 3.0


class _Change(IntEnum):
    """What an event means for the stamp."""

    NOTHING = 0
    LOOK = 1
    LOST = 2


class Coverage:
    """One use of one port. Made by :meth:`Stamp.cover`."""

    __slots__ = ("_closed", "_stamp", "port")

    def __init__(self, stamp: Stamp, port: Port | None) -> None:
        self._stamp = stamp
        self._closed = False
        self.port = port

    @property
    def generation(self) -> int:
        """The stamp's generation while the port is stamped, else 0.

        When the number changes, what is in the socket's receive or accept queue came before or
        in the gap: it proves nothing until the queue was seen empty once.
        """
        return 0 if self._closed else self._stamp.generation_of(self.port)

    def close(self) -> None:
        """End this use; the last one takes the port out, where we put it in. Idempotent."""
        if not self._closed:
            self._closed = True
            self._stamp.uncover(self.port)


class Stamp:
    """No stamp: what a backend has with mode ``"off"``, or where there can be none."""

    def __init__(self, problem: str = "the stamp is off") -> None:
        self._problem = problem

    @property
    def generation(self) -> int:
        """0 while not verified, else a number that no earlier verification had."""
        return 0

    @property
    def problem(self) -> str:
        """Why the generation is 0; else empty."""
        return self._problem

    @property
    def keeps_fragments(self) -> bool:
        """Whether decrypted fragments reach reassembly."""
        return True

    def cover(self, protocol: int, port: int) -> Coverage:
        """Have a local port stamped, from now on or as soon as there is a stamp.

        ``protocol`` is IPPROTO_TCP or IPPROTO_UDP. In the modes ``"install"`` and ``"require"``
        raises BackendDenied, BackendUnavailable or BackendError where that cannot be done;
        otherwise the coverage's generation is 0.
        """
        del protocol, port
        return Coverage(self, None)

    def uncover(self, port: Port | None) -> None:
        """End one use of a port (:meth:`Coverage.close` calls it)."""

    def generation_of(self, port: Port | None) -> int:
        """Return the generation of one port's stamp (:attr:`Coverage.generation` asks for it)."""
        del port
        return 0

    def refresh(self) -> None:
        """Take in what changed in the kernel. Synchronous, short; never raises.

        Call it after receiving and before evidence is judged. It may call ``on_change``.
        """

    def stands(self) -> bool:
        """Say whether no change of the rules is under way that :meth:`refresh` has not seen.

        One request to the kernel. Packets pass under new rules before their event is sent. It may
        have ``on_change`` called once that has come.
        """
        return True

    def filenos(self) -> tuple[int, ...]:
        """The descriptors of which one is readable while :meth:`refresh` has news to take in."""
        return ()

    def marks_changed(self) -> None:
        """Ask for :class:`MarkUsers` again: the backend's SAs or policies changed."""

    def tcp_ready(self) -> bool:
        """Say whether accepted connections carry their handshake's mark now (about 1 µs).

        Nothing tells when that changes: ask after accepting. It may call ``on_change``.
        """
        return False

    def close(self) -> None:
        """Take away what we put in place, and nothing else. Idempotent; never raises."""


class KernelStamp(Stamp):
    """A stamp on nf_tables. Made by :func:`open_stamp`."""

    def __init__(
        self,
        mode: StampMode,
        marks: Callable[[], MarkUsers],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        super().__init__("the stamp was not looked at yet")
        self._mode = mode
        self._marks = marks
        self._loop = loop
        self._on_change: Callable[[], None] = lambda: None
        self._generation = 0
        self._verified = 0
        self._found = MarkUsers()
        self._state = TableState()
        self._unread = False
        # The number of the last transaction of which the kernel has told, and whether it was
        # another one when somebody asked.
        self._transaction: int | None = None
        self._overtaken = False
        self._retry: asyncio.TimerHandle | None = None
        self._refusal: BackendError | None = None
        self._sysctl_refusal: BackendError | None = None
        self._owned = False
        self._covered: Counter[Port] = Counter()
        self._added: set[Port] = set()
        self._tcp_covered = 0
        self._tcp_ready = False
        self._closed = False
        self._process = os.getpid()
        self._netlink = NftSocket()
        try:
            self._events = EventSocket()
            try:
                self._routing = MarkRouting()
            except BaseException:
                self._events.close()
                raise
        except BaseException:
            self._netlink.close()
            raise
        self._sysctl = FwmarkAccept()

    def start(self, on_change: Callable[[], None]) -> None:
        """Take or install the stamp. Raises as the mode demands."""
        # Read first: of what comes between, the events tell.
        self._transaction = self._latest_transaction()
        self._verify(lost=False)
        if self._mode != "use" and self._problem:
            raise self._refusal or self._why(self._problem)
        self._on_change = on_change

    @property
    def generation(self) -> int:
        return self._generation

    @property
    def keeps_fragments(self) -> bool:
        return self._state.keeps_fragments

    def generation_of(self, port: Port | None) -> int:
        if port is None or port not in self._state.ports:
            return 0
        return self._generation if port.protocol != _TCP or self._tcp_ready else 0

    def cover(self, protocol: int, port: int) -> Coverage:
        if self._unusable:
            raise BackendUnavailable(errno.EBADF, "the stamp is closed")
        try:
            wanted = Port.checked(protocol, port)
        except ValueError as error:
            if self._mode == "use":
                return Coverage(self, None)
            raise BackendError(errno.EINVAL, str(error)) from None
        if self._mode != "use" and wanted.protocol == _UDP:
            _check_marks_are_told()
        before = self.generation_of(wanted)
        self._covered[wanted] += 1
        self._tcp_covered += wanted.protocol == _TCP
        coverage = Coverage(self, wanted)
        if wanted.protocol == _TCP:
            self.marks_changed()
        self.refresh()
        if self._problem:
            self._verify(lost=False)
        else:
            self._add_missing({wanted} - self._state.ports)
        if self._mode != "use" and not coverage.generation:
            refusal = self._refusal or self._why(
                self._problem or self._tcp_problem or "net.ipv4.tcp_fwmark_accept is 0: set it to 1"
            )
            if wanted in self._state.ports and self._sysctl_refusal is not None:
                refusal = self._sysctl_refusal
            coverage.close()
            raise refusal
        if coverage.generation != before:
            self._on_change()
        return coverage

    def stands(self) -> bool:
        if self._unusable:
            return False
        latest = self._latest_transaction()
        stands = latest is not None and latest == self._transaction
        self._overtaken = self._overtaken or not stands
        return stands

    def filenos(self) -> tuple[int, ...]:
        return self._events.fileno(), self._routing.fileno()

    def uncover(self, port: Port | None) -> None:
        if port is None or self._unusable:
            return
        self._tcp_covered -= port.protocol == _TCP
        self._covered[port] -= 1
        if self._covered[port]:
            return
        del self._covered[port]
        if port in self._added:
            self._added.discard(port)
            self._state = replace(self._state, ports=self._state.ports - {port})
            with suppress(BackendError):
                stamp_table.remove_ports(self._netlink, [port])

    def refresh(self) -> None:
        if self._unusable:
            return
        if change := self._news():
            self._verify(lost=change is _Change.LOST)
        if self._overtaken and self.stands():
            # What was answered meanwhile may be answered otherwise now.
            self._overtaken = False
            self._on_change()
        self._routing.drain()
        self._check_tcp()

    def marks_changed(self) -> None:
        if not self._unusable and self._marks() != self._found:
            self._verify(lost=False)
            self._check_tcp()

    def tcp_ready(self) -> bool:
        if self._unusable:
            return False
        self._check_tcp()
        return bool(self._generation) and self._tcp_ready

    def close(self) -> None:
        if self._closed:
            return
        if not self._unusable:
            self._withdraw()
        self._closed = True
        self._generation = 0
        self._problem = "the stamp is closed"
        if self._retry is not None:
            self._retry.cancel()
        self._sysctl.close()
        self._routing.close()
        self._events.close()
        self._netlink.close()

    @property
    def _unusable(self) -> bool:
        # After a fork the loop, the table and the sysctl are still the parent's business.
        return self._closed or os.getpid() != self._process

    def _withdraw(self) -> None:
        with suppress(BackendError):
            if self._owned:
                stamp_table.remove(self._netlink)
            elif present := self._added & stamp_table.read(self._netlink).ports:
                stamp_table.remove_ports(self._netlink, present)
        self._sysctl.restore()

    def _news(self) -> _Change:
        try:
            events = self._events.read()
            if events is not None:
                for event in events:
                    if event.kind == nft.NFT_MSG_NEWGEN:
                        self._transaction = number(event.attributes.get("NFTA_GEN_ID"))
                least = _Change.LOOK if events and self._unread else _Change.NOTHING
                return max(least, *map(self._weigh, events), _Change.NOTHING)
        except (CodecError, OSError):
            pass
        self._transaction = self._latest_transaction()
        return _Change.LOST

    def _latest_transaction(self) -> int | None:
        """Ask for its number; None where nobody answers."""
        try:
            return self._netlink.generation_id()
        except NftError:
            return None

    def _weigh(self, event: Message) -> _Change:
        if event.portid == self._netlink.portid or event.kind == nft.NFT_MSG_NEWGEN:
            return _Change.NOTHING
        if own_table(event):
            if event.kind == nft.NFT_MSG_NEWSETELEM:
                return _Change.LOOK
            if event.kind == nft.NFT_MSG_DELSETELEM:
                gone = stamp_table.ports_of(event)
                return _Change.LOOK if gone.isdisjoint(self._covered) else _Change.LOST
            return _Change.LOST
        if event.kind == nft.NFT_MSG_NEWCHAIN and is_late(event):
            return _Change.LOST
        table = ForeignTable(event.family, event.table)
        elements = event.kind in (nft.NFT_MSG_NEWSETELEM, nft.NFT_MSG_DELSETELEM)
        return _Change.LOST if table in self._state.late and not elements else _Change.NOTHING

    def _verify(self, *, lost: bool) -> None:
        """Read everything back, restore what is ours, and settle the generation."""
        before = self._generation, self._covered.keys() & self._state.ports
        self._refusal = None
        self._look()
        lost = lost or not before[1] <= self._state.ports
        if self._mode == "install":
            self._restore()
        if not self._problem:
            self._add_missing(self._covered.keys() - self._state.ports)
        if self._problem:
            self._generation = 0
        elif lost or not self._generation:
            self._verified += 1
            self._generation = self._verified
        if before != (self._generation, self._covered.keys() & self._state.ports):
            self._on_change()

    def _look(self) -> None:
        self._found = self._marks()
        handle = self._state.handle
        try:
            self._state = stamp_table.read(self._netlink)
            self._unread = False
        except BackendError as error:
            self._state = TableState(handle=handle)
            self._unread = True
            self._refusal = error
            self._problem = error.strerror or str(error)
            self._look_again()
            return
        self._problem = self._found.problem or self._state.problem
        self._added &= self._state.ports if self._state.handle == handle else set()

    def _look_again(self) -> None:
        """Arrange for another look: what kept us from reading may pass without an event."""
        if self._retry is None:
            self._retry = self._loop.call_later(_RETRY_SECONDS, self._retried)

    def _retried(self) -> None:
        self._retry = None
        if self._unread and not self._unusable:
            self._verify(lost=True)

    def _restore(self) -> None:
        try:
            if self._found.problem:
                if self._owned:
                    stamp_table.remove(self._netlink)
                    self._owned = False
                    self._look()
            elif not (self._state.installed or self._state.late_writers or self._refusal):
                stamp_table.install(self._netlink, self._covered, owned=True)
                self._owned = True
                self._look()
                self._added |= self._covered.keys() & self._state.ports
        except BackendError as error:
            self._look()
            self._refusal = error if self._problem else None

    def _add_missing(self, missing: Set[Port]) -> None:
        if not missing:
            return
        try:
            stamp_table.add_ports(self._netlink, missing)
        except BackendError as error:
            self._refusal = error
        else:
            self._added |= missing
            self._state = replace(self._state, ports=self._state.ports | missing)

    @property
    def _tcp_problem(self) -> str:
        return self._found.tcp_problem or self._routing.problem

    def _check_tcp(self) -> None:
        if not self._tcp_covered:
            return
        allowed = not self._tcp_problem
        ready = allowed and self._sysctl.enabled
        if ready and self._tcp_ready:
            return
        before, lost = self._generation, self._tcp_ready
        self._sysctl_refusal = None
        if not allowed:
            self._sysctl.restore()
        elif not ready and self._mode == "install" and self._generation:
            try:
                self._sysctl.enable()
            except BackendError as error:
                self._sysctl_refusal = error
        self._tcp_ready = allowed and self._sysctl.enabled
        if lost and before:
            self._verified += 1
            self._generation = self._verified
        if lost or self._tcp_ready:
            self._on_change()

    def _why(self, problem: str) -> BackendError:
        if problem == TableState().problem:
            return BackendUnavailable(errno.ENOENT, problem)
        return BackendError(errno.EINVAL, problem)


def _check_marks_are_told() -> None:
    """Raise BackendUnavailable where the kernel tells no datagram's mark to this process."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        if not receive_marks(probe):
            raise BackendUnavailable(
                errno.EOPNOTSUPP,
                "this kernel does not tell datagrams' marks (SO_RCVMARK): it takes Linux 5.19, "
                "and on some kernels up to 6.3 CAP_NET_ADMIN or CAP_NET_RAW",
            )


async def open_stamp(
    mode: StampMode,
    *,
    marks: Callable[[], MarkUsers] = MarkUsers,
    on_change: Callable[[], None] = lambda: None,
) -> Stamp:
    """Open the stamp of this thread's network namespace.

    Who opens it watches :meth:`Stamp.filenos`; the running loop has its timers.

    ``mode``: ``"use"`` takes it where it is installed, and notices when it comes later;
    ``"install"`` installs it where absent, so that it goes with this process; ``"require"`` fails
    without it; ``"off"`` has none. ``marks()`` tells who else uses marks, whenever that matters.
    ``on_change()`` is called after a :attr:`Coverage.generation` changed that was asked for before:
    from :meth:`Stamp.refresh`, :meth:`Stamp.cover` and :meth:`Stamp.marks_changed`, or by the loop.

    Raises ValueError for another mode, BackendDenied without CAP_NET_ADMIN, and, where the mode
    demands a stamp, BackendUnavailable (no stamp, or a kernel without its parts) or BackendError
    (what is there is not to be trusted, or marks belong to someone else).
    """
    if mode == "off":
        return Stamp()
    if mode not in ("use", "install", "require"):
        raise ValueError(f"stamp={mode!r}: it is use, install, require or off")
    try:
        stamp = KernelStamp(mode, marks, asyncio.get_running_loop())
    except BackendUnavailable as error:
        if mode == "use":
            return Stamp(error.strerror or str(error))
        raise
    try:
        stamp.start(on_change)
    except BaseException:
        stamp.close()
        raise
    return stamp
