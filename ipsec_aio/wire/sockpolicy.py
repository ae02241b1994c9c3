"""A socket's own policy as bytes: the value of IP_XFRM_POLICY and IPV6_XFRM_POLICY.

``struct xfrm_userpolicy_info`` and behind it one ``struct xfrm_user_tmpl`` for each template
(linux/xfrm.h; ``xfrm_compile_policy()`` in net/xfrm/xfrm_user.c).

Rules:

* A socket has one policy for each direction, of one address family. Traffic of the other family
  (IPv4-mapped on an IPv6 socket), and what its selector does not name, is judged by the SPD.
* Where it judges, it takes the place of the SPD. Inbound, its templates are compared with the SAs
  that a packet came by: protocol and mode exactly, reqid and SPI where given, for tunnels the
  source where given (``xfrm_state_ok()``). Outbound, the reqid is always compared.
* It never expires: all limits are infinite. Mark and interface id cannot be said, so are 0.
"""

from __future__ import annotations

from struct import Struct

from ..enums import Direction
from ..policy import Policy, Template

__all__ = ["MAX_TEMPLATES", "encode"]

MAX_TEMPLATES = 6
"""XFRM_MAX_DEPTH."""

_AF_INET = 2
_AF_INET6 = 10
_SIZES = {_AF_INET: 4, _AF_INET6: 16}
_INFINITE = (1 << 64) - 1
# Byte and packet limits, soft and hard; no seconds are no limit; nothing was used yet.
_FOREVER = (_INFINITE,) * 4 + (0,) * 4 + (0,) * 4

# Native alignment ("@"), as the kernel's structures have it; "0Q" pads the end.
_INFO = Struct("@16s16s8sHBBB3xiI8Q4QIIBBBB0Q")
_PORTS = Struct(">4H")
_TEMPLATE = Struct("@16s4sB3xHxx16sIBBBx3I")


def encode(policy: Policy) -> bytes:
    """Build the option's value: 168 bytes, and 64 more for each template.

    The selector must name its family, which is the socket's. Priority, index, lifetime and usage
    mean nothing here. Raises ValueError for what the kernel would refuse: a policy for forwarded
    traffic, with a mark or an interface id, without a family, with addresses of another one, or
    with more than ``MAX_TEMPLATES`` templates.
    """
    selector = policy.selector
    family = selector.family
    if family not in _SIZES:
        raise ValueError("a socket's policy needs the address family")
    if policy.direction not in (Direction.IN, Direction.OUT):
        raise ValueError("a socket's policy is for inbound or outbound traffic")
    if any(policy.mark) or policy.if_id or policy.kind:
        raise ValueError("a socket's policy has no mark, interface id or type")
    if len(policy.templates) > MAX_TEMPLATES:
        raise ValueError(f"a policy has at most {MAX_TEMPLATES} templates")
    for address, prefix in (
        (selector.source, selector.source_prefix),
        (selector.destination, selector.destination_prefix),
    ):
        if not 0 <= prefix <= 8 * _SIZES[family] or len(address) not in (0, _SIZES[family]):
            raise ValueError("the selector's addresses are not of its family")
        if prefix and not address:
            raise ValueError("a prefix of no address")
    info = _INFO.pack(
        selector.destination,
        selector.source,
        _PORTS.pack(
            selector.destination_port,
            selector.destination_port_mask,
            selector.source_port,
            selector.source_port_mask,
        ),
        family,
        selector.destination_prefix,
        selector.source_prefix,
        selector.proto,
        selector.ifindex,
        selector.user,
        *_FOREVER,
        policy.priority,
        0,
        policy.direction,
        policy.action,
        0,
        policy.share,
    )
    return info + b"".join(_template(template, family) for template in policy.templates)


def _template(template: Template, family: int) -> bytes:
    addresses = [a for a in (template.source, template.destination) if a]
    sizes = {len(address) for address in addresses}
    outer = template.family
    if not outer:
        outer = next((f for f, size in _SIZES.items() if sizes == {size}), family)
    if outer not in _SIZES or not sizes <= {_SIZES[outer]}:
        raise ValueError("the template's addresses are not of its family")
    return _TEMPLATE.pack(
        template.destination,
        template.spi.to_bytes(4, "big"),
        template.proto,
        outer,
        template.source,
        template.reqid,
        template.mode,
        template.share,
        template.optional,
        template.auth_algorithms,
        template.encryption_algorithms,
        template.compression_algorithms,
    )
