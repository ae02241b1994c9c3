"""Security associations as facts: what the kernel says of one, without its keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .compact import compact
from .enums import Direction, Mode
from .flow import Mark, Selector, format_address

__all__ = [
    "IPPROTO_AH",
    "IPPROTO_COMP",
    "IPPROTO_ESP",
    "SA",
    "Algorithm",
    "Encapsulation",
    "Lifetime",
    "Offload",
    "SAKey",
    "Usage",
]

IPPROTO_ESP = 50
IPPROTO_AH = 51
IPPROTO_COMP = 108

_PROTO_NAMES = {IPPROTO_ESP: "esp", IPPROTO_AH: "ah", IPPROTO_COMP: "comp"}

# Names under which the kernel and its tools know the cipher that encrypts nothing.
_NULL_CIPHERS = frozenset({"", "cipher_null", "ecb(cipher_null)"})
# … and the authenticator that authenticates nothing.
_NULL_AUTHENTICATORS = frozenset({"", "digest_null"})
# Authenticated, not encrypted, although configured as AEAD (RFC 4543).
_GMAC = frozenset({"rfc4543(gcm(aes))"})


@dataclass(frozen=True, slots=True)
class Algorithm:
    """An algorithm by its kernel name, key length and ICV length in bits (0: not given).

    ``key_bits`` is the length as configured, which for RFC 4106/4309/4543 AEADs and AES-CTR
    includes the salt or nonce; ``strength_bits`` is the length without it.
    """

    name: str
    key_bits: int = 0
    icv_bits: int = 0

    @property
    def strength_bits(self) -> int:
        """Key length in bits without salt or nonce."""
        salt = 0
        if self.name.startswith(("rfc4106(", "rfc4543(", "rfc3686(", "rfc7539esp(")):
            salt = 32
        elif self.name.startswith("rfc4309("):
            salt = 24
        return max(0, self.key_bits - salt)

    def __str__(self) -> str:
        icv = f"/{self.icv_bits}" if self.icv_bits else ""
        return f"{self.name}-{self.strength_bits}{icv}" if self.key_bits else self.name


class Encapsulation(NamedTuple):
    """UDP or TCP encapsulation (``struct xfrm_encap_tmpl``, RFC 3948, RFC 8229).

    ``kind`` is UDP_ENCAP_ESPINUDP (2), UDP_ENCAP_ESPINUDP_NON_IKE (1) or TCP_ENCAP_ESPINTCP (7).
    ``original`` is the packed address before NAT, ``b""`` where not known.
    """

    kind: int
    source_port: int
    destination_port: int
    original: bytes = b""


class Offload(NamedTuple):
    """Hardware offload (``struct xfrm_user_offload``): of whole packets, or of crypto alone."""

    ifindex: int
    inbound: bool
    packet: bool


class Lifetime(NamedTuple):
    """Limits (``struct xfrm_lifetime_cfg``): bytes, packets, seconds since added or first used.

    None is no limit.
    """

    soft_bytes: int | None = None
    hard_bytes: int | None = None
    soft_packets: int | None = None
    hard_packets: int | None = None
    soft_add_seconds: int | None = None
    hard_add_seconds: int | None = None
    soft_use_seconds: int | None = None
    hard_use_seconds: int | None = None


class Usage(NamedTuple):
    """What was used when the kernel told (``struct xfrm_lifetime_cur``); times in epoch seconds."""

    bytes: int = 0
    packets: int = 0
    add_time: int = 0
    use_time: int = 0


class SAKey(NamedTuple):
    """What tells SAs apart in the kernel: destination, protocol, SPI, mark and interface id."""

    destination: bytes
    proto: int
    spi: int
    mark: Mark = Mark()
    if_id: int = 0


_NO_SELECTOR = Selector()


@compact(
    "destination",
    "spi",
    "source",
    "reqid",
    "mark",
    "if_id",
    "encapsulation",
    "selector",
    "usage",
)
@dataclass(frozen=True, kw_only=True)
class SA:
    """A security association (RFC 4301 4.4.2; ``struct xfrm_usersa_info`` and its attributes).

    ``source`` and ``destination`` are the packed outer addresses; ``proto`` is the IP protocol
    number; ``spi`` is in host order, an IPComp CPI likewise. ``direction`` is None where the kernel
    does not tell (before 6.10). It holds no key.
    """

    destination: bytes
    proto: int
    spi: int
    source: bytes = b""
    mode: Mode = Mode.TRANSPORT
    reqid: int = 0
    mark: Mark = Mark()
    if_id: int = 0
    encryption: Algorithm | None = None
    authentication: Algorithm | None = None
    aead: Algorithm | None = None
    compression: Algorithm | None = None
    encapsulation: Encapsulation | None = None
    selector: Selector = _NO_SELECTOR
    replay_window: int = 0
    esn: bool = False
    lifetime: Lifetime = Lifetime()
    usage: Usage = Usage()
    direction: Direction | None = None
    set_mark: Mark | None = None
    offload: Offload | None = None
    flags: int = 0
    extra_flags: int = 0

    @property
    def key(self) -> SAKey:
        """The kernel's key of this SA."""
        return SAKey(self.destination, self.proto, self.spi, self.mark, self.if_id)

    @property
    def src(self) -> str:
        """The outer source address as text."""
        return format_address(self.source)

    @property
    def dst(self) -> str:
        """The outer destination address as text."""
        return format_address(self.destination)

    @property
    def encrypts(self) -> bool:
        """Whether it keeps payloads private: ESP with a cipher that is not null."""
        if self.proto != IPPROTO_ESP:
            return False
        if self.aead is not None:
            return self.aead.name not in _GMAC
        return self.encryption is not None and self.encryption.name not in _NULL_CIPHERS

    @property
    def authenticates(self) -> bool:
        """Whether it protects integrity: ESP or AH with an authenticator that is not null."""
        if self.proto not in (IPPROTO_ESP, IPPROTO_AH):
            return False
        if self.proto == IPPROTO_ESP and self.aead is not None:
            return True
        return (
            self.authentication is not None and self.authentication.name not in _NULL_AUTHENTICATORS
        )

    @property
    def algorithms(self) -> tuple[Algorithm | None, Algorithm | None, Algorithm | None]:
        """AEAD, encryption and authentication, each None where absent."""
        return self.aead, self.encryption, self.authentication

    @property
    def larval(self) -> bool:
        """Whether it only waits for keys (an acquire, or an allocated SPI): never protection."""
        return self.spi == 0 or (
            self.aead is self.encryption is self.authentication is None
            and self.proto in (IPPROTO_ESP, IPPROTO_AH)
        )

    def __str__(self) -> str:
        proto = _PROTO_NAMES.get(self.proto, str(self.proto))
        algorithms = "+".join(str(a) for a in self.algorithms if a is not None)
        return (
            f"{proto}/{self.mode.name.lower()} spi {self.spi:#010x} reqid {self.reqid} "
            f"{self.src} → {self.dst} {algorithms}"
        ).rstrip()
