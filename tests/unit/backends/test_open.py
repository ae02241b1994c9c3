"""Naming, opening and defaulting to a backend."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pytest
import uvloop

import ipsec_aio.backends as module
from ipsec_aio.backends import (
    current_backend,
    default_backend,
    open_backend,
    resolve_backend,
    set_default_backend,
)
from ipsec_aio.backends.memory import MemoryBackend
from ipsec_aio.enums import Assurance
from ipsec_aio.errors import BackendUnavailable
from ipsec_aio.evidence import IPPROTO_UDP, Evidence
from ipsec_aio.flow import pack_address

factories = pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop])


@pytest.fixture(autouse=True)
def no_default(monkeypatch):
    monkeypatch.delenv("IPSEC_AIO_BACKEND", raising=False)
    yield
    set_default_backend(None)


@pytest.mark.parametrize("spec", ["", "ipsec", "memory:", "XFRM", "memory2"])
def test_unknown_specs_are_refused(spec):
    with pytest.raises(ValueError, match=r"'xfrm', 'xfrm\+vici', 'memory' and 'memory:FILE.toml'"):
        open_backend(spec)


@pytest.mark.parametrize("spec", ["vici", "pfkey", "broker:/run/b"])
def test_later_specs_are_not_in_this_release(spec):
    with pytest.raises(NotImplementedError, match="not in this release"):
        open_backend(spec)


@pytest.mark.parametrize("spec", ["xfrm", "memory"])
def test_vici_goes_with_its_spec_alone(spec):
    with pytest.raises(ValueError, match=r"vici= goes with 'xfrm\+vici', not with"):
        open_backend(spec, vici="unix:///x")


def test_what_is_no_address_is_told_early():
    with pytest.raises(ValueError, match="not unix:///path"):
        open_backend("xfrm+vici", vici="http://charon")


def test_unknown_stamp_modes_are_refused():
    with pytest.raises(ValueError, match="use, install, require, off"):
        open_backend("memory", stamp="maybe")


async def test_memory_opens_and_closes(tmp_path):
    path = tmp_path / "ipsec.toml"
    path.write_text('[[sa]]\nsrc = "127.0.0.2"\ndst = "127.0.0.1"\n')
    for spec, sas in (("memory", 0), (f"memory:{path}", 1)):
        opening = open_backend(spec, trust_policy=True)
        async with opening as backend:
            assert isinstance(backend, MemoryBackend)
            assert backend.trust_policy
            assert len(backend.mirror) == sas
            with pytest.raises(RuntimeError, match="open already"):
                await opening.__aenter__()
        assert backend.closed
        await opening.__aexit__(None, None, None)


@pytest.mark.parametrize("stamp", ["use", "install", "require", "off"])
async def test_memory_plays_the_stamp_unless_it_is_off(tmp_path, stamp):
    path = tmp_path / "ipsec.toml"
    path.write_text('[[sa]]\nsrc = "192.0.2.2"\ndst = "192.0.2.1"\n')
    async with open_backend(f"memory:{path}", stamp=stamp) as backend:
        registration = await backend.register(IPPROTO_UDP, 5000)
        local, peer = map(pack_address, ("192.0.2.1", "192.0.2.2"))
        evidence = Evidence(
            IPPROTO_UDP,
            local,
            5000,
            peer,
            9,
            0,
            registration.generation,
            after=backend.policies,
        )
        token = backend.resolve(evidence)
        assert (token.assurance is Assurance.EXACT) is token.protected is (stamp != "off")


async def test_a_faulty_file_is_told_of(tmp_path):
    with pytest.raises(FileNotFoundError):
        async with open_backend(f"memory:{tmp_path}/none.toml"):
            pass


async def test_xfrm_is_opened_with_its_options(monkeypatch):
    from ipsec_aio.backends import xfrm

    class Fake(MemoryBackend):
        def __init__(self, *, stamp, trust_policy):
            super().__init__(trust_policy=trust_policy)
            self.stamp = stamp

        async def start(self):
            self.started = True

    monkeypatch.setattr(xfrm, "XfrmBackend", Fake)
    async with open_backend("xfrm", stamp="require", trust_policy=True) as backend:
        assert (backend.stamp, backend.trust_policy, backend.started) == ("require", True, True)


# The default


def test_without_any_there_is_a_clear_error():
    with pytest.raises(BackendUnavailable, match=r"set_default_backend\(\).*IPSEC_AIO_BACKEND"):
        current_backend()
    with pytest.raises(BackendUnavailable, match="no IPsec backend"):
        asyncio.run(default_backend())


async def test_the_explicit_one_comes_first(monkeypatch):
    monkeypatch.setenv("IPSEC_AIO_BACKEND", "memory")
    one, two = MemoryBackend(), MemoryBackend()
    set_default_backend(one)
    assert current_backend(two) is two
    assert await resolve_backend(two) is two
    assert current_backend() is one
    assert await resolve_backend() is one
    assert await default_backend() is one
    set_default_backend(None)
    assert await default_backend() is not one


def test_only_a_backend_can_be_the_default():
    with pytest.raises(TypeError):
        set_default_backend(open_backend("memory"))
    with pytest.raises(TypeError):
        set_default_backend("memory")


@factories
def test_the_environment_s_opens_once_per_loop_and_closes_with_it(monkeypatch, factory):
    monkeypatch.setenv("IPSEC_AIO_BACKEND", "memory")

    async def use():
        several = await asyncio.gather(*(resolve_backend() for _ in range(3)))
        assert len(set(several)) == 1
        assert current_backend() is several[0]
        assert not several[0].closed
        return several[0]

    backends = []
    for _ in range(2):
        with asyncio.Runner(loop_factory=factory) as runner:
            backends.append(runner.run(use()))
            assert not backends[-1].closed
        assert backends[-1].closed
    assert backends[0] is not backends[1]
    assert not module._by_loop
    assert not module._locks


@factories
def test_the_environment_s_memory_is_opened_at_once(monkeypatch, factory, tmp_path):
    path = tmp_path / "ipsec.toml"
    path.write_text('[[sa]]\nsrc = "127.0.0.2"\ndst = "127.0.0.1"\n')
    monkeypatch.setenv("IPSEC_AIO_BACKEND", f"memory:{path}")

    async def use():
        backend = current_backend()
        assert len(backend.mirror) == 1
        assert await resolve_backend() is current_backend() is backend
        return backend

    with asyncio.Runner(loop_factory=factory) as runner:
        backend = runner.run(use())
        assert not backend.closed
    assert backend.closed
    assert not module._by_loop


def test_the_environment_s_memory_is_there_without_a_loop(monkeypatch, tmp_path):
    path = tmp_path / "ipsec.toml"
    path.write_text('[[sa]]\nsrc = "127.0.0.2"\ndst = "127.0.0.1"\n')
    monkeypatch.setenv("IPSEC_AIO_BACKEND", f"memory:{path}")
    backend = current_backend()
    assert len(backend.mirror) == 1
    assert current_backend() is backend
    assert not module._by_loop
    monkeypatch.setenv("IPSEC_AIO_BACKEND", f"memory:{tmp_path}/none.toml")
    with pytest.raises(FileNotFoundError) as raised:
        current_backend()
    assert "IPSEC_AIO_BACKEND" in raised.value.__notes__[0]


def test_a_forked_process_has_the_environment_s_memory_for_itself():
    program = (
        "import os; from ipsec_aio.backends import current_backend; current_backend()\n"
        "if os.fork(): raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))\n"
        "current_backend().check()"
    )
    environment = {**os.environ, "IPSEC_AIO_BACKEND": "memory"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


@factories
@pytest.mark.parametrize("opened", [False, True])
def test_the_environment_s_kernel_is_opened_by_the_first_endpoint(monkeypatch, factory, opened):
    class Fake(MemoryBackend):
        def __init__(self, **options):
            super().__init__()

        async def start(self):
            await asyncio.sleep(0)

    monkeypatch.setattr("ipsec_aio.backends.xfrm.XfrmBackend", Fake)
    monkeypatch.setenv("IPSEC_AIO_BACKEND", "xfrm")

    async def use():
        if opened:
            several = await asyncio.gather(*(resolve_backend() for _ in range(3)))
            assert set(several) == {current_backend()}
        else:
            with pytest.raises(BackendUnavailable, match="not open on this loop yet"):
                current_backend()

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(use())
    assert not module._by_loop
    assert not module._locks


@factories
def test_a_loop_that_is_closed_without_shutting_down_is_swept_up(monkeypatch, factory):
    monkeypatch.setenv("IPSEC_AIO_BACKEND", "memory")
    loop = factory()
    backend = loop.run_until_complete(resolve_backend())
    loop.close()
    other = asyncio.run(resolve_backend())
    assert other is not backend
    assert backend.closed
    assert not module._by_loop


def test_a_faulty_environment_is_told_of(monkeypatch):
    monkeypatch.setenv("IPSEC_AIO_BACKEND", "ipsec")
    with pytest.raises(ValueError, match="unknown backend 'ipsec'"):
        asyncio.run(resolve_backend())
    assert not module._by_loop
