"""The memory backend: SAs and policies declared in Python or TOML, mishaps played on demand.

Rules:

* It keeps two things apart, as the kernel and its observers are: what is declared, and what the
  mirror has been told. Lost and held events make the difference.
* It plays the stamp: traffic from a peer to a local address carries the SPI of the newest declared
  inbound SA that fits, or mark 0. From there on it is the same resolver as everywhere.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_network
from itertools import count
from typing import TYPE_CHECKING, Any

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
from ipsec_aio.policy import Policy, PolicyKey, Template
from ipsec_aio.sa import IPPROTO_AH, IPPROTO_COMP, IPPROTO_ESP, SA, Algorithm, SAKey
from ipsec_aio.truth import fits

from .contract import Registration
from .tables import TableBackend

if TYPE_CHECKING:
    from ipsec_aio.evidence import Evidence
    from ipsec_aio.tokens import PToken

__all__ = ["MemoryBackend"]

_PROTOS = {"esp": IPPROTO_ESP, "ah": IPPROTO_AH, "comp": IPPROTO_COMP}
_LAYER4 = {"any": 0, "icmp": 1, "tcp": 6, "udp": 17, "icmpv6": 58, "sctp": 132}
_MODES = {mode.name.lower(): mode for mode in Mode}
_DIRECTIONS = {d.name.lower(): d for d in Direction}
_ACTIONS = {a.name.lower(): a for a in PolicyAction}

# Kernel names (net/xfrm/xfrm_algo.c): key bits that are usual, and ICV bits.
_AEAD = {
    "rfc4106(gcm(aes))": (160, 128),
    "rfc4309(ccm(aes))": (152, 128),
    "rfc4543(gcm(aes))": (160, 128),
    "rfc7539esp(chacha20,poly1305)": (288, 128),
}
_ENCRYPTION = {
    "ecb(cipher_null)": (0, 0),
    "cbc(aes)": (128, 0),
    "rfc3686(ctr(aes))": (160, 0),
    "cbc(des3_ede)": (192, 0),
    "cbc(des)": (64, 0),
    "cbc(camellia)": (128, 0),
    "cbc(serpent)": (128, 0),
    "cbc(twofish)": (128, 0),
    "cbc(blowfish)": (128, 0),
    "cbc(cast5)": (128, 0),
    "cbc(sm4)": (128, 0),
}
_AUTHENTICATION = {
    "digest_null": (0, 0),
    "hmac(md5)": (128, 96),
    "hmac(sha1)": (160, 96),
    "hmac(sha256)": (256, 128),
    "hmac(sha384)": (384, 192),
    "hmac(sha512)": (512, 256),
    "hmac(rmd160)": (160, 96),
    "hmac(sm3)": (256, 128),
    "xcbc(aes)": (128, 96),
    "cmac(aes)": (128, 96),
}
_COMPRESSION = {"deflate": (0, 0), "lzs": (0, 0), "lzjh": (0, 0)}


class _Registration(Registration):
    """A registration of a stamp that is only played."""

    def __init__(self, backend: MemoryBackend) -> None:
        self._backend = backend

    @property
    def generation(self) -> int:
        return self._backend.generation

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

    It works unopened, on any loop and on several, and as ``async with``. Addresses are text.
    """

    name = "memory"

    def __init__(self, *, trust_policy: bool = False) -> None:
        super().__init__(trust_policy=trust_policy)
        self._sas: dict[SAKey, SA] = {}
        self._policies: dict[PolicyKey, Policy] = {}
        self._defaults = DefaultActions(PolicyAction.ALLOW, PolicyAction.ALLOW, PolicyAction.ALLOW)
        self._spis = count(0x1001)
        self._indexes = count(8, 8)
        self._generations = count(1)
        self._held: list[Event] | None = None
        self._lost = False
        self.generation = 0
        # Traffic is stamped by what is declared, so that any change may change the stamp.
        self.mirror.always_bump = True
        self._resync()
        self.restore_stamp()

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
    ) -> SA:
        """Declare an SA, or replace the one with the same key; return it.

        ``src`` and ``dst`` are the outer addresses; ``spi`` None takes a free one. ``proto`` is
        ``"esp"``, ``"ah"``, ``"comp"`` or an IP protocol number; ``mode`` a Mode or its name.
        Algorithms go by their kernel names; ESP without any is AES-GCM, AH is HMAC-SHA-256,
        IPComp is deflate. ``key_bits`` is of the AEAD or cipher, with its salt. Raises ValueError
        for what the kernel does not know.
        """
        number = _name(_PROTOS, proto, "proto")
        if not (aead or encryption or authentication or compression):
            aead = "rfc4106(gcm(aes))" if number == IPPROTO_ESP else None
            authentication = "hmac(sha256)" if number == IPPROTO_AH else None
            compression = "deflate" if number == IPPROTO_COMP else None
        if aead and (encryption or authentication):
            raise ValueError("an AEAD excludes 'encryption' and 'authentication'")
        if number == IPPROTO_ESP and not aead and not encryption:
            encryption = "ecb(cipher_null)"
        destination = pack_address(dst)
        sa = SA(
            source=pack_address(src),
            destination=destination,
            proto=number,
            spi=self._free_spi() if spi is None else _number(spi, "spi", 0xFFFFFFFF),
            mode=Mode(_name(_MODES, mode, "mode")),
            reqid=reqid,
            aead=_algorithm(_AEAD, aead, "AEAD", key_bits, icv_bits),
            encryption=_algorithm(_ENCRYPTION, encryption, "encryption", key_bits, None),
            authentication=_algorithm(
                _AUTHENTICATION, authentication, "authentication", auth_key_bits, icv_bits
            ),
            compression=_algorithm(_COMPRESSION, compression, "compression", None, None),
            selector=selector or Selector(),
            direction=None
            if direction is None
            else Direction(_name(_DIRECTIONS, direction, "direction")),
            mark=Mark(*mark),
            set_mark=None if set_mark is None else Mark(*set_mark),
            if_id=if_id,
            replay_window=replay_window,
            esn=esn,
        )
        # The newest goes to the end, which is where the stamp looks first.
        self._sas.pop(sa.key, None)
        self._sas[sa.key] = sa
        self._tell(SAAdded(sa))
        return sa

    def delete_sa(self, sa: SA) -> None:
        """Delete an SA. Raises KeyError where there is none with its key."""
        del self._sas[sa.key]
        self._tell(SADeleted(sa.key))

    def expire(self, sa: SA, *, hard: bool = True) -> None:
        """Let an SA expire: hard, and it is gone; soft, and it still works."""
        if hard:
            del self._sas[sa.key]
        self._tell(SAExpired(sa, hard))

    def rekey(self, sa: SA, **changes: Any) -> SA:
        """Put a new SA beside an old one, with a fresh SPI and the given fields changed.

        The old one stays until it is deleted, as with IKE. ``changes`` are fields of SA.
        """
        new = replace(sa, **({"spi": self._free_spi()} | changes))
        self._sas.pop(new.key, None)
        self._sas[new.key] = new
        self._tell(SAAdded(new))
        return new

    def flush_sas(self, proto: str | int = 0) -> None:
        """Delete all SAs, or those of one protocol."""
        number = _name(_PROTOS, proto, "proto")
        self._sas = {k: s for k, s in self._sas.items() if number not in (0, k.proto)}
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

        ``src`` and ``dst`` are networks (``"192.0.2.0/24"``), addresses or ``"any"``; ``template``
        is the protocol that the policy demands, None for none; ``tunnel_src`` and ``tunnel_dst``
        are the template's outer addresses; ``optional`` is its level *use*.
        """
        templates: tuple[Template, ...] = ()
        if template is not None:
            templates = (
                Template(
                    proto=_name(_PROTOS, template, "template"),
                    mode=Mode(_name(_MODES, mode, "mode")),
                    reqid=reqid,
                    source=pack_address(tunnel_src) if tunnel_src else b"",
                    destination=pack_address(tunnel_dst) if tunnel_dst else b"",
                    optional=optional,
                ),
            )
        way = Direction(_name(_DIRECTIONS, direction, "direction"))
        policy = Policy(
            selector=_selector(
                src, dst, _name(_LAYER4, proto, "proto"), src_port, dst_port, ifindex
            ),
            direction=way,
            action=PolicyAction(_name(_ACTIONS, action, "action")),
            priority=priority,
            index=next(self._indexes) | way,
            templates=templates,
            mark=Mark(*mark),
            if_id=if_id,
            kind=kind,
        )
        self._policies[policy.key] = policy
        self._tell(PolicyAdded(policy))
        return policy

    def delete_policy(self, policy: Policy) -> None:
        """Delete a policy. Raises KeyError where there is none with its key."""
        del self._policies[policy.key]
        self._tell(PolicyDeleted(policy.key, policy.index))

    def flush_policies(self, kind: int = 0) -> None:
        """Delete all policies of a type (0: main)."""
        self._policies = {k: p for k, p in self._policies.items() if k.kind != kind}
        self._tell(PoliciesFlushed(kind))

    def set_default(self, inbound: str | PolicyAction) -> None:
        """Say what happens to inbound traffic that no policy covers."""
        action = PolicyAction(_name(_ACTIONS, inbound, "action"))
        self._defaults = DefaultActions(action, action, PolicyAction.ALLOW)
        self._tell(self._defaults)

    # Mishaps

    def hold_events(self) -> None:
        """Let events be late: what is declared from now on is not seen before release_events()."""
        if self._held is None:
            self._held = []

    def release_events(self) -> None:
        """Deliver the events that were held."""
        held, self._held = self._held or [], None
        self.take(held)

    def lose_events(self) -> None:
        """Play an overrun: events are lost and tokens UNKNOWN until recover()."""
        self._lost = True
        self.mirror.begin_resync(self.clock())
        self.changed()

    def recover(self) -> None:
        """Read the tables again after lose_events()."""
        self._lost = False
        self._held = None
        self._resync()

    def lose_stamp(self) -> None:
        """Play a stamp rule that vanished."""
        self.generation = 0
        self.set_generation(0)

    def restore_stamp(self) -> None:
        """Install the stamp again, as a new generation."""
        self.generation = next(self._generations)
        self.set_generation(self.generation)

    # The contract

    @property
    def netns_cookie(self) -> int | None:
        """None: these are no namespace's facts."""
        return None

    async def register(self, protocol: int, port: int) -> Registration:
        """Register a port; every port is covered."""
        del protocol, port
        self.check()
        return _Registration(self)

    def resolve(self, evidence: Evidence) -> PToken:
        """Return the token for this evidence, as the played stamp would have it."""
        if evidence.generation:
            sa = next((s for s in self._newest() if fits(s, evidence)), None)
            spi = 0 if sa is None else sa.spi
            mark = int.from_bytes(spi.to_bytes(4, "big"), sys.byteorder)
            evidence = replace(evidence, mark=mark)
        return super().resolve(evidence)

    def lookup_missing(self, key: SAKey) -> bool:
        """Answer as GETSA would, unless events are held."""
        if self._held is not None:
            return False
        sa = self._sas.get(key)
        if sa is not None:
            self.mirror.apply(SAAdded(sa), self.clock())
        return True

    # Inside

    def _newest(self) -> Iterator[SA]:
        return reversed(self._sas.values())

    def _tell(self, event: Event) -> None:
        if self._lost:
            return
        if self._held is not None:
            self._held.append(event)
        else:
            self.take((event,))

    def _resync(self) -> None:
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
        used = {key.spi for key in self._sas}
        return next(spi for spi in self._spis if spi not in used)


def _name(names: dict[str, Any], value: str | int, what: str) -> int:
    if isinstance(value, str):
        if value not in names:
            raise ValueError(f"unknown {what} {value!r}; there are {', '.join(sorted(names))}")
        return int(names[value])
    return int(value)


def _number(value: int, what: str, limit: int) -> int:
    if not 0 <= value <= limit:
        raise ValueError(f"{what} {value} is not between 0 and {limit}")
    return value


def _algorithm(
    known: dict[str, tuple[int, int]],
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


def _selector(
    src: str, dst: str, proto: int, src_port: int, dst_port: int, ifindex: int
) -> Selector:
    source, source_prefix = _network(src)
    destination, destination_prefix = _network(dst)
    sizes = {len(a) for a in (source, destination) if a}
    if len(sizes) > 1:
        raise ValueError(f"{src} and {dst} are of different families")
    return Selector(
        source=source,
        destination=destination,
        source_prefix=source_prefix,
        destination_prefix=destination_prefix,
        source_port=src_port,
        source_port_mask=0xFFFF if src_port else 0,
        destination_port=dst_port,
        destination_port_mask=0xFFFF if dst_port else 0,
        proto=proto,
        family={4: 2, 16: 10}[sizes.pop()] if sizes else 0,
        ifindex=ifindex,
    )


def _network(text: str) -> tuple[bytes, int]:
    if text == "any":
        return b"", 0
    network = ip_network(text, strict=False)
    return unmap(network.network_address.packed), network.prefixlen
