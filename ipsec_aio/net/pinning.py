"""Whether a datagram may leave: only under protection like that of the token which it answers.

Rules:

* The backend is asked right before each send, and its answer is kept as long as its epoch stands.
* Where the socket is bound to no address, the datagram is sent from the token's.
"""

# Whose address it is sent from, a token does not tell the public.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ipsec_aio.enums import Direction
from ipsec_aio.errors import BackendError, ProtectionError
from ipsec_aio.evidence import IPPROTO_UDP
from ipsec_aio.flow import Flow, pack_address
from ipsec_aio.wire.cmsg import source

if TYPE_CHECKING:
    from ipsec_aio.backends.contract import Backend
    from ipsec_aio.tokens import PToken
    from ipsec_aio.wire.cmsg import ControlMessage

    from .enforce import Enforcement

__all__ = ["CACHE_LIMIT", "Pinning", "source_of"]

CACHE_LIMIT = 4096


class Pinning:
    """What one UDP socket may send under which token."""

    def __init__(self, backend: Backend, enforcement: Enforcement | None = None) -> None:
        self._backend = backend
        self._enforcement = enforcement
        self._epoch = -1
        self._known: dict[tuple[object, ...], ProtectionError | None] = {}

    def objection(
        self, ptoken: PToken, local: bytes, port: int, peer: tuple[Any, ...]
    ) -> ProtectionError | None:
        """Say why nothing may be sent to a peer's address under a token; None where it may.

        ``local`` is the socket's packed address, empty where it has none. Raises ValueError
        where the peer's is no IP address.
        """
        backend = self._backend
        try:
            backend.drain()
            epoch = backend.epoch
            if epoch != self._epoch or len(self._known) >= CACHE_LIMIT:
                self._known.clear()
                self._epoch = epoch
            key = ptoken, local, port, peer
            if key not in self._known:
                flow = Flow(
                    local or ptoken._kind.local, pack_address(peer[0]), IPPROTO_UDP, port, peer[1]
                )
                self._known[key] = backend.sends_like(ptoken, flow) or self._differs(flow)
        except BackendError as error:
            return ProtectionError("ptoken", str(error))
        return self._known[key]

    def _differs(self, flow: Flow) -> ProtectionError | None:
        """Say whether the socket's own policy, which is what is applied, is another."""
        enforcement = self._enforcement
        if enforcement is None:
            return None
        enforcement.refresh()
        own = enforcement.outbound
        demanded = self._backend.templates(
            flow.proto,
            flow.source_port,
            Direction.OUT,
            local=flow.source,
            peer=flow.destination,
            peer_port=flow.destination_port,
        )
        if own is None or not demanded or demanded == (own,):
            return None
        return ProtectionError("ptoken", "the socket's own policy is not what the policies demand")


def source_of(ptoken: PToken, *, ipv6: bool) -> list[ControlMessage]:
    """Return what has a datagram sent from the local address of a token's channel."""
    return [source(ptoken._kind.local, ipv6=ipv6)]
