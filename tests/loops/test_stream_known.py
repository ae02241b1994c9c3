"""When one answer of the backend serves several connections of a peer, and when not."""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import Any

import pytest

from ipsec_aio import Assurance, MemoryBackend, create_server
from ipsec_aio.backends.memory import selector
from ipsec_aio.backends.tables import TableBackend
from ipsec_aio.evidence import IPPROTO_TCP, Evidence
from ipsec_aio.net import connection
from ipsec_aio.net.connection import Facts, Judge
from ipsec_aio.net.listening import Listener
from ipsec_aio.tokens import PToken

HERE, PEER, OTHER = "192.0.2.1", "192.0.2.2", "192.0.2.3"


class Stamped(MemoryBackend):
    """The memory backend's tables; evidence brings its own marks."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def resolve(self, evidence: Evidence) -> PToken:
        self.asked += 1
        return TableBackend.resolve(self, evidence)

    def ignores_ports(self, evidence: Evidence) -> bool:
        return TableBackend.ignores_ports(self, evidence)

    def seen(self, spi: int, peer: str = PEER, *, port: int = 40000, doubt: str = "") -> Facts:
        mark = int.from_bytes(spi.to_bytes(4, "big"), sys.byteorder)
        generation, after = self.resolver.generation, self.policies
        return Facts((HERE, 80), (peer, port), mark, generation, doubt, after)


def token_of(judge: Judge, facts: Facts) -> PToken:
    """What a connection gets; it is known to be protected only where it is."""
    token, protected = judge.resolve_accepted(facts)
    assert protected in (None, token.protected)
    return token


@pytest.fixture
def backend() -> Stamped:
    return Stamped()


@pytest.fixture
async def judge(backend: Stamped) -> Judge:
    made = Judge.of(asyncio.get_running_loop(), backend)
    backend.asked = 0
    return made


async def test_connections_of_a_peer_share_an_answer(backend: Stamped, judge: Judge) -> None:
    one = backend.add_sa(src=PEER, dst=HERE, spi=1)
    backend.add_sa(src=OTHER, dst=HERE, spi=2)
    tokens = [token_of(judge, backend.seen(1, port=port)) for port in (1, 2, 3)]
    assert len(set(tokens)) == backend.asked == 1
    assert tokens[0].assurance is Assurance.EXACT
    # Another peer, another SA, or none: these are asked for.
    assert token_of(judge, backend.seen(2, OTHER)).assurance is Assurance.EXACT
    assert token_of(judge, backend.seen(1, OTHER)).assurance is Assurance.UNKNOWN
    assert token_of(judge, backend.seen(0)).assurance is Assurance.NONE
    assert backend.asked == 4
    backend.delete_sa(one)
    rekeyed = backend.add_sa(src=PEER, dst=HERE, spi=1, aead=None, authentication="hmac(sha256)")
    assert rekeyed.spi == one.spi
    [weaker] = {token_of(judge, backend.seen(1, port=port)) for port in (1, 2)}
    assert weaker is not tokens[0]
    assert weaker.privacy_protected is False


async def test_a_stamp_of_another_generation_is_another_thing(
    backend: Stamped, judge: Judge
) -> None:
    backend.add_sa(src=PEER, dst=HERE, spi=1)
    before = backend.seen(1)
    assert token_of(judge, before).protected
    backend.lose_stamp()
    assert token_of(judge, before).assurance is Assurance.UNKNOWN
    assert token_of(judge, backend.seen(1)).assurance < Assurance.EXACT
    backend.restore_stamp()
    assert token_of(judge, before).assurance is Assurance.UNKNOWN
    assert token_of(judge, backend.seen(1)).protected
    assert not token_of(judge, backend.seen(1, doubt="of a test")).protected


async def test_where_an_sa_asks_for_ports_every_connection_is_judged(
    backend: Stamped, judge: Judge
) -> None:
    for port, cipher in ((1, "rfc4106(gcm(aes))"), (2, "rfc4543(gcm(aes))")):
        backend.add_sa(
            src=f"198.51.100.{port}",
            dst="198.51.100.9",
            mode="tunnel",
            spi=1,
            reqid=port,
            proto="esp" if port == 1 else "ah",
            aead=cipher if port == 1 else None,
            authentication=None if port == 1 else "hmac(sha256)",
            selector=selector(PEER, HERE, "tcp", src_port=port),
        )
    first, second, neither = (token_of(judge, backend.seen(1, port=p)) for p in (1, 2, 3))
    assert (first.privacy_protected, second.privacy_protected) == (True, False)
    assert neither.assurance is Assurance.UNKNOWN


async def test_what_is_not_known_yet_is_asked_again(backend: Stamped, judge: Judge) -> None:
    backend.hold_events()
    assert token_of(judge, backend.seen(1)).pending
    assert token_of(judge, backend.seen(1, port=1)).pending
    assert backend.asked == 2
    backend.add_sa(src=PEER, dst=HERE, spi=1)
    backend.release_events()
    assert token_of(judge, backend.seen(1)).assurance is Assurance.EXACT


async def test_an_identity_that_is_awaited_is_not_missed(backend: Stamped, judge: Judge) -> None:
    sa = backend.add_sa(src=PEER, dst=HERE, spi=1, identity_pending=True)
    early = token_of(judge, backend.seen(1))
    assert early.pending
    backend.identify(sa, peer="fqdn:peer.example")
    assert str(token_of(judge, backend.seen(1)).peer) == "peer.example"
    assert early.channel is token_of(judge, backend.seen(1, port=1))


async def test_what_is_kept_is_bounded(
    backend: Stamped, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "KNOWN_LIMIT", 3)
    peers = [f"192.0.2.{n}" for n in range(10, 20)]
    for number, peer in enumerate(peers, 1):
        backend.add_sa(src=peer, dst=HERE, spi=number)
    for _ in range(2):
        for number, peer in enumerate(peers, 1):
            assert token_of(judge, backend.seen(number, peer)).protected
            assert len(judge._known) <= 3


class Order(Stamped):
    """Notes when it was drained, among what else is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[Any] = []

    def drain(self) -> None:
        self.noted.append("drain")
        super().drain()


async def test_what_the_kernel_told_before_each_accept_is_known_at_its_verdict() -> None:
    backend = Order()
    waves, wave = 3, 10
    done: asyncio.Queue[None] = asyncio.Queue()

    class Numbered(asyncio.Protocol):
        def __init__(self) -> None:
            self.number = sum(isinstance(note, tuple) for note in backend.noted)
            backend.noted.append(("accepted", self.number))

        def connection_made(self, transport: Any) -> None:
            backend.noted.append(self.number)
            transport.abort()
            done.put_nowait(None)

    server = await create_server(Numbered, "127.0.0.1", 0, backend=backend, start_serving=False)
    backend.noted.clear()
    await server.start_serving()
    where = server.sockets[0].getsockname()
    clients: list[socket.socket] = []
    for _ in range(waves):
        clients += [socket.create_connection(where) for _ in range(wave)]
        for _ in range(wave):
            await done.get()
    for client in clients:
        client.close()
    server.close()
    await server.wait_closed()
    for number in range(waves * wave):
        accepted, made = backend.noted.index(("accepted", number)), backend.noted.index(number)
        assert "drain" in backend.noted[accepted:made]


async def test_one_look_at_the_listener_serves_those_accepted_before_it(backend: Stamped) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        registration: Any = await backend.register(IPPROTO_TCP, sock.getsockname()[1])
        marks: Any = Marks(registration)
        listener = Listener(asyncio.get_running_loop(), backend, marks, [sock])
        generation = backend.resolver.generation
        assert listener.read(7, 1) == (7, generation, "")
        sock.close()
        assert listener.read(8, 1) == (8, generation, "")
        assert "a mark of its own" in listener.read(8, 2)[2]
        assert listener.read(8, 2)[0] is None
        backend.restore_stamp()
        assert listener.read(8, 3)[1] == backend.resolver.generation != generation
        assert "the stamp changed" in listener.read(8, 3)[2]


class Marks:
    """A registration under which marks are read."""

    reads_marks = True

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
