"""The xfrm backend does what every backend must, on a real kernel."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections.abc import AsyncIterator

import pytest
from hosts import Host, run

from ipsec_aio.backends.xfrm import XfrmBackend
from ipsec_aio.flow import pack_address
from ipsec_aio.testing import BackendConformance, Bench
from ipsec_aio.wire.netlink import attribute

KEY = "0x" + "4b" * 20
MARKED = "src 203.0.113.1 dst 203.0.113.2 dir in mark 5"
ANY = {"any": "0.0.0.0/0"}


async def synced(backend: XfrmBackend) -> None:
    """Wait until the backend's tables are certain."""
    changed = asyncio.Event()
    unsubscribe = backend.subscribe(changed.set)
    while not backend.mirror.synced:
        changed.clear()
        await changed.wait()
    unsubscribe()


def xfrm(kind: int, body: bytes) -> None:
    """Send a request that ``ip`` has no words for."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 6) as requests:
        requests.send(struct.pack("=IHHII", 16 + len(body), kind, 0x5, 1, 0) + body)
        (code,) = struct.unpack_from("=i", requests.recv(4096), 16)
    assert not code, os.strerror(-code)


def migrate(ends: tuple[str, str], old: tuple[str, str], new: tuple[str, str], reqid: int) -> None:
    """Move the tunnel of an outbound policy, as a daemon does for MOBIKE (XFRM_MSG_MIGRATE)."""
    source, destination, *outer = map(pack_address, (*ends, *old, *new))
    selector = struct.pack("=16s16s8xHBB12x", destination, source, socket.AF_INET, 32, 32)
    moves = struct.pack(
        *("=16s16s16s16sBBxxIHH", outer[1], outer[0], outer[3], outer[2], 50, 1, reqid),
        *(socket.AF_INET, socket.AF_INET),
    )
    xfrm(0x21, selector + struct.pack("=IB3x", 0, 1) + attribute(17, moves))


class KernelBench(Bench):
    """Works with ``ip xfrm``, on bob."""

    backend: XfrmBackend

    def __init__(self, backend: XfrmBackend, bob: Host, alice: Host, carol: Host) -> None:
        super().__init__(backend)
        self.held: list[list[str]] | None = None
        self.local, self.peer, self.other = bob.v4, alice.v4, carol.v4
        self.late = 0.0
        clock = backend.clock
        backend.clock = backend.resolver.clock = lambda: clock() + self.late

    async def add_sa(
        self,
        *,
        src: str,
        dst: str,
        spi: int,
        proto: str = "esp",
        mode: str = "transport",
        reqid: int = 0,
        aead: str | None = None,
        encryption: str | None = None,
        authentication: str | None = None,
    ) -> None:
        words = f"ip xfrm state add src {src} dst {dst} proto {proto} spi {spi:#x}".split()
        words += f"reqid {reqid} mode {mode}".split()
        if aead:
            words += ["aead", aead, KEY, "128"]
        if authentication:
            words += ["auth-trunc", authentication, KEY, "96"]
        if encryption:
            words += ["enc", encryption, "" if "null" in encryption else KEY[:34]]
        if self.held is not None:
            self.held.append(words)
        else:
            run(*words)

    async def delete_sa(self, *, src: str, dst: str, spi: int, proto: str = "esp") -> None:
        run(*f"ip xfrm state delete src {src} dst {dst} proto {proto} spi {spi:#x}".split())

    async def expire_sa(
        self, *, src: str, dst: str, spi: int, proto: str = "esp", hard: bool
    ) -> None:
        """Tell the kernel, as a keying daemon may (XFRM_MSG_EXPIRE)."""
        body = bytearray(232)
        number = {"esp": 50, "ah": 51}[proto]
        struct.pack_into("!16sIB", body, 56, pack_address(dst), spi, number)
        struct.pack_into("=H", body, 212, socket.AF_INET)
        body[224] = hard
        xfrm(0x18, bytes(body))

    async def hold_sas(self) -> None:
        self.held = []

    async def release_sas(self) -> None:
        held, self.held = self.held, None
        for words in held or ():
            run(*words)

    async def flush_sas(self) -> None:
        run("ip", "xfrm", "state", "flush")

    async def add_policy(
        self,
        *,
        src: str,
        dst: str,
        direction: str = "in",
        priority: int = 0,
        proto: str | None = "esp",
        mode: str = "transport",
        reqid: int = 0,
    ) -> None:
        src, dst = ANY.get(src, src), ANY.get(dst, dst)
        words = f"ip xfrm policy add src {src} dst {dst} dir {direction} priority {priority}"
        if proto:
            words += f" tmpl proto {proto} mode {mode} reqid {reqid}"
        run(*words.split())

    async def delete_policy(self, *, src: str, dst: str, direction: str = "in") -> None:
        src, dst = ANY.get(src, src), ANY.get(dst, dst)
        run(*f"ip xfrm policy delete src {src} dst {dst} dir {direction}".split())

    async def lose_stamp(self) -> None:
        """Have somebody else use marks."""
        run(*f"ip xfrm policy add {MARKED} priority 1".split())

    async def restore_stamp(self) -> None:
        run(*f"ip xfrm policy delete {MARKED}".split())

    async def lose_events(self) -> None:
        """Fill the event socket until the kernel gives up."""
        sockets = self.backend._sockets
        assert sockets is not None
        sockets.events._channel._socket.setsockopt(1, 8, 1)
        lines = "".join(
            f"xfrm policy {verb} src 203.0.113.{n} dst 203.0.113.1 dir in\n"
            for verb in ("add", "delete")
            for n in range(2, 100)
        )
        run("ip", "-batch", "-", stdin=lines)
        self.backend.drain()
        assert not self.backend.mirror.synced, errno.errorcode[errno.ENOBUFS]

    async def recover(self) -> None:
        await synced(self.backend)

    async def pass_time(self, seconds: float) -> None:
        self.backend.drain()
        self.late += seconds


class TestXfrm(BackendConformance):
    @pytest.fixture(params=[False, True], ids=["", "trust_policy"])
    async def bench(
        self, request: pytest.FixtureRequest, bob: Host, alice: Host, carol: Host
    ) -> AsyncIterator[Bench]:
        backend = XfrmBackend(stamp="install", trust_policy=request.param)
        await backend.start()
        yield KernelBench(backend, bob, alice, carol)
        await backend.aclose()


async def test_updates_deletions_and_migrations_as_the_kernel_does_them(
    bob: Host, alice: Host
) -> None:
    backend = XfrmBackend(stamp="off")
    await backend.start()
    sa = ["src", alice.v4, "dst", bob.v4, "proto", "esp", "spi", "0x6001"]
    gcm = ["mode", "transport", "aead", "rfc4106(gcm(aes))", KEY, "128"]
    null = ["mode", "transport", "auth-trunc", "hmac(sha256)", KEY, "96"]
    run("ip", "xfrm", "state", "add", *sa, "reqid", "7", *null, "enc", "ecb(cipher_null)", "")
    # The kernel tells of AES, and goes on without.
    run("ip", "xfrm", "state", "update", *sa, "reqid", "8", *gcm)
    backend.drain()
    (found,) = backend.mirror.sas()
    assert (found.reqid, found.encrypts, found.authenticates) == (7, False, True)
    # An update may give it an interface id, which is part of its key.
    run("ip", "xfrm", "state", "update", *sa, "reqid", "7", *gcm, "if_id", "5")
    backend.drain()
    (found,) = backend.mirror.sas()
    assert (found.if_id, found.encrypts) == (5, False)
    run("ip", "xfrm", "state", "delete", *sa)
    backend.drain()
    assert not list(backend.mirror.sas())
    # A migration is one message, which does not tell all: everything is read again.
    old, new, inner = (alice.v4, bob.v4), ("10.9.0.98", "10.9.0.99"), ("10.20.0.1", "10.20.0.2")
    outer = f"src {old[0]} dst {old[1]}"
    tunnel = ["mode", "tunnel", "reqid", "5"]
    esp = [*outer.split(), "proto", "esp"]
    run("ip", "xfrm", "state", "add", *esp, "spi", "0x6002", *tunnel, *gcm[2:])
    ends = f"src {inner[0]} dst {inner[1]} dir out".split()
    run("ip", "xfrm", "policy", "add", *ends, "tmpl", *esp, *tunnel)
    backend.drain()
    assert [(sa.src, sa.dst) for sa in backend.mirror.sas()] == [old]
    epoch = backend.epoch
    migrate(inner, old, new, 5)
    assert f"src {new[0]} dst {new[1]}" in run("ip", "xfrm", "state")
    backend.drain()
    assert not backend.mirror.synced
    assert backend.epoch != epoch
    await synced(backend)
    assert [(sa.src, sa.dst, sa.spi) for sa in backend.mirror.sas()] == [(*new, 0x6002)]
    (policy,) = backend.mirror.spd
    (template,) = policy.templates
    assert (template.source, template.destination) == tuple(map(pack_address, new))
    await backend.aclose()


async def test_opaque_interfaces(bob: Host) -> None:
    backend = XfrmBackend(stamp="off")
    await backend.start()
    assert not backend.resolver.opaque_interfaces
    run("ip", "link", "add", "x0", "type", "xfrm", "dev", "lo", "if_id", "3")
    backend.drain()
    assert backend.resolver.opaque_interfaces
    run("ip", "link", "delete", "x0")
    backend.drain()
    assert not backend.resolver.opaque_interfaces
    await backend.aclose()
