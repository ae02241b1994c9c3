"""The memory backend does what every backend must."""

from __future__ import annotations

import pytest

from ipsec_aio.backends.memory import MemoryBackend
from ipsec_aio.testing import (
    BackendConformance,
    Bench,
    IdentityBench,
    IdentityConformance,
)


class MemoryBench(Bench):
    backend: MemoryBackend
    awaits_identities = False
    forges = False

    def __init__(self, backend: MemoryBackend) -> None:
        super().__init__(backend)
        self.sas: dict = {}
        self.policies: dict = {}
        self.late = 0.0
        clock = backend.clock
        backend.clock = backend.resolver.clock = lambda: clock() + self.late

    async def add_sa(self, *, src, dst, spi, proto="esp", **fields):
        self.sas[src, dst, spi, proto] = self.backend.add_sa(
            src=src,
            dst=dst,
            spi=spi,
            proto=proto,
            identity_pending=self.awaits_identities,
            **fields,
        )

    async def delete_sa(self, *, src, dst, spi, proto="esp"):
        self.backend.delete_sa(self.sas[src, dst, spi, proto])

    async def expire_sa(self, *, src, dst, spi, proto="esp", hard):
        self.backend.expire(self.sas[src, dst, spi, proto], hard=hard)

    async def hold_sas(self):
        self.backend.hold_events()

    async def release_sas(self):
        self.backend.release_events()

    async def flush_sas(self):
        self.backend.flush_sas()

    async def add_policy(self, *, src, dst, direction="in", proto="esp", **fields):
        self.policies[src, dst, direction] = self.backend.add_policy(
            src=src, dst=dst, direction=direction, template=proto, **fields
        )

    async def delete_policy(self, *, src, dst, direction="in"):
        self.backend.delete_policy(self.policies[src, dst, direction])

    async def lose_stamp(self):
        self.backend.lose_stamp()

    async def restore_stamp(self):
        self.backend.restore_stamp()

    async def lose_events(self):
        self.backend.lose_events()

    async def recover(self):
        self.backend.recover()

    async def pass_time(self, seconds):
        self.late += seconds


class IdentifyingBench(MemoryBench, IdentityBench):
    awaits_identities = True

    async def identify(self, *, src, dst, spi, peer, local):
        self.backend.identify(self.sas[src, dst, spi, "esp"], peer=peer, local=local)


class TestMemory(BackendConformance):
    @pytest.fixture(params=[False, True], ids=["", "trust_policy"])
    async def bench(self, request):
        async with MemoryBackend(trust_policy=request.param) as backend:
            yield MemoryBench(backend)


class TestIdentities(IdentityConformance):
    @pytest.fixture
    async def bench(self):
        async with MemoryBackend() as backend:
            yield IdentifyingBench(backend)
