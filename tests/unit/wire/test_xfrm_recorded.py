"""What a real kernel said (data/xfrm.txt, made by record_xfrm.py) against what ``ip xfrm`` says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
from ipsec_aio.flow import Mark, Selector, format_address, pack_address
from ipsec_aio.policy import Policy
from ipsec_aio.sa import SA, Algorithm, Encapsulation, Lifetime
from ipsec_aio.wire import netlink as wire
from ipsec_aio.wire import xfrm

KEYS = re.compile(b"KEY-OF-|NOT-A-SECRET|01234567")
A, B = pack_address("192.0.2.1"), pack_address("192.0.2.2")
PROTOS = {"esp": 50, "ah": 51, "comp": 108}
GCM = Algorithm("rfc4106(gcm(aes))", 160, 128)
SHA256 = Algorithm("hmac(sha256)", 256, 128)


LAYER4 = {6: "tcp", 17: "udp"}
ENCAPSULATIONS = {1: "espinudp-nonike", 2: "espinudp", 7: "espintcp"}
FLAGS = {"noecn": 1, "decap-dscp": 2, "nopmtudisc": 4, "wildrecv": 8, "icmp": 16, "af-unspec": 32}
FLAGS |= {"align4": 64, "esn": 128}
LIMITS = {
    f"{what}-{kind}": f"{kind}_{name}"
    for kind in ("soft", "hard")
    for what, name in (
        ("time", "add_seconds"),
        ("time-use", "use_seconds"),
        ("byte", "bytes"),
        ("packet", "packets"),
    )
}


class Step(NamedTuple):
    command: str
    messages: list[bytes]
    text: str


def read() -> dict[str, Step]:
    steps: dict[str, Step] = {}
    content = (Path(__file__).parent / "data/xfrm.txt").read_text()
    for block in content.split("== ")[1:]:
        name, *lines = block.splitlines()
        steps[name] = Step(
            lines[0].removeprefix("$ "),
            [bytes.fromhex(line[2:]) for line in lines if line[:2] in ("< ", "D ")],
            "\n".join(line[2:] for line in lines if line[:2] == "| "),
        )
    return steps


STEPS = read()
MESSAGES = [message for step in STEPS.values() for message in step.messages]


def decode(data: bytes) -> list[Event]:
    return [
        event
        for message in wire.messages(data, len(data))
        if message.kind >= xfrm.FIRST_TYPE
        for event in xfrm.decode(data, message)
    ]


def events(name: str) -> list[Event]:
    return [event for data in STEPS[name].messages for event in decode(data)]


def sa(name: str) -> SA:
    event = events(name)[0]
    assert isinstance(event, SAAdded)
    return event.sa


def policy(name: str) -> Policy:
    event = events(name)[0]
    assert isinstance(event, PolicyAdded)
    return event.policy


def states() -> Iterator[tuple[str, SA, str]]:
    for name, step in STEPS.items():
        texts = [t for t in re.split(r"\n(?=\S)", step.text) if re.search(r"proto \w+ spi", t)]
        found = [e.sa for e in events(name) if isinstance(e, SAAdded | SAExpired)]
        yield from ((name, sa, t) for sa, t in zip(found, texts, strict=False))


def layer4(selector: Selector) -> str:
    """A selector's protocol and ports as ip prints them."""
    words: list[str] = []
    if selector.proto:
        words.append(f"proto {LAYER4[selector.proto]}")
    for word, port, mask in (
        ("sport", selector.source_port, selector.source_port_mask),
        ("dport", selector.destination_port, selector.destination_port_mask),
    ):
        if mask:
            assert mask == 0xFFFF
            words.append(f"{word} {port}")
    return "".join(f"{word} " for word in words)


STATES = list(states())


@pytest.mark.parametrize(("name", "found", "text"), STATES, ids=[name for name, *_ in STATES])
def test_an_sa_is_what_ip_says(name: Any, found: SA, text: str) -> None:
    """Everything that ``ip xfrm`` prints of an SA, its keys excepted."""
    mode = found.mode.name.lower()
    assert f"src {found.src} dst {found.dst}" in text
    proto = next(word for word, number in PROTOS.items() if number == found.proto)
    assert f"proto {proto} spi {found.spi:#010x} reqid {found.reqid} mode {mode}" in text
    window = re.search(r"replay_window (\d+)", text) or re.search(r"replay-window (\d+)", text)
    assert window is not None
    assert found.replay_window == int(window[1])
    assert found.esn is ("flag esn" in text)
    assert (f"mark {found.mark.value:#x}/{found.mark.mask:#x}" in text) or not found.mark.mask
    assert ("\n\tmark" in text) is bool(found.mark.mask)
    assert (f"if_id {found.if_id:#x}" in text) if found.if_id else ("if_id" not in text)
    printed = [
        (keyword, algorithm, int(icv or 0))
        for keyword, algorithm, icv in re.findall(
            r"\n\t(aead|auth-trunc|enc|comp) (\S+)(?: (?:0x\w+|<<Keys hidden>>))?(?: (\d+))?", text
        )
    ]
    assert printed == [
        (keyword, algorithm.name, algorithm.icv_bits)
        for keyword, algorithm in (
            ("aead", found.aead),
            ("auth-trunc", found.authentication),
            ("enc", found.encryption),
            ("comp", found.compression),
        )
        if algorithm is not None
    ]
    for algorithm in found.algorithms:
        if algorithm is not None and algorithm.key_bits and "hidden" not in text:
            assert re.search(
                rf" {re.escape(algorithm.name)} 0x\w{{{algorithm.key_bits // 4}}}\b", text
            )
    selector = found.selector
    if selector.family:
        assert (
            f"sel src {format_address(selector.source)}/{selector.source_prefix}"
            f" dst {format_address(selector.destination)}/{selector.destination_prefix}"
            f" {layer4(selector)}\n"
        ) in f"{text}\n"
    elif not found.larval:  # whose selector the kernel fills in without a family, and ignores
        assert "sel" not in text
    written = found.set_mark
    assert (written is not None) is ("output-mark" in text)
    assert written is None or f"output-mark {written.value:#x}/{written.mask:#x}\n" in text
    encapsulation = found.encapsulation
    assert (encapsulation is not None) is ("encap" in text)
    if encapsulation is not None:
        kind, source, destination, original = encapsulation
        address = format_address(original) if original else "0.0.0.0"
        ports = f"sport {source} dport {destination}"
        assert f"encap type {ENCAPSULATIONS[kind]} {ports} addr {address}\n" in text
    flags = re.search(r"replay-window \d+ flag (.*)", text)
    assert (
        found.flags == sum(FLAGS[word] for word in flags[1].split()) if flags else not found.flags
    )


COMMANDED = [name for name, step in STEPS.items() if "xfrm state add" in step.command]


@pytest.mark.parametrize("name", COMMANDED)
def test_an_sa_is_what_ip_was_told(name: Any) -> None:
    """What ``ip xfrm`` prints only where it is asked for more than it monitors."""
    command, found = STEPS[name].command, sa(name)
    limits = {kind: int(number) for kind, number in re.findall(r"limit (\S+) (\d+)", command)}
    assert found.lifetime == Lifetime(**{LIMITS[kind]: number for kind, number in limits.items()})
    assert found.extra_flags == ("extra-flag dont-encap-dscp" in command)
    assert found.direction is None
    assert found.offload is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gcm transport", {"reqid": 7, "mode": Mode.TRANSPORT, "aead": GCM, "replay_window": 32}),
        (
            "cbc tunnel",
            {"encryption": Algorithm("cbc(aes)", 128), "authentication": SHA256, "aead": None},
        ),
        (
            "sha1 default icv",
            {
                "encryption": Algorithm("cbc(des3_ede)", 192),
                "authentication": Algorithm("hmac(sha1)", 160, 96),
            },
        ),
        (
            "null encryption",
            {"encryption": Algorithm("ecb(cipher_null)"), "authentication": SHA256},
        ),
        ("ah", {"proto": 51, "authentication": SHA256, "encryption": None}),
        ("ipcomp", {"proto": 108, "compression": Algorithm("deflate"), "spi": 0x1006}),
        ("beet", {"mode": Mode.BEET}),
        ("v6 tunnel esn", {"esn": True, "replay_window": 256, "flags": 128}),
        ("mark", {"mark": Mark(5, 0xFF)}),
        ("if_id", {"if_id": 0x2A}),
        (
            "encapsulation",
            {"encapsulation": Encapsulation(2, 4500, 4501, pack_address("198.51.100.7"))},
        ),
        ("output mark", {"set_mark": Mark(0x10, 0xF0)}),
        ("limits", {"lifetime": Lifetime(1000, 2000, 30, 40, 3000, 3600, 100, 200)}),
        ("flags", {"flags": 1 | 2 | 32, "extra_flags": 1}),
        ("gmac", {"aead": Algorithm("rfc4543(gcm(aes))", 160, 128)}),
        ("ccm", {"aead": Algorithm("rfc4309(ccm(aes))", 152, 64)}),
        ("chacha", {"aead": Algorithm("rfc7539esp(chacha20,poly1305)", 288, 128)}),
        ("larval states", {"larval": True, "spi": 0x500}),
    ],
)
def test_sas(name: Any, expected: Any) -> None:
    found = sa(name)
    assert {field: getattr(found, field) for field in expected} == expected


@pytest.mark.parametrize(
    ("name", "encrypts", "authenticates"),
    [
        ("gcm transport", True, True),
        ("cbc tunnel", True, True),
        ("null encryption", False, True),
        ("gmac", False, True),
        ("ah", False, True),
        ("ipcomp", False, False),
        ("larval states", False, False),
    ],
)
def test_what_an_sa_does(name: Any, encrypts: bool, authenticates: bool) -> None:
    assert (sa(name).encrypts, sa(name).authenticates) == (encrypts, authenticates)


def test_an_update_tells_what_was_asked_for() -> None:
    assert events("gcm updated") == [SAAdded(sa("gcm updated"), updated=True)]
    assert sa("gcm updated").reqid == 8
    # … while the SA kept its reqid: this is what its deletion shows.
    assert "reqid 7" in STEPS["gcm deleted"].text


@pytest.mark.parametrize(
    ("name", "of"),
    [("gcm deleted", "gcm transport"), ("mark deleted", "mark"), ("if_id deleted", "if_id")],
)
def test_deletion_names_the_same_key(name: Any, of: str) -> None:
    assert events(name) == [SADeleted(sa(of).key)]


@pytest.mark.parametrize(("name", "hard"), [("soft expiry", False), ("hard expiry", True)])
def test_expiry_names_the_same_key_and_no_algorithms(name: Any, hard: Any) -> None:
    added, expired = events(name)
    assert isinstance(added, SAAdded)
    assert isinstance(expired, SAExpired)
    assert (expired.hard, expired.sa.key) == (hard, added.sa.key)
    assert expired.sa.algorithms == (None, None, None)


def test_flushes() -> None:
    assert events("flushed esp") == [SAsFlushed(50)]
    assert events("flushed all") == [SAsFlushed(0)]
    assert events("policies flushed") == [PoliciesFlushed(0)]
    assert events("sub policies flushed") == [PoliciesFlushed(1)]


def test_a_policy() -> None:
    found = policy("policy in")
    assert (found.direction, found.priority, found.action) == (Direction.IN, 3, PolicyAction.ALLOW)
    selector = found.selector
    assert (selector.source, selector.destination, selector.proto) == (A, B, 17)
    assert (selector.source_port, selector.source_port_mask) == (1000, 0xFFFF)
    assert (selector.destination_port, selector.destination_port_mask) == (5000, 0xFFFF)
    (template,) = found.templates
    assert (template.proto, template.mode, template.reqid) == (50, Mode.TRANSPORT, 7)
    assert found.protects
    assert not found.of_socket


def test_policy_update_and_deletion() -> None:
    updated = policy("policy updated")
    assert updated.key == policy("policy in").key
    assert (updated.priority, updated.templates[0].reqid) == (2, 8)
    assert events("policy deleted") == [PolicyDeleted(updated.key, updated.index)]


def test_policy_templates() -> None:
    comp, esp = policy("policy templates").templates
    assert (comp.proto, comp.optional, comp.reqid) == (108, True, 1)
    assert (esp.proto, esp.optional, esp.spi, esp.source, esp.destination) == (
        50,
        False,
        0x77,
        A,
        B,
    )


def test_policy_marks_and_interfaces() -> None:
    marked = policy("policy v6 marked")
    assert (marked.mark, marked.direction) == (Mark(6, 0xF), Direction.FWD)
    assert (marked.selector.source_prefix, marked.selector.destination_prefix) == (48, 64)
    assert len(marked.selector.source) == 16
    assert policy("policy if_id").if_id == 0x2A
    assert policy("policy if_id").templates[0].mode is Mode.BEET
    device = policy("policy device")
    assert (device.selector.ifindex, device.flags) == (1, 3)
    assert device.lifetime == Lifetime(soft_bytes=10, hard_add_seconds=3600)
    assert policy("policy block").action is PolicyAction.BLOCK
    assert policy("policy sub").kind == 1


def test_policy_expiry() -> None:
    added, expired = events("policy expiry")
    assert isinstance(added, PolicyAdded)
    assert isinstance(expired, PolicyExpired)
    assert expired.hard
    assert expired.policy.key == added.policy.key


def test_defaults() -> None:
    allow, block = PolicyAction.ALLOW, PolicyAction.BLOCK
    assert events("defaults") == [DefaultActions(block, allow, block)]
    assert events("defaults back") == [DefaultActions(allow, allow, allow)]


def test_a_sockets_own_policy_is_in_the_dump() -> None:
    own, other = events("dump of policies")
    assert isinstance(own, PolicyAdded)
    assert isinstance(other, PolicyAdded)
    assert (own.policy.of_socket, own.policy.direction) == (True, Direction.IN)
    assert not other.policy.of_socket


def test_migration_is_told_by_one_message_only() -> None:
    new = pack_address("192.0.2.11"), pack_address("192.0.2.12")
    assert events("migrate") == [SAMigrated(50, 1, 5, A, B, *new)]
    moved = sa("dump of states")
    assert (moved.source, moved.destination) == new


def test_mapping() -> None:
    added, *mapped = events("mapping")
    assert isinstance(added, SAAdded)
    peer = pack_address("198.51.100.2")
    assert set(mapped) == {SAMapped(added.sa.key, 3, peer, peer, 4500, 4555)}


def test_a_mapping_moves_nothing_in_the_kernel() -> None:
    assert 8 not in xfrm.GROUPS
    after = sa("states after mapping")
    assert after.key == sa("mapping").key
    assert after.encapsulation == Encapsulation(2, 4500, 4500)


def test_no_key_is_left_in_any_value() -> None:
    seen = 0
    for data in MESSAGES:
        seen += bool(KEYS.search(data))
        assert not KEYS.search(repr(decode(data)).encode())
    assert seen > 20


def test_every_cut_of_a_real_message_is_noticed_or_harmless() -> None:
    for data in MESSAGES:
        for size in range(len(data)):
            try:
                decode(len(data[:size]).to_bytes(4, "little") + data[4:size])
            except CodecError as error:
                text = str(error)
            else:
                continue
            assert not KEYS.search(text.encode())


@given(st.sampled_from(MESSAGES), st.data())
def test_mutated_real_messages_give_codec_errors_only(valid: bytes, data: st.DataObject) -> None:
    mutated = bytearray(valid)
    for _ in range(data.draw(st.integers(1, 6))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = decode(bytes(mutated))
    except CodecError as error:
        text = str(error)
    else:
        text = repr(found)
    assert not KEYS.search(text.encode())
