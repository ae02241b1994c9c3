"""Evidence that needs a machine of its own: fragments, and another network namespace."""

from __future__ import annotations

import shutil
import socket
import struct
import subprocess
from ipaddress import ip_address
from typing import Any

import pytest

import ipsec_aio
from ipsec_aio.backends.contract import Registration
from ipsec_aio.enums import Mode
from ipsec_aio.evidence import Evidence
from ipsec_aio.kernel.sockopts import is_readable, netns_cookie
from ipsec_aio.net.enforce import Enforcement
from ipsec_aio.net.witness import Witness
from ipsec_aio.policy import Template
from ipsec_aio.tokens import PToken


class Keeping(Registration):
    """A stamp beside which decrypted fragments are kept."""

    generation = 1
    reads_marks = True
    keeps_fragments = True

    def close(self) -> None:
        pass


class Asked(ipsec_aio.MemoryBackend):
    """Keeps the last evidence."""

    last: Evidence
    cookie: int | None = None

    @property
    def netns_cookie(self) -> int | None:
        return self.cookie

    def resolve(self, evidence: Evidence) -> PToken:
        self.last = evidence
        return super().resolve(evidence)


@pytest.fixture
def small_loopback(netns: None) -> None:
    """A loopback interface that fragments."""
    if shutil.which("ip") is None:
        pytest.skip("needs ip(8)")
    subprocess.run(["ip", "link", "set", "lo", "up", "mtu", "1500"], check=True)


@pytest.mark.parametrize(
    ("family", "bound", "target"),
    [
        (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
        (socket.AF_INET6, "::1", "::1"),
        (socket.AF_INET6, "::", "::ffff:127.0.0.1"),
    ],
)
@pytest.mark.usefixtures("small_loopback")
def test_the_kernel_tells_what_was_reassembled(family: int, bound: str, target: str) -> None:
    backend = Asked()
    with (
        socket.socket(family, socket.SOCK_DGRAM) as receiver,
        socket.socket(family, socket.SOCK_DGRAM) as sender,
    ):
        receiver.bind((bound, 0))
        receiver.settimeout(5)
        witness = Witness(receiver, backend, Keeping())
        for size, reassembled in ((100, False), (3000, True), (100, False)):
            sender.sendto(bytes(size), (target, receiver.getsockname()[1]))
            data, told, flags, addr = receiver.recvmsg(65536, 512)
            witness.look()
            verdict = witness.judge(addr, told, flags)
            assert len(data) == size
            assert ("reassembled" in verdict.token.audit_string) == reassembled


@pytest.mark.usefixtures("small_loopback")
def test_a_tunnels_template_proves_nothing_of_what_was_put_together() -> None:
    class Mixing(Asked):
        drops_fragments = False

    class InTunnel:
        """A socket's own policy that demands a tunnel."""

        version = 0
        outbound = None
        template = Template(mode=Mode.TUNNEL)
        _plan = None
        objection = Enforcement.objection

        def __init__(self, backend: Asked) -> None:
            self._backend = backend

    for backend, expected in ((Mixing(), True), (Asked(), False)):
        enforcement: Any = InTunnel(backend)
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
        ):
            receiver.bind(("127.0.0.1", 0))
            receiver.settimeout(5)
            witness = Witness(receiver, backend, enforcement=enforcement)
            for size in (100, 3000):
                sender.sendto(bytes(size), receiver.getsockname())
                _, told, flags, addr = receiver.recvmsg(65536, 512)
                witness.look()
                witness.judge(addr, told, flags)
                assert backend.last.enforced == enforcement.template
                assert ("fragments" in backend.last.doubt) == (expected and size == 3000)


@pytest.mark.parametrize("enforced", [False, True])
def test_what_waited_for_long_is_in_doubt_however_it_came(enforced: bool) -> None:
    """A policy of the socket's own lets nothing clear in, but whose it was is forgotten."""

    class Demanding:
        version = 0
        outbound = None
        template = Template()

        def objection(self, evidence: Evidence, *, whole: bool = False) -> str:
            return ""

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        backend = Asked()
        enforcement: Any = Demanding() if enforced else None
        witness = Witness(sock, backend, enforcement=enforcement)

        def doubt() -> str:
            witness.look()
            witness.judge(("127.0.0.1", 1), [], 0)
            return backend.last.doubt

        assert doubt() == ""
        witness.doubt_queue()
        assert doubt() == ""  # nothing was in it
        sock.sendto(b"x", sock.getsockname())
        witness.doubt_queue()
        assert "waited for so long" in doubt()
        sock.recv(1)
        assert "waited for so long" in doubt()
        assert doubt() == ""


def test_a_queue_seen_empty_vouches_for_what_comes_later_only() -> None:
    class Changing(Keeping):
        generation = 1
        keeps_fragments = False

    told = [(socket.SOL_SOCKET, 36, bytes(4))]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        backend, stamp = Asked(), Changing()
        witness = Witness(sock, backend, stamp)

        def doubt() -> str:
            witness.look()
            witness.judge(("127.0.0.1", 1), told, 0)
            return backend.last.doubt

        assert doubt() == ""
        stamp.generation = 2
        backend.mirror.bump()
        sock.sendto(b"x", sock.getsockname())
        for _ in range(3):
            # What was received came before, and so may what is still queued.
            assert doubt() == "it may have arrived before the stamp was in place"
        sock.recv(1)
        # Received before the queue was seen empty, judged before, too.
        assert doubt() == "it may have arrived before the stamp was in place"
        assert doubt() == ""


def test_what_a_closed_socket_holds_is_in_doubt() -> None:
    backend = Asked()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        assert not is_readable(sock)
        witness = Witness(sock, backend)
        before = backend.policies
    assert is_readable(sock)
    backend.add_policy()
    for _ in range(2):
        witness.look()
        witness.judge(("127.0.0.1", 1), [], 0)
        assert backend.last.after == before < backend.policies


@pytest.mark.parametrize("closed", [False, True])
def test_what_waits_to_be_accepted_is_readable(closed: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        assert not is_readable(listening)
        with socket.create_connection(listening.getsockname()):
            assert is_readable(listening)
            listening.accept()[0].close()
            assert not is_readable(listening)
    number = listening.fileno()

    class Stale:
        def fileno(self) -> int:
            return number if closed else 1 << 20

    assert is_readable(Stale())


def test_a_socket_of_another_namespace_is_told_by_its_cookie(
    request: pytest.FixtureRequest,
) -> None:
    backend = Asked()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as at_home:
        backend.cookie = netns_cookie(at_home)
        Witness(at_home, backend).judge(("127.0.0.1", 1), [], 0)
        assert backend.last.doubt == "the local address is not known"
    request.getfixturevalue("netns")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as elsewhere:
        Witness(elsewhere, backend).judge(("127.0.0.1", 1), [], 0)
        assert backend.last.doubt == "the socket is in another network namespace"


def test_a_closed_backend_cannot_be_asked_for_its_namespace() -> None:
    class Gone(Asked):
        @property
        def netns_cookie(self) -> int | None:
            raise ipsec_aio.BackendUnavailable("closed")

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        backend = Gone()
        Witness(sock, backend).judge(("127.0.0.1", 1), [], 0)
        assert backend.last.doubt == ""


def test_the_text_of_an_address_is_kept_once() -> None:
    raw = struct.pack("=H", socket.AF_INET) + (40000).to_bytes(2, "big") + bytes([10, 0, 0, 1])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        witness = Witness(sock, Asked())
        ((batched, verdict),) = witness.judge_batch([raw], {})
        single = witness.judge((str(ip_address("10.0.0.1")), 40000), [], 0)
    assert batched == ("10.0.0.1", 40000)
    assert batched[0] is verdict.token._peer
    assert verdict.token is single.token
    by_address = [key for key in witness._others | witness._clear if isinstance(key, tuple)]
    assert [key[0][0] is verdict.token._peer for key in by_address] == [True]


def test_a_backend_that_fails_while_it_is_drained() -> None:
    class Failing(Asked):
        def drain(self) -> None:
            raise ipsec_aio.BackendUnavailable("closed")

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        witness = Witness(sock, Failing())
        witness.look()
        verdict = witness.judge(("127.0.0.1", 1), [], 0)
        assert not verdict.protected


def test_a_socket_that_was_closed_has_no_place() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        witness = Witness(sock, Asked())
    witness.look()
    assert not witness.judge(("127.0.0.1", 1), [], 0).protected


def test_what_only_passes_for_a_socket() -> None:
    class Alike:
        """A thing in front of a socket."""

        def __init__(self, inner: socket.socket) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        alike: Any = Alike(sock)
        backend = Asked()
        Witness(alike, backend).judge(("127.0.0.1", 1), [], 0)
        assert backend.last.doubt == "not an IP socket"
