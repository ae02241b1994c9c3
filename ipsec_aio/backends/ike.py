"""A table of charon's IKE SAs that keeps itself true.

Rules:

* Events are registered for before anything is listed, and those that come meanwhile wait in the
  stream: nothing falls between.
* Whatever may have been missed or was not understood has everything listed again. Until then the
  table is not ``synced``: it still finds what it knew, and says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from contextvars import Context
from typing import TYPE_CHECKING, Final

from ipsec_aio.errors import BackendError, BackendUnavailable, CodecError
from ipsec_aio.ike import EVENTS, IKETable

from .vici import ViciConnected, ViciDisconnected, ViciEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import AbstractContextManager
    from types import TracebackType
    from typing import Self

    from ipsec_aio.ike import Negotiated

    from .vici import EventStream, ViciClient

__all__ = ["IKEWatcher"]

_log: Final = logging.getLogger("ipsec_aio.ike")
# The name of what look_again() puts into the stream of events: charon's have names.
_AGAIN: Final = ""


class IKEWatcher:
    """Keeps an IKETable true while it is entered.

    ::

        async with ViciClient() as charon, IKEWatcher(charon) as watcher:
            await watcher.synced()
            watcher.find(destination, proto, spi)

    ``changed()`` is called on the loop after each change of the table, and must not raise.
    ``clock()`` gives the table's time, monotonic seconds, and is called before anything that
    charon said is taken in. The table changes under ``lock`` where it is read in other threads.
    charon may come, go and be restarted; the client stays open until the
    watcher is closed.
    """

    def __init__(
        self,
        client: ViciClient,
        *,
        changed: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        lock: AbstractContextManager[object] | None = None,
        linger: float = 30.0,
    ) -> None:
        self.table = IKETable(linger=linger)
        self._client = client
        self._changed = changed
        self._clock = clock
        self._lock: AbstractContextManager[object] = (
            contextlib.nullcontext() if lock is None else lock
        )
        self._events: EventStream | None = None
        self._again: set[int] = set()
        self._everything = False
        self._settled = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def find(
        self, destination: bytes, proto: int, spi: int, *, inbound: bool = True
    ) -> tuple[Negotiated, ...]:
        """Return what :meth:`IKETable.find` does, by now."""
        now = self._clock()
        with self._lock:
            self.table.advance(now)
            return self.table.find(destination, proto, spi, inbound=inbound)

    async def synced(self) -> None:
        """Wait until the table is synced. The caller sets the deadline.

        Raises ViciError where charon does not know the events that it takes, BackendUnavailable
        where the watcher is closed.
        """
        while not self.table.synced:
            if self._task is None or self._task.done():
                if self._task is not None and not self._task.cancelled():
                    await self._task
                raise BackendUnavailable("the watcher is closed")
            self._settled.clear()
            await self._settled.wait()

    def look_again(self, *unique_ids: int) -> None:
        """Have IKE SAs listed again, or without any named, everything."""
        first = not self._again and not self._everything
        self._again.update(unique_ids)
        self._everything |= not unique_ids
        if first and self._events is not None:
            self._events.post(ViciEvent(_AGAIN, {}))

    async def aclose(self) -> None:
        """Stop listening. Idempotent. The table stays as it is, and is no longer synced."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), context=Context())
        self._task.add_done_callback(lambda _: self._settled.set())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def _run(self) -> None:
        try:
            async with self._client.events(*EVENTS) as events:
                self._events = events
                async for event in events:
                    if isinstance(event, ViciDisconnected):
                        with self._lock:
                            self.table.begin_resync()
                    elif isinstance(event, ViciEvent) and event.name == _AGAIN:
                        await self._look(events)
                    elif isinstance(event, ViciConnected):
                        await self._resync(events)
                    elif self.table.synced:
                        await self._take(event, events)
                    self._tell()
        finally:
            # Nobody listens any more, for whatever reason.
            self._events = None
            with self._lock:
                self.table.begin_resync()
            self._tell()

    def _tell(self) -> None:
        self._settled.set()
        if self._changed is not None:
            self._changed()

    async def _resync(self, events: EventStream) -> None:
        """List everything, again and again until that works or the events are cut off."""
        pause, longest = self._client.backoff
        connection = events.connection
        while True:
            self._again.clear()
            self._everything = False
            now = self._clock()
            with self._lock:
                self.table.begin_resync(now)
            try:
                async with contextlib.aclosing(self._client.stream("list-sas")) as sas:
                    async for message in sas:
                        self.table.load(message)
                if connection and connection == events.connection:
                    now = self._clock()
                    with self._lock:
                        again = self.table.finish_resync(now)
                    await self._list(again, now)
                return
            except (BackendError, CodecError) as error:
                _log.warning("charon's SAs cannot be listed: %s", error)
            if connection != events.connection:
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)

    async def _take(self, event: ViciEvent, events: EventStream) -> None:
        now = self._clock()
        try:
            with self._lock:
                again = self.table.apply(event.name, event.message, now)
            await self._list(again, now)
        except (BackendError, CodecError) as error:
            _log.warning("%s is not understood, or not followed: %s", event.name, error)
            await self._resync(events)

    async def _look(self, events: EventStream) -> None:
        """List again what was asked for meanwhile. Without charon all will be listed anyway."""
        again, everything = set(self._again), self._everything
        self._again.clear()
        self._everything = False
        if not self.table.synced:
            return
        if not everything:
            try:
                await self._list(again, self._clock())
                return
            except (BackendError, CodecError) as error:
                _log.warning("charon's SAs cannot be listed: %s", error)
        await self._resync(events)

    async def _list(self, unique_ids: Iterable[int], now: float) -> None:
        for unique_id in unique_ids:
            stream = self._client.stream("list-sas", {"ike-id": unique_id})
            async with contextlib.aclosing(stream) as sas:
                async for message in sas:
                    with self._lock:
                        self.table.refresh(message, now)
