"""The stamp's parts: ports, the sysctl, who uses marks, and what errors say."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ipsec_aio.enums import Direction
from ipsec_aio.errors import BackendDenied, BackendError, BackendUnavailable, CodecError
from ipsec_aio.flow import Mark, Selector
from ipsec_aio.kernel import stamp_table
from ipsec_aio.kernel.nfnetlink import Message, NftError, NftSocket, Request, nft
from ipsec_aio.kernel.stamp_marks import MarkUsers, mark_users, read_mark_users
from ipsec_aio.kernel.stamp_rules import CHAINS, FRAGMENTS, INPUT
from ipsec_aio.kernel.stamp_sysctl import FwmarkAccept
from ipsec_aio.kernel.stamp_table import Port
from ipsec_aio.policy import Policy
from ipsec_aio.sa import IPPROTO_ESP, SA
from ipsec_aio.wire.netlink import attribute

Unprivileged = Callable[[Callable[[], object]], BaseException | None]


@pytest.fixture
def netlink(netns: None) -> Iterator[NftSocket]:
    netlink = NftSocket()
    yield netlink
    netlink.close()


def test_ports() -> None:
    assert Port.parse("udp/5000") == (17, 5000)
    assert Port.parse("tcp/1") == (6, 1)
    assert str(Port(6, 1)) == "tcp/1"
    assert str(Port(132, 1)) == "132/1"
    assert Port(17, 0x1234).key == bytes.fromhex("1100000012340000")
    for wrong in ("udp", "udp/", "udp/70000", "icmp/1", "udp/4500", "udp/0x1", "/", ""):
        with pytest.raises(ValueError, match=r"."):
            Port.parse(wrong)


def test_many_ports_are_sent_and_read_back(netlink: NftSocket) -> None:
    ports = frozenset(Port(17, number) for number in range(1, 4001))
    stamp_table.install(netlink, ports, owned=False)
    assert stamp_table.read(netlink).ports == ports
    stamp_table.remove_ports(netlink, ports)
    assert stamp_table.read(netlink).ports == set()


def test_a_table_is_measured_by_what_is_meant_now(
    netlink: NftSocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamp_table.install(netlink, owned=False)
    assert not stamp_table.read(netlink).problem
    cut = INPUT._replace(rules=INPUT.rules[1:])
    monkeypatch.setitem(CHAINS, "input", cut)
    assert "has 7 rules, not 6" in stamp_table.read(netlink).problem
    monkeypatch.setattr(stamp_table, "INPUT", cut)
    stamp_table.install(netlink, owned=False, replace=True)
    assert not stamp_table.read(netlink).problem


def test_a_port_that_is_not_there_cannot_be_taken_out(netlink: NftSocket) -> None:
    stamp_table.install(netlink, owned=False)
    with pytest.raises(FileNotFoundError):
        stamp_table.remove_ports(netlink, [Port(17, 1)])


def test_the_table_is_not_installed_twice(netlink: NftSocket) -> None:
    stamp_table.install(netlink, owned=False)
    with pytest.raises(BackendError, match="File exists"):
        stamp_table.install(netlink, owned=False)


def test_elements_that_cannot_be_read() -> None:
    elements = attribute(1, attribute(1, attribute(1, b"short")))
    told = {"NFTA_SET_ELEM_LIST_ELEMENTS": elements}
    with pytest.raises(CodecError, match="element"):
        stamp_table.ports_of(Message(nft.NFT_MSG_NEWSETELEM, 1, 1, "ipsec_aio", told))


def test_a_set_with_elements_of_another_form_is_no_stamp(
    netlink: NftSocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamp_table.install(netlink, [Port(17, 1)], owned=False)
    monkeypatch.setattr(stamp_table, "KEY_LENGTH", 12)
    monkeypatch.setattr(stamp_table, "_set_fault", lambda _: "")
    assert "element that cannot be read" in stamp_table.read(netlink).problem


class Answering(NftSocket):
    """A kernel that refuses one message of a transaction."""

    def __init__(self, code: int, index: int) -> None:
        self.failure = NftError(code, index)

    def commit(self, requests: object) -> None:
        raise self.failure

    def rehearse(self, requests: object) -> None:
        raise self.failure

    def get(self, *_: object, **__: object) -> Message:
        raise NftError(errno.ENOENT)

    def generation_id(self) -> int:
        raise CodecError("cut off")


def place(chain: str, purpose: str) -> int:
    """Return the place of a rule in the transaction that installs everything."""
    index = 2
    for each in (INPUT, FRAGMENTS):
        for rule in each.rules:
            index += 1
            if (each.name, rule.purpose) == (chain, purpose):
                return index
        index += 1
    raise AssertionError(purpose)


@pytest.mark.parametrize(
    ("code", "index", "kind", "words"),
    [
        (
            errno.ENOENT,
            place("input", "drop clear segments on stamped connections"),
            BackendUnavailable,
            "lacks nft_socket",
        ),
        (
            errno.ENOENT,
            place("input", "stamp with the SPI"),
            BackendUnavailable,
            "lacks nft_xfrm",
        ),
        (
            errno.EOPNOTSUPP,
            place("fragments", "drop decrypted IPv6 fragments"),
            BackendUnavailable,
            "lacks nft_fib_inet",
        ),
        (errno.EINVAL, 0, BackendUnavailable, "Linux 5.12"),
        (errno.EOPNOTSUPP, 0, BackendUnavailable, "Linux 5.12"),
        (errno.EOPNOTSUPP, -1, BackendUnavailable, "no nf_tables"),
        (errno.EPERM, -1, BackendDenied, "CAP_NET_ADMIN"),
        (errno.EPERM, 0, BackendDenied, "CAP_NET_ADMIN"),
        (errno.ENOMEM, 3, BackendError, "Cannot allocate"),
    ],
)
def test_what_the_kernel_refuses_is_said_in_our_terms(
    code: int, index: int, kind: type[BackendError], words: str
) -> None:
    kernel = Answering(code, index)
    with pytest.raises(kind, match=words) as caught:
        stamp_table.install(kernel, owned=True)
    assert type(caught.value) is kind
    if kind is BackendDenied:
        with pytest.raises(BackendDenied):
            stamp_table.try_out(kernel, owned=True)
    else:
        assert words in stamp_table.try_out(kernel, owned=True)


def test_the_places_above_are_right() -> None:
    requests = stamp_table._whole((), True, False, "")
    labels = [request.label for request in requests if request.kind == nft.NFT_MSG_NEWRULE]
    assert labels == [rule.module for chain in CHAINS.values() for rule in chain.rules]
    assert requests[place("input", "stamp with the SPI")].label == "nft_xfrm"


def test_bytes_that_cannot_be_read_are_an_error() -> None:
    with pytest.raises(BackendError, match="cut off"):
        stamp_table.read(Answering(0, 0))


class Changing(NftSocket):
    """Tables that change once while they are read, or cannot be read to the end."""

    def __init__(self, code: int = 0) -> None:
        super().__init__()
        self.code = code
        self.numbers = [1, 2]

    def generation_id(self) -> int:
        return self.numbers.pop(0) if self.numbers else 3

    def get(self, *arguments: Any, **keywords: Any) -> Message:
        if self.code:
            raise NftError(self.code)
        return super().get(*arguments, **keywords)


def test_tables_are_read_again_when_they_changed(netlink: NftSocket) -> None:
    stamp_table.install(netlink, owned=False)
    changing = Changing()
    assert not stamp_table.read(changing).problem
    assert not changing.numbers
    changing.close()


def test_a_table_that_cannot_be_read_is_an_error(netns: None) -> None:
    changing = Changing(errno.EPERM)
    with pytest.raises(BackendDenied):
        stamp_table.read(changing)
    changing.close()


def test_this_kernel_has_everything(netlink: NftSocket) -> None:
    assert stamp_table.try_out(netlink, owned=True) == ""
    assert not stamp_table.read(netlink).installed


def test_a_rule_that_the_kernel_cannot_know_is_named(netlink: NftSocket) -> None:
    stamp_table.install(netlink, owned=False)
    attributes = [
        ("NFTA_RULE_TABLE", "ipsec_aio"),
        ("NFTA_RULE_CHAIN", "input"),
        ("NFTA_RULE_EXPRESSIONS", [{"attrs": [("NFTA_EXPR_NAME", "no_such_thing")]}]),
    ]
    request = Request(nft.NFT_MSG_NEWRULE, attributes, nft.NLM_F_CREATE, "nft_no_such_thing")
    with pytest.raises(BackendUnavailable, match="lacks nft_no_such_thing"):
        stamp_table._commit(netlink, [request], "try")


class TestSysctl:
    """On a file that stands for it: the kernel's own is in the other tests."""

    def test_missing(self, tmp_path: Path) -> None:
        sysctl = FwmarkAccept(str(tmp_path / "none"))
        assert not sysctl.enabled
        with pytest.raises(BackendUnavailable, match="no sysctl"):
            sysctl.enable()
        assert not sysctl.restore()
        assert not sysctl.disable()
        sysctl.close()
        sysctl.close()

    def test_given_back(self, tmp_path: Path) -> None:
        path = tmp_path / "value"
        path.write_text("0\n")
        sysctl = FwmarkAccept(str(path))
        sysctl.enable()
        sysctl.enable()
        assert path.read_text() == "1\n"
        assert sysctl.restore()
        assert not sysctl.restore()
        assert path.read_text() == "0\n"
        sysctl.close()

    def test_not_given_back_where_others_changed_it(self, tmp_path: Path) -> None:
        path = tmp_path / "value"
        path.write_text("0\n")
        sysctl = FwmarkAccept(str(path))
        sysctl.enable()
        path.write_text("2\n")
        assert not sysctl.restore()
        assert path.read_text() == "2\n"
        sysctl.close()

    def test_read_only(self) -> None:
        sysctl = FwmarkAccept("/proc/sys/kernel/osrelease")
        assert not sysctl.writable
        assert sysctl.enabled
        sysctl.enable()
        assert not sysctl.restore()
        sysctl.close()

    def test_refused_by_the_kernel(self, tmp_path: Path) -> None:
        path = tmp_path / "value"
        path.write_text("0\n")
        sysctl = FwmarkAccept(str(path))
        os.close(sysctl._fd)
        sysctl._fd = os.open(path, os.O_RDONLY)
        with pytest.raises(BackendError, match="cannot set"):
            sysctl.enable()
        assert not sysctl.disable()
        sysctl.close()


def sa(**fields: object) -> SA:
    values: dict[str, object] = {"destination": bytes(4), "proto": IPPROTO_ESP, "spi": 0x1001}
    return SA(**{**values, **fields})  # type: ignore[arg-type]


def policy(**fields: object) -> Policy:
    return Policy(selector=Selector(), **fields)  # type: ignore[arg-type]


MARK = Mark(5, 0xFF)


@pytest.mark.parametrize(
    ("sas", "policies", "found"),
    [
        ([sa()], [policy()], ""),
        ([sa(mark=MARK)], [], "SAs with a mark: spi 0x00001001 mark 0x5/0xff"),
        ([sa(mark=MARK, direction=Direction.OUT)], [], ""),
        ([sa(set_mark=MARK)], [], "SAs that set a mark: spi 0x00001001 sets 0x5/0xff"),
        ([sa(set_mark=MARK, direction=Direction.IN)], [], "SAs that set a mark"),
        ([sa(set_mark=MARK, direction=Direction.OUT)], [], ""),
        ([sa(set_mark=Mark(), mark=Mark(5, 0))], [], ""),
        ([], [policy(mark=MARK)], "inbound policies with a mark: any → any mark 0x5/0xff"),
        ([], [policy(mark=MARK, direction=Direction.FWD)], ""),
        ([sa(mark=MARK)] * 5, [], " and 2 more"),
    ],
)
def test_who_uses_marks(sas: list[SA], policies: list[Policy], found: str) -> None:
    problem = mark_users(sas, policies).problem
    assert bool(problem) == bool(found)
    assert found in problem


def test_outbound_policies_with_a_mark_are_tcp_s_affair() -> None:
    assert mark_users([], [policy(direction=Direction.OUT)]).tcp_problem == ""
    users = mark_users([], [policy(mark=MARK, direction=Direction.OUT)])
    assert not users.problem
    assert "any → any mark 0x5/0xff" in users.tcp_problem


def test_marks_are_read_from_the_kernel(netns: None) -> None:
    assert asyncio.run(read_mark_users()) == MarkUsers()
    words = "ip xfrm policy add dir in src 192.0.2.1 dst 192.0.2.2 mark 5 mask 0xff"
    done = subprocess.run(words.split(), capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no marked policy here: {done.stderr}")
    users = asyncio.run(read_mark_users())
    assert users.policies == ("192.0.2.1/32 → 192.0.2.2/32 mark 0x5/0xff",)


def test_marks_without_privilege(netns: None, unprivileged: Unprivileged) -> None:
    error = unprivileged(lambda: asyncio.run(read_mark_users()))
    assert isinstance(error, BackendDenied)
