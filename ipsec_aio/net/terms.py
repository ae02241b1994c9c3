"""What connections have to meet, also after they were handed over: a requirement stands.

Rules:

* When a connection's token is replaced by one that does not meet the requirement, it is reset.
  Protocols of ours are told of the new token first, and ``connection_lost`` gets the
  ProtectionError: an end that nobody meant is not to pass for the end of what was said.
* Where it cannot be told for now, nothing is read until it can, for ``deadline`` seconds, and
  ``SETTLING`` more where what waits in the queue stands in the way; then it is reset. While the
  socket's own policy lets nothing in, since there is no SA, it takes as long as it takes.
* What cannot be told, and nothing is awaited, is reset at once: where neither the policies nor the
  socket's own demand protection any more, clear segments may come. So is what was known by the
  stamp alone, when that is lost.
* A latch has its own ends. While it is broken, or waits, they count alone; else what certainly does
  not meet the requirement is reset here, too.
* What the loop had taken in before it heard of the change is out of reach.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast
from weakref import ref

from .forward import end_with
from .latching import reset
from .listening import weakly

if TYPE_CHECKING:
    from collections.abc import Callable

    from ipsec_aio.latch import Latch
    from ipsec_aio.require import Require
    from ipsec_aio.tokens import PToken

    from .connection import Connection
    from .refusals import Refusals

__all__ = ["SETTLING", "Hold", "Terms"]

SETTLING = 1.01
"""Seconds until a connection was looked at again in whose queue something waited when policies
changed, or were read anew."""


class Terms:
    """What the connections of one server have to meet, or one outgoing connection.

    ``endpoint`` is whom refusals are logged for; None: the connection's transport.
    """

    __slots__ = ("_endpoint", "_refusals", "deadline", "latch", "loop", "require")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        require: Require | None,
        deadline: float,
        latch: Latch | None,
        refusals: Refusals,
        endpoint: object = None,
    ) -> None:
        self.loop = loop
        self.require = require
        self.deadline = deadline
        self.latch = latch
        self._refusals = refusals
        self._endpoint = endpoint

    def demanding(self, require: Require) -> Terms:
        """Return the same with one more requirement."""
        both = require if self.require is None else self.require & require
        return Terms(self.loop, both, self.deadline, self.latch, self._refusals, self._endpoint)

    def uphold(self, connection: Connection, token: PToken, *, final: bool) -> None:
        """See whether a connection may go on under a token. ``final``: no better one is awaited."""
        transport, require = connection.transport, self.require
        if require is None or transport is None or transport.is_closing():
            return
        answer = require.decide(token)
        guard = connection.guard
        if guard is not None:
            if answer is False and not guard.held:
                self._refuse(connection, transport, token)
        elif answer is True:
            if connection.hold is not None:
                connection.hold.release()
        elif answer is None and not final and self.deadline and connection.may_settle:
            if connection.hold is None:
                connection.note_quiet(transport)
                connection.hold = Hold(connection, transport)
            wait = self.deadline + (0.0 if token.pending else SETTLING)
            connection.hold.wait(self.loop, wait)
        else:
            self._refuse(connection, transport, token)

    def _refuse(self, connection: Connection, transport: Any, token: PToken) -> None:
        assert self.require is not None  # noqa: S101
        error = self.require.check(token)
        assert error is not None  # noqa: S101
        peer = transport.get_extra_info("peername")
        self._refusals.add(self._endpoint or transport, peer, error, self.loop.time())
        end_with(transport, connection, error)
        reset(transport)


class Hold:
    """A connection from which nothing is read, whatever its user wants, until it is released.

    ``resume`` is what does as the user wants then; None where reading is to stay paused.
    """

    __slots__ = ("__weakref__", "_connection", "_timer", "resume")

    def __init__(self, connection: Connection, raw: Any) -> None:
        self._connection = ref(connection)
        self._timer: asyncio.TimerHandle | None = None
        self.resume: Callable[[], None] | None = None
        if raw.is_reading():
            self.resume = weakly(connection.resume_reading)
        self._take(raw)

    def wait(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        """Look again after so many seconds, if that is not about to happen."""
        if self._timer is None:
            self._timer = loop.call_later(seconds, weakly(self._expire))

    def pause(self) -> None:
        """As the transport's ``pause_reading``."""
        self.resume = None

    def carry(self, old: Any, new: Any) -> None:
        """Another transport of the loop's carries the connection: hold that."""
        self._take(new)
        if old is not None:
            self._give(old)
            cast("Any", type(old)).resume_reading(old)

    def release(self) -> None:
        """Read again, if the user wants it."""
        self.close()
        connection = self._connection()
        if connection is not None:
            connection.hold = None
            self._give(connection.transport)
        if self.resume is not None:
            self.resume()

    def close(self) -> None:
        """The connection is gone. Idempotent."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def _expire(self) -> None:
        self._timer = None
        connection = self._connection()
        if connection is not None:
            # By what is known at this moment: the news may be on its way.
            connection.judge.drain()
            connection.review()
            if connection.hold is self:
                connection.uphold(final=not connection.is_silent)

    def _take(self, raw: Any) -> None:
        raw.pause_reading()
        if type(raw).__dictoffset__:
            raw.pause_reading = self.pause

    def _give(self, raw: Any) -> None:
        if type(raw).__dictoffset__:
            del raw.pause_reading
