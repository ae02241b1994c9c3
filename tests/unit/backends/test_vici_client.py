"""The VICI client against a charon that repeats what a real one said."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket

import pytest
from fake_charon import FakeCharon, recording

from ipsec_aio.backends.vici import (
    STREAMED,
    ViciClient,
    ViciConnected,
    ViciDisconnected,
    ViciError,
    ViciEvent,
)
from ipsec_aio.errors import (
    BackendDenied,
    BackendError,
    BackendOverrun,
    BackendUnavailable,
    CodecError,
)
from ipsec_aio.wire.vici import Packet, PacketReader, PacketType, encode_packet

UP = {"up": b"yes", "net": {"uniqueid": b"1"}}
BACKOFF = (0.001, 0.01)


@pytest.fixture
async def charon(tmp_path):
    charon = FakeCharon(tmp_path / "vici")
    await charon.start()
    yield charon
    await charon.stop()


@pytest.fixture
async def client(charon):
    client = ViciClient(f"unix://{charon.path}", timeout=5, backoff=BACKOFF)
    yield client
    await client.aclose()


@contextlib.contextmanager
def as_nobody():
    """Drop root, where the tests have it."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


async def collect(iterator):
    return [each async for each in iterator]


async def take(stream, count):
    return [await asyncio.wait_for(anext(stream), 10) for _ in range(count)]


class TestFake:
    @pytest.mark.parametrize("host", ["initiator", "responder"])
    async def test_it_answers_as_charon_did(self, host, tmp_path):
        """For every request of a recording, the fake sends the same packets, or as many kinds."""
        charon = FakeCharon(tmp_path / "fake", host)
        await charon.start()
        reader, writer = await asyncio.open_unix_connection(charon.path)
        cutter = PacketReader()
        for step, connection, sent, received in recording(host):
            if connection != "commands":
                continue
            answers = []
            for packet in sent:
                writer.write(encode_packet(packet.type, packet.name, packet.message))
                while not answers or answers[-1].type is PacketType.EVENT or len(answers) < 1:
                    answers += cutter.feed(await reader.read(1 << 20))
                kinds = [(p.type, p.name) for p in answers]
                expected, received = _split(received)
                assert set(kinds) >= {(p.type, p.name) for p in expected}, step
                if step in ("version", "stats", "conns", "certs"):
                    assert answers == expected
                answers = []
        writer.close()
        await writer.wait_closed()
        await charon.stop()


def _split(received):
    """Cut off the packets up to the first that ends an exchange."""
    for index, packet in enumerate(received):
        if packet.type is not PacketType.EVENT:
            return received[: index + 1], received[index + 1 :]
    raise AssertionError("no answer")


class TestRequests:
    async def test_version(self, charon, client):
        version = await client.request("version")
        assert version["daemon"] == b"charon"
        assert version["version"] == b"5.9.8"

    async def test_many_at_once_share_a_connection_and_keep_their_answers(self, charon, client):
        names = ["version", "stats"] * 10
        answers = await asyncio.gather(*map(client.request, names))
        assert [("daemon" in a, "uptime" in a) for a in answers] == [
            (n == "version", n == "stats") for n in names
        ]
        assert len(charon.clients) == 1

    async def test_the_message_arrives(self, charon, client):
        charon.answers["terminate"] = Packet(PacketType.CMD_RESPONSE), []
        await client.request("terminate", {"ike": "net", "timeout": -1, "force": True})
        assert charon.asked[-1] == Packet(
            PacketType.CMD_REQUEST, "terminate", {"ike": b"net", "timeout": b"-1", "force": b"yes"}
        )

    async def test_an_unknown_command(self, client):
        with pytest.raises(ViciError, match="no-such-command: charon knows no such command") as e:
            await client.request("no-such-command")
        assert e.value.command == "no-such-command"
        assert e.value.answer == {}
        assert (await client.request("version"))["daemon"] == b"charon"

    @pytest.mark.parametrize(
        ("answer", "says"),
        [
            ({"success": b"no", "errmsg": b"not found"}, "not found"),
            ({"success": b"no"}, "refused"),
            ({"success": b"no", "errmsg": [b"odd"]}, "refused"),
            ({"success": [b"yes"]}, "refused"),
        ],
    )
    async def test_a_refused_command(self, charon, client, answer, says):
        charon.answers["initiate"] = Packet(PacketType.CMD_RESPONSE, "", answer), []
        with pytest.raises(ViciError, match=f"initiate: {says}") as caught:
            await client.request("initiate", {"child": "x"})
        assert caught.value.answer == answer
        assert isinstance(caught.value, BackendError)

    async def test_what_has_no_encoding_is_not_sent(self, charon, client):
        with pytest.raises(CodecError):
            await client.request("version", {"k": None})
        assert charon.asked == []

    async def test_no_answer_in_time(self, charon, client):
        charon.answers["stats"] = None
        with pytest.raises(BackendUnavailable, match=r"did not answer in 0\.01 s") as caught:
            await client.request("stats", timeout=0.01)
        assert caught.value.errno == errno.ETIMEDOUT

    async def test_the_answer_to_a_request_that_was_given_up_is_not_the_next_ones(
        self, charon, client
    ):
        charon.answers["slow"] = None
        task = asyncio.create_task(client.request("slow"))
        await charon.until(lambda: charon.asked)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        charon.answers["slow"] = encode_packet(PacketType.CMD_RESPONSE, "", {"late": "yes"})
        assert "daemon" in await client.request("version")

    async def test_charon_restarted_between_requests(self, charon, client):
        await client.request("version")
        await charon.stop()
        charon.path.unlink(missing_ok=True)
        await charon.start()
        while True:
            # The end of the old connection may be seen only when it is used.
            with contextlib.suppress(BackendUnavailable):
                assert (await client.request("version"))["daemon"] == b"charon"
                break

    async def test_the_end_of_the_connection_that_was_seen_is_no_error(self, charon, client):
        await client.request("version")
        (old,) = client._connections
        charon_writer = next(iter(charon.clients))
        charon_writer.transport.abort()
        await asyncio.gather(old._reader.read(), return_exceptions=True)
        assert "daemon" in await client.request("version")
        assert old not in client._connections

    async def test_hung_up_in_mid_request(self, charon, client):
        charon.answers["stats"] = None
        task = asyncio.create_task(client.request("stats"))
        await charon.until(lambda: charon.asked)
        next(iter(charon.clients)).close()
        with pytest.raises(BackendUnavailable, match="closed the connection"):
            await task

    @pytest.mark.parametrize(
        ("data", "says"),
        [
            (b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not speak VICI"),
            (b"\0\0\0\1\5", "EVENT_CONFIRM in answer to version"),
            (b"\0\0\0\1\1", "is not strongSwan"),
        ],
    )
    async def test_not_strongswan(self, charon, client, data, says):
        charon.answers["version"] = data
        with pytest.raises(BackendUnavailable, match=says):
            await client.open()

    async def test_an_end_inside_a_packet(self, charon, client):
        charon.answers["version"] = b"\0\0\0\7\1"
        task = asyncio.create_task(client.open())
        await charon.until(lambda: charon.asked)
        next(iter(charon.clients)).close()
        with pytest.raises(BackendUnavailable, match="ended 5 bytes into a packet"):
            await task


class TestOpening:
    async def test_entering_asks_for_the_version(self, charon):
        async with ViciClient(str(charon.path)) as client:
            assert [p.name for p in charon.asked] == ["version"]
            assert repr(client) == f"<ViciClient {charon.path}>"
        assert repr(client).endswith(" closed>")

    async def test_no_socket(self, tmp_path):
        with pytest.raises(
            BackendUnavailable, match=r"nothing listens at .*is charon running"
        ) as e:
            async with ViciClient(f"unix://{tmp_path}/none"):
                raise AssertionError
        assert e.value.errno == errno.ENOENT

    async def test_a_socket_that_nobody_serves(self, tmp_path):
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(tmp_path / "left"))
        with pytest.raises(BackendUnavailable) as caught:
            await ViciClient(str(tmp_path / "left")).open()
        assert caught.value.errno == errno.ECONNREFUSED

    async def test_no_permission(self, charon):
        charon.path.chmod(0)
        client = ViciClient(str(charon.path))
        with (
            as_nobody(),
            pytest.raises(BackendDenied, match=r"no permission.*charon\.group") as caught,
        ):
            await client.open()
        assert caught.value.errno == errno.EACCES

    async def test_connecting_takes_too_long(self, charon, monkeypatch):
        async def never(path):
            await asyncio.get_running_loop().create_future()

        monkeypatch.setattr(asyncio, "open_unix_connection", never)
        with pytest.raises(BackendUnavailable, match=r"did not accept in 0\.01 s") as caught:
            await ViciClient(str(charon.path), timeout=0.01).open()
        assert caught.value.errno == errno.ETIMEDOUT

    async def test_nobody_accepts(self, tmp_path):
        with socket.socket(socket.AF_UNIX) as full, contextlib.ExitStack() as stack:
            full.bind(str(tmp_path / "full"))
            full.listen(0)
            while True:
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
                waiting.setblocking(False)
                try:
                    waiting.connect(str(tmp_path / "full"))
                except BlockingIOError:
                    break
            with pytest.raises(BackendUnavailable):
                await ViciClient(str(tmp_path / "full"), timeout=0.01).open()

    async def test_tcp(self, charon):
        server = await asyncio.start_server(charon._serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with ViciClient(f"tcp://127.0.0.1:{port}") as client:
            assert (await client.request("version"))["version"] == b"5.9.8"
        server.close()
        while charon.serving:
            await asyncio.wait(charon.serving)
        await server.wait_closed()

    @pytest.mark.parametrize("address", ["", "unix://", "unix://host/p", "tcp://host", "ftp://x/"])
    async def test_other_addresses(self, address):
        with pytest.raises(ValueError, match="not unix"):
            ViciClient(address)

    async def test_closed(self, charon, client):
        await client.open()
        await client.aclose()
        await client.aclose()
        for use in (client.request("version"), collect(client.stream("list-sas"))):
            with pytest.raises(BackendUnavailable, match="is closed"):
                await use
        with pytest.raises(BackendUnavailable, match="is closed"):
            client.events("ike-updown")

    async def test_closed_while_connecting(self, charon, client):
        task = asyncio.create_task(client.request("version"))
        await asyncio.sleep(0)
        await client.aclose()
        with pytest.raises(BackendUnavailable):
            await task

    async def test_another_loop(self, charon, client):
        await client.open()

        def elsewhere():
            return asyncio.run(client.request("version"))

        with pytest.raises(BackendUnavailable, match="belongs to another loop"):
            await asyncio.to_thread(elsewhere)


class TestStreams:
    async def test_list_sas(self, charon, client):
        sas = await collect(client.stream("list-sas"))
        assert [list(sa) for sa in sas] == [["x509"]] * 4
        assert sas[0]["x509"]["child-sas"]["net-6"]["state"] == b"INSTALLED"
        assert not client._connections

    async def test_what_streams_is_registered_for_first(self, charon, client):
        await collect(client.stream("list-conns", {"ike": "x"}))
        assert charon.asked == [
            Packet(PacketType.EVENT_REGISTER, "list-conn"),
            Packet(PacketType.CMD_REQUEST, "list-conns", {"ike": b"x"}),
        ]

    @pytest.mark.parametrize("command", [c for c in STREAMED if c.startswith("list-")])
    async def test_every_listing(self, charon, client, command):
        charon.known.add(STREAMED[command])
        charon.answers.setdefault(command, (Packet(PacketType.CMD_RESPONSE), []))
        assert isinstance(await collect(client.stream(command)), list)

    async def test_certificates_are_der(self, charon, client):
        certificates = await collect(client.stream("list-certs"))
        assert len(certificates) == 6
        assert all(c["data"].startswith(b"\x30\x82") for c in certificates)

    async def test_left_early(self, charon, client):
        async with contextlib.aclosing(client.stream("list-sas")) as sas:
            async for _ in sas:
                break
        assert not client._connections
        assert "daemon" in await client.request("version")

    async def test_requests_go_on_beside_it(self, charon, client):
        async with contextlib.aclosing(client.stream("list-sas")) as sas:
            await anext(sas)
            assert "daemon" in await client.request("version")
            assert len(await collect(sas)) == 3

    async def test_a_named_event(self, charon, client):
        charon.known.add("list-thing")
        thing = Packet(PacketType.EVENT, "list-thing", {"a": b"b"})
        charon.answers["list-things"] = Packet(PacketType.CMD_RESPONSE), [thing]
        things = client.stream("list-things", event="list-thing")
        assert await collect(things) == [{"a": b"b"}]

    async def test_an_unlisted_command(self, client):
        with pytest.raises(ValueError, match="name its event"):
            await collect(client.stream("version"))

    async def test_an_unknown_event(self, client):
        with pytest.raises(ViciError, match="no-such: charon knows no such event"):
            await collect(client.stream("list-sas", event="no-such"))

    async def test_a_refusal_after_the_stream(self, charon, client):
        log = Packet(PacketType.EVENT, "control-log", {"msg": b"trying"})
        answer = Packet(PacketType.CMD_RESPONSE, "", {"success": b"no", "errmsg": b"timeout"})
        charon.answers["initiate"] = answer, [log]
        got = []

        async def run():
            async for each in client.stream("initiate", {"child": "net"}):
                got.append(each)

        with pytest.raises(ViciError, match="initiate: timeout"):
            await run()
        assert got == [{"msg": b"trying"}]

    async def test_no_answer_in_time(self, charon, client):
        charon.answers["list-sas"] = None
        with pytest.raises(BackendUnavailable, match=r"did not answer in 0\.01 s"):
            await collect(client.stream("list-sas", timeout=0.01))
        assert not client._connections

    async def test_closed_in_mid_stream(self, charon, client):
        charon.answers["list-sas"] = b""
        task = asyncio.create_task(collect(client.stream("list-sas")))
        await charon.until(lambda: len(charon.asked) == 2)
        await client.aclose()
        with pytest.raises(BackendUnavailable):
            await task


class TestEvents:
    async def test_events(self, charon, client):
        async with client.events("ike-updown", "child-updown") as events:
            assert await take(events, 1) == [ViciConnected()]
            charon.raise_event("child-updown", UP)
            charon.raise_event("child-rekey", {})
            charon.raise_event("ike-updown", {})
            assert await take(events, 2) == [
                ViciEvent("child-updown", UP),
                ViciEvent("ike-updown", {}),
            ]

    async def test_iterating_is_enough_and_the_client_closes_it(self, charon, client):
        events = client.events("ike-updown")
        assert await take(events, 1) == [ViciConnected()]
        task = asyncio.create_task(collect(events))
        await asyncio.sleep(0)
        await client.aclose()
        assert await task == []
        assert await collect(events) == []
        await events.aclose()

    async def test_never_started(self, client):
        events = client.events("ike-updown")
        await events.aclose()
        assert await collect(events) == []

    async def test_charon_restarts(self, charon, client):
        async with client.events("ike-updown") as events:
            await take(events, 1)
            await charon.stop()
            (gone,) = await take(events, 1)
            assert isinstance(gone, ViciDisconnected)
            assert isinstance(gone.error, BackendUnavailable)
            charon.path.unlink(missing_ok=True)
            await charon.start()
            assert await take(events, 1) == [ViciConnected()]
            charon.raise_event("ike-updown", UP)
            assert await take(events, 1) == [ViciEvent("ike-updown", UP)]

    async def test_restarts_again_and_again(self, charon, client):
        async with client.events("ike-updown") as events:
            for number in range(1, 6):
                assert await take(events, 1) == [ViciConnected()]
                assert events.connection == number
                charon.hang_up()
                (gone,) = await take(events, 1)
                assert "closed the connection" in str(gone.error) or gone.error.errno

    async def test_charon_comes_later(self, tmp_path):
        charon = FakeCharon(tmp_path / "later")
        client = ViciClient(str(charon.path), backoff=BACKOFF)
        async with client.events("ike-updown") as events:
            (away,) = await take(events, 1)
            assert away.error.errno == errno.ENOENT
            await charon.start()
            assert await take(events, 1) == [ViciConnected()]
        await client.aclose()
        await charon.stop()

    async def test_absence_is_told_once(self, tmp_path, monkeypatch):
        attempts = asyncio.Semaphore(0)

        async def absent(path):
            attempts.release()
            raise FileNotFoundError(errno.ENOENT, "No such file")

        monkeypatch.setattr(asyncio, "open_unix_connection", absent)
        client = ViciClient(str(tmp_path / "none"), backoff=BACKOFF)
        async with client.events("ike-updown") as events:
            for _ in range(4):
                await attempts.acquire()
            assert isinstance((await take(events, 1))[0], ViciDisconnected)
            assert events.connection == 0
            assert not events._queue

    async def test_an_unknown_event(self, charon, client):
        async with client.events("ike-updown", "no-such") as events:
            with pytest.raises(ViciError, match="no-such: charon knows no such event"):
                await take(events, 1)
            with pytest.raises(ViciError):
                await take(events, 1)
        assert not client._connections

    async def test_no_names(self, client):
        with pytest.raises(ValueError, match="no events"):
            client.events()

    @pytest.mark.parametrize(
        ("data", "says"),
        [
            (b"\0\0\0\1\1", "answers what nobody asked"),
            (b"\0\0\0\1\x63", "does not speak VICI"),
            (b"\xff\xff\xff\xff", "does not speak VICI"),
        ],
    )
    async def test_nonsense_is_a_disconnection(self, charon, client, data, says):
        async with client.events("ike-updown") as events:
            await take(events, 1)
            charon.say(data)
            gone, back = await take(events, 2)
            assert says in str(gone.error)
            assert back == ViciConnected()

    async def test_a_wrong_answer_to_the_registration(self, charon, client):
        charon._answer = lambda packet, names, writer: writer.write(b"\0\0\0\1\1")
        async with client.events("ike-updown") as events:
            (gone,) = await take(events, 1)
            assert "answers CMD_RESPONSE to a register" in str(gone.error)

    async def test_events_between_registrations_are_kept(self, charon, client):
        answer = charon._answer

        def eager(packet, names, writer):
            if packet.name == "child-updown":
                writer.write(encode_packet(PacketType.EVENT, "ike-updown", UP))
            answer(packet, names, writer)

        charon._answer = eager
        async with client.events("ike-updown", "child-updown") as events:
            assert await take(events, 2) == [ViciConnected(), ViciEvent("ike-updown", UP)]

    async def test_events_that_nobody_takes_are_dropped_and_that_is_told(self, charon, client):
        async with client.events("ike-updown", limit=3) as events:
            await take(events, 1)
            for _ in range(4):
                charon.raise_event("ike-updown", UP)
            await charon.until(lambda: not charon.clients)
            gone, back = await take(events, 2)
            assert isinstance(gone.error, BackendOverrun)
            assert "more than 3 events" in str(gone.error)
            assert back == ViciConnected()
            charon.raise_event("ike-updown", {})
            assert await take(events, 1) == [ViciEvent("ike-updown", {})]

    async def test_no_reconnection_before_the_loss_was_seen(self, charon, client):
        async with client.events("ike-updown", limit=1) as events:
            await take(events, 1)
            for _ in range(2):
                charon.raise_event("ike-updown", UP)
            await charon.until(lambda: not charon.clients)
            assert len(charon.asked) == 1
            assert isinstance((await take(events, 1))[0], ViciDisconnected)
            assert await take(events, 1) == [ViciConnected()]

    async def test_two_streams(self, charon, client):
        async with client.events("ike-updown") as one, client.events("child-updown") as two:
            await take(one, 1)
            await take(two, 1)
            charon.raise_event("child-updown", UP)
            charon.raise_event("ike-updown", UP)
            assert (await take(one, 1))[0].name == "ike-updown"
            assert (await take(two, 1))[0].name == "child-updown"

    async def test_a_failure_of_ours_reaches_who_iterates(self, charon, client):
        client.backoff = None
        async with client.events("ike-updown") as events:
            with pytest.raises(TypeError):
                await take(events, 1)
