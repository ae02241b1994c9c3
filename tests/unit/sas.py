"""SAs, policies and evidence for tests of the engine."""

from __future__ import annotations

import sys

from ipsec_aio.enums import Mode
from ipsec_aio.evidence import IPPROTO_UDP, Evidence
from ipsec_aio.flow import Selector, pack_address
from ipsec_aio.policy import Policy, Template
from ipsec_aio.sa import IPPROTO_AH, IPPROTO_COMP, IPPROTO_ESP, SA, Algorithm

LOCAL, PEER, OTHER = (pack_address(f"192.0.2.{n}") for n in (1, 2, 3))
GATE, FAR = pack_address("198.51.100.1"), pack_address("198.51.100.2")

NOW = 1 << 30
"""More than the changes that any test makes."""

GCM = Algorithm("rfc4106(gcm(aes))", 160, 128)
GMAC = Algorithm("rfc4543(gcm(aes))", 160, 128)
CBC = Algorithm("cbc(aes)", 128)
NULL = Algorithm("ecb(cipher_null)")
SHA = Algorithm("hmac(sha256)", 256, 128)


def esp(spi=0x1001, source=PEER, destination=LOCAL, **fields) -> SA:
    """ESP in transport mode with AES-GCM, unless told otherwise."""
    if not fields.keys() & {"aead", "encryption", "authentication"}:
        fields["aead"] = GCM
    return SA(source=source, destination=destination, proto=IPPROTO_ESP, spi=spi, **fields)


def null(spi=0x1001, source=PEER, destination=LOCAL, **fields) -> SA:
    """ESP that encrypts nothing."""
    return esp(spi, source, destination, encryption=NULL, authentication=SHA, **fields)


def ah(spi=0x1001, source=PEER, destination=LOCAL, **fields) -> SA:
    return SA(
        source=source,
        destination=destination,
        proto=IPPROTO_AH,
        spi=spi,
        authentication=SHA,
        **fields,
    )


def comp(spi=0x1001, source=PEER, destination=LOCAL, **fields) -> SA:
    deflate = Algorithm("deflate")
    return SA(
        source=source,
        destination=destination,
        proto=IPPROTO_COMP,
        spi=spi,
        compression=deflate,
        **fields,
    )


def tunnel(spi=0x1001, **fields) -> SA:
    return esp(spi, FAR, GATE, mode=Mode.TUNNEL, **fields)


def larval(spi=0, proto=IPPROTO_ESP, source=PEER, destination=LOCAL) -> SA:
    return SA(source=source, destination=destination, proto=proto, spi=spi)


def protect(*templates: Template, priority=10, index=8, **fields) -> Policy:
    """A policy that admits inbound traffic under these templates alone."""
    fields.setdefault("selector", Selector(family=2))
    return Policy(templates=templates or (Template(),), priority=priority, index=index, **fields)


def seen(spi=0, *, local=LOCAL, peer=PEER, generation=1, **fields) -> Evidence:
    """Evidence of a datagram that was stamped with an SPI, and waited in no queue."""
    mark = int.from_bytes(spi.to_bytes(4, "big"), sys.byteorder)
    return Evidence(
        fields.pop("protocol", IPPROTO_UDP),
        local,
        fields.pop("local_port", 5000),
        peer,
        fields.pop("peer_port", 40000),
        fields.pop("mark", mark),
        generation,
        **{"after": NOW} | fields,
    )
