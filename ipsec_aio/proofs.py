"""How the peer of an IKE SA proved its identity: read off charon's configuration and certificates.

charon tells who a peer is, and not how it proved that. Rules:

* EAP and XAuth identities speak for themselves.
* A connection tells the method only for an IKE SA that came up between two listings in which it
  was the same: it may have been loaded anew meanwhile. For IKE SAs that were there before, nobody
  can tell.
* charon lists the certificates that it has loaded and cached, of anybody. One counts if the method
  is a certificate's, it is the only one that has the identity, and nothing is listed that cannot
  be read, raw keys among it, which may have been used in its place. charon caches at most
  ``CACHED`` certificates: where it lists as many, the peer's own may have been dropped.
* An IKE SA is judged once. It hands its judgement on when it is rekeyed, so that the peer's token
  stays what it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .errors import CodecError
from .identities import Identities
from .identity import AuthenticationMethod, Certificate, IToken
from .names import ike_text

if TYPE_CHECKING:
    from .ike import IKESA, Connection, IKEKey, IKETable
    from .wire.vici import Message

__all__ = ["CACHED", "Listed", "Proofs", "decode_certificate"]

CACHED: Final = 32
"""How many certificates charon's cache holds (``CACHE_SIZE`` of libstrongswan)."""

_PKIX: Final = (AuthenticationMethod.PKIX_INLINE, AuthenticationMethod.PKIX_TRUSTED)


@dataclass(frozen=True, slots=True)
class Listed:
    """A certificate that charon lists, None for a raw key and for one that cannot be read.

    ``own``: charon has its private key.
    """

    certificate: Certificate | None
    own: bool


def decode_certificate(message: Message) -> Listed | None:
    """Decode a ``list-cert`` event; None where it lists nothing that a peer may prove itself by.

    Raises ImportError without the package cryptography.
    """
    kind, data = message.get("type"), message.get("data")
    own = message.get("has_privkey") == b"yes"
    if kind == b"X509" and isinstance(data, bytes):
        try:
            return Listed(Certificate.decode(data), own)
        except CodecError:
            return Listed(None, own)
    return Listed(None, own) if kind in (b"X509", b"PUBKEY") else None


class Proofs:
    """The identities of IKE SAs' ends, with how they were proved.

    Whenever it :attr:`wants`, list connections and certificates and pass them to :meth:`listed`,
    or call :meth:`failed`.
    """

    def __init__(self, table: IKETable) -> None:
        self.table = table
        # Each connection, and the end of the first listing that had it as it is.
        self._connections: dict[str, tuple[Connection, float]] = {}
        self._judged: dict[IKEKey, Identities] = {}
        self._arrivals = table.arrivals

    @property
    def wants(self) -> bool:
        """Whether there are IKE SAs to be judged."""
        if self._arrivals != self.table.arrivals:
            arrivals = self.table.arrivals
            if self._unjudged():
                return True
            self._arrivals = arrivals
        return False

    def ends(self, ike: IKESA) -> Identities | None:
        """Return the identities of both ends, None where the IKE SA is not judged yet."""
        return self._judged.get(self._origin(ike))

    def listed(
        self,
        connections: Iterable[Connection],
        certificates: Iterable[Listed],
        began: float,
        now: float,
    ) -> None:
        """Judge the IKE SAs that had come up when a listing ``began``, which ends ``now``."""
        known = {connection.name: connection for connection in connections}
        certificates = tuple(certificates)
        for ike, came in self._unjudged():
            if came is not None and came > began:
                continue  # it may have used what was loaded after it was listed
            connection = known.get(ike.name)
            before, since = self._connections.get(ike.name, (None, now))
            proven = came is not None and since <= came and connection == before
            self._judge(ike, connection if proven else None, certificates)
        previous, self._connections = self._connections, {}
        for name, connection in known.items():
            before, since = previous.get(name, (None, now))
            self._connections[name] = connection, since if before == connection else now
        kept = {self._origin(ike) for ike in self.table.parents()}
        self._judged = {key: ends for key, ends in self._judged.items() if key in kept}

    def failed(self) -> None:
        """Judge what is to be judged without any listing, and believe no earlier one."""
        for ike, _ in self._unjudged():
            self._judge(ike, None, ())
        self._connections.clear()

    def _origin(self, ike: IKESA) -> IKEKey:
        return self.table.origin(ike.key)

    def _unjudged(self) -> list[tuple[IKESA, float | None]]:
        return [
            (ike, self.table.came(ike.key))
            for ike in self.table.parents()
            if self._origin(ike) not in self._judged
        ]

    def _judge(self, ike: IKESA, connection: Connection | None, listed: tuple[Listed, ...]) -> None:
        method = _method(ike, connection)
        fitting = _only_one(ike.peer_id, listed) if method in _PKIX else None
        if method is AuthenticationMethod.PKIX_TRUSTED and not _is_one_of(fitting, connection):
            method = fitting = None
        own = _only_one(ike.local_id, listed, own=True)
        self._judged[self._origin(ike)] = Identities(
            _read(ike.local_id),
            _read(
                ike.peer_id,
                method,
                () if fitting is None else (fitting,),
                own.public_key if own is not None and _signs(connection) else None,
            ),
        )


def _method(ike: IKESA, connection: Connection | None) -> AuthenticationMethod | None:
    if ike.remote_eap_id:
        return AuthenticationMethod.EAP
    if ike.remote_xauth_id:
        return AuthenticationMethod.XAUTH
    if connection is None:
        return None
    method = connection.peer_method
    if method is None and len(connection.remote) == 1:
        (only,) = connection.remote
        if only.kind == "public key" and only.certificates:
            return AuthenticationMethod.PKIX_TRUSTED
    return method


def _is_one_of(certificate: Certificate | None, connection: Connection | None) -> bool:
    """Whether it is printed like one that the connection demands."""
    if certificate is None or connection is None:
        return False
    try:
        return ike_text(certificate.subject) in connection.remote[0].certificates
    except CodecError:
        return False


def _signs(connection: Connection | None) -> bool:
    """Whether this end proves itself by a public key alone."""
    return connection is not None and [each.kind for each in connection.local] == ["public key"]


def _only_one(text: str, listed: tuple[Listed, ...], *, own: bool = False) -> Certificate | None:
    """Return the certificate with this identity if no other, and no raw key, may be meant."""
    others = [each for each in listed if not each.own]
    if len(others) >= CACHED or any(each.certificate is None for each in listed):
        return None
    identity = _read(text)
    if identity is None:
        return None
    fitting = {
        (each.certificate, each.own)
        for each in listed
        if each.certificate is not None and each.certificate.identifies(identity)
    }
    if len(fitting) != 1:
        return None
    ((certificate, is_own),) = fitting
    return certificate if is_own is own else None


def _read(
    text: str,
    method: AuthenticationMethod | None = None,
    certificates: tuple[Certificate, ...] = (),
    local_public_key: bytes | None = None,
) -> IToken | None:
    """Read an identity; what is none, or not whole, is nobody."""
    try:
        return IToken.from_ike(
            text,
            authentication_method=method,
            certificates=certificates,
            local_public_key=local_public_key,
        )
    except CodecError:
        return None
