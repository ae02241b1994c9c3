"""The truth table: what evidence proves, given the mirror.

Rules:

* What cannot be told is UNKNOWN: doubt about the evidence, a mirror out of sync, a stamp of
  another generation, contradictions.
* A stamp names a number, not an SA: one inbound SA with that number must fit the addresses, and
  all under which the kernel may have let the packet in count: of any protocol and any source, and
  removed ones too, since packets wait in queues.
* Without a stamp the SPD is asked, and that is inference. It says nothing of what this host sends
  to itself, nor where interfaces, marks or NAT may have led the packet past it.
* "No SA" is no proof of clear traffic where one may have carried it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce
from typing import TYPE_CHECKING, Final

from .enums import Assurance, Direction, PolicyAction
from .evidence import IPPROTO_UDP
from .flow import Flow, Selector
from .policy import Policy, Template
from .protection import (
    CLEAR,
    PROTECTING,
    TUNNELS,
    UNKNOWN,
    Protection,
    Verdict,
    both,
    protection_of,
    unknown,
    weakest,
)
from .sa import IPPROTO_AH, IPPROTO_ESP, SA, SAKey
from .sad import Index, Record

if TYPE_CHECKING:
    from .evidence import Evidence
    from .mirror import Mirror

__all__ = ["MISSING", "TruthTable", "fits"]

MISSING: Final = unknown("no SA with this SPI is known yet")
"""The verdict on a stamp whose SA may yet come to be known."""


class TruthTable:
    """Judges evidence by a mirror.

    Its owner keeps these true:

    * ``generation``: the stamp's, 0 while there is none that was verified;
    * ``opaque_interfaces``: whether the namespace has interfaces (xfrm, vti) that may have
      scrubbed a security path;
    * ``is_own``: whether an address is this host's;
    * ``lookup_missing``: asks for one SA at once, and puts what is found into the mirror. True:
      the mirror now knows all about this key.
    """

    def __init__(self, mirror: Mirror) -> None:
        self.mirror = mirror
        self.generation = 0
        self.opaque_interfaces = False
        self.is_own: Callable[[bytes], bool] = _nobody
        self.lookup_missing: Callable[[SAKey], bool] = _no_answer

    def judge(self, evidence: Evidence, now: float) -> Verdict:
        """Return the verdict; :data:`MISSING` where an SA may yet come to be known."""
        return self._doubts(evidence) or (
            self._stamped(evidence) if evidence.generation else self._infer(evidence, now)
        )

    def judge_again(self, evidence: Evidence, deadline: float, now: float) -> Verdict:
        """Return the verdict on evidence that was MISSING, asking nobody.

        Past the deadline it is final, and what came to be known after it does not count.
        """
        doubts = self._doubts(evidence)
        if doubts is not None:
            return doubts
        living = self._possible(self.mirror.sad, evidence)
        buried = self._possible(self.mirror.graveyard, evidence)
        if now > deadline:
            known = [r for r in (*living, *buried) if r.added <= deadline]
            if _any_fits(known, evidence):
                return self._exact(known, evidence)
            return unknown("its SA never came to be known")
        return self._exact([*living, *buried], evidence) if _any_fits(living, evidence) else MISSING

    def _doubts(self, evidence: Evidence) -> Verdict | None:
        if evidence.doubt:
            return unknown(evidence.doubt)
        if not self.mirror.synced:
            return unknown("events were lost, and the tables are being read again")
        if not evidence.generation:
            return None
        if evidence.generation != self.generation:
            return unknown("the stamp was lost or restored meanwhile")
        if evidence.mark is None:
            return unknown("the mark was not read")
        return None

    # By the stamp

    def _stamped(self, evidence: Evidence) -> Verdict:
        if evidence.mark:
            return self._by_spi(evidence)
        if self.opaque_interfaces:
            return unknown("an xfrm interface may have hidden the security path")
        return CLEAR

    def _by_spi(self, evidence: Evidence) -> Verdict:
        sad, graveyard, spi = self.mirror.sad, self.mirror.graveyard, evidence.spi
        living = self._possible(sad, evidence)
        certain = True
        if not _any_fits(living, evidence):
            # The number of a removed SA may be in use again.
            keys = {r.sa.key for r in self._possible(graveyard, evidence)}
            keys.update(SAKey(evidence.local, proto, spi) for proto in PROTECTING)
            answers = [self.lookup_missing(key) for key in keys]
            certain = all(answers)
            living = self._possible(sad, evidence)
        buried = self._possible(graveyard, evidence)
        if _any_fits(living, evidence) or (certain and _any_fits(buried, evidence)):
            return self._exact([*living, *buried], evidence)
        if certain and any(not r.sa.larval for r in sad.numbered(spi)):
            return unknown("the SA with this SPI is not for these addresses")
        return MISSING

    def _possible(self, index: Index, evidence: Evidence) -> list[Record]:
        """Return the SAs with this number under which the kernel may have let the packet in.

        It asks for destination, protocol and number, never for the source, which the sender of
        an unauthenticated packet (IPComp) chooses; and NAT may have led the packet from one own
        address to another.
        """
        return [
            record
            for record in index.numbered(evidence.spi)
            if _inbound(sa := record.sa)
            and (
                sa.selector.matches(evidence.flow) and not self._outbound(sa)
                if sa.mode in TUNNELS
                else sa.destination == evidence.local
                or (len(sa.destination) == len(evidence.local) and self.is_own(sa.destination))
            )
        ]

    def _outbound(self, sa: SA) -> bool:
        """Whether a tunnel leads away from here; kernels before 6.10 do not tell."""
        return sa.mode in TUNNELS and self.is_own(sa.source) and not self.is_own(sa.destination)

    def _exact(self, records: list[Record], evidence: Evidence) -> Verdict:
        protection = weakest(_derived(record) for record in records)
        if not protection.compression and any(
            self.mirror.sad.compresses(r.sa.source, r.sa.destination) for r in records
        ):
            protection = protection._replace(compression=None)
        return Verdict(
            Assurance.EXACT,
            protection,
            ports=_ports((r.sa.selector for r in records), evidence),
        )

    # By inference

    def _infer(self, evidence: Evidence, now: float) -> Verdict:
        mirror = self.mirror
        mirror.additions_matter = True
        if self.opaque_interfaces:
            return unknown("it may have come through an xfrm interface")
        # Of a connection only the handshake's mark can be read, of a datagram its own.
        if mirror.has_marked_inbound() and (
            evidence.mark is None or evidence.protocol != IPPROTO_UDP
        ):
            return unknown("policies or SAs look at marks, and its mark was not read")
        if mirror.spd.interface_inbound and not evidence.ifindex:
            return unknown("policies look at interfaces, and its interface was not read")
        ties = mirror.spd.ties(_marked_flow(evidence), Direction.IN)
        if any(policy.action is PolicyAction.BLOCK for group in ties for policy in group):
            return unknown("a policy blocks this traffic")
        # Which of several policies with one number is the first is not certain: all must protect.
        group = next((g for g in ties if all(p.protects for p in g)), None)
        if group is not None:
            return self._by_policy(group, evidence, now)
        if any(policy.protects for g in ties for policy in g):
            return unknown("policies with the same priority contradict each other")
        if not ties and mirror.defaults.inbound is PolicyAction.BLOCK:
            return unknown("no policy lets this traffic in")
        if any(
            _carries(record.sa, evidence)
            for index in (mirror.sad, mirror.graveyard)
            for records in (index.transports(evidence.peer, evidence.local), index.tunnels())
            for record in records
        ):
            return unknown("an SA may have carried it, and no policy demands one")
        return CLEAR

    def _by_policy(self, policies: list[Policy], evidence: Evidence, now: float) -> Verdict:
        if evidence.peer == evidence.local or self.is_own(evidence.peer):
            return unknown("no policy checks what this host sends to itself")
        if not all(self.mirror.vouches(policy, now) for policy in policies):
            return unknown("the policy may be younger than the packet")
        return Verdict(
            Assurance.POLICY,
            weakest(self._admitted(policy, evidence) for policy in policies),
            ports=_ports((policy.selector for policy in policies), evidence),
        )

    def _admitted(self, policy: Policy, evidence: Evidence) -> Protection:
        """What holds of all that the policy lets in: each demanded template was applied."""
        demanded = [
            self._under(template, evidence)
            for template in policy.templates
            if not template.optional and template.proto in PROTECTING
        ]
        return reduce(both, demanded)._replace(
            compression=None, policy=f"{policy.selector} priority {policy.priority}"
        )

    def _under(self, template: Template, evidence: Evidence) -> Protection:
        sad = self.mirror.sad
        tunnel = template.mode in TUNNELS
        if not tunnel:
            records = sad.transports(evidence.peer, evidence.local)
        else:
            records = sad.tunnels(template.source if any(template.source) else None)
        found = [
            _derived(r) for r in records if _meets(r.sa, template) and _carries(r.sa, evidence)
        ]
        return weakest(found) if found else UNKNOWN._replace(tunnel=tunnel)


def fits(sa: SA, evidence: Evidence) -> bool:
    """Whether an SA may have carried this packet inwards, by addresses, selector and direction."""
    if not _inbound(sa):
        return False
    if sa.mode in TUNNELS:
        return sa.selector.matches(evidence.flow)
    return sa.destination == evidence.local and (sa.source == evidence.peer or not any(sa.source))


def _inbound(sa: SA) -> bool:
    return not sa.larval and sa.direction in (None, Direction.IN)


def _any_fits(records: Iterable[Record], evidence: Evidence) -> bool:
    return any(fits(record.sa, evidence) for record in records)


def _carries(sa: SA, evidence: Evidence) -> bool:
    """Whether an SA may have carried it, by the mark that it would have written, too."""
    if sa.proto not in (IPPROTO_ESP, IPPROTO_AH) or not fits(sa, evidence):
        return False
    written = sa.set_mark
    return (
        written is None
        or written.mask != 0xFFFFFFFF
        or evidence.mark is None
        or evidence.mark == written.value
    )


def _meets(sa: SA, template: Template) -> bool:
    """Whether an SA satisfies a template, as ``xfrm_state_ok()`` compares them."""
    return (
        sa.proto == template.proto
        and sa.mode == template.mode
        and template.reqid in (0, sa.reqid)
        and template.spi in (0, sa.spi)
        # Of the outer addresses the kernel compares the source alone.
        and (sa.mode not in TUNNELS or not any(template.source) or template.source == sa.source)
    )


def _derived(record: Record) -> Protection:
    protection = record.protection
    if not isinstance(protection, Protection):
        protection = record.protection = protection_of(record.sa)
    return protection


def _marked_flow(evidence: Evidence) -> Flow:
    return Flow(
        evidence.peer,
        evidence.local,
        evidence.protocol,
        evidence.peer_port,
        evidence.local_port,
        evidence.ifindex,
        evidence.mark or 0,
    )


def _ports(selectors: Iterable[Selector], evidence: Evidence) -> tuple[int, int, int] | None:
    local = peer = 0
    for selector in selectors:
        if selector.destination_port_mask:
            local = evidence.local_port
        if selector.source_port_mask:
            peer = evidence.peer_port
    return (evidence.protocol, local, peer) if local or peer else None


def _nobody(address: bytes) -> bool:
    del address
    return False


def _no_answer(key: SAKey) -> bool:
    del key
    return False
