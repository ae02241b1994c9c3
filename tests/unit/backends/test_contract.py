"""What a backend need not say is answered for it, on the safe side."""

from __future__ import annotations

from ipsec_aio import MemoryBackend
from ipsec_aio.backends.contract import Backend
from ipsec_aio.evidence import IPPROTO_TCP, Evidence


class Terse(MemoryBackend):
    """Says no more than the contract asks for."""

    drops_fragments = Backend.drops_fragments
    ignores_ports = Backend.ignores_ports


def test_what_is_not_said_is_not_promised() -> None:
    backend = Terse()
    assert not backend.drops_fragments
    assert not backend.ignores_ports(Evidence(IPPROTO_TCP, b"", 0, b"", 0))
