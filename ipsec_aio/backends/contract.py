"""What the asyncio surface knows of a backend, and all that it knows.

Order of calls per endpoint: ``register`` before bind or listen where the port is known by then,
else right after bind; per wake-up: receive, ``drain``, then ``resolve`` for each datagram whose
evidence is new, then deliver; ``Registration.close`` when the socket is closed.

An answer of ``resolve`` may be kept as long as ``epoch`` stays the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from ..enforcement import Bundle
    from ..enums import Direction
    from ..errors import ProtectionError
    from ..evidence import Evidence
    from ..flow import Flow
    from ..latch import Outlook
    from ..tokens import PToken

__all__ = ["Backend", "Registration"]


class Registration(ABC):
    """One served (protocol, local port), and what the stamp does for it at this moment."""

    @property
    @abstractmethod
    def generation(self) -> int:
        """The stamp's generation, or 0 while no verified stamp covers the port.

        It goes into each datagram's evidence. It changes when the stamp was lost and restored, so
        that evidence from before, or from the gap, proves nothing.
        """

    @property
    @abstractmethod
    def reads_marks(self) -> bool:
        """Whether a mark can mean anything here; without it, SO_RCVMARK is not asked for."""

    @property
    @abstractmethod
    def keeps_fragments(self) -> bool:
        """Whether decrypted inner fragments reach reassembly, so that what was reassembled is in
        doubt (IP_RECVFRAGSIZE tells) and no stream is EXACT.
        """

    def refresh(self) -> None:  # noqa: B027 (most have nothing of the kind)
        """Take in what changes without telling. Streams call it after accepting."""

    @abstractmethod
    def close(self) -> None:
        """Give the port back. Idempotent; never raises."""


class Backend(ABC):
    """A source of facts about protection.

    A backend belongs to the event loop that opened it, unless it says otherwise (MemoryBackend).
    """

    name: str
    trust_policy: bool = False

    @property
    @abstractmethod
    def epoch(self) -> int:
        """Changes whenever an earlier answer of :meth:`resolve` may no longer hold, or what a
        :class:`Registration` says is another: also at :meth:`aclose`, so that endpoints which
        outlive the backend ask again and fail closed.
        """

    @property
    @abstractmethod
    def netns_cookie(self) -> int | None:
        """SO_NETNS_COOKIE of the namespace whose facts these are; None: of no namespace (memory).

        Evidence of a socket from another namespace is in doubt.
        """

    @abstractmethod
    def drain(self) -> None:
        """Take in the events that have arrived. Never blocks; lost events raise nothing.

        It is called in the context of whatever datagram came last. What it starts, logs or calls
        back has to run in another: news are nobody's.
        """

    @abstractmethod
    def resolve(self, evidence: Evidence) -> PToken:
        """Return the token for this evidence. Synchronous; never waits on another process.

        What cannot be told yet is UNKNOWN until :meth:`PToken.resolved`.
        Raises BackendUnavailable when closed or called from another loop's thread.
        """

    def ignores_ports(self, evidence: Evidence) -> bool:
        """Whether :meth:`resolve` says the same of this evidence with other ports.

        It holds as long as :attr:`epoch` stays the same. False where that is not sure; never
        raises. Streams ask, so that one answer serves all connections of a peer; datagram
        endpoints do, before they keep that something was clear.
        """
        del evidence
        return False

    @property
    def drops_fragments(self) -> bool:
        """Whether no decrypted fragment can be put together with others in this namespace.

        Else what comes by a tunnel may be clear in part: policies look at the whole. When it
        changes, :attr:`epoch` does so, too.
        """
        return False

    @property
    @abstractmethod
    def policies(self) -> int:
        """A number that grows with what packets are judged by as they arrive: when a policy
        changes, when an SA goes, or an interface that hid what protected them, or an own address.

        As long as it is the same, :meth:`templates` says the same. Evidence tells by it since when
        nothing had been waiting in its queue (``Evidence.after``). When it changes, :attr:`epoch`
        does so, too.
        """

    @abstractmethod
    def templates(
        self,
        protocol: int,
        port: int,
        direction: Direction,
        *,
        local: bytes = b"",
        peer: bytes = b"",
        peer_port: int = 0,
    ) -> tuple[Bundle, ...]:
        """Return the templates of the policies that protect and may govern a local port's traffic.

        One tuple for each policy, in the kernel's order of applying them; equal ones come once.
        Port 0 and the empty address stand for any, the unspecified address for any of its
        family. What is not sure (a resync) is what was known last. Never raises.
        """

    @abstractmethod
    def objection(self, evidence: Evidence, inbound: Bundle) -> str:
        """Say why the policies would not have let in what a socket's own policy did.

        Such a policy takes their place for its socket, so they are asked here: empty where they
        agree, else the reason, which goes into the evidence's ``doubt``. Never raises.
        """

    @abstractmethod
    def outlook(self, evidence: Evidence) -> Outlook:
        """Return what may protect a connection from now on, by its addresses and ports.

        For latches: look again when :attr:`epoch` has changed; every new SA changes it from the
        first look on. Raises BackendUnavailable like :meth:`resolve`.
        """

    @abstractmethod
    def sends_like(self, ptoken: PToken, flow: Flow) -> ProtectionError | None:
        """Return None where an outbound flow would be protected as a token says of what came.

        Else the error that says why not. ``flow.source`` is the local address. The answer may be
        kept as long as :attr:`epoch` stays the same. Raises StaleTokenError after a fork.
        """

    @abstractmethod
    async def register(self, protocol: int, port: int) -> Registration:
        """Have the stamp cover a local port. ``protocol`` is IPPROTO_UDP or IPPROTO_TCP.

        Raises BackendUnavailable when closed or not of the running loop, BackendDenied or
        BackendError where the stamp was demanded and cannot cover the port.
        """

    @abstractmethod
    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have ``callback()`` called on the loop soon after :attr:`epoch` changed, in an empty
        context.

        Returns a function that ends it (idempotent). Connections use it to replace their token.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Release everything. Idempotent. Tokens stay readable; what was pending stays UNKNOWN."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()
