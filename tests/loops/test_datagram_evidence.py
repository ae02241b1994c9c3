"""What is read from the kernel beside each datagram, on real sockets, and what is doubted."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from typing import Any

import pytest
from datagram_tools import HERE, Tokened, Witnessing, close, until

from ipsec_aio import Assurance, Require, create_datagram_endpoint
from ipsec_aio.evidence import Evidence
from ipsec_aio.kernel import sockopts
from ipsec_aio.net import datagram, witness
from ipsec_aio.tokens import PToken

pytestmark = pytest.mark.usefixtures("way")

SPI = 0x1001


def marked(spi: int, family: int = socket.AF_INET) -> socket.socket:
    """A sender whose packets carry an SPI as the stamp would write it; marks cross loopback."""
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, sockopts.SO_MARK, spi.to_bytes(4, "big"))
    except PermissionError:
        sock.close()
        pytest.skip("setting a mark needs CAP_NET_ADMIN")
    return sock


def backend_with_sa(address: str = "127.0.0.1", **stamp: Any) -> Witnessing:
    backend = Witnessing(**stamp)
    backend.add_sa(src=address, dst=address, spi=SPI)
    return backend


async def endpoint(backend: Witnessing, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    return await create_datagram_endpoint(Tokened, *args, backend=backend, **kwargs)


async def test_what_an_sa_may_have_carried_is_clear_only_while_the_stamp_stands() -> None:
    """Each datagram is asked about: nobody has told of a stamp that is gone."""
    backend = backend_with_sa()
    stands = [True, True, False]
    backend.resolver.stamp_stands = lambda: stands.pop(0)
    transport, protocol = await endpoint(backend, HERE)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for number in (1, 2, 3):
            sock.sendto(b"x", transport.get_extra_info("sockname"))
            await protocol.log.until("data", number)
    found = [token.assurance for _, _, token, *_ in protocol.log.of("data")]
    assert found == [Assurance.NONE, Assurance.NONE, Assurance.UNKNOWN]
    await close(transport)


class TestMarks:
    @pytest.mark.parametrize(
        ("family", "local", "target"),
        [
            (socket.AF_INET, ("127.0.0.1", 0), "127.0.0.1"),
            (socket.AF_INET, ("0.0.0.0", 0), "127.0.0.1"),
            (socket.AF_INET6, ("::1", 0), "::1"),
            (socket.AF_INET6, ("::", 0), "::1"),
            (socket.AF_INET6, ("::", 0), "::ffff:127.0.0.1"),
        ],
    )
    async def test_the_mark_is_read_as_the_stamp_wrote_it(
        self, family: int, local: Any, target: str
    ) -> None:
        address = target.removeprefix("::ffff:")
        backend = backend_with_sa(address)
        own = socket.socket(family, socket.SOCK_DGRAM)
        if family == socket.AF_INET6:
            own.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        own.bind(local)
        transport, protocol = await endpoint(backend, sock=own)
        port = transport.get_extra_info("sockname")[1]
        with marked(SPI, family) as sock:
            sock.sendto(b"x", (target, port))
            ((_, _, token),) = await protocol.log.until("data")
            here = sock.getsockname()[1]
        evidence = backend.evidence[-1]
        assert evidence.spi == SPI
        assert evidence.generation == 7
        assert (
            evidence.local
            == evidence.peer
            == socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
        )
        assert (evidence.local_port, evidence.peer_port) == (port, here)
        assert token.assurance is Assurance.EXACT
        await close(transport)

    async def test_an_unmarked_datagram_has_mark_zero(self) -> None:
        backend = backend_with_sa()
        transport, protocol = await endpoint(backend, HERE)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"x", transport.get_extra_info("sockname"))
            ((_, _, token),) = await protocol.log.until("data")
        assert backend.evidence[-1].mark == 0
        assert token.assurance is Assurance.NONE
        await close(transport)

    async def test_each_datagram_of_a_sender_is_judged_by_its_own_mark(self) -> None:
        backend = backend_with_sa()
        transport, protocol = await endpoint(backend, HERE)
        with marked(SPI) as sock:
            for spi in (SPI, 0, SPI):
                sock.setsockopt(socket.SOL_SOCKET, sockopts.SO_MARK, spi.to_bytes(4, "big"))
                sock.sendto(b"x", transport.get_extra_info("sockname"))
            got = await protocol.log.until("data", 3)
        assert [token.protected for _, _, token in got] == [True, False, True]
        assert got[0][2] is got[2][2]
        await close(transport)

    async def test_no_stamp_means_that_marks_prove_nothing(self) -> None:
        backend = backend_with_sa(generation=0, marks=False)
        transport, protocol = await endpoint(backend, HERE)
        with marked(SPI) as sock:
            sock.sendto(b"x", transport.get_extra_info("sockname"))
            ((_, _, token),) = await protocol.log.until("data")
        evidence = backend.evidence[-1]
        assert (evidence.mark, evidence.generation, evidence.doubt) == (None, 0, "")
        assert not token.protected
        await close(transport)

    async def test_a_kernel_that_does_not_tell_marks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """EPERM from SO_RCVMARK (Linux 5.19 to 6.3) or ENOPROTOOPT (before)."""
        monkeypatch.setattr(sockopts, "SO_RCVMARK", 9999)
        backend = backend_with_sa()
        transport, protocol = await endpoint(backend, HERE)
        with marked(SPI) as sock:
            sock.sendto(b"x", transport.get_extra_info("sockname"))
            await protocol.log.until("data")
        evidence = backend.evidence[-1]
        assert (evidence.mark, evidence.generation, evidence.doubt) == (None, 0, "")
        await close(transport)

    async def test_a_mark_that_should_be_there_and_is_not(self) -> None:
        backend = backend_with_sa()
        transport, protocol = await endpoint(backend, HERE)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, sockopts.SO_RCVMARK, 0)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"x", transport.get_extra_info("sockname"))
            ((_, _, token),) = await protocol.log.until("data")
        assert token.assurance is Assurance.UNKNOWN
        assert "no mark" in backend.evidence[-1].doubt
        await close(transport)


class TestTime:
    """A stamp covers what came after it was verified."""

    async def test_a_known_port_is_covered_before_bind(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(HERE)
            there = sock.getsockname()
        bound: list[bool] = []

        class Watching(Witnessing):
            async def register(self, protocol: int, port: int) -> Any:
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                    try:
                        probe.bind(there)
                    except OSError:
                        bound.append(True)
                    else:
                        bound.append(False)
                return await super().register(protocol, port)

        backend = Watching()
        transport, _ = await endpoint(backend, there)
        assert bound == [False]
        assert [stamp.port for stamp in backend.stamps] == [there[1]]
        await close(transport)
        transport, _ = await endpoint(backend, HERE)
        assert backend.stamps[1].port == transport.get_extra_info("sockname")[1]
        await close(transport)

    async def test_what_comes_right_after_bind_is_covered_already(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind(HERE)
            there = probe.getsockname()
        with marked(SPI) as sock:

            def factory() -> Tokened:
                sock.sendto(b"early", there)
                return Tokened()

            transport, protocol = await create_datagram_endpoint(
                factory, there, backend=backend_with_sa()
            )
            ((_, _, token),) = await protocol.log.until("data")
        assert token.assurance is Assurance.EXACT
        await close(transport)

    async def test_what_was_queued_before_the_port_was_covered_is_in_doubt(self) -> None:
        backend = backend_with_sa()
        own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        own.bind(HERE)
        there = own.getsockname()
        with marked(SPI) as sock:
            sock.sendto(b"before", there)
            transport, protocol = await endpoint(backend, sock=own)
            ((_, _, early),) = await protocol.log.until("data")
            sock.sendto(b"after", there)
            _, (_, _, late) = await protocol.log.until("data", 2)
        assert early.assurance is Assurance.UNKNOWN
        assert "before the stamp" in early.audit_string
        assert late.assurance is Assurance.EXACT
        await close(transport)

    @pytest.mark.parametrize("long", [False, True])
    async def test_what_waits_through_a_long_pause_is_in_doubt(
        self, long: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its SA may be forgotten by now, and the SA's number another peer's."""
        monkeypatch.setattr(datagram, "LATE", -1.0 if long else 600.0)
        transport, protocol = await endpoint(backend_with_sa(), HERE)
        there = transport.get_extra_info("sockname")
        said = []
        with marked(SPI) as sock:
            for count in range(1, 4):
                if count == 2:
                    transport.pause_reading()
                sock.sendto(b"x", there)
                transport.resume_reading()
                got = await protocol.log.until("data", count)
                said.append(got[-1][2].assurance)
        waited = Assurance.UNKNOWN if long else Assurance.EXACT
        assert said == [Assurance.EXACT, waited, Assurance.EXACT]
        await close(transport)

    async def test_an_empty_queue_leaves_no_doubt(self) -> None:
        backend = backend_with_sa()
        own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        own.bind(HERE)
        transport, protocol = await endpoint(backend, sock=own)
        with marked(SPI) as sock:
            sock.sendto(b"x", transport.get_extra_info("sockname"))
            ((_, _, token),) = await protocol.log.until("data")
        assert token.assurance is Assurance.EXACT
        await close(transport)

    async def test_a_stamp_that_was_lost_and_restored(self) -> None:
        backend = backend_with_sa()
        transport, protocol = await endpoint(backend, HERE)
        (stamp,) = backend.stamps
        said = []
        with marked(SPI) as sock:
            for count, generation in enumerate((7, 0, 8, 8), 1):
                stamp.generation = generation
                backend.set_generation(generation)
                sock.sendto(b"x", transport.get_extra_info("sockname"))
                got = await protocol.log.until("data", count)
                said.append(got[-1][2].assurance)
                doubt = backend.evidence[-1].doubt
                assert ("before the stamp" in doubt) == (count == 3)
        # Without a stamp an SA that might have carried it is not proof of anything.
        assert said == [Assurance.EXACT, Assurance.UNKNOWN, Assurance.UNKNOWN, Assurance.EXACT]
        await close(transport)

    async def test_an_idle_socket_is_covered_as_soon_as_the_stamp_is_back(self) -> None:
        backend = backend_with_sa()
        transport, protocol = await endpoint(backend, HERE)
        (stamp,) = backend.stamps
        for generation in (0, 8):
            stamp.generation = generation
            backend.set_generation(generation)
            await until(lambda: transport._witness._covered == stamp.generation)
        with marked(SPI) as sock:
            sock.sendto(b"x", transport.get_extra_info("sockname"))
            ((_, _, token),) = await protocol.log.until("data")
        assert token.assurance is Assurance.EXACT
        await close(transport)
        stamp.generation = 9
        backend.set_generation(9)
        await asyncio.sleep(0)
        assert transport._witness._covered == 8, "nobody looks at a closed socket"

    async def test_a_stamp_that_comes_later_is_read(self) -> None:
        backend = backend_with_sa(generation=0, marks=False)
        transport, protocol = await endpoint(backend, HERE)
        (stamp,) = backend.stamps
        with marked(SPI) as sock:
            for count in (1, 2, 3):
                sock.sendto(b"x", transport.get_extra_info("sockname"))
                await protocol.log.until("data", count)
                stamp.marks, stamp.generation = True, 7
        assert [token.assurance for _, _, token in protocol.log.of("data")] == [
            Assurance.UNKNOWN,
            Assurance.UNKNOWN,
            Assurance.EXACT,
        ]
        await close(transport)

    async def test_the_backend_is_drained_between_receiving_and_resolving(self) -> None:
        order: list[str] = []

        class Ordered(Witnessing):
            def drain(self) -> None:
                order.append("drain")
                super().drain()

            def resolve(self, evidence: Evidence) -> PToken:
                order.append("resolve")
                return super().resolve(evidence)

        backend = Ordered()
        transport, protocol = await endpoint(backend, HERE)
        order.clear()
        with marked(SPI) as sock:
            sock.sendto(b"1", transport.get_extra_info("sockname"))
            sock.sendto(b"2", transport.get_extra_info("sockname"))
            await protocol.log.until("data", 2)
        assert order[:2] == ["drain", "resolve"]
        assert order.count("resolve") == 1, "the second is answered from memory"
        await close(transport)

    async def test_remembered_verdicts_are_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(witness, "PROTECTED_LIMIT", 4)
        backend = backend_with_sa()
        transport, protocol = await endpoint(backend, HERE)
        for count in range(1, 11):
            with marked(SPI) as sock:
                sock.sendto(b"x", transport.get_extra_info("sockname"))
                await protocol.log.until("data", count)
        assert len(transport._witness._protected) <= 4
        await close(transport)


class TestDoubts:
    async def test_another_network_namespace(self) -> None:
        backend = backend_with_sa()
        backend.cookie = 1
        transport, protocol = await endpoint(backend, HERE)
        with marked(SPI) as sock:
            sock.sendto(b"x", transport.get_extra_info("sockname"))
            ((_, _, token),) = await protocol.log.until("data")
        assert token.assurance is Assurance.UNKNOWN
        assert "namespace" in token.audit_string
        await close(transport)

    async def test_the_same_network_namespace(self) -> None:
        backend = backend_with_sa()
        with marked(SPI) as sock:
            backend.cookie = sockopts.netns_cookie(sock)
            transport, protocol = await endpoint(backend, HERE)
            sock.sendto(b"x", transport.get_extra_info("sockname"))
            ((_, _, token),) = await protocol.log.until("data")
        assert token.assurance is Assurance.EXACT
        await close(transport)

    async def test_truncated_evidence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("ipsec_aio.net.datagram._CONTROL_BUFFER", 8)
        backend = backend_with_sa()
        transport, protocol = await endpoint(backend, HERE)
        with marked(SPI) as sock:
            sock.sendto(b"x", transport.get_extra_info("sockname"))
            ((_, _, token),) = await protocol.log.until("data")
        assert token.assurance is Assurance.UNKNOWN
        assert "truncated" in token.audit_string
        await close(transport)

    async def test_truncated_data(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("ipsec_aio.net.datagram._IP_BUFFER", 4)
        backend = backend_with_sa()
        transport, protocol = await endpoint(backend, HERE)
        with marked(SPI) as sock:
            sock.sendto(b"more than four", transport.get_extra_info("sockname"))
            ((data, _, token),) = await protocol.log.until("data")
        assert data == b"more"
        assert token.assurance is Assurance.UNKNOWN
        await close(transport)

    @pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
    @pytest.mark.parametrize("keeps", [True, False])
    async def test_reassembled_datagrams_where_fragments_are_kept(
        self, family: int, keeps: bool
    ) -> None:
        """Loopback fragments nothing, so the kernel's message is written by hand; see the lab."""
        address = "127.0.0.1" if family == socket.AF_INET else "::1"
        backend = backend_with_sa(address, fragments=keeps)
        transport, protocol = await endpoint(backend, (address, 0))
        level, option = (
            (socket.IPPROTO_IP, sockopts.IP_RECVFRAGSIZE)
            if family == socket.AF_INET
            else (socket.IPPROTO_IPV6, sockopts.IPV6_RECVFRAGSIZE)
        )
        sock = transport.get_extra_info("socket")
        assert sock.getsockopt(level, option) == keeps
        told = [(level, option, struct.pack("=i", 1280)), (1, 36, SPI.to_bytes(4, "big"))]
        addr = (address, 9)
        verdict = transport._witness.judge(addr, told, 0)
        assert verdict.protected is not keeps
        assert ("reassembled" in verdict.token.audit_string) == keeps
        whole = transport._witness.judge(addr, told[1:], 0)
        assert whole.protected
        await close(transport)
        assert protocol.log.of("lost")

    async def test_a_kernel_that_does_not_tell_fragments(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sockopts, "IP_RECVFRAGSIZE", 9999)
        backend = backend_with_sa(fragments=True)
        transport, protocol = await endpoint(backend, HERE)
        with marked(SPI) as sock:
            sock.sendto(b"x", transport.get_extra_info("sockname"))
            ((_, _, token),) = await protocol.log.until("data")
        assert backend.evidence[-1].generation == 0
        assert not token.protected
        await close(transport)

    async def test_a_local_address_that_the_kernel_does_not_tell(self) -> None:
        backend = backend_with_sa()
        transport, protocol = await endpoint(backend, ("0.0.0.0", 0))
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_IP, sockopts.IP_PKTINFO, 0)
        with marked(SPI) as sock:
            sock.sendto(b"x", ("127.0.0.1", transport.get_extra_info("sockname")[1]))
            ((_, _, token),) = await protocol.log.until("data")
        assert "local address" in token.audit_string
        assert token.assurance is Assurance.UNKNOWN
        await close(transport)

    async def test_unix_sockets_work_and_are_unknown(self, tmp_path: Any) -> None:
        backend = backend_with_sa()
        path = os.fspath(tmp_path / "socket")
        transport, protocol = await endpoint(backend, path, family=socket.AF_UNIX)
        client, other = await endpoint(backend, None, path, family=socket.AF_UNIX)
        big = bytes(100_000)
        client.sendto(big)
        ((data, addr, token),) = await protocol.log.until("data")
        assert (data, addr) == (big, None)
        assert token.assurance is Assurance.UNKNOWN
        assert "not an IP socket" in token.audit_string
        assert other.log.of("made")[0][0].assurance is Assurance.UNKNOWN
        assert backend.stamps == []
        await close(transport, client)

    async def test_udp_lite_works_and_is_unknown(self) -> None:
        backend = backend_with_sa()
        try:
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM, 136).close()
        except OSError:
            pytest.skip("this kernel has no UDP-Lite")
        transport, protocol = await endpoint(backend, HERE, proto=136)
        there = transport.get_extra_info("sockname")
        client, _ = await endpoint(backend, None, there, proto=136)
        client.sendto(b"x")
        ((_, _, token),) = await protocol.log.until("data")
        assert "not a UDP socket" in token.audit_string
        assert backend.stamps == []
        await close(transport, client)

    async def test_a_socket_that_is_bound_later_is_not_covered(self) -> None:
        backend = backend_with_sa()
        own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        transport, protocol = await endpoint(backend, sock=own)
        own.bind(HERE)
        with marked(SPI) as sock:
            sock.sendto(b"x", own.getsockname())
            await protocol.log.until("data")
        assert backend.stamps == []
        evidence = backend.evidence[-1]
        assert (evidence.generation, evidence.local_port) == (0, own.getsockname()[1])
        await close(transport)


class TestRegistration:
    async def test_it_ends_with_the_transport(self) -> None:
        backend = Witnessing()
        transport, _ = await endpoint(backend, HERE)
        (stamp,) = backend.stamps
        assert not stamp.closed
        await close(transport)
        assert stamp.closed

    async def test_a_sending_socket_is_bound_so_that_answers_are_covered(self) -> None:
        backend = backend_with_sa()
        transport, protocol = await endpoint(backend, family=socket.AF_INET)
        port = transport.get_extra_info("sockname")[1]
        assert [stamp.port for stamp in backend.stamps] == [port]
        with marked(SPI) as sock:
            sock.bind(HERE)
            transport.sendto(b"question", sock.getsockname())
            assert sock.recvfrom(100)[1][1] == port
            sock.sendto(b"answer", ("127.0.0.1", port))
            ((_, _, token),) = await protocol.log.until("data")
        assert token.assurance is Assurance.EXACT
        await close(transport)

    async def test_require_refuses_what_is_forged_or_doubted(self) -> None:
        backend = backend_with_sa()
        transport, _ = await endpoint(backend, HERE, require=Require(encrypted=True))
        with marked(0x9999) as sock:
            sock.sendto(b"x", transport.get_extra_info("sockname"))
            await until(lambda: transport.ipsec_stats.refused)
        assert transport.ipsec_stats.unknown == 1
        await close(transport)
