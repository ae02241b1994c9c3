"""The memory backend: declarations, mishaps, TOML, threads and loops."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from pathlib import Path

import pytest
from sas import seen

from ipsec_aio.backends.memory import MemoryBackend, selector
from ipsec_aio.enums import Assurance, Direction, Mode, PolicyAction
from ipsec_aio.errors import BackendUnavailable
from ipsec_aio.evidence import IPPROTO_UDP, Evidence
from ipsec_aio.flow import Mark, pack_address
from ipsec_aio.sa import Algorithm

SERVER, CLIENT, CLEAR = "127.0.0.1", "127.0.0.2", "127.0.0.3"


@pytest.fixture
def backend() -> MemoryBackend:
    return MemoryBackend()


def arrive(backend, peer=CLIENT, local=SERVER, generation=None, **fields):
    if generation is None:
        generation = backend.resolver.generation
    backend.drain()
    return backend.resolve(
        seen(
            0,
            peer=pack_address(peer),
            local=pack_address(local),
            mark=None,
            generation=generation,
            **fields,
        )
    )


# Declarations


def test_it_works_unopened_and_tells_peers_apart(backend):
    sa = backend.add_sa(src=CLIENT, dst=SERVER)
    assert arrive(backend).protected
    assert arrive(backend).sa == sa
    assert arrive(backend, CLEAR).assurance is Assurance.NONE
    assert backend.netns_cookie is None


def test_defaults_by_protocol(backend):
    esp = backend.add_sa(src=CLIENT, dst=SERVER)
    ah = backend.add_sa(src=CLIENT, dst=SERVER, proto="ah")
    comp = backend.add_sa(src=CLIENT, dst=SERVER, proto="comp")
    bare = backend.add_sa(src=CLIENT, dst=SERVER, authentication="hmac(sha1)")
    assert esp.aead == Algorithm("rfc4106(gcm(aes))", 160, 128)
    assert ah.authentication == Algorithm("hmac(sha256)", 256, 128)
    assert comp.compression.name == "deflate"
    assert bare.encryption.name == "ecb(cipher_null)"
    assert len({sa.spi for sa in (esp, ah, comp, bare)}) == 4


def test_everything_can_be_said(backend):
    sa = backend.add_sa(
        src="2001:db8::2",
        dst="2001:db8::1",
        spi=0xABC,
        proto=50,
        mode="tunnel",
        reqid=4,
        encryption="cbc(aes)",
        authentication="hmac(sha512)",
        key_bits=256,
        icv_bits=128,
        auth_key_bits=100,
        selector=selector("2001:db8:1::/48", proto="tcp", src_port=7),
        direction="in",
        mark=(1, 0xFF),
        set_mark=(2, 0xFFFF),
        if_id=9,
        replay_window=64,
        esn=True,
    )
    assert sa.encryption == Algorithm("cbc(aes)", 256)
    assert sa.authentication == Algorithm("hmac(sha512)", 100, 128)
    assert (sa.mode, sa.direction, sa.spi, sa.reqid) == (Mode.TUNNEL, Direction.IN, 0xABC, 4)
    assert (sa.mark, sa.set_mark) == (Mark(1, 0xFF), Mark(2, 0xFFFF))
    assert (sa.if_id, sa.replay_window, sa.esn) == (9, 64, True)
    assert str(sa.selector) == "2001:db8:1::/48:7 → any proto 6"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"aead": "rot13"}, r"unknown aead algorithm 'rot13'; there are rfc4106"),
        ({"encryption": "rot13"}, "unknown encryption algorithm"),
        ({"authentication": "crc32"}, "unknown authentication algorithm"),
        ({"proto": "comp", "compression": "zip"}, "unknown compression algorithm"),
        ({"aead": "rfc4106(gcm(aes))", "encryption": "cbc(aes)"}, "aead excludes"),
        ({"proto": "gre"}, "unknown proto 'gre'; there are ah, comp, esp"),
        ({"proto": 256}, "proto 256 is not between 0 and 255"),
        ({"mode": "bus"}, "unknown mode"),
        ({"spi": 1 << 32}, "spi"),
        ({"reqid": -1}, "reqid"),
        ({"direction": "fwd"}, "not a|direction"),
        ({"src": "here"}, "here"),
    ],
)
def test_what_the_kernel_does_not_know_is_refused(backend, arguments, message):
    arguments = {"src": CLIENT, "dst": SERVER} | arguments
    if arguments.get("direction") == "fwd":
        arguments["direction"] = 2
    with pytest.raises(ValueError, match=message):
        backend.add_sa(**arguments)
    assert not backend.mirror.sad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"src": "192.0.2.0/33"}, "192.0.2.0/33"),
        ({"src": "192.0.2.0/24", "dst": "::1"}, "families"),
        ({"dst_port": 65536}, "dst_port"),
        ({"proto": "ftp"}, "unknown proto 'ftp'"),
        ({"action": "pass"}, "unknown action"),
        ({"direction": "up"}, "unknown direction"),
        ({"template": "gre"}, "unknown template"),
        ({"kind": 2}, "kind"),
        ({"priority": -1}, "priority"),
    ],
)
def test_faulty_policies_are_refused(backend, arguments, message):
    with pytest.raises(ValueError, match=message):
        backend.add_policy(**arguments)
    assert not len(backend.mirror.spd)


def test_mapped_networks_are_unmapped():
    assert selector("::ffff:192.0.2.0/120") == selector("192.0.2.0/24")


def test_policies_are_declared_and_deleted(backend):
    policy = backend.add_policy(
        src=CLIENT,
        dst="127.0.0.0/8",
        direction=Direction.OUT,
        proto="udp",
        dst_port=53,
        priority=5,
        template="ah",
        mode="tunnel",
        reqid=3,
        tunnel_src="192.0.2.1",
        tunnel_dst="192.0.2.2",
        optional=True,
        mark=(1, 1),
        if_id=2,
        kind=1,
    )
    template = policy.templates[0]
    assert (template.proto, template.mode, template.reqid) == (51, Mode.TUNNEL, 3)
    assert template.optional
    assert policy.index & 7 == Direction.OUT
    assert list(backend.mirror.spd) == [policy]
    backend.flush_policies()
    assert list(backend.mirror.spd) == [policy]
    backend.flush_policies(1)
    assert not list(backend.mirror.spd)
    for none in (None, "none"):
        bypass = backend.add_policy(template=none)
        assert bypass.templates == ()
        backend.delete_policy(bypass)
    with pytest.raises(KeyError):
        backend.delete_policy(bypass)


def test_default_actions(backend):
    assert arrive(backend, generation=0).assurance is Assurance.NONE
    backend.set_default("block")
    assert arrive(backend, generation=0).assurance is Assurance.UNKNOWN
    backend.set_default(PolicyAction.ALLOW)
    assert arrive(backend, generation=0).assurance is Assurance.NONE


# The played stamp


def test_the_newest_fitting_sa_carries_the_traffic(backend):
    old = backend.add_sa(src=CLIENT, dst=SERVER)
    token = arrive(backend)
    new = backend.rekey(old)
    assert new.spi != old.spi
    assert arrive(backend) is token
    assert token.sas == (old, new)
    weak = backend.rekey(new, aead=None, encryption=Algorithm("ecb(cipher_null)"))
    assert not arrive(backend).protected
    backend.delete_sa(weak)
    assert arrive(backend) is token
    backend.rekey(new, reqid=9)
    assert arrive(backend) is not token
    again = backend.rekey(old, spi=old.spi)
    assert again == old
    assert arrive(backend) is token


def test_fresh_spis_are_fresh(backend):
    first = backend.add_sa(src=CLIENT, dst=SERVER)
    backend.add_sa(src=CLIENT, dst=SERVER, spi=first.spi + 1)
    backend.rekey(first, spi=first.spi + 2)
    assert backend.rekey(first).spi == first.spi + 3
    assert backend.add_sa(src=CLIENT, dst=SERVER).spi == first.spi + 4


def test_outbound_and_foreign_sas_carry_nothing(backend):
    backend.add_sa(src=SERVER, dst=CLIENT)
    backend.add_sa(src=CLIENT, dst=SERVER, direction="out")
    backend.add_sa(src=CLEAR, dst=SERVER)
    assert arrive(backend).assurance is Assurance.NONE


def test_an_arbitrary_mark_is_not_believed(backend):
    backend.add_sa(src=CLEAR, dst=SERVER, spi=0x1001)
    evidence = seen(0x1001, peer=pack_address(CLIENT), local=pack_address(SERVER))
    assert backend.resolve(evidence).assurance is Assurance.NONE


def test_tunnels_carry_what_their_selectors_name(backend):
    backend.add_sa(src="192.0.2.1", dst="192.0.2.2", mode="tunnel", selector=selector(src=CLIENT))
    assert arrive(backend).tunnel_mode is True
    assert arrive(backend, CLEAR).assurance is Assurance.NONE


def test_expiry(backend):
    sa = backend.add_sa(src=CLIENT, dst=SERVER)
    token = arrive(backend)
    backend.expire(sa, hard=False)
    assert arrive(backend) is token
    backend.expire(sa)
    assert arrive(backend).assurance is Assurance.NONE
    assert not token.alive
    for again in (lambda: backend.expire(sa), lambda: backend.expire(sa, hard=False)):
        with pytest.raises(KeyError):
            again()
    with pytest.raises(KeyError):
        backend.delete_sa(sa)


def test_flush_by_protocol(backend):
    backend.add_sa(src=CLIENT, dst=SERVER)
    ah = backend.add_sa(src=CLIENT, dst=SERVER, proto="ah")
    backend.flush_sas("esp")
    assert arrive(backend).sa == ah
    backend.flush_sas()
    assert arrive(backend).sa is None


def test_what_stands_in_for_the_policies_is_asked_again_when_an_sa_comes(backend):
    backend.mirror.always_bump = False
    backend.objection(seen(0x1001), ())
    epoch = backend.epoch
    backend.add_sa(src=CLIENT, dst=SERVER, selector=selector(ifindex=3))
    assert backend.epoch != epoch


# Mishaps


async def test_a_lost_stamp_leaves_inference(backend):
    backend.add_sa(src=CLIENT, dst=SERVER)
    registration = await backend.register(IPPROTO_UDP, 5000)
    generation = registration.generation
    assert generation
    assert not registration.reads_marks
    assert not registration.keeps_fragments
    epoch = backend.epoch
    backend.lose_stamp()
    assert backend.epoch != epoch
    assert registration.generation == 0
    assert arrive(backend).assurance is Assurance.UNKNOWN
    assert arrive(backend, generation=generation).assurance is Assurance.UNKNOWN
    backend.restore_stamp()
    assert registration.generation not in (0, generation)
    assert arrive(backend).protected
    assert arrive(backend, generation=generation).assurance is Assurance.UNKNOWN
    registration.close()


def test_lost_events(backend):
    sa = backend.add_sa(src=CLIENT, dst=SERVER)
    backend.add_policy(src=CLIENT)
    token = arrive(backend)
    backend.lose_events()
    backend.delete_sa(sa)
    weak = backend.add_sa(src=CLIENT, dst=SERVER, encryption="cbc(aes)")
    assert arrive(backend).assurance is Assurance.UNKNOWN
    backend.recover()
    assert arrive(backend).sa == weak
    assert not arrive(backend).protected
    assert token.protected
    assert not token.alive
    assert len(backend.mirror.spd) == 1


async def test_a_packet_before_its_event_waits_for_it(backend):
    backend.hold_events()
    backend.hold_events()
    backend.add_sa(src=CLIENT, dst=SERVER)
    token = arrive(backend)
    assert token.assurance is Assurance.UNKNOWN
    waiting = asyncio.ensure_future(token.resolved(5))
    await asyncio.sleep(0)
    backend.release_events()
    assert await waiting is token
    assert token.protected
    backend.release_events()


async def test_a_wait_may_be_too_short(backend):
    backend.hold_events()
    backend.add_sa(src=CLIENT, dst=SERVER)
    token = arrive(backend)
    with pytest.raises(TimeoutError):
        await token.resolved(timeout=0.01)
    assert not backend._waiters


async def test_a_wait_ends_by_itself(backend, monkeypatch):
    monkeypatch.setattr("ipsec_aio.tokens.PENDING_SECONDS", 0.02)
    backend.hold_events()
    backend.add_sa(src=CLIENT, dst=SERVER)
    token = arrive(backend)
    async with asyncio.timeout(5):
        assert await token.resolved() is token
    assert token.assurance is Assurance.UNKNOWN


async def test_reading_a_token_wakes_those_who_wait_for_it(backend):
    backend.hold_events()
    sa = backend.add_sa(src=CLIENT, dst=SERVER)
    token = arrive(backend)
    waiting = [asyncio.ensure_future(token.resolved(5)) for _ in range(2)]
    await asyncio.sleep(0)
    backend.mirror.apply(backend._held[0], backend.clock())
    assert token.sa == sa
    assert await asyncio.gather(*waiting) == [token, token]


def test_events_that_are_asked_for(backend):
    sa = backend.add_sa(src=CLIENT, dst=SERVER)
    backend.mirror.begin_resync(0)
    backend.mirror.finish_resync(0)
    backend._tell(backend._defaults)
    evidence = seen(sa.spi, peer=pack_address(CLIENT), local=pack_address(SERVER))
    assert backend.resolver.resolve(evidence).protected, "GETSA found what no event told"


# TOML

TOML = """
trust_policy = true
default_action = "block"

[[sa]]
src = "127.0.0.2"
dst = "127.0.0.1"
spi = 0x1234
encryption = "cbc(aes)"
authentication = "hmac(sha256)"
mark = [1, 255]

[[sa]]
src = "192.0.2.1"
dst = "192.0.2.2"
mode = "tunnel"
selector = {src = "10.0.0.0/8", proto = "udp"}

[[policy]]
src = "127.0.0.0/8"
dst_port = 5000
proto = "udp"

[[policy]]
template = "none"
priority = 9
"""


def test_toml_text_and_file(tmp_path: Path):
    path = tmp_path / "ipsec.toml"
    path.write_text(TOML)
    for source in (TOML, path, str(path)):
        backend = MemoryBackend.from_toml(source)
        assert backend.trust_policy
        first, second = backend.mirror.sas()
        assert (first.spi, first.mark) == (0x1234, Mark(1, 255))
        assert str(second.selector) == "10.0.0.0/8 → any proto 17"
        assert [len(p.templates) for p in backend.mirror.spd] == [1, 0]
        assert backend.mirror.defaults.inbound is PolicyAction.BLOCK
    assert not MemoryBackend.from_toml(TOML, trust_policy=False).trust_policy
    assert not MemoryBackend.from_toml("").trust_policy


SA = '[[sa]]\nsrc = "127.0.0.2"\ndst = "127.0.0.1"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[sa", r"^TOML: Expected"),
        ("sas = []", r"^TOML: unknown key 'sas'; there are sa, policy"),
        ("sa = 5", r"^TOML: sa is a int, not a list"),
        ("sa = [5]", r"^TOML: \[\[sa\]\] number 1: not a table"),
        ('[[sa]]\nsrc = "::1"', r"^TOML: \[\[sa\]\] number 1: dst is missing"),
        (SA + SA + "spy = 5", r"^TOML: \[\[sa\]\] number 2: unknown key 'spy'; there are src"),
        (SA + 'spi = "5"', r"number 1: spi is a str, not a int"),
        (SA + "spi = true", r"number 1: spi is a bool, not a int"),
        (SA + "proto = 1.5", r"number 1: proto is a float, not a str or int"),
        (SA + "esn = 1", r"number 1: esn is a int, not a bool"),
        (SA + "mark = [1]", r"number 1: mark is \[value, mask\], not \[1\]"),
        (SA + 'aead = "rot13"', r"number 1: unknown aead algorithm 'rot13'"),
        (SA + 'selector = {from = "x"}', r"number 1: selector: unknown key 'from'"),
        (SA + 'selector = {src = "x"}', r"number 1: selector: 'x' does not appear"),
        ('[[policy]]\ndirection = "up"', r"\[\[policy\]\] number 1: unknown direction 'up'"),
        ('default_action = "pass"', r"unknown default action 'pass'"),
        ("trust_policy = 1", r"trust_policy is a int, not a bool"),
    ],
)
def test_faulty_toml_names_the_place(text, message):
    with pytest.raises(ValueError, match=message):
        MemoryBackend.from_toml(text)


def test_a_file_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        MemoryBackend.from_toml(tmp_path / "none.toml")
    path = tmp_path / "bad.toml"
    path.write_text("x = 1")
    with pytest.raises(ValueError, match=r"bad.toml: unknown key 'x'"):
        MemoryBackend.from_toml(path)


# Loops, threads, processes


async def test_it_is_closed_like_any_other():
    async with MemoryBackend() as backend:
        token = arrive(backend)
    with pytest.raises(BackendUnavailable, match="memory backend is closed"):
        arrive(backend)
    assert not token.alive
    await backend.aclose()


def test_one_backend_serves_several_loops():
    backend = MemoryBackend()
    sa = backend.add_sa(src=CLIENT, dst=SERVER)

    async def use():
        backend.subscribe(lambda: None)
        await backend.register(IPPROTO_UDP, 1)
        return arrive(backend)

    tokens = [asyncio.run(use()) for _ in range(2)]
    assert tokens[0] is tokens[1]
    backend.delete_sa(sa)
    assert not backend._subscribers


async def test_changes_from_another_thread_are_heard(backend):
    backend.add_sa(src=CLIENT, dst=SERVER)
    called = asyncio.Event()
    backend.subscribe(called.set)
    thread = threading.Thread(target=backend.flush_sas)
    thread.start()
    async with asyncio.timeout(5):
        await called.wait()
    thread.join()


def test_threads_do_not_disturb_each_other(backend):
    failures = []
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)

    def work():
        try:
            for _ in range(100):
                sa = backend.add_sa(src=CLIENT, dst=SERVER)
                token = arrive(backend)
                assert token.protected
                assert token.sas
                backend.rekey(sa)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert not failures


def test_it_stays_in_its_process(backend):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        verdict = b"failed"
        try:
            with pytest.raises(BackendUnavailable, match="parent"):
                arrive(backend)
            verdict = b"passed"
        finally:
            os.write(writer, verdict)
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        assert pipe.read() == b"passed"
    os.waitpid(child, 0)


def test_evidence_is_not_changed(backend):
    evidence = Evidence(17, pack_address(SERVER), 1, pack_address(CLIENT), 2, None, 1)
    backend.resolve(evidence)
    assert evidence.mark is None


@pytest.mark.parametrize("mishap", ["hold_events", "lose_events"])
def test_what_is_not_told_stamps_all_the_same(backend, mishap):
    sa = backend.add_sa(src=CLIENT, dst=SERVER)
    assert arrive(backend).protected
    getattr(backend, mishap)()
    epoch = backend.epoch
    backend.delete_sa(sa)
    assert backend.epoch != epoch, "answers that were kept do not hold"
    assert not arrive(backend).protected
