"""The command line: what it prints, where, and its exit status."""

from __future__ import annotations

import errno
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

import pytest

import ipsec_aio.__main__
from ipsec_aio.__main__ import main
from ipsec_aio.cli import stamp as cli
from ipsec_aio.errors import BackendDenied, BackendError, BackendUnavailable
from ipsec_aio.kernel import stamp_table
from ipsec_aio.kernel.nfnetlink import Expression, NftError, NftSocket, Request, expression, nft
from ipsec_aio.kernel.stamp_marks import MarkUsers
from ipsec_aio.kernel.stamp_rules import INPUT, INPUT_PRIORITY
from ipsec_aio.kernel.stamp_table import Port, TableState

Captured = pytest.CaptureFixture[str]
Unprivileged = Callable[[Callable[[], object]], BaseException | None]
INSTALL = ("stamp", "install", "--port")


@pytest.fixture
def admin(netns: None) -> Iterator[NftSocket]:
    """Somebody else with privilege."""
    netlink = NftSocket()
    yield netlink
    netlink.close()


def sysctl_value() -> str:
    with open("/proc/sys/net/ipv4/tcp_fwmark_accept") as file:
        return file.read().strip()


def test_round_trip(admin: NftSocket, capsys: Captured) -> None:
    assert main(["stamp", "status"]) == 1
    out = capsys.readouterr().out
    assert "stamp       not installed" in out
    assert "has what the stamp needs" in out

    assert main([*INSTALL, "udp/5000", "--port", "udp/53"]) == 0
    assert capsys.readouterr().out == "table inet ipsec_aio stamps udp/53 udp/5000\n"
    state = stamp_table.read(admin)
    assert not state.problem
    assert not state.owner
    assert state.ports == {(17, 53), (17, 5000)}

    assert main(["stamp", "status"]) == 0
    out = capsys.readouterr().out
    assert "installed and verified" in out
    assert "ports       udp/53 udp/5000" in out
    assert "decrypted ones are dropped" in out
    assert "tcp_fwmark_accept = 0: TCP cannot be stamped" in out

    assert main(["stamp", "remove"]) == 0
    assert capsys.readouterr().out == "table inet ipsec_aio removed\n"
    assert not stamp_table.read(admin).installed
    assert main(["stamp", "remove"]) == 0
    assert capsys.readouterr().out == "the stamp is not installed\n"


def test_tcp_sets_the_sysctl_and_remove_gives_it_back(admin: NftSocket, capsys: Captured) -> None:
    assert main([*INSTALL, "udp/5000"]) == 0
    assert main([*INSTALL, "tcp/5000"]) == 0
    assert "tcp_fwmark_accept was 0 and is 1 now" in capsys.readouterr().out
    assert sysctl_value() == "1"
    assert stamp_table.read(admin).ports == {(17, 5000), (6, 5000)}
    assert main([*INSTALL, "udp/5001"]) == 0
    assert main(["stamp", "status"]) == 0
    assert "accepted connections carry stamps" in capsys.readouterr().out
    assert main(["stamp", "remove"]) == 0
    assert "tcp_fwmark_accept is 0 again" in capsys.readouterr().out
    assert sysctl_value() == "0"


def test_a_sysctl_that_was_on_stays_on(admin: NftSocket, capsys: Captured) -> None:
    with open("/proc/sys/net/ipv4/tcp_fwmark_accept", "w") as file:
        file.write("1")
    assert main([*INSTALL, "tcp/5000"]) == 0
    assert main(["stamp", "remove"]) == 0
    assert "tcp_fwmark_accept" not in capsys.readouterr().out
    assert sysctl_value() == "1"


def test_ports_are_added_and_fragments_changed(admin: NftSocket, capsys: Captured) -> None:
    assert main([*INSTALL, "udp/5000"]) == 0
    assert main([*INSTALL, "udp/5001", "--keep-fragments"]) == 0
    state = stamp_table.read(admin)
    assert state.keeps_fragments
    assert state.ports == {(17, 5000), (17, 5001)}
    assert main(["stamp", "status"]) == 0
    assert "decrypted ones are kept" in capsys.readouterr().out


def test_install_repairs_a_broken_table(admin: NftSocket, capsys: Captured) -> None:
    assert main([*INSTALL, "udp/5000"]) == 0
    place = [("NFTA_RULE_TABLE", "ipsec_aio"), ("NFTA_RULE_CHAIN", "input")]
    admin.commit([Request(nft.NFT_MSG_DELRULE, place)])
    assert main(["stamp", "status"]) == 1
    out = capsys.readouterr().out
    assert "installed, NOT verified" in out
    assert "fault       chain input has 0 rules" in out
    assert main([*INSTALL, "udp/5001"]) == 0
    state = stamp_table.read(admin)
    assert not state.problem
    assert state.ports == {(17, 5000), (17, 5001)}


def test_a_table_that_a_process_owns_is_left(admin: NftSocket, capsys: Captured) -> None:
    stamp_table.install(admin, [Port(17, 5000)], owned=True)
    assert main(["stamp", "status"]) == 0
    assert f"a process (netlink port id {admin.portid})" in capsys.readouterr().out
    for words in ([*INSTALL, "tcp/5001"], ["stamp", "remove"]):
        assert main(words) == 1
        err = capsys.readouterr().err
        assert "owned by another process" in err
        assert err.count("\n") == 1
    assert sysctl_value() == "0"
    assert stamp_table.read(admin).ports == {(17, 5000)}


def late_writer(netlink: NftSocket) -> None:
    foreign_rule(netlink, "late", 1, INPUT_PRIORITY, INPUT.rules[-2].expressions)


def foreign_rule(
    netlink: NftSocket, table: str, hook: int, priority: int, expressions: Sequence[Expression]
) -> None:
    place = [("NFTA_HOOK_HOOKNUM", hook), ("NFTA_HOOK_PRIORITY", priority)]
    chain = [
        ("NFTA_CHAIN_TABLE", table),
        ("NFTA_CHAIN_NAME", "last"),
        ("NFTA_CHAIN_HOOK", {"attrs": place}),
        ("NFTA_CHAIN_TYPE", "filter"),
    ]
    rule = [
        ("NFTA_RULE_TABLE", table),
        ("NFTA_RULE_CHAIN", "last"),
        ("NFTA_RULE_EXPRESSIONS", expressions),
    ]
    create = nft.NLM_F_CREATE
    netlink.commit(
        [
            Request(nft.NFT_MSG_NEWTABLE, [("NFTA_TABLE_NAME", table)], create),
            Request(nft.NFT_MSG_NEWCHAIN, chain, create),
            Request(nft.NFT_MSG_NEWRULE, rule, create),
        ]
    )


def test_later_writers_are_refused_and_shown(admin: NftSocket, capsys: Captured) -> None:
    assert main([*INSTALL, "udp/5000"]) == 0
    late_writer(admin)
    assert main(["stamp", "status"]) == 1
    assert "later rules table inet late chain last rule handle" in capsys.readouterr().out
    assert main([*INSTALL, "udp/5001"]) == 1
    assert "sets the mark" in capsys.readouterr().err
    assert main(["stamp", "remove"]) == 0


def marked_policy() -> None:
    words = "xfrm policy add dir in src 192.0.2.1 dst 192.0.2.2 mark 5"
    done = subprocess.run(["ip", *words.split()], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no marked policy here: {done.stderr}")


def test_marks_of_others_are_refused_and_shown(admin: NftSocket, capsys: Captured) -> None:
    marked_policy()
    assert main([*INSTALL, "udp/5000"]) == 1
    assert "inbound policies with a mark" in capsys.readouterr().err
    assert not stamp_table.read(admin).installed
    assert main(["stamp", "status"]) == 1
    assert "mark 0x5/0xffffffff" in capsys.readouterr().out


def mark_rule(verb: str) -> None:
    words = f"rule {verb} priority 100 fwmark 0x4000/0x4000 lookup 100"
    subprocess.run(["ip", *words.split()], check=True)


def test_routing_that_looks_at_marks_is_shown_and_refuses_tcp(
    admin: NftSocket, capsys: Captured
) -> None:
    mark_rule("add")
    assert main([*INSTALL, "tcp/5000", "--port", "udp/5000"]) == 1
    assert "(ip rule 100: fwmark 0x4000/0x4000)" in capsys.readouterr().err
    assert not stamp_table.read(admin).installed
    assert sysctl_value() == "0"
    assert main([*INSTALL, "udp/5000"]) == 0
    assert main(["stamp", "status"]) == 0
    assert "ip rule 100: fwmark 0x4000/0x4000" in capsys.readouterr().out
    mark_rule("del")
    assert main([*INSTALL, "tcp/5000"]) == 0
    mark_rule("add")
    capsys.readouterr()
    assert main(["stamp", "status"]) == 1
    assert "installed, NOT verified" in capsys.readouterr().out


def test_tcp_without_its_sysctl_is_a_problem(admin: NftSocket, capsys: Captured) -> None:
    assert main([*INSTALL, "tcp/5000"]) == 0
    assert main(["stamp", "status"]) == 0
    with open("/proc/sys/net/ipv4/tcp_fwmark_accept", "w") as file:
        file.write("0")
    capsys.readouterr()
    assert main(["stamp", "status"]) == 1
    out = capsys.readouterr().out
    assert "installed, NOT verified" in out
    assert "tcp_fwmark_accept = 0: TCP cannot be stamped" in out


def test_rules_that_look_at_the_marks_of_replies_are_shown(
    admin: NftSocket, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["stamp", "status"]) == 1
    assert "read marks  none\n" in capsys.readouterr().out
    foreign_rule(admin, "masquerade", 4, 100, (expression("meta", key=3, dreg=1),))
    assert main([*INSTALL, "tcp/5000"]) == 0
    capsys.readouterr()
    assert main(["stamp", "status"]) == 0
    shown = "read marks  table inet masquerade chain last rule handle 2: looks at the mark\n"
    assert shown in capsys.readouterr().out

    def changing(*_: object, **__: object) -> None:
        raise NftError(errno.EINTR)

    monkeypatch.setattr(admin, "dump", changing)
    with pytest.raises(BackendError, match="cannot read the tables"):
        stamp_table.read_readers(admin)


def test_a_failed_install_gives_the_sysctl_back(
    admin: NftSocket, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        assert sysctl_value() == "1"
        raise BackendUnavailable(2, "this kernel lacks nft_xfrm")

    monkeypatch.setattr(stamp_table, "install", fails)
    assert main([*INSTALL, "tcp/5000"]) == 1
    assert capsys.readouterr().err == "ipsec-aio: this kernel lacks nft_xfrm\n"
    assert sysctl_value() == "0"


def test_what_cannot_be_verified_afterwards_is_an_error(
    admin: NftSocket, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stamp_table, "install", lambda *_, **__: None)
    assert main([*INSTALL, "udp/5000"]) == 1
    assert capsys.readouterr().err == "ipsec-aio: the stamp is not installed\n"


def test_a_kernel_without_its_parts_is_named(
    admin: NftSocket, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stamp_table, "try_out", lambda _, owned: "no owner" if owned else "")
    assert main(["stamp", "status"]) == 1
    assert "no owner flag" in capsys.readouterr().out
    monkeypatch.setattr(stamp_table, "try_out", lambda _, owned: "lacks nft_socket")
    assert main(["stamp", "status"]) == 1
    assert "lacks nft_socket" in capsys.readouterr().out


def test_no_xfrm_is_no_user_of_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    async def missing() -> MarkUsers:
        raise BackendUnavailable(2, "no XFRM")

    monkeypatch.setattr(cli, "read_mark_users", missing)
    assert cli._mark_users() == MarkUsers()


@pytest.mark.parametrize("verb", [[*INSTALL, "udp/5000"], ["stamp", "remove"], ["stamp", "status"]])
def test_without_privilege(
    netns: None, unprivileged: Unprivileged, capsys: Captured, verb: list[str]
) -> None:
    status: list[int] = []
    assert unprivileged(lambda: status.append(main(verb))) is None
    assert status == [1]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ipsec-aio: cannot read the tables: CAP_NET_ADMIN is needed")
    assert captured.err.count("\n") == 1


def test_trying_out_without_privilege(netns: None, unprivileged: Unprivileged) -> None:
    netlink = NftSocket()
    error = unprivileged(lambda: stamp_table.try_out(netlink, owned=False))
    netlink.close()
    assert isinstance(error, BackendDenied)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "required: stamp|demo"),
        (["stamp"], "required: install|remove|status"),
        (["stamp", "install"], "required: --port"),
        ([*INSTALL, "5000"], "write udp/5000 or tcp/5000"),
        ([*INSTALL, "sctp/5000"], "write udp/5000 or tcp/5000"),
        ([*INSTALL, "udp/0"], "from 1 to 65535"),
        ([*INSTALL, "udp/65536"], "from 1 to 65535"),
        ([*INSTALL, "udp/-1"], "from 1 to 65535"),
        ([*INSTALL, "udp/²"], "from 1 to 65535"),
        ([*INSTALL, "udp/4500"], "carries ESP itself"),
        (["stamp", "status", "--json"], "unrecognized arguments"),
        (["other"], "invalid choice"),
    ],
)
def test_bad_usage(capsys: Captured, words: list[str], reason: str) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert reason in captured.err
    assert captured.out == ""


def test_version(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("ipsec_aio 0")
    monkeypatch.setattr("ipsec_aio.__main__._NAME", "ipsec-aio-that-is-not-there")
    assert main(["--version"]) == 0
    assert "not installed" in capsys.readouterr().out


def test_demo(capsys: Captured) -> None:
    assert main(["demo"]) == 0
    assert "SA" in capsys.readouterr().out


def test_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", interrupted)
    assert main(["stamp", "status"]) == 130


def test_an_error_without_errno(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    def fails(_: object) -> int:
        raise BackendUnavailable("gone")

    monkeypatch.setattr(cli, "run", fails)
    assert main(["stamp", "status"]) == 1
    assert capsys.readouterr().err == "ipsec-aio: gone\n"


def test_run_as_a_script(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr(sys, "argv", ["ipsec-aio", "--version"])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(ipsec_aio.__main__.__file__), run_name="__main__")
    assert done.value.code == 0


def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ipsec_aio", "--version"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )
    assert done.returncode == 0
    assert done.stdout.startswith("ipsec_aio ")


def test_states_without_a_stamp_name_the_later_writer() -> None:
    assert (
        TableState(late_writers=("x",)).problem
        == "a later rule could write the mark or the packet: x"
    )
