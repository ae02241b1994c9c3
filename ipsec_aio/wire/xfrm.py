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
* Left out is what does not change what was done for a packet: of policies OFFLOAD_DEV (where one is
  carried out), of SAs SEC_CTX and SA_PCPU (who among senders may use one, and on which processor).
* DELSA, DELPOLICY, EXPIRE and POLEXPIRE name a record; what they say beside its key is not
  complete (EXPIRE has no algorithms). UPDSA says what was asked for, not what came of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from struct import Struct, calcsize
from sys import byteorder
from typing import Any, TypeVar, cast

from ..compact import blank, sharing
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
from .layout import Cuts, Cutter, Layout
from .netlink import NLM_F_DUMP, Buffer, Message, attribute, attributes, request

__all__ = [
    "FIRST_TYPE",
    "GROUPS",
    "NETLINK_XFRM",
    "Decoder",
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
_BITS = {_AF_INET: 32, _AF_INET6: 128}

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
_SELECTOR = Struct("@16s16s24s")
_TRAFFIC = Struct("@8sHBBB3xiI")
_LIMITS = Struct("@8Q")
_USED = Struct("@4Q")
_PORTS = Struct(">4H")
_USERSA_INFO = Struct("@56s16s4sB3x16s64s32s16xIHBBB0Q")
_USERSA_ID = Struct("@16s4sHBx")
_USERPOLICY_INFO = Struct("@56s64s32sIIBBBB0Q")
_USERPOLICY_ID = Struct("@56sIB0I")
_TEMPLATE = Struct("@16s4s8s16sI16s")
_TRANSFORMATION = Struct("@B3xHxxBBB3I")
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

# Of an algorithm no more is cut out than lies before its key.
_OF_KEY: Cuts = {_MARK: Struct("8s"), _IF_ID: Struct("4s")}
_OF_SA: Cuts = {
    **_OF_KEY,
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
_OF_POLICY: Cuts = {**_OF_KEY, _TMPL: None, _POLICY_TYPE: Struct("1s"), _SEC_CTX: None}

_KEY_CUTTER = Cutter(_OF_KEY)
_SA_CUTTER = Cutter(_OF_SA, (_MARK, _IF_ID, _ENCAP))
_POLICY_CUTTER = Cutter(_OF_POLICY, (_MARK, _IF_ID, _TMPL))
_DELETION_CUTTER = Cutter(
    {**_OF_POLICY, _POLICY: Struct(f"{_USERPOLICY_INFO.size}s")}, (_MARK, _IF_ID, _TMPL, _POLICY)
)
_FLUSH_CUTTER = Cutter({_POLICY_TYPE: Struct("1s")})

_NO_MARK = Mark()
_NO_SELECTOR = Selector()
_MODES = {int(mode): mode for mode in Mode}
_ACTIONS = {int(action): action for action in PolicyAction}
_DIRECTIONS = tuple(Direction)
_SA_DIRECTIONS = {1: Direction.IN, 2: Direction.OUT}
_DEFAULTS = {0: PolicyAction.ALLOW, 1: PolicyAction.BLOCK, 2: PolicyAction.ALLOW}
_BlankSA, _BlankPolicy, _BlankTemplate = blank(SA), blank(Policy), blank(Template)

# Of an attribute its size, and the bytes that are looked at.
_Parts = dict[int, tuple[int, bytes]]
_K = TypeVar("_K")
_V = TypeVar("_V")


class _Known(dict[_K, _V]):
    """What things mean, worked out once; forgotten when there are too many."""

    def __init__(self, make: Callable[[_K], _V], limit: int) -> None:
        self._make = make
        self._limit = limit

    def __missing__(self, key: _K) -> _V:
        value = self._make(key)
        if len(self) >= self._limit:
            self.clear()
        self[key] = value
        return value


class _ByFamily(dict[int, _Known[bytes, bytes]]):
    """Addresses by their fields."""

    def __missing__(self, family: int) -> _Known[bytes, bytes]:
        raise CodecError("address of unknown family")


class Decoder:
    """Turns messages into events.

    What one decoder tells of has equal addresses and selectors in common, up to ``limit`` of each
    kind, which it remembers. They are no secret, and nothing else is remembered that could be one.
    """

    def __init__(self, limit: int = 1024) -> None:
        self._addresses = _ByFamily()
        self._addresses[_AF_INET] = _Known(lambda field: field[:4], limit)
        self._addresses[_AF_INET6] = _Known(bytes, limit)
        self._selectors = _Known(self._selector, limit)
        self._templates = _Known(self._parsed_templates, limit)
        self._numbers: _Known[int, int] = _Known(int, limit)
        # Those that were used differ; of the others there are many alike, side by side.
        self._usages = _Known(self._usage, min(limit, 1024))

    def decode(self, buffer: Buffer, message: Message) -> tuple[Event, ...]:
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
        return decoder(self, buffer, message.start, message.end)

    # SAs

    def sa_added(self, buffer: Buffer, start: int, end: int) -> tuple[Event, ...]:
        _need(start, end, _USERSA_INFO.size, "NEWSA")
        return (SAAdded(self._sa(buffer, start, start + _USERSA_INFO.size, end)),)

    def sa_updated(self, buffer: Buffer, start: int, end: int) -> tuple[Event, ...]:
        _need(start, end, _USERSA_INFO.size, "UPDSA")
        return (SAAdded(self._sa(buffer, start, start + _USERSA_INFO.size, end), updated=True),)

    def sa_deleted(self, buffer: Buffer, start: int, end: int) -> tuple[Event, ...]:
        _need(start, end, _USERSA_ID.size, "DELSA")
        destination, spi, family, proto = _USERSA_ID.unpack_from(buffer, start)
        parts = _KEY_CUTTER.parts(buffer, start + _USERSA_ID.size, end)
        return (SADeleted(self._key(destination, proto, spi, family, parts)),)

    def sa_expired(self, buffer: Buffer, start: int, end: int) -> tuple[Event, ...]:
        _need(start, end, _EXPIRE_SIZE, "EXPIRE")
        sa = self._sa(buffer, start, start + _EXPIRE_SIZE, end)
        return (SAExpired(sa, hard=bool(buffer[start + _USERSA_INFO.size])),)

    def sas_flushed(self, buffer: Buffer, start: int, end: int) -> tuple[Event, ...]:
        _need(start, end, 1, "FLUSHSA")
        return (SAsFlushed(buffer[start]),)

    def mapped(self, buffer: Buffer, start: int, end: int) -> tuple[Event, ...]:
        _need(start, end, _MAPPING_INFO.size, "MAPPING")
        destination, spi, family, proto, reqid, old, new, old_port, new_port = (
            _MAPPING_INFO.unpack_from(buffer, start)
        )
        parts = _KEY_CUTTER.parts(buffer, start + _MAPPING_INFO.size, end)
        addresses = self._addresses[family]
        return (
            SAMapped(
                self._key(destination, proto, spi, family, parts),
                reqid,
                addresses[old],
                addresses[new],
                int.from_bytes(old_port),
                int.from_bytes(new_port),
            ),
        )

    def migrated(self, buffer: Buffer, start: int, end: int) -> tuple[Event, ...]:
        _need(start, end, _USERPOLICY_ID.size, "MIGRATE")
        found: list[Event] = []
        for kind, place, stop in attributes(buffer, start + _USERPOLICY_ID.size, end):
            if kind != _MIGRATE_ATTRIBUTE:
                continue
            _need(place, stop, _MIGRATE_INFO.size, "XFRMA_MIGRATE")
            (old_to, old_from, new_to, new_from, proto, mode, reqid, old_family, new_family) = (
                _MIGRATE_INFO.unpack_from(buffer, place)
            )
            old, new = self._addresses[old_family], self._addresses[new_family]
            found.append(
                SAMigrated(
                    proto, mode, reqid, old[old_from], old[old_to], new[new_from], new[new_to]
                )
            )
        return tuple(found)

    def _key(
        self, destination: bytes, proto: int, spi: bytes, family: int, parts: dict[int, bytes]
    ) -> SAKey:
        return SAKey(
            self._addresses[family][destination],
            proto,
            int.from_bytes(spi),
            _mark(parts),
            _u32(parts, _IF_ID),
        )

    def _sa(self, buffer: Buffer, start: int, rest: int, end: int) -> SA:
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
        layout, values = _SA_CUTTER.cut(buffer, rest, end)
        addresses = self._addresses[family]
        sa: Any = _BlankSA()
        sa._shared = _shared_by_sas(layout, values, proto, limits, mode, replay_window, flags)
        sa.destination = addresses[destination]
        sa.spi = int.from_bytes(spi)
        sa.source = addresses[source]
        sa.reqid = self._numbers[reqid]
        sa.selector = self._selectors[selector]
        sa.usage = self._usages[used]
        if layout.apart:
            apart = layout.set_apart(buffer, rest)
            sa.mark = _mark(apart)
            sa.if_id = _u32(apart, _IF_ID)
            sa.encapsulation = self._encapsulation(apart, family)
        else:
            sa.mark, sa.if_id, sa.encapsulation = _NO_MARK, 0, None
        sa.__class__ = SA
        return cast("SA", sa)

    def _encapsulation(self, parts: dict[int, bytes], family: int) -> Encapsulation | None:
        if _ENCAP not in parts:
            return None
        kind, source_port, destination_port, original = _ENCAPSULATION.unpack(parts[_ENCAP])
        return Encapsulation(
            kind,
            int.from_bytes(source_port),
            int.from_bytes(destination_port),
            self._addresses[family][original] if any(original) else b"",
        )

    def _usage(self, data: bytes) -> Usage:
        octets, packets, added, used = _USED.unpack(data)
        return Usage(octets, packets, self._numbers[added], self._numbers[used])

    def _selector(self, data: bytes) -> Selector:
        destination, source, traffic = _SELECTOR.unpack(data)
        family, rest = _traffic(traffic)
        if not family:
            return _NO_SELECTOR  # XFRM_STATE_AF_UNSPEC: the kernel does not look at the rest
        addresses = self._addresses[family]
        return Selector._make((addresses[source], addresses[destination], *rest))

    # Policies

    def policy_added(self, buffer: Buffer, start: int, end: int) -> tuple[Event, ...]:
        _need(start, end, _USERPOLICY_INFO.size, "NEWPOLICY")
        return (PolicyAdded(self._policy(buffer, start, start + _USERPOLICY_INFO.size, end)),)

    def policy_deleted(self, buffer: Buffer, start: int, end: int) -> tuple[Event, ...]:
        _need(start, end, _USERPOLICY_ID.size, "DELPOLICY")
        start += _USERPOLICY_ID.size
        layout, values = _DELETION_CUTTER.cut(buffer, start, end)
        apart = layout.set_apart(buffer, start)
        # The header has a key or an index, whichever the caller deleted by; the attribute has both.
        if _POLICY not in apart:
            raise CodecError("DELPOLICY without the policy")
        policy = self._described(apart[_POLICY], 0, layout, values, apart)
        return (PolicyDeleted(policy.key, policy.index),)

    def policy_expired(self, buffer: Buffer, start: int, end: int) -> tuple[Event, ...]:
        _need(start, end, _POLEXPIRE_SIZE, "POLEXPIRE")
        policy = self._policy(buffer, start, start + _POLEXPIRE_SIZE, end)
        return (PolicyExpired(policy, hard=bool(buffer[start + _USERPOLICY_INFO.size])),)

    def policies_flushed(self, buffer: Buffer, start: int, end: int) -> tuple[Event, ...]:
        return (PoliciesFlushed(_policy_type(_FLUSH_CUTTER.parts(buffer, start, end))),)

    def defaults(self, buffer: Buffer, start: int, end: int) -> tuple[Event, ...]:
        _need(start, end, 3, "GETDEFAULT")
        try:
            inbound, forward, outbound = (_DEFAULTS[buffer[start + i]] for i in range(3))
        except KeyError:
            raise CodecError("unknown default action") from None
        return (DefaultActions(inbound, forward, outbound),)

    def _policy(self, buffer: Buffer, start: int, rest: int, end: int) -> Policy:
        layout, values = _POLICY_CUTTER.cut(buffer, rest, end)
        return self._described(buffer, start, layout, values, layout.set_apart(buffer, rest))

    def _described(
        self,
        buffer: Buffer,
        start: int,
        layout: Layout,
        values: tuple[bytes, ...],
        apart: dict[int, bytes],
    ) -> Policy:
        selector, limits, used, priority, index, direction, action, flags, share = (
            _USERPOLICY_INFO.unpack_from(buffer, start)
        )
        # A socket's own policies are dumped with directions 3 to 5, and their index says so too.
        if direction > 5 or (direction >= 3) != (index & 7 >= 3):
            raise CodecError("policy of unknown direction")
        policy: Any = _BlankPolicy()
        policy._shared = _shared_by_policies(
            layout, values, limits, priority, direction, action, flags, share
        )
        policy.selector = self._selectors[selector]
        policy.index = index
        policy.templates = self._templates[apart[_TMPL]] if _TMPL in apart else ()
        policy.mark = _mark(apart)
        policy.if_id = _u32(apart, _IF_ID)
        policy.usage = self._usages[used]
        policy.__class__ = Policy
        return cast("Policy", policy)

    def _parsed_templates(self, data: bytes) -> tuple[Template, ...]:
        if len(data) % _TEMPLATE.size:
            raise CodecError(f"XFRMA_TMPL of {len(data)} bytes")
        return tuple([self._template(*fields) for fields in _TEMPLATE.iter_unpack(data)])

    def _template(
        self,
        destination: bytes,
        spi: bytes,
        before: bytes,
        source: bytes,
        reqid: int,
        behind: bytes,
    ) -> Template:
        family, common = _shared_by_templates(before, behind)
        addresses = self._addresses[family]
        template: Any = _BlankTemplate()
        template._shared = common
        template.source = addresses[source]
        template.destination = addresses[destination]
        template.spi = int.from_bytes(spi)
        template.reqid = self._numbers[reqid]
        template.__class__ = Template
        return cast("Template", template)


decode = Decoder().decode
"""A decoder's :meth:`Decoder.decode`, for messages that come one by one."""


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


_DECODERS: dict[int, Callable[[Decoder, Buffer, int, int], tuple[Event, ...]]] = {
    _NEWSA: Decoder.sa_added,
    _UPDSA: Decoder.sa_updated,
    _DELSA: Decoder.sa_deleted,
    _EXPIRE: Decoder.sa_expired,
    _FLUSHSA: Decoder.sas_flushed,
    _MAPPING: Decoder.mapped,
    _MIGRATE: Decoder.migrated,
    _NEWPOLICY: Decoder.policy_added,
    _UPDPOLICY: Decoder.policy_added,
    _DELPOLICY: Decoder.policy_deleted,
    _POLEXPIRE: Decoder.policy_expired,
    _FLUSHPOLICY: Decoder.policies_flushed,
    _SETDEFAULT: Decoder.defaults,
    _GETDEFAULT: Decoder.defaults,
}
_SILENT = frozenset({_ACQUIRE, _REPORT, _NEWAE})


# Of each of these there are few among very many records.


@lru_cache(maxsize=1024)
def _shared_by_sas(
    layout: Layout,
    values: tuple[bytes, ...],
    proto: int,
    limits: bytes,
    mode: int,
    replay_window: int,
    flags: int,
) -> tuple[object, ...]:
    if mode not in _MODES:
        raise CodecError("SA of unknown mode")
    parts = dict(zip(layout.kinds, zip(layout.sizes, values, strict=True), strict=True))
    return sharing(
        SA,
        proto=proto,
        mode=_MODES[mode],
        encryption=_algorithm(parts, _ALG_CRYPT),
        authentication=_algorithm(parts, _ALG_AUTH_TRUNC) or _algorithm(parts, _ALG_AUTH),
        aead=_algorithm(parts, _ALG_AEAD),
        compression=_algorithm(parts, _ALG_COMP),
        replay_window=_number(parts, _REPLAY_ESN_VAL, replay_window),
        esn=bool(flags & _STATE_ESN),
        lifetime=_lifetime(limits),
        direction=_direction(parts),
        set_mark=_set_mark(parts),
        offload=_offload(parts),
        flags=flags,
        extra_flags=_number(parts, _SA_EXTRA_FLAGS),
    )


@lru_cache(maxsize=1024)
def _shared_by_policies(
    layout: Layout,
    values: tuple[bytes, ...],
    limits: bytes,
    priority: int,
    direction: int,
    action: int,
    flags: int,
    share: int,
) -> tuple[object, ...]:
    if action not in _ACTIONS:
        raise CodecError("policy with an unknown action")
    parts = dict(zip(layout.kinds, values, strict=True))
    return sharing(
        Policy,
        direction=_DIRECTIONS[direction % 3],
        action=_ACTIONS[action],
        priority=priority,
        kind=_policy_type(parts),
        flags=flags,
        share=share,
        lifetime=_lifetime(limits),
        security_context=_context(parts[_SEC_CTX]) if _SEC_CTX in parts else b"",
    )


@lru_cache(maxsize=1024)
def _shared_by_templates(before: bytes, behind: bytes) -> tuple[int, tuple[object, ...]]:
    (
        proto,
        family,
        mode,
        share,
        optional,
        auth_algorithms,
        encryption_algorithms,
        compression_algorithms,
    ) = _TRANSFORMATION.unpack(before + behind)
    if mode not in _MODES:
        raise CodecError("template of unknown mode")
    return family, sharing(
        Template,
        proto=proto,
        mode=_MODES[mode],
        family=family,
        optional=bool(optional),
        share=share,
        auth_algorithms=auth_algorithms,
        encryption_algorithms=encryption_algorithms,
        compression_algorithms=compression_algorithms,
    )


@lru_cache(maxsize=1024)
def _traffic(data: bytes) -> tuple[int, tuple[int, ...]]:
    """Return a selector's family, and what it says beside its addresses."""
    ports, family, to_prefix, from_prefix, proto, ifindex, user = _TRAFFIC.unpack(data)
    if family and max(to_prefix, from_prefix) > _BITS.get(family, 255):
        raise CodecError("selector with a prefix longer than an address")
    to_port, to_mask, from_port, from_mask = _PORTS.unpack(ports)
    return family, (
        from_prefix,
        to_prefix,
        from_port,
        from_mask,
        to_port,
        to_mask,
        proto,
        family,
        ifindex,
        user,
    )


@lru_cache(maxsize=1024)
def _lifetime(data: bytes) -> Lifetime:
    limits = _LIMITS.unpack(data)
    amounts = (None if limit == _INFINITE else limit for limit in limits[:4])
    # Unlike amounts, no seconds are no limit.
    seconds = (None if limit in (0, _INFINITE) else limit for limit in limits[4:])
    return Lifetime(*amounts, *seconds)


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
    return Mark(_number(parts, _SET_MARK), _number(parts, _SET_MARK_MASK, 0xFFFFFFFF))


def _offload(parts: _Parts) -> Offload | None:
    if _OFFLOAD_DEV not in parts:
        return None
    ifindex, flags = _OFFLOAD.unpack(parts[_OFFLOAD_DEV][1])
    return Offload(ifindex, bool(flags & _OFFLOAD_INBOUND), bool(flags & _OFFLOAD_PACKET))


def _number(parts: _Parts, kind: int, absent: int = 0) -> int:
    return int.from_bytes(parts[kind][1], byteorder) if kind in parts else absent


def _context(data: bytes) -> bytes:
    _need(0, len(data), _CONTEXT.size, f"attribute {_SEC_CTX}")
    _, _, size = _CONTEXT.unpack_from(data)
    _need(_CONTEXT.size, len(data), size, "XFRMA_SEC_CTX")
    return data[_CONTEXT.size : _CONTEXT.size + size].rstrip(b"\0")


def _policy_type(parts: dict[int, bytes]) -> int:
    return parts[_POLICY_TYPE][0] if _POLICY_TYPE in parts else 0


def _mark(parts: dict[int, bytes]) -> Mark:
    return Mark._make(_MARK_PAIR.unpack(parts[_MARK])) if _MARK in parts else _NO_MARK


def _u32(parts: dict[int, bytes], kind: int) -> int:
    return int.from_bytes(parts[kind], byteorder) if kind in parts else 0


def _need(start: int, end: int, size: int, what: str) -> None:
    if end - start < size:
        raise CodecError(f"{what} has {end - start} bytes, {size} expected")
