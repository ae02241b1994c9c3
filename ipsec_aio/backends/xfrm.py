"""The xfrm backend: what this kernel's own tables say (NETLINK_XFRM, nf_tables, rtnetlink).

Rules:

* Events are subscribed to first, then the tables are read; events that come meanwhile are played
  on what was read. Between a loss and the end of the next reading every new token is UNKNOWN.
* Lost events, bytes that cannot be decoded and what an event does not tell whole (MIGRATE) have
  one cure: fresh sockets, everything read again, tried until it succeeds.
* It reads and never changes SAs and policies. It needs CAP_NET_ADMIN for as long as it is open.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import select
import socket
import threading
from contextlib import ExitStack, closing, contextmanager
from contextvars import Context
from typing import TYPE_CHECKING, cast

from ipsec_aio.errors import BackendOverrun, BackendUnavailable
from ipsec_aio.events import SAAdded, SADeleted, SAExpired, SAMigrated
from ipsec_aio.kernel.links import Links
from ipsec_aio.kernel.netlink import (
    SocketFactory,
    XfrmDumps,
    XfrmEvents,
    XfrmRequests,
)
from ipsec_aio.kernel.sockopts import netns_cookie
from ipsec_aio.kernel.stamp import Stamp, StampMode, open_stamp
from ipsec_aio.kernel.stamp_marks import MarkUsers, mark_users
from ipsec_aio.log import logger
from ipsec_aio.wire import xfrm

from .contract import Registration
from .tables import TableBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from ipsec_aio.events import Event
    from ipsec_aio.kernel.stamp import Coverage
    from ipsec_aio.sa import SA, SAKey

__all__ = ["XfrmBackend"]

_OPEN_TRIES = 5
_FIRST_DELAY = 0.02
_LONGEST_DELAY = 5.0
_LOG_INTERVAL = 60.0


class XfrmBackend(TableBackend):
    """Facts from the network namespace of the thread that calls :meth:`start`.

    ``stamp`` is ``"use"``, ``"install"``, ``"require"`` or ``"off"``. With ``trust_policy`` an
    answer by policy counts as protected. ``socket_factory`` stands in for ``socket.socket`` in
    tests. It belongs to the loop that started it.
    """

    name = "xfrm"

    def __init__(
        self,
        *,
        stamp: str = "use",
        trust_policy: bool = False,
        socket_factory: SocketFactory = socket.socket,
    ) -> None:
        super().__init__(trust_policy=trust_policy)
        self.resolver.is_own = self._is_own
        self.resolver.stamp_stands = self._stamp_stands
        self._factory = socket_factory
        self._loading = False
        self._lost = False
        self._mode: StampMode = cast("StampMode", stamp)
        self._stamp = Stamp()
        self._sockets: _Sockets | None = None
        # Readable as soon as any source of facts is: one system call asks for all of them.
        self._poll: select.epoll | None = None
        self._cookie: int | None = None
        self._recovery: asyncio.Task[None] | None = None
        self._marks: object = None
        self._marks_matter = False
        self._link_changes: int = 0
        self._link_losses: int = 0
        self._quiet_until = 0.0

    async def start(self) -> None:
        """Open everything and read the tables.

        Raises BackendDenied without CAP_NET_ADMIN (the message says how to get it),
        BackendUnavailable on a kernel without XFRM or when started before, BackendOverrun where
        the tables change faster than they can be read, and what the stamp's mode demands.
        """
        if self.loop is not None or self.closed:
            raise BackendUnavailable(errno.EINVAL, "a backend is started once")
        self.bind_loop()
        self._poll = select.epoll()
        try:
            asyncio.get_running_loop().add_reader(self._poll.fileno(), self._hear)
            await self._load_repeatedly(_OPEN_TRIES)
            self._check_namespace()
            self._stamp = await open_stamp(
                self._mode, marks=self._mark_users, on_change=self._stamp_changed
            )
            for descriptor in self._stamp.filenos():
                self._poll.register(descriptor, select.EPOLLIN)
            self._stamp_changed()
        except BaseException:
            await self.aclose()
            raise

    # The contract

    @property
    def netns_cookie(self) -> int | None:
        """SO_NETNS_COOKIE of the namespace; None before Linux 5.14, or before :meth:`start`."""
        return self._cookie

    @property
    def drops_fragments(self) -> bool:
        """Whether the stamp's table does so at this moment."""
        return self._stamp.generation > 0 and not self._stamp.keeps_fragments

    def drain(self) -> None:
        """Take in the events that have arrived. Never blocks; lost events raise nothing.

        Does nothing when closed, before :meth:`start`, or in another thread than the loop's.
        """
        if self.closed or self.resolver.stale or self._thread != threading.get_ident():
            return
        # A look-up for one SA may have read what others do with marks.
        if self._marks_matter or (self._poll is not None and self._poll.poll(0, 1)):
            with self._lock:
                Context().run(self._take_in)
        super().drain()

    def check(self) -> None:
        """Raise BackendUnavailable when not started, closed, forked, or in another thread."""
        super().check()
        if self.loop is None:
            raise BackendUnavailable(errno.EINVAL, "the xfrm backend was not started")

    async def register(self, protocol: int, port: int) -> Registration:
        """Have the stamp cover a local port."""
        self.check_loop()
        return _Registration(self, self._stamp, self._stamp.cover(protocol, port))

    def lookup_missing(self, key: SAKey) -> bool:
        """Ask the kernel for one SA at once; afterwards the mirror knows all of this moment.

        The kernel answers under the lock under which SAs are changed and told of. So whatever was
        done before the answer is waiting in the event queue by now.
        """
        sockets = self._sockets
        if sockets is None:
            return False
        try:
            sa = sockets.requests.sa(key)
            if sa is not None:
                self.mirror.apply(SAAdded(sa), self.clock())
            sockets.events.drain()
        except (OSError, ValueError) as error:
            # At once, for what else is judged in this wake-up.
            self.mirror.begin_resync(self.clock())
            sockets.loop.call_soon(self._lose, sockets, error, context=Context())
            return False
        return True

    async def aclose(self) -> None:
        """Release everything. Idempotent. Raises BackendUnavailable on another running loop."""
        if self.closed:
            return
        if self.resolver.stale:
            # After a fork loop, stamp and kernel state are the parent's, and the lock may be held
            # by a thread that is not here: only descriptors are ours.
            self.closed = True
            self._close_sockets()
            self._close_poll()
            return
        if self.loop is not None and not self.loop.is_closed():
            self.check_loop()
            if self._recovery is not None:
                self._recovery.cancel()
                await asyncio.wait([self._recovery])
        self._stamp.close()
        with self._lock:
            self._close_sockets()
        self._close_poll()
        await super().aclose()

    # Events

    def _hear(self) -> None:
        """Some source of facts is readable."""
        self.drain()
        self.tell()

    def _take_in(self) -> None:
        self._stamp.refresh()
        sockets = self._sockets
        if sockets is not None:
            try:
                sockets.links.drain()
                sockets.events.drain()
            except (OSError, ValueError) as error:
                self._lose(sockets, error)
            self._look_at_links()
        if self._marks_matter:
            self._look_at_marks()

    def _take_event(self, event: Event) -> None:
        self._marks_matter = True
        if isinstance(event, SAExpired) and not event.hard:
            return  # it works on, and the message does not describe it whole
        if isinstance(event, SAAdded) and event.updated:
            self._look_again(event.sa)
            return
        self.mirror.apply(event, self.clock())
        if isinstance(event, SAMigrated):
            raise BackendOverrun(errno.ESTALE, "SAs migrated to other addresses")

    def _take_record(self, event: Event) -> None:
        # Each at its own time: an SA that comes while very many are read is no older than that.
        self.mirror.load(event, self.clock())

    def _look_again(self, told: SA) -> None:
        """Take in what an update really made of an SA; it may have moved to another ``if_id``."""
        sockets = self._sockets
        sa = None if sockets is None else sockets.requests.sa(told.key)
        if sa is None:
            return  # deleted since; that event is on its way
        now = self.clock()
        for record in list(self.mirror.sad.numbered(sa.spi)):
            if record.sa.key[:4] == sa.key[:4] and record.sa.if_id != sa.if_id:
                self.mirror.apply(SADeleted(record.sa.key), now)
        self.mirror.apply(SAAdded(sa), now)

    def _look_at_links(self) -> None:
        sockets = self._sockets
        self.set_opaque_interfaces(sockets is None or sockets.links.opaque)
        if sockets is None:
            return
        changes, losses = sockets.links.changes, sockets.links.losses
        if losses != self._link_losses:
            self.resolver.links_until = self.mirror.count_change()
        if (changes, losses) != (self._link_changes, self._link_losses):
            self._marks_matter = True
            self.mirror.bump()
        self._link_changes, self._link_losses = changes, losses

    def _look_at_marks(self) -> None:
        """Tell the stamp where others began or ceased to use marks."""
        self._marks_matter = False
        # Whose addresses are ours says which SAs are inbound.
        marks = self.mirror.marks, self._link_changes
        if marks != self._marks:
            self._marks = marks
            self._stamp.marks_changed()

    # Reading everything

    def _lose(self, sockets: _Sockets, error: Exception) -> None:
        """Stop believing the mirror, and read everything again."""
        if sockets is not self._sockets:
            return  # lost before
        self._complain(error)
        if self._loading:
            self._lost = True
            return
        self._doubt_everything()
        self._recovery = sockets.loop.create_task(self._recover())

    async def _recover(self) -> None:
        await self._load_repeatedly(None)
        logger.info("IPsec tables were read again")

    async def _load_repeatedly(self, tries: int | None) -> None:
        """Read everything until it succeeds; with ``tries``, only losses are tried again."""
        self._loading = True
        try:
            delay = _FIRST_DELAY
            while True:
                try:
                    await self._load()
                    return
                except (OSError, ValueError) as error:
                    with self._lock:
                        self._close_sockets()
                    if tries is not None:
                        tries -= 1
                        if tries == 0 or not isinstance(error, BackendOverrun):
                            raise
                    self._complain(error)
                await asyncio.sleep(delay)
                delay = min(delay * 2, _LONGEST_DELAY)
        finally:
            self._loading = False

    async def _load(self) -> None:
        self._lost = False
        self._doubt_everything()
        self._check_namespace()
        assert self._poll is not None  # noqa: S101
        sockets = _Sockets(self._factory, self._take_event, self._poll)
        self._sockets = sockets
        with _collector_off(), closing(XfrmDumps(factory=self._factory)) as dumps:
            for build in (xfrm.dump_sas, xfrm.dump_policies):
                await dumps.read(build, self._take_record)
        self.mirror.load(sockets.requests.defaults(), self.clock())
        await sockets.links.load()
        with self._lock:
            sockets.events.drain()
            if self._lost or not self.mirror.finish_resync(self.clock()):
                raise BackendOverrun(errno.ENOBUFS, "events were lost while the tables were read")
            # Nobody told of what went meanwhile.
            self.resolver.links_until = self.mirror.changes
            self._look_at_links()
            self._look_at_marks()
            self.changed()

    def _doubt_everything(self) -> None:
        with self._lock:
            self._close_sockets()
            self.mirror.begin_resync(self.clock())
            self.changed()

    def _close_sockets(self) -> None:
        """Close them under the lock: who reads a token in another thread asks by them."""
        sockets, self._sockets = self._sockets, None
        if sockets is not None:
            sockets.close()

    def _close_poll(self) -> None:
        poll, self._poll = self._poll, None
        if poll is not None:
            if self.loop is not None and not (self.resolver.stale or self.loop.is_closed()):
                self.loop.remove_reader(poll.fileno())
            poll.close()

    def _check_namespace(self) -> None:
        cookie = _namespace()
        if self._cookie is None:
            self._cookie = cookie
        elif cookie != self._cookie:
            raise BackendUnavailable(
                errno.ENXIO, "this thread moved to another network namespace than the backend's"
            )

    def _complain(self, error: Exception) -> None:
        now = self.clock()
        if now >= self._quiet_until:
            self._quiet_until = now + _LOG_INTERVAL
            logger.warning(
                "IPsec tables are not certain, tokens are UNKNOWN until they are read again: %s",
                error,
            )

    # The stamp

    def _stamp_changed(self) -> None:
        with self._lock:
            self.set_generation(self._stamp.generation)
            # The ports may have changed under one generation.
            self.mirror.bump()
            self.changed()

    def _stamp_stands(self) -> bool:
        return self._stamp.stands()

    def _mark_users(self) -> MarkUsers:
        return mark_users(filter(self._may_be_inbound, self.mirror.sas()), self.mirror.spd)

    def _may_be_inbound(self, sa: SA) -> bool:
        """Leave out what goes elsewhere: before 6.10 kernels do not tell an SA's direction."""
        if not sa.mark.mask and sa.set_mark is None:
            return False  # of no interest: spare the question
        return self._is_own(sa.destination)

    def _is_own(self, address: bytes) -> bool:
        return self._sockets is None or self._sockets.links.is_local(address)


class _Sockets:
    """The sockets of one reading of the tables; a loss replaces them all."""

    def __init__(
        self,
        factory: SocketFactory,
        take: Callable[[Event], None],
        poll: select.epoll,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        with ExitStack() as opened:
            self.events = XfrmEvents(take, factory=factory)
            opened.callback(self.events.close)
            self.requests = XfrmRequests(factory=factory)
            opened.callback(self.requests.close)
            self.links = Links(factory=factory)
            opened.callback(self.links.close)
            for source in (self.events, self.links):
                poll.register(source.fileno(), select.EPOLLIN)
            self._opened = opened.pop_all()

    def close(self) -> None:
        self._opened.close()


class _Registration(Registration):
    """A port that the stamp covers, or would."""

    def __init__(self, backend: XfrmBackend, stamp: Stamp, coverage: Coverage) -> None:
        self._backend = backend
        self._stamp = stamp
        self._coverage = coverage

    @property
    def generation(self) -> int:
        """The stamp's generation, 0 while the port is not stamped or the backend is closed."""
        return 0 if self._backend.closed else self._coverage.generation

    @property
    def reads_marks(self) -> bool:
        """Always: SAs set marks, and policies look at them, without any stamp."""
        return True

    @property
    def keeps_fragments(self) -> bool:
        """Whether decrypted inner fragments reach reassembly."""
        return self._stamp.keeps_fragments

    def refresh(self) -> None:
        """Read the sysctl, of whose changes nobody tells."""
        self._stamp.tcp_ready()

    def close(self) -> None:
        """Give the port back. Idempotent."""
        self._coverage.close()


@contextmanager
def _collector_off() -> Generator[None]:
    """Look for no garbage in cycles, where Python does: there is none among very many records, and
    each search would look at all of them again.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        # What is young is old at once: else it would be looked at three times on the way there.
        if not gc.get_freeze_count():
            gc.freeze()
            gc.unfreeze()
        gc.enable()


def _namespace() -> int | None:
    """Return the cookie of the calling thread's network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        return netns_cookie(probe)
