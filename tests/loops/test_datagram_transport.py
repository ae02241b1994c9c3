"""The transport is asyncio's, to every call and callback: each story is told by both."""

from __future__ import annotations

import asyncio
import errno
import gc
import socket
import sys
import warnings
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import pytest
from datagram_tools import HERE, Plain, Tokened, close, memory, until

from ipsec_aio import create_datagram_endpoint
from ipsec_aio.net import datagram
from ipsec_aio.net.datagram import DatagramTransport

Create = Callable[..., Awaitable[tuple[Any, Any]]]
STOCK_IS_ASYNCIO = pytest.mark.parametrize("create", ["asyncio", "ours"], indirect=True)
# asyncio's datagram transports cannot pause in early versions of Python 3.11.
_PAUSES = "pause_reading" in vars(asyncio.selector_events._SelectorTransport)
# From Python 3.12 on its count of what is buffered does not come back to 0.
_COUNTS = sys.version_info < (3, 12)
STOCK_COUNTS = pytest.mark.parametrize(
    "create", ["asyncio", "ours"] if _PAUSES and _COUNTS else ["ours"], indirect=True
)
STOCK_PAUSES = pytest.mark.parametrize(
    "create", ["asyncio", "ours"] if _PAUSES else ["ours"], indirect=True
)


@pytest.fixture
async def create(request: pytest.FixtureRequest) -> Create:
    """asyncio's own function, or this package's."""
    loop = asyncio.get_running_loop()
    if request.param == "asyncio":
        if not type(loop).__module__.startswith("asyncio"):
            pytest.skip("another loop's own transport is no measure")
        return loop.create_datagram_endpoint

    async def ours(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return await create_datagram_endpoint(*args, backend=memory(), **kwargs)

    return ours


@pytest.fixture
async def reports() -> list[dict[str, Any]]:
    """What goes to the loop's exception handler."""
    found: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, report: found.append(report))
    return found


def full(sender: Any) -> None:
    """Send until the transport has to buffer."""
    for _ in range(10_000):
        sender.sendto(b"x" * 1000)
        if sender.get_write_buffer_size():
            return
    raise AssertionError("the socket takes everything")


def unix_pair() -> tuple[socket.socket, socket.socket]:
    """Connected sockets whose far end has a name; it takes a few datagrams, then no more."""
    near = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    far = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    far.bind("")
    far.setblocking(False)
    near.connect(far.getsockname())
    return near, far


async def stuffed(create: Create, **limits: int) -> tuple[Any, Any, socket.socket]:
    """A connected transport whose peer does not read."""
    near, far = unix_pair()
    transport, protocol = await create(Plain, sock=near)
    if limits:
        transport.set_write_buffer_limits(**limits)
    full(transport)
    return transport, protocol, far


def empty(sock: socket.socket) -> list[bytes]:
    got: list[bytes] = []
    try:
        while True:
            got.append(sock.recv(65536))
    except BlockingIOError:
        return got


def collect(objects: list[Any]) -> None:
    objects.clear()
    gc.collect()


class TestClosing:
    @STOCK_IS_ASYNCIO
    async def test_connection_lost_comes_once_and_later(self, create: Create) -> None:
        transport, protocol = await create(Plain, HERE)
        assert not transport.is_closing()
        transport.close()
        assert transport.is_closing()
        assert not protocol.log.of("lost")
        transport.close()
        transport.abort()
        assert await protocol.log.until("lost") == [(None,)]
        await asyncio.sleep(0)
        transport.close()
        transport.abort()
        assert protocol.log.events == [("made",), ("lost", None)]
        assert transport.get_protocol() is None

    @STOCK_IS_ASYNCIO
    async def test_abort(self, create: Create) -> None:
        transport, protocol = await create(Plain, HERE)
        transport.abort()
        assert transport.is_closing()
        assert await protocol.log.until("lost") == [(None,)]

    @STOCK_IS_ASYNCIO
    async def test_nothing_is_delivered_after_close(self, create: Create) -> None:
        class Closing(Plain):
            def datagram_received(self, data: bytes, addr: Any) -> None:
                super().datagram_received(data, addr)
                self.transport.close()

        transport, protocol = await create(Closing, HERE)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for data in (b"1", b"2", b"3"):
                sock.sendto(data, transport.get_extra_info("sockname"))
        await protocol.log.until("lost")
        assert [data for data, _ in protocol.log.of("data")] == [b"1"]

    @STOCK_IS_ASYNCIO
    async def test_close_sends_what_is_buffered(self, create: Create) -> None:
        transport, protocol, far = await stuffed(create)
        buffered = transport.get_write_buffer_size() // (1000 + datagram._HEADER)
        before = len(empty(far))
        transport.sendto(b"last")
        transport.close()
        assert not protocol.log.of("lost")
        await protocol.log.until("lost")
        assert before
        assert empty(far) == [*[b"x" * 1000] * buffered, b"last"]
        far.close()

    @STOCK_IS_ASYNCIO
    async def test_abort_drops_what_is_buffered(self, create: Create) -> None:
        transport, protocol, far = await stuffed(create)
        empty(far)
        transport.abort()
        await protocol.log.until("lost")
        assert empty(far) == []
        far.close()

    @STOCK_IS_ASYNCIO
    async def test_abort_after_close_with_a_full_buffer(self, create: Create) -> None:
        transport, protocol, far = await stuffed(create)
        transport.close()
        transport.abort()
        await protocol.log.until("lost")
        assert protocol.log.of("lost") == [(None,)]
        far.close()

    @STOCK_IS_ASYNCIO
    async def test_sends_on_a_closed_connected_transport_are_dropped(self, create: Create) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(HERE)
            transport, protocol = await create(Plain, remote_addr=sock.getsockname())
            transport.close()
            for _ in range(10):
                transport.sendto(b"too late")
            await protocol.log.until("lost")
            sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                sock.recv(10)

    async def test_sends_on_a_closed_unconnected_transport_are_dropped(self) -> None:
        transport, protocol = await create_datagram_endpoint(Plain, HERE, backend=memory())
        there = transport.get_extra_info("sockname")
        transport.close()
        await protocol.log.until("lost")
        for _ in range(10):
            transport.sendto(b"too late", there)
        assert protocol.log.events == [("made",), ("lost", None)]

    async def test_an_unclosed_transport_warns_and_closes_its_socket(self) -> None:
        transport, protocol = await create_datagram_endpoint(Plain, HERE, backend=memory())
        loop = asyncio.get_running_loop()
        loop.remove_reader(transport.get_extra_info("socket").fileno())
        sock = transport.get_extra_info("socket")
        protocol.transport = None
        transports = [transport]
        del transport
        with pytest.warns(ResourceWarning, match="unclosed transport <DatagramTransport open"):
            collect(transports)
        assert sock.fileno() == -1

    async def test_the_socket_is_closed_when_the_connection_is_lost(self) -> None:
        class Failing(Plain):
            def connection_lost(self, exc: Exception | None) -> None:
                super().connection_lost(exc)
                raise ZeroDivisionError

        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda *_: None)
        transport, protocol = await create_datagram_endpoint(Failing, HERE, backend=memory())
        sock = transport.get_extra_info("socket")
        transport.close()
        await protocol.log.until("lost")
        await asyncio.sleep(0)
        assert sock.fileno() == -1
        assert repr(transport).startswith("<DatagramTransport closed")


class TestWriting:
    @STOCK_COUNTS
    async def test_pause_and_resume(self, create: Create) -> None:
        transport, protocol, far = await stuffed(create, high=1500, low=500)
        assert not protocol.log.of("pause")
        transport.sendto(b"x" * 1000)
        transport.sendto(b"x" * 1000)
        assert protocol.log.of("pause") == [()]
        empty(far)
        await protocol.log.until("resume")
        assert transport.get_write_buffer_size() == 0
        assert [event[0] for event in protocol.log.events] == ["made", "pause", "resume"]
        transport.close()
        await protocol.log.until("lost")
        far.close()

    @STOCK_IS_ASYNCIO
    async def test_limits(self, create: Create) -> None:
        transport, protocol = await create(Plain, HERE)
        found = [transport.get_write_buffer_limits()]
        for limits in ({"high": 100}, {"low": 100}, {"high": 0}, {"high": 9, "low": 9}, {}):
            transport.set_write_buffer_limits(**limits)
            found.append(transport.get_write_buffer_limits())
        assert found == [(16384, 65536), (25, 100), (100, 400), (0, 0), (9, 9), (16384, 65536)]
        with pytest.raises(ValueError, match=r"high \(1\) must be >= low \(2\) must be >= 0"):
            transport.set_write_buffer_limits(high=1, low=2)
        await close(transport)
        assert protocol.log.of("lost")

    @STOCK_IS_ASYNCIO
    async def test_a_lower_limit_pauses_at_once(self, create: Create) -> None:
        transport, protocol, far = await stuffed(create)
        transport.set_write_buffer_limits(high=10)
        assert protocol.log.of("pause") == [()]
        transport.abort()
        await protocol.log.until("lost")
        far.close()

    @STOCK_COUNTS
    async def test_failing_flow_control_callbacks_are_reported(
        self, create: Create, reports: list[dict[str, Any]]
    ) -> None:
        transport, protocol, far = await stuffed(create, high=0)

        def fail() -> None:
            raise ZeroDivisionError

        protocol.resume_writing = fail
        empty(far)
        await until(lambda: reports)
        assert [report["message"] for report in reports] == ["protocol.resume_writing() failed"]
        protocol.pause_writing = fail
        full(transport)
        assert reports[1]["message"] == "protocol.pause_writing() failed"
        assert reports[1]["transport"] is transport
        assert reports[1]["protocol"] is protocol
        transport.abort()
        await protocol.log.until("lost")
        far.close()

    @STOCK_IS_ASYNCIO
    async def test_the_end_of_the_program_is_not_held_up(self, create: Create) -> None:
        transport, protocol, far = await stuffed(create)

        def end() -> None:
            raise SystemExit

        protocol.pause_writing = end
        with pytest.raises(SystemExit):
            transport.set_write_buffer_limits(high=0)
        transport.abort()
        await protocol.log.until("lost")
        far.close()

    @STOCK_IS_ASYNCIO
    @pytest.mark.parametrize("data", ["text", None, 3, [1]])
    async def test_data_must_be_bytes(self, create: Create, data: Any) -> None:
        transport, _ = await create(Plain, HERE)
        with pytest.raises(TypeError, match="data argument must be a bytes-like object, not"):
            transport.sendto(data, HERE)
        await close(transport)

    @STOCK_IS_ASYNCIO
    async def test_what_can_be_sent(self, create: Create) -> None:
        transport, protocol = await create(Plain, HERE)
        there = transport.get_extra_info("sockname")
        for data in (b"bytes", bytearray(b"bytearray"), memoryview(b"memoryview"), b"", b"end"):
            transport.sendto(data, there)
        await until(lambda: protocol.log.of("data")[-1:] == [(b"end", there)])
        got = [data for data, _ in protocol.log.of("data")]
        nothing = [b""] if sys.version_info >= (3, 13) else []
        assert got == [b"bytes", b"bytearray", b"memoryview", *nothing, b"end"]
        await close(transport)

    @STOCK_IS_ASYNCIO
    async def test_a_buffered_datagram_is_a_copy(self, create: Create) -> None:
        transport, protocol, far = await stuffed(create)
        data = bytearray(b"first")
        transport.sendto(data)
        data[:] = b"later"
        transport.close()
        got = empty(far)
        await protocol.log.until("lost")
        got += empty(far)
        assert got[-1] == b"first"
        far.close()

    @STOCK_IS_ASYNCIO
    async def test_the_address_of_a_connected_transport(self, create: Create) -> None:
        server, protocol = await create(Plain, HERE)
        there = server.get_extra_info("sockname")
        transport, _ = await create(Plain, remote_addr=there)
        transport.sendto(b"1")
        transport.sendto(b"2", there)
        with pytest.raises(ValueError, match="Invalid address: must be None or"):
            transport.sendto(b"3", ("127.0.0.1", 1))
        assert [data for data, _ in await protocol.log.until("data", 2)] == [b"1", b"2"]
        await close(transport, server)

    @STOCK_IS_ASYNCIO
    async def test_a_send_that_fails(self, create: Create) -> None:
        transport, protocol = await create(Plain, HERE)
        transport.sendto(b"x" * 70_000, transport.get_extra_info("sockname"))
        ((error,),) = protocol.log.of("error")
        assert error.errno == errno.EMSGSIZE
        assert not transport.is_closing()
        await close(transport)

    @STOCK_IS_ASYNCIO
    async def test_a_send_that_cannot_be(
        self, create: Create, reports: list[dict[str, Any]]
    ) -> None:
        transport, protocol = await create(Plain, HERE)
        transport.sendto(b"x", "no address")
        assert [report["message"] for report in reports] == [
            "Fatal write error on datagram transport"
        ]
        ((error,),) = await protocol.log.until("lost")
        assert isinstance(error, TypeError)

    @STOCK_IS_ASYNCIO
    async def test_buffered_sends_that_fail(
        self, create: Create, reports: list[dict[str, Any]]
    ) -> None:
        transport, protocol, far = await stuffed(create)
        far.close()
        await protocol.log.until("error")
        assert isinstance(protocol.log.of("error")[0][0], ConnectionError)
        assert not transport.is_closing()
        transport.close()
        await protocol.log.until("lost")
        assert not reports

    async def test_a_buffered_send_that_cannot_be(self, reports: list[dict[str, Any]]) -> None:
        near, far = unix_pair()
        transport, protocol = await create_datagram_endpoint(Plain, sock=near, backend=memory())
        full(transport)
        # A peer name is what makes the transport use send().
        transport._peer = None
        transport._buffer[0] = (b"x", 3, None)
        empty(far)
        ((error,),) = await protocol.log.until("lost")
        assert isinstance(error, TypeError)
        assert reports[0]["message"] == "Fatal write error on datagram transport"
        far.close()


@pytest.mark.usefixtures("way")
class TestReading:
    @STOCK_IS_ASYNCIO
    async def test_a_refused_port_is_an_error_received(self, create: Create) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(HERE)
            there = sock.getsockname()
        transport, protocol = await create(Plain, remote_addr=there)
        transport.sendto(b"anybody?")
        ((error,),) = await protocol.log.until("error")
        assert isinstance(error, ConnectionRefusedError)
        assert not transport.is_closing()
        await close(transport)

    @STOCK_IS_ASYNCIO
    async def test_reading_goes_on_after_an_error(self, create: Create) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(HERE)
            there = sock.getsockname()
        transport, protocol = await create(Plain, remote_addr=there)
        for turn in (1, 2):
            transport.sendto(b"anybody?")
            await protocol.log.until("error", turn)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.bind(there)
                sock.sendto(b"here", transport.get_extra_info("sockname"))
                await protocol.log.until("data", turn)
        await close(transport)

    @STOCK_IS_ASYNCIO
    async def test_reading_goes_on_after_an_error_that_a_send_met(self, create: Create) -> None:
        """The loop has seen the error before the send takes it away."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(HERE)
            there = sock.getsockname()
        transport, protocol = await create(Plain, remote_addr=there)
        loop = asyncio.get_running_loop()
        near, far = socket.socketpair()
        loop.add_reader(near.fileno(), lambda: (near.recv(1), transport.sendto(b"second")))
        await asyncio.sleep(0)
        far.send(b"x")
        transport.sendto(b"anybody?")
        await protocol.log.until("error")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(there)
            sock.sendto(b"here", transport.get_extra_info("sockname"))
            await protocol.log.until("data")
        loop.remove_reader(near.fileno())
        near.close()
        far.close()
        await close(transport)

    @STOCK_IS_ASYNCIO
    async def test_a_callback_that_raises_costs_one_datagram(
        self, create: Create, reports: list[dict[str, Any]]
    ) -> None:
        class Failing(Plain):
            def datagram_received(self, data: bytes, addr: Any) -> None:
                super().datagram_received(data, addr)
                if data == b"bad":
                    raise ZeroDivisionError

        transport, protocol = await create(Failing, HERE)
        there = transport.get_extra_info("sockname")
        for data in (b"1", b"bad", b"3"):
            transport.sendto(data, there)
        await protocol.log.until("data", 3)
        await until(lambda: reports)
        assert [type(report["exception"]) for report in reports] == [ZeroDivisionError]
        assert not transport.is_closing()
        await close(transport)

    @STOCK_IS_ASYNCIO
    async def test_connection_made_that_raises(
        self, create: Create, reports: list[dict[str, Any]]
    ) -> None:
        class Failing(Plain):
            def connection_made(self, transport: Any) -> None:
                super().connection_made(transport)
                raise ZeroDivisionError

        transport, protocol = await create(Failing, HERE)
        assert [type(report["exception"]) for report in reports] == [ZeroDivisionError]
        transport.sendto(b"x", transport.get_extra_info("sockname"))
        await protocol.log.until("data")
        await close(transport)

    @STOCK_COUNTS
    async def test_pause_and_resume(self, create: Create) -> None:
        class Pausing(Plain):
            def datagram_received(self, data: bytes, addr: Any) -> None:
                super().datagram_received(data, addr)
                self.transport.pause_reading()

        transport, protocol = await create(Pausing, HERE)
        there = transport.get_extra_info("sockname")
        assert transport.is_reading()
        for data in (b"1", b"2", b"3"):
            transport.sendto(data, there)
        for count in (1, 2, 3):
            await protocol.log.until("data", count)
            for _ in range(3):
                await asyncio.sleep(0)
            assert len(protocol.log.of("data")) == count
            assert not transport.is_reading()
            transport.pause_reading()
            transport.resume_reading()
            transport.resume_reading()
        assert [data for data, _ in protocol.log.of("data")] == [b"1", b"2", b"3"]
        transport.pause_reading()
        await close(transport)
        transport.resume_reading()
        assert not transport.is_reading()

    @STOCK_PAUSES
    async def test_paused_before_it_began(self, create: Create) -> None:
        class Paused(Plain):
            def connection_made(self, transport: Any) -> None:
                super().connection_made(transport)
                transport.pause_reading()

        transport, protocol = await create(Paused, HERE)
        transport.sendto(b"1", transport.get_extra_info("sockname"))
        for _ in range(3):
            await asyncio.sleep(0)
        assert not protocol.log.of("data")
        transport.resume_reading()
        await protocol.log.until("data")
        await close(transport)

    @STOCK_IS_ASYNCIO
    async def test_callbacks_share_a_context_of_their_own(self, create: Create) -> None:
        variable: ContextVar[int] = ContextVar("variable", default=0)

        class Counting(Plain):
            def datagram_received(self, data: bytes, addr: Any) -> None:
                variable.set(variable.get() + 1)
                self.log.note("count", variable.get())

        variable.set(10)
        transport, protocol = await create(Counting, HERE)
        there = transport.get_extra_info("sockname")
        transport.sendto(b"1", there)
        await protocol.log.until("count", 1)
        transport.sendto(b"2", there)
        assert await protocol.log.until("count", 2) == [(11,), (12,)]
        assert variable.get() == 10
        await close(transport)

    async def test_a_wake_up_takes_a_bounded_batch(self) -> None:
        class Breathing(Tokened):
            def datagram_received(self, data: bytes, addr: Any, ptoken: Any) -> None:
                if not self.log.of("data"):
                    asyncio.get_running_loop().call_soon(self.log.note, "others")
                super().datagram_received(data, addr, ptoken)

        transport, protocol = await create_datagram_endpoint(Breathing, HERE, backend=memory())
        there = transport.get_extra_info("sockname")
        for _ in range(datagram.BATCH + 10):
            transport.sendto(b"x", there)
        await protocol.log.until("data", datagram.BATCH + 10)
        kinds = [event[0] for event in protocol.log.events]
        assert kinds.index("others") == 1 + datagram.BATCH
        await close(transport)

    async def test_the_end_of_the_program_in_a_callback_loses_nothing(self) -> None:
        """KeyboardInterrupt ends the loop's run; what was received waits for the next."""

        class Interrupted(Plain):
            def datagram_received(self, data: bytes, addr: Any) -> None:
                super().datagram_received(data, addr)
                if data == b"stop":
                    raise KeyboardInterrupt

        def run(loop: asyncio.AbstractEventLoop) -> None:
            async def send_and_wait(protocol: Any) -> None:
                there = protocol.transport.get_extra_info("sockname")
                for data in (b"1", b"stop", b"3"):
                    protocol.transport.sendto(data, there)
                await protocol.log.until("data", 3)

            endpoint = create_datagram_endpoint(Interrupted, HERE, backend=memory())
            _, protocol = loop.run_until_complete(endpoint)
            with pytest.raises(KeyboardInterrupt):
                loop.run_until_complete(send_and_wait(protocol))
            loop.run_until_complete(protocol.log.until("data", 3))
            loop.run_until_complete(close(protocol.transport))
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.run_until_complete(asyncio.sleep(0))
            loop.close()

        loop_class = type(asyncio.get_running_loop())
        await asyncio.to_thread(run, loop_class())

    async def test_a_receive_that_fails_for_good(self, reports: list[dict[str, Any]]) -> None:
        class Broken:
            """A socket that a bug has reached."""

            def recvmsg(self, *_: Any) -> Any:
                raise ZeroDivisionError

            def close(self) -> None:
                pass

        transport, protocol = await create_datagram_endpoint(Plain, HERE, backend=memory())
        transport._batch = None
        real, transport._sock = transport._sock, Broken()  # type: ignore[assignment]
        assert real is not None
        real.sendto(b"x", real.getsockname())
        ((error,),) = await protocol.log.until("lost")
        assert isinstance(error, ZeroDivisionError)
        assert reports[0]["message"] == "Fatal read error on datagram transport"
        real.close()

    @pytest.mark.parametrize("error", [InterruptedError(), BlockingIOError()])
    async def test_a_receive_that_comes_to_nothing(self, error: OSError) -> None:
        class Nothing:
            def __init__(self, real: socket.socket) -> None:
                self.real = real
                self.calls = 0

            def recvmsg(self, *args: int) -> Any:
                self.calls += 1
                if self.calls == 1:
                    raise error
                return self.real.recvmsg(*args)

            def close(self) -> None:
                self.real.close()

        transport, protocol = await create_datagram_endpoint(Plain, HERE, backend=memory())
        transport._batch = None
        assert transport._sock is not None
        real = transport._sock
        transport._sock = Nothing(real)  # type: ignore[assignment]
        real.sendto(b"x", real.getsockname())
        assert (await protocol.log.until("data"))[0][0] == b"x"
        await close(transport)


class TestInformation:
    @STOCK_IS_ASYNCIO
    async def test_extra_info(self, create: Create) -> None:
        server, _ = await create(Plain, HERE)
        there = server.get_extra_info("sockname")
        transport, _ = await create(Plain, remote_addr=there)
        assert transport.get_extra_info("peername") == there
        assert server.get_extra_info("peername") is None
        sock = transport.get_extra_info("socket")
        assert sock.getsockname() == transport.get_extra_info("sockname")
        assert sock.family == socket.AF_INET
        assert transport.get_extra_info("nothing") is None
        assert transport.get_extra_info("nothing", 3) == 3
        assert isinstance(transport, asyncio.BaseTransport)
        await close(transport, server)

    async def test_repr_names_the_ends(self) -> None:
        server, _ = await create_datagram_endpoint(Plain, HERE, backend=memory())
        there = server.get_extra_info("sockname")
        transport, _ = await create_datagram_endpoint(Plain, remote_addr=there, backend=memory())
        assert isinstance(transport, DatagramTransport)
        assert isinstance(transport, asyncio.DatagramTransport)
        assert repr(transport) == (
            f"<DatagramTransport open fd={transport.get_extra_info('socket').fileno()} "
            f"local={transport.get_extra_info('sockname')} peer={there} bufsize=0>"
        )
        transport.close()
        assert " closing " in repr(transport)
        protocol = transport.get_protocol()
        await protocol.log.until("lost")  # type: ignore[attr-defined]
        await close(server)

    async def test_a_fatal_os_error_is_only_debugged(
        self, caplog: pytest.LogCaptureFixture, reports: list[dict[str, Any]]
    ) -> None:
        loop = asyncio.get_running_loop()
        transport, protocol = await create_datagram_endpoint(Plain, HERE, backend=memory())
        loop.set_debug(True)
        with caplog.at_level("DEBUG", "ipsec_aio"):
            transport._fatal_error(OSError("gone"), "what happened")
        loop.set_debug(False)
        assert "what happened" in caplog.text
        assert not reports
        ((error,),) = await protocol.log.until("lost")
        assert isinstance(error, OSError)


@pytest.fixture(autouse=True)
def no_leaks() -> Any:
    """Anything unclosed shows in the test that left it."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gc.collect()
