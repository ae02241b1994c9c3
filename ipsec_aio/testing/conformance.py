"""What every backend must do, as a class of pytest tests.

A backend's author supplies a :class:`Bench`, which plays the operator, and a fixture of that
name::

    from ipsec_aio.testing import BackendConformance

    class TestMyBackend(BackendConformance):
        @pytest.fixture
        async def bench(self):
            async with MyBackend() as backend:
                yield MyBench(backend)

The tests are coroutines: they run on whatever loops pytest-asyncio or a plugin like it runs them.
"""

# ruff: noqa: S101

from __future__ import annotations

import asyncio
import sys
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from ipsec_aio.enums import Assurance
from ipsec_aio.errors import BackendUnavailable
from ipsec_aio.evidence import IPPROTO_UDP, Evidence
from ipsec_aio.flow import Flow, pack_address
from ipsec_aio.tokens import PENDING_SECONDS

if TYPE_CHECKING:
    from ipsec_aio.backends.contract import Backend, Registration
    from ipsec_aio.tokens import PToken

__all__ = ["Arrivals", "BackendConformance", "Bench", "IdentityBench", "IdentityConformance"]

PORT = 5000
GCM = "rfc4106(gcm(aes))"
CBC = "cbc(aes)"
NULL = "ecb(cipher_null)"
SHA = "hmac(sha256)"


class Bench(ABC):
    """The operator of the system whose facts a backend tells.

    Addresses are text, algorithms go by their kernel names, ``spi`` is a number; keys are the
    bench's own affair. A change is told to the backend by the time its method returns, so that
    the backend's ``drain`` takes it in. ``local`` is an address of this system, the others are
    not. The bench starts without SAs and policies, and with a stamp that stands.
    """

    forges = True
    """Whether a datagram can bear the number of an SA that is not its own. False where the backend
    plays the stamp by itself, as the memory backend does."""

    local = "192.0.2.1"
    peer = "192.0.2.2"
    other = "192.0.2.3"

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    @abstractmethod
    async def add_sa(
        self,
        *,
        src: str,
        dst: str,
        spi: int,
        proto: str = "esp",
        mode: str = "transport",
        reqid: int = 0,
        aead: str | None = None,
        encryption: str | None = None,
        authentication: str | None = None,
    ) -> None:
        """Add an SA. ``proto`` is ``"esp"`` or ``"ah"``."""

    @abstractmethod
    async def delete_sa(self, *, src: str, dst: str, spi: int, proto: str = "esp") -> None:
        """Delete it."""

    @abstractmethod
    async def expire_sa(
        self, *, src: str, dst: str, spi: int, proto: str = "esp", hard: bool
    ) -> None:
        """Let it expire: hard, and it is gone; soft, and it still works."""

    @abstractmethod
    async def hold_sas(self) -> None:
        """Let what :meth:`add_sa` adds from now on be nothing that the backend can know yet: its
        packets are faster.
        """

    @abstractmethod
    async def release_sas(self) -> None:
        """Let the backend know of them."""

    @abstractmethod
    async def flush_sas(self) -> None:
        """Delete all SAs with one command."""

    @abstractmethod
    async def add_policy(
        self,
        *,
        src: str,
        dst: str,
        direction: str = "in",
        priority: int = 0,
        proto: str | None = "esp",
        mode: str = "transport",
        reqid: int = 0,
    ) -> None:
        """Add a policy with one template, or with none where ``proto`` is None."""

    @abstractmethod
    async def delete_policy(self, *, src: str, dst: str, direction: str = "in") -> None:
        """Delete it."""

    @abstractmethod
    async def lose_stamp(self) -> None:
        """Have no stamp cover anything any more."""

    @abstractmethod
    async def restore_stamp(self) -> None:
        """Have it again."""

    @abstractmethod
    async def lose_events(self) -> None:
        """Have the backend lose events, so that its facts are not certain."""

    @abstractmethod
    async def recover(self) -> None:
        """Wait until the backend's facts are certain again."""

    @abstractmethod
    async def pass_time(self, seconds: float) -> None:
        """Let time pass for the backend."""

    def stamped(self, spi: int, peer: str, registration: Registration) -> Evidence:
        """Return the evidence of a datagram that came just now under an inbound SA, 0 for none."""
        mark = int.from_bytes(spi.to_bytes(4, "big"), sys.byteorder)
        return Evidence(
            IPPROTO_UDP,
            pack_address(self.local),
            PORT,
            pack_address(peer),
            40000,
            mark,
            registration.generation,
            after=self.backend.policies,
        )


class IdentityBench(Bench):
    """The operator of a system whose keying daemon tells the backend whose SAs are.

    It has told nobody of the SAs that :meth:`Bench.add_sa` adds.
    """

    @abstractmethod
    async def identify(self, *, src: str, dst: str, spi: int, peer: str, local: str) -> None:
        """Let the keying daemon report whose ends an ESP SA has, text for IToken.named().

        The backend knows it by the time this returns.
        """


class Arrivals:
    """What the tests have in common: a class of tests may inherit it alone."""

    async def _arrive(
        self,
        bench: Bench,
        spi: int,
        peer: str | None = None,
        *,
        stamped: bool = True,
        after: int | None = None,
    ) -> PToken:
        """Resolve a datagram's token as an endpoint does.

        ``after`` is what the backend's ``policies`` was when the endpoint's queue was last empty;
        None: just before it came.
        """
        backend = bench.backend
        registration = await backend.register(IPPROTO_UDP, PORT)
        try:
            backend.drain()
            evidence = bench.stamped(spi, peer or bench.peer, registration)
            if not stamped:
                evidence = Evidence(*_addresses(evidence), after=evidence.after)
            if after is not None:
                evidence = replace(evidence, after=after)
            return backend.resolve(evidence)
        finally:
            registration.close()

    async def _sa(self, bench: Bench, spi: int, **fields: str | int) -> None:
        arguments = {"src": bench.peer, "dst": bench.local, "aead": GCM} | fields
        await bench.add_sa(spi=spi, **arguments)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


class BackendConformance(Arrivals):
    """The tests. Each starts on a fresh bench."""

    async def test_clear_traffic_is_known_to_be_clear(self, bench: Bench) -> None:
        token = await self._arrive(bench, 0)
        assert token.assurance is Assurance.NONE
        assert not token.protected
        assert token.privacy_protected is False
        assert token.sa is None

    async def test_an_sa_protects_its_peer_and_nobody_else(self, bench: Bench) -> None:
        await self._sa(bench, 0x1001, reqid=7)
        token = await self._arrive(bench, 0x1001)
        assert token.assurance is Assurance.EXACT
        assert token.protected
        assert token.privacy_protected is True
        assert token.integrity_protected is True
        assert token.tunnel_mode is False
        assert token.sa is not None
        assert (token.sa.spi, token.sa.reqid) == (0x1001, 7)
        assert (token.sa.src, token.sa.dst) == (bench.peer, bench.local)
        assert not (await self._arrive(bench, 0, bench.other)).protected

    @pytest.mark.parametrize(
        ("fields", "privacy", "integrity"),
        [
            ({"aead": GCM}, True, True),
            ({"encryption": CBC, "authentication": SHA}, True, True),
            ({"encryption": NULL, "authentication": SHA}, False, True),
            ({"proto": "ah", "authentication": SHA}, False, True),
        ],
    )
    async def test_properties_are_the_sa_s(
        self, bench: Bench, fields: dict[str, str], privacy: bool, integrity: bool
    ) -> None:
        await bench.add_sa(src=bench.peer, dst=bench.local, spi=0x1001, **fields)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        token = await self._arrive(bench, 0x1001)
        assert token.assurance is Assurance.EXACT
        assert token.privacy_protected is privacy
        assert token.integrity_protected is integrity
        assert token.protected is integrity

    async def test_a_tunnel_protects_what_is_inside(self, bench: Bench) -> None:
        await self._sa(bench, 0x1001, src=bench.other, mode="tunnel")
        token = await self._arrive(bench, 0x1001)
        assert token.protected
        assert token.tunnel_mode is True
        assert token.ipoptions_protected is True

    async def test_a_channel_is_one_object(self, bench: Bench) -> None:
        await self._sa(bench, 0x1001)
        token = await self._arrive(bench, 0x1001)
        assert await self._arrive(bench, 0x1001) is token

    async def test_an_equivalent_rekey_keeps_the_token(self, bench: Bench) -> None:
        await self._sa(bench, 0x1001)
        token = await self._arrive(bench, 0x1001)
        await self._sa(bench, 0x1002)
        assert await self._arrive(bench, 0x1002) is token
        assert [sa.spi for sa in token.sas] == [0x1001, 0x1002]
        await bench.delete_sa(src=bench.peer, dst=bench.local, spi=0x1001)
        bench.backend.drain()
        assert token.alive
        assert [sa.spi for sa in token.sas] == [0x1002]

    async def test_weaker_protection_is_another_token(self, bench: Bench) -> None:
        await self._sa(bench, 0x1001)
        token = await self._arrive(bench, 0x1001)
        await bench.add_sa(
            src=bench.peer, dst=bench.local, spi=0x1002, encryption=NULL, authentication=SHA
        )
        weaker = await self._arrive(bench, 0x1002)
        assert weaker is not token
        assert weaker.privacy_protected is False
        assert token.privacy_protected is True
        assert not token.equivalent(weaker)

    async def test_the_epoch_changes_when_an_sa_goes(self, bench: Bench) -> None:
        await self._sa(bench, 0x1001)
        token = await self._arrive(bench, 0x1001)
        epoch = bench.backend.epoch
        await bench.delete_sa(src=bench.peer, dst=bench.local, spi=0x1001)
        bench.backend.drain()
        assert bench.backend.epoch != epoch
        assert not token.alive
        assert token.protected, "it vouches for the packets that it came with"

    async def test_a_miss_is_not_an_absence(self, bench: Bench) -> None:
        """A packet may be here before the news of its SA."""
        await bench.hold_sas()
        await self._sa(bench, 0x1001)
        early = await self._arrive(bench, 0x1001)
        assert early.assurance is Assurance.UNKNOWN
        assert early.pending
        assert not early.protected
        assert early.privacy_protected is None
        waiting = asyncio.ensure_future(early.resolved(5))
        await bench.release_sas()
        bench.backend.drain()
        token = await waiting
        assert token.assurance is Assurance.EXACT
        assert token.protected
        assert not token.pending
        assert await self._arrive(bench, 0x1001) is token

    async def test_what_stays_missing_is_unknown_for_good(self, bench: Bench) -> None:
        await bench.hold_sas()
        await self._sa(bench, 0x1001)
        early = await self._arrive(bench, 0x1001)
        await bench.pass_time(PENDING_SECONDS + 0.1)
        assert not early.pending
        await bench.release_sas()
        bench.backend.drain()
        assert await early.resolved(5) is early
        assert early.assurance is Assurance.UNKNOWN
        assert not early.protected
        assert (await self._arrive(bench, 0x1001)).protected

    async def test_an_sa_s_number_from_another_address_proves_nothing(self, bench: Bench) -> None:
        await self._sa(bench, 0x1001)
        token = await self._arrive(bench, 0x1001, bench.other)
        assert token.assurance is (Assurance.UNKNOWN if bench.forges else Assurance.NONE)
        assert not token.protected
        assert token.sa is None

    async def test_an_sa_that_should_be_rekeyed_still_works(self, bench: Bench) -> None:
        await self._sa(bench, 0x1001)
        token = await self._arrive(bench, 0x1001)
        await bench.expire_sa(src=bench.peer, dst=bench.local, spi=0x1001, hard=False)
        bench.backend.drain()
        assert token.alive
        assert await self._arrive(bench, 0x1001) is token
        assert [sa.spi for sa in token.sas] == [0x1001]

    async def test_an_sa_that_expired_is_gone(self, bench: Bench) -> None:
        await self._sa(bench, 0x1001)
        token = await self._arrive(bench, 0x1001)
        epoch = bench.backend.epoch
        await bench.expire_sa(src=bench.peer, dst=bench.local, spi=0x1001, hard=True)
        bench.backend.drain()
        assert bench.backend.epoch != epoch
        assert not token.alive
        assert token.sas == ()
        assert token.protected, "it vouches for the packets that it came with"

    async def test_a_stamp_that_was_lost_is_another_one(self, bench: Bench) -> None:
        await self._sa(bench, 0x1001)
        backend = bench.backend
        registration = await backend.register(IPPROTO_UDP, PORT)
        evidence = bench.stamped(0x1001, bench.peer, registration)
        backend.drain()
        token = backend.resolve(evidence)
        assert token.protected
        generations, epochs = [registration.generation], [backend.epoch]
        for change in (bench.lose_stamp, bench.restore_stamp):
            await change()
            backend.drain()
            generations.append(registration.generation)
            epochs.append(backend.epoch)
            assert backend.resolve(evidence).assurance is Assurance.UNKNOWN
        first, lost, second = generations
        assert lost == 0
        assert second not in (0, first)
        assert len(set(epochs)) == 3
        assert backend.resolve(bench.stamped(0x1001, bench.peer, registration)) is token
        registration.close()

    async def test_a_flush_takes_all(self, bench: Bench) -> None:
        await self._sa(bench, 0x1001)
        await self._sa(bench, 0x1002)
        token = await self._arrive(bench, 0x1002)
        await bench.flush_sas()
        bench.backend.drain()
        assert token.sas == ()

    async def test_a_policy_vouches_weakly_and_not_for_what_was_queued(self, bench: Bench) -> None:
        await self._sa(bench, 0x1001)
        before = bench.backend.policies
        await bench.add_policy(src=bench.peer, dst=bench.local)
        early = await self._arrive(bench, 0, stamped=False, after=before)
        assert early.assurance is Assurance.UNKNOWN
        await bench.pass_time(100)
        assert await self._arrive(bench, 0, stamped=False, after=before) is early
        token = await self._arrive(bench, 0, stamped=False)
        assert token.assurance is Assurance.POLICY
        assert token.privacy_protected is True
        assert token.protected is bench.backend.trust_policy
        assert token.policy_name
        assert not early.protected

    async def test_what_a_bypass_let_in_stays_in_doubt_when_it_goes(self, bench: Bench) -> None:
        await self._sa(bench, 0x1001)
        await bench.add_policy(src="any", dst=bench.local, priority=20)
        await bench.add_policy(src=bench.peer, dst=bench.local, priority=10, proto=None)
        bench.backend.drain()
        before, epoch = bench.backend.policies, bench.backend.epoch
        await bench.delete_policy(src=bench.peer, dst=bench.local)
        await bench.pass_time(100)
        token = await self._arrive(bench, 0, stamped=False, after=before)
        assert token.assurance is Assurance.UNKNOWN
        assert bench.backend.policies > before
        assert bench.backend.epoch != epoch
        token = await self._arrive(bench, 0, bench.other, stamped=False, after=before)
        assert token.assurance is Assurance.POLICY, "it was never for others"
        token = await self._arrive(bench, 0, stamped=False)
        assert token.assurance is Assurance.POLICY

    async def test_without_policy_and_stamp_nothing_is_known(self, bench: Bench) -> None:
        await self._sa(bench, 0x1001)
        await bench.add_policy(src=bench.peer, dst=bench.local)
        await self._arrive(bench, 0, stamped=False)
        epoch = bench.backend.epoch
        await bench.delete_policy(src=bench.peer, dst=bench.local)
        bench.backend.drain()
        assert bench.backend.epoch != epoch
        token = await self._arrive(bench, 0, stamped=False)
        assert token.assurance is Assurance.UNKNOWN
        token = await self._arrive(bench, 0, bench.other, stamped=False)
        assert token.assurance is Assurance.NONE

    async def test_a_policy_that_passes_comes_first(self, bench: Bench) -> None:
        await bench.add_policy(src="any", dst=bench.local, priority=20)
        await bench.add_policy(src=bench.peer, dst=bench.local, priority=10, proto=None)
        token = await self._arrive(bench, 0, stamped=False)
        assert token.assurance is Assurance.NONE
        token = await self._arrive(bench, 0, bench.other, stamped=False)
        assert token.assurance is Assurance.POLICY

    async def test_a_reply_is_sent_alike_or_not_at_all(self, bench: Bench) -> None:
        await self._sa(bench, 0x1001, reqid=7)
        await bench.add_sa(src=bench.local, dst=bench.peer, spi=0x2001, reqid=7, aead=GCM)
        await bench.add_policy(src=bench.local, dst=bench.peer, direction="out", reqid=7)
        token = await self._arrive(bench, 0x1001)
        local, peer, other = map(pack_address, (bench.local, bench.peer, bench.other))

        def refused(destination: bytes) -> bool:
            bench.backend.drain()
            flow = Flow(local, destination, IPPROTO_UDP, PORT, 40000)
            return bench.backend.sends_like(token, flow) is not None

        assert not refused(peer)
        assert refused(other)
        await bench.delete_policy(src=bench.local, dst=bench.peer, direction="out")
        await bench.add_policy(src=bench.local, dst=bench.peer, direction="out", proto=None)
        assert refused(peer)

    async def test_lost_events_make_everything_unknown_until_it_recovers(
        self, bench: Bench
    ) -> None:
        await self._sa(bench, 0x1001)
        token = await self._arrive(bench, 0x1001)
        await bench.lose_events()
        for spi in (0, 0x1001):
            assert (await self._arrive(bench, spi)).assurance is Assurance.UNKNOWN
        assert token.protected
        await bench.recover()
        assert await self._arrive(bench, 0x1001) is token

    async def test_doubtful_evidence_is_unknown(self, bench: Bench) -> None:
        await self._sa(bench, 0x1001)
        registration = await bench.backend.register(IPPROTO_UDP, PORT)
        evidence = bench.stamped(0x1001, bench.peer, registration)
        doubtful = Evidence(*_addresses(evidence), evidence.mark, evidence.generation, "cut off")
        token = bench.backend.resolve(doubtful)
        assert token.assurance is Assurance.UNKNOWN
        assert "cut off" in repr(token)
        registration.close()
        registration.close()

    async def test_another_generation_proves_nothing(self, bench: Bench) -> None:
        await self._sa(bench, 0x1001)
        registration = await bench.backend.register(IPPROTO_UDP, PORT)
        evidence = bench.stamped(0x1001, bench.peer, registration)
        bench.backend.drain()
        old = Evidence(*_addresses(evidence), evidence.mark, evidence.generation + 1)
        assert bench.backend.resolve(old).assurance is Assurance.UNKNOWN
        registration.close()

    async def test_subscribers_are_called_soon_after_a_change(self, bench: Bench) -> None:
        called = asyncio.Event()
        end = bench.backend.subscribe(called.set)
        await self._sa(bench, 0x1001)
        await self._arrive(bench, 0x1001)
        await bench.flush_sas()
        bench.backend.drain()
        async with asyncio.timeout(5):
            await called.wait()
        end()
        end()
        called.clear()
        await self._sa(bench, 0x1002)
        await bench.flush_sas()
        bench.backend.drain()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not called.is_set()

    async def test_closed_it_resolves_nothing_and_tokens_stay(self, bench: Bench) -> None:
        await self._sa(bench, 0x1001)
        token = await self._arrive(bench, 0x1001)
        registration = await bench.backend.register(IPPROTO_UDP, PORT)
        evidence = bench.stamped(0x1001, bench.peer, registration)
        epoch = bench.backend.epoch
        await bench.backend.aclose()
        await bench.backend.aclose()
        assert bench.backend.epoch != epoch
        registration.close()
        assert token.protected
        assert not token.alive
        with pytest.raises(BackendUnavailable):
            bench.backend.resolve(evidence)
        with pytest.raises(BackendUnavailable):
            await bench.backend.register(IPPROTO_UDP, PORT)
        with pytest.raises(BackendUnavailable):
            bench.backend.subscribe(bench.backend.drain)
        bench.backend.drain()


class IdentityConformance(Arrivals):
    """More tests, for backends that know whose SAs are. Their fixture's bench can identify."""

    async def _identify(self, bench: IdentityBench, spi: int, peer: str) -> None:
        await bench.identify(
            src=bench.peer, dst=bench.local, spi=spi, peer=peer, local="here.example.org"
        )
        bench.backend.drain()

    async def test_an_identity_comes_later_and_once(self, bench: IdentityBench) -> None:
        await self._sa(bench, 0x1001)
        token = await self._arrive(bench, 0x1001)
        assert (token.pending, token.protected, token.peer) == (True, True, None)
        waiting = asyncio.ensure_future(token.resolved(5))
        await self._identify(bench, 0x1001, "alice.example.org")
        assert await waiting is token
        assert token.pending is False
        assert str(token.peer) == "alice.example.org"
        assert str(token.local) == "here.example.org"
        assert await self._arrive(bench, 0x1001) is token

    async def test_a_rekey_by_the_same_peer_keeps_the_token(self, bench: IdentityBench) -> None:
        await self._sa(bench, 0x1001)
        await self._identify(bench, 0x1001, "alice.example.org")
        token = await self._arrive(bench, 0x1001)
        await self._sa(bench, 0x1002)
        late = await self._arrive(bench, 0x1002)
        assert late.peer is None
        await self._identify(bench, 0x1002, "alice.example.org")
        assert await late.resolved(5) is token
        assert await self._arrive(bench, 0x1002) is token
        assert [sa.spi for sa in token.sas] == [0x1001, 0x1002]

    async def test_another_peer_behind_an_address_is_another_token(
        self, bench: IdentityBench
    ) -> None:
        await self._sa(bench, 0x1001)
        await self._identify(bench, 0x1001, "alice.example.org")
        token = await self._arrive(bench, 0x1001)
        await self._sa(bench, 0x1002)
        await self._identify(bench, 0x1002, "bob.example.org")
        other = await self._arrive(bench, 0x1002)
        assert other is not token
        assert not other.equivalent(token)
        assert (str(token.peer), str(other.peer)) == ("alice.example.org", "bob.example.org")
        await bench.delete_sa(src=bench.peer, dst=bench.local, spi=0x1001)
        bench.backend.drain()
        assert not token.alive
        assert other.alive

    async def test_nobody_is_waited_for_long(self, bench: IdentityBench) -> None:
        await self._sa(bench, 0x1001)
        token = await self._arrive(bench, 0x1001)
        await bench.pass_time(PENDING_SECONDS + 0.1)
        assert not token.pending
        assert token.peer is None
        await self._identify(bench, 0x1001, "alice.example.org")
        assert token.peer is None
        assert str((await self._arrive(bench, 0x1001)).peer) == "alice.example.org"


def _addresses(evidence: Evidence) -> tuple[int, bytes, int, bytes, int]:
    return (
        evidence.protocol,
        evidence.local,
        evidence.local_port,
        evidence.peer,
        evidence.peer_port,
    )
