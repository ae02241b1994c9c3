"""A table of IKE SAs that follows a charon which comes, goes, and says odd things."""

from __future__ import annotations

import asyncio
import contextlib
from contextvars import ContextVar

import pytest
from fake_charon import FakeCharon, recording

from ipsec_aio.backends.ike import IKEWatcher
from ipsec_aio.backends.vici import ViciClient, ViciError
from ipsec_aio.errors import BackendUnavailable
from ipsec_aio.flow import pack_address
from ipsec_aio.ike import EVENTS
from ipsec_aio.sa import IPPROTO_ESP
from ipsec_aio.wire.vici import Packet, PacketType

LOCAL = pack_address("192.0.2.2")


def recorded(step, command=""):
    """The events of a step of the responder's recording: of a command, or those that came."""
    for step_, _, sent, received in recording("responder"):
        names = [packet.name for packet in sent if packet.type is PacketType.CMD_REQUEST]
        if step_ == step and names == [command] * bool(command):
            return [packet for packet in received if packet.type is PacketType.EVENT]
    raise LookupError(step)


class Listening(FakeCharon):
    """Lists what a test says."""

    def __init__(self, path):
        super().__init__(path)
        self.known |= set(EVENTS)
        self.lists([])

    def lists(self, packets):
        self.answers["list-sas"] = Packet(PacketType.CMD_RESPONSE), packets

    def tells(self, packets):
        for packet in packets:
            self.raise_event(packet.name, packet.message)


@pytest.fixture
async def charon(tmp_path):
    charon = Listening(tmp_path / "vici")
    await charon.start()
    yield charon
    await charon.stop()


@pytest.fixture
async def client(charon):
    async with contextlib.aclosing(ViciClient(str(charon.path), backoff=(0.001, 0.01))) as client:
        yield client


class Changes:
    """Waits for what changes make true."""

    def __init__(self):
        self.event = asyncio.Event()

    async def until(self, condition):
        async with asyncio.timeout(10):
            while not condition():
                self.event.clear()
                await self.event.wait()


@pytest.fixture
def changes():
    return Changes()


@pytest.fixture
async def watcher(client, changes):
    async with IKEWatcher(client, changed=changes.event.set) as watcher:
        yield watcher


def names(watcher):
    return sorted(sa.peer_id for sa in watcher.table.sas())


async def test_what_there_is(charon, watcher):
    charon.lists(recorded("psk up", "list-sas"))
    await watcher.synced()
    assert names(watcher) == ["a@example.org"]
    (sa,) = watcher.table.sas()
    (child,) = watcher.table.children(sa)
    (found,) = watcher.find(LOCAL, IPPROTO_ESP, child.spi_in)
    assert found.ike == sa
    assert found.alive


async def test_what_comes_and_goes(charon, watcher, changes):
    await watcher.synced()
    charon.tells(recorded("eap up"))
    await changes.until(lambda: names(watcher) == ["carol@example.org"])
    charon.tells(recorded("eap down"))
    await changes.until(lambda: names(watcher) == [])
    assert watcher.table.synced


async def test_after_a_move_the_ike_sa_is_listed_again(charon, watcher, changes):
    charon.lists(recorded("psk ike rekeyed", "list-sas"))
    await watcher.synced()
    charon.lists(recorded("psk moved", "list-sas"))
    charon.tells(recorded("psk moved"))
    await changes.until(lambda: watcher.table.peers_of_reqid(2))
    assert charon.asked[-1] == Packet(PacketType.CMD_REQUEST, "list-sas", {"ike-id": b"2"})


async def test_charon_is_restarted(charon, watcher, changes):
    charon.lists(recorded("psk up", "list-sas"))
    await watcher.synced()
    (child,) = watcher.table.children(watcher.table.sas()[0])
    await charon.stop()
    await changes.until(lambda: not watcher.table.synced)
    assert watcher.find(LOCAL, IPPROTO_ESP, child.spi_in)
    charon.path.unlink(missing_ok=True)
    charon.lists(recorded("eap up", "list-sas"))
    await charon.start()
    await watcher.synced()
    assert names(watcher) == ["carol@example.org"]
    (found,) = watcher.find(LOCAL, IPPROTO_ESP, child.spi_in)
    assert found.ike.peer_id == "a@example.org"
    assert not found.alive


async def test_a_listing_that_fails_is_tried_again(charon, client, changes, caplog):
    charon.answers["list-sas"] = (
        Packet(PacketType.CMD_RESPONSE, "", {"success": b"no", "errmsg": b"busy"}),
        [],
    )
    async with IKEWatcher(client) as watcher:
        await charon.until(lambda: sum(p.name == "list-sas" for p in charon.asked) == 3)
        assert not watcher.table.synced
        charon.lists(recorded("psk up", "list-sas"))
        await watcher.synced()
    assert "cannot be listed: list-sas: busy" in caplog.text


async def test_what_charon_tells_is_nobodys_who_began_to_watch(client):
    asking = ContextVar("asking", default="nobody")
    seen = []
    asking.set("a datagram")
    async with IKEWatcher(client, changed=lambda: seen.append(asking.get())) as watcher:
        await watcher.synced()
    assert set(seen) == {"nobody"}


async def test_an_event_that_is_not_understood_has_everything_listed(
    charon, watcher, changes, caplog
):
    await watcher.synced()
    charon.lists(recorded("psk up", "list-sas"))
    charon.raise_event("ike-updown", {})
    await changes.until(lambda: names(watcher) == ["a@example.org"])
    assert "ike-updown is not understood" in caplog.text


async def test_events_cut_off_during_the_listing_leave_it_unsynced(charon, watcher, changes):
    """What is listed then may be followed by events that nobody heard."""
    await watcher.synced()
    charon.answers["list-sas"] = None
    charon.raise_event("ike-updown", {})
    await charon.until(lambda: sum(p.name == "list-sas" for p in charon.asked) == 2)
    synced = []
    watcher._changed = lambda: (synced.append(watcher.table.synced), changes.event.set())
    charon.lists([])
    charon.tells(recorded("eap up"))
    listing = [w for w, events in charon.clients.items() if "list-sa" in events]
    for writer, events in charon.clients.items():
        if "ike-updown" in events:
            writer.transport.abort()
    await charon.until(
        lambda: not any("ike-updown" in e for e in charon.clients.values()) or synced
    )
    for writer in listing:
        writer.write(b"\0\0\0\1\1")
    await watcher.synced()
    assert synced[0] is False
    assert synced[-1] is True
    assert names(watcher) == []


async def test_events_cut_off_while_the_listing_fails(charon, watcher, changes):
    await watcher.synced()
    charon.answers["list-sas"] = None
    charon.raise_event("ike-updown", {})
    await charon.until(lambda: sum(p.name == "list-sas" for p in charon.asked) == 2)
    await charon.stop()
    await changes.until(lambda: not watcher.table.synced)
    charon.path.unlink(missing_ok=True)
    charon.lists(recorded("psk up", "list-sas"))
    await charon.start()
    await watcher.synced()
    assert names(watcher) == ["a@example.org"]


async def test_events_before_the_listing_worked_are_in_the_listing(charon, client, changes):
    charon.answers["list-sas"] = None
    client.timeout = 0.05
    async with IKEWatcher(client, changed=changes.event.set) as watcher:
        await charon.until(lambda: charon.asked and charon.asked[-1].name == "list-sas")
        charon.tells(recorded("eap up"))
        charon.lists(recorded("eap up", "list-sas"))
        await watcher.synced()
        assert names(watcher) == ["carol@example.org"]


async def test_an_event_that_charon_does_not_know(charon, client):
    charon.known.discard("ike-update")
    async with IKEWatcher(client) as watcher:
        with pytest.raises(ViciError, match="ike-update"):
            await watcher.synced()


async def test_closed(charon, client):
    watcher = IKEWatcher(client)
    with pytest.raises(BackendUnavailable):
        await watcher.synced()
    await watcher.aclose()
    async with watcher:
        await watcher.synced()
    assert not watcher.table.synced
    with pytest.raises(BackendUnavailable):
        await watcher.synced()
    await watcher.aclose()


async def test_a_closed_client(charon, client):
    await client.aclose()
    async with IKEWatcher(client) as watcher:
        with pytest.raises(BackendUnavailable, match="is closed"):
            await watcher.synced()


async def test_the_client_is_closed_first(charon, client, watcher, changes):
    await watcher.synced()
    await client.aclose()
    await changes.until(lambda: not watcher.table.synced)
    with pytest.raises(BackendUnavailable):
        await watcher.synced()


def listings(charon):
    return [packet.message for packet in charon.asked if packet.name == "list-sas"]


async def test_ike_sas_can_be_listed_again(charon, watcher, changes):
    charon.lists(recorded("psk up", "list-sas"))
    await watcher.synced()
    (sa,) = watcher.table.sas()
    (child,) = watcher.table.children(sa)
    before = watcher.table.told(child)
    watcher.look_again(sa.unique_id)
    watcher.look_again(sa.unique_id)
    await changes.until(lambda: watcher.table.told(child) > before)
    assert listings(charon) == [{}, {"ike-id": b"1"}]


async def test_everything_can_be_listed_again(charon, watcher, changes):
    await watcher.synced()
    charon.lists(recorded("psk up", "list-sas"))
    watcher.look_again()
    await changes.until(lambda: names(watcher) == ["a@example.org"])
    assert watcher.table.synced
    assert listings(charon) == [{}, {}]


async def test_what_cannot_be_listed_again_has_all_listed_again(charon, watcher, changes):
    charon.lists(recorded("psk up", "list-sas"))
    await watcher.synced()
    refused = Packet(PacketType.CMD_RESPONSE, "", {"success": b"no"}), []
    charon.answers["list-sas"] = refused
    watcher.look_again(1)
    async with asyncio.timeout(10):
        await charon.until(lambda: len(listings(charon)) > 2)
    charon.lists([])
    await changes.until(lambda: names(watcher) == [])
    assert watcher.table.synced


async def test_without_charon_nothing_is_listed(charon, watcher, changes):
    await watcher.synced()
    await charon.stop()
    await changes.until(lambda: not watcher.table.synced)
    changes.event.clear()
    watcher.look_again(1)
    await changes.event.wait()
    charon.lists(recorded("psk up", "list-sas"))
    await charon.start()
    await watcher.synced()
    assert names(watcher) == ["a@example.org"]


async def test_a_watcher_that_was_not_entered_or_is_closed_lists_nothing(client):
    watcher = IKEWatcher(client)
    watcher.look_again(1)
    async with watcher:
        await watcher.synced()
    watcher.look_again(1)


async def test_its_clock_is_asked_before_anything_is_taken_in(charon, client):
    times = iter(range(100, 1000))
    async with IKEWatcher(client, clock=lambda: float(next(times))) as watcher:
        charon.lists(recorded("psk up", "list-sas"))
        await watcher.synced()
        (sa,) = watcher.table.sas()
        (child,) = watcher.table.children(sa)
        assert watcher.table.told(child) == 100.0, "when the listing was asked for"
        assert watcher.find(LOCAL, IPPROTO_ESP, child.spi_in)
