"""What the state machines have in common: peers who may be anybody, and the facts about them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from ipsec_aio import MemoryBackend, Require
from ipsec_aio.sa import SA

__all__ = ["BAD", "GOOD", "PATIENT", "WANTED", "WEAK", "Facts", "Known", "said"]

GOOD, BAD = "friend.good.example", "mallory.bad.example"
WANTED = Require(encrypted=True, peer="*.good.example")
PATIENT = 60.0
WEAK = {"encryption": "ecb(cipher_null)", "authentication": "hmac(sha256)"}


def said(name: str | None) -> dict[str, Any]:
    """How a backend is told of an SA's peer; None: nobody has said yet."""
    return {"identity_pending": True} if name is None else {"peer": name}


class Known:
    """An SA, and what is true of it. ``name`` None: nobody has said yet."""

    def __init__(self, sa: SA, name: str | None, *, weak: bool) -> None:
        self.sa = sa
        self.name = name
        self.weak = weak

    @property
    def good(self) -> bool:
        return self.name == GOOD and not self.weak


class Facts:
    """The SAs of a backend by their peers, and whether what it is told of them gets through."""

    backend: MemoryBackend
    sas: dict[str, list[Known]]
    events_held: bool
    events_lost: bool

    def all(self) -> list[Known]:
        return [known for sas in self.sas.values() for known in sas]

    def draw(self, data: Any) -> tuple[str, Known]:
        pairs = [(peer, known) for peer, sas in self.sas.items() for known in sas]
        found: tuple[str, Known] = data.draw(st.sampled_from(pairs))
        return found

    def hold_or_release_events(self) -> None:
        if self.events_held:
            self.backend.release_events()
        elif not self.events_lost:
            self.backend.hold_events()
        self.events_held = not self.events_held and not self.events_lost

    def lose_or_recover_events(self) -> None:
        if self.events_lost:
            self.backend.recover()
            self.events_held = False
        else:
            self.backend.lose_events()
        self.events_lost = not self.events_lost
