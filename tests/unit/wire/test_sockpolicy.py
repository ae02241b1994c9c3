"""A socket's policy as bytes: sizes, offsets, and that the kernel's own reader reads it back."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xfrm_messages import NEWPOLICY, A, B, message, policy_info, selector, template

from ipsec_aio.enums import Direction, Mode, PolicyAction
from ipsec_aio.flow import Mark, Selector
from ipsec_aio.policy import Policy, Template
from ipsec_aio.wire import netlink, xfrm
from ipsec_aio.wire.netlink import attribute
from ipsec_aio.wire.sockpolicy import MAX_TEMPLATES, encode

V4 = Selector(family=2)
V6 = Selector(family=10)


def read_back(value: bytes) -> Policy:
    """Read the bytes as the message that the kernel would tell of such a policy with."""
    data = message(NEWPOLICY, value[:168] + attribute(5, value[168:]))
    view = memoryview(bytearray(data))
    (found,) = netlink.messages(view, len(data))
    (event,) = xfrm.decode(view, found)
    policy: Policy = event.policy  # type: ignore[union-attr]
    return policy


def test_the_same_bytes_as_the_kernel_s_structures() -> None:
    wanted = policy_info(
        selector(
            A,
            B,
            family=2,
            source_prefix=24,
            destination_prefix=32,
            ports=(5000, 0xFFFF, 7, 0xF),
            proto=17,
            ifindex=3,
            user=9,
        ),
        priority=4,
        index=0,
        direction=1,
        action=1,
    ) + template(A, B, spi=0x1001, reqid=7, mode=1, optional=1, algorithms=(1, 2, 3))
    made = encode(
        Policy(
            selector=Selector(A, B, 24, 32, 7, 0xF, 5000, 0xFFFF, 17, 2, 3, 9),
            direction=Direction.OUT,
            action=PolicyAction.BLOCK,
            priority=4,
            templates=(
                Template(
                    mode=Mode.TUNNEL,
                    source=A,
                    destination=B,
                    spi=0x1001,
                    reqid=7,
                    optional=True,
                    auth_algorithms=1,
                    encryption_algorithms=2,
                    compression_algorithms=3,
                ),
            ),
        )
    )
    assert made == wanted


def test_sizes_and_offsets() -> None:
    assert len(encode(Policy(selector=V4))) == 168
    value = encode(
        Policy(selector=V6, direction=Direction.OUT, templates=(Template(reqid=5), Template()))
    )
    assert len(value) == 168 + 2 * 64
    # struct xfrm_userpolicy_info: sel.family, lft.soft_byte_limit, index, dir.
    assert struct.unpack_from("=H", value, 40) == (10,)
    assert struct.unpack_from("=4Q", value, 56) == (2**64 - 1,) * 4
    assert struct.unpack_from("=8Q", value, 88) == (0,) * 8
    assert struct.unpack_from("=IIBBBB", value, 152) == (0, 0, 1, 0, 0, 0)
    # struct xfrm_user_tmpl: id.proto, family, reqid, mode, aalgos to calgos.
    assert value[168 + 20] == 50
    assert struct.unpack_from("=H", value, 168 + 24) == (10,)
    assert struct.unpack_from("=IBBB", value, 168 + 44) == (5, 0, 0, 0)
    assert struct.unpack_from("=3I", value, 168 + 52) == (0xFFFFFFFF,) * 3


def test_a_tunnel_may_be_of_the_other_family() -> None:
    tunnel = Template(mode=Mode.TUNNEL, source=A, destination=B)
    assert read_back(encode(Policy(selector=V6, templates=(tunnel,)))).templates == (
        replace(tunnel, family=2),
    )


@pytest.mark.parametrize(
    "policy",
    [
        Policy(selector=Selector()),
        Policy(selector=V4, direction=Direction.FWD),
        Policy(selector=V4, mark=Mark(1, 1)),
        Policy(selector=V4, if_id=1),
        Policy(selector=V4, kind=1),
        Policy(selector=V4, templates=(Template(),) * (MAX_TEMPLATES + 1)),
        Policy(selector=Selector(bytes(16), family=2)),
        Policy(selector=Selector(A, source_prefix=33, family=2)),
        Policy(selector=Selector(destination_prefix=8, family=2)),
        Policy(selector=V4, templates=(Template(source=A, destination=bytes(16)),)),
        Policy(selector=V4, templates=(Template(source=A, family=10),)),
        Policy(selector=V4, templates=(Template(family=7),)),
    ],
    ids=lambda policy: repr(policy)[7:60],
)
def test_what_the_kernel_would_refuse(policy: Policy) -> None:
    with pytest.raises(ValueError, match=r"socket|template|selector|prefix"):
        encode(policy)


_U32 = st.integers(0, 0xFFFFFFFF)


@st.composite
def templates(draw: Any) -> Template:
    size = draw(st.sampled_from([4, 16]))
    end = st.binary(min_size=size, max_size=size)
    return Template(
        proto=draw(st.sampled_from([50, 51, 108])),
        mode=draw(st.sampled_from(Mode)),
        source=draw(end),
        destination=draw(end),
        spi=draw(_U32),
        reqid=draw(_U32),
        family={4: 2, 16: 10}[size],
        optional=draw(st.booleans()),
        share=draw(st.integers(0, 3)),
        auth_algorithms=draw(_U32),
        encryption_algorithms=draw(_U32),
        compression_algorithms=draw(_U32),
    )


@given(
    st.sampled_from([Direction.IN, Direction.OUT]),
    st.sampled_from(PolicyAction),
    st.lists(templates(), max_size=MAX_TEMPLATES).map(tuple),
    st.sampled_from(
        [Selector(bytes(4), bytes(4), family=2), Selector(A, B, 8, 31, 1, 2, 3, 4, 6, 2, 5, 7)]
    ),
)
def test_what_is_written_is_read(
    direction: Direction, action: PolicyAction, found: tuple[Template, ...], sel: Selector
) -> None:
    policy = Policy(selector=sel, direction=direction, action=action, templates=found)
    assert read_back(encode(policy)) == policy
