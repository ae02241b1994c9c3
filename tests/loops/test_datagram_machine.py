"""A refused or pending peer never has a byte delivered, whatever happens in whatever order.

SAs, identities, mishaps and packets come as hypothesis likes; a model knows under which SA each
datagram was stamped, and whose that is or turns out to be.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import pytest
import uvloop
from datagram_tools import HERE, Tokened, close, until
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

from ipsec_aio import MemoryBackend, create_datagram_endpoint

PEERS = ["127.0.0.2", "127.0.0.3"]
NAMES = st.sampled_from([None, None, GOOD, BAD])


class Endpoint(Facts, RuleBasedStateMachine):
    """One server that wants friends; two peers, who may be anybody."""

    new_loop: Callable[[], asyncio.AbstractEventLoop]

    @initialize(deadline=st.sampled_from([PATIENT, PATIENT, 0.002, 0]))
    def open(self, deadline: float) -> None:
        self.runner = asyncio.Runner(loop_factory=type(self).new_loop)
        self.deadline = deadline
        self.backend = MemoryBackend()
        self.transport, self.protocol = self.runner.run(self.serve())
        self.sockets = {peer: socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for peer in PEERS}
        for peer, sock in self.sockets.items():
            sock.bind((peer, 0))
        self.sas: dict[str, list[Known]] = {peer: [] for peer in PEERS}
        self.number = 0
        self.queued: list[tuple[str, int]] = []
        # By number: the SA that it was stamped with, and whether it was surely a friend's then.
        self.stamped: dict[int, tuple[Known | None, bool]] = {}
        self.events_held = self.events_lost = self.stamp_lost = self.stamp_was_lost = False
        self.paused = False
        # Whether the queue may hold what came before all was read again.
        self.shaken = False

    async def serve(self) -> tuple[Any, Any]:
        return await create_datagram_endpoint(
            Tokened, HERE, backend=self.backend, require=WANTED, deadline=self.deadline
        )

    # SAs and identities

    @rule(peer=st.sampled_from(PEERS), name=NAMES, weak=st.sampled_from([False, False, True]))
    def add_sa(self, peer: str, name: str | None, weak: bool) -> None:
        sa = self.backend.add_sa(src=peer, dst="127.0.0.1", **said(name), **(WEAK if weak else {}))
        self.sas[peer].append(Known(sa, name, weak=weak))
        self.send(peer, 1)

    @precondition(lambda self: any(self.sas.values()))
    @rule(data=st.data(), name=NAMES)
    def rekey(self, data: Any, name: str | None) -> None:
        peer, old = self.draw(data)
        sa = self.backend.rekey(old.sa, **said(name))
        self.sas[peer].append(Known(sa, name, weak=old.weak))
        self.send(peer, 1)

    @precondition(lambda self: any(known.name is None for known in self.all()))
    @rule(data=st.data(), name=st.sampled_from([GOOD, GOOD, BAD]))
    def identify(self, data: Any, name: str) -> None:
        known = data.draw(st.sampled_from([known for known in self.all() if known.name is None]))
        known.name = name
        self.backend.identify(known.sa, peer=name)

    @precondition(lambda self: any(self.sas.values()))
    @rule(data=st.data(), expire=st.booleans())
    def remove(self, data: Any, expire: bool) -> None:
        peer, known = self.draw(data)
        self.sas[peer].remove(known)
        (self.backend.expire if expire else self.backend.delete_sa)(known.sa)

    # Mishaps

    def lose_or_recover_events(self) -> None:
        self.shaken = self.shaken or self.events_lost
        super().lose_or_recover_events()

    def lose_or_restore_the_stamp(self) -> None:
        (self.backend.restore_stamp if self.stamp_lost else self.backend.lose_stamp)()
        self.stamp_lost = not self.stamp_lost
        self.stamp_was_lost = True

    @rule(which=st.sampled_from("hhhlls"))
    def mishap(self, which: str) -> None:
        """Each comes to an end when it comes again."""
        if which == "h":
            self.hold_or_release_events()
        elif which == "l":
            self.lose_or_recover_events()
        else:
            self.lose_or_restore_the_stamp()

    # Packets

    @rule(peer=st.sampled_from(PEERS), count=st.integers(1, 5))
    def send(self, peer: str, count: int) -> None:
        there = self.transport.get_extra_info("sockname")
        for _ in range(count):
            self.sockets[peer].sendto(b"%d" % self.number, there)
            self.queued.append((peer, self.number))
            self.number += 1
        if not self.paused:
            self.take_in()

    def take_in(self) -> None:
        """Have the server judge what is queued, under the SAs of this moment."""
        calm = not (self.events_held or self.events_lost or self.stamp_was_lost or self.shaken)
        for peer, number in self.queued:
            newest = self.sas[peer][-1] if self.sas[peer] else None
            self.stamped[number] = newest, calm and newest is not None and newest.good
        self.queued.clear()
        self.runner.run(until(lambda: self.stats.received == self.number))
        self.shaken = False

    @rule()
    def pause_or_resume(self) -> None:
        if self.paused:
            self.transport.resume_reading()
            self.paused = False
            self.take_in()
        else:
            self.transport.pause_reading()
            self.paused = True

    @rule(turns=st.integers(1, 4))
    def let_the_loop_turn(self, turns: int) -> None:
        async def turn() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)

        self.runner.run(turn())

    # What must hold

    @property
    def stats(self) -> Any:
        return self.transport.ipsec_stats

    @property
    def delivered(self) -> list[tuple[int, str, Any]]:
        return [
            (int(data), host, ptoken) for data, (host, _), ptoken in self.protocol.log.of("data")
        ]

    @invariant()
    def only_friends_are_heard(self) -> None:
        for number, _, ptoken in self.delivered:
            known, _ = self.stamped[number]
            assert known is not None
            assert known.good, (number, known.name, known.weak)
            assert WANTED.check(ptoken) is None
            assert str(ptoken.peer) == GOOD

    @invariant()
    def in_order_and_once(self) -> None:
        for peer in PEERS:
            numbers = [number for number, host, _ in self.delivered if host == peer]
            assert numbers == sorted(set(numbers))

    @invariant()
    def all_are_counted(self) -> None:
        stats = self.stats
        waiting = stats.received - stats.refused - len(self.delivered)
        assert 0 <= waiting <= stats.held

    def teardown(self) -> None:
        if not hasattr(self, "runner"):
            return
        try:
            self.come_to_an_end()
        finally:
            self.runner.run(close(self.transport))
            for sock in self.sockets.values():
                sock.close()
            self.runner.close()

    def come_to_an_end(self) -> None:
        """Nothing waits when all is known; and who was known to be a friend was heard."""
        if self.events_lost:
            self.lose_or_recover_events()
        if self.events_held:
            self.hold_or_release_events()
        for known in self.all():
            if known.name is None:
                known.name = BAD
                self.backend.identify(known.sa, peer=BAD)
        if self.paused:
            self.pause_or_resume()
        self.runner.run(
            until(lambda: self.stats.refused + len(self.delivered) == self.stats.received)
        )
        self.only_friends_are_heard()
        self.in_order_and_once()
        if self.deadline == PATIENT:
            heard = {number for number, _, _ in self.delivered}
            assert heard >= {number for number, (_, friend) in self.stamped.items() if friend}


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_nobody_else_is_heard(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    machine = type("Endpoint", (Endpoint,), {"new_loop": staticmethod(new_loop)})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=100,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
