"""The kernel's SAs joined with charon's word on them: both in memory."""

from __future__ import annotations

import pytest
from fake_netlink import FakeKernel
from joined_bench import Charon, JoinedBench, joined, until

from ipsec_aio.testing.conformance import Arrivals, IdentityConformance


@pytest.fixture
async def charon(tmp_path):
    charon = Charon(tmp_path / "vici")
    await charon.start()
    yield charon
    await charon.stop()


@pytest.fixture
def kernel():
    kernel = FakeKernel()
    yield kernel
    assert all(s.closed for s in kernel.opened)


@pytest.fixture
async def bench(kernel, charon, netns):
    backend = await joined(kernel, charon, stamp="install")
    yield JoinedBench(backend, kernel, charon)
    await backend.aclose()


class TestConformance(IdentityConformance):
    """With the stamp of this machine's kernel, and all the rest in memory."""


ALICE, BOB = "alice.example.org", "bob.example.org"


class TestJoining(Arrivals):
    async def test_charon_s_end_takes_nothing_back(self, bench, charon):
        await self._sa(bench, 0x1001)
        await bench.identify(src=bench.peer, dst=bench.local, spi=0x1001, peer=ALICE, local="me")
        token = await self._arrive(bench, 0x1001)
        await charon.stop()
        await until(bench.backend, lambda: not bench.backend.watcher.table.synced)
        assert await self._arrive(bench, 0x1001) is token
        await self._sa(bench, 0x1002)
        late = await self._arrive(bench, 0x1002)
        assert late.pending
        await bench.pass_time(3)
        assert not late.pending
        assert late.peer is None
        charon.ikes.clear()
        charon.list_sas()
        await charon.start()
        await until(bench.backend, lambda: bench.backend.watcher.table.synced)
        assert await self._arrive(bench, 0x1001) is token
