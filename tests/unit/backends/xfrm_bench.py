"""An operator for the conformance suite who works on a kernel in memory."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import xfrm_messages as m
from fake_netlink import FakeKernel, answers

from ipsec_aio.backends.xfrm import XfrmBackend
from ipsec_aio.flow import pack_address
from ipsec_aio.testing import Bench
from ipsec_aio.wire.netlink import attribute

PROTOS = {"esp": 50, "ah": 51}
MODES = {"transport": 0, "tunnel": 1, "beet": 4}
DIRECTIONS = {"in": 0, "out": 1, "fwd": 2}

ELSEWHERE = (bytes([203, 0, 113, 1]), bytes([203, 0, 113, 2]))
SELECTOR = m.selector(*ELSEWHERE, family=2, source_prefix=32, destination_prefix=32)
MARKED = m.policy_info(SELECTOR, index=1 << 20) + m.mark(5, 0xFF)


async def synced(backend: XfrmBackend) -> None:
    """Wait until the backend's tables are certain."""
    while not backend.mirror.synced:
        changed = asyncio.Event()
        unsubscribe = backend.subscribe(changed.set)
        if not backend.mirror.synced:
            await changed.wait()
        unsubscribe()


class FakeBench(Bench):
    """SAs and policies are added to the fake kernel, which tells of them."""

    backend: XfrmBackend

    def __init__(self, backend: XfrmBackend, kernel: FakeKernel) -> None:
        super().__init__(backend)
        self.kernel = kernel
        self.late = 0.0
        self.index = 0
        self.held: list[bytes] | None = None
        kernel.local.add(pack_address(self.local))
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
        payload = m.sa_info(
            pack_address(src),
            pack_address(dst),
            spi=spi,
            proto=PROTOS[proto],
            mode=MODES[mode],
            reqid=reqid,
        )
        if aead:
            payload += m.algorithm(18, aead, 160, 128)
        if encryption:
            payload += m.algorithm(2, encryption, 0 if "null" in encryption else 128)
        if authentication:
            payload += m.algorithm(20, authentication, 256, 128)
        if self.held is not None:
            self.held.append(payload)
        else:
            self._tell(payload)

    def _tell(self, payload: bytes) -> None:
        self.kernel.sas.append(payload)
        self.kernel.emit(m.message(m.NEWSA, payload))

    async def delete_sa(self, *, src: str, dst: str, spi: int, proto: str = "esp") -> None:
        gone = self._find(dst, spi, proto)
        self.kernel.sas.remove(gone)
        self.kernel.emit(m.message(m.DELSA, m.sa_deletion(gone)))

    def _find(self, dst: str, spi: int, proto: str) -> bytes:
        name = m.sa_id(pack_address(dst), spi=spi, proto=PROTOS[proto])
        return next(sa for sa in self.kernel.sas if answers(sa, name))

    async def expire_sa(
        self, *, src: str, dst: str, spi: int, proto: str = "esp", hard: bool
    ) -> None:
        expired = self._find(dst, spi, proto)
        if hard:
            self.kernel.sas.remove(expired)
        self.kernel.emit(m.message(m.EXPIRE, m.expire(expired[:224], hard=hard)))

    async def hold_sas(self) -> None:
        self.held = []

    async def release_sas(self) -> None:
        held, self.held = self.held, None
        for payload in held or ():
            self._tell(payload)

    async def flush_sas(self) -> None:
        self.kernel.sas.clear()
        self.kernel.emit(m.message(m.FLUSHSA, b"\0"))

    def _policy(self, src: str, dst: str, direction: str, **fields: Any) -> bytes:
        prefixes = [0 if end == "any" else 32 for end in (src, dst)]
        ends = [bytes(4) if end == "any" else pack_address(end) for end in (src, dst)]
        sel = m.selector(*ends, family=2, source_prefix=prefixes[0], destination_prefix=prefixes[1])
        self.index += 8
        index = self.index + DIRECTIONS[direction]
        return m.policy_info(sel, index=index, direction=DIRECTIONS[direction], **fields)

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
        payload = self._policy(src, dst, direction, priority=priority)
        if proto:
            template = m.template(proto=PROTOS[proto], mode=MODES[mode], reqid=reqid)
            payload += attribute(5, template)
        self.kernel.policies.append(payload)
        self.kernel.emit(m.message(m.NEWPOLICY, payload))

    async def delete_policy(self, *, src: str, dst: str, direction: str = "in") -> None:
        key = self._policy(src, dst, direction)[:56], DIRECTIONS[direction]
        gone = next(p for p in self.kernel.policies if (p[:56], p[160]) == key)
        self.kernel.policies.remove(gone)
        self.kernel.emit(m.message(m.DELPOLICY, m.policy_deletion(gone)))

    async def lose_stamp(self) -> None:
        """Have somebody else use marks."""
        self.kernel.policies.append(MARKED)
        self.kernel.emit(m.message(m.NEWPOLICY, MARKED))

    async def restore_stamp(self) -> None:
        self.kernel.policies.remove(MARKED)
        self.kernel.emit(m.message(m.DELPOLICY, m.policy_deletion(MARKED)))

    async def lose_events(self) -> None:
        self.kernel.emit(OSError(errno.ENOBUFS, "No buffer space available"))
        self.backend.drain()

    async def recover(self) -> None:
        await synced(self.backend)

    async def pass_time(self, seconds: float) -> None:
        self.backend.drain()
        self.late += seconds
