"""Identities that are declared, come late, and change on demand."""

from __future__ import annotations

import asyncio

import pytest
from test_memory import CLIENT, SERVER, arrive

from ipsec_aio.backends.memory import MemoryBackend
from ipsec_aio.identity import IToken
from ipsec_aio.mirror import TOMBSTONE_SECONDS
from ipsec_aio.tokens import PENDING_SECONDS

ALICE, BOB, ME = (f"{name}.example.org" for name in ("alice", "bob", "me"))


@pytest.fixture
def now() -> list[float]:
    return [1000.0]


@pytest.fixture
def backend(now) -> MemoryBackend:
    backend = MemoryBackend()
    backend.clock = backend.resolver.clock = lambda: now[0]
    return backend


def sa_of(backend, **fields):
    return backend.add_sa(src=CLIENT, dst=SERVER, **fields)


def test_they_are_declared_with_the_sa(backend):
    sa_of(backend, peer=ALICE, local=IToken.named(ME))
    token = arrive(backend)
    assert (token.peer, token.local) == (IToken.named(ALICE), IToken.named(ME))
    assert not token.pending


def test_without_any_nobody_is_awaited(backend):
    sa_of(backend)
    assert (arrive(backend).peer, arrive(backend).pending) == (None, False)


def test_a_rekey_keeps_them_and_the_token(backend):
    sa = sa_of(backend, peer=ALICE)
    token = arrive(backend)
    new = backend.rekey(sa)
    backend.delete_sa(sa)
    assert arrive(backend) is token
    assert token.sa == new


def test_a_rekey_may_be_another_peer_s(backend):
    sa = sa_of(backend, peer=ALICE, local=ME)
    token = arrive(backend)
    backend.rekey(sa, peer=BOB)
    other = arrive(backend)
    assert (token.peer, other.peer) == (IToken.named(ALICE), IToken.named(BOB))
    assert other.local == IToken.named(ME)
    assert other.sa != sa
    assert token.sa == sa


def test_they_can_be_told_later(backend):
    sa = sa_of(backend, identity_pending=True)
    token = arrive(backend)
    assert token.pending
    backend.identify(sa, peer=ALICE)
    assert (token.peer, token.pending) == (IToken.named(ALICE), False)
    assert arrive(backend) is token
    again = backend.rekey(sa, identity_pending=True)
    late = arrive(backend)
    assert late.pending
    backend.identify(again, peer=ALICE)
    assert late.peer == token.peer
    assert arrive(backend) is token


def test_too_late_is_not_at_all(backend, now):
    sa = sa_of(backend, identity_pending=True)
    token = arrive(backend)
    now[0] += PENDING_SECONDS + 0.1
    assert not token.pending
    assert not arrive(backend).pending
    backend.identify(sa, peer=ALICE)
    assert token.peer is None
    assert arrive(backend).peer == IToken.named(ALICE)


def test_they_can_change_behind_one_address(backend):
    sa = sa_of(backend, peer=ALICE)
    token = arrive(backend)
    epoch = backend.epoch
    backend.identify(sa, peer=BOB)
    assert backend.epoch != epoch
    assert (token.peer, arrive(backend).peer) == (IToken.named(ALICE), IToken.named(BOB))


def test_a_removed_sa_keeps_its_identities(backend):
    sa = sa_of(backend, peer=ALICE)
    sa_of(backend, spi=sa.spi, peer=BOB)
    assert arrive(backend).peer is None, "packets of either may wait"


@pytest.mark.parametrize("end", ["delete", "expire", "flush"])
def test_a_number_that_is_used_again_is_not_its_former_owner_s(backend, now, end):
    sa = sa_of(backend, peer=ALICE)
    hers = arrive(backend)
    {
        "delete": lambda: backend.delete_sa(sa),
        "expire": lambda: backend.expire(sa),
        "flush": backend.flush_sas,
    }[end]()
    sa_of(backend, spi=sa.spi, peer=BOB)
    assert arrive(backend).peer is None
    now[0] += TOMBSTONE_SECONDS + 0.1
    assert arrive(backend).peer == IToken.named(BOB)
    assert hers.peer == IToken.named(ALICE)


def test_declared_again_it_is_the_same(backend):
    sa = sa_of(backend, peer=ALICE)
    token = arrive(backend)
    sa_of(backend, spi=sa.spi, peer=ALICE)
    assert arrive(backend) is token


def test_events_that_are_late_do_not_mix_them_up(backend):
    sa = sa_of(backend, peer=ALICE)
    token = arrive(backend)
    backend.hold_events()
    backend.delete_sa(sa)
    sa_of(backend, spi=sa.spi, peer=BOB)
    assert arrive(backend) is token, "as far as it knows"
    backend.release_events()
    assert arrive(backend).peer is None


def test_what_cannot_be_said(backend):
    with pytest.raises(ValueError, match="identity_pending excludes"):
        sa_of(backend, peer=ALICE, identity_pending=True)
    with pytest.raises(ValueError, match=r"\*"):
        sa_of(backend, peer="*.example.org")
    sa = sa_of(backend)
    backend.delete_sa(sa)
    with pytest.raises(KeyError):
        backend.identify(sa, peer=ALICE)


def test_toml():
    text = f"""
    [[sa]]
    src = "{CLIENT}"
    dst = "{SERVER}"
    peer = "fqdn:{ALICE}"
    local = "me@example.org"
    [[sa]]
    src = "127.0.0.9"
    dst = "{SERVER}"
    identity_pending = true
    """
    backend = MemoryBackend.from_toml(text)
    assert str(arrive(backend).peer) == ALICE
    assert str(arrive(backend).local) == "me@example.org"
    assert arrive(backend, "127.0.0.9").pending
    with pytest.raises(ValueError, match=r"\[\[sa\]\] number 1: .*example"):
        MemoryBackend.from_toml(text.replace("fqdn:", "fqdn:*."))


async def test_they_can_be_awaited(backend):
    sa = sa_of(backend, identity_pending=True)
    token = arrive(backend)
    with pytest.raises(TimeoutError):
        await token.resolved(0)
    waiting = asyncio.ensure_future(token.resolved())
    await asyncio.sleep(0)
    assert not waiting.done()
    backend.identify(sa, peer=ALICE)
    assert (await waiting) is token
    assert token.peer == IToken.named(ALICE)


async def test_waiting_ends_by_itself():
    backend = MemoryBackend()
    sa_of(backend, identity_pending=True)
    token = arrive(backend)
    async with asyncio.timeout(PENDING_SECONDS + 3):
        assert await token.resolved() is token
    assert token.peer is None
    await backend.aclose()


async def test_a_pending_one_goes_without_when_the_backend_closes(backend):
    sa_of(backend, identity_pending=True)
    token = arrive(backend)
    await backend.aclose()
    assert (token.pending, token.peer, token.protected) == (False, None, True)


async def test_subscribers_are_told_that_waiting_ended_by_itself(monkeypatch):
    monkeypatch.setattr("ipsec_aio.backends.memory.PENDING_SECONDS", 0.05)
    backend = MemoryBackend()
    told = asyncio.Event()
    backend.subscribe(told.set)
    sa_of(backend, identity_pending=True)
    token = arrive(backend)
    assert token.pending
    await asyncio.sleep(0)
    told.clear()
    epoch = backend.epoch
    async with asyncio.timeout(5):
        await told.wait()
    assert backend.epoch != epoch
    assert not token.pending
    await backend.aclose()
