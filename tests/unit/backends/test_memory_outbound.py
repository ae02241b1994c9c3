"""What the memory backend says of what is sent."""

from __future__ import annotations

import pytest
from sas import LOCAL, OTHER, PEER, seen

from ipsec_aio import MemoryBackend, ProtectionError
from ipsec_aio.evidence import IPPROTO_UDP
from ipsec_aio.flow import Flow

HERE, THERE, GATE, FAR = "192.0.2.1", "192.0.2.2", "198.51.100.1", "198.51.100.2"
FLOW = Flow(LOCAL, PEER, IPPROTO_UDP, 5000, 40000)


def two_ways(**fields):
    backend = MemoryBackend()
    backend.add_sa(src=THERE, dst=HERE, **fields)
    backend.add_sa(src=HERE, dst=THERE, **fields)
    return backend


def test_a_declared_sa_protects_what_is_sent():
    backend = two_ways(reqid=5)
    assert backend.sends_like(backend.resolve(seen()), FLOW) is None


def test_an_error_says_why_it_would_not_be_protected():
    backend = MemoryBackend()
    backend.add_sa(src=THERE, dst=HERE)
    error = backend.sends_like(backend.resolve(seen()), FLOW)
    assert isinstance(error, ProtectionError)
    assert error.clause == "ptoken"
    assert error.reason == "no policy demands protection of what is sent"


@pytest.mark.parametrize(
    "fields",
    [
        {"direction": "in"},
        {"proto": "comp"},
        {"reqid": 9},
        {"reqid": 0},
        {"dst": "192.0.2.3"},
        {"encryption": "cbc(aes)"},
        {"proto": "ah"},
        {"mode": "tunnel"},
    ],
)
def test_another_sa_does_not(fields):
    backend = MemoryBackend()
    backend.add_sa(src=THERE, dst=HERE, reqid=5)
    backend.add_sa(**({"src": HERE, "dst": THERE, "reqid": 5} | fields))
    assert backend.sends_like(backend.resolve(seen()), FLOW)


def test_tunnels_say_which_way_they_lead():
    backend = MemoryBackend()
    backend.add_sa(src=FAR, dst=GATE, mode="tunnel", direction="in")
    ptoken = backend.resolve(seen())
    assert ptoken.protected
    assert backend.sends_like(ptoken, FLOW)
    backend.add_sa(src=GATE, dst=FAR, mode="tunnel", direction="out")
    assert backend.sends_like(ptoken, FLOW) is None


def test_declared_policies_come_first():
    backend = two_ways()
    ptoken = backend.resolve(seen())
    backend.add_policy(direction="out", template=None)
    assert "does not demand" in backend.sends_like(ptoken, FLOW).reason


def test_the_answer_changes_with_the_epoch():
    backend = two_ways()
    ptoken = backend.resolve(seen())
    assert backend.sends_like(ptoken, FLOW) is None
    epoch = backend.epoch
    backend.add_sa(src=HERE, dst=THERE, proto="esp", authentication="hmac(sha256)")
    assert backend.epoch != epoch
    assert backend.sends_like(ptoken, FLOW)
    assert backend.sends_like(ptoken, Flow(OTHER, PEER))
