"""``create_datagram_endpoint``: the loop's own arguments and errors; failure leaves nothing."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from datagram_tools import HERE, Plain, Tokened, Witnessing, close, memory

import ipsec_aio
from ipsec_aio import Assurance, create_datagram_endpoint, set_default_backend
from ipsec_aio.net import datagram, endpoints


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(HERE)
        return int(sock.getsockname()[1])


def sockets_of_this_process() -> set[str]:
    found: set[str] = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith("socket:"):
                found.add(target)
    return found


@pytest.fixture
def nothing_left() -> Iterator[None]:
    before = sockets_of_this_process()
    yield
    assert sockets_of_this_process() <= before


async def stock_error(*args: Any, **kwargs: Any) -> BaseException:
    """What asyncio's own loop says to these arguments."""

    async def call() -> BaseException:
        try:
            loop = asyncio.get_running_loop()
            transport, _ = await loop.create_datagram_endpoint(*args, **kwargs)
        except Exception as error:
            return error
        transport.close()
        raise AssertionError("asyncio takes it")

    def run() -> BaseException:
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            return runner.run(call())

    return await asyncio.to_thread(run)


class TestArguments:
    @pytest.mark.parametrize(
        ("args", "kwargs"),
        [
            ((), {}),
            ((None, None), {}),
            (("127.0.0.1",), {}),
            ((("127.0.0.1",),), {}),
            ((("127.0.0.1", 0, 0),), {}),
            ((None, ["127.0.0.1", 1]), {}),
            ((("127.0.0.1", 0), ("::1", 1)), {}),
            ((("127.0.0.1", 0),), {"family": socket.AF_INET6}),
            ((("192.0.2.1", 0),), {}),
            ((("127.0.0.1", 0),), {"proto": socket.IPPROTO_SCTP}),
            ((("127.0.0.1", 70_000),), {}),
            ((("127.0.0.1", "no service"),), {}),
            ((b"\0x",), {"family": socket.AF_UNIX}),
            ((("host", 1),), {"family": socket.AF_UNIX}),
        ],
    )
    async def test_errors_are_the_loops(self, args: Any, kwargs: Any, nothing_left: None) -> None:
        expected = await stock_error(Plain, *args, **kwargs)
        with pytest.raises(type(expected)) as caught:
            await create_datagram_endpoint(Plain, *args, backend=memory(), **kwargs)
        assert type(caught.value) is type(expected)
        assert str(caught.value) == str(expected)

    @pytest.mark.parametrize(
        "kwargs",
        [
            {"local_addr": HERE},
            {"remote_addr": ("127.0.0.1", 1)},
            {"family": 1},
            {"proto": 1},
            {"flags": 1},
            {"reuse_port": True},
            {"allow_broadcast": True},
        ],
    )
    async def test_a_socket_excludes_what_would_make_one(self, kwargs: Any) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            expected = await stock_error(Plain, sock=sock, **kwargs)
            with pytest.raises(ValueError, match="socket modifier keyword arguments") as caught:
                await create_datagram_endpoint(Plain, sock=sock, backend=memory(), **kwargs)
            assert str(caught.value) == str(expected)
            assert sock.fileno() >= 0

    async def test_a_stream_socket_is_refused(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            expected = await stock_error(Plain, sock=sock)
            with pytest.raises(ValueError, match="was expected, got") as caught:
                await create_datagram_endpoint(Plain, sock=sock, backend=memory())
            assert str(caught.value) == str(expected)

    async def test_a_raw_socket_is_taken_and_proves_nothing(self) -> None:
        try:
            sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, 253)
        except PermissionError:
            pytest.skip("raw sockets need CAP_NET_RAW")
        sock.bind(("127.0.0.1", 0))
        transport, protocol = await create_datagram_endpoint(Tokened, sock=sock, backend=memory())
        transport.sendto(b"raw", ("127.0.0.1", 0))
        data, _, ptoken = (await protocol.log.until("data"))[0]
        assert data.endswith(b"raw")
        assert ptoken.assurance is Assurance.UNKNOWN
        await close(transport)

    async def test_a_failing_factory_closes_the_socket(self, nothing_left: None) -> None:
        backend = Witnessing()

        def fail() -> Any:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await create_datagram_endpoint(fail, HERE, backend=backend)
        assert [stamp.closed for stamp in backend.stamps] == [True]

    async def test_a_failure_leaves_a_given_socket_alone(self) -> None:
        def fail() -> Any:
            raise ZeroDivisionError

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            with pytest.raises(ZeroDivisionError):
                await create_datagram_endpoint(fail, sock=sock, backend=memory())
            sock.bind(HERE)

    async def test_a_transport_that_cannot_be_made_leaves_nothing(
        self, monkeypatch: pytest.MonkeyPatch, nothing_left: None
    ) -> None:
        watching = 0

        class Watched(Witnessing):
            def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
                nonlocal watching
                watching += 1
                return super().subscribe(callback)

        def no_memory(*_: object) -> None:
            raise MemoryError

        monkeypatch.setattr(datagram, "batch_for", no_memory)
        backend = Watched()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(HERE)
            for options in ({"local_addr": HERE}, {"sock": sock}):
                with pytest.raises(MemoryError):
                    await create_datagram_endpoint(Plain, **options, backend=backend)
            # Nor does what was made of it say that it was not closed.
            gc.collect()
            assert sock.fileno() >= 0
        assert watching == 0
        assert [stamp.closed for stamp in backend.stamps] == [True, True]

    @pytest.mark.parametrize(
        ("result", "message"),
        [
            (object(), "no connection_made"),
            (None, "no connection_made"),
            (Plain, "not an instance"),
            (Tokened, "not an instance"),
            (ipsec_aio.Protocol(), "stream protocol"),
            (ipsec_aio.BufferedProtocol(), "stream protocol"),
        ],
    )
    async def test_what_is_no_protocol(self, result: Any, message: str, nothing_left: None) -> None:
        with pytest.raises(TypeError, match=message):
            await create_datagram_endpoint(lambda: result, HERE, backend=memory())

    async def test_a_class_that_works_as_a_protocol(self) -> None:
        class Static:
            @staticmethod
            def connection_made(transport: Any) -> None:
                transport.close()

            @classmethod
            def connection_lost(cls, exc: Any) -> None:
                pass

        factory: Any = lambda: Static  # noqa: E731
        transport, protocol = await create_datagram_endpoint(factory, HERE, backend=memory())
        assert protocol is Static
        assert transport.is_closing()
        await asyncio.sleep(0)


class TestSockets:
    async def test_reuse_port(self) -> None:
        port = free_port()
        one, _ = await create_datagram_endpoint(
            Plain, ("127.0.0.1", port), reuse_port=True, backend=memory()
        )
        two, _ = await create_datagram_endpoint(
            Plain, ("127.0.0.1", port), reuse_port=True, backend=memory()
        )
        with pytest.raises(OSError, match="Address already in use"):
            await create_datagram_endpoint(Plain, ("127.0.0.1", port), backend=memory())
        await close(one, two)

    async def test_reuse_port_where_there_is_none(
        self, monkeypatch: pytest.MonkeyPatch, nothing_left: None
    ) -> None:
        monkeypatch.setattr(socket, "SO_REUSEPORT", 9999)
        with pytest.raises(ValueError, match=r"reuse_port not supported .*defined but not"):
            await create_datagram_endpoint(Plain, HERE, reuse_port=True, backend=memory())
        monkeypatch.delattr(socket, "SO_REUSEPORT")
        with pytest.raises(ValueError, match="reuse_port not supported"):
            await create_datagram_endpoint(Plain, HERE, reuse_port=True, backend=memory())

    async def test_broadcast(self) -> None:
        port = free_port()
        transport, protocol = await create_datagram_endpoint(
            Tokened,
            ("0.0.0.0", port),
            ("127.255.255.255", port),
            allow_broadcast=True,
            backend=memory(),
        )
        sock = transport.get_extra_info("socket")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST) == 1
        assert transport.get_extra_info("peername") is None
        assert protocol.log.of("made") == [(None,)]
        transport.sendto(b"everybody")
        ((data, _, token),) = await protocol.log.until("data")
        assert data == b"everybody"
        assert not token.protected
        with pytest.raises(ValueError, match="Invalid address"):
            transport.sendto(b"x", ("127.0.0.1", port))
        await close(transport)

    async def test_a_broadcaster_that_is_not_bound(self) -> None:
        transport, _ = await create_datagram_endpoint(
            Plain, remote_addr=("127.255.255.255", 9), allow_broadcast=True, backend=memory()
        )
        transport.sendto(b"x")
        transport.close()
        transport.sendto(b"x")
        await asyncio.sleep(0)

    async def test_names_are_resolved(self) -> None:
        transport, _ = await create_datagram_endpoint(
            Plain, ("localhost", 0), family=socket.AF_INET, backend=memory()
        )
        assert transport.get_extra_info("sockname")[0] == "127.0.0.1"
        await close(transport)

    async def test_numeric_addresses_need_no_resolver(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(socket, "getaddrinfo", None)
        for host in ("127.0.0.1", "::1"):
            for port in (0, "0", None, "", b""):
                here: Any = (host, port)
                transport, _ = await create_datagram_endpoint(Plain, here, backend=memory())
                assert transport.get_extra_info("sockname")[0] == host
                await close(transport)

    async def test_the_next_address_is_tried(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def found(*_: Any) -> Any:
            return [
                (socket.AF_INET6, socket.SOCK_DGRAM, 17, "", ("2001:db8::1", 0, 0, 0)),
                (9999, socket.SOCK_DGRAM, 17, "", ("?", 0)),
                (socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("127.0.0.1", 0)),
            ]

        monkeypatch.setattr(endpoints, "_resolve", found)
        backend = Witnessing()
        transport, _ = await create_datagram_endpoint(Plain, ("name", 0), backend=backend)
        assert transport.get_extra_info("sockname")[0] == "127.0.0.1"
        await close(transport)

    async def test_no_address_at_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def found(*_: Any) -> Any:
            return []

        monkeypatch.setattr(endpoints, "_resolve", found)
        with pytest.raises(OSError, match="empty list"):
            await create_datagram_endpoint(Plain, ("name", 0), backend=memory())

    async def test_stale_unix_sockets_are_replaced(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = os.fspath(tmp_path / "socket")
        for _ in range(2):
            transport, _ = await create_datagram_endpoint(
                Plain, path, family=socket.AF_UNIX, backend=memory()
            )
            await close(transport)
        abstract, _ = await create_datagram_endpoint(
            Plain, "\0ipsec_aio test", family=socket.AF_UNIX, backend=memory()
        )
        await close(abstract)
        assert not caplog.records
        blocked = tmp_path / "file"
        blocked.write_text("")
        with pytest.raises(OSError):  # noqa: PT011
            await create_datagram_endpoint(
                Plain, os.fspath(blocked / "socket"), family=socket.AF_UNIX, backend=memory()
            )
        assert "stale UNIX socket" in caplog.text

    async def test_descriptors_that_somebody_sends_are_not_taken(self) -> None:
        where = f"\0ipsec_aio {os.getpid()}"
        transport, protocol = await create_datagram_endpoint(
            Plain, where, family=socket.AF_UNIX, backend=memory()
        )
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.connect(where)
            before = os.listdir("/proc/self/fd")
            for number in range(4):
                socket.send_fds(sender, [b"datagram"], [0] * 30)
                await protocol.log.until("data", number + 1)
            assert os.listdir("/proc/self/fd") == before
        await close(transport)

    async def test_debug_mode_says_what_was_made(self, caplog: pytest.LogCaptureFixture) -> None:
        loop = asyncio.get_running_loop()
        loop.set_debug(True)
        with caplog.at_level("DEBUG", "ipsec_aio"):
            transport, _ = await create_datagram_endpoint(Plain, HERE, backend=memory())
        loop.set_debug(False)
        assert "created <DatagramTransport open" in caplog.text
        await close(transport)


class TestBackends:
    async def test_without_any_there_is_a_clear_error(
        self, monkeypatch: pytest.MonkeyPatch, nothing_left: None
    ) -> None:
        monkeypatch.delenv("IPSEC_AIO_BACKEND", raising=False)
        with pytest.raises(ipsec_aio.BackendUnavailable, match="backend="):
            await create_datagram_endpoint(Plain, HERE)

    async def test_the_default(self) -> None:
        set_default_backend(memory())
        try:
            transport, _ = await create_datagram_endpoint(Plain, HERE)
        finally:
            set_default_backend(None)
        await close(transport)

    async def test_a_closed_one(self, nothing_left: None) -> None:
        backend = memory()
        await backend.aclose()
        for family in (socket.AF_INET, socket.AF_UNIX):
            with pytest.raises(ipsec_aio.BackendUnavailable, match="closed"):
                await create_datagram_endpoint(Plain, family=family, backend=backend)

    async def test_one_that_cannot_cover_the_port(self, nothing_left: None) -> None:
        class Denied(Witnessing):
            async def register(self, protocol: int, port: int) -> Any:
                raise ipsec_aio.BackendDenied("no")

        with pytest.raises(ipsec_aio.BackendDenied):
            await create_datagram_endpoint(Plain, ("127.0.0.1", free_port()), backend=Denied())
        with pytest.raises(ipsec_aio.BackendDenied):
            await create_datagram_endpoint(Plain, HERE, backend=Denied())

    async def test_a_port_that_is_taken_is_given_back(self, nothing_left: None) -> None:
        backend = Witnessing()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(HERE)
            with pytest.raises(OSError, match="Address already in use"):
                await create_datagram_endpoint(Plain, sock.getsockname(), backend=backend)
        assert [stamp.closed for stamp in backend.stamps] == [True]


class TestCancellation:
    async def test_while_the_port_is_registered(self, nothing_left: None) -> None:
        asked = asyncio.Event()

        class Slow(Witnessing):
            async def register(self, protocol: int, port: int) -> Any:
                asked.set()
                await asyncio.Event().wait()

        task = asyncio.ensure_future(create_datagram_endpoint(Plain, HERE, backend=Slow()))
        await asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def test_while_connection_made_is_awaited(self, nothing_left: None) -> None:
        backend = Witnessing()
        protocols: list[Tokened] = []

        class Cancelling(Tokened):
            def __init__(self) -> None:
                super().__init__()
                protocols.append(self)
                task.cancel()

        task = asyncio.ensure_future(create_datagram_endpoint(Cancelling, HERE, backend=backend))
        with pytest.raises(asyncio.CancelledError):
            await task
        await protocols[0].log.until("lost")
        assert [event[0] for event in protocols[0].log.events] == ["made", "lost"]
        assert [stamp.closed for stamp in backend.stamps] == [True]


def test_outside_of_a_loop() -> None:
    coroutine = create_datagram_endpoint(Plain, HERE, backend=memory())
    with pytest.raises(RuntimeError, match="no running event loop"):
        coroutine.send(None)
