"""A datagram transport that keeps the evidence of each datagram.

Rules:

* asyncio gives no ancillary data away, so the transport reads a socket of its own under
  ``loop.add_reader``, which every loop has: with recvmsg where little arrives, and on a UDP socket
  with a :class:`~.batch.Batch` where much does.
* To the outside it is asyncio's datagram transport of the running Python version, flow control,
  errors and their texts included.
* A wake-up takes up to ``BATCH`` datagrams, judges them together, then delivers them. A callback
  that closes the transport or pauses reading stops the delivery; one that raises costs only its
  own datagram.
* Datagrams that are all welcome are delivered as one batch, with no look at their verdicts; all
  others one by one, by way of the backlog.
* What does not meet the requirement is dropped, counted and reported (:mod:`.refusals`). What may
  meet it yet is held, and nothing that its host sends overtakes it (:mod:`.waiting`).
"""

from __future__ import annotations

import asyncio
import socket
import sys
import warnings
from asyncio.trsock import TransportSocket
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import copy_context
from operator import length_hint
from threading import get_ident
from typing import TYPE_CHECKING, Any, cast

from ipsec_aio.errors import ProtectionError
from ipsec_aio.evidence import LATE
from ipsec_aio.log import net_logger
from ipsec_aio.tokens import PToken

from .batch import CONTROL, SLOTS, batch_for
from .context import current
from .protocols import DatagramProtocol, takes_token
from .refusals import Refusals
from .segments import REFUSALS, UDP_SEGMENT, joined, run, segment_size
from .stats import Counters, IPsecStats
from .waiting import Waiting
from .witness import Verdict, runs_udp

if TYPE_CHECKING:
    from .batch import Batch
    from .protocols import TokenProtocol
    from .witness import Entry, Witness

    AnyProtocol = asyncio.BaseProtocol | TokenProtocol

__all__ = ["BATCH", "DatagramTransport"]

BATCH = SLOTS
"""Datagrams per wake-up, so that the loop's other work is not held up."""
SPARSE = 8
"""After a batch of one, so many wake-ups take a single datagram with recvmsg, then see again; after
each further one twice as many, up to ``SPARSEST``.
"""
SPARSEST = 512

_IP_BUFFER = 65536
_OTHER_BUFFER = 256 * 1024
_CONTROL_BUFFER = CONTROL
_WARN_AFTER = 5

# Since Python 3.13 an empty datagram is sent, and each counts in the buffer with its header.
_SENDS_EMPTY = sys.version_info >= (3, 13)
_HEADER = 8 if _SENDS_EMPTY else 0

_Received = tuple[bytes, list[tuple[int, int, bytes]], int, Any]


class DatagramTransport(asyncio.DatagramTransport, asyncio.Transport):
    """Transport of one datagram socket, made by :func:`create_datagram_endpoint`.

    Like asyncio's own it passes for a Transport too, and has the reading half of one.

    ``get_extra_info`` knows ``"socket"``, ``"sockname"``, ``"peername"`` and, on a connected
    socket, ``"ptoken"``: the PToken of what its peer sends at this moment. ``"ipsec_enforced"`` and
    ``"ipsec_pinning"`` say whether the ``"kernel"`` or the ``"user"`` side sees to it that the
    requirement is met, and that nothing sent under a token leaves in the clear.
    """

    _sock: socket.socket | None = None

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        protocol: AnyProtocol,
        witness: Witness,
        *,
        address: Any = None,
        deadline: float = 1.0,
        waiter: asyncio.Future[None] | None = None,
    ) -> None:
        self._sockname = _name(sock.getsockname)
        self._peer = _name(sock.getpeername)
        super().__init__(
            {
                "socket": TransportSocket(sock),
                "sockname": self._sockname,
                "peername": self._peer,
            }
        )
        self._loop = loop
        self._fd = sock.fileno()
        self._witness = witness
        self._address = address
        # The way out where no peer is fixed and nothing else stands in the way.
        self._recvmsg = sock.recvmsg
        self._direct = sock.sendto if self._peer is None and not address else None
        self._segments = runs_udp(sock)
        ip = sock.family in (socket.AF_INET, socket.AF_INET6)
        self._receive_size = _IP_BUFFER if ip else _OTHER_BUFFER
        # On a socket of AF_UNIX descriptors would come, and nobody would close them.
        self._control_size = _CONTROL_BUFFER if ip else 0
        self._buffer: deque[tuple[bytes, Any, PToken | None]] = deque()
        self._buffer_size = 0
        self._backlog: deque[tuple[bytes, Any, Verdict]] = deque()
        self._batch: Batch | None = None
        self._batch_kind = sock.family, self._receive_size, _CONTROL_BUFFER
        if runs_udp(sock):
            self._batch = batch_for(*self._batch_kind)
        self._expected = 0
        # How many wake-ups take a single datagram now, and after the next batch of one.
        self._sparse, self._sparser = 0, SPARSE
        # What is being delivered: payloads still to come, and the entries of all.
        self._coming: Iterator[bytes] = iter(())
        self._entries: list[Entry] = []
        self._interrupted = False
        self._deadline = deadline
        self._waiting: Waiting | None = None
        self._counters = Counters()
        self._refusals = Refusals(self._counters)
        self._low_water, self._high_water = _limits(None, None)
        self._writing_paused = self._reading_paused = self._closing = False
        self._paused_at = 0.0
        self._conn_lost = 0
        self.set_protocol(protocol)
        # The socket stays the caller's, and nothing is watched, until nothing more can fail.
        self._sock = sock
        witness.watch()
        self._context = copy_context()
        loop.call_soon(self._connection_made, context=self._context)
        loop.call_soon(self._start_reading, context=self._context)
        if waiter is not None:
            loop.call_soon(_wake, waiter)

    def __repr__(self) -> str:
        state = "closed" if self._sock is None else "closing" if self._closing else "open"
        peer = f" peer={self._peer}" if self._peer else ""
        return (
            f"<{type(self).__name__} {state} fd={self._fd} "
            f"local={self._sockname}{peer} bufsize={self._buffer_size}>"
        )

    def __del__(self, _warn: Callable[..., None] = warnings.warn) -> None:
        if self._sock is not None:
            _warn(f"unclosed transport {self!r}", ResourceWarning, source=self)
            self._release()

    @property
    def ipsec_stats(self) -> IPsecStats:
        """What was received, and what was refused and why: a snapshot."""
        coming = self._not_delivered()
        return self._counters.snapshot(
            received=-len(coming), protected=-sum(token.protected for _, token in coming)
        )

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return information about the transport."""
        if name == "ptoken":
            return self._ptoken() if self._peer is not None else default
        if name == "ipsec_enforced":
            return self._witness.enforced
        if name == "ipsec_pinning":
            return self._witness.pinning
        return super().get_extra_info(name, default)

    def set_protocol(self, protocol: AnyProtocol) -> None:
        """Install a protocol; whether its callbacks get a token is judged anew."""
        # asyncio calls whatever looks like a protocol; so does this.
        self._protocol: Any = protocol
        self._interrupted = True
        self._gives_token = takes_token(protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Return the protocol; None once the connection is lost."""
        return cast("asyncio.BaseProtocol", self._protocol)

    def _ptoken(self) -> PToken | None:
        return self._witness.token_of(self._peer) if self._peer is not None else None

    def _connection_made(self) -> None:
        token = self._ptoken()
        current.set(token)
        if self._gives_token:
            self._protocol.connection_made(self, token)
        else:
            self._protocol.connection_made(self)

    # Reading.

    def is_reading(self) -> bool:
        """Whether datagrams are delivered."""
        return not self._closing and not self._reading_paused

    def pause_reading(self) -> None:
        """Deliver nothing until :meth:`resume_reading`; the kernel queues, and drops what is over.

        What a callback's own wake-up has already received is kept and delivered then. After more
        than five seconds what the kernel has queued is UNKNOWN: it may be older than what is still
        known of SAs that were removed.
        """
        if self.is_reading():
            self._reading_paused = self._interrupted = True
            self._paused_at = self._loop.time()
            self._loop.remove_reader(self._fd)

    def resume_reading(self) -> None:
        """Deliver again."""
        if self._reading_paused and not self._closing:
            self._reading_paused = False
            if self._loop.time() - self._paused_at > LATE:
                self._witness.doubt_queue()
            self._loop.call_soon(self._start_reading, context=self._context)

    def _start_reading(self) -> None:
        self._deliver()
        if self.is_reading():
            # The loop runs the reader in a copy of this context.
            self._loop.add_reader(self._fd, self._on_readable)

    def _on_readable(self) -> None:
        """Receive what is there. One datagram goes straight on: there each call is paid for by
        every wake-up.
        """
        if self._reading_paused or self._closing:
            return
        if not self._sparse:
            self._receive_many()
            return
        self._sparse -= 1
        try:
            data, told, flags, addr = self._recvmsg(self._receive_size, _CONTROL_BUFFER)
        except (BlockingIOError, InterruptedError):
            self._watch_again()
            return
        except Exception as exc:
            self._failed(exc)
            return
        witness = self._witness
        witness.look()
        entry = None
        if not (flags or self._backlog or self._waiting):
            beside = (addr, *told)
            entry = witness.find_protected(beside)
            if entry is not None:
                self._counters.protected += 1
            else:
                entry = witness.find_clear(beside)
        if entry is None:
            current.set(None)
            self._backlog.append((data, addr, witness.judge(addr, told, flags)))
            self._deliver()
            return
        self._counters.received += 1
        addr, token = entry
        # It stays until another comes: between them nothing runs here that asks who is current.
        if current.get() is not token:
            current.set(token)
        try:
            if self._gives_token:
                self._protocol.datagram_received(data, addr, token)
            else:
                self._protocol.datagram_received(data, addr)
        except BaseException as exc:
            self._raised(exc)

    def _receive_many(self) -> None:
        current.set(None)
        batch = self._batch
        if batch is None:
            self._receive_some()
        else:
            self._receive_batch(batch)

    def _receive_batch(self, batch: Batch) -> None:
        if batch.thread != get_ident():
            batch = self._batch = cast("Batch", batch_for(*self._batch_kind))
        try:
            payloads, evidence, odd = batch.receive(self._fd, self._expected)
        except (BlockingIOError, InterruptedError):
            self._thin_out()
            self._watch_again()
            return
        except OSError as exc:
            self._failed(exc)
            return
        if len(payloads) == 1:
            self._thin_out()
        else:
            self._sparser = SPARSE
        witness = self._witness
        witness.look()
        if not (odd or self._backlog or self._waiting):
            welcome = witness.welcome(evidence)
            if welcome is not None:
                entries, protected = welcome
                self._counters.received += len(entries)
                self._counters.protected += protected
                self._deliver_batch(payloads, entries)
                return
        for unexpected in odd.values():
            self._expected = unexpected.length
        judged = witness.judge_batch(evidence, odd)
        self._backlog.extend([(data, *each) for data, each in zip(payloads, judged, strict=True)])
        self._deliver()

    def _thin_out(self) -> None:
        self._sparse = self._sparser
        self._sparser = min(2 * self._sparser, SPARSEST)

    def _receive_some(self) -> None:
        """Receive where there are no batches."""
        received: list[_Received] = []
        error: Exception | None = None
        assert self._sock is not None  # noqa: S101
        recvmsg = self._sock.recvmsg
        sizes = self._receive_size, self._control_size
        try:
            for _ in range(BATCH):
                received.append(recvmsg(*sizes))
        except (BlockingIOError, InterruptedError):
            pass
        except Exception as exc:
            error = exc
        self._witness.look()
        judge = self._witness.judge
        self._backlog.extend(
            [(data, addr, judge(addr, told, flags)) for data, told, flags, addr in received]
        )
        self._deliver()
        if error is not None:
            self._failed(error)
        elif not received:
            self._watch_again()

    def _failed(self, error: Exception) -> None:
        if self._closing:
            return
        current.set(None)
        if isinstance(error, OSError):
            self._watch_again()
            self._protocol.error_received(error)
        else:
            self._fatal_error(error, "Fatal read error on datagram transport")

    def _watch_again(self) -> None:
        """Register anew: libuv drops a descriptor on which it has seen an error pending."""
        if self.is_reading():
            self._loop.remove_reader(self._fd)
            self._loop.add_reader(self._fd, self._on_readable)
        if self._buffer:
            self._loop.remove_writer(self._fd)
            self._loop.add_writer(self._fd, self._on_writable)

    def _deliver_batch(self, payloads: Sequence[bytes], entries: list[Entry]) -> None:
        """Deliver what is welcome. Here each nanosecond is paid for every datagram."""
        self._coming = coming = iter(payloads)
        self._entries = entries
        self._interrupted = False
        protocol = self._protocol
        gives_token = self._gives_token
        set_token = current.set
        last = None
        for data, (addr, token) in zip(coming, entries, strict=False):
            if token is not last:
                set_token(token)
                last = token
            try:
                if gives_token:
                    protocol.datagram_received(data, addr, token)
                else:
                    protocol.datagram_received(data, addr)
            except BaseException as exc:
                if isinstance(exc, (SystemExit, KeyboardInterrupt)):
                    self._put_back()
                self._raised(exc)
            if self._interrupted:
                self._put_back()
                self._deliver()
                return
        self._entries = []
        set_token(None)

    def _not_delivered(self) -> list[Entry]:
        return self._entries[len(self._entries) - length_hint(self._coming) :]

    def _put_back(self) -> None:
        """Leave the rest of a batch to the backlog, which counts as it delivers."""
        entries = self._not_delivered()
        self._entries = []
        judged = [(addr, Verdict(token, None)) for addr, token in entries]
        self._backlog.extend(
            [(data, *each) for data, each in zip(self._coming, judged, strict=True)]
        )
        self._counters.received -= len(judged)
        self._counters.protected -= sum(verdict.protected for _, verdict in judged)

    def _deliver(self) -> None:
        """Deliver or refuse: first what waits no longer, then what has come since."""
        counters = self._counters
        if self._waiting and self.is_reading():
            for data, addr, verdict, late in self._waiting.release():
                counters.dropped += late
                self._conclude(data, addr, verdict)
                if not self.is_reading():
                    break
        backlog = self._backlog
        while backlog and not self._closing and not self._reading_paused:
            data, addr, verdict = backlog.popleft()
            counters.received += 1
            if verdict.waits or self._waiting:
                self._hold(data, addr, verdict)
            else:
                self._conclude(data, addr, verdict)
        current.set(None)

    def _conclude(self, data: bytes, addr: Any, verdict: Verdict) -> None:
        """Deliver or refuse a datagram for good."""
        counters = self._counters
        if verdict.protected:
            counters.protected += 1
        elif verdict.unknown:
            counters.unknown += 1
        current.set(verdict.token)
        try:
            if verdict.error is not None:
                self._refuse(addr, verdict.error)
            elif self._gives_token:
                self._protocol.datagram_received(data, addr, verdict.token)
            else:
                self._protocol.datagram_received(data, addr)
        except BaseException as exc:
            self._raised(exc)

    def _raised(self, exc: BaseException) -> None:
        if isinstance(exc, (SystemExit, KeyboardInterrupt)):
            current.set(None)
            self._loop.call_soon(self._start_reading, context=self._context)
            raise exc
        self._report(exc, "Exception in a callback for a received datagram")

    def _hold(self, data: bytes, addr: Any, verdict: Verdict) -> None:
        """Hold a datagram where it has to wait, or refuse it for want of room."""
        waiting = self._waiting
        if waiting is None:
            waiting = self._waiting = Waiting(
                self._loop, self._witness, self._deadline, self._wake_up, self._context
            )
        if verdict.waits:
            # What is kept of this evidence may be older than the answer.
            verdict = self._witness.again(verdict)
        if not waiting.must_wait(addr, verdict):
            self._conclude(data, addr, verdict)
        elif waiting.add(data, addr, verdict):
            self._counters.held += 1
        else:
            self._counters.dropped += 1
            error = verdict.error or ProtectionError("deadline", "too much of its host waits")
            self._conclude(data, addr, Verdict(verdict.token, error))

    def _wake_up(self) -> None:
        if self.is_reading():
            self._deliver()

    def _drop_waiting(self) -> None:
        if self._waiting:
            self._counters.dropped += self._waiting.close()

    def _refuse(self, addr: Any, error: ProtectionError) -> None:
        tell = self._refusals.add(self, addr, error, self._loop.time())
        if tell and isinstance(self._protocol, DatagramProtocol):
            self._protocol.datagram_refused(addr, error)

    # Writing.

    def get_write_buffer_size(self) -> int:
        """Return how many bytes wait to be sent."""
        return self._buffer_size

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Return the low- and the high-water mark, in bytes."""
        return self._low_water, self._high_water

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the marks at which ``resume_writing`` and ``pause_writing`` are called, in bytes."""
        self._low_water, self._high_water = _limits(high, low)
        self._maybe_pause()

    def sendto(
        self,
        data: bytes | bytearray | memoryview,
        addr: Any = None,
        *,
        ptoken: PToken | None = None,
    ) -> None:
        """Send a datagram, or buffer it where the socket is not ready.

        ``addr`` may be left out where the endpoint has a remote address.

        With ``ptoken`` it is sent only under protection equivalent to the token's, which is that
        of what is answered: to the same peer, and from the same address. Raises ProtectionError
        where it would not be; where that changes while it is buffered, it is dropped and
        ``error_received`` gets the error. ``get_extra_info("ipsec_pinning")`` says how firm that
        is (docs/requirements.md).
        """
        direct = self._direct
        if direct is not None and ptoken is None and data and type(data) is bytes:
            if not self._buffer:
                try:
                    direct(data, addr)
                except (BlockingIOError, InterruptedError):
                    pass
                except Exception as exc:
                    self._not_sent(exc)
                    return
                else:
                    return
        elif not isinstance(data, (bytes, bytearray, memoryview)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"data argument must be a bytes-like object, not {type(data).__name__!r}"
            )
        if not data and not _SENDS_EMPTY:
            return
        if self._address:
            if addr not in (None, self._address):
                raise ValueError(f"Invalid address: must be None or {self._address}")
            addr = self._address
        if self._sock is None or (self._conn_lost and self._address):
            if self._conn_lost >= _WARN_AFTER:
                net_logger.warning("%r: sendto() on a closed transport", self)
            self._conn_lost += 1
            return
        if ptoken is not None:
            refused = self._objection(ptoken, addr)
            if refused is not None:
                raise refused
        if not self._buffer:
            try:
                self._send(data, addr, ptoken)
            except (BlockingIOError, InterruptedError):
                self._loop.add_writer(self._fd, self._on_writable)
            except Exception as exc:
                self._not_sent(exc)
                return
            else:
                return
        self._buffer.append((bytes(data), addr, ptoken))
        self._buffer_size += len(data) + _HEADER
        self._maybe_pause()

    def sendto_many(
        self,
        datagrams: Iterable[bytes | bytearray | memoryview],
        addr: Any = None,
        *,
        ptoken: PToken | None = None,
    ) -> None:
        """Send datagrams to one address: what as many calls of :meth:`sendto` would do, faster.

        Successive ``bytes`` of one size share a system call where the kernel can cut them
        (UDP_SEGMENT), which it does not for what IPsec will protect. asyncio has no such method.
        """
        waiting = list(datagrams)
        direct = self._direct
        if direct is None or ptoken is not None or {*map(type, waiting)} != {bytes}:
            for data in waiting:
                self.sendto(data, addr, ptoken=ptoken)
            return
        sizes = list(map(len, waiting))
        start, count = 0, len(sizes)
        while start < count:
            end = run(sizes, start)
            if end - start == 1 or self._buffer or self._sock is None or not self._segments:
                end = start
            else:
                told = [(socket.IPPROTO_UDP, UDP_SEGMENT, segment_size(sizes[start]))]
                try:
                    self._sock.sendmsg(joined(waiting[start:end]), told, 0, addr)
                except (BlockingIOError, InterruptedError):
                    end = start
                except Exception as exc:
                    if isinstance(exc, OSError) and exc.errno not in REFUSALS:
                        # A pending error was met; it costs one datagram, as with sendto.
                        self._not_sent(exc)
                        start += 1
                        continue
                    end = start
            if end == start:
                end = run(sizes, start)
                for data in waiting[start:end]:
                    self.sendto(data, addr)
            start = end

    def _not_sent(self, exc: Exception) -> None:
        if isinstance(exc, OSError):
            self._loop.call_soon(self._watch_again, context=self._context)
            self._protocol.error_received(exc)
        else:
            self._fatal_error(exc, "Fatal write error on datagram transport")

    def _objection(self, ptoken: PToken, addr: Any) -> ProtectionError | None:
        if not isinstance(ptoken, PToken):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"ptoken must be a PToken, not {ptoken!r}")
        peer = addr if self._peer is None else self._peer
        if peer is None:
            raise TypeError("ptoken needs an address to send to")
        return self._witness.pinned(ptoken, peer)

    def _send(self, data: bytes | bytearray | memoryview, addr: Any, ptoken: PToken | None) -> None:
        sock = self._sock
        assert sock is not None  # noqa: S101
        if self._peer is not None:
            sock.send(data)
        elif ptoken is None:
            sock.sendto(data, addr)
        else:
            sock.sendmsg([data], self._witness.source_of(ptoken), 0, addr)

    def _on_writable(self) -> None:
        current.set(None)
        while self._buffer:
            data, addr, ptoken = self._buffer[0]
            try:
                refused = None if ptoken is None else self._objection(ptoken, addr)
                if refused is not None:
                    raise refused
                self._send(data, addr, ptoken)
            except (BlockingIOError, InterruptedError):
                if not self._witness.outbound:
                    break
                # The socket is ready: it is its policy that finds no SA. As under the SPD, the
                # datagram is lost while one is negotiated.
            except OSError as exc:
                self._sent()
                self._watch_again()
                self._protocol.error_received(exc)
                return
            except Exception as exc:
                self._fatal_error(exc, "Fatal write error on datagram transport")
                return
            self._sent()
        self._maybe_resume()
        if not self._buffer:
            self._loop.remove_writer(self._fd)
            if self._closing:
                self._lose(None)

    def _sent(self) -> None:
        data, _, _ = self._buffer.popleft()
        self._buffer_size -= len(data) + _HEADER

    def _maybe_pause(self) -> None:
        if self._buffer_size > self._high_water and not self._writing_paused:
            self._writing_paused = True
            self._tell(self._protocol.pause_writing, "pause_writing")

    def _maybe_resume(self) -> None:
        if self._writing_paused and self._buffer_size <= self._low_water:
            self._writing_paused = False
            self._tell(self._protocol.resume_writing, "resume_writing")

    def _tell(self, callback: Callable[[], object], name: str) -> None:
        try:
            callback()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            self._report(exc, f"protocol.{name}() failed")

    # The end.

    def is_closing(self) -> bool:
        """Whether it is closed or about to be."""
        return self._closing

    def close(self) -> None:
        """Receive no more, send what is buffered, then call ``connection_lost(None)``."""
        if self._closing:
            return
        self._closing = self._interrupted = True
        self._loop.remove_reader(self._fd)
        self._drop_waiting()
        if not self._buffer:
            self._lose(None)

    def abort(self) -> None:
        """Drop what is buffered and call ``connection_lost(None)`` soon."""
        self._force_close(None)

    def _fatal_error(self, exc: Exception, message: str) -> None:
        if isinstance(exc, OSError):
            if self._loop.get_debug():
                net_logger.debug("%r: %s", self, message, exc_info=exc)
        else:
            self._report(exc, message)
        self._force_close(exc)

    def _report(self, exc: BaseException, message: str) -> None:
        self._loop.call_exception_handler(
            {"message": message, "exception": exc, "transport": self, "protocol": self._protocol}
        )

    def _force_close(self, exc: Exception | None) -> None:
        if self._conn_lost:
            return
        if self._buffer:
            self._buffer.clear()
            self._buffer_size = 0
            self._loop.remove_writer(self._fd)
        if not self._closing:
            self._closing = self._interrupted = True
            self._loop.remove_reader(self._fd)
            self._drop_waiting()
        self._lose(exc)

    def _lose(self, exc: Exception | None) -> None:
        if not self._conn_lost:
            self._conn_lost = 1
            self._loop.call_soon(self._connection_lost, exc, context=self._context)

    def _connection_lost(self, exc: Exception | None) -> None:
        try:
            self._protocol.connection_lost(exc)
        finally:
            self._release()
            self._protocol = None

    def _release(self) -> None:
        if self._sock is not None:
            self._witness.close()
            self._sock.close()
            self._sock = self._direct = None
        self._backlog.clear()


def _limits(high: int | None, low: int | None) -> tuple[int, int]:
    """Low- and high-water marks: 64 KiB and a quarter of that, unless told otherwise."""
    if high is None:
        high = 64 * 1024 if low is None else 4 * low
    if low is None:
        low = high // 4
    if not high >= low >= 0:
        raise ValueError(f"high ({high!r}) must be >= low ({low!r}) must be >= 0")
    return low, high


def _name(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except OSError:
        return None


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.cancelled():
        waiter.set_result(None)
