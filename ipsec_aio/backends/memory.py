"""The memory backend: SAs and policies declared in Python or TOML, mishaps played on demand.

Rules:

* It keeps apart what is declared and what the mirror has been told, as the kernel and those who
  watch it are apart. Lost and held events make the difference.
* It plays the stamp: traffic from a peer to a local address carries the SPI of the newest declared
  inbound SA that fits, or mark 0. From there on it is the same truth table as everywhere.
* Identities are declared with their SA, or as yet to come: then tokens wait for them as they do
  for a keying daemon's report.
* It works on any loop, on several at once, and from their threads.
"""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from ipaddress import ip_network
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipsec_aio.algorithms import (
    AEADS,
    AUTHENTICATORS,
    CIPHERS,
    COMPRESSORS,
    NULL_CIPHER,
)
from ipsec_aio.enums import Direction, Mode, PolicyAction
from ipsec_aio.events import (
    DefaultActions,
    Event,
    PoliciesFlushed,
    PolicyAdded,
    PolicyDeleted,
    SAAdded,
    SADeleted,
    SAExpired,
    SAsFlushed,
)
from ipsec_aio.flow import Mark, Selector, pack_address, unmap
from ipsec_aio.identities import UNIDENTIFIED, Awaited, Identities
from ipsec_aio.identity import IToken
from ipsec_aio.policy import Policy, PolicyKey, Template
from ipsec_aio.protection import PROTECTING, TUNNELS
from ipsec_aio.sa import IPPROTO_AH, IPPROTO_COMP, IPPROTO_ESP, SA, Algorithm, SAKey
from ipsec_aio.tokens import PENDING_SECONDS
from ipsec_aio.truth import fits

from . import declaration
from .contract import Registration
from .declaration import PROTOS, number_of, within
from .static import StaticIdentities
from .tables import TableBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Self

    from ipsec_aio.enforcement import Bundle
    from ipsec_aio.evidence import Evidence
    from ipsec_aio.flow import Flow
    from ipsec_aio.identities import Answer
    from ipsec_aio.sad import Record
    from ipsec_aio.tokens import PToken

__all__ = ["MemoryBackend", "selector"]

_LAYER4 = {"any": 0, "icmp": 1, "tcp": 6, "udp": 17, "icmpv6": 58, "sctp": 132}
_MODES = {mode.name.lower(): mode for mode in Mode}
_DIRECTIONS = {direction.name.lower(): direction for direction in Direction}
_ACTIONS = {action.name.lower(): action for action in PolicyAction}
_FIRST_SPI = 0x1001
_MAX = 0xFFFFFFFF


def selector(
    src: str = "any",
    dst: str = "any",
    proto: str | int = 0,
    src_port: int = 0,
    dst_port: int = 0,
    ifindex: int = 0,
) -> Selector:
    """Build a selector from networks (``"192.0.2.0/24"``), addresses, or ``"any"``.

    ``proto`` is ``"udp"``, ``"tcp"``, … or a number; port 0 is any. Raises ValueError.
    """
    source, source_prefix = _network(src)
    destination, destination_prefix = _network(dst)
    sizes = {len(address) for address in (source, destination) if address}
    if len(sizes) > 1:
        raise ValueError(f"{src} and {dst} are of different families")
    return Selector(
        source=source,
        destination=destination,
        source_prefix=source_prefix,
        destination_prefix=destination_prefix,
        source_port=within(src_port, "src_port", 0xFFFF),
        source_port_mask=0xFFFF if src_port else 0,
        destination_port=within(dst_port, "dst_port", 0xFFFF),
        destination_port_mask=0xFFFF if dst_port else 0,
        proto=number_of(_LAYER4, proto, "proto", 255),
        family={4: 2, 16: 10}[sizes.pop()] if sizes else 0,
        ifindex=ifindex,
    )


class _Registration(Registration):
    """A port under the played stamp."""

    def __init__(self, generation: Callable[[], int]) -> None:
        self._generation = generation

    @property
    def generation(self) -> int:
        return self._generation()

    @property
    def reads_marks(self) -> bool:
        return False

    @property
    def keeps_fragments(self) -> bool:
        return False

    def close(self) -> None:
        pass


class MemoryBackend(TableBackend):
    """SAs and policies declared by the program itself, for development and tests.

    It works unopened, on any loop, and as ``async with``. Addresses are text.
    """

    name = "memory"

    def __init__(self, *, trust_policy: bool = False) -> None:
        super().__init__(trust_policy=trust_policy)
        self._sas: dict[SAKey, SA] = {}
        # By the SA itself, for its key may be used again; None: to come.
        self._ends: dict[int, Identities | None] = {}
        self._policies: dict[PolicyKey, Policy] = {}
        self._defaults = DefaultActions(PolicyAction.ALLOW, PolicyAction.ALLOW, PolicyAction.ALLOW)
        self._spis = count(_FIRST_SPI)
        self._chosen: set[int] = set()
        self._indexes = count(8, 8)
        self._generations = count(1)
        self._held: list[Event] | None = None
        self._lost = False
        # Traffic is stamped by what is declared: any change may change its stamp.
        self.mirror.always_bump = True
        self._read_again()
        self.restore_stamp()

    @classmethod
    def from_toml(cls, source: str | os.PathLike[str], *, trust_policy: bool | None = None) -> Self:
        """Build a backend from TOML: the text itself, or the path of a file, which as a ``str``
        ends in ``.toml``.

        ``[[sa]]`` tables take :meth:`add_sa`'s arguments, ``[[policy]]`` tables those of
        :meth:`add_policy`, ``selector`` in an SA those of :func:`selector`; at the top there may
        be ``default_action`` and ``trust_policy``, and ``[[identity]]`` tables as
        :class:`StaticIdentities` takes them. Raises ValueError that names the table and the
        key, OSError where the file cannot be read.
        """
        if isinstance(source, str) and not source.endswith(".toml"):
            where, text = "TOML", source
        else:
            where, text = os.fspath(source), Path(source).read_text("utf-8")
        try:
            document = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{where}: {error}") from error
        with declaration.at(where):
            top = declaration.checked(document, declaration.TOP)
            if trust_policy is None:
                trust_policy = bool(top.get("trust_policy", False))
            backend = cls(trust_policy=trust_policy)
            if "default_action" in top:
                backend.set_default(top["default_action"])
            for table, arguments in declaration.tables(document, "sa", declaration.SA):
                with declaration.at(table):
                    inner = arguments.pop("selector", None)
                    if inner is not None:
                        with declaration.at("selector"):
                            arguments["selector"] = selector(
                                **declaration.checked(inner, declaration.SELECTOR)
                            )
                    backend.add_sa(**arguments)
            for table, arguments in declaration.tables(document, "policy", declaration.POLICY):
                with declaration.at(table):
                    backend.add_policy(**arguments)
            if "identity" in top:
                backend.use_identities(StaticIdentities.of(document))
        return backend

    @property
    def drops_fragments(self) -> bool:
        """Always: its traffic has none."""
        return True

    # SAs

    def add_sa(
        self,
        *,
        src: str,
        dst: str,
        spi: int | None = None,
        proto: str | int = "esp",
        mode: str | Mode = Mode.TRANSPORT,
        reqid: int = 0,
        aead: str | None = None,
        encryption: str | None = None,
        authentication: str | None = None,
        compression: str | None = None,
        key_bits: int | None = None,
        icv_bits: int | None = None,
        auth_key_bits: int | None = None,
        selector: Selector | None = None,
        direction: str | Direction | None = None,
        mark: tuple[int, int] = (0, 0),
        set_mark: tuple[int, int] | None = None,
        if_id: int = 0,
        replay_window: int = 32,
        esn: bool = False,
        peer: IToken | str | None = None,
        local: IToken | str | None = None,
        identity_pending: bool = False,
    ) -> SA:
        """Declare an SA, or replace the one with the same key; return it.

        ``src`` and ``dst`` are the outer addresses; ``spi`` None takes a free one. ``proto`` is
        ``"esp"``, ``"ah"``, ``"comp"`` or an IP protocol number; ``mode`` a Mode or its name.
        Algorithms go by the kernel's names; ESP without any is AES-GCM, with an authenticator
        alone it encrypts nothing; AH is HMAC-SHA-256, IPComp deflate. ``key_bits`` is of the AEAD
        or cipher, with its salt. ``peer`` and ``local`` are the identities of the two ends, or text
        for :meth:`IToken.named`; with ``identity_pending`` they are yet to come, by
        :meth:`identify`. Raises ValueError for what the kernel does not know.
        """
        ends = None if identity_pending else _identities(local, peer)
        if identity_pending and (peer is not None or local is not None):
            raise ValueError("identity_pending excludes peer and local")
        number = number_of(PROTOS, proto, "proto", 255)
        if spi is not None:
            self._chosen.add(spi)
        if aead and (encryption or authentication):
            raise ValueError("aead excludes encryption and authentication")
        if not (aead or encryption or authentication or compression):
            aead = "rfc4106(gcm(aes))" if number == IPPROTO_ESP else None
            authentication = "hmac(sha256)" if number == IPPROTO_AH else None
            compression = "deflate" if number == IPPROTO_COMP else None
        if number == IPPROTO_ESP and not aead and not encryption:
            encryption = NULL_CIPHER
        return self._put(
            SA(
                source=pack_address(src),
                destination=pack_address(dst),
                proto=number,
                spi=self._free_spi() if spi is None else within(spi, "spi", _MAX),
                mode=Mode(number_of(_MODES, mode, "mode", len(_MODES) - 1)),
                reqid=within(reqid, "reqid", _MAX),
                aead=_algorithm(AEADS, aead, "aead", key_bits, icv_bits),
                encryption=_algorithm(CIPHERS, encryption, "encryption", key_bits, None),
                authentication=_algorithm(
                    AUTHENTICATORS, authentication, "authentication", auth_key_bits, icv_bits
                ),
                compression=_algorithm(COMPRESSORS, compression, "compression", None, None),
                selector=selector or Selector(),
                direction=None
                if direction is None
                else Direction(number_of(_DIRECTIONS, direction, "direction", 1)),
                mark=Mark(*mark),
                set_mark=None if set_mark is None else Mark(*set_mark),
                if_id=within(if_id, "if_id", _MAX),
                replay_window=replay_window,
                esn=esn,
            ),
            ends,
        )

    def rekey(self, sa: SA, **changes: Any) -> SA:
        """Put a new SA beside an old one, with a fresh SPI and with ``changes``, fields of SA.

        The old one stays until it is deleted, as with IKE. The new one has its identities, unless
        ``peer``, ``local`` or ``identity_pending`` say otherwise, as in :meth:`add_sa`.
        """
        ends = self._ends.get(id(self._sas.get(sa.key)), UNIDENTIFIED)
        if changes.pop("identity_pending", False):
            ends = None
        if "peer" in changes or "local" in changes:
            old = ends or UNIDENTIFIED
            local, peer = changes.pop("local", old.local), changes.pop("peer", old.peer)
            ends = _identities(local, peer)
        if "spi" in changes:
            self._chosen.add(changes["spi"])
        else:
            changes["spi"] = self._free_spi()
        return self._put(replace(sa, **changes), ends)

    def identify(
        self, sa: SA, *, peer: IToken | str | None = None, local: IToken | str | None = None
    ) -> None:
        """Say who is at the ends of an SA from now on, as :meth:`add_sa` does.

        Raises KeyError where there is none with its key, ValueError for text that names nobody.
        """
        ends = _identities(local, peer)
        with self._lock:
            self._name(self._sas[sa.key], ends)
            self.identities_changed()

    def delete_sa(self, sa: SA) -> None:
        """Delete an SA. Raises KeyError where there is none with its key."""
        with self._lock:
            self._part_with(self._sas.pop(sa.key))
            self._tell(SADeleted(sa.key))

    def expire(self, sa: SA, *, hard: bool = True) -> None:
        """Let an SA expire: hard, and it is gone; soft, and it still works.

        Raises KeyError where there is none with its key.
        """
        with self._lock:
            sa = self._sas.pop(sa.key) if hard else self._sas[sa.key]
            if hard:
                self._part_with(sa)
            self._tell(SAExpired(sa, hard))

    def flush_sas(self, proto: str | int = 0) -> None:
        """Delete all SAs, or those of one protocol."""
        number = number_of(PROTOS, proto, "proto", 255)
        with self._lock:
            for key in [key for key in self._sas if number in (0, key.proto)]:
                self._part_with(self._sas.pop(key))
            self._tell(SAsFlushed(number))

    # Policies

    def add_policy(
        self,
        *,
        src: str = "any",
        dst: str = "any",
        direction: str | Direction = Direction.IN,
        proto: str | int = 0,
        src_port: int = 0,
        dst_port: int = 0,
        priority: int = 0,
        action: str | PolicyAction = PolicyAction.ALLOW,
        template: str | int | None = "esp",
        mode: str | Mode = Mode.TRANSPORT,
        reqid: int = 0,
        tunnel_src: str = "",
        tunnel_dst: str = "",
        optional: bool = False,
        ifindex: int = 0,
        mark: tuple[int, int] = (0, 0),
        if_id: int = 0,
        kind: int = 0,
    ) -> Policy:
        """Declare a policy, or replace the one with the same key; return it.

        ``src``, ``dst``, ``proto`` and the ports are :func:`selector`'s. ``template`` is the
        protocol that the policy demands, or the string ``"none"`` or None for none; ``tunnel_src``
        and ``tunnel_dst`` are the template's outer addresses; ``optional`` is its level *use*.
        ``kind`` is 0 for a main policy, 1 for a sub policy. Raises ValueError.
        """
        templates: tuple[Template, ...] = ()
        if template is not None and template != "none":
            templates = (
                Template(
                    proto=number_of(PROTOS, template, "template", 255),
                    mode=Mode(number_of(_MODES, mode, "mode", len(_MODES) - 1)),
                    reqid=within(reqid, "reqid", _MAX),
                    source=pack_address(tunnel_src) if tunnel_src else b"",
                    destination=pack_address(tunnel_dst) if tunnel_dst else b"",
                    optional=optional,
                ),
            )
        way = Direction(number_of(_DIRECTIONS, direction, "direction", 2))
        with self._lock:
            policy = Policy(
                selector=selector(src, dst, proto, src_port, dst_port, ifindex),
                direction=way,
                action=PolicyAction(number_of(_ACTIONS, action, "action", 1)),
                priority=within(priority, "priority", _MAX),
                index=next(self._indexes) | way,
                templates=templates,
                mark=Mark(*mark),
                if_id=within(if_id, "if_id", _MAX),
                kind=within(kind, "kind", 1),
            )
            self._policies[policy.key] = policy
            self._tell(PolicyAdded(policy))
            return policy

    def delete_policy(self, policy: Policy) -> None:
        """Delete a policy. Raises KeyError where there is none with its key."""
        with self._lock:
            del self._policies[policy.key]
            self._tell(PolicyDeleted(policy.key, policy.index))

    def flush_policies(self, kind: int = 0) -> None:
        """Delete all policies of a type (0: main)."""
        with self._lock:
            self._policies = {k: p for k, p in self._policies.items() if k.kind != kind}
            self._tell(PoliciesFlushed(kind))

    def set_default(self, action: str | PolicyAction) -> None:
        """Say what happens to inbound traffic that no policy covers: ``"allow"`` or ``"block"``."""
        inbound = PolicyAction(number_of(_ACTIONS, action, "default action", 1))
        with self._lock:
            self._defaults = DefaultActions(inbound, inbound, PolicyAction.ALLOW)
            self._tell(self._defaults)

    # Mishaps

    def hold_events(self) -> None:
        """Let events be late: what changes from now on is not told before release_events()."""
        with self._lock:
            if self._held is None:
                self._held = []

    def release_events(self) -> None:
        """Tell what was held."""
        with self._lock:
            held, self._held = self._held or [], None
            self.take(held)

    def lose_events(self) -> None:
        """Play an overrun: events are lost, and tokens are UNKNOWN until recover()."""
        with self._lock:
            self._lost = True
            self.mirror.begin_resync(self.clock())
            self.changed()

    def recover(self) -> None:
        """Read the tables again, after lose_events()."""
        with self._lock:
            self._lost = False
            self._held = None
            self._read_again()

    def lose_stamp(self) -> None:
        """Play a stamp that vanished."""
        self.set_generation(0)

    def restore_stamp(self) -> None:
        """Install the stamp again, as a new generation."""
        self.set_generation(next(self._generations))

    # The contract

    @property
    def netns_cookie(self) -> int | None:
        """None: these are no namespace's facts."""
        return None

    def templates(
        self,
        protocol: int,
        port: int,
        direction: Direction,
        *,
        local: bytes = b"",
        peer: bytes = b"",
        peer_port: int = 0,
    ) -> tuple[Bundle, ...]:
        """Return the policies' templates; a declared SA protects its ends without a policy."""
        with self._lock:
            found = super().templates(
                protocol, port, direction, local=local, peer=peer, peer_port=peer_port
            )
            joining = (sa for sa in self._sas.values() if _joins(sa, local, peer))
            applied = ((Template(proto=sa.proto, mode=sa.mode, reqid=sa.reqid),) for sa in joining)
            return tuple(dict.fromkeys((*found, *applied)))

    def applied(self, flow: Flow) -> Iterable[Bundle]:
        """Return the templates of the SAs declared for it; tunnels have to say ``"out"``."""
        return [
            (
                Template(
                    proto=sa.proto,
                    mode=sa.mode,
                    reqid=sa.reqid,
                    source=sa.source,
                    destination=sa.destination,
                ),
            )
            for sa in self._sas.values()
            if sa.proto in PROTECTING
            and not sa.larval
            and sa.direction is not Direction.IN
            and sa.selector.matches(flow)
            and (
                sa.direction is Direction.OUT
                if sa.mode in TUNNELS
                else (sa.source, sa.destination) == (flow.source, flow.destination)
            )
        ]

    async def register(self, protocol: int, port: int) -> Registration:
        """Have the played stamp cover a local port; it covers every one."""
        del protocol, port
        self.check_loop()
        return _Registration(lambda: self.resolver.generation)

    def resolve(self, evidence: Evidence) -> PToken:
        """Return the token for this evidence, under the stamp that it would have got."""
        with self._lock:
            if evidence.generation:
                newest = reversed(self._sas.values())
                spi = next((sa.spi for sa in newest if fits(sa, evidence)), 0)
                mark = int.from_bytes(spi.to_bytes(4, "big"), sys.byteorder)
                evidence = replace(evidence, mark=mark)
            return super().resolve(evidence)

    def ignores_ports(self, evidence: Evidence) -> bool:
        """False: which SA the played stamp writes may depend on them."""
        del evidence
        return False

    def lookup_missing(self, key: SAKey) -> bool:
        """Answer as GETSA would, unless events are held."""
        if self._held is not None:
            return False
        sa = self._sas.get(key)
        if sa is not None:
            self.mirror.apply(SAAdded(sa), self.clock())
        return True

    def identities_of(
        self, record: Record, now: float, direction: Direction = Direction.IN
    ) -> Answer:
        """Return what was declared of an SA, or will be."""
        del direction
        ends = self._ends.get(id(record.sa), record.identities or UNIDENTIFIED)
        if ends is not None:
            return ends
        until = record.added + PENDING_SECONDS
        return Awaited(until) if now <= until else UNIDENTIFIED

    # Inside

    def _put(self, sa: SA, ends: Identities | None) -> SA:
        with self._lock:
            # The newest stands at the end, where the stamp looks first.
            old = self._sas.pop(sa.key, None)
            if old is not None and self._part_with(old) != ends:
                # Alike or not, it is not the same SA.
                self._tell(SADeleted(sa.key))
            self._sas[sa.key] = sa
            self._name(sa, ends)
            self._tell(SAAdded(sa))
        return sa

    def _name(self, sa: SA, ends: Identities | None) -> None:
        self._ends[id(sa)] = ends
        if ends != UNIDENTIFIED:
            self.resolver.identified = True

    def _part_with(self, sa: SA) -> Identities | None:
        """Let the mirror remember whose an SA was that is no longer declared."""
        ends = self._ends.pop(id(sa))
        record = self.mirror.sad.get(sa.key)
        if record is not None and record.sa is sa:
            record.identities = ends
        return ends

    def _tell(self, event: Event) -> None:
        if self._held is None and not self._lost:
            self.take((event,))
            return
        if self._held is not None:
            self._held.append(event)
        # It is not told, but what comes from now on is stamped by it.
        self.mirror.bump()
        self.changed()

    def _read_again(self) -> None:
        now = self.clock()
        self.mirror.begin_resync(now)
        for sa in self._sas.values():
            self.mirror.load(SAAdded(sa), now)
        for policy in reversed(self._policies.values()):
            self.mirror.load(PolicyAdded(policy), now)
        self.mirror.load(self._defaults, now)
        self.mirror.finish_resync(now)
        self.changed()

    def _free_spi(self) -> int:
        with self._lock:
            return next(spi for spi in self._spis if spi not in self._chosen)


def _joins(sa: SA, local: bytes, peer: bytes) -> bool:
    """Whether an SA may protect traffic between two hosts, either way."""
    if sa.proto not in PROTECTING:
        return False
    return sa.mode in TUNNELS or {local, peer} <= {sa.source, sa.destination, b""}


def _identities(local: IToken | str | None, peer: IToken | str | None) -> Identities:
    named = (IToken.named(end) if isinstance(end, str) else end for end in (local, peer))
    return Identities(*named)


def _algorithm(
    known: Mapping[str, tuple[int, int]],
    name: str | None,
    what: str,
    key_bits: int | None,
    icv_bits: int | None,
) -> Algorithm | None:
    if name is None:
        return None
    if name not in known:
        raise ValueError(f"unknown {what} algorithm {name!r}; there are {', '.join(sorted(known))}")
    key, icv = known[name]
    return Algorithm(
        name, key if key_bits is None else key_bits, icv if icv_bits is None else icv_bits
    )


def _network(text: str) -> tuple[bytes, int]:
    if text == "any":
        return b"", 0
    network = ip_network(text, strict=False)
    packed = network.network_address.packed
    address = unmap(packed)
    return address, network.prefixlen - 8 * (len(packed) - len(address))
