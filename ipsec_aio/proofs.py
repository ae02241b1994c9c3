"""How the peer of an IKE SA proved its identity: read off charon's configuration and certificates.

charon tells who a peer is, and not how it proved that. Rules:

* Only an established IKE SA is judged: until then its ids are what the peer claims.
* EAP and XAuth identities speak for themselves.
* A connection tells the method only for an IKE SA that came up between two listings in which it
  was the same: it may have been loaded anew meanwhile. For IKE SAs that were there before, nobody
  can tell.
* Where the method is not known, a name counts if the peer could not have chosen it under any form
  in which its connection was listed. Else it is marked as unproved, and where the connection is
  not listed at all, the peer is nobody.
* charon lists the certificates that it has loaded and cached, of anybody. One counts if the method
  is a certificate's, it is the only one that has the identity, and nothing is listed that cannot
  be read, raw keys among it, which may have been used in its place. charon caches at most
  ``CACHED`` certificates: where it lists as many, the peer's own may have been dropped.
* charon does not print what kind of name a name is. Where a certificate proved it, and those that
  are listed have it as another kind or not at all, the text is not the name that it looks like.
* An IKE SA is judged once. It hands its judgement on when it is rekeyed, so that the peer's token
  stays what it is. Should its ids change nonetheless, it is nobody's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Final

from .errors import CodecError
from .identities import UNIDENTIFIED, Identities
from .identity import AuthenticationMethod, Certificate, IdentityKind, IToken
from .names import ike_text

if TYPE_CHECKING:
    from .ike import IKESA, Connection, IKEKey, IKETable
    from .wire.vici import Message

__all__ = ["CACHED", "Listed", "Proofs", "decode_certificate"]

CACHED: Final = 32
"""How many certificates charon's cache holds (``CACHE_SIZE`` of libstrongswan)."""

_PKIX: Final = (AuthenticationMethod.PKIX_INLINE, AuthenticationMethod.PKIX_TRUSTED)
# How long an IKE SA may still come up under what a connection was: half-open ones live 30 s.
_REMEMBERED_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Listed:
    """A certificate that charon lists, None for a raw key and for one that cannot be read.

    ``own``: charon has its private key. ``bare``: it is a raw key. ``authority``: it is a CA's.
    """

    certificate: Certificate | None
    own: bool
    bare: bool = False
    authority: bool = False


def decode_certificate(message: Message) -> Listed | None:
    """Decode a ``list-cert`` event; None where it lists nothing that a peer may prove itself by.

    Without the package cryptography no certificate can be read.
    """
    kind, data = message.get("type"), message.get("data")
    own = message.get("has_privkey") == b"yes"
    if kind == b"PUBKEY":
        return Listed(None, own, bare=True)
    if kind != b"X509":
        return None
    authority = message.get("flag") == b"CA"
    try:
        certificate = Certificate.decode(data) if isinstance(data, bytes) else None
    except (CodecError, ImportError):
        certificate = None
    return Listed(certificate, own, authority=authority)


@dataclass(slots=True)
class _Form:
    """Since when a connection has been listed in one form, and when it was found replaced."""

    since: float = inf
    gone: float = inf


class Proofs:
    """The identities of IKE SAs' ends, with how they were proved.

    Whenever it :attr:`wants`, list connections and certificates and pass them to :meth:`listed`,
    or call :meth:`failed`.
    """

    def __init__(self, table: IKETable) -> None:
        self.table = table
        # By name, the forms in which a connection was listed, those that were replaced for a while.
        self._forms: dict[str, dict[Connection, _Form]] = {}
        # What an IKE SA's ids were when it was judged, and who its ends are.
        self._judged: dict[IKEKey, tuple[object, Identities]] = {}
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
        judged = self._judged.get(self._origin(ike))
        if judged is None:
            return None
        ids, ends = judged
        return ends if ids == ike.ids else UNIDENTIFIED

    def listed(
        self,
        connections: Iterable[Connection],
        certificates: Iterable[Listed] | None,
        began: float,
        now: float,
    ) -> bool:
        """Judge the IKE SAs that had come up when a listing ``began``, which ends ``now``.

        ``certificates`` is None where they were not listed. Returns whether there was one to judge.
        """
        known = {connection.name: connection for connection in connections}
        self._remember(known, now)
        evidence = _Evidence(certificates)
        judged = False
        for ike, came in self._unjudged():
            if came is not None and came > began:
                continue  # it may have used what was loaded after it was listed
            connection, forms = known.get(ike.name), self._forms.get(ike.name, {})
            if came is None or connection is None or forms[connection].since > came:
                peer = evidence.peer(ike, None, forms if connection else (), came is not None)
            else:
                peer = evidence.peer(ike, connection, (connection,), True)
            self._judged[self._origin(ike)] = ike.ids, Identities(_read(ike.local_id), peer)
            judged = True
        kept = {self._origin(ike) for ike in self.table.parents()}
        self._judged = {key: known for key, known in self._judged.items() if key in kept}
        return judged

    def failed(self) -> None:
        """Take note that nothing could be listed: nobody knows what was loaded meanwhile."""
        for forms in self._forms.values():
            for form in forms.values():
                form.since = inf

    def _remember(self, known: dict[str, Connection], now: float) -> None:
        for name, connection in known.items():
            form = self._forms.setdefault(name, {}).setdefault(connection, _Form())
            form.since, form.gone = min(form.since, now), inf
        for name, forms in [*self._forms.items()]:
            for connection, form in [*forms.items()]:
                if connection != known.get(name):
                    form.since, form.gone = inf, min(form.gone, now)
                    if form.gone < now - _REMEMBERED_SECONDS:
                        del forms[connection]
            if not forms:
                del self._forms[name]

    def _origin(self, ike: IKESA) -> IKEKey:
        return self.table.origin(ike.key)

    def _unjudged(self) -> list[tuple[IKESA, float | None]]:
        unjudged: list[tuple[IKESA, float | None]] = []
        for ike in self.table.parents():
            came = self.table.came(ike.key)
            established = ike.established or (ike.state == "DELETING" and came is not None)
            if established and self._origin(ike) not in self._judged:
                unjudged.append((ike, came))
        return unjudged


class _Evidence:
    """What certificates say of peers."""

    def __init__(self, listed: Iterable[Listed] | None) -> None:
        self._listed = () if listed is None else tuple(listed)
        # Own raw keys are nobody else's.
        self.bare_keys = listed is None or any(each.bare and not each.own for each in self._listed)
        others = [each for each in self._listed if not each.own]
        self._readable = len(others) < CACHED and all(each.certificate for each in self._listed)
        # Else charon does not list what peers show, or it lists them for other reasons.
        self._peers = any(not each.authority for each in others)

    def peer(
        self,
        ike: IKESA,
        connection: Connection | None,
        forms: Iterable[Connection],
        fresh: bool,
    ) -> IToken | None:
        """Return who the peer is. ``connection`` is what it came up under, if that is known.

        ``forms`` are all that it may have been; ``fresh``: the IKE SA came up just now.
        """
        if ike.remote_eap_id:
            return _read(ike.remote_eap_id, AuthenticationMethod.EAP)
        if ike.remote_xauth_id:
            return _read(ike.remote_xauth_id, AuthenticationMethod.XAUTH)
        name, forms = ike.remote_id, tuple(forms)
        if not forms:
            return None
        weak = (form.weakness(name, bare_keys=self.bare_keys) for form in forms)
        weakness = next((each for each in weak if each is not None), None)
        if weakness is not None:
            return _read(name, weakness)
        method = None if connection is None else self._method(name, connection)
        if any(_is_certified(form, name) for form in forms) and self._misread(name, fresh):
            return _read_opaque(name, method)
        fitting = self._only_one(name) if method in _PKIX else None
        own = self._only_one(ike.local_id, own=True)
        return _read(
            name,
            method,
            () if fitting is None else (fitting,),
            own.public_key if own is not None and _signs(connection) else None,
        )

    def _method(self, name: str, connection: Connection) -> AuthenticationMethod | None:
        method = connection.peer_method(name, bare_keys=self.bare_keys)
        if method is None and len(connection.remote) == 1:
            (only,) = connection.remote
            fitting = self._only_one(name)
            if only.kind == "public key" and fitting and _prints(fitting) in only.certificates:
                return AuthenticationMethod.PKIX_TRUSTED
        return method

    def _misread(self, name: str, fresh: bool) -> bool:
        """Whether a name that a certificate proved is not of the kind that it looks like."""
        identity = _read(name)
        if identity is None:
            return False
        certificates = [each.certificate for each in self._listed if each.certificate is not None]
        others = [each for each in certificates if not each.identifies(identity)]
        if any(_contains(each, name) for each in others):
            return True
        complete = fresh and self._readable and self._peers
        return complete and len(others) == len(certificates)

    def _only_one(self, name: str, *, own: bool = False) -> Certificate | None:
        """Return the certificate with this identity if no other, and no raw key, may be meant."""
        identity = _read(name)
        if identity is None or not self._readable:
            return None
        fitting = {
            (each.certificate, each.own)
            for each in self._listed
            if each.certificate is not None and each.certificate.identifies(identity)
        }
        if len(fitting) != 1:
            return None
        ((certificate, is_own),) = fitting
        return certificate if is_own is own else None


def _is_certified(connection: Connection, name: str) -> bool:
    """Whether a certificate alone vouched for a name, and not the connection as well."""
    naming = connection.naming
    return naming is not None and naming.kind == "public key" and not naming.is_for(name)


def _contains(certificate: Certificate, name: str) -> bool:
    """Whether a certificate has a name of any kind that charon prints like this."""
    texts = {value.lower() for _, value in certificate.alternatives}
    return name.lower() in texts or certificate.key_id == name.encode(errors="replace")


def _prints(certificate: Certificate) -> str | None:
    try:
        return ike_text(certificate.subject)
    except CodecError:
        return None


def _signs(connection: Connection | None) -> bool:
    """Whether this end proves itself by a public key alone."""
    return connection is not None and [each.kind for each in connection.local] == ["public key"]


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


def _read_opaque(text: str, method: AuthenticationMethod | None) -> IToken | None:
    """Read an identity of which the kind is not known: nobody, unless it has one for that."""
    token = _read(text)
    if token is None or token.kind is not IdentityKind.DN:
        return None
    return IToken(IdentityKind.DN, text, opaque=True, authentication_method=method)
