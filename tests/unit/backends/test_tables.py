"""What backends with tables share: affinity, subscribers, timers."""

from __future__ import annotations

import asyncio
import threading
from contextvars import ContextVar
from dataclasses import replace

import pytest
from sas import esp, seen

from ipsec_aio.backends.tables import TableBackend
from ipsec_aio.enums import Assurance
from ipsec_aio.errors import BackendUnavailable
from ipsec_aio.events import SAAdded, SADeleted
from ipsec_aio.mirror import TOMBSTONE_SECONDS
from ipsec_aio.tokens import Resolver


class Tables(TableBackend):
    """The least of a backend, with a clock that can be put forward."""

    netns_cookie = None

    def __init__(self, **options) -> None:
        self.ahead = 0.0
        super().__init__(clock=lambda: asyncio.get_running_loop().time() + self.ahead, **options)
        self.mirror.begin_resync(0)
        self.mirror.finish_resync(0)
        self.resolver.generation = 1

    async def register(self, protocol, port):
        raise NotImplementedError

    def lookup_missing(self, key):
        return False


@pytest.fixture
async def backend():
    backend = Tables()
    backend.bind_loop()
    yield backend
    await backend.aclose()


async def test_events_settle_what_is_pending(backend):
    token = backend.resolve(seen(0x1001))
    assert token.assurance is Assurance.UNKNOWN
    backend.take([SAAdded(esp())])
    assert not backend.resolver.is_pending(token)
    assert token.protected


async def test_another_thread_is_turned_away(backend):
    errors = []

    def elsewhere():
        try:
            backend.resolve(seen())
        except BackendUnavailable as error:
            errors.append(str(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert errors == ["the tables backend belongs to another loop's thread"]


def test_another_loop_is_turned_away():
    async def bind():
        backend = Tables()
        backend.bind_loop()
        return backend

    backend = asyncio.run(bind())

    async def use():
        with pytest.raises(BackendUnavailable, match="another loop"):
            backend.subscribe(lambda: None)

    asyncio.run(use())


async def test_changes_of_stamp_and_interfaces_change_the_epoch(backend):
    for change in (
        lambda: backend.set_generation(2),
        lambda: backend.set_opaque_interfaces(True),
    ):
        epoch = backend.epoch
        change()
        assert backend.epoch != epoch
        epoch = backend.epoch
        change()
        assert backend.epoch == epoch
    assert backend.resolver.opaque_interfaces
    assert backend.resolver.generation == 2


async def test_a_subscriber_is_called_once_for_several_changes(backend):
    calls = []
    backend.subscribe(lambda: calls.append(1))
    for generation in (2, 3, 4):
        backend.set_generation(generation)
    assert not calls
    await asyncio.sleep(0.01)
    assert calls == [1]
    backend.set_generation(5)
    await asyncio.sleep(0.01)
    assert calls == [1, 1]


async def test_a_subscriber_is_called_in_the_name_of_nobody(backend):
    """Neither of him who changed something, nor of him for whom a timer was set."""
    asking = ContextVar("asking", default="nobody")
    calls = asyncio.Queue()
    backend.subscribe(lambda: calls.put_nowait(asking.get()))
    asking.set("somebody")
    backend.set_generation(2)
    assert await calls.get() == "nobody"
    backend.take([SAAdded(esp()), SADeleted(esp().key)])
    assert await calls.get() == "nobody"
    backend.ahead = TOMBSTONE_SECONDS + 1
    backend._tick()
    assert await calls.get() == "nobody"
    backend.tell()
    backend.set_generation(3)
    backend.tell()
    assert calls.get_nowait() == "nobody"


async def test_an_end_between_change_and_call(backend):
    calls = []
    end = backend.subscribe(lambda: calls.append(1))
    backend.set_generation(2)
    end()
    await asyncio.sleep(0.01)
    assert not calls


async def test_a_loop_that_is_gone_is_forgotten():
    backend = Tables()
    loop = asyncio.new_event_loop()

    async def subscribe():
        backend.subscribe(lambda: None)

    thread = threading.Thread(target=lambda: loop.run_until_complete(subscribe()))
    thread.start()
    thread.join()
    loop.close()
    backend.set_generation(7)
    assert not backend._subscribers
    await backend.aclose()


async def test_time_passes_for_those_who_only_listen(backend, monkeypatch):
    monkeypatch.setattr("ipsec_aio.mirror.TOMBSTONE_SECONDS", 0.05)
    changed = asyncio.Event()
    backend.take([SAAdded(esp())])
    backend.subscribe(changed.set)
    backend.take([SADeleted(esp().key)])
    for _ in range(2):
        async with asyncio.timeout(5):
            await changed.wait()
        changed.clear()
    assert not list(backend.mirror.tombstones())
    assert backend.mirror.next_deadline() is None


async def test_time_passes_when_somebody_drains(backend):
    backend.take([SAAdded(esp())])
    backend.take([SADeleted(esp().key)])
    epoch = backend.epoch
    backend.drain()
    assert backend.epoch == epoch
    backend.ahead = TOMBSTONE_SECONDS
    backend.drain()
    assert backend.epoch != epoch


async def test_an_interface_that_went_is_a_change_that_packets_are_judged_by(backend):
    before, epoch = backend.policies, backend.epoch
    backend.set_opaque_interfaces(True)
    assert (backend.policies, backend.epoch) == (before, epoch + 1)
    backend.set_opaque_interfaces(False)
    backend.set_opaque_interfaces(False)
    assert (backend.policies, backend.epoch) == (before + 1, epoch + 2)
    queued = seen(after=before)
    assert backend.resolve(queued).assurance is Assurance.UNKNOWN
    assert backend.resolve(replace(queued, after=before + 1)).assurance is Assurance.NONE


async def test_waiters_hear_of_the_end():
    backend = Tables()
    token = backend.resolve(seen(0x1001))
    waiting = asyncio.ensure_future(token.resolved())
    await asyncio.sleep(0)
    await backend.aclose()
    assert await waiting is token
    assert "closed" in token.information_string
    assert backend._timer is None


async def test_a_timer_of_another_loop_is_replaced():
    backend = Tables()

    async def subscribe():
        backend.subscribe(lambda: None)
        backend.take([SAAdded(esp())])
        backend.take([SADeleted(esp().key)])

    thread = threading.Thread(target=lambda: asyncio.run(subscribe()))
    thread.start()
    thread.join()
    backend.subscribe(lambda: None)
    assert backend._timer[0] is asyncio.get_running_loop()
    await backend.aclose()


async def test_an_answer_found_by_asking_changes_the_epoch_too(backend):
    calls = []
    backend.subscribe(lambda: calls.append(1))
    backend.resolve(seen(0x1001))

    def find(key):
        backend.mirror.apply(SAAdded(esp(0x1001)), 0)
        return True

    backend.resolver.lookup_missing = find
    assert backend.resolve(seen(0x1001, peer_port=1)).protected
    await asyncio.sleep(0.01)
    assert calls == [1]


async def test_what_is_settled_while_the_wait_begins_is_not_waited_for(backend, monkeypatch):
    token = backend.resolve(seen(0x1001))
    monkeypatch.setattr(backend, "_arm", lambda: backend.resolver.settle(token))
    backend.mirror.apply(SAAdded(esp()), 0)
    assert backend.resolver.is_pending(token)
    monkeypatch.setattr(type(backend.resolver), "settle", _unwilling_at_first())
    assert await token.resolved() is token
    assert token.protected


def _unwilling_at_first():
    """Play the thread that settles a token between the first look and the wait."""
    settle = Resolver.settle
    calls = []

    def late(self, token):
        calls.append(token)
        if len(calls) > 1:
            settle(self, token)

    return late
