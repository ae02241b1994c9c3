"""The kernel's SAs joined with charon's word on whose they are.

Rules:

* The kernel's events are taken in before anything that charon said: it reports an SA after the
  kernel has it, and what it said of an SPI before that is of another SA.
* charon may die and come back, and cannot be reached for a while: SAs whose identities are known
  keep them, others go without.
* After the kernel's tables were read again, everything that charon said is asked for again.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import aclosing, suppress
from contextvars import Context
from typing import TYPE_CHECKING, Final

from ipsec_aio.enums import Direction
from ipsec_aio.errors import BackendError, BackendUnavailable, CodecError
from ipsec_aio.events import SAAdded
from ipsec_aio.ike import decode_connection
from ipsec_aio.join import LISTED_SECONDS, Join
from ipsec_aio.proofs import Listed, Proofs, decode_certificate

from .ike import IKEWatcher
from .vici import DEFAULT_ADDRESS, ViciClient
from .xfrm import XfrmBackend

if TYPE_CHECKING:
    from collections.abc import Callable

    from ipsec_aio.errors import ProtectionError
    from ipsec_aio.events import Event
    from ipsec_aio.evidence import Evidence
    from ipsec_aio.flow import Flow
    from ipsec_aio.identities import Answer
    from ipsec_aio.ike import Connection
    from ipsec_aio.kernel.netlink import SocketFactory
    from ipsec_aio.latch import Outlook
    from ipsec_aio.sad import Record
    from ipsec_aio.tokens import PToken

__all__ = ["XfrmViciBackend"]

_log: Final = logging.getLogger("ipsec_aio.ike")
_START_SECONDS: Final = 10.0
# Identities wait for it: an answer that takes longer is none.
_PROOF_SECONDS: Final = 10.0
# How old what is known of charon's configuration may get before an IKE SA comes up under it.
_PROOF_INTERVAL: Final = 10.0


class XfrmViciBackend(XfrmBackend):
    """Facts from the kernel, identities from charon.

    ``vici`` is the address of its socket, ``unix:///path`` or a path; all else is
    :class:`XfrmBackend`'s.
    """

    name = "xfrm+vici"

    def __init__(
        self,
        *,
        vici: str | None = None,
        stamp: str = "use",
        trust_policy: bool = False,
        socket_factory: SocketFactory = socket.socket,
        client: ViciClient | None = None,
    ) -> None:
        super().__init__(stamp=stamp, trust_policy=trust_policy, socket_factory=socket_factory)
        self.client = ViciClient(vici or DEFAULT_ADDRESS) if client is None else client
        self.watcher = IKEWatcher(
            self.client, changed=self._told, clock=self._moment, lock=self._lock
        )
        self._proofs = Proofs(self.watcher.table)
        self._join = Join(self.mirror, self.watcher.table, self._proofs.ends)
        self._proving: asyncio.Task[None] | None = None
        self._unproved = asyncio.Event()
        self._heard = self.watcher.table.epoch
        self._listing: asyncio.TimerHandle | None = None
        self.resolver.identified = True

    async def start(self) -> None:
        """Open everything, and wait until charon has listed what it has.

        Raises what :meth:`XfrmBackend.start` raises, BackendUnavailable where no charon answers at
        the address, BackendDenied where its socket may not be opened.
        """
        if self.loop is None and not self.closed:
            try:
                await self.client.open()
            except BaseException:
                await self.aclose()
                raise
        await super().start()
        try:
            # Read beforehand, so that it is known of what comes from here on.
            await self._list_proofs()
            await self.watcher.__aenter__()
            async with asyncio.timeout(_START_SECONDS):
                await self.watcher.synced()
            await self._judge()
            self._proving = asyncio.create_task(self._prove(), context=Context())
        except TimeoutError as error:
            await self.aclose()
            raise BackendUnavailable(
                f"{self.client.address} did not list its SAs in {_START_SECONDS:g} s"
            ) from error
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Release everything. Idempotent. Raises BackendUnavailable on another running loop."""
        # On a closed loop there is nobody to tell; after a fork they are the parent's.
        gone = self.resolver.stale or (self.loop is not None and self.loop.is_closed())
        if not self.closed and not gone:
            if self.loop is not None:
                self.check_loop()
            if self._listing is not None:
                self._listing.cancel()
            if self._proving is not None:
                self._proving.cancel()
                await asyncio.wait([self._proving])
            await self.watcher.aclose()
            await self.client.aclose()
        await super().aclose()

    # Identities

    def identities_of(
        self, record: Record, now: float, direction: Direction = Direction.IN
    ) -> Answer:
        """Return who negotiated an SA, or until when charon may tell."""
        return self._join.identities_of(record, now, direction)

    def keyed_by_hand(self, record: Record, direction: Direction = Direction.IN) -> bool:
        """Whether an SA is certainly none of charon's."""
        return self._join.keyed_by_hand(record, direction)

    def _moment(self) -> float:
        """Take in what the kernel told before charon spoke, and return the time."""
        self.drain()
        return self.clock()

    def _told(self) -> None:
        """Take in that charon's table changed."""
        if self.closed or self.watcher.table.epoch == self._heard:
            return
        self._heard = self.watcher.table.epoch
        with self._lock:
            self.identities_changed()
        self._unproved.set()
        self._ask()

    def resolve(self, evidence: Evidence) -> PToken:
        """Return the token for this evidence."""
        token = super().resolve(evidence)
        self._ask()
        return token

    def outlook(self, evidence: Evidence) -> Outlook:
        """Return what may protect a connection from now on, by its addresses and ports."""
        outlook = super().outlook(evidence)
        self._ask()
        return outlook

    def sends_like(self, ptoken: PToken, flow: Flow) -> ProtectionError | None:
        """Return None where an outbound flow would be protected as a token says."""
        refusal = super().sends_like(ptoken, flow)
        self._ask()
        return refusal

    def _ask(self) -> None:
        """Have charon say again what may have been said of another SA, and what it did not say."""
        doubtful = self._join.doubtful
        if doubtful:
            again = tuple(doubtful)
            doubtful.clear()
            self.watcher.look_again(*again)
        if self._join.unlisted and self._listing is None:
            self._list_later(self._list_unlisted)

    def _list_later(self, listing: Callable[[], None]) -> None:
        if self._listing is not None:
            self._listing.cancel()
        if not self.closed:
            loop = asyncio.get_running_loop()
            self._listing = loop.call_later(LISTED_SECONDS + 0.01, listing)

    def _list_unlisted(self) -> None:
        self._listing = None
        if self._join.wants_listing():
            self.watcher.look_again()

    def _list_all(self) -> None:
        self._listing = None
        self._join.unlisted.clear()
        self.watcher.look_again()

    def _take_event(self, event: Event) -> None:
        super()._take_event(event)
        if isinstance(event, SAAdded):
            # Moved, or its number used again: what charon said before is not of this one.
            again = self._join.of_number(event.sa)
            if again:
                self.watcher.look_again(*again)

    async def _load(self) -> None:
        await super()._load()
        self.watcher.look_again()
        # Once more after a while, for those that are none of charon's.
        self._list_later(self._list_all)

    # Proofs

    async def _prove(self) -> None:
        """Judge IKE SAs as they come up, and know beforehand what connections there are."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_PROOF_INTERVAL):
                    await self._unproved.wait()
            if self._unproved.is_set():
                self._unproved.clear()
                await self._judge()
            elif self.watcher.table.synced:
                await self._list_proofs()

    async def _judge(self) -> None:
        """Judge IKE SAs until none is left that was not, or nothing can be listed for now."""
        while self._proofs.wants and await self._list_proofs():
            pass

    async def _list_proofs(self) -> bool:
        """List what proofs rest on, and judge by it. Returns whether that could be done."""
        began = self.clock()
        try:
            async with asyncio.timeout(_PROOF_SECONDS):
                connections = await self._connections()
                signing = any(r.kind == "public key" for c in connections for r in c.remote)
                certificates = await self._certificates() if signing else None
        except (BackendError, CodecError, TimeoutError) as error:
            _log.warning("charon's configuration cannot be listed: %s", error)
            self._proofs.failed()
            return False
        if self._proofs.listed(connections, certificates, began, self.clock()):
            with self._lock:
                self.identities_changed()
        return True

    async def _connections(self) -> list[Connection]:
        async with aclosing(self.client.stream("list-conns")) as messages:
            return [decode_connection(message) async for message in messages]

    async def _certificates(self) -> list[Listed]:
        async with aclosing(self.client.stream("list-certs")) as messages:
            listed = [decode_certificate(message) async for message in messages]
        return [each for each in listed if each is not None]
