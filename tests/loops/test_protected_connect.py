"""Outgoing connections that must be protected: begun only where they can be, and held to it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from dataclasses import replace
from typing import Any

import pytest
from kernel_tools import KernelBackend, Policies, permitted
from stream_tools import (
    HOST,
    Plain,
    RecordingBackend,
    Tokened,
    client_tls,
    port_of,
    server_tls,
    serving,
)

import ipsec_aio
from ipsec_aio import Assurance, ProtectionError, Require
from ipsec_aio.enums import Direction, Mode
from ipsec_aio.errors import BackendDenied
from ipsec_aio.net import connect, enforce
from ipsec_aio.policy import Template

OTHER = "127.0.0.9"
ESP = Template()
ENCRYPTED = Require(encrypted=True)
WHOLE = Require(encrypted=True, mode="transport")


@pytest.fixture
def policies(monkeypatch: Any) -> Policies:
    return Policies(monkeypatch, real=False)


def protecting(peer: str = HOST) -> KernelBackend:
    """A backend under which connections to a peer are protected both ways."""
    backend = KernelBackend()
    backend.add_sa(src=peer, dst=HOST, reqid=7)
    backend.add_policy(src=peer, dst=HOST, reqid=7)
    backend.add_policy(src=HOST, dst=peer, reqid=7, direction="out")
    return backend


@contextlib.asynccontextmanager
async def connecting(backend: Any, *where: Any, **options: Any) -> Any:
    options = {"require": ENCRYPTED, **options}
    transport, protocol = await ipsec_aio.create_connection(
        Tokened, *where, backend=backend, **options
    )
    try:
        yield transport
    finally:
        transport.abort()
        await protocol.log.until("lost")


async def no_attempt(*_: Any, **__: Any) -> Any:
    raise AssertionError("a connection was begun")


@pytest.mark.parametrize("choice", ["auto", "user", "kernel"])
async def test_without_a_policy_none_is_begun(
    policies: Policies, monkeypatch: Any, choice: str
) -> None:
    heard: list[Any] = []
    with socket.create_server((HOST, 0)) as listener:
        listener.setblocking(False)
        port = listener.getsockname()[1]
        backends = [RecordingBackend(), KernelBackend(), KernelBackend()]
        backends[2].add_policy(src=HOST, dst=OTHER, direction="out")
        for backend in backends:
            with pytest.raises(ProtectionError, match="no policy protects") as caught:
                await ipsec_aio.create_connection(
                    lambda: heard.append(1) or Plain(),  # type: ignore[func-returns-value]
                    HOST,
                    port,
                    backend=backend,
                    require=ENCRYPTED,
                    enforce=choice,
                )
            assert caught.value.clause == "encrypted"
        with pytest.raises(ProtectionError, match="no policy protects") as caught:
            await ipsec_aio.open_connection(
                HOST, port, backend=KernelBackend(), require=Require(integrity=True)
            )
        assert caught.value.clause == "integrity"
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert heard == policies.calls == []


async def test_in_memory_a_declared_sa_is_enough() -> None:
    backend = RecordingBackend()
    backend.add_sa(src=HOST, dst=HOST)
    async with serving(Plain, RecordingBackend()) as server:
        with pytest.raises(ProtectionError, match="encrypted"):
            async with connecting(backend, HOST, port_of(server)):
                pass
        assert server.ipsec_stats.received == 1, "it was begun, and fell short"


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_the_socket_has_its_policies_before_it_is_connected(
    policies: Policies, monkeypatch: Any, tls: bool
) -> None:
    backend = protecting()
    made = socket.socket.connect_ex

    def connect_ex(sock: socket.socket, address: Any) -> int:
        assert policies.templates(sock) == (replace(ESP, reqid=7),)
        assert policies.templates(sock, Direction.OUT) == (replace(ESP, reqid=7),)
        policies.calls.append("connect")
        return made(sock, address)

    monkeypatch.setattr(socket.socket, "connect_ex", connect_ex)
    theirs: dict[str, Any] = {"ssl": server_tls()} if tls else {}
    ours: dict[str, Any] = {"ssl": client_tls()} if tls else {}
    server_side = Tokened()
    async with (
        serving(lambda: server_side, RecordingBackend(), **theirs) as server,
        connecting(backend, HOST, port_of(server), **ours) as transport,
    ):
        assert policies.calls == ["allow in", "allow out", "connect"]
        token = transport.get_extra_info("ptoken")
        assert token.assurance is Assurance.ENFORCED
        assert token.protected
        assert transport.get_extra_info("ipsec_enforced") == "kernel"
        transport.write(b"hello")
        assert await server_side.log.bytes(5) == b"hello"


async def test_tokens_of_outgoing_ones_follow_their_policies(
    policies: Policies, monkeypatch: Any
) -> None:
    monkeypatch.setattr(enforce, "REFRESH", 0.0)
    backend = protecting()
    async with (
        serving(Plain, RecordingBackend()) as server,
        connecting(backend, HOST, port_of(server)) as transport,
    ):
        backend.add_policy(src=HOST, dst=HOST, reqid=9)
        for _ in range(3):
            await asyncio.sleep(0)
        assert policies.templates(transport) == (replace(ESP, reqid=9),)
        assert backend.evidence[-1].enforced == ESP
        backend.add_policy(src=HOST, dst=HOST, mode="tunnel")
        for _ in range(3):
            await asyncio.sleep(0)
        assert policies.templates(transport) == (Template(mode=Mode.TUNNEL),)
        assert transport.get_extra_info("ipsec_enforced") == "kernel"
        assert not transport.get_extra_info("ptoken").protected
        assert backend.evidence[-1].enforced is None
        backend.add_policy(src="127.0.0.0/8", dst=HOST, src_port=port_of(server))
        for _ in range(3):
            await asyncio.sleep(0)
        assert transport.get_extra_info("ipsec_enforced") == "user", "two kinds at a time"
        assert policies.on(transport) is None


async def test_where_its_port_decides_the_socket_gets_one_first(policies: Policies) -> None:
    """Of two policies for what it sends, that with the port governs it, or does not."""
    backend = protecting()
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    backend.add_policy(
        src=HOST, dst=HOST, reqid=9, direction="out", src_port=port, proto="tcp", priority=0
    )
    backend.add_policy(src=HOST, dst=HOST, reqid=7, direction="out", priority=1)
    for local, reqid in (((HOST, port), 9), (None, 7)):
        async with (
            serving(Plain, RecordingBackend()) as server,
            connecting(
                backend, HOST, port_of(server), enforce="kernel", local_addr=local
            ) as transport,
        ):
            assert transport.get_extra_info("ipsec_enforced") == "kernel"
            assert policies.templates(transport, Direction.OUT) == (replace(ESP, reqid=reqid),)


async def test_it_is_the_kernel_both_ways_or_not_at_all(policies: Policies) -> None:
    """By a mark, nobody knows which of the two will be asked."""
    backend = protecting()
    backend.add_policy(src=HOST, dst=HOST, reqid=9, direction="out", mark=(5, 0xFF))
    async with serving(Plain, RecordingBackend()) as server:
        with pytest.raises(ValueError, match="no single policy governs what the socket sends"):
            async with connecting(backend, HOST, port_of(server), enforce="kernel"):
                pass
        assert server.ipsec_stats.received == 0
        with pytest.raises(ProtectionError):
            async with connecting(backend, HOST, port_of(server)):
                pass
    assert policies.calls == []


@pytest.mark.parametrize("choice", ["auto", "kernel"])
async def test_both_ways_it_stays(policies: Policies, monkeypatch: Any, choice: str) -> None:
    monkeypatch.setattr(enforce, "REFRESH", 0.0)
    backend = protecting()
    async with (
        serving(Plain, RecordingBackend()) as server,
        connecting(backend, HOST, port_of(server), enforce=choice) as transport,
    ):
        port = transport.get_extra_info("sockname")[1]
        other = port - 1 if port > 1024 else port + 1
        for number in (other, port):
            backend.add_policy(
                src=HOST, dst=HOST, reqid=number, direction="out", src_port=number, proto="tcp"
            )
        backend.add_policy(src=HOST, dst=HOST, reqid=7, direction="out", priority=1)
        for _ in range(3):
            await asyncio.sleep(0)
        assert policies.templates(transport, Direction.OUT) == (replace(ESP, reqid=port),)
        backend.add_policy(src=HOST, dst=HOST, reqid=9, direction="out", mark=(5, 0xFF))
        for _ in range(3):
            await asyncio.sleep(0)
        if choice == "kernel":
            assert transport.get_extra_info("ipsec_enforced") == "kernel"
            assert policies.templates(transport, Direction.OUT) == (replace(ESP, reqid=port),)
        else:
            assert transport.get_extra_info("ipsec_enforced") == "user"
            assert not transport.is_reading(), "user space cannot tell of a socket of this host"


async def test_without_privilege_user_space_looks(policies: Policies) -> None:
    policies.refuse = PermissionError(errno.EPERM, "no")
    async with serving(Plain, RecordingBackend()) as server:
        with pytest.raises(BackendDenied, match="CAP_NET_ADMIN"):
            async with connecting(protecting(), HOST, port_of(server), enforce="kernel"):
                pass
        with pytest.raises(ProtectionError, match="UNKNOWN"):
            async with connecting(protecting(), HOST, port_of(server)):
                pass
        assert server.ipsec_stats.received == 1


async def test_whoever_listens_is_not_told_before_all_is_known(policies: Policies) -> None:
    """A requirement that names nothing a policy could demand begins as ever."""
    async with serving(Plain, RecordingBackend()) as server:
        backend = RecordingBackend()
        with pytest.raises(ProtectionError, match="assurance"):
            async with connecting(
                backend, HOST, port_of(server), require=Require(assurance=Assurance.EXACT)
            ):
                pass
        with pytest.raises(ValueError, match="demands no protection"):
            async with connecting(
                backend,
                HOST,
                port_of(server),
                require=Require(assurance=Assurance.EXACT),
                enforce="kernel",
            ):
                pass
    assert policies.calls == []


@pytest.mark.parametrize(
    "options", [{"happy_eyeballs_delay": 0.1}, {"interleave": 1}], ids=["delay", "interleave"]
)
async def test_races_are_the_loop_s(policies: Policies, options: dict[str, Any]) -> None:
    backend = protecting()
    async with serving(Plain, RecordingBackend()) as server:
        with contextlib.suppress(ProtectionError, TypeError, NotImplementedError):
            async with connecting(backend, HOST, port_of(server), **options):
                pass
        with pytest.raises(ValueError, match="does not go together"):
            async with connecting(backend, HOST, port_of(server), enforce="kernel", **options):
                pass
    assert policies.calls == []


async def test_a_socket_that_is_connected_already(policies: Policies) -> None:
    backend = protecting()
    async with serving(Plain, RecordingBackend()) as server:
        sock = socket.create_connection((HOST, port_of(server)))
        with sock, pytest.raises(ValueError, match="sock="):
            async with connecting(backend, sock=sock, enforce="kernel"):
                pass
        sock = socket.create_connection((HOST, port_of(server)))
        sock.setblocking(False)
        with pytest.raises(ProtectionError):
            async with connecting(backend, sock=sock):
                pass
    assert policies.calls == []


async def test_a_local_address_is_kept(policies: Policies) -> None:
    backend = KernelBackend()
    backend.add_sa(src=HOST, dst=OTHER, reqid=7)
    backend.add_policy(src=HOST, dst=OTHER, reqid=7)
    backend.add_policy(src=OTHER, dst=HOST, reqid=7, direction="out")
    async with serving(Plain, RecordingBackend()) as server:
        port = port_of(server)
        async with connecting(backend, HOST, port, local_addr=(OTHER, 0)) as transport:
            assert transport.get_extra_info("sockname")[0] == OTHER
            assert transport.get_extra_info("ptoken").assurance is Assurance.ENFORCED
        with pytest.raises(ProtectionError, match="no policy"):
            async with connecting(backend, HOST, port):
                pass
        with pytest.raises(OSError, match="attempting to bind"):
            async with connecting(backend, HOST, port, local_addr=("192.0.2.77", 0)):
                pass
        with pytest.raises(OSError, match=r"family|matching"):
            async with connecting(protecting(), HOST, port, local_addr=("::1", 0)):
                pass


async def test_failures_are_told_as_the_loop_does(policies: Policies) -> None:
    backend = protecting()
    with socket.socket() as unused:
        unused.bind((HOST, 0))
        port = unused.getsockname()[1]
        with pytest.raises(ConnectionRefusedError):
            async with connecting(backend, HOST, port):
                pass
        with pytest.raises(ExceptionGroup) as caught:
            async with connecting(backend, HOST, port, all_errors=True):
                pass
        [error] = caught.value.exceptions
        assert isinstance(error, ConnectionRefusedError)
    with pytest.raises(socket.gaierror):
        async with connecting(backend, "no.such.host.invalid", 1):
            pass
    with pytest.raises(ValueError):  # noqa: PT011  (the loop's own text)
        async with connecting(backend):
            pass


async def several(*_: Any, **__: Any) -> Any:
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 9)) for host in (HOST, OTHER)]


async def test_addresses_are_tried_in_turn(policies: Policies, monkeypatch: Any) -> None:
    """The first has no policy, the second does, and is connected to."""
    async with serving(Plain, RecordingBackend(), OTHER) as server:
        port = port_of(server)

        async def resolve(*_: Any) -> Any:
            hosts = (HOST, OTHER)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (h, port)) for h in hosts]

        monkeypatch.setattr(connect, "_resolve", resolve)
        async with connecting(protecting(OTHER), "name", port) as transport:
            assert transport.get_extra_info("peername") == (OTHER, port)
            assert len(policies.calls) == 2


async def test_several_failures_are_one(policies: Policies, monkeypatch: Any) -> None:
    backend = protecting()
    backend.add_policy(src=HOST, dst=OTHER, direction="out")
    monkeypatch.setattr(connect, "_resolve", several)
    with pytest.raises(OSError, match=r"Multiple exceptions: .*127.0.0.1.*127.0.0.9"):
        async with connecting(backend, "name", 9):
            pass
    with pytest.raises(ProtectionError, match=r"no policy protects connections to .*127.0.0.9"):
        async with connecting(protecting(), "name", 9):
            pass


async def test_a_name_without_addresses(policies: Policies, monkeypatch: Any) -> None:
    async def nothing(*_: Any, **__: Any) -> list[Any]:
        return []

    loop: Any = type("Loop", (), {"getaddrinfo": staticmethod(nothing)})()
    with pytest.raises(OSError, match="empty list"):
        await connect._resolve(loop, "name", 1, {})
    path = (socket.AF_UNIX, 1, 0, "", "path")
    assert connect._protecting(KernelBackend(), ENCRYPTED, path, None) == (None, False)


def failing(*answers: int) -> Any:
    """A connect_ex() that gives these, and then the kernel's own answer."""
    left = list(answers)
    made = socket.socket.connect_ex

    def connect_ex(sock: socket.socket, address: Any) -> int:
        return left.pop(0) if left else made(sock, address)

    return connect_ex


async def test_nobody_to_negotiate_is_told_at_once(policies: Policies, monkeypatch: Any) -> None:
    monkeypatch.setattr(socket.socket, "connect_ex", failing(errno.EAGAIN))
    monkeypatch.setattr(connect, "has_key_manager", lambda: False)
    with pytest.raises(ProtectionError, match="nobody to negotiate"):
        async with connecting(protecting(), HOST, 9):
            pass


async def test_an_sa_may_be_negotiated_meanwhile(policies: Policies, monkeypatch: Any) -> None:
    monkeypatch.setattr(connect, "has_key_manager", lambda: True)
    monkeypatch.setattr(socket.socket, "connect_ex", failing(*[errno.EAGAIN] * 3))
    async with (
        serving(Plain, RecordingBackend()) as server,
        connecting(protecting(), HOST, port_of(server)) as transport,
    ):
        assert transport.get_extra_info("ptoken").protected
    monkeypatch.setattr(socket.socket, "connect_ex", failing(*[errno.EAGAIN] * 3))
    monkeypatch.setattr(connect, "NEGOTIATION", 0.0)
    with pytest.raises(ProtectionError, match="came of 0 s"):
        async with connecting(protecting(), HOST, 9):
            pass


@pytest.mark.skipif(not permitted(), reason="socket policies need CAP_NET_ADMIN")
async def test_this_machine_s_kernel_sends_nothing_in_clear() -> None:
    with socket.create_server((HOST, 0)) as listener:
        listener.setblocking(False)
        with pytest.raises((ProtectionError, TimeoutError)):
            async with asyncio.timeout(1), connecting(protecting(), *listener.getsockname()):
                pass
        with pytest.raises(BlockingIOError):
            listener.accept()


async def test_what_fails_after_connecting_leaves_nothing(policies: Policies) -> None:
    def fail() -> Any:
        raise ZeroDivisionError

    closed = asyncio.Event()

    class Seeing(Plain):
        def connection_lost(self, exc: Exception | None) -> None:
            closed.set()

    async with serving(Seeing, RecordingBackend()) as server:
        with pytest.raises(ZeroDivisionError):
            await ipsec_aio.create_connection(
                fail, HOST, port_of(server), backend=protecting(), require=ENCRYPTED
            )
        async with asyncio.timeout(5):
            await closed.wait()
    server_side = await asyncio.start_server(lambda _, writer: writer.close(), HOST, 0)
    async with server_side:
        with pytest.raises((OSError, EOFError)):
            async with connecting(protecting(), HOST, port_of(server_side), ssl=client_tls()):
                pass


async def test_an_ipv6_socket_gets_policies_of_its_own_family(policies: Policies) -> None:
    backend = KernelBackend()
    backend.add_sa(src="::1", dst="::1")
    backend.add_policy(src="::1", dst="::1")
    backend.add_policy(src="::1", dst="::1", direction="out")
    async with (
        serving(Plain, RecordingBackend(), "::1") as server,
        connecting(backend, "::1", port_of(server)) as transport,
    ):
        policy = policies.on(transport)
        assert policy is not None
        assert policy.selector.family == socket.AF_INET6
        assert transport.get_extra_info("ptoken").assurance is Assurance.ENFORCED


@pytest.mark.skipif(not permitted(), reason="socket policies need CAP_NET_ADMIN")
async def test_this_machine_s_kernel_takes_them_on_ipv6(monkeypatch: Any) -> None:
    policies = Policies(monkeypatch, real=True)
    backend = KernelBackend()
    backend.add_policy(src="::1", dst="::1")
    server = await ipsec_aio.create_server(
        Plain, "::1", 0, backend=backend, require=ENCRYPTED, enforce="kernel"
    )
    assert policies.templates(server) == (ESP,)
    server.close()
