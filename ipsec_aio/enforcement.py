"""What a socket's own policy can demand for a requirement, and what it leaves to be checked.

Rules:

* A kernel's template names protocol and mode exactly: "ESP or AH", or any mode, cannot be said.
  What the requirement leaves open is taken from the policies that govern the port, where all of
  them agree on it.
* A socket's policy takes the SPD's place for its socket. Where it demands less than a policy that
  it stands in for (another reqid, another gateway), it is *loose*: the kernel would let one
  peer's SA speak for another's address. :func:`objection` asks the SPD in user space instead, and
  only a stamp tells by which SA a packet came. So without a stamp, a loose one is not taken.
* It says nothing of algorithms: the token is checked besides, always.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from .enums import Direction, Mode, PolicyAction
from .flow import Flow, Selector
from .policy import Policy, Template
from .protection import PROTECTING, TUNNELS
from .sa import IPPROTO_ESP, SA

if TYPE_CHECKING:
    from .evidence import Evidence
    from .mirror import Mirror
    from .require import Demands

__all__ = ["Bundle", "Plan", "common", "derive", "governing", "implies", "objection"]

Bundle: TypeAlias = tuple[Template, ...]
"""A policy's templates, in the kernel's order."""

_NAMES = {50: "ESP", 51: "AH", 108: "IPComp"}
_ALL = 0xFFFFFFFF
_FAMILIES = {4: 2, 16: 10}


@dataclass(frozen=True, slots=True)
class Plan:
    """The templates of a socket's policies.

    ``outbound`` is None where the SPD goes on deciding. ``loose``: the inbound ones demand less
    than a policy that they stand in for.
    """

    inbound: Bundle
    outbound: Bundle | None = None
    loose: bool = False

    @property
    def template(self) -> Template:
        """What every packet was protected by; ESP rather than AH."""
        return min(_demanded(self.inbound), key=lambda t: t.proto)


def derive(
    demands: Demands, inbound: Iterable[Bundle], outbound: Iterable[Bundle] = ()
) -> Plan | str:
    """Return what the kernel can enforce, or the reason why it cannot.

    ``inbound`` and ``outbound`` are the templates of the policies that may govern the socket's
    traffic, from :meth:`Backend.templates`.
    """
    proto = IPPROTO_ESP if demands.encrypted and demands.protocol is None else demands.protocol
    mode = demands.mode
    if not demands.integrity and not demands.encrypted and proto is None and mode is None:
        return "the requirement demands nothing of every packet that a template could say"
    known = list(inbound)
    fitting = [b for b in known if _fits(b, proto, mode)]
    merged = _merged(fitting)
    if merged is None and fitting:
        found = ", ".join(sorted({_named(b) for b in fitting}))
        return f"the policies for this port differ ({found}), and a template names one of them"
    leaving = [b for b in dict.fromkeys(outbound) if _fits(b, proto, mode)]
    if merged is None:
        # What goes out says of which kind the answers are.
        merged = _bare(_merged(leaving))
    if merged is None:
        missing = [what for what, value in (("protocol", proto), ("mode", mode)) if value is None]
        if missing:
            return (
                f"a template names protocol and mode exactly: neither the requirement says "
                f"which {' and '.join(missing)}, nor a policy for this port"
            )
        assert proto is not None  # noqa: S101
        assert mode is not None  # noqa: S101
        merged = (Template(proto=proto, mode=mode),)
    loose = not all(_implies(merged, bundle) for bundle in known)
    return Plan(merged, leaving[0] if len(leaving) == 1 else None, loose)


def governing(
    policies: Iterable[Policy],
    protocol: int,
    port: int,
    direction: Direction,
    *,
    local: bytes = b"",
    peer: bytes = b"",
    peer_port: int = 0,
) -> tuple[Bundle, ...]:
    """Return the templates of the policies that protect and may govern a local port's traffic.

    Port 0 and the empty address stand for any, the unspecified address for any of its family.
    What comes after a policy that matches all of this traffic governs nothing. Each list of
    templates comes once.
    """
    ours, theirs = (local, port), (peer, peer_port)
    ends = (theirs, ours) if direction is Direction.IN else (ours, theirs)
    family = _FAMILIES.get(len(local) or len(peer), 0)
    matching: list[tuple[Policy, bool]] = []
    for policy in policies:
        selector = policy.selector
        if (
            policy.direction is direction
            and not policy.if_id
            and selector.proto in (0, protocol)
            and (not family or selector.family in (0, family))
        ):
            certainty = _certainty(selector, *ends)
            if certainty is not None:
                certain = certainty and not (selector.ifindex or any(policy.mark))
                matching.append((policy, certain))
    found: dict[Bundle, None] = {}
    for kind in (1, 0):  # sub policies are asked first, and main ones besides
        last: int | None = None
        for policy, certain in sorted(matching, key=lambda pair: pair[0].priority):
            if policy.kind != kind:
                continue
            if last is not None and policy.priority > last:
                break
            if policy.protects:
                found[policy.templates] = None
            if certain and last is None:
                last = policy.priority
    return tuple(found)


def objection(mirror: Mirror, evidence: Evidence, inbound: Bundle) -> str:
    """Say why the SPD would not have let in what a socket's policy did; empty where it would.

    As in the kernel: the first policy's templates must have been applied; tunnelled traffic needs
    a policy. Where the policy demands more than ``inbound``, all SAs that the stamp may name must
    meet it.
    """
    e, spd = evidence, mirror.spd
    if mirror.names_interface_inbound():
        return "policies or SAs name interfaces, and which is compared is not known"
    if spd.marked_inbound and e.mark is None:
        return "policies look at marks, and its mark was not read"
    flow = Flow(e.peer, e.local, e.protocol, e.peer_port, e.local_port, e.mark or 0)
    policies = [p for group in spd.ties(flow, Direction.IN) for p in group]
    if any(p.action is PolicyAction.BLOCK for p in policies):
        return "a policy blocks this traffic"
    if not policies and mirror.defaults.inbound is PolicyAction.BLOCK:
        return "no policy lets this traffic in"
    tunnelled = any(t.mode in TUNNELS for t in inbound)
    if tunnelled and not any(p.templates for p in policies):
        return "no policy lets tunnelled traffic in from this address"
    lacking = [
        t
        for p in policies
        for t in _demanded(p.templates)
        if not any(implies(own, t) for own in inbound)
    ]
    if not lacking:
        return ""
    named = _stamped(mirror, evidence)
    if named and all(_meets(sa, t) for sa in named for t in lacking):
        return ""
    return "the policy for these addresses demands another SA"


def common(one: Template, other: Template) -> Template | None:
    """Return the strictest template that admits what either does; None for different kinds."""
    if (one.proto, one.mode) != (other.proto, other.mode):
        return None
    return _either(one, other)


def implies(one: Template, other: Template) -> bool:
    """Whether what meets one template meets the other, as ``xfrm_state_ok()`` compares."""
    return (
        one.proto == other.proto
        and one.mode is other.mode
        and other.reqid in (0, one.reqid)
        and other.spi in (0, one.spi)
        and (one.mode not in TUNNELS or not any(other.source) or other.source == one.source)
        and all(
            theirs in (ours, _ALL)
            for ours, theirs in (
                (one.auth_algorithms, other.auth_algorithms),
                (one.encryption_algorithms, other.encryption_algorithms),
                (one.compression_algorithms, other.compression_algorithms),
            )
        )
    )


def _implies(one: Bundle, other: Bundle) -> bool:
    return all(any(implies(t, wanted) for t in one) for wanted in _demanded(other))


def _demanded(bundle: Bundle) -> list[Template]:
    return [t for t in bundle if not t.optional and t.proto in PROTECTING]


def _fits(bundle: Bundle, proto: int | None, mode: Mode | None) -> bool:
    return any(
        (proto is None or t.proto == proto) and (mode is None or t.mode is mode)
        for t in _demanded(bundle)
    )


def _merged(bundles: list[Bundle]) -> Bundle | None:
    """Return the strictest templates that admit what each of these admits, None for none."""
    shapes = {tuple((t.proto, t.mode, t.optional) for t in b) for b in bundles}
    if len(shapes) != 1:
        return None
    merged = bundles[0]
    for bundle in bundles[1:]:
        merged = tuple(_either(*pair) for pair in zip(merged, bundle, strict=True))
    return merged


def _bare(bundle: Bundle | None) -> Bundle | None:
    return bundle and tuple(Template(proto=t.proto, mode=t.mode) for t in _demanded(bundle))


def _either(one: Template, other: Template) -> Template:
    return replace(
        one,
        reqid=one.reqid if one.reqid == other.reqid else 0,
        spi=one.spi if one.spi == other.spi else 0,
        source=one.source if one.source == other.source else b"",
        destination=one.destination if one.destination == other.destination else b"",
        family=one.family if one.family == other.family else 0,
        share=0,
        auth_algorithms=_same(one.auth_algorithms, other.auth_algorithms),
        encryption_algorithms=_same(one.encryption_algorithms, other.encryption_algorithms),
        compression_algorithms=_same(one.compression_algorithms, other.compression_algorithms),
    )


def _same(one: int, other: int) -> int:
    return one if one == other else _ALL


def _certainty(
    selector: Selector, source: tuple[bytes, int], destination: tuple[bytes, int]
) -> bool | None:
    """Whether a selector matches all of this traffic; None where it matches none of it."""
    s = selector
    answers = (
        _port_certainty(s.source_port, s.source_port_mask, source[1]),
        _port_certainty(s.destination_port, s.destination_port_mask, destination[1]),
        _address_certainty(s.source, s.source_prefix, source[0]),
        _address_certainty(s.destination, s.destination_prefix, destination[0]),
    )
    return None if None in answers else all(answers)


def _port_certainty(port: int, mask: int, wanted: int) -> bool | None:
    if not mask or not wanted:
        return not mask
    return None if (port ^ wanted) & mask else True


def _address_certainty(network: bytes, prefix: int, address: bytes) -> bool | None:
    if not prefix or not any(address):
        return not prefix
    if len(address) != len(network):
        return None
    shift = len(network) * 8 - prefix
    return True if int.from_bytes(address) >> shift == int.from_bytes(network) >> shift else None


def _stamped(mirror: Mirror, evidence: Evidence) -> list[SA]:
    """Return the SAs that a stamp may name."""
    if not evidence.generation or not evidence.mark:
        return []
    spi = evidence.spi
    return [
        record.sa
        for index in (mirror.sad, mirror.graveyard)
        for record in index.numbered(spi)
        if not record.sa.larval
        and record.sa.direction is not Direction.OUT
        and (record.sa.mode in TUNNELS or record.sa.destination == evidence.local)
    ]


def _meets(sa: SA, template: Template) -> bool:
    return (
        sa.proto == template.proto
        and sa.mode is template.mode
        and template.reqid in (0, sa.reqid)
        and template.spi in (0, sa.spi)
        and (sa.mode not in TUNNELS or not any(template.source) or template.source == sa.source)
    )


def _named(bundle: Bundle) -> str:
    return "+".join(
        f"{_NAMES.get(t.proto, t.proto)} {t.mode.name.lower()}{' optional' * t.optional}"
        for t in bundle
    )
