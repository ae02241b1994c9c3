"""``ipsec-aio stamp install|remove|status``: the stamp by hand, where it stays until removed."""

from __future__ import annotations

import argparse
import asyncio
import platform
from typing import TYPE_CHECKING

from ipsec_aio.cli import Subparsers
from ipsec_aio.errors import BackendError, BackendUnavailable
from ipsec_aio.kernel import stamp_table
from ipsec_aio.kernel.nfnetlink import NftSocket
from ipsec_aio.kernel.stamp_marks import MarkUsers, read_mark_users
from ipsec_aio.kernel.stamp_routing import MarkRouting
from ipsec_aio.kernel.stamp_rules import TABLE
from ipsec_aio.kernel.stamp_sysctl import FwmarkAccept
from ipsec_aio.kernel.stamp_table import PROTOCOLS, Port, TableState

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["add_parser", "run"]

_SYSCTL = "net.ipv4.tcp_fwmark_accept"
# The table's comment, from which `remove` knows what to give back.
_WAS_OFF = f"{_SYSCTL} was 0"


def _port(written: str) -> Port:
    try:
        return Port.parse(written)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_parser(subparsers: Subparsers) -> None:
    """Add ``stamp`` and its verbs to the command line."""
    parser = subparsers.add_parser(
        "stamp",
        help="install, remove or show the stamp",
        description="The stamp: nft rules that write the SPI of the SA that protected a packet "
        "into its mark, for the ports that are served. Needs CAP_NET_ADMIN.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="install|remove|status")
    install = verbs.add_parser(
        "install",
        help="install it, or add ports to it",
        description="Install the stamp, or add ports to it. Ports that are in it stay: whether a "
        "running program or an operator put them there cannot be told. To begin anew, remove it.",
    )
    install.add_argument(
        "--port",
        dest="ports",
        action="append",
        required=True,
        type=_port,
        metavar="udp/5000",
        help="a protocol and local port to stamp; can be given more than once",
    )
    install.add_argument(
        "--keep-fragments",
        action="store_true",
        help="let decrypted fragments be reassembled: without this, all of them to addresses of "
        "this network namespace are dropped, of every protocol and port; with it, datagrams that "
        "were reassembled count as unknown, and no accepted connection as exact",
    )
    verbs.add_parser("remove", help="remove it")
    verbs.add_parser("status", help="show it; exit status 0 where it is verified")


def run(arguments: argparse.Namespace) -> int:
    """Carry out a verb. Returns the exit status; raises BackendError."""
    verbs: dict[str, Callable[[NftSocket, FwmarkAccept, argparse.Namespace], int]] = {
        "install": _install,
        "remove": _remove,
        "status": _status,
    }
    netlink = NftSocket()
    sysctl = FwmarkAccept()
    try:
        return verbs[arguments.verb](netlink, sysctl, arguments)
    finally:
        sysctl.close()
        netlink.close()


def _install(netlink: NftSocket, sysctl: FwmarkAccept, arguments: argparse.Namespace) -> int:
    ports = frozenset[Port](arguments.ports)
    state = stamp_table.read(netlink)
    tcp = _has_tcp(ports)
    users = _mark_users()
    if problem := users.problem or (tcp and (users.tcp_problem or _routing_problem())):
        raise BackendError(0, problem)
    if state.late_writers:
        raise BackendError(0, TableState(late_writers=state.late_writers).problem)
    needs_sysctl = tcp and not sysctl.enabled
    if needs_sysctl:
        sysctl.enable()
    comment = _WAS_OFF if needs_sysctl else state.comment
    try:
        if _fits(state, arguments.keep_fragments, comment):
            stamp_table.add_ports(netlink, ports)
        else:
            stamp_table.install(
                netlink,
                ports | state.ports,
                owned=False,
                keep_fragments=arguments.keep_fragments,
                replace=state.installed,
                comment=comment,
            )
    except BackendError:
        sysctl.restore()
        raise
    if needs_sysctl:
        print(f"{_SYSCTL} was 0 and is 1 now")
    state = stamp_table.read(netlink)
    if state.problem:
        raise BackendError(0, state.problem)
    print(f"table inet {TABLE} stamps {_listed(state.ports)}")
    return 0


def _fits(state: TableState, keep_fragments: bool, comment: str) -> bool:
    return (
        state.installed
        and not state.faults
        and state.keeps_fragments == keep_fragments
        and state.comment == comment
    )


def _remove(netlink: NftSocket, sysctl: FwmarkAccept, arguments: argparse.Namespace) -> int:
    state = stamp_table.read(netlink)
    if not stamp_table.remove(netlink):
        print("the stamp is not installed")
        return 0
    print(f"table inet {TABLE} removed")
    if state.comment == _WAS_OFF and sysctl.enabled:
        sysctl.disable()
        print(f"{_SYSCTL} is 0 again")
    return 0


def _status(netlink: NftSocket, sysctl: FwmarkAccept, arguments: argparse.Namespace) -> int:
    state = stamp_table.read(netlink)
    users, routing = _mark_users(), _routing_problem()
    marks = "; ".join(filter(None, (users.problem, users.tcp_problem)))
    problem = state.problem or users.problem
    if _has_tcp(state.ports):
        off = "" if sysctl.enabled else f"{_SYSCTL} is 0"
        problem = problem or users.tcp_problem or routing or off
    print(f"stamp       {_summary(state, problem)}")
    if state.installed:
        owner = f"a process (netlink port id {state.owner})" if state.owner else "none: it stays"
        print(f"owner       {owner}")
        print(f"ports       {_listed(state.ports)}")
        print(f"fragments   decrypted ones are {'kept' if state.keeps_fragments else 'dropped'}")
    for fault in state.faults:
        print(f"fault       {fault}")
    for writer in state.late_writers or ("none",):
        print(f"later rules {writer}")
    print(f"other marks {marks or 'none'}")
    print(f"routing     {routing or 'looks at no marks'}")
    for reader in stamp_table.read_readers(netlink) or ("none",):
        print(f"read marks  {reader}")
    tcp = "accepted connections carry stamps" if sysctl.enabled else "TCP cannot be stamped"
    print(f"sysctl      {_SYSCTL} = {int(sysctl.enabled)}: {tcp}")
    print(f"kernel      {platform.release()}: {_support(netlink, state)}")
    return 1 if problem else 0


def _summary(state: TableState, problem: str) -> str:
    if not state.installed:
        return "not installed"
    return "installed, NOT verified" if problem else "installed and verified"


def _support(netlink: NftSocket, state: TableState) -> str:
    if state.installed:
        return "has what the stamp needs"
    if lacking := stamp_table.try_out(netlink, owned=False):
        return lacking
    if stamp_table.try_out(netlink, owned=True):
        return "has what the stamp needs, but no owner flag (Linux 5.12)"
    return "has what the stamp needs"


def _has_tcp(ports: frozenset[Port]) -> bool:
    return any(port.protocol == PROTOCOLS["tcp"] for port in ports)


def _routing_problem() -> str:
    routing = MarkRouting()
    try:
        return routing.problem
    finally:
        routing.close()


def _mark_users() -> MarkUsers:
    try:
        return asyncio.run(read_mark_users())
    except BackendUnavailable:
        return MarkUsers()


def _listed(ports: frozenset[Port]) -> str:
    return " ".join(map(str, sorted(ports))) or "none"
