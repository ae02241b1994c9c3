"""Who enforces a requirement, from when on, and what becomes of it when policies change."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import socket
from dataclasses import replace
from typing import Any

import pytest
from datagram_tools import Plain as PlainDatagrams
from datagram_tools import Tokened as Datagrams
from datagram_tools import close, until
from kernel_tools import KernelBackend, Policies, permitted
from stream_tools import HOST, Plain, RecordingBackend, Tokened, connected, port_of, serving

import ipsec_aio
from ipsec_aio import Assurance, Require
from ipsec_aio.enums import Direction, Mode, PolicyAction
from ipsec_aio.errors import BackendDenied, BackendUnavailable
from ipsec_aio.net import enforce
from ipsec_aio.policy import Template

OTHER = "127.0.0.9"
ESP = Template()
WHOLE = Require(encrypted=True, mode="transport")
ENCRYPTED = Require(encrypted=True)
UDP, TCP = "udp", "tcp"


@pytest.fixture
def policies(monkeypatch: Any) -> Policies:
    return Policies(monkeypatch, real=False)


@pytest.fixture(params=[UDP, TCP])
def kind(request: Any) -> str:
    return str(request.param)


@contextlib.asynccontextmanager
async def opened(kind: str, backend: Any, **options: Any) -> Any:
    """A datagram endpoint or a server on a port of its own; its transport or server."""
    options = {"require": ENCRYPTED, **options}
    if kind == UDP:
        where = {} if "sock" in options else {"local_addr": (HOST, 0)}
        transport, _ = await ipsec_aio.create_datagram_endpoint(
            Datagrams, backend=backend, **where, **options
        )
        try:
            yield transport
        finally:
            await close(transport)
    else:
        where = {} if "sock" in options else {"host": HOST, "port": 0}
        server = await ipsec_aio.create_server(Tokened, backend=backend, **where, **options)
        try:
            yield server
        finally:
            server.close()


def place(endpoint: Any) -> str:
    if isinstance(endpoint, asyncio.AbstractServer):
        return str(endpoint.enforcement)  # type: ignore[attr-defined]
    return str(endpoint.get_extra_info("ipsec_enforced"))


async def seen() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


# Where


async def test_what_the_requirement_says_whole_the_kernel_enforces(
    policies: Policies, kind: str
) -> None:
    async with opened(kind, KernelBackend(), require=WHOLE) as endpoint:
        assert place(endpoint) == "kernel"
        assert policies.templates(endpoint) == (ESP,)
        assert policies.on(endpoint, Direction.OUT) is None
        assert policies.on(endpoint).selector.family == socket.AF_INET  # type: ignore[union-attr]


async def test_what_it_leaves_open_the_policies_of_the_port_say(
    policies: Policies, kind: str
) -> None:
    backend = KernelBackend()
    backend.add_policy(dst=HOST, src=OTHER, proto=kind, reqid=7)
    backend.add_policy(src=HOST, dst=OTHER, proto=kind, reqid=8, direction="out")
    backend.add_policy(dst=HOST, src=OTHER, proto="sctp", mode="tunnel")
    async with opened(kind, backend) as endpoint:
        assert place(endpoint) == "kernel"
        assert policies.templates(endpoint) == (replace(ESP, reqid=7),)
        assert policies.templates(endpoint, Direction.OUT) == (replace(ESP, reqid=8),)


@pytest.mark.parametrize(
    ("require", "reason"),
    [
        (ENCRYPTED, "which mode"),
        (Require(assurance=Assurance.EXACT), "demands nothing"),
        (Require(integrity=True, mode="tunnel"), "which protocol"),
        (WHOLE | Require(integrity=True), "which protocol and mode"),
    ],
)
async def test_what_no_template_can_say_is_user_space_s(
    policies: Policies, kind: str, require: Require, reason: str
) -> None:
    async with opened(kind, KernelBackend(), require=require) as endpoint:
        assert place(endpoint) == "user"
        assert policies.on(endpoint) is None
    with pytest.raises(ValueError, match=f"cannot enforce.*{reason}"):
        async with opened(kind, KernelBackend(), require=require, enforce="kernel"):
            pass


async def test_user_space_alone_where_that_is_asked_for(policies: Policies, kind: str) -> None:
    async with opened(kind, KernelBackend(), require=WHOLE, enforce="user") as endpoint:
        assert place(endpoint) == "user"
    async with opened(kind, KernelBackend(), require=None) as endpoint:
        assert place(endpoint) == "user"
    assert policies.calls == []


async def test_without_privilege(policies: Policies, kind: str) -> None:
    policies.refuse = PermissionError(errno.EPERM, "no")
    async with opened(kind, KernelBackend(), require=WHOLE) as endpoint:
        assert place(endpoint) == "user"
    with pytest.raises(BackendDenied, match="CAP_NET_ADMIN"):
        async with opened(kind, KernelBackend(), require=WHOLE, enforce="kernel"):
            pass


async def test_a_kernel_without_xfrm(policies: Policies, kind: str) -> None:
    policies.refuse = OSError(errno.ENOPROTOOPT, "no")
    async with opened(kind, KernelBackend(), require=WHOLE) as endpoint:
        assert place(endpoint) == "user"
    with pytest.raises(BackendUnavailable, match="took no socket policy"):
        async with opened(kind, KernelBackend(), require=WHOLE, enforce="kernel"):
            pass


async def test_tables_of_no_kernel_and_of_another_namespace(policies: Policies, kind: str) -> None:
    foreign = KernelBackend()
    foreign.cookie = 1
    for backend, reason in ((RecordingBackend(), "no kernel"), (foreign, "another network")):
        async with opened(kind, backend, require=WHOLE) as endpoint:
            assert place(endpoint) == "user"
        with pytest.raises(BackendUnavailable, match=reason):
            async with opened(kind, backend, require=WHOLE, enforce="kernel"):
                pass
    assert policies.calls == []


async def test_an_ipv6_socket_must_keep_ipv4_out(policies: Policies, kind: str) -> None:
    type_ = socket.SOCK_DGRAM if kind == UDP else socket.SOCK_STREAM
    for only, host, expected in ((0, "::", "user"), (1, "::", "kernel"), (0, "::1", "kernel")):
        sock = socket.socket(socket.AF_INET6, type_)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
        sock.bind((host, 0))
        async with opened(kind, KernelBackend(), require=WHOLE, sock=sock) as endpoint:
            assert place(endpoint) == expected
    with socket.socket(socket.AF_INET6, type_) as sock:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(("::", 0))
        with pytest.raises(ValueError, match="V6ONLY"):
            async with opened(kind, KernelBackend(), require=WHOLE, sock=sock, enforce="kernel"):
                pass


async def test_sockets_that_are_not_ip_s(policies: Policies, tmp_path: Any) -> None:
    path = str(tmp_path / "s")
    with pytest.raises(ValueError, match="plain TCP and UDP"):
        await ipsec_aio.create_datagram_endpoint(
            PlainDatagrams,
            local_addr=path,
            family=socket.AF_UNIX,
            backend=KernelBackend(),
            require=WHOLE,
            enforce="kernel",
        )
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path + "2")
        with pytest.raises(ValueError, match="plain TCP and UDP"):
            await ipsec_aio.create_server(
                Plain, sock=sock, backend=KernelBackend(), require=WHOLE, enforce="kernel"
            )
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
        pytest.raises(ValueError, match="is bound"),
    ):
        await ipsec_aio.create_datagram_endpoint(
            PlainDatagrams, sock=sock, backend=KernelBackend(), require=WHOLE, enforce="kernel"
        )
    assert policies.calls == []


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"enforce": "kernal"}, ValueError),
        ({"enforce": "kernel", "require": None}, ValueError),
        ({"deadline": -1.0}, ValueError),
        ({"deadline": float("nan")}, ValueError),
        ({"deadline": float("inf")}, ValueError),
        ({"deadline": "1"}, TypeError),
        ({"deadline": True}, TypeError),
    ],
)
async def test_options_are_checked(kind: str, options: dict[str, Any], error: Any) -> None:
    with pytest.raises(error):
        async with opened(kind, KernelBackend(), **options):
            pass
    options = {"require": ENCRYPTED, **options}
    with pytest.raises(error):
        await ipsec_aio.open_connection(HOST, 1, backend=KernelBackend(), **options)


# From when on


async def test_a_port_that_is_known_is_enforced_before_bind(policies: Policies) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    backend = KernelBackend()
    backend.add_policy(dst=HOST, proto="udp", dst_port=port)
    transport, _ = await ipsec_aio.create_datagram_endpoint(
        Datagrams, local_addr=(HOST, port), backend=backend, require=ENCRYPTED
    )
    assert policies.calls == ["allow in"]
    await close(transport)


async def test_a_port_that_is_not_known_is_shut_until_it_is(policies: Policies) -> None:
    async with opened(UDP, KernelBackend(), require=WHOLE):
        assert policies.calls == ["block in", "allow in"]
    policies.calls.clear()
    async with opened(UDP, KernelBackend()) as transport:
        assert policies.calls == ["block in", "clear"]
        assert policies.on(transport) is None


async def test_failure_leaves_a_given_socket_as_it_was(policies: Policies) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((HOST, 0))

        def fail() -> Any:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await ipsec_aio.create_datagram_endpoint(
                fail, sock=sock, backend=KernelBackend(), require=WHOLE
            )
        assert policies.calls == ["allow in", "clear"]
        assert policies.on(sock) is None


def protecting(**options: Any) -> KernelBackend:
    """What arrives over loopback passes for protected."""
    backend = KernelBackend(**options)
    backend.add_sa(src=HOST, dst=HOST, reqid=7)
    return backend


async def received(transport: Any, data: bytes = b"hello") -> Any:
    """Send a datagram, and return the token that came with it."""
    log = transport.get_protocol().log
    count = len(log.of("data")) + 1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((HOST, 0))
        sock.sendto(data, transport.get_extra_info("sockname"))
        return (await log.until("data", count))[-1][2]


async def test_enforced_datagrams_say_so(policies: Policies) -> None:
    async with opened(UDP, protecting(), require=WHOLE) as transport:
        token = await received(transport)
        assert token.assurance is Assurance.ENFORCED
        assert token.protected


async def test_a_socket_that_was_bound_before_is_enforced_but_proves_nothing(
    policies: Policies,
) -> None:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((HOST, 0))
    backend = protecting()
    async with opened(UDP, backend, require=WHOLE, sock=sock) as transport:
        assert place(transport) == "kernel"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.sendto(b"hello", transport.get_extra_info("sockname"))
            await transport.get_protocol().log.until("refused")
    assert all(e.enforced is None for e in backend.evidence)


async def test_a_connected_endpoint_is_enforced_for_its_peer(policies: Policies) -> None:
    backend = KernelBackend()
    backend.add_policy(src=OTHER, dst=HOST, reqid=7)
    backend.add_policy(src=HOST, dst=OTHER, reqid=8, direction="out")
    backend.add_policy(src="127.0.0.8", dst=HOST, mode="tunnel")
    transport, _ = await ipsec_aio.create_datagram_endpoint(
        Datagrams,
        local_addr=(HOST, 0),
        remote_addr=(OTHER, 9),
        backend=backend,
        require=ENCRYPTED,
    )
    assert place(transport) == "kernel"
    assert policies.templates(transport) == (replace(ESP, reqid=7),)
    assert policies.templates(transport, Direction.OUT) == (replace(ESP, reqid=8),)
    assert backend.evidence[-1].enforced == replace(ESP, reqid=7)
    await close(transport)


async def test_what_leaves_has_its_policy_once_it_is_connected(
    policies: Policies, monkeypatch: Any
) -> None:
    """Under one without an SA, connecting would fail."""
    backend = KernelBackend()
    backend.add_policy(src=OTHER, dst=HOST)
    backend.add_policy(src=HOST, dst=OTHER, direction="out")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    made = enforce.Enforcement.connected

    def connected(self: Any) -> None:
        policies.calls.append("connected")
        made(self)

    monkeypatch.setattr(enforce.Enforcement, "connected", connected)
    for local in (port, 0):
        policies.calls.clear()
        transport, _ = await ipsec_aio.create_datagram_endpoint(
            Datagrams,
            local_addr=(HOST, local),
            remote_addr=(OTHER, 9),
            backend=backend,
            require=ENCRYPTED,
        )
        before, after = policies.calls[: policies.calls.index("connected")], policies.calls
        assert "allow out" not in before
        assert "allow out" in after
        assert transport.get_extra_info("ipsec_pinning") == "kernel"
        await close(transport)


async def test_what_finds_no_sa_is_lost_and_nothing_spins(
    policies: Policies, monkeypatch: Any
) -> None:
    backend = KernelBackend()
    backend.add_policy(src=OTHER, dst=HOST)
    backend.add_policy(src=HOST, dst=OTHER, direction="out")
    transport, protocol = await ipsec_aio.create_datagram_endpoint(
        Datagrams, local_addr=(HOST, 0), backend=backend, require=ENCRYPTED
    )

    def send(*_: Any) -> None:
        raise BlockingIOError(errno.EAGAIN, "no SA")

    monkeypatch.setattr(transport, "_send", send)
    monkeypatch.setattr(transport, "_direct", None)
    for _ in range(3):
        transport.sendto(b"lost", (OTHER, 9))
    assert transport.get_write_buffer_size() > 0
    await until(lambda: transport.get_write_buffer_size() == 0)
    assert protocol.log.of("error") == []
    await close(transport)


@contextlib.asynccontextmanager
async def accepted(backend: Any, **options: Any) -> Any:
    """A server, and a connection of it that is up."""
    options = {"require": WHOLE, **options}
    protocol = Tokened()
    async with (
        serving(lambda: protocol, backend, **options) as server,
        connected(port_of(server)),
    ):
        await protocol.log.until("made")
        yield server, protocol


async def test_enforced_connections_say_so(policies: Policies) -> None:
    async with accepted(protecting()) as (server, protocol):
        [(token, _)] = protocol.log.of("made")
        assert token.assurance is Assurance.ENFORCED
        assert protocol.transport.get_extra_info("ipsec_enforced") == "kernel"
        assert server.enforcement == "kernel"


async def test_a_server_that_listened_before_proves_nothing(policies: Policies) -> None:
    sock = socket.create_server((HOST, 0))
    backend = protecting()
    async with opened(TCP, backend, require=WHOLE, sock=sock) as server:
        assert server.enforcement == "kernel"
        with contextlib.suppress(ConnectionResetError):
            async with connected(port_of(server)) as client:
                await client.log.until("lost")
        assert server.ipsec_stats.refused == 1
    assert all(e.enforced is None for e in backend.evidence)


async def test_of_several_sockets_each_has_its_own(policies: Policies) -> None:
    backend = KernelBackend()
    backend.add_policy(dst=HOST)
    server = await ipsec_aio.create_server(
        Tokened, [HOST, OTHER], 0, backend=backend, require=ENCRYPTED
    )
    assert server.enforcement == "user"
    by_host = {sock.getsockname()[0]: policies.on(sock) for sock in server.sockets}
    assert by_host[OTHER] is None
    assert by_host[HOST] is not None
    server.close()


# What it stands in for


async def test_what_the_policies_refuse_is_refused(policies: Policies) -> None:
    backend = protecting()
    backend.add_policy(src=HOST, dst=HOST, action="block", template=None)
    async with opened(UDP, backend, require=WHOLE) as transport:
        assert place(transport) == "kernel"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.bind((HOST, 0))
            client.sendto(b"hello", transport.get_extra_info("sockname"))
            [(_, error)] = await transport.get_protocol().log.until("refused")
    assert "blocks" in str(error)
    async with opened(TCP, backend, require=WHOLE) as server:
        with contextlib.suppress(ConnectionResetError):
            async with connected(port_of(server)) as client:
                await client.log.until("lost")
        assert server.ipsec_stats.refused == 1


async def test_a_loose_one_needs_the_stamp(policies: Policies, kind: str) -> None:
    backend = KernelBackend()
    backend.add_policy(src=HOST, dst=HOST, reqid=7)
    backend.add_policy(src=OTHER, dst=HOST, reqid=8)
    async with opened(kind, backend) as endpoint:
        assert place(endpoint) == "user"
    with pytest.raises(ValueError, match="without the stamp"):
        async with opened(kind, backend, enforce="kernel"):
            pass
    backend.restore_stamp()
    async with opened(kind, backend) as endpoint:
        assert place(endpoint) == "kernel"
        assert policies.templates(endpoint) == (ESP,)


async def test_an_accepted_connection_is_held_to_its_peer_s_policy(policies: Policies) -> None:
    backend = protecting()
    backend.restore_stamp()
    backend.add_policy(src=HOST, dst=HOST, reqid=7)
    backend.add_policy(src=OTHER, dst=HOST, reqid=8)
    backend.add_policy(src=HOST, dst=HOST, reqid=7, direction="out")
    async with accepted(backend) as (server, protocol):
        assert policies.templates(server) == (ESP,)
        assert policies.templates(protocol.transport) == (replace(ESP, reqid=7),)
        assert policies.templates(protocol.transport, Direction.OUT) == (replace(ESP, reqid=7),)


# When policies change


@pytest.fixture
def at_once(monkeypatch: Any) -> None:
    monkeypatch.setattr(enforce, "REFRESH", 0.0)


async def test_it_follows_and_evidence_says_what_held_all_along(
    policies: Policies, at_once: None
) -> None:
    backend = protecting()
    policy = backend.add_policy(dst=HOST, src=HOST, reqid=7)
    async with opened(UDP, backend) as transport:
        assert policies.templates(transport) == (replace(ESP, reqid=7),)
        assert (await received(transport)).assurance is Assurance.ENFORCED
        assert backend.evidence[-1].enforced == replace(ESP, reqid=7)
        backend.add_sa(src=HOST, dst=HOST, reqid=9)
        backend.add_policy(dst=HOST, src=HOST, reqid=9)
        assert policy.key in {p.key for p in backend.mirror.spd}
        await seen()
        assert policies.templates(transport) == (replace(ESP, reqid=9),)
        assert (await received(transport)).assurance is Assurance.ENFORCED
        assert backend.evidence[-1].enforced == ESP, "some of it came under the other reqid"
        backend.flush_policies()
        await seen()
        assert place(transport) == "kernel", "without any policy it stays as it was"
        assert policies.templates(transport) == (replace(ESP, reqid=9),)


async def test_another_kind_proves_nothing_of_what_was_queued(
    policies: Policies, at_once: None
) -> None:
    backend = protecting()
    policy = backend.add_policy(dst=HOST, src=HOST)
    async with opened(UDP, backend) as transport:
        backend.delete_policy(policy)
        await seen()
        assert policies.templates(transport) == (ESP,)
        backend.add_policy(dst=HOST, src=HOST, mode="tunnel")
        await seen()
        tunnel = Template(mode=Mode.TUNNEL)
        assert policies.templates(transport) == (tunnel,)
        assert place(transport) == "kernel"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.sendto(b"hello", transport.get_extra_info("sockname"))
            await transport.get_protocol().log.until("refused")
        assert backend.evidence[-1].enforced is None


async def test_where_it_cannot_be_right_any_more(policies: Policies, at_once: None) -> None:
    backend = KernelBackend()
    backend.add_policy(dst=HOST, src=HOST)
    async with (
        opened(UDP, backend) as auto,
        opened(UDP, backend, enforce="kernel") as kernel,
    ):
        backend.add_policy(dst=HOST, src=OTHER, mode="tunnel")
        await seen()
        assert place(auto) == "user"
        assert policies.on(auto) is None
        assert place(kernel) == "kernel"
        assert policies.templates(kernel) == (ESP,)


async def test_a_server_that_falls_back_says_so_first(policies: Policies, at_once: None) -> None:
    backend = protecting()
    backend.add_policy(dst=HOST, src=HOST, reqid=7)
    async with accepted(backend, require=ENCRYPTED) as (server, protocol):
        backend.add_policy(dst=HOST, src=OTHER, mode="tunnel")
        await seen()
        assert server.enforcement == "user"
        assert policies.on(server) is None
        transport = protocol.transport
        assert transport.get_extra_info("ipsec_enforced") == "kernel", "it has inherited its own"
        assert policies.calls.count("clear") == 1


async def test_what_cannot_be_replaced_or_taken_away_stays(
    policies: Policies, at_once: None, caplog: Any
) -> None:
    backend = KernelBackend()
    backend.add_policy(dst=HOST, src=HOST)
    async with opened(UDP, backend) as transport:
        policies.refuse = PermissionError(errno.EPERM, "dropped")
        for reqid in (7, 8):
            backend.add_policy(dst=HOST, src=HOST, reqid=reqid)
            await seen()
        assert place(transport) == "kernel"
        assert policies.templates(transport) == (ESP,)
        assert sum("stays as it was" in r.getMessage() for r in caplog.records) == 1
        backend.add_policy(dst=HOST, src=OTHER, mode="tunnel")
        await seen()
        assert place(transport) == "user", "nothing is promised, and nothing let in"
        assert "could not be taken away" in caplog.text


async def test_what_leaves_is_the_spd_s_again_where_peers_differ(
    policies: Policies, at_once: None
) -> None:
    backend = KernelBackend()
    backend.add_policy(dst=HOST, src=HOST)
    mine = backend.add_policy(src=HOST, dst=HOST, direction="out", reqid=7)
    async with opened(UDP, backend) as transport:
        assert policies.templates(transport, Direction.OUT) == (replace(ESP, reqid=7),)
        backend.delete_policy(mine)
        await seen()
        assert policies.templates(transport, Direction.OUT) == (replace(ESP, reqid=7),)
        backend.add_policy(src=HOST, dst=HOST, direction="out", reqid=7)
        backend.add_policy(src=HOST, dst=OTHER, direction="out", reqid=8)
        await seen()
        policy = policies.on(transport, Direction.OUT)
        assert policy is not None
        assert policy.templates == ()
        assert policy.action is PolicyAction.ALLOW
        assert policy.selector.proto == 255, "it is about no traffic of this socket"


async def test_looks_at_the_spd_are_spaced(policies: Policies, monkeypatch: Any) -> None:
    monkeypatch.setattr(enforce, "REFRESH", 0.05)
    backend = KernelBackend()
    backend.add_policy(dst=HOST, src=HOST, reqid=1)
    async with opened(UDP, backend) as transport:
        policies.calls.clear()
        for reqid in range(2, 12):
            backend.add_policy(dst=HOST, src=HOST, reqid=reqid)
            await seen()
        assert policies.templates(transport) == (replace(ESP, reqid=2),)
        await until(lambda: policies.templates(transport) == (replace(ESP, reqid=11),))
        assert policies.calls.count("allow in") == 2


async def test_a_connection_follows_and_its_token_with_it(
    policies: Policies, at_once: None
) -> None:
    backend = protecting()
    backend.add_policy(dst=HOST, src=HOST, reqid=7)
    async with accepted(backend, require=ENCRYPTED) as (_, protocol):
        transport = protocol.transport
        first = transport.get_extra_info("ptoken")
        assert first.assurance is Assurance.ENFORCED
        backend.add_sa(
            src=HOST, dst=HOST, encryption="ecb(cipher_null)", authentication="hmac(md5)"
        )
        await seen()
        assert transport.get_extra_info("ptoken") is first, "reqid 7 is demanded"
        backend.add_policy(dst=HOST, src=HOST, reqid=0)
        await seen()
        token = transport.get_extra_info("ptoken")
        assert token.assurance is Assurance.ENFORCED
        assert token.privacy_protected is False
        backend.add_policy(dst=HOST, src=HOST, mode="tunnel")
        await seen()
        assert not transport.get_extra_info("ptoken").protected


async def test_a_descriptor_that_is_another_socket_is_left_alone(
    policies: Policies, at_once: None, monkeypatch: Any
) -> None:
    backend = KernelBackend()
    backend.add_policy(dst=HOST, src=HOST, reqid=1)
    async with opened(UDP, backend):
        monkeypatch.setattr(enforce, "socket_cookie", lambda sock: 0)
        policies.calls.clear()
        backend.add_policy(dst=HOST, src=HOST, reqid=2)
        await seen()
        assert policies.calls == []


async def test_what_is_closed_is_followed_no_more(policies: Policies, at_once: None) -> None:
    backend = protecting()
    backend.add_policy(dst=HOST, src=HOST, reqid=7)
    async with accepted(backend) as (server, protocol):
        server.close()
        await seen()
    await protocol.log.until("lost")
    protocol.transport = None
    del server, protocol
    gc.collect()
    policies.calls.clear()
    backend.add_policy(dst=HOST, src=HOST, reqid=8)
    await seen()
    assert policies.calls == []
    gc.collect()
    await seen()
    gc.collect()
    await seen()
    assert not backend._subscribers


# On this machine's own kernel, which drops what is clear, over loopback too


@pytest.mark.skipif(not permitted(), reason="socket policies need CAP_NET_ADMIN")
async def test_the_kernel_drops_clear_datagrams(monkeypatch: Any) -> None:
    Policies(monkeypatch, real=True)
    backend = KernelBackend()
    async with opened(UDP, backend, require=WHOLE, enforce="kernel") as transport:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            for _ in range(100):
                client.sendto(b"clear", transport.get_extra_info("sockname"))
            await seen()
            assert transport.ipsec_stats.received == 0


@pytest.mark.skipif(not permitted(), reason="socket policies need CAP_NET_ADMIN")
async def test_the_kernel_answers_no_clear_handshake() -> None:
    loop = asyncio.get_running_loop()
    async with opened(TCP, KernelBackend(), require=WHOLE, enforce="kernel") as server:
        with socket.socket() as client:
            client.setblocking(False)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await loop.sock_connect(client, (HOST, port_of(server)))
        assert server.ipsec_stats.received == 0


@pytest.mark.parametrize("follows", [True, False], ids=["followed", "kept"])
async def test_what_is_applied_to_a_reply_is_the_sockets_own(
    policies: Policies, follows: bool
) -> None:
    """The SPD may have come to demand another SA than the socket's own policy does."""
    backend = KernelBackend()
    backend.add_policy(src=OTHER, dst=HOST)
    backend.add_policy(src=HOST, dst=OTHER, direction="out", reqid=1)
    backend.add_sa(src=OTHER, dst=HOST)
    weak = {"encryption": "ecb(cipher_null)", "authentication": "hmac(sha256)"}
    backend.add_sa(src=HOST, dst=OTHER, direction="out", reqid=1, **weak)
    backend.add_sa(src=HOST, dst=OTHER, direction="out", reqid=2)
    async with opened(UDP, backend, enforce="kernel") as transport:
        protocol = transport.get_protocol()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.bind((OTHER, 0))
            client.setblocking(False)
            client.sendto(b"x", transport.get_extra_info("sockname"))
            ((_, addr, token),) = await protocol.log.until("data")
            with pytest.raises(ipsec_aio.ProtectionError, match="it might be sent under"):
                transport.sendto(b"reply", addr, ptoken=token)
            if not follows:
                # No template says both: the socket's policies stay.
                backend.add_policy(src="127.0.0.30", dst=HOST, mode="tunnel")
            backend.add_policy(src=HOST, dst=OTHER, direction="out", reqid=2)
            if follows:
                transport.sendto(b"reply", addr, ptoken=token)
                assert client.recv(10) == b"reply"
            else:
                with pytest.raises(ipsec_aio.ProtectionError, match="socket's own policy"):
                    transport.sendto(b"reply", addr, ptoken=token)
            reqid = 2 if follows else 1
            assert policies.templates(transport, Direction.OUT) == (replace(ESP, reqid=reqid),)


class Mixing(KernelBackend):
    """Nothing drops decrypted fragments."""

    drops_fragments: Any = False


@pytest.mark.parametrize("mode", ["transport", "tunnel"])
async def test_what_may_be_clear_in_part_is_not_enforced(
    policies: Policies, kind: str, mode: str
) -> None:
    backend = Mixing()
    backend.add_sa(src=HOST, dst=HOST, mode=mode)
    backend.add_policy(src=HOST, dst=HOST, mode=mode)
    require = Require(encrypted=True, mode=mode)
    async with opened(kind, backend, require=require) as endpoint:
        assert place(endpoint) == "kernel"
        if kind == UDP:
            # It is told of each datagram whether it was put together.
            assert (await received(endpoint)).assurance is Assurance.ENFORCED
        else:
            refused = mode == "tunnel"
            async with connected(port_of(endpoint)) as client:
                if refused:
                    await client.log.until("lost")
                await until(lambda: endpoint.ipsec_stats.received == 1)
                assert endpoint.ipsec_stats.refused == refused
                assert endpoint.ipsec_stats.protected == (not refused)


async def test_a_tunnels_latch_keeps_no_fragments_off(policies: Policies) -> None:
    backend = Mixing()
    backend.restore_stamp()
    backend.add_sa(src=HOST, dst=HOST, mode="tunnel")
    async with accepted(backend, require=None, latch=True) as (_, protocol):
        connection = protocol.transport._ipsec_connection
        connection.guard.latch.kernel = True
        assert not connection.is_kept_clean
        backend.drops_fragments = True
        assert connection.is_kept_clean


async def test_a_connection_is_given_no_name_that_it_did_not_begin_with(
    policies: Policies,
) -> None:
    """Two SAs fit when it begins; that one of them goes does not make it the other's."""
    backend = KernelBackend()
    backend.add_policy(dst=HOST, src="127.0.0.0/8")
    alice = backend.add_sa(src=OTHER, dst=HOST, peer="alice@example.org")
    backend.add_sa(src="127.0.0.30", dst=HOST, peer="bob@example.org")
    protocol = Tokened()
    async with (
        serving(lambda: protocol, backend, require=ENCRYPTED) as server,
        connected(port_of(server), source=OTHER),
    ):
        [(token, _)] = await protocol.log.until("made")
        assert token.assurance is Assurance.ENFORCED
        assert token.peer is None
        now = backend.clock() + 20
        backend.clock = backend.resolver.clock = lambda: now
        backend.delete_sa(alice)
        now += 20
        backend.drain()
        await seen()
        later = protocol.transport.get_extra_info("ptoken")
        assert later.peer is None
        assert later is token
