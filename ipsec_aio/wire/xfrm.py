"""NETLINK_XFRM messages as values: SAs, policies and what happens to them (linux/xfrm.h).

Rules:

* Keys stay where they are. Of an algorithm only its header is unpacked: name, key length, ICV
  length, all at fixed offsets before the key. Whoever owns the buffer overwrites it afterwards.
* Malformed input raises CodecError and nothing else; its text carries no byte of the payload.
* Unknown attributes are skipped, as the kernel adds new ones. An unknown message type, mode,
  direction or action is a CodecError: a table that was read past it would not be true, so the
  backend reads everything again, or says UNKNOWN. Unknown protocols are kept, as numbers.
* Addresses have their family's length. An IPv4-mapped IPv6 address inside an SA or a policy is
  *not* unmapped: the kernel never applies such a record to IPv4 traffic, so it must not match any.
* DELSA, DELPOLICY, EXPIRE and POLEXPIRE name a record; what they say beside its key is not
  complete (EXPIRE has no algorithms). UPDSA says what was asked for, not what came of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from struct import Struct, calcsize
from typing import Any, cast

from ..enums import Direction, Mode, PolicyAction
from ..errors import CodecError
from ..events import (
    DefaultActions,
    Event,
    PoliciesFlushed,
    PolicyAdded,
    PolicyDeleted,
    PolicyExpired,
    SAAdded,
    SADeleted,
    SAExpired,
    SAMapped,
    SAMigrated,
    SAsFlushed,
)
from ..flow import Mark, Selector
from ..policy import Policy, Template
from ..sa import SA, Algorithm, Encapsulation, Lifetime, Offload, SAKey, Usage
from .netlink import NLM_F_DUMP, Buffer, Message, attribute, attributes, request

__all__ = [
    "FIRST_TYPE",
    "GROUPS",
    "NETLINK_XFRM",
    "decode",
    "dump_policies",
    "dump_sas",
    "get_default",
    "get_sa",
]

NETLINK_XFRM = 6
FIRST_TYPE = 0x10
"""Message types below are netlink's own."""
GROUPS = (2, 3, 4, 7)
"""XFRMNLGRP_EXPIRE, _SA, _POLICY and _MIGRATE: whatever changes a table.

_MAPPING (8) is not among them: the kernel tells of a peer's new address with each packet, before
anybody believed it, and moves nothing. Whoever keys the SA does, and that is told.
"""

_AF_INET = 2
_AF_INET6 = 10

_NEWSA = 0x10
_DELSA = 0x11
_GETSA = 0x12
_NEWPOLICY = 0x13
_DELPOLICY = 0x14
_GETPOLICY = 0x15
_ACQUIRE = 0x17
_EXPIRE = 0x18
_UPDPOLICY = 0x19
_UPDSA = 0x1A
_POLEXPIRE = 0x1B
_FLUSHSA = 0x1C
_FLUSHPOLICY = 0x1D
_NEWAE = 0x1E
_REPORT = 0x20
_MIGRATE = 0x21
_MAPPING = 0x26
_SETDEFAULT = 0x27
_GETDEFAULT = 0x28

_ALG_AUTH = 1
_ALG_CRYPT = 2
_ALG_COMP = 3
_ENCAP = 4
_TMPL = 5
_SA = 6
_POLICY = 7
_SEC_CTX = 8
_POLICY_TYPE = 16
_MIGRATE_ATTRIBUTE = 17
_ALG_AEAD = 18
_ALG_AUTH_TRUNC = 20
_MARK = 21
_REPLAY_ESN_VAL = 23
_SA_EXTRA_FLAGS = 24
_OFFLOAD_DEV = 28
_SET_MARK = 29
_SET_MARK_MASK = 30
_IF_ID = 31
_SA_DIR = 33

_STATE_ESN = 128
_OFFLOAD_INBOUND = 2
_OFFLOAD_PACKET = 4
_INFINITE = (1 << 64) - 1

# Native alignment ("@"), as the kernel's structures have it; "0Q" pads their ends.
_SELECTOR = Struct("@16s16s8sHBBB3xiI")
_LIMITS = Struct("@8Q")
_USED = Struct("@4Q")
_U32 = Struct("=I")
_PORTS = Struct(">4H")
_USERSA_INFO = Struct("@56s16s4sB3x16s64s32s16xIHBBB0Q")
_USERSA_ID = Struct("@16s4sHBx")
_USERPOLICY_INFO = Struct("@56s64s32sIIBBBB0Q")
_USERPOLICY_ID = Struct("@56sIB0I")
_TEMPLATE = Struct("@16s4sB3xHxx16sIBBB3I")
_MAPPING_INFO = Struct("@16s4sHBxI16s16s2s2s")
_MIGRATE_INFO = Struct("@16s16s16s16sBBxxIHH")
_ENCAPSULATION = Struct("@H2s2sxx16s")
_ALGORITHM = Struct("@64sI")
_ALGORITHM_ICV = Struct("@64sII")
_MARK_PAIR = Struct("@II")
_OFFLOAD = Struct("@iB0i")
_CONTEXT = Struct("@4xBBH")
_EXPIRE_SIZE = calcsize("@" + _USERSA_INFO.format[1:] + "B0Q")
_POLEXPIRE_SIZE = calcsize("@" + _USERPOLICY_INFO.format[1:] + "B0Q")

# Of an attribute its size, and the bytes that are looked at.
_Parts = dict[int, tuple[int, bytes]]
# What is cut out of an attribute: no more than lies before a key. None: all of it, as it is short.
_Cuts = dict[int, Struct | None]

_OF_KEY: _Cuts = {_MARK: Struct("8s"), _IF_ID: Struct("4s")}
_OF_SA: _Cuts = _OF_KEY | {
    _ALG_AUTH: Struct("68s"),
    _ALG_CRYPT: Struct("68s"),
    _ALG_COMP: Struct("68s"),
    _ALG_AEAD: Struct("72s"),
    _ALG_AUTH_TRUNC: Struct("72s"),
    _ENCAP: Struct("24s"),
    _REPLAY_ESN_VAL: Struct("20x4s"),
    _SA_EXTRA_FLAGS: Struct("4s"),
    _OFFLOAD_DEV: Struct("8s"),
    _SET_MARK: Struct("4s"),
    _SET_MARK_MASK: Struct("4s"),
    _SA_DIR: Struct("1s"),
}
_OF_POLICY: _Cuts = _OF_KEY | {_TMPL: None, _POLICY_TYPE: Struct("1s"), _SEC_CTX: None}
_OF_DELETION: _Cuts = _OF_POLICY | {_POLICY: Struct(f"{_USERPOLICY_INFO.size}s")}
_OF_FLUSH: _Cuts = {_POLICY_TYPE: Struct("1s")}

_NO_MARK = Mark()
_NO_SELECTOR = Selector()
_NO_PREFIXES = bytes(2)
_MODES = {int(mode): mode for mode in Mode}
_ACTIONS = {int(action): action for action in PolicyAction}
_DIRECTIONS = tuple(Direction)
_SA_DIRECTIONS = {1: Direction.IN, 2: Direction.OUT}
_DEFAULTS = {0: PolicyAction.ALLOW, 1: PolicyAction.BLOCK, 2: PolicyAction.ALLOW}


def decode(buffer: Buffer, message: Message) -> tuple[Event, ...]:
    """Turn one message of the kernel into what happened.

    MIGRATE gives one event for each of its address pairs; ACQUIRE, REPORT and NEWAE, which
    change no table, give none. Raises CodecError.
    """
    kind = message.kind
    if kind in _SILENT:
        return ()
    try:
        decoder = _DECODERS[kind]
    except KeyError:
        raise CodecError(f"XFRM message of unknown type {kind:#x}") from None
    return decoder(buffer, message.start, message.end)


def dump_sas(sequence: int) -> bytes:
    """Build the request for all SAs."""
    return request(_GETSA, NLM_F_DUMP, sequence)


def dump_policies(sequence: int) -> bytes:
    """Build the request for all policies."""
    return request(_GETPOLICY, NLM_F_DUMP, sequence)


def get_default(sequence: int) -> bytes:
    """Build the request for what happens to traffic without a policy (Linux 5.15 and later)."""
    return request(_GETDEFAULT, 0, sequence, bytes(4))


def get_sa(key: SAKey, sequence: int) -> bytes:
    """Build the request for one SA. The kernel looks it up without regard to ``if_id``.

    Raises ValueError for a destination that is no packed address.
    """
    destination = key.destination
    if len(destination) not in (4, 16):
        raise ValueError("an SA's destination is 4 or 16 bytes")
    family = _AF_INET if len(destination) == 4 else _AF_INET6
    payload = _USERSA_ID.pack(destination, key.spi.to_bytes(4, "big"), family, key.proto)
    if key.mark.mask:
        payload += attribute(_MARK, _MARK_PAIR.pack(*key.mark))
    return request(_GETSA, 0, sequence, payload)


def _sa_added(buffer: Buffer, start: int, end: int) -> tuple[Event, ...]:
    _need(start, end, _USERSA_INFO.size, "NEWSA")
    return (SAAdded(_sa(buffer, start, start + _USERSA_INFO.size, end)),)


def _sa_updated(buffer: Buffer, start: int, end: int) -> tuple[Event, ...]:
    _need(start, end, _USERSA_INFO.size, "UPDSA")
    return (SAAdded(_sa(buffer, start, start + _USERSA_INFO.size, end), updated=True),)


def _sa_deleted(buffer: Buffer, start: int, end: int) -> tuple[Event, ...]:
    _need(start, end, _USERSA_ID.size, "DELSA")
    destination, spi, family, proto = _USERSA_ID.unpack_from(buffer, start)
    parts = _parts(buffer, start + _USERSA_ID.size, end, _OF_KEY)
    return (
        SADeleted(
            SAKey(
                _address(destination, family),
                proto,
                int.from_bytes(spi),
                _mark(parts),
                _u32(parts, _IF_ID),
            )
        ),
    )


def _sa_expired(buffer: Buffer, start: int, end: int) -> tuple[Event, ...]:
    _need(start, end, _EXPIRE_SIZE, "EXPIRE")
    sa = _sa(buffer, start, start + _EXPIRE_SIZE, end)
    return (SAExpired(sa, hard=bool(buffer[start + _USERSA_INFO.size])),)


def _sas_flushed(buffer: Buffer, start: int, end: int) -> tuple[Event, ...]:
    _need(start, end, 1, "FLUSHSA")
    return (SAsFlushed(buffer[start]),)


def _mapped(buffer: Buffer, start: int, end: int) -> tuple[Event, ...]:
    _need(start, end, _MAPPING_INFO.size, "MAPPING")
    destination, spi, family, proto, reqid, old, new, old_port, new_port = (
        _MAPPING_INFO.unpack_from(buffer, start)
    )
    parts = _parts(buffer, start + _MAPPING_INFO.size, end, _OF_KEY)
    return (
        SAMapped(
            SAKey(
                _address(destination, family),
                proto,
                int.from_bytes(spi),
                _mark(parts),
                _u32(parts, _IF_ID),
            ),
            reqid,
            _address(old, family),
            _address(new, family),
            int.from_bytes(old_port),
            int.from_bytes(new_port),
        ),
    )


def _migrated(buffer: Buffer, start: int, end: int) -> tuple[Event, ...]:
    _need(start, end, _USERPOLICY_ID.size, "MIGRATE")
    found: list[Event] = []
    for kind, place, stop in attributes(buffer, start + _USERPOLICY_ID.size, end):
        if kind != _MIGRATE_ATTRIBUTE:
            continue
        _need(place, stop, _MIGRATE_INFO.size, "XFRMA_MIGRATE")
        (old_to, old_from, new_to, new_from, proto, mode, reqid, old_family, new_family) = (
            _MIGRATE_INFO.unpack_from(buffer, place)
        )
        found.append(
            SAMigrated(
                proto,
                mode,
                reqid,
                _address(old_from, old_family),
                _address(old_to, old_family),
                _address(new_from, new_family),
                _address(new_to, new_family),
            )
        )
    return tuple(found)


def _policy_added(buffer: Buffer, start: int, end: int) -> tuple[Event, ...]:
    _need(start, end, _USERPOLICY_INFO.size, "NEWPOLICY")
    parts = _parts(buffer, start + _USERPOLICY_INFO.size, end, _OF_POLICY)
    return (PolicyAdded(_policy(buffer, start, parts)),)


def _policy_deleted(buffer: Buffer, start: int, end: int) -> tuple[Event, ...]:
    _need(start, end, _USERPOLICY_ID.size, "DELPOLICY")
    parts = _parts(buffer, start + _USERPOLICY_ID.size, end, _OF_DELETION)
    # The header has a key or an index, whichever the caller deleted by; the attribute has both.
    if _POLICY not in parts:
        raise CodecError("DELPOLICY without the policy")
    policy = _policy(parts[_POLICY][1], 0, parts)
    return (PolicyDeleted(policy.key, policy.index),)


def _policy_expired(buffer: Buffer, start: int, end: int) -> tuple[Event, ...]:
    _need(start, end, _POLEXPIRE_SIZE, "POLEXPIRE")
    policy = _policy(buffer, start, _parts(buffer, start + _POLEXPIRE_SIZE, end, _OF_POLICY))
    return (PolicyExpired(policy, hard=bool(buffer[start + _USERPOLICY_INFO.size])),)


def _policies_flushed(buffer: Buffer, start: int, end: int) -> tuple[Event, ...]:
    return (PoliciesFlushed(_policy_type(_parts(buffer, start, end, _OF_FLUSH))),)


def _defaults(buffer: Buffer, start: int, end: int) -> tuple[Event, ...]:
    _need(start, end, 3, "GETDEFAULT")
    try:
        inbound, forward, outbound = (_DEFAULTS[buffer[start + i]] for i in range(3))
    except KeyError:
        raise CodecError("unknown default action") from None
    return (DefaultActions(inbound, forward, outbound),)


_DECODERS: dict[int, Callable[[Buffer, int, int], tuple[Event, ...]]] = {
    _NEWSA: _sa_added,
    _UPDSA: _sa_updated,
    _DELSA: _sa_deleted,
    _EXPIRE: _sa_expired,
    _FLUSHSA: _sas_flushed,
    _MAPPING: _mapped,
    _MIGRATE: _migrated,
    _NEWPOLICY: _policy_added,
    _UPDPOLICY: _policy_added,
    _DELPOLICY: _policy_deleted,
    _POLEXPIRE: _policy_expired,
    _FLUSHPOLICY: _policies_flushed,
    _SETDEFAULT: _defaults,
    _GETDEFAULT: _defaults,
}
_SILENT = frozenset({_ACQUIRE, _REPORT, _NEWAE})


def _sa(buffer: Buffer, start: int, rest: int, end: int) -> SA:
    (
        selector,
        destination,
        spi,
        proto,
        source,
        limits,
        used,
        reqid,
        family,
        mode,
        replay_window,
        flags,
    ) = _USERSA_INFO.unpack_from(buffer, start)
    if mode not in _MODES:
        raise CodecError("SA of unknown mode")
    parts = _parts(buffer, rest, end, _OF_SA)
    # A frozen dataclass is slow to fill, so what is filled becomes one afterwards.
    sa: Any = _UnfrozenSA()
    sa.destination = _address(destination, family)
    sa.proto = proto
    sa.spi = int.from_bytes(spi)
    sa.source = _address(source, family)
    sa.mode = _MODES[mode]
    sa.reqid = reqid
    # These may be each SA's own.
    sa.mark = _mark(parts)
    sa.if_id = _u32(parts, _IF_ID)
    sa.encapsulation = _encapsulation(parts, family)
    (
        sa.encryption,
        sa.authentication,
        sa.aead,
        sa.compression,
        esn_window,
        sa.direction,
        sa.set_mark,
        sa.offload,
        sa.extra_flags,
    ) = _properties(tuple(parts.items()))
    sa.selector = _selector(selector)
    sa.replay_window = replay_window if esn_window is None else esn_window
    sa.esn = bool(flags & _STATE_ESN)
    sa.lifetime = _lifetime(limits)
    sa.usage = _usage(used)
    sa.flags = flags
    sa.__class__ = SA
    return cast("SA", sa)


class _UnfrozenSA:
    __slots__ = SA.__slots__


# SAs of a kind have the same few.
@lru_cache(maxsize=1024)
def _properties(
    told: tuple[tuple[int, tuple[int, bytes]], ...],
) -> tuple[
    Algorithm | None,
    Algorithm | None,
    Algorithm | None,
    Algorithm | None,
    int | None,
    Direction | None,
    Mark | None,
    Offload | None,
    int,
]:
    """Encryption, authentication, AEAD, compression, ESN window, direction, and so on."""
    parts = dict(told)
    return (
        _algorithm(parts, _ALG_CRYPT),
        _algorithm(parts, _ALG_AUTH_TRUNC) or _algorithm(parts, _ALG_AUTH),
        _algorithm(parts, _ALG_AEAD),
        _algorithm(parts, _ALG_COMP),
        _u32(parts, _REPLAY_ESN_VAL) if _REPLAY_ESN_VAL in parts else None,
        _direction(parts),
        _set_mark(parts),
        _offload(parts),
        _u32(parts, _SA_EXTRA_FLAGS),
    )


def _policy(buffer: Buffer, start: int, parts: _Parts) -> Policy:
    selector, limits, used, priority, index, direction, action, flags, share = (
        _USERPOLICY_INFO.unpack_from(buffer, start)
    )
    # A socket's own policies are dumped with directions 3 to 5, and their index says so too.
    if direction > 5 or (direction >= 3) != (index & 7 >= 3):
        raise CodecError("policy of unknown direction")
    if action not in _ACTIONS:
        raise CodecError("policy with an unknown action")
    policy: Any = _UnfrozenPolicy()
    policy.selector = _selector(selector)
    policy.direction = _DIRECTIONS[direction % 3]
    policy.action = _ACTIONS[action]
    policy.priority = priority
    policy.index = index
    policy.templates = _templates(parts[_TMPL][1]) if _TMPL in parts else ()
    policy.mark = _mark(parts)
    policy.if_id = _u32(parts, _IF_ID)
    policy.kind = _policy_type(parts)
    policy.flags = flags
    policy.share = share
    policy.lifetime = _lifetime(limits)
    policy.usage = _usage(used)
    policy.security_context = _context(parts[_SEC_CTX][1]) if _SEC_CTX in parts else b""
    policy.__class__ = Policy
    return cast("Policy", policy)


class _UnfrozenPolicy:
    __slots__ = Policy.__slots__


def _selector(data: bytes) -> Selector:
    # Where no address counts, there are few.
    return _any_selector(data) if data[42:44] == _NO_PREFIXES else _parsed_selector(data)


def _parsed_selector(data: bytes) -> Selector:
    (
        destination,
        source,
        ports,
        family,
        destination_prefix,
        source_prefix,
        proto,
        ifindex,
        user,
    ) = _SELECTOR.unpack(data)
    if not family:
        return _NO_SELECTOR  # XFRM_STATE_AF_UNSPEC: the kernel does not look at the rest
    destination = _address(destination, family)
    if max(destination_prefix, source_prefix) > len(destination) * 8:
        raise CodecError("selector with a prefix longer than an address")
    to_port, to_mask, from_port, from_mask = _PORTS.unpack(ports)
    return Selector(
        _address(source, family),
        destination,
        source_prefix,
        destination_prefix,
        from_port,
        from_mask,
        to_port,
        to_mask,
        proto,
        family,
        ifindex,
        user,
    )


_any_selector = lru_cache(maxsize=1024)(_parsed_selector)


@lru_cache(maxsize=1024)
def _lifetime(data: bytes) -> Lifetime:
    limits = _LIMITS.unpack(data)
    amounts = (None if limit == _INFINITE else limit for limit in limits[:4])
    # Unlike amounts, no seconds are no limit.
    seconds = (None if limit in (0, _INFINITE) else limit for limit in limits[4:])
    return Lifetime(*amounts, *seconds)


@lru_cache(maxsize=1024)
def _usage(data: bytes) -> Usage:
    return Usage._make(_USED.unpack(data))


# Policies of a kind have the same few.
@lru_cache(maxsize=1024)
def _templates(data: bytes) -> tuple[Template, ...]:
    if len(data) % _TEMPLATE.size:
        raise CodecError(f"XFRMA_TMPL of {len(data)} bytes")
    return tuple(_template(*fields) for fields in _TEMPLATE.iter_unpack(data))


def _template(
    destination: bytes,
    spi: bytes,
    proto: int,
    family: int,
    source: bytes,
    reqid: int,
    mode: int,
    share: int,
    optional: int,
    auth_algorithms: int,
    encryption_algorithms: int,
    compression_algorithms: int,
) -> Template:
    if mode not in _MODES:
        raise CodecError("template of unknown mode")
    template: Any = _UnfrozenTemplate()
    template.proto = proto
    template.mode = _MODES[mode]
    template.source = _address(source, family)
    template.destination = _address(destination, family)
    template.spi = int.from_bytes(spi)
    template.reqid = reqid
    template.family = family
    template.optional = bool(optional)
    template.share = share
    template.auth_algorithms = auth_algorithms
    template.encryption_algorithms = encryption_algorithms
    template.compression_algorithms = compression_algorithms
    template.__class__ = Template
    return cast("Template", template)


class _UnfrozenTemplate:
    __slots__ = Template.__slots__


def _algorithm(parts: _Parts, kind: int) -> Algorithm | None:
    """``struct xfrm_algo``, or one of xfrm_algo_auth and xfrm_algo_aead, which look the same."""
    if kind not in parts:
        return None
    size, header = parts[kind]
    icv_bits = 0
    if len(header) == _ALGORITHM.size:
        name, key_bits = _ALGORITHM.unpack(header)
    else:
        name, key_bits, icv_bits = _ALGORITHM_ICV.unpack(header)
    if size < len(header) + (key_bits + 7) // 8:
        raise CodecError(f"attribute {kind} is shorter than the key length it gives")
    return _interned(name.partition(b"\0")[0], key_bits, icv_bits)


@lru_cache(maxsize=256)
def _interned(name: bytes, key_bits: int, icv_bits: int) -> Algorithm:
    try:
        text = name.decode("ascii")
    except UnicodeDecodeError:
        text = ""
    if not text.isprintable() or len(text) != len(name) or len(name) > 63:
        raise CodecError("algorithm without a readable name")
    return Algorithm(text, key_bits, icv_bits)


def _encapsulation(parts: _Parts, family: int) -> Encapsulation | None:
    if _ENCAP not in parts:
        return None
    kind, source_port, destination_port, original = _ENCAPSULATION.unpack(parts.pop(_ENCAP)[1])
    return Encapsulation(
        kind,
        int.from_bytes(source_port),
        int.from_bytes(destination_port),
        _address(original, family) if any(original) else b"",
    )


def _direction(parts: _Parts) -> Direction | None:
    if _SA_DIR not in parts:
        return None
    try:
        return _SA_DIRECTIONS[parts[_SA_DIR][1][0]]
    except KeyError:
        raise CodecError("SA of unknown direction") from None


def _set_mark(parts: _Parts) -> Mark | None:
    if _SET_MARK not in parts:
        return None
    # Kernels without the mask (before 4.19) set the whole mark.
    return Mark(_u32(parts, _SET_MARK), _u32(parts, _SET_MARK_MASK, 0xFFFFFFFF))


def _offload(parts: _Parts) -> Offload | None:
    if _OFFLOAD_DEV not in parts:
        return None
    ifindex, flags = _OFFLOAD.unpack(parts[_OFFLOAD_DEV][1])
    return Offload(ifindex, bool(flags & _OFFLOAD_INBOUND), bool(flags & _OFFLOAD_PACKET))


def _context(data: bytes) -> bytes:
    _need(0, len(data), _CONTEXT.size, f"attribute {_SEC_CTX}")
    _, _, size = _CONTEXT.unpack_from(data)
    _need(_CONTEXT.size, len(data), size, "XFRMA_SEC_CTX")
    return data[_CONTEXT.size : _CONTEXT.size + size].rstrip(b"\0")


def _policy_type(parts: _Parts) -> int:
    return parts[_POLICY_TYPE][1][0] if _POLICY_TYPE in parts else 0


def _mark(parts: _Parts) -> Mark:
    return Mark._make(_MARK_PAIR.unpack(parts.pop(_MARK)[1])) if _MARK in parts else _NO_MARK


def _u32(parts: _Parts, kind: int, absent: int = 0) -> int:
    if kind not in parts:
        return absent
    (value,) = _U32.unpack(parts.pop(kind)[1])
    return int(value)


# One end is mostly this host.
@lru_cache(maxsize=1024)
def _address(field: bytes, family: int) -> bytes:
    if family == _AF_INET:
        return field[:4]
    if family == _AF_INET6:
        return field
    raise CodecError("address of unknown family")


def _parts(buffer: Buffer, start: int, end: int, cuts: _Cuts) -> _Parts:
    """Cut out what is looked at. Raises CodecError for an attribute that is too short for it."""
    parts: _Parts = {}
    for kind, place, stop in attributes(buffer, start, end):
        if kind in cuts:
            cut, size = cuts[kind], stop - place
            if cut is None:
                data = bytes(buffer[place:stop])
            elif size < cut.size:
                raise CodecError(f"attribute {kind} has {size} bytes, {cut.size} expected")
            else:
                (data,) = cut.unpack_from(buffer, place)
            parts[kind] = size, data
    return parts


def _need(start: int, end: int, size: int, what: str) -> None:
    if end - start < size:
        raise CodecError(f"{what} has {end - start} bytes, {size} expected")
