"""``get_ptoken``: the token of a connection, from whatever names it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datagram_tools import HERE, Plain, Tokened, Witnessing, close, memory

import ipsec_aio
from ipsec_aio import Assurance, create_datagram_endpoint, get_ptoken, set_default_backend
from ipsec_aio.net import registry
from ipsec_aio.tokens import PToken


@pytest.fixture
def tcp() -> Iterator[tuple[socket.socket, socket.socket, socket.socket]]:
    with socket.create_server(HERE) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
        with near, far:
            yield near, far, listener


async def test_a_connected_socket_is_judged_by_its_addresses(tcp: Any) -> None:
    near, far, _ = tcp
    backend = Witnessing()
    token = get_ptoken(near, backend=backend)
    assert isinstance(token, PToken)
    evidence = backend.asked[-1]
    assert (evidence.protocol, evidence.local, evidence.local_port) == (
        6,
        socket.inet_aton("127.0.0.1"),
        near.getsockname()[1],
    )
    assert (evidence.peer, evidence.peer_port) == (evidence.local, far.getsockname()[1])
    assert (evidence.mark, evidence.generation, evidence.doubt) == (None, 0, "")
    assert backend.drained


async def test_all_names_of_a_socket_give_one_token(tcp: Any) -> None:
    near, _, _ = tcp
    backend = ipsec_aio.MemoryBackend()
    token = get_ptoken(near, backend=backend)
    assert token.assurance is Assurance.NONE
    assert get_ptoken(near.fileno(), backend=backend) is token
    with near.dup() as same:
        assert get_ptoken(same, backend=backend) is token
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_connection(asyncio.Protocol, sock=near.dup())
    assert get_ptoken(transport, backend=backend) is token
    assert get_ptoken(transport.get_extra_info("socket"), backend=backend) is token
    transport.abort()


async def test_udp_and_ipv6() -> None:
    backend = Witnessing()
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.connect(("::1", 9))
        get_ptoken(sock, backend=backend)
        assert (backend.asked[-1].protocol, len(backend.asked[-1].peer)) == (17, 16)
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.connect(("::ffff:127.0.0.1", 9))
        get_ptoken(sock, backend=backend)
        assert backend.asked[-1].peer == socket.inet_aton("127.0.0.1")


async def test_a_connection_of_ours_has_its_own(tcp: Any) -> None:
    near, far, _ = tcp

    class Ours:
        cookie = None
        ptoken = get_ptoken(near, backend=memory())
        transport: Any = None

        def get_extra_info(self, name: str) -> Any:
            return far

    ours: Any = Ours()
    registry.remember(ours)
    assert ours in registry.living()
    # It has no transport yet, so nobody can ask for it.
    with pytest.raises(ipsec_aio.BackendUnavailable):
        get_ptoken(far)
    ours.transport = ours
    assert get_ptoken(far) is ours.ptoken
    assert get_ptoken(far.fileno()) is ours.ptoken
    registry.forget(ours)
    assert ours not in registry.living()
    with pytest.raises(ipsec_aio.BackendUnavailable):
        get_ptoken(far)


async def test_a_datagram_transport() -> None:
    backend = memory()
    server, _ = await create_datagram_endpoint(Tokened, HERE, backend=backend)
    there = server.get_extra_info("sockname")
    client, protocol = await create_datagram_endpoint(Tokened, remote_addr=there, backend=backend)
    assert get_ptoken(client) is client.get_extra_info("ptoken")
    assert get_ptoken(client) is protocol.log.of("made")[0][0]
    with pytest.raises(OSError) as caught:  # noqa: PT011
        get_ptoken(server)
    assert caught.value.errno == errno.ENOTCONN
    await close(server, client)
    with pytest.raises(OSError) as caught:  # noqa: PT011
        get_ptoken(server)
    assert caught.value.errno == errno.EBADF


class TestDoubts:
    async def test_a_unix_socket(self) -> None:
        near, far = socket.socketpair()
        with near, far:
            token = get_ptoken(near, backend=memory())
        assert token.assurance is Assurance.UNKNOWN
        assert "not an IP socket" in token.audit_string

    async def test_another_namespace(self, tcp: Any) -> None:
        backend = Witnessing()
        backend.cookie = 1
        assert "namespace" in get_ptoken(tcp[0], backend=backend).audit_string

    async def test_another_protocol(self) -> None:
        try:
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, 136)
        except OSError:
            pytest.skip("this kernel has no UDP-Lite")
        with sock:
            sock.connect(("127.0.0.1", 9))
            assert "neither" in get_ptoken(sock, backend=memory()).audit_string


class TestErrors:
    def failing(self, source: Any, **kwargs: Any) -> OSError:
        with pytest.raises(OSError) as caught:  # noqa: PT011
            get_ptoken(source, **kwargs)
        return caught.value

    def test_what_is_not_connected(self, tcp: Any) -> None:
        backend = memory()
        assert self.failing(tcp[2], backend=backend).errno == errno.ENOTCONN
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            assert self.failing(sock, backend=backend).errno == errno.ENOTCONN

    def test_what_is_no_socket(self) -> None:
        with open(os.devnull) as file:
            assert self.failing(file).errno == errno.ENOTSOCK
            assert self.failing(file.fileno()).errno == errno.ENOTSOCK
        assert self.failing(-1).errno == errno.EBADF
        with pytest.raises(TypeError, match="no socket"):
            get_ptoken("socket")  # type: ignore[arg-type]

    def test_a_closed_socket(self) -> None:
        sock = socket.socket()
        sock.close()
        assert self.failing(sock).errno == errno.EBADF

    def test_a_transport_without_a_socket(self) -> None:
        assert "no socket" in str(self.failing(asyncio.Transport()))

    def test_without_a_backend(self, tcp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("IPSEC_AIO_BACKEND", raising=False)
        assert isinstance(self.failing(tcp[0]), ipsec_aio.BackendUnavailable)

    async def test_a_closed_backend(self, tcp: Any) -> None:
        backend = memory()
        await backend.aclose()
        assert isinstance(self.failing(tcp[0], backend=backend), ipsec_aio.BackendUnavailable)

    def test_the_default_backend(self, tcp: Any) -> None:
        set_default_backend(memory())
        try:
            assert isinstance(get_ptoken(tcp[0]), PToken)
        finally:
            set_default_backend(None)

    def test_nothing_is_left_open(self, tcp: Any) -> None:
        before = len(os.listdir("/proc/self/fd"))
        for source in (*tcp, -1):
            with contextlib.suppress(OSError):
                get_ptoken(source, backend=memory())
        assert len(os.listdir("/proc/self/fd")) == before


class TestABackendThatOnlyTheEnvironmentNames:
    @pytest.fixture(autouse=True)
    def named(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        file = tmp_path / "ipsec.toml"
        file.write_text('[[policy]]\nsrc = "127.0.0.1"\ndst = "127.0.0.1"\n')
        monkeypatch.setenv("IPSEC_AIO_BACKEND", f"memory:{file}")

    def check(self, near: socket.socket) -> PToken:
        token = get_ptoken(near)
        # Without a policy it would be NONE.
        assert "no policy checks what this host sends to itself" in token.audit_string
        assert get_ptoken(near) is token
        return token

    def test_without_a_loop(self, tcp: Any) -> None:
        self.check(tcp[0])

    async def test_before_any_endpoint(self, tcp: Any) -> None:
        token = self.check(tcp[0])
        server, _ = await create_datagram_endpoint(Tokened, HERE)
        # The endpoint takes the same backend, so one channel has one token.
        assert get_ptoken(tcp[0]) is token
        await close(server)


async def test_a_plain_protocols_connected_endpoint() -> None:
    transport, _ = await create_datagram_endpoint(
        Plain, remote_addr=("127.0.0.1", 9), backend=memory()
    )
    assert isinstance(get_ptoken(transport), PToken)
    await close(transport)
