"""How a connection's packets may be protected from now on: what its latch looks at.

Rules:

* By addresses and ports alone: the mark of its handshake names an SA of the past.
* Inwards an SA counts whatever its source is, where its selector admits the connection: the
  kernel finds it by destination, protocol and number, and compares what it decrypted with the
  selector only.
* From the first look on every new SA changes the mirror's epoch, until that has changed: then it
  is time to look again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

from .enums import Direction, PolicyAction
from .flow import Flow
from .identities import Awaited
from .latch import Outlook, Sighting
from .policy import Policy
from .protection import PROTECTING, TUNNELS

if TYPE_CHECKING:
    from .evidence import Evidence
    from .sad import Record
    from .tokens import Resolver

__all__ = ["survey"]


def survey(resolver: Resolver, evidence: Evidence) -> Outlook:
    """Return the outlook for a connection with these addresses, ports and mark."""
    mirror, now = resolver.mirror, resolver.clock()
    mirror.additions_matter = True
    if not mirror.synced:
        return Outlook(sure=False, opaque=resolver.opaque_interfaces)
    e = evidence
    mark = e.mark or 0
    there = Flow(e.peer, e.local, e.protocol, e.peer_port, e.local_port, mark)
    back = Flow(e.local, e.peer, e.protocol, e.local_port, e.peer_port, mark)
    policies_in = _flat(mirror.spd.ties(there, Direction.IN))
    policies_out = _flat(mirror.spd.ties(back, Direction.OUT))
    block = PolicyAction.BLOCK
    awaited = [now]
    return Outlook(
        inbound=tuple(_seen(resolver, _inbound(resolver, there), Direction.IN, awaited)),
        outbound=tuple(_seen(resolver, _outbound(resolver, back), Direction.OUT, awaited)),
        policies_in=policies_in,
        policies_out=policies_out,
        blocked_in=not policies_in and mirror.defaults.inbound is block,
        blocked_out=not policies_out and mirror.defaults.outbound is block,
        opaque=resolver.opaque_interfaces
        or mirror.names_interface_inbound()
        or mirror.spd.names_interface(Direction.OUT),
        settled_in=max(awaited) - now,
    )


def _flat(ties: Iterable[Iterable[Policy]]) -> tuple[Policy, ...]:
    return tuple(chain.from_iterable(ties))


def _inbound(resolver: Resolver, flow: Flow) -> Iterator[Record]:
    own = resolver.is_own
    for record in resolver.mirror.sad.admitting(flow.source, flow.destination):
        sa = record.sa
        if (
            sa.proto in PROTECTING
            and not sa.larval
            and sa.direction in (None, Direction.IN)
            and sa.selector.matches(flow)
            and (
                not own(sa.source) or own(sa.destination)
                if sa.mode in TUNNELS
                else sa.destination == flow.destination or own(sa.destination)
            )
        ):
            yield record


def _outbound(resolver: Resolver, flow: Flow) -> Iterator[Record]:
    own, sad = resolver.is_own, resolver.mirror.sad
    for record in sad.admitting(flow.source, flow.destination, Direction.OUT):
        sa = record.sa
        if (
            sa.proto in PROTECTING
            and not sa.larval
            and sa.direction in (None, Direction.OUT)
            and sa.selector.matches(flow)
            and (
                not own(sa.destination) or own(sa.source)
                if sa.mode in TUNNELS
                else (sa.source, sa.destination) == (flow.source, flow.destination)
            )
        ):
            yield record


def _seen(
    resolver: Resolver, records: Iterable[Record], direction: Direction, awaited: list[float]
) -> Iterator[Sighting]:
    for record in dict.fromkeys(records):
        answer = resolver.identify(record, awaited[0], direction)
        if isinstance(answer, Awaited):
            awaited.append(answer.until)
            yield Sighting(record.sa, record.added, pending=True)
        else:
            yield Sighting(record.sa, record.added, answer.local, answer.peer)
