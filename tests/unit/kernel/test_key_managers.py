"""Who would hear that the kernel wants an SA."""

from __future__ import annotations

import builtins
import io
import socket
from typing import Any

import pytest

from ipsec_aio.kernel.sockopts import has_key_manager

HEADER = (
    "sk               Eth Pid        Groups   Rmem     Wmem     Dump  Locks    Drops    Inode\n"
)
ROW = "00000000ee77db18 {} 1 {:08x} 0 0 0 2 0 4\n"


@pytest.fixture
def proc(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    files: dict[str, str] = {}

    def fake(path: str, *words: Any, **named: Any) -> io.StringIO:
        name = path.rpartition("/")[2]
        if name not in files:
            raise FileNotFoundError(path)
        return io.StringIO(files[name])

    monkeypatch.setattr(builtins, "open", fake)
    return files


@pytest.mark.parametrize(
    ("protocol", "groups", "found"),
    [(6, 1, True), (6, 0x83, True), (6, 0x46, False), (0, 1, False), (16, 0xFFFFFFFF, False)],
)
def test_sockets_of_netlink(proc: dict[str, str], protocol: int, groups: int, found: bool) -> None:
    proc["netlink"] = HEADER + ROW.format(0, 0) + ROW.format(protocol, groups)
    assert has_key_manager() is found


def test_pf_key(proc: dict[str, str]) -> None:
    proc["netlink"] = HEADER
    proc["pfkey"] = "sk RefCnt Rmem Wmem User Inode\n"
    assert not has_key_manager()
    proc["pfkey"] += "0000 3 0 0 0 1234\n"
    assert has_key_manager()


def test_where_nobody_can_know_there_may_be_one(proc: dict[str, str]) -> None:
    assert has_key_manager()


def test_this_kernel(netns: None) -> None:
    assert not has_key_manager()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 6) as listening:
        listening.bind((0, 1))
        assert has_key_manager()
    assert not has_key_manager()
