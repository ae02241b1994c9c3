"""Whether what is sent now would be protected as a token says that something received was.

Rules:

* The first outbound policy decides, as in the kernel; without one that demands protection,
  traffic leaves in the clear, however many SAs there are.
* Each group of SAs that the token names must be demanded by that policy, in the other direction:
  the same protocol, mode and reqid, and a tunnel's same ends.
* Which of several living SAs the kernel takes is not foreseen: all that it may take must have the
  token's algorithms, and the token's identities where it has any.
* What cannot be told is an objection: marks and interfaces that policies look at, lost events, an
  identity that is still awaited.
"""

# What a token was fixed with is no public attribute.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from .enums import Direction, PolicyAction
from .identities import UNIDENTIFIED, Identities
from .protection import PROTECTING, TUNNELS, group_of

if TYPE_CHECKING:
    from .enforcement import Bundle
    from .flow import Flow
    from .policy import Policy, Template
    from .protection import Group
    from .sad import Record
    from .tokens import PToken, Resolver

__all__ = ["objection"]


def objection(
    resolver: Resolver, ptoken: PToken, flow: Flow, assumed: Iterable[Bundle] = ()
) -> str:
    """Say why an outbound flow would not be protected as the token says; empty where it would.

    ``flow.source`` is the local address. ``assumed`` are templates that are applied where there
    is no policy at all.
    """
    kind = ptoken._now()
    verdict, mirror = kind.verdict, resolver.mirror
    if kind.resolver is not resolver:
        return "the token is another backend's"
    if not ptoken.protected:
        return f"the token is not protected: {ptoken.information_string}"
    if (flow.destination, flow.source) != ptoken._ends:
        return "the token is of other addresses"
    if verdict.ports is not None:
        proto, local_port, peer_port = verdict.ports
        if (
            flow.proto != proto
            or local_port not in (0, flow.source_port)
            or peer_port not in (0, flow.destination_port)
        ):
            return "the token is of other ports"
    if resolver.closed:
        return "the backend is closed"
    if not mirror.synced:
        return "events were lost, and the tables are being read again"
    if resolver.is_own(flow.destination):
        return "no policy is applied to what this host sends to itself"
    # The kernel may take an SA that comes later.
    mirror.additions_matter = True
    bundles = _first(resolver, flow)
    if isinstance(bundles, str):
        return bundles
    bundles = bundles or list(assumed)
    if not bundles:
        return "no policy demands protection of what is sent"
    groups = verdict.protection.groups
    if not groups:
        return "which SAs protected what came from there is not known"
    wanted = Identities(ptoken.local, ptoken.peer)
    for bundle in bundles:
        for group in groups:
            reason = _lacks(resolver, bundle, group, flow, wanted)
            if reason:
                return reason
    return ""


def _first(resolver: Resolver, flow: Flow) -> list[Bundle] | str:
    """Return the templates of the policies that may come first, or what is wrong with them."""
    spd = resolver.mirror.spd
    if spd.conditional_outbound:
        return "policies look at marks or interfaces, and those are not known before sending"
    ties = spd.ties(flow, Direction.OUT)
    if any(policy.action is PolicyAction.BLOCK for group in ties for policy in group):
        return "a policy blocks what is sent"
    if not ties and resolver.mirror.defaults.outbound is PolicyAction.BLOCK:
        return "no policy lets out what is sent"
    protecting = next((g for g in ties if all(policy.protects for policy in g)), None)
    if protecting is None and ties:
        return "the policy does not demand protection of what is sent"
    return [_required(policy) for policy in protecting or ()]


def _required(policy: Policy) -> Bundle:
    return tuple(t for t in policy.templates if not t.optional and t.proto in PROTECTING)


def _lacks(resolver: Resolver, bundle: Bundle, group: Group, flow: Flow, wanted: Identities) -> str:
    """Say why these templates do not make for a group's protection; empty where they do."""
    template = next((t for t in bundle if _like(t, group)), None)
    if template is None:
        return f"the policy for what is sent does not demand {group}"
    found = list(_usable(resolver, template, flow))
    if not found:
        return f"there is no SA to send under, such as {group}"
    now = resolver.clock()
    for record in found:
        sa = group_of(record.sa)
        if sa.strength != group.strength or (group.reqid and sa.reqid != group.reqid):
            return f"it might be sent under {sa}, not {group}"
        if sa.mode in TUNNELS and (sa.source, sa.destination) != (group.destination, group.source):
            return f"it might be sent to another gateway, under {sa}"
        answer = resolver.identify(record, now, Direction.OUT)
        known = answer if isinstance(answer, Identities) else UNIDENTIFIED
        for want, have in zip(wanted, known, strict=True):
            if want is not None and have != want:
                whom = "somebody unknown" if have is None else repr(have)
                return f"it might be sent under an SA of {whom}, not of {want!r}"
    return ""


def _like(template: Template, group: Group) -> bool:
    return (
        template.proto == group.proto
        and template.mode == group.mode
        and (not group.reqid or template.reqid in (0, group.reqid))
    )


def _usable(resolver: Resolver, template: Template, flow: Flow) -> Iterator[Record]:
    """Yield the SAs that the kernel may take for a template (``xfrm_state_find()``)."""
    sad = resolver.mirror.sad
    tunnel = template.mode in TUNNELS
    if not tunnel:
        found = sad.transports(flow.source, flow.destination)
    elif any(template.source) and any(template.destination):
        found = sad.leading(template.source, template.destination)
    else:
        found = sad.admitting(flow.source, flow.destination, Direction.OUT)
    for record in found:
        sa = record.sa
        if (
            sa.proto == template.proto
            and sa.mode == template.mode
            and sa.reqid == template.reqid
            and template.spi in (0, sa.spi)
            and not sa.larval
            and not sa.if_id
            and sa.direction is not Direction.IN
            and sa.mark.matches(flow.mark)
            and sa.selector.matches(flow)
            and not (tunnel and resolver.is_own(sa.destination))
            and not (tunnel and _differs(template.destination, sa.destination))
            and not (tunnel and _differs(template.source, sa.source))
        ):
            yield record


def _differs(wanted: bytes, have: bytes) -> bool:
    return any(wanted) and any(have) and wanted != have
