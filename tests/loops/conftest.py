"""Every way in which datagrams are received is held against the same tests."""

from __future__ import annotations

from typing import Any

import pytest

from ipsec_aio.net import datagram


@pytest.fixture(params=["adaptive", "batch", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As wake-ups suggest; always in batches; or always with recvmsg, as where nothing else is."""
    take_way(request.param, monkeypatch)
    return request.param


def take_way(name: str, monkeypatch: Any) -> None:
    if name == "plain":
        monkeypatch.setattr(datagram, "batch_for", lambda *_: None)
    if name == "batch":
        monkeypatch.setattr(datagram, "SPARSE", 0)
