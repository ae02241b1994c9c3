"""Enumerations, with the values of RFC 2367 or of the kernel's headers where those have them."""

from __future__ import annotations

from enum import IntEnum

__all__ = [
    "Assurance",
    "AuthAlgorithm",
    "Direction",
    "EncryptionAlgorithm",
    "Mode",
    "PolicyAction",
    "SAType",
]


class Assurance(IntEnum):
    """How sure a token is of what it says, weakest first. Comparisons order them.

    ``INTERFACE``, ``ENFORCED`` and ``EXACT`` count as proof; ``POLICY`` is inference and counts
    only on a backend opened with ``trust_policy=True``.
    """

    UNKNOWN = 0
    """Nothing can be said: pending, lost events, truncated evidence, or contradicting evidence."""
    NONE = 1
    """Known to be clear."""
    POLICY = 2
    """The inbound SPD admits this flow only under a template."""
    INTERFACE = 3
    """It came in through an xfrm interface."""
    ENFORCED = 4
    """A socket policy of ours has let nothing else in since before bind or listen."""
    EXACT = 5
    """The kernel stamped this datagram, or this connection's handshake, with its SA."""


class SAType(IntEnum):
    """Type of a security association: ``SADB_SATYPE_*`` (RFC 2367, 3.5; linux/pfkeyv2.h)."""

    UNSPEC = 0
    AH = 2
    ESP = 3
    IPCOMP = 9


class AuthAlgorithm(IntEnum):
    """``SADB_AALG_*`` (RFC 2367, 3.5; linux/pfkeyv2.h)."""

    NONE = 0
    MD5HMAC = 2
    SHA1HMAC = 3
    SHA2_256HMAC = 5
    SHA2_384HMAC = 6
    SHA2_512HMAC = 7
    RIPEMD160HMAC = 8
    AES_XCBC_MAC = 9
    SM3_256HMAC = 10
    NULL = 251


class EncryptionAlgorithm(IntEnum):
    """``SADB_EALG_*`` (RFC 2367, 3.5; linux/pfkeyv2.h)."""

    NONE = 0
    DESCBC = 2
    TRIPLE_DESCBC = 3
    CASTCBC = 6
    BLOWFISHCBC = 7
    NULL = 11
    AESCBC = 12
    AESCTR = 13
    AES_CCM_ICV8 = 14
    AES_CCM_ICV12 = 15
    AES_CCM_ICV16 = 16
    AES_GCM_ICV8 = 18
    AES_GCM_ICV12 = 19
    AES_GCM_ICV16 = 20
    CAMELLIACBC = 22
    NULL_AES_GMAC = 23
    SM4CBC = 24
    SERPENTCBC = 252
    TWOFISHCBC = 253


class Mode(IntEnum):
    """``XFRM_MODE_*`` (linux/xfrm.h)."""

    TRANSPORT = 0
    TUNNEL = 1
    ROUTE_OPTIMIZATION = 2
    IN_TRIGGER = 3
    BEET = 4
    IPTFS = 5


class Direction(IntEnum):
    """``XFRM_POLICY_*`` (linux/xfrm.h). An SA's own direction is IN or OUT."""

    IN = 0
    OUT = 1
    FWD = 2


class PolicyAction(IntEnum):
    """``XFRM_POLICY_ALLOW`` and ``XFRM_POLICY_BLOCK`` (linux/xfrm.h)."""

    ALLOW = 0
    BLOCK = 1
