"""Latched connections: what follows a latch, and holds or ends its connection when it breaks.

Rules:

* A latch is made right before ``connection_made``, on what the connection's token rests on, and
  looked at again whenever the backend's epoch has moved.
* The kernel holds it where it can: a policy of the socket, both ways, with the channel's reqid and
  addresses. Then what another SA carries is dropped there, and clear segments are, with or without
  the stamp. While the latch is broken and the connection pauses, nothing passes at all.
* Else it is held in user space: a conflict is noticed by the tables' events, and acted upon. What
  the loop or the kernel had taken before that is out of reach.
* Before what was read is delivered, the backend's events are taken in, and what they break is
  held: so nothing is delivered that came after a conflict of which the kernel has told. Where the
  kernel does not hold it and something came while it was broken, by anything but the loss of its
  SAs, it is not restored but reset.
* A connection that is held reads nothing, and keeps what is written in memory. Its protocol is
  told to pause writing; a close is then an abort.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any
from weakref import proxy

from ipsec_aio.enums import Assurance, Direction, PolicyAction
from ipsec_aio.errors import BackendError, ProtectionError
from ipsec_aio.flow import Mark, Selector
from ipsec_aio.kernel.sockopts import set_policy, socket_cookie
from ipsec_aio.latch import (
    ConnectionLatch,
    Latch,
    LatchReason,
    LatchState,
    LatchStatus,
    ListenerLatch,
    Outlook,
)
from ipsec_aio.log import net_logger
from ipsec_aio.policy import Policy
from ipsec_aio.wire.sockpolicy import encode

if TYPE_CHECKING:
    from ipsec_aio.tokens import PToken

    from .connection import Connection, Judge

__all__ = ["Guard", "guard_for", "may_be_latched", "reset"]

_RESET = struct.pack("ii", 1, 0)
_AF_INET, _AF_INET6 = int(socket.AF_INET), int(socket.AF_INET6)


def reset(transport: asyncio.BaseTransport) -> None:
    """Abort a connection with a reset."""
    sock = transport.get_extra_info("socket")
    with contextlib.suppress(OSError, ValueError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    transport.abort()  # type: ignore[attr-defined]


def may_be_latched(token: PToken) -> bool:
    """Whether a token tells of protection that a latch can hold a connection to."""
    return token.assurance >= Assurance.POLICY and token.integrity_protected is True


def guard_for(
    connection: Connection,
    judge: Judge,
    token: PToken,
    options: Latch,
    listener: ListenerLatch | None,
    sock: socket.socket | None,
) -> Guard | ProtectionError:
    """Latch a connection that is about to be handed over, or say why not."""
    if not may_be_latched(token):
        found = f"this is {token.assurance.name} ({token.information_string})"
        return ProtectionError("latch", f"there is nothing to latch: {found}")
    try:
        outlook = judge.backend.outlook(connection.evidence)
    except BackendError as error:
        return ProtectionError("latch", str(error))
    if listener is not None and listener.state is LatchState.LISTENER:
        latch = listener.admit(token.sas, outlook)
    else:
        latch = ConnectionLatch(options, token.sas, outlook)
    if latch.reason is not None:
        return ProtectionError("latch", f"it conflicts with what there is: {latch.reason}")
    return Guard(connection, judge, latch, outlook, sock)


class Guard:
    """What a latched connection has besides: its latch, and what it is held by."""

    __slots__ = (
        "__weakref__",
        "_connection",
        "_cookie",
        "_doubtful",
        "_epoch",
        "_family",
        "_foreign",
        "_full",
        "_judge",
        "_paused",
        "_read",
        "_sock",
        "_timer",
        "_told_full",
        "_written",
        "eof",
        "held",
        "latch",
        "raw",
    )

    def __init__(
        self,
        connection: Connection,
        judge: Judge,
        latch: ConnectionLatch,
        outlook: Outlook,
        sock: socket.socket | None,
    ) -> None:
        # Its connection holds it, and goes when its last user does.
        self._connection = proxy(connection)
        self._judge = judge
        self._sock = sock
        self._cookie: int | None = None
        self._family = _AF_INET if len(connection.evidence.local) == 4 else _AF_INET6
        self._timer: asyncio.TimerHandle | None = None
        self._written: list[bytes] = []
        self._read: list[tuple[str, Callable[..., object], tuple[object, ...]]] = []
        self._epoch = judge.backend.epoch
        self._paused = self._full = self._told_full = False
        # While it is broken: whether something may come by what broke it, and whether something
        # may have waited already when that was told.
        self._foreign = self._doubtful = False
        self.eof = False
        self.held = False
        self.latch = latch
        self.raw: asyncio.Transport | None = None
        latch.kernel = self._hold_in_kernel()
        self._settle_later(outlook)

    @property
    def status(self) -> LatchStatus:
        """What ``get_extra_info("ipsec_latch")`` tells."""
        return self.latch.status

    @property
    def keeps_clear_off(self) -> bool:
        """Whether the kernel drops clear segments of this connection because of its latch."""
        return self.latch.kernel

    # Following the latch

    def carried_by(self, raw: asyncio.Transport) -> None:
        """Note the loop's transport."""
        self.raw = raw
        if self.latch.waiting or self.held:
            self.held = True
            raw.pause_reading()

    def begin(self) -> None:
        """``connection_made`` has returned."""
        self._flow()

    def admits(self) -> bool:
        """Whether what was read just now may be delivered, by all that is known by now."""
        judge = self._judge
        judge.drain()
        if judge.backend.epoch != self._epoch:
            self.look()
            # That may have ended it.
            return not self.held and self.raw is not None and not self.raw.is_closing()
        return not self.held

    def keep(self, name: str, callback: Callable[..., object], *arguments: object) -> None:
        """Have something delivered when it is admitted, by a callback of this name."""
        self._read.append((name, callback, arguments))

    def look(self) -> None:
        """See how things are now, and act upon it."""
        latch, raw = self.latch, self.raw
        if latch.state is LatchState.CLOSED or raw is None or raw.is_closing():
            return
        self._epoch = self._judge.backend.epoch
        if self.held:
            # What is delivered when it is let go comes under the token of this moment.
            self._connection.review()
        try:
            outlook = self._judge.backend.outlook(self._connection.evidence)
        except BackendError:
            self.void()
            return
        channels = latch.channels
        moved = latch.observe(outlook, self._judge.time())
        self._foreign |= latch.reason not in (None, LatchReason.LOST)
        if latch.channels != channels and latch.state is LatchState.ESTABLISHED:
            self._arm_kernel()
        if moved:
            self._moved(raw)
        elif latch.state is LatchState.ESTABLISHED:
            if latch.waiting:
                self._hold(raw)
            else:
                self._let_go(raw)
        self._settle_later(outlook)

    def void(self) -> None:
        """Nothing is known of the connection any more: end it."""
        self._end(self.latch.state is LatchState.ESTABLISHED, self.latch.void())

    def close(self) -> None:
        """The connection is gone. Idempotent."""
        self.latch.release()
        self._stop_timer()
        self._written.clear()
        self._read.clear()
        self._sock = self.raw = None

    def _expire(self) -> None:
        self._timer = None
        self._end(False, self.latch.advance(self._judge.time()))
        if self.latch.state is LatchState.BROKEN:
            # uvloop's timers are rounded, so this one may have been early.
            self._await_end()

    def _await_end(self) -> None:
        deadline = self.latch.next_deadline()
        if deadline is not None:
            self._timer = self._judge.call_at(deadline, self._expire)

    def _end(self, news: bool, moved: bool) -> None:
        raw = self.raw
        if not moved or raw is None or raw.is_closing():
            return
        self._stop_timer()
        self._hold(raw)
        if news:
            self._connection.tell("latch_broken", self.latch.reason)
        reset(raw)

    def _moved(self, raw: asyncio.Transport) -> None:
        self._stop_timer()
        latch = self.latch
        if latch.state is LatchState.ESTABLISHED:
            heard = self._doubtful or self._read or not self._connection.has_heard_nothing(raw)
            if heard and self._foreign and not latch.kernel:
                # It may have come by what broke the latch.
                self._end(False, latch.void())
                return
            self._doubtful = self._foreign = False
            self._arm_kernel()
            self._connection.tell("latch_restored")
            if not raw.is_closing() and not latch.waiting:
                self._let_go(raw)
            return
        self._doubtful |= not self._connection.note_quiet(raw)
        self._hold(raw, told=False)
        pausing = latch.options.on_break == "pause"
        if pausing:
            self._block_kernel()
        self._connection.tell("latch_broken", latch.reason)
        if not pausing:
            reset(raw)
            return
        if raw.is_closing():
            return
        self._flow()
        self._await_end()

    def _settle_later(self, outlook: Outlook) -> None:
        if self.latch.waiting and self._timer is None:
            when = self._judge.time() + outlook.settled_in + 0.001
            self._timer = self._judge.call_at(when, self._settled)

    def _settled(self) -> None:
        self._timer = None
        self.look()

    def _stop_timer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    # Reading and writing

    def _hold(self, raw: asyncio.Transport, *, told: bool = True) -> None:
        if not self.held:
            self.held = True
            raw.pause_reading()
        if told:
            self._flow()

    def _let_go(self, raw: asyncio.Transport) -> None:
        if not self.held:
            return
        self.held = False
        self._connection.uphold()
        if raw.is_closing():
            return
        written, self._written = self._written, []
        if written:
            raw.writelines(written)
        if self.eof:
            raw.write_eof()
        self._flow()
        while self._read and not self.held and not raw.is_closing():
            name, callback, arguments = self._read.pop(0)
            try:
                self._connection.feed(name, callback, *arguments)
            except BaseException:
                # The loop is to end. If it runs on, so does this, from where it was.
                self._hold(raw, told=False)
                raise
        if not self._paused and not self.held and not raw.is_closing():
            self._connection.read_on(raw.resume_reading)

    def _flow(self) -> None:
        """Tell the protocol whether it may write, if it was not told so last."""
        full = self._full or self.held
        if full is not self._told_full:
            self._told_full = full
            self._connection.tell("pause_writing" if full else "resume_writing", ours=False)

    def set_full(self, full: bool) -> None:
        """The loop's transport has enough to write, or takes more."""
        self._full = full
        self._flow()

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        """As the transport's."""
        if not self.held:
            if self.raw is not None:
                self.raw.write(data)
        elif self.eof:
            raise RuntimeError("Cannot call write() after write_eof()")
        else:
            self._written.append(b"" + data)

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview[Any]]) -> None:
        """As the transport's."""
        self.write(b"".join(list_of_data))

    def write_eof(self, raw: asyncio.Transport) -> None:
        """As the transport's."""
        if self.held:
            self.eof = True
        else:
            raw.write_eof()

    def pause_reading(self, raw: asyncio.Transport) -> None:
        """As the transport's."""
        self._paused = True
        raw.pause_reading()

    def resume_reading(self, raw: asyncio.Transport) -> None:
        """As the transport's."""
        self._paused = False
        if not self.held:
            self._connection.read_on(raw.resume_reading)

    @property
    def keeps(self) -> bool:
        """Whether something that was read waits until it is let go."""
        return len(self._read) > 0

    @property
    def kept(self) -> int:
        """How many bytes are kept in memory."""
        return sum(map(len, self._written))

    # The kernel

    def _hold_in_kernel(self) -> bool:
        """Have the kernel hold the latch; False where it cannot."""
        channels, sock = self.latch.channels, self._sock
        # A backend of another namespace than the socket's has given no token to latch.
        if self._judge.backend.netns_cookie is None or sock is None or len(channels) != 1:
            return False
        channel = channels[0]
        # Without a reqid a template names no channel; marks and interface ids it cannot name.
        if not channel.reqid or channel.if_id or channel.mark != Mark():
            return False
        try:
            self._cookie = socket_cookie(sock)
            enforcement = self._connection.enforcement
            if enforcement is not None:
                enforcement.close()
            self._set(sock)
        except (OSError, ValueError) as error:
            net_logger.info("%r: a latch is held in user space: %s", sock, error)
            return False
        return True

    def _arm_kernel(self) -> None:
        self._try(PolicyAction.ALLOW)

    def _block_kernel(self) -> None:
        self._try(PolicyAction.BLOCK)

    def _try(self, action: PolicyAction) -> None:
        sock = self._sock
        # A descriptor may be another socket's by now.
        if not self.latch.kernel or sock is None or socket_cookie(sock) != self._cookie:
            return
        try:
            self._set(sock, action)
        except (OSError, ValueError) as error:
            net_logger.warning("%r: the policies of its latch cannot be changed: %s", sock, error)

    def _set(self, sock: socket.socket, action: PolicyAction = PolicyAction.ALLOW) -> None:
        channel = self.latch.channels[0]
        for direction in (Direction.OUT, Direction.IN):
            template = channel.template(inbound=direction is Direction.IN)
            templates = (template,) if action is PolicyAction.ALLOW else ()
            set_policy(
                sock,
                encode(
                    Policy(
                        selector=Selector(family=self._family),
                        direction=direction,
                        action=action,
                        templates=templates,
                    )
                ),
            )
