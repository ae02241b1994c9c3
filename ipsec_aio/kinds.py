"""What tokens have in common with those of other peers, and the tokens themselves, found by that.

Rules:

* A tunnel may have very many peers: their tokens share one object for all but the peer's address.
* Tokens are held weakly: one object for a channel as long as somebody holds it.
* Whoever asks holds the resolver's lock. The end of an object, which the garbage collector may
  bring at any moment, may ask meanwhile: nothing is lost by that.
"""

# A token's parts are no business of the public's.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakValueDictionary, ref

if TYPE_CHECKING:
    from .identities import Identities
    from .protection import Verdict
    from .tokens import PToken, Resolver

__all__ = ["Kind"]


class Kind:
    """All that a token says but its peer's address."""

    __slots__ = ("__weakref__", "_tokens", "identities", "local", "resolver", "verdict")

    def __init__(
        self, resolver: Resolver, local: bytes, verdict: Verdict, identities: Identities
    ) -> None:
        self.resolver = resolver
        self.local = local
        self.verdict = verdict
        self.identities = identities
        # By peer. In transport mode there is one alone, and a table for each would be large.
        self._tokens: ref[PToken] | WeakValueDictionary[str, PToken] | None = None

    def find(self, peer: str) -> PToken | None:
        """Return the token of a peer, if there is one."""
        tokens = self._tokens
        if isinstance(tokens, WeakValueDictionary):
            return tokens.get(peer)
        token = None if tokens is None else tokens()
        return token if token is not None and token._peer == peer else None

    def keep(self, token: PToken) -> PToken:
        """Return the token of this one's peer: this one, unless there is another by now."""
        peer, reference = token._peer, ref(token)
        while True:
            tokens = self._tokens
            if isinstance(tokens, WeakValueDictionary):
                return tokens.setdefault(peer, token)
            other = None if tokens is None else tokens()
            if other is not None and other._peer == peer:
                return other
            both = None if other is None else WeakValueDictionary({other._peer: other, peer: token})
            if self._tokens is tokens:
                self._tokens = reference if both is None else both
                return token
