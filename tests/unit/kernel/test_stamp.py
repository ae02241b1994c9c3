"""The stamp on this machine's nf_tables: taken, installed, watched, restored, removed."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ipsec_aio.errors import BackendDenied, BackendError, BackendUnavailable
from ipsec_aio.kernel import nfnetlink, sockopts, stamp_table
from ipsec_aio.kernel import stamp as stamp_module
from ipsec_aio.kernel.nfnetlink import (
    EventSocket,
    Expression,
    Message,
    NftSocket,
    Request,
    expression,
    nft,
)
from ipsec_aio.kernel.stamp import Coverage, KernelStamp, MarkUsers, Stamp, StampMode, open_stamp
from ipsec_aio.kernel.stamp_rules import INPUT, INPUT_PRIORITY
from ipsec_aio.kernel.stamp_sysctl import FwmarkAccept
from ipsec_aio.kernel.stamp_table import Port
from ipsec_aio.wire import rtnetlink

pytestmark = pytest.mark.usefixtures("netns")

Open = Callable[..., Awaitable[Stamp]]
Unprivileged = Callable[[Callable[[], object]], BaseException | None]

UDP, TCP = 17, 6
NLM_F_CREATE, NLM_F_APPEND = nft.NLM_F_CREATE, nft.NLM_F_APPEND
OURS = (("NFTA_TABLE_NAME", "ipsec_aio"),)
META_SET_MARK = next(r for r in INPUT.rules if r.purpose == "clear the mark").expressions
COUNTER = (expression("counter"),)


@pytest.fixture
def admin() -> Iterator[NftSocket]:
    """Somebody else with privilege."""
    netlink = NftSocket()
    yield netlink
    netlink.close()


@pytest.fixture
async def opened() -> AsyncIterator[Open]:
    """Open stamps that are watched, and closed with the test."""
    loop = asyncio.get_running_loop()
    stamps: list[Stamp] = []
    watched: list[int] = []

    async def open_one(mode: StampMode, **arguments: Any) -> Stamp:
        stamp = await open_stamp(mode, **arguments)
        stamps.append(stamp)
        for descriptor in stamp.filenos():
            # Of our own, since a test may close the stamp.
            watched.append(os.dup(descriptor))
            loop.add_reader(watched[-1], stamp.refresh)
        return stamp

    yield open_one
    for descriptor in watched:
        loop.remove_reader(descriptor)
        os.close(descriptor)
    for stamp in stamps:
        stamp.close()


def flush_ruleset(netlink: NftSocket) -> None:
    netlink.commit([Request(nft.NFT_MSG_DELTABLE, (), family=0)])


def chain(table: str, name: str, hook: int, priority: int, family: int = 1) -> Request:
    place = [("NFTA_HOOK_HOOKNUM", hook), ("NFTA_HOOK_PRIORITY", priority)]
    attributes = [
        ("NFTA_CHAIN_TABLE", table),
        ("NFTA_CHAIN_NAME", name),
        ("NFTA_CHAIN_HOOK", {"attrs": place}),
        ("NFTA_CHAIN_TYPE", "filter"),
    ]
    return Request(nft.NFT_MSG_NEWCHAIN, attributes, NLM_F_CREATE, family=family)


def table(name: str, family: int = 1) -> Request:
    return Request(nft.NFT_MSG_NEWTABLE, [("NFTA_TABLE_NAME", name)], NLM_F_CREATE, family=family)


def nft_rule(table: str, chain: str, expressions: Sequence[Expression], family: int = 1) -> Request:
    attributes = [
        ("NFTA_RULE_TABLE", table),
        ("NFTA_RULE_CHAIN", chain),
        ("NFTA_RULE_EXPRESSIONS", expressions),
    ]
    return Request(nft.NFT_MSG_NEWRULE, attributes, NLM_F_CREATE | NLM_F_APPEND, family=family)


def rules(netlink: NftSocket, chain: str) -> list[Message]:
    found = netlink.dump(nft.NFT_MSG_GETRULE, [("NFTA_RULE_TABLE", "ipsec_aio")])
    return [r for r in found if nfnetlink.text(r.attributes["NFTA_RULE_CHAIN"]) == chain]


def deletion(rule: Message) -> Request:
    told = rule.attributes
    place = [
        ("NFTA_RULE_TABLE", rule.table),
        ("NFTA_RULE_CHAIN", nfnetlink.text(told["NFTA_RULE_CHAIN"])),
        ("NFTA_RULE_HANDLE", nfnetlink.number(told["NFTA_RULE_HANDLE"])),
    ]
    return Request(nft.NFT_MSG_DELRULE, place)


def delete_rule(netlink: NftSocket, number: int, chain: str = "input") -> None:
    netlink.commit([deletion(rules(netlink, chain)[number])])


def sysctl_value() -> int:
    sysctl = FwmarkAccept()
    try:
        return int(sysctl.enabled)
    finally:
        sysctl.close()


def set_sysctl(value: int) -> None:
    with open("/proc/sys/net/ipv4/tcp_fwmark_accept", "w") as file:
        file.write(str(value))


def persistent(netlink: NftSocket, *ports: int, **arguments: Any) -> None:
    stamp_table.install(netlink, [Port(UDP, port) for port in ports], owned=False, **arguments)


async def test_install_and_leave_no_trace(opened: Open, admin: NftSocket) -> None:
    stamp = await opened("install")
    assert stamp.generation
    assert stamp.problem == ""
    assert not stamp.keeps_fragments
    covered = stamp.cover(UDP, 5000)
    assert covered.generation == stamp.generation
    state = stamp_table.read(admin)
    assert not state.problem
    assert state.owner
    assert state.ports == {(UDP, 5000)}
    stamp.close()
    stamp.close()
    assert covered.generation == stamp.generation == 0
    assert "closed" in stamp.problem
    assert not stamp_table.read(admin).installed
    covered.close()
    stamp.refresh()
    stamp.marks_changed()
    with pytest.raises(BackendUnavailable, match="closed"):
        stamp.cover(UDP, 5000)


async def test_the_table_goes_with_its_process(admin: NftSocket) -> None:
    stamp = await open_stamp("install")
    assert isinstance(stamp, KernelStamp)
    stamp._netlink.close()
    assert not stamp_table.read(admin).installed
    stamp._netlink = NftSocket()
    stamp.close()


async def test_owned_table_survives_a_flush(opened: Open, admin: NftSocket) -> None:
    stamp = await opened("install")
    generation = stamp.generation
    covered = stamp.cover(UDP, 5000)
    flush_ruleset(admin)
    stamp.refresh()
    assert stamp.generation == covered.generation == generation
    assert not stamp_table.read(admin).problem


async def using(opened: Open, admin: NftSocket) -> tuple[Stamp, Coverage, list[int]]:
    """A persistent stamp in use: it, a port that it covers, and its generations from now on."""
    persistent(admin, 5000)
    changes: list[int] = []
    stamp: Stamp = await opened("use", on_change=lambda: changes.append(stamp.generation))
    covered = stamp.cover(UDP, 5000)
    stamp.refresh()
    changes.clear()
    return stamp, covered, changes


async def test_flushed_stamp_is_noticed_at_once_and_taken_again(
    opened: Open, admin: NftSocket
) -> None:
    stamp, covered, changes = await using(opened, admin)
    first = covered.generation
    assert first
    flush_ruleset(admin)
    assert covered.generation == first
    stamp.refresh()
    assert changes == [0]
    assert covered.generation == 0
    assert stamp.problem == "the stamp is not installed"
    persistent(admin)
    stamp.refresh()
    assert covered.generation > first
    assert stamp_table.read(admin).ports == {(UDP, 5000)}


async def test_whether_it_stands_is_known_before_anybody_is_told(
    opened: Open, admin: NftSocket
) -> None:
    stamp, covered, changes = await using(opened, admin)
    assert stamp.stands()
    flush_ruleset(admin)
    assert covered.generation
    assert not stamp.stands()
    stamp.refresh()
    assert stamp.stands()
    assert set(changes) == {0}
    stamp.close()
    assert not stamp.stands()


async def test_it_does_not_stand_where_nobody_ever_answered(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(netlink: NftSocket) -> int:
        raise nfnetlink.NftError(errno.ENOMEM)

    monkeypatch.setattr(NftSocket, "generation_id", fails)
    stamp = await opened("use")
    assert not stamp.stands()


@pytest.mark.parametrize("lost", [False, True])
async def test_what_others_do_meanwhile_is_told_once_it_is_known(
    opened: Open, admin: NftSocket, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    """Who was not sure because of it asks again then."""
    changes: list[int] = []
    stamp = await opened("install", on_change=lambda: changes.append(1))
    assert isinstance(stamp, KernelStamp)
    stamp.refresh()
    assert stamp.stands()
    admin.commit([table("foreign")])
    stamp.refresh()
    assert stamp.stands()
    assert changes == []
    admin.commit([Request(nft.NFT_MSG_DELTABLE, [("NFTA_TABLE_NAME", "foreign")])])
    assert not stamp.stands()
    if lost:
        monkeypatch.setattr(stamp._events, "read", lambda: None)
    stamp.refresh()
    assert changes
    assert stamp.stands()


async def test_loss_between_two_looks_costs_the_generation(opened: Open, admin: NftSocket) -> None:
    persistent(admin, 5000)
    stamp = await opened("use")
    first = stamp.cover(UDP, 5000).generation
    persistent(admin, 5000, replace=True)
    stamp.refresh()
    assert stamp.generation > first


async def test_install_mode_replaces_a_flushed_persistent_table(
    opened: Open, admin: NftSocket
) -> None:
    persistent(admin, 5000)
    stamp = await opened("install")
    covered = stamp.cover(UDP, 5000)
    first = covered.generation
    assert not stamp_table.read(admin).owner
    flush_ruleset(admin)
    stamp.refresh()
    assert covered.generation > first
    assert stamp_table.read(admin).owner
    stamp.close()
    assert not stamp_table.read(admin).installed


async def test_covering_a_port_tells_of_it(opened: Open, admin: NftSocket) -> None:
    """Whoever asked for the port's generation before has to ask again."""
    persistent(admin)
    changes: list[int] = []
    stamp = await opened("use", on_change=lambda: changes.append(stamp.generation))
    port = stamp_table.Port(UDP, 5000)
    assert not stamp.generation_of(port)
    covered = stamp.cover(UDP, 5000)
    assert changes == [covered.generation] == [stamp.generation_of(port)]
    changes.clear()
    stamp.cover(UDP, 5000)
    assert not changes


async def test_changes_are_told_by_the_loop(opened: Open, admin: NftSocket) -> None:
    changed = asyncio.Event()
    stamp = await opened("use", on_change=changed.set)
    assert not stamp.generation
    persistent(admin, 5000)
    await asyncio.wait_for(changed.wait(), 5)
    assert stamp.generation


@pytest.mark.parametrize("number", range(len(INPUT.rules)))
async def test_a_missing_rule_is_noticed(opened: Open, admin: NftSocket, number: int) -> None:
    persistent(admin, 5000)
    stamp = await opened("use")
    delete_rule(admin, number)
    stamp.refresh()
    assert not stamp.generation
    assert "chain input has 6 rules, not 7" in stamp.problem


async def test_an_altered_rule_is_noticed(opened: Open, admin: NftSocket) -> None:
    persistent(admin, 5000)
    stamp = await opened("use")
    delete_rule(admin, -1)
    admin.commit([nft_rule("ipsec_aio", "input", COUNTER)])
    stamp.refresh()
    assert not stamp.generation
    assert "the rule to stamp with the SPI was altered" in stamp.problem


async def test_a_foreign_chain_in_our_table_is_noticed(opened: Open, admin: NftSocket) -> None:
    persistent(admin, 5000)
    stamp = await opened("use")
    admin.commit([chain("ipsec_aio", "more", 1, 0)])
    stamp.refresh()
    assert "chain more is not ours" in stamp.problem


async def test_a_chain_with_another_priority_is_noticed(opened: Open, admin: NftSocket) -> None:
    requests = [table("ipsec_aio"), chain("ipsec_aio", "input", 1, 0)]
    admin.commit(requests)
    stamp = await opened("use")
    assert "has another type, hook, priority or policy" in stamp.problem
    assert "the set ports is missing" in stamp.problem
    assert "has 0 rules" in stamp.problem


async def test_a_missing_chain_and_a_dormant_table_are_noticed(
    opened: Open, admin: NftSocket
) -> None:
    admin.commit([Request(nft.NFT_MSG_NEWTABLE, (*OURS, ("NFTA_TABLE_FLAGS", 1)), NLM_F_CREATE)])
    stamp = await opened("use")
    assert "chain input is missing" in stamp.problem
    assert "dormant" in stamp.problem


async def test_a_set_of_another_shape_is_noticed(opened: Open, admin: NftSocket) -> None:
    timeout_set = [
        ("NFTA_SET_TABLE", "ipsec_aio"),
        ("NFTA_SET_NAME", "ports"),
        ("NFTA_SET_FLAGS", {"NFT_SET_TIMEOUT"}),
        ("NFTA_SET_KEY_LEN", 8),
        ("NFTA_SET_ID", 1),
    ]
    admin.commit([table("ipsec_aio"), Request(nft.NFT_MSG_NEWSET, timeout_set, NLM_F_CREATE)])
    stamp = await opened("use")
    assert "the set ports has other flags" in stamp.problem


async def test_kept_fragments_are_seen_in_the_table(opened: Open, admin: NftSocket) -> None:
    persistent(admin, 5000, keep_fragments=True)
    stamp = await opened("use")
    assert stamp.generation
    assert stamp.keeps_fragments


async def test_deleting_the_fragments_chain_costs_the_generation(
    opened: Open, admin: NftSocket
) -> None:
    persistent(admin, 5000)
    stamp = await opened("use")
    first = stamp.generation
    requests = [deletion(rule) for rule in rules(admin, "fragments")]
    place = [("NFTA_CHAIN_TABLE", "ipsec_aio"), ("NFTA_CHAIN_NAME", "fragments")]
    requests.append(Request(nft.NFT_MSG_DELCHAIN, place))
    admin.commit(requests)
    stamp.refresh()
    assert stamp.keeps_fragments
    assert stamp.generation > first


@pytest.mark.parametrize("family", [1, 2, 10])
async def test_a_later_writer_is_noticed_and_named(
    opened: Open, admin: NftSocket, family: int
) -> None:
    stamp = await opened("install")
    covered = stamp.cover(UDP, 5000)
    first = covered.generation
    admin.commit([table("late", family), chain("late", "last", 1, INPUT_PRIORITY, family)])
    stamp.refresh()
    second = covered.generation
    assert second > first
    admin.commit([nft_rule("late", "last", META_SET_MARK, family)])
    stamp.refresh()
    assert covered.generation == 0
    assert "late chain last rule handle 2: sets the mark" in stamp.problem
    admin.commit([Request(nft.NFT_MSG_DELTABLE, [("NFTA_TABLE_NAME", "late")], family=family)])
    stamp.refresh()
    assert covered.generation > second
    assert not stamp_table.read(admin).late_writers


async def test_a_later_rule_that_moves_packets_is_noticed(opened: Open, admin: NftSocket) -> None:
    """``udp dport set 5000``: what came for a port that keeps its marks ends at a served one."""
    stamp = await opened("install")
    covered = stamp.cover(UDP, 5000)
    move = expression("payload", sreg=1, base=2, offset=2, len=2, csum_type=0, csum_offset=0)
    port = expression("immediate", dreg=1, data=nfnetlink.data((5000).to_bytes(2, "big")))
    admin.commit([table("late"), chain("late", "last", 1, INPUT_PRIORITY)])
    admin.commit([nft_rule("late", "last", (port, move))])
    stamp.refresh()
    assert covered.generation == 0
    assert "late chain last rule handle 2: rewrites packets" in stamp.problem


async def test_earlier_writers_and_sets_elsewhere_do_not_matter(
    opened: Open, admin: NftSocket
) -> None:
    stamp = await opened("install")
    first = stamp.generation
    admin.commit(
        [
            table("early"),
            chain("early", "first", 1, -150),
            nft_rule("early", "first", META_SET_MARK),
        ]
    )
    stamp.refresh()
    assert stamp.generation == first


async def test_install_refuses_where_a_later_writer_is(admin: NftSocket) -> None:
    admin.commit(
        [
            table("late"),
            chain("late", "last", 1, INPUT_PRIORITY + 1),
            nft_rule("late", "last", META_SET_MARK),
        ]
    )
    with pytest.raises(BackendError, match="sets the mark"):
        await open_stamp("install")
    state = stamp_table.read(admin)
    assert not state.installed
    assert state.late_writers


async def test_foreign_tables_stay_untouched(opened: Open, admin: NftSocket) -> None:
    admin.commit([table("other"), chain("other", "base", 1, 0)])
    admin.commit([nft_rule("other", "base", COUNTER)])

    def seen() -> list[tuple[int, Mapping[str, bytes]]]:
        return [
            (m.kind, m.attributes)
            for kind in (
                nft.NFT_MSG_GETTABLE,
                nft.NFT_MSG_GETCHAIN,
                nft.NFT_MSG_GETRULE,
                nft.NFT_MSG_GETSET,
            )
            for m in admin.dump(kind, family=0)
        ]

    before = seen()
    stamp = await opened("install")
    stamp.cover(UDP, 5000).close()
    stamp.cover(TCP, 5000)
    stamp.close()
    assert seen() == before


async def test_ports_are_counted(opened: Open, admin: NftSocket) -> None:
    stamp = await opened("install")
    first, second = stamp.cover(UDP, 5000), stamp.cover(UDP, 5000)
    first.close()
    first.close()
    assert not first.generation
    assert second.generation
    assert stamp_table.read(admin).ports == {(UDP, 5000)}
    second.close()
    assert stamp_table.read(admin).ports == set()


async def test_only_added_ports_are_taken_out(opened: Open, admin: NftSocket) -> None:
    persistent(admin, 5000)
    stamp = await opened("use")
    stamp.cover(UDP, 5000)
    stamp.cover(UDP, 5001)
    closed = stamp.cover(UDP, 5000)
    closed.close()
    assert stamp_table.read(admin).ports == {(UDP, 5000), (UDP, 5001)}
    stamp.close()
    assert stamp_table.read(admin).ports == {(UDP, 5000)}


async def test_a_port_taken_out_by_others_is_put_back(opened: Open, admin: NftSocket) -> None:
    persistent(admin)
    stamp = await opened("use")
    covered, other = stamp.cover(UDP, 5000), stamp.cover(UDP, 5001)
    first = covered.generation
    stamp_table.remove_ports(admin, [Port(UDP, 5000)])
    stamp.refresh()
    assert covered.generation == other.generation > first
    stamp_table.add_ports(admin, [Port(UDP, 6000)])
    stamp_table.remove_ports(admin, [Port(UDP, 6000)])
    second = stamp.generation
    stamp.refresh()
    assert stamp.generation == second


async def test_ports_of_a_table_put_there_later_stay(opened: Open, admin: NftSocket) -> None:
    persistent(admin)
    stamp = await opened("use")
    covered = stamp.cover(UDP, 5000)
    persistent(admin, 5000, replace=True)
    stamp.refresh()
    stamp.cover(UDP, 5001)
    covered.close()
    stamp.close()
    assert stamp_table.read(admin).ports == {(UDP, 5000)}


async def test_a_port_lost_while_looking_costs_the_generation(
    opened: Open, admin: NftSocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    persistent(admin)
    stamp = await opened("use")
    covered = stamp.cover(UDP, 5000)
    first = covered.generation
    read = stamp_table.read

    def lose_and_read(netlink: NftSocket) -> stamp_table.TableState:
        monkeypatch.undo()
        stamp_table.remove_ports(admin, [Port(UDP, 5000)])
        return read(netlink)

    stamp_table.add_ports(admin, [Port(UDP, 6000)])
    monkeypatch.setattr(stamp_table, "read", lose_and_read)
    stamp.refresh()
    assert covered.generation > first


async def test_use_takes_an_owned_table_as_it_is(opened: Open) -> None:
    owner = await opened("install")
    owner.cover(UDP, 5000)
    user = await opened("use")
    assert user.cover(UDP, 5000).generation
    assert not user.cover(UDP, 5001).generation


@pytest.mark.parametrize("mode", ["install", "require"])
async def test_a_demanded_port_in_another_process_table_is_denied(
    opened: Open, mode: StampMode
) -> None:
    owner = await opened("install")
    owner.cover(UDP, 5000)
    user = await opened(mode)
    assert user.cover(UDP, 5000).generation
    with pytest.raises(BackendDenied, match="owned by another process"):
        user.cover(UDP, 5001)


async def test_install_takes_over_when_the_owner_ends(opened: Open, admin: NftSocket) -> None:
    owner = await opened("install")
    owner.cover(UDP, 5000)
    heir = await opened("install")
    covered = heir.cover(UDP, 5000)
    first = covered.generation
    owner.close()
    heir.refresh()
    assert covered.generation > first
    assert stamp_table.read(admin).owner


async def test_require(opened: Open, admin: NftSocket) -> None:
    with pytest.raises(BackendUnavailable, match="not installed"):
        await open_stamp("require")
    persistent(admin, 5000)
    stamp = await opened("require")
    assert stamp.cover(UDP, 5001).generation
    with pytest.raises(BackendError, match="4500"):
        stamp.cover(UDP, 4500)
    with pytest.raises(BackendError, match="tcp_fwmark_accept is 0"):
        stamp.cover(TCP, 5000)
    assert stamp_table.read(admin).ports == {(UDP, 5000), (UDP, 5001)}
    stamp.close()
    delete_rule(admin, 0)
    with pytest.raises(BackendError, match="not as it must be") as caught:
        await open_stamp("require")
    assert not isinstance(caught.value, BackendUnavailable)


async def test_what_cannot_be_stamped_has_no_generation(opened: Open, admin: NftSocket) -> None:
    persistent(admin)
    stamp = await opened("use")
    for protocol, port in ((UDP, 4500), (UDP, 0), (132, 5000)):
        covered = stamp.cover(protocol, port)
        assert covered.generation == 0
        covered.close()


async def test_off() -> None:
    stamp = await open_stamp("off")
    assert type(stamp) is Stamp
    covered = stamp.cover(UDP, 5000)
    assert (stamp.generation, covered.generation, stamp.tcp_ready()) == (0, 0, False)
    assert stamp.keeps_fragments
    assert stamp.problem == "the stamp is off"
    stamp.refresh()
    stamp.marks_changed()
    covered.close()
    stamp.close()


async def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="use, install, require or off"):
        await open_stamp(cast(StampMode, "always"))


async def test_tcp_wants_the_sysctl_and_gives_it_back(opened: Open) -> None:
    stamp = await opened("install")
    assert not stamp.tcp_ready()
    covered = stamp.cover(TCP, 5000)
    assert covered.generation
    assert stamp.tcp_ready()
    assert sysctl_value() == 1
    stamp.close()
    assert not stamp.tcp_ready()
    assert sysctl_value() == 0


async def test_a_sysctl_that_was_on_stays_on(opened: Open) -> None:
    set_sysctl(1)
    stamp = await opened("install")
    assert stamp.cover(TCP, 5000).generation
    stamp.close()
    assert sysctl_value() == 1


async def test_a_sysctl_turned_off_is_noticed(opened: Open, admin: NftSocket) -> None:
    set_sysctl(1)
    persistent(admin)
    changes: list[int] = []
    stamp = await opened("use", on_change=lambda: changes.append(1))
    covered = stamp.cover(TCP, 5000)
    first = covered.generation
    set_sysctl(0)
    changes.clear()
    assert not stamp.tcp_ready()
    assert covered.generation == 0
    assert changes
    set_sysctl(1)
    stamp.refresh()
    assert covered.generation > first


async def test_a_sysctl_turned_off_is_restored_where_we_installed(opened: Open) -> None:
    stamp = await opened("install")
    covered = stamp.cover(TCP, 5000)
    first = covered.generation
    set_sysctl(0)
    assert stamp.tcp_ready()
    assert covered.generation > first
    stamp.close()
    assert sysctl_value() == 0


async def test_tcp_is_not_stamped_while_the_sysctl_is_off(opened: Open, admin: NftSocket) -> None:
    persistent(admin)
    stamp = await opened("use")
    covered = stamp.cover(TCP, 5000)
    assert covered.generation == 0
    stamp.refresh()
    assert covered.generation == 0


async def test_a_read_only_sysctl_is_said(opened: Open) -> None:
    stamp = await opened("install")
    assert isinstance(stamp, KernelStamp)
    stamp._sysctl.writable = False
    with pytest.raises(BackendDenied, match="sysctl -w"):
        stamp.cover(TCP, 5000)


MARKED = MarkUsers(policies=("any → any mark 0x5/0xff",))


async def test_install_refuses_where_marks_belong_to_others(admin: NftSocket) -> None:
    with pytest.raises(BackendError, match="marks belong to someone else"):
        await open_stamp("install", marks=lambda: MARKED)
    assert not stamp_table.read(admin).installed


async def test_a_mark_that_comes_later_drives_the_stamp_away(
    opened: Open, admin: NftSocket
) -> None:
    users = [MarkUsers()]
    stamp = await opened("install", marks=lambda: users[-1])
    covered = stamp.cover(UDP, 5000)
    first = covered.generation
    stamp.marks_changed()
    assert covered.generation == first
    users.append(MARKED)
    stamp.marks_changed()
    assert covered.generation == 0
    assert "0x5" in stamp.problem
    assert not stamp_table.read(admin).installed
    users.append(MarkUsers())
    stamp.marks_changed()
    assert covered.generation > first
    assert stamp_table.read(admin).ports == {(UDP, 5000)}


async def test_marks_make_a_table_of_others_useless_and_leave_it(
    opened: Open, admin: NftSocket
) -> None:
    persistent(admin, 5000)
    stamp = await opened("use", marks=lambda: MARKED)
    assert stamp.cover(UDP, 5000).generation == 0
    installer = await opened("use", marks=MarkUsers)
    assert installer.generation
    with pytest.raises(BackendError, match="marks belong"):
        await open_stamp("install", marks=lambda: MARKED)
    assert stamp_table.read(admin).installed


def ip_rule(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True)


@pytest.mark.parametrize(
    ("add", "shown"),
    [
        ("rule add priority 100 fwmark 0x4000/0x4000 lookup 100", "ip rule 100: fwmark 0x4000/0x4"),
        ("-6 rule add priority 7 not fwmark 5 lookup 9", "ip -6 rule 7: fwmark 0x5/0xffffffff"),
        ("rule add priority 8 fwmark 0/0xff lookup 9", "ip rule 8: fwmark 0x0/0xff"),
    ],
)
@pytest.mark.parametrize("mode", ["install", "require"])
async def test_tcp_is_refused_where_routing_looks_at_marks(
    opened: Open, admin: NftSocket, mode: StampMode, add: str, shown: str
) -> None:
    """Accepted connections would carry SPIs into the rule; datagrams' sockets keep no marks."""
    ip_rule(add)
    if mode == "require":
        persistent(admin)
        set_sysctl(1)
    stamp = await opened(mode)
    with pytest.raises(BackendError, match="accepted connections would carry SPIs") as caught:
        stamp.cover(TCP, 5000)
    assert shown in str(caught.value)
    assert sysctl_value() == (mode == "require")
    assert stamp_table.read(admin).ports == set()
    assert stamp.cover(UDP, 5000).generation


async def test_a_rule_of_routing_that_comes_later_ends_tcp(opened: Open) -> None:
    changed = asyncio.Event()
    stamp = await opened("install", on_change=changed.set)
    tcp, udp = stamp.cover(TCP, 5000), stamp.cover(UDP, 5000)
    first = tcp.generation
    assert first
    assert stamp.tcp_ready()
    changed.clear()
    ip_rule("rule add fwmark 0x4000/0x4000 lookup 100")
    # The loop is told.
    await asyncio.wait_for(changed.wait(), 5)
    assert tcp.generation == 0
    assert udp.generation
    assert not stamp.tcp_ready()
    assert sysctl_value() == 0
    ip_rule("rule del fwmark 0x4000/0x4000 lookup 100")
    stamp.refresh()
    assert tcp.generation > first
    assert stamp.tcp_ready()


async def test_rules_of_routing_without_marks_do_not_matter(opened: Open) -> None:
    ip_rule("rule add from 192.0.2.0/24 lookup 100")
    ip_rule("-6 rule add iif lo lookup 100")
    stamp = await opened("install")
    assert stamp.cover(TCP, 5000).generation


async def test_use_does_not_stamp_tcp_where_routing_looks_at_marks(
    opened: Open, admin: NftSocket
) -> None:
    persistent(admin)
    set_sysctl(1)
    ip_rule("rule add fwmark 1 lookup 100")
    stamp = await opened("use")
    assert stamp.cover(TCP, 5000).generation == 0
    assert stamp.cover(UDP, 5000).generation
    assert sysctl_value() == 1


OUTBOUND = MarkUsers(outbound=("any → any mark 0x5/0xff",))


async def test_tcp_is_refused_where_outbound_policies_have_marks(
    opened: Open, admin: NftSocket
) -> None:
    users = [OUTBOUND]
    stamp = await opened("install", marks=lambda: users[-1])
    with pytest.raises(BackendError, match=r"outbound policies have a mark .*0x5/0xff"):
        stamp.cover(TCP, 5000)
    assert stamp.cover(UDP, 5000).generation
    users.append(MarkUsers())
    covered = stamp.cover(TCP, 5000)
    assert covered.generation
    users.append(OUTBOUND)
    stamp.marks_changed()
    assert covered.generation == 0


async def test_a_mark_found_while_covering_drives_the_stamp_away(opened: Open) -> None:
    users = [MarkUsers()]
    stamp = await opened("install", marks=lambda: users[-1])
    covered = stamp.cover(UDP, 5000)
    users.append(MARKED)
    with pytest.raises(BackendError, match="marks belong"):
        stamp.cover(TCP, 5000)
    assert covered.generation == 0


@pytest.mark.parametrize("mode", ["install", "require"])
async def test_datagrams_are_refused_where_the_kernel_tells_no_marks(
    opened: Open, admin: NftSocket, monkeypatch: pytest.MonkeyPatch, mode: StampMode
) -> None:
    if mode == "require":
        persistent(admin)
    stamp, user = await opened(mode), await opened("use")
    monkeypatch.setattr(sockopts, "SO_RCVMARK", 0x7FFF)  # as a kernel that does not know it
    with pytest.raises(BackendUnavailable, match=r"SO_RCVMARK.*5\.19"):
        stamp.cover(UDP, 5000)
    assert stamp_table.read(admin).ports == set()
    set_sysctl(1)
    assert stamp.cover(TCP, 5000).generation
    # The endpoint finds out by itself.
    user.cover(UDP, 5000)


async def test_lost_events_cost_the_generation(opened: Open, admin: NftSocket) -> None:
    persistent(admin)
    stamp = await opened("use")
    assert isinstance(stamp, KernelStamp)
    first = stamp.generation
    stamp._events._channel._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    for port in range(1, 50):
        stamp_table.add_ports(admin, [Port(UDP, port)])
    stamp.refresh()
    assert stamp.generation > first


async def test_tables_that_cannot_be_read_are_no_stamp(opened: Open, admin: NftSocket) -> None:
    persistent(admin)
    stamp = await opened("use")
    assert isinstance(stamp, KernelStamp)
    stamp._netlink.close()
    stamp._netlink = cast(NftSocket, Refusing())
    delete_rule(admin, 0)
    stamp.refresh()
    assert stamp.generation == 0
    assert "Operation not supported" in stamp.problem or "no nf_tables" in stamp.problem


async def test_what_could_not_be_read_is_read_again(
    opened: Open, admin: NftSocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    persistent(admin)
    stamp = await opened("use")
    first = stamp.cover(UDP, 5000).generation
    with monkeypatch.context() as patched:
        patched.setattr(stamp_table, "_ATTEMPTS", 0)
        stamp_table.add_ports(admin, [Port(UDP, 6000)])
        stamp.refresh()
    assert stamp.generation == 0
    assert "change all the time" in stamp.problem
    admin.commit([table("other")])
    stamp.refresh()
    assert stamp.generation > first
    stamp.close()
    assert stamp_table.read(admin).ports == {(UDP, 6000)}


async def test_what_could_not_be_read_is_read_again_without_an_event(
    opened: Open, admin: NftSocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = asyncio.Event()
    persistent(admin)
    monkeypatch.setattr(stamp_module, "_RETRY_SECONDS", 0.001)
    stamp = await opened("use", on_change=changed.set)
    assert isinstance(stamp, KernelStamp)
    first = stamp.cover(UDP, 5000).generation
    asked: list[int] = []

    def fails() -> int:
        asked.append(1)
        if len(asked) > 3:
            patched.undo()
        raise nfnetlink.NftError(errno.ENOMEM)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(stamp._netlink, "generation_id", fails)
        stamp_table.add_ports(admin, [Port(UDP, 6000)])
        stamp.refresh()
        assert stamp.generation == 0
        assert "Cannot allocate" in stamp.problem
        async with asyncio.timeout(5):
            while not stamp.generation:
                changed.clear()
                await changed.wait()
    assert len(asked) == 4
    assert stamp.generation > first


async def test_a_closed_stamp_looks_no_more(
    opened: Open, admin: NftSocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    persistent(admin)
    stamp = await opened("use")
    assert isinstance(stamp, KernelStamp)
    with monkeypatch.context() as patched:
        patched.setattr(stamp_table, "_ATTEMPTS", 0)
        stamp_table.add_ports(admin, [Port(UDP, 6000)])
        stamp.refresh()
    assert stamp._retry is not None
    retry = stamp._retry
    stamp.close()
    assert retry.cancelled()


async def test_an_event_socket_that_fails_costs_the_generation(
    opened: Open, admin: NftSocket
) -> None:
    persistent(admin)
    stamp = await opened("use")
    assert isinstance(stamp, KernelStamp)
    first = stamp.generation
    events, stamp._events = stamp._events, cast(EventSocket, Broken())
    stamp.refresh()
    stamp._events = events
    assert stamp.generation > first


class Broken:
    """An event socket that something happened to."""

    def read(self) -> None:
        raise OSError(errno.EIO, "broken")


async def test_another_that_installs_at_the_same_time_wins(
    opened: Open, admin: NftSocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    install = stamp_table.install

    def late(netlink: NftSocket, *arguments: Any, **keywords: Any) -> None:
        monkeypatch.undo()
        persistent(admin)
        install(netlink, *arguments, **keywords)

    monkeypatch.setattr(stamp_table, "install", late)
    stamp = await opened("install")
    assert stamp.generation
    stamp.close()
    assert stamp_table.read(admin).installed


async def test_a_kernel_that_cannot_have_the_stamp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nfnetlink, "NETLINK_NETFILTER", 31)
    stamp = await open_stamp("use")
    assert "no nf_tables" in stamp.problem
    stamp.close()
    with pytest.raises(BackendUnavailable, match="no nf_tables"):
        await open_stamp("install")


async def test_a_kernel_without_routing_can_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtnetlink, "NETLINK_ROUTE", 31)
    stamp = await open_stamp("use")
    assert "cannot watch policy routing" in stamp.problem
    with pytest.raises(BackendUnavailable, match="policy routing"):
        await open_stamp("install")


def test_close_after_the_loop(admin: NftSocket) -> None:
    loop = asyncio.new_event_loop()
    stamp = loop.run_until_complete(open_stamp("install"))
    loop.close()
    stamp.close()
    assert not stamp_table.read(admin).installed


def test_a_forked_child_leaves_the_stamp_alone(admin: NftSocket) -> None:
    loop = asyncio.new_event_loop()
    stamp = loop.run_until_complete(open_stamp("install"))
    covered = stamp.cover(TCP, 5000)
    child = os.fork()
    if not child:
        try:
            covered.close()
            stamp.refresh()
            stamp.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert stamp_table.read(admin).ports == {(TCP, 5000)}
    assert sysctl_value() == 1
    assert stamp.tcp_ready()
    stamp.close()
    loop.close()
    assert not stamp_table.read(admin).installed


class Refusing:
    """A kernel whose answer is always the same."""

    portid = 1

    def generation_id(self) -> int:
        raise nfnetlink.NftError(errno.EOPNOTSUPP)

    def close(self) -> None:
        pass


async def test_without_privilege(unprivileged: Unprivileged, admin: NftSocket) -> None:
    modes: tuple[StampMode, ...] = ("use", "install", "require")
    for mode in modes:
        error = unprivileged(partial(asyncio.run, open_stamp(mode)))
        assert isinstance(error, BackendDenied)
        assert "CAP_NET_ADMIN" in str(error)
    assert not stamp_table.read(admin).installed


class PortSet(RuleBasedStateMachine):
    """Two users of one persistent table, against a model that only counts."""

    ports = st.sampled_from([(UDP, 1), (UDP, 2), (TCP, 2), (UDP, 65535)])

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.admin = NftSocket()
        self.fixed = {(UDP, 1)}
        persistent(self.admin, 1)
        self.users = [self.loop.run_until_complete(open_stamp("use")) for _ in range(2)]
        self.open: list[tuple[tuple[int, int], Coverage]] = []
        self.counts: Counter[tuple[int, int]] = Counter()

    @rule(user=st.integers(0, 1), port=ports)
    def cover(self, user: int, port: tuple[int, int]) -> None:
        self.open.append((port, self.users[user].cover(*port)))
        self.counts[port] += 1

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def uncover(self, data: st.DataObject) -> None:
        port, coverage = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        coverage.close()
        self.counts[port] -= 1

    @rule()
    def lose_the_table(self) -> None:
        persistent(self.admin, 1, replace=True)

    @invariant()
    def the_set_is_what_is_covered(self) -> None:
        for _ in self.users:
            for user in self.users:
                user.refresh()
        wanted = {port for port, count in self.counts.items() if count}
        assert stamp_table.read(self.admin).ports == self.fixed | wanted
        for port, coverage in self.open:
            assert bool(coverage.generation) == (port[0] == UDP)

    def teardown(self) -> None:
        for user in self.users:
            user.close()
        assert stamp_table.read(self.admin).ports == self.fixed
        stamp_table.remove(self.admin)
        self.admin.close()
        self.loop.close()


def test_port_bookkeeping() -> None:
    run_state_machine_as_test(
        PortSet, settings=settings(max_examples=25, stateful_step_count=15, deadline=None)
    )
