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
_SELECTOR = "16s16s8sHBBB3xiI"
_LIFETIME = "8Q4Q"
_U32 = Struct("=I")
_PORTS = Struct(">4H")
_USERSA_INFO = Struct("@" + _SELECTOR + "16s4sB3x16s" + _LIFETIME + "16xIHBBB0Q")
_USERSA_ID = Struct("@16s4sHBx")
_USERPOLICY_INFO = Struct("@" + _SELECTOR + _LIFETIME + "IIBBBB0Q")
_USERPOLICY_ID = Struct("@" + _SELECTOR + "IB0I")
_TEMPLATE = Struct("@16s4sB3xHxx16sIBBB3I")
_MAPPING_INFO = Struct("@16s4sHBxI16s16s2s2s")
_MIGRATE_INFO = Struct("@16s16s16s16sBBxxIHH")
_ENCAPSULATION = Struct("@H2s2sxx16s")
_ALGORITHM = Struct("@64sI")
_ALGORITHM_ICV = Struct("@64sII")
_REPLAY_ESN = Struct("@20xI")
_MARK_PAIR = Struct("@II")
_OFFLOAD = Struct("@iB0i")
_CONTEXT = Struct("@4xBBH")
_EXPIRE_SIZE = calcsize("@" + _USERSA_INFO.format[1:] + "B0Q")
_POLEXPIRE_SIZE = calcsize("@" + _USERPOLICY_INFO.format[1:] + "B0Q")

_Places = dict[int, tuple[int, int]]
_NO_MARK = Mark()
_NO_SELECTOR = Selector()
_NO_LIMITS = (_INFINITE,) * 4 + (0,) * 4
_FOREVER = Lifetime()
_MODES = {int(mode): mode for mode in Mode}
_ACTIONS = {int(action): action for action in PolicyAction}
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
    return (SAAdded(_sa(buffer, start, _places(buffer, start + _USERSA_INFO.size, end))),)


def _sa_updated(buffer: Buffer, start: int, end: int) -> tuple[Event, ...]:
    _need(start, end, _USERSA_INFO.size, "UPDSA")
    sa = _sa(buffer, start, _places(buffer, start + _USERSA_INFO.size, end))
    return (SAAdded(sa, updated=True),)


def _sa_deleted(buffer: Buffer, start: int, end: int) -> tuple[Event, ...]:
    _need(start, end, _USERSA_ID.size, "DELSA")
    destination, spi, family, proto = _USERSA_ID.unpack_from(buffer, start)
    places = _places(buffer, start + _USERSA_ID.size, end)
    return (
        SADeleted(
            SAKey(
                _address(destination, family),
                proto,
                int.from_bytes(spi),
                _mark(buffer, places),
                _u32(buffer, places, _IF_ID),
            )
        ),
    )


def _sa_expired(buffer: Buffer, start: int, end: int) -> tuple[Event, ...]:
    _need(start, end, _EXPIRE_SIZE, "EXPIRE")
    sa = _sa(buffer, start, _places(buffer, start + _EXPIRE_SIZE, end))
    return (SAExpired(sa, hard=bool(buffer[start + _USERSA_INFO.size])),)


def _sas_flushed(buffer: Buffer, start: int, end: int) -> tuple[Event, ...]:
    _need(start, end, 1, "FLUSHSA")
    return (SAsFlushed(buffer[start]),)


def _mapped(buffer: Buffer, start: int, end: int) -> tuple[Event, ...]:
    _need(start, end, _MAPPING_INFO.size, "MAPPING")
    destination, spi, family, proto, reqid, old, new, old_port, new_port = (
        _MAPPING_INFO.unpack_from(buffer, start)
    )
    places = _places(buffer, start + _MAPPING_INFO.size, end)
    return (
        SAMapped(
            SAKey(
                _address(destination, family),
                proto,
                int.from_bytes(spi),
                _mark(buffer, places),
                _u32(buffer, places, _IF_ID),
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
    places = _places(buffer, start + _USERPOLICY_INFO.size, end)
    return (PolicyAdded(_policy(buffer, start, places)),)


def _policy_deleted(buffer: Buffer, start: int, end: int) -> tuple[Event, ...]:
    _need(start, end, _USERPOLICY_ID.size, "DELPOLICY")
    places = _places(buffer, start + _USERPOLICY_ID.size, end)
    # The header has a key or an index, whichever the caller deleted by; the attribute has both.
    inner = _place(places, _POLICY, _USERPOLICY_INFO.size)
    if inner is None:
        raise CodecError("DELPOLICY without the policy")
    policy = _policy(buffer, inner, places)
    return (PolicyDeleted(policy.key, policy.index),)


def _policy_expired(buffer: Buffer, start: int, end: int) -> tuple[Event, ...]:
    _need(start, end, _POLEXPIRE_SIZE, "POLEXPIRE")
    policy = _policy(buffer, start, _places(buffer, start + _POLEXPIRE_SIZE, end))
    return (PolicyExpired(policy, hard=bool(buffer[start + _USERPOLICY_INFO.size])),)


def _policies_flushed(buffer: Buffer, start: int, end: int) -> tuple[Event, ...]:
    return (PoliciesFlushed(_policy_type(buffer, _places(buffer, start, end))),)


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


def _sa(buffer: Buffer, start: int, places: _Places) -> SA:
    fields = _USERSA_INFO.unpack_from(buffer, start)
    destination, spi, proto, source = fields[9:13]
    reqid, family, mode, replay_window, flags = fields[25:30]
    if mode not in _MODES:
        raise CodecError("SA of unknown mode")
    esn = _place(places, _REPLAY_ESN_VAL, _REPLAY_ESN.size)
    if esn is not None:
        (replay_window,) = _REPLAY_ESN.unpack_from(buffer, esn)
    authentication = _algorithm_icv(buffer, places, _ALG_AUTH_TRUNC)
    return SA(
        destination=_address(destination, family),
        proto=proto,
        spi=int.from_bytes(spi),
        source=_address(source, family),
        mode=_MODES[mode],
        reqid=reqid,
        mark=_mark(buffer, places),
        if_id=_u32(buffer, places, _IF_ID),
        encryption=_algorithm(buffer, places, _ALG_CRYPT),
        authentication=authentication or _algorithm(buffer, places, _ALG_AUTH),
        aead=_algorithm_icv(buffer, places, _ALG_AEAD),
        compression=_algorithm(buffer, places, _ALG_COMP),
        encapsulation=_encapsulation(buffer, places, family),
        selector=_selector(*fields[:9]),
        replay_window=replay_window,
        esn=bool(flags & _STATE_ESN),
        lifetime=_lifetime(fields[13:21]),
        usage=Usage(*fields[21:25]),
        direction=_direction(buffer, places),
        set_mark=_set_mark(buffer, places),
        offload=_offload(buffer, places),
        flags=flags,
        extra_flags=_u32(buffer, places, _SA_EXTRA_FLAGS),
    )


def _policy(buffer: Buffer, start: int, places: _Places) -> Policy:
    fields = _USERPOLICY_INFO.unpack_from(buffer, start)
    priority, index, direction, action, flags, share = fields[21:27]
    # A socket's own policies are dumped with directions 3 to 5, and their index says so too.
    if direction > 5 or (direction >= 3) != (index & 7 >= 3):
        raise CodecError("policy of unknown direction")
    if action not in _ACTIONS:
        raise CodecError("policy with an unknown action")
    return Policy(
        selector=_selector(*fields[:9]),
        direction=Direction(direction % 3),
        action=_ACTIONS[action],
        priority=priority,
        index=index,
        templates=_templates(buffer, places),
        mark=_mark(buffer, places),
        if_id=_u32(buffer, places, _IF_ID),
        kind=_policy_type(buffer, places),
        flags=flags,
        share=share,
        lifetime=_lifetime(fields[9:17]),
        usage=Usage(*fields[17:21]),
        security_context=_context(buffer, places),
    )


def _selector(
    destination: bytes,
    source: bytes,
    ports: bytes,
    family: int,
    destination_prefix: int,
    source_prefix: int,
    proto: int,
    ifindex: int,
    user: int,
) -> Selector:
    if not family:
        return _NO_SELECTOR  # XFRM_STATE_AF_UNSPEC: the kernel does not look at the rest
    destination = _address(destination, family)
    source = _address(source, family)
    if max(destination_prefix, source_prefix) > len(destination) * 8:
        raise CodecError("selector with a prefix longer than an address")
    to_port, to_mask, from_port, from_mask = _PORTS.unpack(ports)
    return Selector(
        source,
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


def _lifetime(limits: tuple[int, ...]) -> Lifetime:
    if limits == _NO_LIMITS:
        return _FOREVER
    amounts = (None if limit == _INFINITE else limit for limit in limits[:4])
    # Unlike amounts, no seconds are no limit.
    seconds = (None if limit in (0, _INFINITE) else limit for limit in limits[4:])
    return Lifetime(*amounts, *seconds)


def _templates(buffer: Buffer, places: _Places) -> tuple[Template, ...]:
    if _TMPL not in places:
        return ()
    start, end = places[_TMPL]
    if (end - start) % _TEMPLATE.size:
        raise CodecError(f"XFRMA_TMPL of {end - start} bytes")
    size = _TEMPLATE.size
    return tuple(_template(bytes(buffer[at : at + size])) for at in range(start, end, size))


# Policies of a kind have the same few.
@lru_cache(maxsize=4096)
def _template(data: bytes) -> Template:
    (
        destination,
        spi,
        proto,
        family,
        source,
        reqid,
        mode,
        share,
        optional,
        auth_algorithms,
        encryption_algorithms,
        compression_algorithms,
    ) = _TEMPLATE.unpack(data)
    if mode not in _MODES:
        raise CodecError("template of unknown mode")
    return Template(
        proto=proto,
        mode=_MODES[mode],
        source=_address(source, family),
        destination=_address(destination, family),
        spi=int.from_bytes(spi),
        reqid=reqid,
        family=family,
        optional=bool(optional),
        share=share,
        auth_algorithms=auth_algorithms,
        encryption_algorithms=encryption_algorithms,
        compression_algorithms=compression_algorithms,
    )


def _algorithm(buffer: Buffer, places: _Places, kind: int) -> Algorithm | None:
    """``struct xfrm_algo``."""
    start = _place(places, kind, _ALGORITHM.size)
    if start is None:
        return None
    name, key_bits = _ALGORITHM.unpack_from(buffer, start)
    _need_key(places, kind, _ALGORITHM.size, key_bits)
    return _interned(name.partition(b"\0")[0], key_bits, 0)


def _algorithm_icv(buffer: Buffer, places: _Places, kind: int) -> Algorithm | None:
    """``struct xfrm_algo_auth`` and ``struct xfrm_algo_aead``, which look the same."""
    start = _place(places, kind, _ALGORITHM_ICV.size)
    if start is None:
        return None
    name, key_bits, icv_bits = _ALGORITHM_ICV.unpack_from(buffer, start)
    _need_key(places, kind, _ALGORITHM_ICV.size, key_bits)
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


def _encapsulation(buffer: Buffer, places: _Places, family: int) -> Encapsulation | None:
    start = _place(places, _ENCAP, _ENCAPSULATION.size)
    if start is None:
        return None
    kind, source_port, destination_port, original = _ENCAPSULATION.unpack_from(buffer, start)
    return Encapsulation(
        kind,
        int.from_bytes(source_port),
        int.from_bytes(destination_port),
        _address(original, family) if any(original) else b"",
    )


def _direction(buffer: Buffer, places: _Places) -> Direction | None:
    start = _place(places, _SA_DIR, 1)
    if start is None:
        return None
    try:
        return _SA_DIRECTIONS[buffer[start]]
    except KeyError:
        raise CodecError("SA of unknown direction") from None


def _set_mark(buffer: Buffer, places: _Places) -> Mark | None:
    if _SET_MARK not in places:
        return None
    # Kernels without the mask (before 4.19) set the whole mark.
    return Mark(_u32(buffer, places, _SET_MARK), _u32(buffer, places, _SET_MARK_MASK, 0xFFFFFFFF))


def _offload(buffer: Buffer, places: _Places) -> Offload | None:
    start = _place(places, _OFFLOAD_DEV, _OFFLOAD.size)
    if start is None:
        return None
    ifindex, flags = _OFFLOAD.unpack_from(buffer, start)
    return Offload(ifindex, bool(flags & _OFFLOAD_INBOUND), bool(flags & _OFFLOAD_PACKET))


def _context(buffer: Buffer, places: _Places) -> bytes:
    start = _place(places, _SEC_CTX, _CONTEXT.size)
    if start is None:
        return b""
    _, _, size = _CONTEXT.unpack_from(buffer, start)
    start += _CONTEXT.size
    _need(start, places[_SEC_CTX][1], size, "XFRMA_SEC_CTX")
    return bytes(buffer[start : start + size]).rstrip(b"\0")


def _policy_type(buffer: Buffer, places: _Places) -> int:
    start = _place(places, _POLICY_TYPE, 1)
    return 0 if start is None else buffer[start]


def _mark(buffer: Buffer, places: _Places) -> Mark:
    start = _place(places, _MARK, _MARK_PAIR.size)
    return _NO_MARK if start is None else Mark(*_MARK_PAIR.unpack_from(buffer, start))


def _u32(buffer: Buffer, places: _Places, kind: int, absent: int = 0) -> int:
    start = _place(places, kind, _U32.size)
    if start is None:
        return absent
    (value,) = _U32.unpack_from(buffer, start)
    return int(value)


def _address(field: bytes, family: int) -> bytes:
    if family == _AF_INET:
        return field[:4]
    if family == _AF_INET6:
        return field
    raise CodecError("address of unknown family")


def _places(buffer: Buffer, start: int, end: int) -> _Places:
    return {kind: (place, stop) for kind, place, stop in attributes(buffer, start, end)}


def _place(places: _Places, kind: int, size: int) -> int | None:
    """Where an attribute's payload starts, None without one. Raises CodecError if it is short."""
    place = places.get(kind)
    if place is None:
        return None
    start, end = place
    if end - start < size:
        raise CodecError(f"attribute {kind} has {end - start} bytes, {size} expected")
    return start


def _need(start: int, end: int, size: int, what: str) -> None:
    if end - start < size:
        raise CodecError(f"{what} has {end - start} bytes, {size} expected")


def _need_key(places: _Places, kind: int, header: int, bits: int) -> None:
    start, end = places[kind]
    if end - start < header + (bits + 7) // 8:
        raise CodecError(f"attribute {kind} is shorter than the key length it gives")
