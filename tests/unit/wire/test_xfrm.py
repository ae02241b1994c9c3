"""XFRM messages: what they say, and that nothing but CodecError comes of what they should not."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xfrm_messages import (
    A6,
    ACQUIRE,
    B6,
    DELPOLICY,
    DELSA,
    EXPIRE,
    FLUSHPOLICY,
    FLUSHSA,
    GCM,
    GETDEFAULT,
    INF,
    KEY,
    MAPPING,
    MIGRATE,
    NEWAE,
    NEWPOLICY,
    NEWSA,
    POLEXPIRE,
    REPORT,
    SETDEFAULT,
    UPDPOLICY,
    UPDSA,
    A,
    B,
    algorithm,
    if_id,
    lifetime,
    mark,
    message,
    policy_id,
    policy_info,
    sa_id,
    sa_info,
    selector,
    template,
    u32,
)

from ipsec_aio.compact import shared
from ipsec_aio.enums import Direction, Mode, PolicyAction
from ipsec_aio.errors import CodecError
from ipsec_aio.events import (
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
from ipsec_aio.flow import Mark, Selector
from ipsec_aio.policy import Policy, PolicyKey, Template
from ipsec_aio.sa import SA, Algorithm, Encapsulation, Lifetime, Offload, SAKey, Usage
from ipsec_aio.wire import netlink as wire
from ipsec_aio.wire import xfrm
from ipsec_aio.wire.netlink import attribute

SA_KINDS = {NEWSA: 224, UPDSA: 224, DELSA: 24, EXPIRE: 232, FLUSHSA: 1, MAPPING: 64}
POLICY_KINDS = {NEWPOLICY: 168, UPDPOLICY: 168, DELPOLICY: 64, POLEXPIRE: 176, MIGRATE: 64}
ALGORITHMS = {1: 68, 2: 68, 3: 68, 18: 72, 20: 72}


def events(kind: int, payload: bytes = b"") -> tuple[Event, ...]:
    data = bytearray(message(kind, payload))
    size = 16 + len(payload)
    struct.pack_into("=I", data, 0, size)
    (m,) = wire.messages(memoryview(data), len(data))
    return xfrm.decode(memoryview(data), m)


def event(kind: int, payload: bytes = b"") -> Any:
    (found,) = events(kind, payload)
    return found


def sa(*attributes: bytes, **info: Any) -> SA:
    found = event(NEWSA, sa_info(**info) + b"".join(attributes)).sa
    assert isinstance(found, SA)
    return found


def policy(*attributes: bytes, **info: Any) -> Policy:
    found = event(NEWPOLICY, policy_info(**info) + b"".join(attributes)).policy
    assert isinstance(found, Policy)
    return found


# SAs


def test_an_sa() -> None:
    found = event(
        NEWSA,
        sa_info(
            mode=1,
            reqid=7,
            flags=128 | 4,
            usage=(1, 2, 3, 4),
            sel=selector(
                bytes([10, 1, 0, 0]),
                bytes([10, 2, 0, 0]),
                family=2,
                source_prefix=16,
                destination_prefix=24,
                ports=(5000, 0xFFFF, 53, 0xFF00),
                proto=17,
                ifindex=3,
                user=1000,
            ),
        )
        + GCM
        + mark(5, 0xFF)
        + if_id(42)
        + u32(29, 0x10)
        + u32(30, 0xF0)
        + u32(24, 3)
        + attribute(28, struct.pack("=iB3x", 4, 2 | 4))
        + attribute(33, b"\x01")
        + attribute(4, struct.pack(">HHH", 0x0200, 4500, 4501) + bytes(2) + A + bytes(12)),
    )
    assert found == SAAdded(
        SA(
            destination=B,
            proto=50,
            spi=0x1001,
            source=A,
            mode=Mode.TUNNEL,
            reqid=7,
            mark=Mark(5, 0xFF),
            if_id=42,
            aead=Algorithm("rfc4106(gcm(aes))", 160, 128),
            encapsulation=Encapsulation(2, 4500, 4501, A),
            selector=Selector(
                source=bytes([10, 1, 0, 0]),
                destination=bytes([10, 2, 0, 0]),
                source_prefix=16,
                destination_prefix=24,
                source_port=53,
                source_port_mask=0xFF00,
                destination_port=5000,
                destination_port_mask=0xFFFF,
                proto=17,
                family=2,
                ifindex=3,
                user=1000,
            ),
            replay_window=32,
            esn=True,
            usage=Usage(1, 2, 3, 4),
            direction=Direction.IN,
            set_mark=Mark(0x10, 0xF0),
            offload=Offload(4, inbound=True, packet=True),
            flags=132,
            extra_flags=3,
        )
    )


def test_addresses_have_their_familys_length() -> None:
    found = sa(source=A6, destination=B6, family=10, sel=selector(A6, B6, family=10))
    assert (found.source, found.destination, found.selector.source) == (A6, B6, A6)


def test_a_mapped_address_is_not_unmapped_as_the_kernel_would_not_use_it_for_ipv4() -> None:
    mapped = bytes(10) + b"\xff\xff" + A
    assert sa(source=mapped, destination=mapped, family=10).source == mapped


def test_an_update_is_an_addition_with_a_caveat() -> None:
    assert event(UPDSA, sa_info(reqid=3)) == SAAdded(sa(reqid=3), updated=True)


def test_encryption_and_authentication() -> None:
    found = sa(
        algorithm(1, "hmac(sha256)", 256),
        algorithm(20, "hmac(sha256)", 256, 128),
        algorithm(2, "cbc(aes)", 128),
        algorithm(3, "deflate", 0),
    )
    assert found.authentication == Algorithm("hmac(sha256)", 256, 128)
    assert found.encryption == Algorithm("cbc(aes)", 128)
    assert found.compression == Algorithm("deflate")
    assert found.aead is None


def test_authentication_of_kernels_that_do_not_tell_the_icv() -> None:
    assert sa(algorithm(1, "hmac(md5)", 128)).authentication == Algorithm("hmac(md5)", 128)


def test_algorithms_are_interned() -> None:
    assert sa(GCM).aead is sa(GCM, spi=9).aead


def test_no_key_byte_is_copied() -> None:
    found = sa(
        GCM, algorithm(20, "hmac(sha512)", 512, 256), algorithm(2, "cbc(aes)", 256), spi=0x1002
    )
    assert "KEY-" not in repr(found)


def test_original_address_of_an_encapsulation_may_be_missing() -> None:
    assert sa(attribute(4, struct.pack("=HHH", 2, 0, 0) + bytes(18))).encapsulation == (
        2,
        0,
        0,
        b"",
    )


def test_replay_window_of_any_size() -> None:
    assert sa(replay_window=7).replay_window == 7
    assert (
        sa(attribute(23, struct.pack("=6I", 0, 0, 0, 0, 0, 256)), replay_window=7).replay_window
        == 256
    )
    assert sa().esn is False


def test_limits() -> None:
    assert sa().lifetime == Lifetime()
    limits = lifetime(amounts=(1, 0, INF, 4), seconds=(5, 0, INF, 8))
    assert sa(limits=limits).lifetime == Lifetime(1, 0, None, 4, 5, None, None, 8)


def test_set_mark_without_a_mask_sets_all_bits() -> None:
    assert sa(u32(29, 6)).set_mark == Mark(6, 0xFFFFFFFF)
    assert sa(u32(30, 6)).set_mark is None


@pytest.mark.parametrize(("value", "expected"), [(1, Direction.IN), (2, Direction.OUT)])
def test_direction(value: int, expected: Any) -> None:
    assert sa(attribute(33, bytes([value]))).direction is expected
    assert sa().direction is None


@pytest.mark.parametrize("value", [0, 3, 255])
def test_unknown_direction(value: int) -> None:
    with pytest.raises(CodecError, match="direction"):
        sa(attribute(33, bytes([value])))


@pytest.mark.parametrize("mode", list(Mode))
def test_modes(mode: Any) -> None:
    assert sa(mode=int(mode)).mode is mode


def test_an_unknown_mode_is_no_sa() -> None:
    with pytest.raises(CodecError, match="mode"):
        sa(mode=6)


@pytest.mark.parametrize("proto", [0, 4, 41, 43, 51, 60, 108, 255])
def test_protocols_are_numbers(proto: int) -> None:
    assert sa(proto=proto).proto == proto


@pytest.mark.parametrize("family", [0, 1, 3, 11])
def test_unknown_family(family: int) -> None:
    with pytest.raises(CodecError, match="family"):
        sa(family=family)


def test_a_selector_without_a_family_is_any() -> None:
    assert sa(sel=selector(A, B, family=0, source_prefix=99)).selector == Selector()


def test_unknown_family_of_a_selector() -> None:
    with pytest.raises(CodecError, match="family"):
        sa(sel=selector(family=7))


@pytest.mark.parametrize(("family", "bits"), [(2, 33), (10, 129)])
@pytest.mark.parametrize("at_source", [False, True])
def test_a_prefix_longer_than_an_address(family: int, bits: int, at_source: bool) -> None:
    with pytest.raises(CodecError, match="prefix"):
        sa(
            sel=selector(
                A6,
                B6,
                family=family,
                source_prefix=bits * at_source,
                destination_prefix=bits * (not at_source),
            )
        )


def test_deletion() -> None:
    payload = sa_id(spi=0x77, proto=51) + attribute(6, sa_info()) + GCM + mark(1, 3) + if_id(2)
    assert event(DELSA, payload) == SADeleted(SAKey(B, 51, 0x77, Mark(1, 3), 2))
    assert event(DELSA, sa_id(B6, family=10)) == SADeleted(SAKey(B6, 50, 0x1001))


@pytest.mark.parametrize("hard", [0, 1])
def test_expiry(hard: Any) -> None:
    found = event(EXPIRE, sa_info(spi=9) + bytes([hard]) + bytes(7) + mark(1, 3) + if_id(2))
    assert isinstance(found, SAExpired)
    assert found.hard is bool(hard)
    assert found.sa.key == SAKey(B, 50, 9, Mark(1, 3), 2)


@pytest.mark.parametrize("proto", [0, 50, 255])
def test_flush(proto: int) -> None:
    assert event(FLUSHSA, bytes([proto])) == SAsFlushed(proto)


def test_mapping() -> None:
    payload = (
        sa_id()
        + struct.pack("=I", 5)
        + A.ljust(16, b"\0")
        + B.ljust(16, b"\0")
        + struct.pack(">HH", 4500, 1025)
    )
    assert event(MAPPING, payload) == SAMapped(SAKey(B, 50, 0x1001), 5, A, B, 4500, 1025)


def migration(
    old: tuple[bytes, bytes] = (A, B),
    new: tuple[bytes, bytes] = (B, A),
    families: tuple[int, int] = (2, 2),
) -> bytes:
    addresses = b"".join(a.ljust(16, b"\0") for a in (old[1], old[0], new[1], new[0]))
    return attribute(17, addresses + struct.pack("=BB2xIHH", 50, 1, 5, *families))


def test_migration_tells_each_pair() -> None:
    payload = (
        policy_id()
        + attribute(16, bytes(6))
        + migration()
        + migration(new=(A6, B6), families=(2, 10))
    )
    assert events(MIGRATE, payload) == (
        SAMigrated(50, 1, 5, A, B, B, A),
        SAMigrated(50, 1, 5, A, B, A6, B6),
    )
    assert events(MIGRATE, policy_id()) == ()


# Policies


def test_a_policy() -> None:
    found = event(
        NEWPOLICY,
        policy_info(
            selector(
                A,
                B,
                family=2,
                source_prefix=24,
                destination_prefix=32,
                ports=(5000, 0xFFFF, 0, 0),
                proto=17,
            ),
            priority=3,
            index=16,
            direction=0,
            flags=2,
            share=1,
            usage=(1, 2, 3, 4),
            limits=lifetime(seconds=(0, 9, 0, 0)),
        )
        + attribute(
            5,
            template(A, B, reqid=7, mode=1, spi=5, share=3, algorithms=(1, 2, 3))
            + template(proto=108, optional=1),
        )
        + attribute(8, struct.pack("=HHBBH", 18, 0, 1, 1, 10) + b"system_u:o")
        + attribute(16, bytes([1]) + bytes(5))
        + mark(6, 0xF)
        + if_id(8),
    )
    assert isinstance(found, PolicyAdded)
    p = found.policy
    assert (p.priority, p.index, p.flags, p.share, p.kind) == (3, 16, 2, 1, 1)
    assert (p.mark, p.if_id, p.security_context) == (Mark(6, 0xF), 8, b"system_u:o")
    assert (p.usage, p.lifetime) == (Usage(1, 2, 3, 4), Lifetime(hard_add_seconds=9))
    assert (p.direction, p.action, p.of_socket) == (Direction.IN, PolicyAction.ALLOW, False)
    assert p.selector == Selector(A, B, 24, 32, 0, 0, 5000, 0xFFFF, 17, 2)
    first, second = p.templates
    assert (first.source, first.destination, first.reqid, first.mode) == (A, B, 7, Mode.TUNNEL)
    assert (first.spi, first.share, first.optional, first.family) == (5, 3, False, 2)
    assert (first.auth_algorithms, first.encryption_algorithms, first.compression_algorithms) == (
        1,
        2,
        3,
    )
    assert (second.proto, second.optional, second.auth_algorithms) == (108, True, 0xFFFFFFFF)
    assert p.protects


def test_a_policy_without_templates() -> None:
    assert policy().templates == ()
    assert policy(attribute(5, b"")).templates == ()
    assert policy().security_context == b""


def test_a_blocking_policy() -> None:
    assert event(UPDPOLICY, policy_info(action=1)).policy.action is PolicyAction.BLOCK


@pytest.mark.parametrize(("value", "of_socket"), [(0, False), (2, False), (3, True), (5, True)])
def test_policy_directions(value: int, of_socket: bool) -> None:
    found = policy(direction=value, index=8 | value)
    assert found.direction is Direction(value % 3)
    assert found.of_socket is of_socket


@pytest.mark.parametrize(("value", "index"), [(6, 14), (255, 15), (3, 8), (0, 11)])
def test_unknown_policy_directions(value: int, index: int) -> None:
    with pytest.raises(CodecError, match="direction"):
        policy(direction=value, index=index)


def test_unknown_action() -> None:
    with pytest.raises(CodecError, match="action"):
        policy(action=2)


def test_template_of_unknown_mode() -> None:
    with pytest.raises(CodecError, match="mode"):
        policy(attribute(5, template(mode=9)))


def test_policy_deletion_by_key_and_by_index() -> None:
    inner = attribute(7, policy_info(index=24)) + mark(1, 1) + if_id(2)
    sel = Selector(A, B, 32, 32, family=2)
    expected = PolicyDeleted(PolicyKey(sel, Direction.IN, Mark(1, 1), 2), 24)
    assert event(DELPOLICY, policy_id() + inner) == expected
    assert event(DELPOLICY, policy_id(selector(b"", b""), index=24) + inner) == expected


def test_policy_deletion_must_name_the_policy() -> None:
    with pytest.raises(CodecError, match="without the policy"):
        event(DELPOLICY, policy_id())


@pytest.mark.parametrize("hard", [0, 1])
def test_policy_expiry(hard: Any) -> None:
    found = event(POLEXPIRE, policy_info(index=32) + bytes([hard]) + bytes(7) + mark(3, 3))
    assert isinstance(found, PolicyExpired)
    assert (found.hard, found.policy.index, found.policy.mark) == (bool(hard), 32, Mark(3, 3))


def test_policy_flush() -> None:
    assert event(FLUSHPOLICY) == PoliciesFlushed(0)
    assert event(FLUSHPOLICY, attribute(16, bytes([1]) + bytes(5))) == PoliciesFlushed(1)


@pytest.mark.parametrize("kind", [GETDEFAULT, SETDEFAULT])
def test_default_actions(kind: int) -> None:
    allow, block = PolicyAction.ALLOW, PolicyAction.BLOCK
    assert event(kind, bytes([1, 2, 0, 0])) == DefaultActions(block, allow, allow)


def test_unknown_default_action() -> None:
    with pytest.raises(CodecError, match="default"):
        event(GETDEFAULT, bytes([1, 2, 3]))


@pytest.mark.parametrize("kind", [ACQUIRE, REPORT, NEWAE])
def test_what_changes_no_table_says_nothing(kind: int) -> None:
    assert events(kind) == ()


@pytest.mark.parametrize("kind", [0, 0x0F, 0x16, 0x29, 0xFFFF])
def test_unknown_types(kind: int) -> None:
    with pytest.raises(CodecError, match="unknown type"):
        events(kind)


# Length checks


@pytest.mark.parametrize(
    ("kind", "size"), [*SA_KINDS.items(), *POLICY_KINDS.items(), (GETDEFAULT, 3)]
)
def test_payload_cut_short(kind: int, size: int) -> None:
    for cut in (0, size - 1):
        with pytest.raises(CodecError, match=f"has {cut} bytes, {size} expected"):
            events(kind, bytes(cut))


@pytest.mark.parametrize(
    ("kind", "size"),
    [*ALGORITHMS.items(), (4, 24), (21, 8), (23, 24), (24, 4), (28, 5), (29, 4), (31, 4), (33, 1)],
)
def test_sa_attribute_cut_short(kind: int, size: int) -> None:
    size = 8 if kind == 28 else size
    for cut in (0, size - 1):
        with pytest.raises(CodecError, match=f"attribute {kind} has {cut} bytes, {size} expected"):
            sa(attribute(kind, bytes(cut)))


def test_set_mark_mask_cut_short() -> None:
    with pytest.raises(CodecError, match="attribute 30 has 3 bytes"):
        sa(u32(29, 1), attribute(30, bytes(3)))


@pytest.mark.parametrize("kind", sorted(ALGORITHMS))
@pytest.mark.parametrize("bits", [1, 8, 0xFFFFFFFF])
def test_key_length_beyond_the_attribute(kind: int, bits: int) -> None:
    header = b"x".ljust(64, b"\0") + struct.pack("=I", bits) + bytes(ALGORITHMS[kind] - 68)
    with pytest.raises(CodecError, match="shorter than the key length"):
        sa(attribute(kind, header))


@pytest.mark.parametrize("name", [b"\xff", b"a\x01b", b"x" * 64, "é".encode()])
def test_algorithm_names_are_printable_ascii_with_an_end(name: Any) -> None:
    with pytest.raises(CodecError, match="readable name"):
        sa(attribute(2, name.ljust(64, b"\0") + bytes(4)))


def test_an_unknown_algorithm_name_is_kept() -> None:
    assert sa(algorithm(2, "ctr(quantum)", 0)).encryption == Algorithm("ctr(quantum)")


@pytest.mark.parametrize("size", [1, 63, 65])
def test_templates_cut_short(size: int) -> None:
    with pytest.raises(CodecError, match=f"XFRMA_TMPL of {size} bytes"):
        policy(attribute(5, bytes(size)))


def test_security_context_cut_short() -> None:
    with pytest.raises(CodecError, match="attribute 8 has 7 bytes"):
        policy(attribute(8, bytes(7)))
    with pytest.raises(CodecError, match="SEC_CTX has 2 bytes, 3 expected"):
        policy(attribute(8, struct.pack("=HHBBH", 0, 0, 1, 1, 3) + b"ab"))


def test_policy_type_cut_short() -> None:
    with pytest.raises(CodecError, match="attribute 16 has 0 bytes"):
        policy(attribute(16, b""))


def test_deleted_policy_cut_short() -> None:
    with pytest.raises(CodecError, match="attribute 7 has 167 bytes"):
        event(DELPOLICY, policy_id() + attribute(7, bytes(167)))


def test_migration_cut_short() -> None:
    with pytest.raises(CodecError, match="MIGRATE has 75 bytes"):
        events(MIGRATE, policy_id() + attribute(17, bytes(75)))


def test_unknown_attributes_are_skipped() -> None:
    assert sa(attribute(999, b"abc"), GCM) == sa(GCM)


# Requests


def test_requests() -> None:
    for build, kind in ((xfrm.dump_sas, 0x12), (xfrm.dump_policies, 0x15)):
        assert build(4) == struct.pack("=IHHII", 16, kind, 0x301, 4, 0)
    assert xfrm.get_default(4) == struct.pack("=IHHII", 20, 0x28, 1, 4, 0) + bytes(4)


def test_request_for_an_sa() -> None:
    plain = xfrm.get_sa(SAKey(B, 50, 0x1001, if_id=3), 5)
    assert plain == struct.pack("=IHHII", 40, 0x12, 1, 5, 0) + sa_id()
    marked = xfrm.get_sa(SAKey(B6, 51, 2, Mark(1, 3)), 5)
    assert marked[16:] == sa_id(B6, spi=2, proto=51, family=10) + mark(1, 3)


def test_request_for_no_address() -> None:
    with pytest.raises(ValueError, match="4 or 16 bytes"):
        xfrm.get_sa(SAKey(b"", 50, 1), 1)


# Properties

KINDS = sorted({*SA_KINDS, *POLICY_KINDS, GETDEFAULT, FLUSHPOLICY, ACQUIRE})


@given(st.sampled_from(KINDS), st.binary(max_size=500))
def test_arbitrary_bytes_give_codec_errors_only(kind: int, payload: bytes) -> None:
    try:
        events(kind, payload)
    except CodecError as error:
        text = str(error)
    else:
        text = ""
    assert len(text) < 100


VALID = [
    message(NEWSA, sa_info() + GCM + mark(1, 1) + if_id(3) + algorithm(20, "hmac(sha1)", 160, 96)),
    message(EXPIRE, sa_info() + bytes(8) + mark(1, 1)),
    message(DELSA, sa_id() + attribute(6, sa_info()) + GCM),
    message(NEWPOLICY, policy_info() + attribute(5, template() + template()) + mark(1, 1)),
    message(DELPOLICY, policy_id() + attribute(7, policy_info()) + attribute(5, template())),
    message(MIGRATE, policy_id() + migration() + migration()),
]


@given(st.sampled_from(VALID), st.data())
def test_mutated_messages_give_codec_errors_only(valid: bytes, data: st.DataObject) -> None:
    mutated = bytearray(valid)
    for _ in range(data.draw(st.integers(1, 4))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(mutated)))
    decoded = 0
    text = ""
    try:
        for m in wire.messages(mutated, cut):
            decoded += len(xfrm.decode(mutated, m))
    except CodecError as error:
        text = str(error)
    assert "KEY" not in text
    assert decoded <= len(valid)


addresses = st.sampled_from([(A, B, 2), (B, A, 2), (A6, B6, 10)])


@given(
    addresses,
    st.integers(0, 0xFFFFFFFF),
    st.integers(0, 255),
    st.sampled_from(list(Mode)),
    st.integers(0, 0xFFFFFFFF),
    st.integers(0, 255),
    st.tuples(*[st.integers(0, 0xFFFFFFFF)] * 2),
    st.integers(0, 0xFFFFFFFF),
    st.integers(0, 512),
)
def test_sas_round_trip(
    ends: tuple[bytes, bytes, int],
    spi: int,
    proto: int,
    mode: Any,
    reqid: int,
    flags: int,
    marks: tuple[int, int],
    interface: int,
    bits: int,
) -> None:
    source, destination, family = ends
    found = sa(
        algorithm(18, "gcm", bits, 96),
        mark(*marks),
        if_id(interface),
        source=source,
        destination=destination,
        family=family,
        spi=spi,
        proto=proto,
        mode=int(mode),
        reqid=reqid,
        flags=flags,
    )
    assert (found.source, found.destination, found.spi, found.proto) == (
        source,
        destination,
        spi,
        proto,
    )
    assert (found.mode, found.reqid, found.flags) == (mode, reqid, flags)
    assert found.key == SAKey(destination, proto, spi, Mark(*marks), interface)
    assert found.aead == Algorithm("gcm", bits, 96)
    assert found.esn is bool(flags & 128)


def described(first: bool, reqid: int) -> list[Any]:
    """An SA and a policy as decoded, or as their users make them."""
    if first:
        told = template(A, B, reqid=reqid, mode=1)
        return [
            sa(GCM, if_id(3), reqid=reqid, mode=1, usage=(1, 2, 3, 4)),
            policy(attribute(5, told), mark(1, 3), priority=9),
        ]
    gcm = Algorithm("rfc4106(gcm(aes))", 160, 128)
    return [
        SA(
            destination=B,
            proto=50,
            spi=0x1001,
            source=A,
            mode=Mode.TUNNEL,
            reqid=reqid,
            if_id=3,
            aead=gcm,
            replay_window=32,
            usage=Usage(1, 2, 3, 4),
        ),
        Policy(
            selector=Selector(A, B, 32, 32, family=2),
            priority=9,
            index=8,
            templates=(Template(source=A, destination=B, reqid=reqid, mode=Mode.TUNNEL, family=2),),
            mark=Mark(1, 3),
        ),
    ]


def test_what_is_decoded_is_what_a_user_makes() -> None:
    for decoded, made in zip(described(True, 5), described(False, 5), strict=True):
        assert decoded == made
        assert hash(decoded) == hash(made)
        assert repr(decoded) == repr(made)
        assert type(decoded) is type(made)
        assert copy.copy(decoded) == made
        assert pickle.loads(pickle.dumps(decoded)) == made
        assert {decoded: 1}[made] == 1
        with pytest.raises(dataclasses.FrozenInstanceError):
            decoded.if_id = 4
    for decoded, made in zip(described(True, 5), described(False, 6), strict=True):
        assert decoded != made
    found, made = described(True, 6)[0], described(False, 7)[0]
    assert dataclasses.replace(found, reqid=7) == made
    assert dataclasses.replace(made, mode=Mode.BEET, reqid=6) == dataclasses.replace(
        found, mode=Mode.BEET
    )


def test_a_decoder_shares_what_is_equal() -> None:
    first, second = sa(GCM, spi=1, usage=(1, 1, 1, 1)), sa(GCM, spi=2, usage=(2, 2, 2, 2))
    assert shared(first, second)
    assert first.source is second.source
    assert first.selector is second.selector
    for other in (
        sa(GCM, spi=1, proto=51),
        sa(GCM, spi=1, mode=1),
        sa(GCM, spi=1, replay_window=33),
        sa(GCM, spi=1, flags=1),
        sa(GCM, spi=1, limits=lifetime(seconds=(1, 1, 1, 1))),
        sa(GCM, attribute(33, b"\x01"), spi=1),
        sa(algorithm(18, "rfc4106(gcm(aes))", 288, 128), spi=1),
        sa(algorithm(18, "rfc4106(gcm(aes))", 160, 64), spi=1),
    ):
        assert not shared(first, other)
        assert first != other
    for other in (policy(priority=1), policy(direction=1), policy(action=1), policy(flags=1)):
        assert not shared(policy(), other)
        assert policy() != other


def test_a_decoder_remembers_a_bounded_number() -> None:
    decoder = xfrm.Decoder(limit=4)
    for n in range(100):
        address = bytes([10, 0, 0, n])
        data = message(NEWSA, sa_info(address, B, reqid=n, sel=selector(address, B, family=2)))
        (m,) = wire.messages(data, len(data))
        (added,) = decoder.decode(data, m)
        assert isinstance(added, SAAdded)
        assert (added.sa.source, added.sa.reqid, added.sa.selector.source) == (address, n, address)
    tables = [decoder._selectors, decoder._numbers, *decoder._addresses.values()]
    assert all(len(table) <= 4 for table in tables)


def test_the_key_pattern_is_where_the_kernel_puts_keys() -> None:
    assert KEY[:20] in message(NEWSA, sa_info() + GCM)
