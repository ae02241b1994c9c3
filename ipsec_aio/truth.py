"""The truth table: what evidence proves, given the mirror.

Rules:

* What cannot be told is UNKNOWN: doubt about the evidence, a mirror out of sync, a stamp of
  another generation, contradictions.
* A stamp names a number, not an SA: one inbound SA with that number must fit the addresses, and
  all under which the kernel may have let the packet in count: of any protocol and any source, and
  removed ones too, since packets wait in queues.
* Without a stamp the SPD is asked, and that is inference. It says nothing of what this host sends
  to itself, nor where interfaces, marks or NAT may have led the packet past it, nor of what may
  have been in its queue when policies changed.
* "No SA" is no proof of clear traffic where one may have carried it. That the stamp names none is,
  if it is in force at this moment: its loss is told only after packets have passed without it.
* Hardware that decrypts whole packets hands them to the kernel's merging (GRO), which compares no
  security path: where an SA that may have carried it is offloaded so, nothing is known.
* What a policy of the SPD or of the socket lets in may have come under any SA that it is content
  with, from whatever address: ESP in transport mode does not vouch for the source, only an SA's
  selector does. So all of those have a say in who the peer is, and all of their properties count
  where a socket's policy is taken for proof.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce
from itertools import chain
from typing import TYPE_CHECKING, Final, NamedTuple

from .enums import Assurance, Direction, PolicyAction
from .evidence import IPPROTO_UDP, NEVER
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
from .sa import SA, SAKey
from .sad import Index, Record

if TYPE_CHECKING:
    from .evidence import Evidence
    from .mirror import Mirror

__all__ = ["MISSING", "Finding", "TruthTable", "fits"]


class Finding(NamedTuple):
    """A verdict, and the SAs that it rests on: the packet came under one of them.

    No SAs: there was none, or it is not known which.
    """

    verdict: Verdict
    records: tuple[Record, ...] = ()


MISSING: Final = Finding(unknown("no SA with this SPI is known yet"))
"""What is found for a stamp whose SA may yet come to be known."""

_OUTLIVED: Final = Finding(unknown("it may have waited so long that its SA is forgotten"))
_MERGED: Final = Finding(unknown("hardware offload can merge packets of several SAs"))


class TruthTable:
    """Judges evidence by a mirror.

    Its owner keeps these true:

    * ``generation``: the stamp's, 0 while there is none that was verified;
    * ``opaque_interfaces``: whether the namespace has interfaces (xfrm, vti) that may have
      scrubbed a security path;
    * ``is_own``: whether an address is this host's;
    * ``links_until``: the mirror's ``changes`` when such an interface, or such an address, last
      went;
    * ``identified``: whether anybody may know who is at the ends of an SA; only then what an
      inference rests on is worked out;
    * ``stamp_stands``: asks whether no change of the stamp is under way of which nobody has told;
    * ``lookup_missing``: asks for one SA at once, and puts what is found into the mirror. True:
      the mirror now knows all about this key.
    """

    def __init__(self, mirror: Mirror) -> None:
        self.mirror = mirror
        self.generation = 0
        self.opaque_interfaces = False
        self.links_until = NEVER
        self.identified = False
        self.is_own: Callable[[bytes], bool] = _nobody
        self.stamp_stands: Callable[[], bool] = _standing
        self.lookup_missing: Callable[[SAKey], bool] = _no_answer

    def judge(self, evidence: Evidence) -> Finding:
        """Return what is found; :data:`MISSING` where an SA may yet come to be known."""
        doubts = self._doubts(evidence)
        if doubts is not None:
            return Finding(doubts)
        if evidence.generation:
            return self._stamped(evidence)
        enforced = evidence.enforced
        if enforced is not None and _demands(enforced):
            return self._enforced(enforced, evidence)
        return self._infer(evidence)

    def ignores_ports(self, evidence: Evidence) -> bool:
        """Whether evidence with other ports is judged alike until the mirror's epoch changes.

        By a stamp it is, where no SA with its number asks for ports: more would change the epoch.
        What came with no number, though an SA may have carried it, is looked at each time.
        """
        if not evidence.generation:
            return False
        if not evidence.mark:
            return not self._may_have_carried(evidence)
        return not any(
            record.sa.selector.names_ports
            for index in (self.mirror.sad, self.mirror.graveyard)
            for record in index.numbered(evidence.spi)
        )

    def judge_again(self, evidence: Evidence, deadline: float, now: float) -> Finding:
        """Return what is found for evidence that was MISSING, asking nobody.

        Past the deadline it is final. What came to be known after that proves nothing, but may
        have been its SA all the same; and a removed one was not it for sure, or there had been no
        need to wait.
        """
        doubts = self._doubts(evidence)
        if doubts is not None:
            return Finding(doubts)
        living = self._possible(self.mirror.sad, evidence, evidence.spi)
        buried = self._possible(self.mirror.graveyard, evidence, evidence.spi)
        known = [record for record in living if record.added <= deadline]
        if _any_fits(known, evidence):
            return self._exact([*living, *buried], evidence)
        return Finding(unknown("its SA never came to be known")) if now > deadline else MISSING

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

    def _stamped(self, evidence: Evidence) -> Finding:
        if evidence.mark:
            return self._by_spi(evidence)
        hidden = self._hidden(evidence)
        if hidden:
            return Finding(unknown(hidden))
        if self._may_have_carried(evidence) and not self.stamp_stands():
            return Finding(unknown("the stamp may just have been lost"))
        return Finding(CLEAR)

    def _by_spi(self, evidence: Evidence) -> Finding:
        sad, graveyard, spi = self.mirror.sad, self.mirror.graveyard, evidence.spi
        living = self._possible(sad, evidence, spi)
        found, certain = _any_fits(living, evidence), True
        if not found:
            # The number of a removed SA may be in use again.
            keys = {r.sa.key for r in self._possible(graveyard, evidence, spi)}
            keys.update(SAKey(evidence.local, proto, spi) for proto in PROTECTING)
            answers = [self.lookup_missing(key) for key in keys]
            certain = all(answers)
            living = self._possible(sad, evidence, spi)
            found = _any_fits(living, evidence)
        buried = self._possible(graveyard, evidence, spi)
        if found or (certain and _any_fits(buried, evidence)):
            return self._exact([*living, *buried], evidence)
        if certain and any(not r.sa.larval for r in sad.numbered(spi)):
            return Finding(unknown("the SA with this SPI is not for these addresses"))
        return MISSING

    def _possible(self, index: Index, evidence: Evidence, spi: int) -> list[Record]:
        """Return the SAs with this number under which the kernel may have let the packet in.

        It asks for destination, protocol and number, never for the source, which the sender of
        an unauthenticated packet (IPComp) chooses; and NAT may have led the packet from one own
        address to another.
        """
        return [
            record
            for record in index.numbered(spi)
            if _inbound(sa := record.sa)
            and (
                sa.selector.matches(evidence.flow) and not self._outbound(sa, evidence)
                if sa.mode in TUNNELS
                else sa.destination == evidence.local
                or (
                    len(sa.destination) == len(evidence.local)
                    and self._was_own(sa.destination, evidence)
                )
            )
        ]

    def _outbound(self, sa: SA, evidence: Evidence) -> bool:
        """Whether a tunnel led away from here; kernels before 6.10 do not tell."""
        return (
            sa.mode in TUNNELS
            and self.is_own(sa.source)
            and not self._was_own(sa.destination, evidence)
        )

    def _was_own(self, address: bytes, evidence: Evidence) -> bool:
        """Whether an address may have been this host's when the packet came."""
        return evidence.after < self.links_until or self.is_own(address)

    def _hidden(self, evidence: Evidence) -> str:
        """Say how the packet may have come past policies, without its security path."""
        if self.opaque_interfaces:
            return "it may have come through an xfrm interface"
        if evidence.after < self.links_until:
            return "it may have arrived before interfaces and addresses were what they are"
        return ""

    def _exact(self, records: list[Record], evidence: Evidence) -> Finding:
        known_since = max(record.known_since for record in records)
        if evidence.after < max(known_since, self.mirror.forgotten(evidence.spi)):
            return _OUTLIVED
        if any(map(_is_merged, records)):
            return _MERGED
        protection = weakest(_derived(record) for record in records)
        if not protection.compression and any(
            self.mirror.sad.compresses(r.sa.source, r.sa.destination) for r in records
        ):
            protection = protection._replace(compression=None)
        ports = _ports((r.sa.selector for r in records), evidence)
        return Finding(Verdict(Assurance.EXACT, protection, ports=ports), tuple(records))

    # By the socket's own policy

    def _enforced(self, template: Template, evidence: Evidence) -> Finding:
        self.mirror.additions_matter = True
        hidden = self._hidden(evidence)
        if hidden:
            return Finding(unknown(hidden))
        records = self._admitted_under(template, evidence)
        if any(map(_is_merged, records)):
            return _MERGED
        protection = UNKNOWN._replace(tunnel=template.mode in TUNNELS)
        if records:
            # The channel's own are those with its addresses.
            own = weakest(_derived(r) for r in records if fits(r.sa, evidence))
            every = weakest(map(_derived, records))
            known = {group.strength for group in own.groups}
            others = {group.strength for group in every.groups} - known
            protection = every._replace(groups=own.groups, others=tuple(sorted(others, key=repr)))
        ports = _ports((r.sa.selector for r in records), evidence)
        return Finding(
            Verdict(Assurance.ENFORCED, protection._replace(compression=None), ports=ports),
            tuple(records),
        )

    def _admitted_under(self, template: Template, evidence: Evidence) -> list[Record]:
        """Return the SAs that satisfy a template under which the packet may have come.

        Removed ones too. The kernel compares what it decrypted with the SA's selector, and never
        its source with the SA's.
        """
        mirror, flow = self.mirror, evidence.flow
        return [
            record
            for record in chain(
                mirror.sad.admitting(flow.source, flow.destination),
                mirror.graveyard.admitting(flow.source, flow.destination),
            )
            if _inbound(sa := record.sa)
            and _meets(sa, template)
            and sa.selector.matches(flow)
            and _wrote(sa, evidence)
            and (
                not self._outbound(sa, evidence)
                if sa.mode in TUNNELS
                else sa.destination == evidence.local or self._was_own(sa.destination, evidence)
            )
        ]

    # By inference

    def _infer(self, evidence: Evidence) -> Finding:
        ties = self._ties(evidence)
        if isinstance(ties, Verdict):
            return Finding(ties)
        # Which of several policies with one number is the first is not certain: all must protect.
        group = next((g for g in ties if all(p.protects for p in g)), None)
        if group is not None:
            return self._by_policy(group, evidence)
        return Finding(self._by_none(ties, evidence))

    def _ties(self, evidence: Evidence) -> list[list[Policy]] | Verdict:
        """Return the policies that come first, or why it is not known which do."""
        mirror = self.mirror
        mirror.additions_matter = True
        hidden = self._hidden(evidence)
        if hidden:
            return unknown(hidden)
        # Of a connection only the handshake's mark can be read, of a datagram its own.
        if mirror.has_marked_inbound() and (
            evidence.mark is None or evidence.protocol != IPPROTO_UDP
        ):
            return unknown("policies or SAs look at marks, and its mark was not read")
        if mirror.names_interface_inbound():
            return unknown("policies or SAs name interfaces, and which is compared is not known")
        flow = _marked_flow(evidence)
        ties = mirror.spd.ties(flow, Direction.IN)
        if any(policy.action is PolicyAction.BLOCK for group in ties for policy in group):
            return unknown("a policy blocks this traffic")
        if not mirror.spd.stood(ties, flow, evidence.after):
            return unknown("it may have arrived before the policies were what they are")
        return ties

    def _by_none(self, ties: list[list[Policy]], evidence: Evidence) -> Verdict:
        """Return what holds where no policy demands protection."""
        mirror = self.mirror
        if any(policy.protects for g in ties for policy in g):
            return unknown("policies with the same priority contradict each other")
        if not ties and mirror.defaults.inbound is PolicyAction.BLOCK:
            return unknown("no policy lets this traffic in")
        if self._may_have_carried(evidence):
            return unknown("an SA may have carried it, and no policy demands one")
        return CLEAR

    def _may_have_carried(self, evidence: Evidence) -> bool:
        """Whether any SA may have, by addresses and selectors; if not, one that comes may."""
        carried = any(
            _carries(record.sa, evidence)
            for index in (self.mirror.sad, self.mirror.graveyard)
            for records in (
                index.transports(evidence.peer, evidence.local),
                index.admitting(evidence.peer, evidence.local),
            )
            for record in records
        )
        if not carried:
            self.mirror.additions_matter = True
        return carried

    def _by_policy(self, policies: list[Policy], evidence: Evidence) -> Finding:
        if evidence.peer == evidence.local or self._was_own(evidence.peer, evidence):
            return Finding(unknown("no policy checks what this host sends to itself"))
        verdict = Verdict(
            Assurance.POLICY,
            weakest(self._admitted(policy, evidence) for policy in policies),
            ports=_ports((policy.selector for policy in policies), evidence),
        )
        if not self.identified:
            return Finding(verdict)
        carriers = [
            self._admitted_under(template, evidence)
            for template in dict.fromkeys(chain.from_iterable(map(_demanded, policies)))
        ]
        if not all(carriers):
            return Finding(verdict)
        return Finding(verdict, tuple(dict.fromkeys(chain.from_iterable(carriers))))

    def _admitted(self, policy: Policy, evidence: Evidence) -> Protection:
        """What holds of all that the policy lets in: each demanded template was applied."""
        demanded = [self._under(template, evidence) for template in _demanded(policy)]
        return reduce(both, demanded)._replace(
            compression=None, policy=f"{policy.selector} priority {policy.priority}"
        )

    def _under(self, template: Template, evidence: Evidence) -> Protection:
        tunnel = template.mode in TUNNELS

        def candidates(index: Index) -> Iterable[Record]:
            if not tunnel:
                return index.transports(evidence.peer, evidence.local)
            if any(template.source):
                return index.tunnels(template.source)
            return index.admitting(evidence.peer, evidence.local)

        found = [
            _derived(r)
            for r in chain(candidates(self.mirror.sad), candidates(self.mirror.graveyard))
            if _meets(r.sa, template) and _carries(r.sa, evidence)
        ]
        return weakest(found) if found else UNKNOWN._replace(tunnel=tunnel)


def _demanded(policy: Policy) -> Iterable[Template]:
    return filter(_demands, policy.templates)


def _demands(template: Template) -> bool:
    return not template.optional and template.proto in PROTECTING


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
    return sa.proto in PROTECTING and fits(sa, evidence) and _wrote(sa, evidence)


def _wrote(sa: SA, evidence: Evidence) -> bool:
    """Whether the packet's mark may be what the SA writes into its packets."""
    written = sa.set_mark
    return (
        written is None
        or written.mask != 0xFFFFFFFF
        or evidence.mark is None
        or evidence.mark == written.value
    )


def _is_merged(record: Record) -> bool:
    offload = record.sa.offload
    return offload is not None and offload.packet


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


def _standing() -> bool:
    return True


def _no_answer(key: SAKey) -> bool:
    del key
    return False
