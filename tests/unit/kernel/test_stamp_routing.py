"""Policy routing that looks at marks: what is read, what is shown, and what cannot be read."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator

import pytest
import xfrm_messages as m
from fake_netlink import FakeKernel, Reply, done, error
from hypothesis import given
from hypothesis import strategies as st

from ipsec_aio.errors import BackendUnavailable, CodecError
from ipsec_aio.kernel.stamp_routing import MarkRouting
from ipsec_aio.wire import netlink as wire
from ipsec_aio.wire import rtnetlink

NEWRULE, DELRULE = 32, 33


def rule(
    *, family: int = 2, priority: int = 100, mark: int = 0, mask: int = 0, more: bytes = b""
) -> bytes:
    payload = struct.pack("=B11x", family)
    for kind, value in ((6, priority), (10, mark), (16, mask)):
        payload += m.u32(kind, value) if value else b""
    return payload + more


@pytest.fixture
def kernel() -> Iterator[FakeKernel]:
    kernel = FakeKernel()
    yield kernel
    assert all(s.closed for s in kernel.opened)


@pytest.fixture
def routing(kernel: FakeKernel) -> Iterator[MarkRouting]:
    routing = MarkRouting(factory=kernel.socket)
    yield routing
    routing.close()


def has(kernel: FakeKernel, *rules: bytes) -> list[int]:
    """Have these rules; return the list of the times that they are asked for."""
    asked: list[int] = []

    def answer(protocol: int, kind: int, sequence: int, payload: bytes) -> list[Reply]:
        asked.append(kind)
        return kernel.dump(NEWRULE, list(rules), sequence)

    kernel.answer = answer
    return asked


@pytest.mark.parametrize(
    ("rules", "shown"),
    [
        ([], ""),
        ([rule(), rule(family=10)], ""),
        ([rule(mark=0x4000, mask=0x4000)], "(ip rule 100: fwmark 0x4000/0x4000)"),
        ([rule(family=10, priority=0, mask=0xFF)], "(ip -6 rule 0: fwmark 0x0/0xff)"),
        ([rule(family=128, mark=1, mask=1)], ""),  # multicast routing of its own
        ([rule(mark=1, mask=1)] * 5, " and 2 more)"),
    ],
)
def test_rules_that_look_at_marks(
    kernel: FakeKernel, routing: MarkRouting, rules: list[bytes], shown: str
) -> None:
    has(kernel, *rules)
    assert bool(routing.problem) is bool(shown)
    assert shown in routing.problem


def test_rules_are_asked_for_again_after_a_change_only(
    kernel: FakeKernel, routing: MarkRouting
) -> None:
    asked = has(kernel)
    for _ in range(3):
        assert routing.problem == ""
        routing.drain()
    assert asked == [34]
    asked = has(kernel, rule(mark=1, mask=1))
    kernel.emit(m.message(NEWRULE, rule(mark=1, mask=1)), protocol=0)
    assert routing.problem == ""
    routing.drain()
    assert routing.problem
    asked = has(kernel)
    kernel.emit(m.message(DELRULE, rule(family=10, mark=1, mask=1)), protocol=0)
    routing.drain()
    assert routing.problem == ""
    assert asked == [34]


def test_after_a_loss_they_are_asked_for_again(kernel: FakeKernel, routing: MarkRouting) -> None:
    has(kernel)
    assert routing.problem == ""
    asked = has(kernel, rule(mark=1, mask=1))
    kernel.emit(OSError(errno.ENOBUFS, "No buffer space available"), protocol=0)
    routing.drain()
    assert routing.problem
    assert asked == [34]


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ([error(errno.ENOMEM, sequence=1)], "Cannot allocate memory"),
        ([OSError(errno.ENOBUFS, "No buffer space available")], "faster"),
        ([m.message(NEWRULE, b"", sequence=1)], "routing rule has 0 bytes"),
        ([], "Interrupted"),
        ([done(1, flags=2 | wire.NLM_F_DUMP_INTR)], "Interrupted"),
    ],
)
def test_what_cannot_be_read_is_in_doubt_and_asked_for_again(
    kernel: FakeKernel, routing: MarkRouting, reply: list[Reply], reason: str
) -> None:
    kernel.answer = lambda protocol, kind, sequence, payload: reply
    assert "TCP cannot be stamped" in routing.problem
    has(kernel)
    assert routing.problem == ""
    kernel.answer = lambda protocol, kind, sequence, payload: reply


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EAFNOSUPPORT])
def test_a_kernel_without_policy_routing_has_no_rules(
    kernel: FakeKernel, routing: MarkRouting, code: int
) -> None:
    kernel.answer = lambda protocol, kind, sequence, payload: [error(code, sequence=sequence)]
    assert routing.problem == ""


@pytest.mark.parametrize("opened", [0, 1])
def test_half_opened_is_closed(kernel: FakeKernel, opened: int) -> None:
    def factory(family: int, kind: int, protocol: int) -> socket.socket:
        if len(kernel.opened) == opened:
            raise OSError(errno.EMFILE, "Too many open files")
        return kernel.socket(family, kind, protocol)

    with pytest.raises(BackendUnavailable, match="Too many"):
        MarkRouting(factory=factory)


def only(data: bytes) -> wire.Message:
    (found,) = wire.messages(data, len(data))
    return found


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (bytes(11), "routing rule has 11 bytes, 12 expected"),
        (rule(more=wire.attribute(16, b"xx")), "attribute 16 of a routing rule"),
        (rule(more=b"\x08\0"), "attribute"),
    ],
)
def test_broken_rules(payload: bytes, words: str) -> None:
    data = m.message(NEWRULE, payload)
    with pytest.raises(CodecError, match=words):
        rtnetlink.decode_mark_rule(data, only(data))


def test_other_messages_are_no_rules() -> None:
    data = m.message(DELRULE, rule(mark=1, mask=1))
    assert rtnetlink.decode_mark_rule(data, only(data)) is None


@given(st.binary(max_size=100))
def test_arbitrary_bytes_give_codec_errors_only(payload: bytes) -> None:
    data = m.message(NEWRULE, payload)
    try:
        rtnetlink.decode_mark_rule(data, only(data))
    except CodecError as caught:
        text = str(caught)
    else:
        text = ""
    assert len(text) < 100
