"""IPsec that relies on marks of its own: where there is any, the stamp must stay away.

An inbound policy that is matched by mark is looked up again after input. Once the stamp had
rewritten that mark, a require-ESP policy would let clear packets through, and a marked SA would not
be found. Outbound policies are matched with the mark of the socket: an accepted connection's is the
stamp's, datagrams' sockets have none of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ipsec_aio.enums import Direction
from ipsec_aio.events import Event, PolicyAdded, SAAdded
from ipsec_aio.policy import Policy
from ipsec_aio.sa import SA
from ipsec_aio.wire import xfrm

from .netlink import XfrmDumps

__all__ = ["MarkUsers", "mark_users", "read_mark_users"]

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class MarkUsers:
    """Who uses marks, each described for an operator.

    ``policies``: inbound policies with a mark; ``states``: SAs with a mark; ``set_marks``: SAs that
    set one on what they decrypt; ``outbound``: outbound policies with a mark.
    """

    policies: tuple[str, ...] = ()
    states: tuple[str, ...] = ()
    set_marks: tuple[str, ...] = ()
    outbound: tuple[str, ...] = ()

    @property
    def problem(self) -> str:
        """Why the stamp must stay away; empty where nobody uses marks."""
        parts = (
            ("inbound policies with a mark", self.policies),
            ("SAs with a mark", self.states),
            ("SAs that set a mark", self.set_marks),
        )
        found = [f"{what}: {_listed(who)}" for what, who in parts if who]
        return f"marks belong to someone else here ({'; '.join(found)})" if found else ""

    @property
    def tcp_problem(self) -> str:
        """Why TCP at least cannot be stamped; empty where it can."""
        if not self.outbound:
            return ""
        return (
            "TCP cannot be stamped where outbound policies have a mark "
            f"({_listed(self.outbound)}): accepted connections would carry SPIs into them"
        )


def _listed(who: tuple[str, ...]) -> str:
    more = f" and {len(who) - _SHOWN} more" if len(who) > _SHOWN else ""
    return ", ".join(who[:_SHOWN]) + more


def mark_users(sas: Iterable[SA], policies: Iterable[Policy]) -> MarkUsers:
    """Find who uses marks. An SA that is not known to be outbound counts as inbound."""
    inbound = [sa for sa in sas if sa.direction is not Direction.OUT]
    marked: dict[Direction, list[str]] = {direction: [] for direction in Direction}
    for policy in policies:
        if policy.mark.mask:
            mark = f"mark {policy.mark.value:#x}/{policy.mark.mask:#x}"
            marked[policy.direction].append(f"{policy.selector} {mark}")
    return MarkUsers(
        policies=tuple(marked[Direction.IN]),
        outbound=tuple(marked[Direction.OUT]),
        states=tuple(
            f"spi {sa.spi:#010x} mark {sa.mark.value:#x}/{sa.mark.mask:#x}"
            for sa in inbound
            if sa.mark.mask
        ),
        set_marks=tuple(
            f"spi {sa.spi:#010x} sets {sa.set_mark.value:#x}/{sa.set_mark.mask:#x}"
            for sa in inbound
            if sa.set_mark is not None and sa.set_mark.mask
        ),
    )


async def read_mark_users() -> MarkUsers:
    """Ask the kernel, in the namespace of the calling thread.

    Raises BackendDenied without CAP_NET_ADMIN, BackendUnavailable where the kernel has no XFRM,
    and BackendError with its answer.
    """
    events: list[Event] = []
    tables = XfrmDumps()
    try:
        for build in (xfrm.dump_sas, xfrm.dump_policies):
            await tables.read(build, events.append)
    finally:
        tables.close()
    return mark_users(
        (event.sa for event in events if isinstance(event, SAAdded)),
        (event.policy for event in events if isinstance(event, PolicyAdded)),
    )
