"""Policies as facts (RFC 4301 4.4.1; ``struct xfrm_userpolicy_info`` and its attributes)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .compact import compact
from .enums import Direction, Mode, PolicyAction
from .flow import Mark, Selector
from .sa import IPPROTO_AH, IPPROTO_ESP, Lifetime, Usage

__all__ = ["Policy", "PolicyKey", "Template"]


@compact("source", "destination", "spi", "reqid")
@dataclass(frozen=True, kw_only=True)
class Template:
    """``struct xfrm_user_tmpl``: one transformation that a policy asks for.

    ``optional`` templates (level *use*) let traffic pass without it. ``reqid`` 0 and ``spi`` 0
    are any. The ``*_algorithms`` are bit masks by PF_KEY number; all ones is any.
    """

    proto: int = IPPROTO_ESP
    mode: Mode = Mode.TRANSPORT
    source: bytes = b""
    destination: bytes = b""
    spi: int = 0
    reqid: int = 0
    family: int = 0
    optional: bool = False
    share: int = 0
    auth_algorithms: int = 0xFFFFFFFF
    encryption_algorithms: int = 0xFFFFFFFF
    compression_algorithms: int = 0xFFFFFFFF


class PolicyKey(NamedTuple):
    """What tells policies apart in the kernel."""

    selector: Selector
    direction: Direction
    mark: Mark = Mark()
    if_id: int = 0
    kind: int = 0


@compact("selector", "index", "templates", "mark", "if_id", "usage")
@dataclass(frozen=True, kw_only=True)
class Policy:
    """A policy of the SPD. Lower ``priority`` numbers win.

    ``kind`` is XFRM_POLICY_TYPE_MAIN (0) or _SUB (1). ``index`` is the kernel's number, whose three
    lowest bits are the direction (4–6: a socket's own policy).
    """

    selector: Selector
    direction: Direction = Direction.IN
    action: PolicyAction = PolicyAction.ALLOW
    priority: int = 0
    index: int = 0
    templates: tuple[Template, ...] = ()
    mark: Mark = Mark()
    if_id: int = 0
    kind: int = 0
    flags: int = 0
    share: int = 0
    lifetime: Lifetime = Lifetime()
    usage: Usage = Usage()
    security_context: bytes = b""

    @property
    def key(self) -> PolicyKey:
        """The kernel's key of this policy."""
        return PolicyKey(self.selector, self.direction, self.mark, self.if_id, self.kind)

    @property
    def of_socket(self) -> bool:
        """Whether it belongs to a socket and speaks for that alone."""
        return self.index & 7 >= 3

    @property
    def protects(self) -> bool:
        """Whether it admits traffic only under ESP or AH."""
        return self.action is PolicyAction.ALLOW and any(
            not t.optional and t.proto in (IPPROTO_ESP, IPPROTO_AH) for t in self.templates
        )
