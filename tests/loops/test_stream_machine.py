"""A refused or pending peer never has a byte delivered, whatever happens in whatever order.

Connections, SAs, identities and mishaps come as hypothesis likes; a model knows under which SA each
connection was stamped, and whose that is or turns out to be. Each byte that is delivered is held
against the connection's token and latch at that moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
import uvloop
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from machine_tools import BAD, GOOD, PATIENT, WANTED, WEAK, Facts, Known, said
from notes import PATIENCE
from stream_tools import HOST, port_of

import ipsec_aio
from ipsec_aio import Latch, LatchState, MemoryBackend
from ipsec_aio.net import streams

PEERS = ["127.0.0.20", "127.0.0.21"]
NAMES = st.sampled_from([None, None, GOOD, GOOD, GOOD, BAD])
TURNS = 6


class Served(ipsec_aio.Protocol):
    """The server's end; finds fault with what it is told."""

    def __init__(self) -> None:
        self.received = b""
        self.made = self.lost = 0
        self.faults: list[str] = []
        self.transport: Any = None
        self.paused = False

    def connection_made(self, transport: Any, ptoken: Any) -> None:
        self.made += 1
        self.transport = transport
        self.judge("made")

    def data_received(self, data: bytes) -> None:
        self.received += data
        self.judge("data")
        if self.paused:
            self.faults.append("data while reading is paused")

    def eof_received(self) -> bool:
        self.judge("eof")
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost += 1

    def judge(self, what: str) -> None:
        token = self.transport.get_extra_info("ptoken")
        guard = self.transport._ipsec_connection.guard
        # A latch stands while the tables are read again.
        met = WANTED.decide(token) in ((True,) if guard is None else (True, None))
        if not met:
            self.faults.append(f"{what}: {WANTED.check(token)}")
        if ipsec_aio.current_ptoken() is not token:
            self.faults.append(f"{what}: under another token")
        if self.lost or not self.made:
            self.faults.append(f"{what}: before or after all")
        status = self.transport.get_extra_info("ipsec_latch")
        if guard is not None and (
            status.state is not LatchState.ESTABLISHED or (what != "made" and guard.latch.waiting)
        ):
            self.faults.append(f"{what}: {status.state}, waiting: {guard.latch.waiting}")


class Client:
    """The peer's end, and what the model knows of the connection."""

    def __init__(self, sock: socket.socket, served: Served, known: Known | None) -> None:
        self.sock = sock
        self.served = served
        self.known = known
        self.sure = known is not None and known.good
        self.written = b""
        # How much may be delivered at most.
        self.limit: int | None = None


class Streams(Facts, RuleBasedStateMachine):
    """One server that wants friends; two peers, who may be anybody."""

    new_loop: Callable[[], asyncio.AbstractEventLoop]

    @initialize(
        deadline=st.sampled_from([PATIENT, PATIENT, 0.002, 0]),
        latch=st.sampled_from([None, None, "pause", "reset"]),
        inferred=st.booleans(),
        limits=st.sampled_from([(1024, 8 << 20), (1024, 3), (1, 8 << 20)]),
    )
    def open(
        self, deadline: float, latch: str | None, inferred: bool, limits: tuple[int, int]
    ) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(streams, "HELD_LIMIT", limits[0])
        self.patch.setattr(streams, "KEPT_LIMIT", limits[1])
        servers = self.servers = []
        init = streams._Accepting.__init__

        def noted(accepting: Any, *arguments: Any) -> None:
            init(accepting, *arguments)
            servers.append(accepting)

        self.patch.setattr(streams._Accepting, "__init__", noted)
        self.runner = asyncio.Runner(loop_factory=type(self).new_loop)
        self.deadline = deadline
        self.latched = latch is not None
        self.inferred = inferred
        self.ahead = 0.0
        self.backend = MemoryBackend(trust_policy=inferred)
        self.backend.clock = self.backend.resolver.clock = lambda: time.monotonic() + self.ahead
        if inferred:
            self.backend.lose_stamp()
        self.protocols: list[Served] = []
        self.sas: dict[str, list[Known]] = {peer: [] for peer in PEERS}
        self.clients: list[Client] = []
        self.events_held = self.events_lost = self.disturbed = self.closed = False
        self.stamp_lost = inferred
        self.policies_there = False
        self.server = self.runner.run(self.serve(latch))
        self.add_or_remove_policies()
        self.pass_time(1.0)
        for peer in PEERS:
            self.add_sa(peer, GOOD, False)
            self.connect(peer, 3)

    async def serve(self, latch: str | None) -> Any:
        def factory() -> Served:
            self.protocols.append(Served())
            return self.protocols[-1]

        return await ipsec_aio.create_server(
            factory,
            HOST,
            0,
            backend=self.backend,
            require=WANTED,
            deadline=self.deadline,
            latch=None if latch is None else Latch(on_break=latch),
        )

    # SAs, identities, policies

    @rule(peer=st.sampled_from(PEERS), name=NAMES, weak=st.sampled_from([False] * 4 + [True]))
    def add_sa(self, peer: str, name: str | None, weak: bool) -> None:
        reqid = 1 + PEERS.index(peer)
        sa = self.backend.add_sa(
            src=peer, dst=HOST, reqid=reqid, **said(name), **(WEAK if weak else {})
        )
        self.sas[peer].append(Known(sa, name, weak=weak))
        self.turn_and_speak()

    @precondition(lambda self: any(self.sas.values()))
    @rule(data=st.data(), name=NAMES)
    def rekey(self, data: Any, name: str | None) -> None:
        peer, old = self.draw(data)
        sa = self.backend.rekey(old.sa, **said(name))
        self.sas[peer].append(Known(sa, name, weak=old.weak))
        self.turn_and_speak()

    @precondition(lambda self: any(known.name is None for known in self.all()))
    @rule(data=st.data(), name=st.sampled_from([GOOD, GOOD, BAD]))
    def identify(self, data: Any, name: str) -> None:
        known = data.draw(st.sampled_from([known for known in self.all() if known.name is None]))
        known.name = name
        self.backend.identify(known.sa, peer=name)
        self.turn_and_speak()

    @precondition(lambda self: any(self.sas.values()))
    @rule(data=st.data(), expire=st.booleans())
    def remove(self, data: Any, expire: bool) -> None:
        peer, known = self.draw(data)
        self.sas[peer].remove(known)
        (self.backend.expire if expire else self.backend.delete_sa)(known.sa)
        self.turn_and_speak()

    def add_or_remove_policies(self) -> None:
        if self.policies_there:
            self.backend.flush_policies()
        else:
            for reqid, peer in enumerate(PEERS, 1):
                self.backend.add_policy(src=peer, dst=HOST, reqid=reqid)
                self.backend.add_policy(src=HOST, dst=peer, reqid=reqid, direction="out")
        self.policies_there = not self.policies_there
        self.turn()

    # Mishaps

    def lose_or_restore_the_stamp(self) -> None:
        if self.inferred:
            return
        (self.backend.restore_stamp if self.stamp_lost else self.backend.lose_stamp)()
        self.stamp_lost = not self.stamp_lost
        self.bound()

    def bound(self) -> None:
        """What is written from now on to a connection that stands may never be delivered."""
        for client in self.clients:
            if client.limit is None:
                client.limit = len(client.written)

    @rule(which=st.sampled_from("hhlllspp"))
    def mishap(self, which: str) -> None:
        """Each comes to an end when it comes again."""
        self.disturbed = True
        if which == "h":
            self.hold_or_release_events()
        elif which == "l":
            self.lose_or_recover_events()
        elif which == "s":
            self.lose_or_restore_the_stamp()
        else:
            self.add_or_remove_policies()
        self.turn_and_speak()

    @rule(seconds=st.sampled_from([1.0, 1.0, 20.0]))
    def pass_time(self, seconds: float) -> None:
        """Policies come of age, removed SAs are forgotten, nobody waits any longer."""
        self.ahead += seconds
        self.backend.drain()
        self.turn_and_speak()

    @precondition(lambda self: len(self.clients) > 2 and not self.closed)
    @rule(really=st.sampled_from([False] * 9 + [True]))
    def close_the_backend(self, really: bool) -> None:
        if really:
            self.runner.run(self.backend.aclose())
            self.closed = self.disturbed = True
            self.bound()
            self.turn_and_speak()

    # Connections

    @rule(peer=st.sampled_from(PEERS), early=st.integers(0, 9))
    def connect(self, peer: str, early: int) -> None:
        if len(self.clients) >= 12:
            return
        sock = socket.socket()
        sock.bind((peer, 0))
        sock.connect((HOST, port_of(self.server)))
        sock.setblocking(False)
        count = len(self.protocols)
        newest = self.sas[peer][-1] if self.sas[peer] else None
        written = bytes(range(early))
        if early:
            sock.send(written)
        self.runner.run(self.until(lambda: len(self.protocols) > count))
        client = Client(sock, self.protocols[-1], newest)
        client.written = written
        self.clients.append(client)
        self.turn()

    @rule(size=st.integers(1, 9))
    def turn_and_speak(self, size: int = 1) -> None:
        """Everybody says something, when what has changed went round; a latch asks at each read."""
        if not self.latched:
            self.turn()
        for client in self.clients:
            piece = bytes((len(client.written) + n) % 251 for n in range(size))
            with contextlib.suppress(OSError):
                client.sock.send(piece)
                client.written += piece
        self.turn()

    @precondition(lambda self: self.clients)
    @rule(data=st.data(), half=st.booleans())
    def leave(self, data: Any, half: bool) -> None:
        client = self.pick(data)
        with contextlib.suppress(OSError):
            client.sock.shutdown(socket.SHUT_WR) if half else client.sock.close()
        self.turn()

    @precondition(lambda self: self.clients)
    @rule(data=st.data(), what=st.sampled_from(["read", "read", "write", "close", "abort"]))
    def act(self, data: Any, what: str) -> None:
        """What the program does to a connection of its own."""
        served = self.pick(data).served
        if not served.made or served.lost or served.transport.is_closing():
            return
        transport = served.transport

        async def do() -> None:
            if what == "read" and served.paused:
                served.paused = False
                transport.resume_reading()
            elif what == "read":
                transport.pause_reading()
                served.paused = True
            elif what == "write":
                transport.write(b"answer")
            elif what == "close":
                transport.close()
            else:
                transport.abort()

        self.runner.run(do())
        self.turn()

    def pick(self, data: Any) -> Client:
        found: Client = data.draw(st.sampled_from(self.clients))
        return found

    def turn(self) -> None:
        async def turn() -> None:
            for _ in range(TURNS):
                await asyncio.sleep(0)

        self.runner.run(turn())

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0)

    # What must hold

    @invariant()
    def only_friends_are_heard(self) -> None:
        for client in getattr(self, "clients", ()):
            served = client.served
            assert served.faults == []
            if served.made and not self.inferred:
                assert client.known is not None
                assert client.known.good, (client.known.name, client.known.weak)
            if client.limit is not None:
                assert len(served.received) <= client.limit

    @invariant()
    def in_order(self) -> None:
        for client in getattr(self, "clients", ()):
            assert client.written.startswith(client.served.received)

    @invariant()
    def made_and_lost_once(self) -> None:
        for served in getattr(self, "protocols", ()):
            assert served.made <= 1
            assert served.lost <= served.made

    def teardown(self) -> None:
        if not hasattr(self, "runner"):
            return
        try:
            if hasattr(self, "server"):
                self.come_to_an_end()
        finally:
            self.server.close()
            for client in self.clients:
                client.sock.close()
            for served in self.protocols:
                if served.transport is not None:
                    served.transport.abort()
            self.turn()
            self.runner.close()
            self.patch.undo()

    def come_to_an_end(self) -> None:
        """Friends were heard; nobody waits when all is known, and nothing is left."""
        for client in self.clients:
            served = client.served
            if served.paused and not served.lost:
                served.paused = False
                self.runner.run(self.resume(served.transport))
        steady = not (self.disturbed or self.latched or self.inferred)
        if steady and self.deadline == PATIENT:
            for client in self.clients:
                ours = client.served.transport
                if client.sure and not (ours is not None and ours.is_closing()):
                    self.runner.run(
                        self.until(lambda c=client: c.served.received == c.written or c.served.lost)
                    )
        if self.events_lost:
            self.lose_or_recover_events()
        if self.events_held:
            self.hold_or_release_events()
        self.pass_time(20.0)
        self.turn()
        (accepting,) = self.servers
        for client in self.clients:
            client.sock.close()
            if client.served.transport is not None:
                client.served.transport.abort()
        if self.deadline == PATIENT:
            self.runner.run(self.until(lambda: not (accepting.held or accepting.kept)))
        self.runner.run(self.until(lambda: all(s.made == s.lost for s in self.protocols)))
        self.only_friends_are_heard()
        self.in_order()
        self.made_and_lost_once()
        self.runner.run(self.until(lambda: not (accepting.held or accepting.kept)))
        assert (accepting.held, accepting.kept) == (0, 0)

    async def resume(self, transport: Any) -> None:
        transport.resume_reading()


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_nobody_else_is_heard(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    machine = type("Streams", (Streams,), {"new_loop": staticmethod(new_loop)})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
