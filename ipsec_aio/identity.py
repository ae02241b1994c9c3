"""Who is at the other end, as the keying daemon proved it.

Rules:

* An IToken is what was proved, and nothing was added: what is not known is None.
* ``==`` goes by meaning: the same kind, the same name in canonical form (``ipsec_aio.names``), and
  the same proof: authentication method, CA, certificate, key. ``same_name`` asks for the name only,
  ``is_still`` for the name and for nothing in the proof that speaks against it.
* A pattern is not an identity: it is text, read by other rules, in which only a whole label,
  a whole mailbox name or a whole attribute value can be left open. Nothing is matched as a
  substring.
* strongSwan prints distinguished names without escapes, so that different names look the same
  (``ipsec_aio.names.ike_text``). One of which only such text is known, and no certificate, is
  *opaque*: it equals the same text, and it matches no pattern.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from dataclasses import dataclass
from enum import Enum, IntEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias, cast, final
from urllib.parse import quote, unquote_to_bytes

from . import names
from .errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable
    from typing import Self

__all__ = [
    "AuthenticationMethod",
    "Certificate",
    "IToken",
    "IdentityKind",
    "IdentityPattern",
    "channel_binding",
]


class IdentityKind(IntEnum):
    """Types of IKE identities, with the values of the IKEv2 registry (RFC 7296 3.5, RFC 7619)."""

    IPV4 = 1
    FQDN = 2
    RFC822 = 3
    IPV6 = 5
    DN = 9
    KEY_ID = 11
    NULL = 13


class AuthenticationMethod(Enum):
    """How an identity was proved (draft-ietf-btns-abstract-api, in its names)."""

    NONE = "NONE"
    """Not at all (RFC 7619)."""
    BTNS = "BTNS"
    """By a bare key that nobody vouches for (RFC 5387)."""
    LEAPOFFAITH = "LEAPOFFAITH"
    """By the key that it had the first time."""
    PRESHAREDKEY = "PRESHAREDKEY"
    """By a secret that it shares with this end alone."""
    GROUPKEY = "GROUPKEY"
    """By a secret that others have as well: it is a member, whoever it says it is."""
    XAUTH = "XAUTH"
    """By IKEv1's extended authentication."""
    EAP = "EAP"
    """By EAP (RFC 7296 2.16)."""
    PKIX_TRUSTED = "PKIX_TRUSTED"
    """By a certificate that was configured as this peer's."""
    PKIX_INLINE = "PKIX_INLINE"
    """By a certificate that came in IKE, and a CA that vouches for it."""
    PKIX_OFFLINE = "PKIX_OFFLINE"
    """By a certificate fetched from elsewhere, and a CA that vouches for it."""


def channel_binding(one: bytes, other: bytes) -> bytes:
    """Return the end-point channel binding of a channel between two public keys (RFC 5056 2.1).

    ``one`` and ``other`` are the DER of the SubjectPublicKeyInfo that the ends proved in IKE to
    have. RFC 5660 binds an IPsec channel to its ends, not to one of its SAs, and leaves the form
    open. Here it is the prefix ``ipsec-end-point:`` and the SHA-256 of both keys, each after its
    length in four octets, the one that sorts first in front: both ends compute the same, and a
    rekey does not change it.
    """
    digest = hashlib.sha256()
    for key in sorted((one, other)):
        digest.update(len(key).to_bytes(4) + key)
    return b"ipsec-end-point:" + digest.digest()


@dataclass(frozen=True, slots=True)
class Certificate:
    """What an X.509 certificate says of its holder. Nothing is verified here: the daemon did that.

    ``subject`` and ``issuer`` are the DER of their names; ``public_key`` is the DER of the
    SubjectPublicKeyInfo, ``b""`` where the library does not know its algorithm;
    ``alternatives`` are the subject alternative names that IKE identities can be, ``key_id`` is the
    subject key identifier.
    """

    subject: bytes
    issuer: bytes
    public_key: bytes
    alternatives: frozenset[tuple[IdentityKind, str]]
    key_id: bytes = b""

    @classmethod
    def decode(cls, der: bytes) -> Certificate:
        """Decode a certificate. Needs the package cryptography (the extra ``certificates``).

        Raises CodecError for bytes that are no certificate, ImportError without the package.
        """
        from cryptography import x509
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        try:
            certificate = x509.load_der_x509_certificate(der)
            subject = certificate.subject.public_bytes()
            issuer = certificate.issuer.public_bytes()
            extensions = certificate.extensions
        except (
            ValueError,
            TypeError,
            UnsupportedAlgorithm,
            x509.DuplicateExtension,
            x509.InvalidVersion,
            x509.UnsupportedGeneralNameType,
        ) as error:
            raise CodecError(f"not a certificate: {error}") from error
        try:
            public_key = certificate.public_key().public_bytes(
                Encoding.DER, PublicFormat.SubjectPublicKeyInfo
            )
        except (ValueError, UnsupportedAlgorithm):
            public_key = b""
        alternatives: set[tuple[IdentityKind, str]] = set()
        key_id = b""
        for extension in extensions:
            value = extension.value
            if isinstance(value, x509.SubjectKeyIdentifier):
                key_id = value.digest
            elif isinstance(value, x509.SubjectAlternativeName):
                for name in value:
                    if isinstance(name, x509.DNSName):
                        alternatives.add((IdentityKind.FQDN, name.value))
                    elif isinstance(name, x509.RFC822Name):
                        alternatives.add((IdentityKind.RFC822, name.value))
                    elif isinstance(name, x509.IPAddress):
                        kind = IdentityKind.IPV4 if name.value.version == 4 else IdentityKind.IPV6
                        alternatives.add((kind, str(name.value)))
        return cls(subject, issuer, public_key, frozenset(alternatives), key_id)

    @property
    def pub_key_id(self) -> bytes | None:
        """SHA-256 of the SubjectPublicKeyInfo."""
        return hashlib.sha256(self.public_key).digest() if self.public_key else None

    def identifies(self, identity: IToken) -> bool:
        """Say whether an IKE identity is one of the certificate's (RFC 4945 3.1).

        An opaque one is where the subject is printed like it. Wildcards in the certificate are
        no identities.
        """
        if identity.kind is IdentityKind.DN:
            try:
                if identity.opaque:
                    return names.ike_text(self.subject) == identity.value
                return names.decode_dn(self.subject) == names.parse_dn(identity.value)
            except CodecError:
                return False
        if identity.kind is IdentityKind.KEY_ID:
            return self.key_id.hex() == identity.value
        for kind, value in self.alternatives:
            if kind is identity.kind:
                try:
                    if identity.same_name(IToken(kind, value)):
                        return True
                except CodecError:
                    continue
        return False


Name: TypeAlias = (
    "str | tuple[str, str] | ipaddress.IPv4Address | ipaddress.IPv6Address | names.DN | bytes"
)
"""A name in canonical form: what is compared."""

_VERSION: Final = "itoken1"
_FIELDS: Final = ("kind", "value", "method", "ca", "certificate", "key", "binding", "audit")
_OPAQUE: Final = "DN_TEXT"
_SAFE: Final = " !$'()*,/:@="
_EXPORT_LIMIT: Final = 1 << 20
_WILDCARDS: Final = {IdentityKind.FQDN: "*.", IdentityKind.RFC822: "*@"}
_TEXT_LIMIT: Final = 511  # strongSwan prints an identity into 512 bytes
_PKIX: Final = (
    AuthenticationMethod.PKIX_TRUSTED,
    AuthenticationMethod.PKIX_INLINE,
    AuthenticationMethod.PKIX_OFFLINE,
)


_UNPROVED: Final = (
    AuthenticationMethod.NONE,
    AuthenticationMethod.BTNS,
    AuthenticationMethod.GROUPKEY,
)
_DETAILS: Final = (
    "authentication_method",
    "certificate_authority_dn",
    "certificate_dn",
    "pub_key_id",
    "channel_binding",
)


class _Proof(NamedTuple):
    """How an identity was proved, in the form in which it is compared."""

    method: AuthenticationMethod | None
    issuer: names.DN | None
    subject: names.DN | None
    key: bytes | None
    binding: bytes | None


def _agrees(have: object, known: object) -> bool | None:
    if known is None:
        return True
    return None if have is None else have == known


def _proved_alike(
    have: AuthenticationMethod | None, known: AuthenticationMethod | None
) -> bool | None:
    if have in _UNPROVED:
        return have is known
    # Which kind of certificate's proof it was is a matter of configuration.
    return True if have in _PKIX and known in _PKIX else _agrees(have, known)


@final
class IToken:
    """The identity of one end of a channel (draft-ietf-btns-c-api 3). Immutable and picklable.

    ``value`` is text: a DNS name, a mailbox, an address, a distinguished name in the form of
    ``ipsec_aio.names.parse_dn``, the octets of a KEY_ID in hex, nothing for NULL.
    ``authentication_method`` is how it was proved; ``certificate_authority_dn`` and
    ``certificate_dn`` are the issuer and subject of the certificate that proved it;
    ``pub_key_id`` is the SHA-256 of the public key's SubjectPublicKeyInfo;
    ``channel_binding`` is that of the channel (:func:`channel_binding`). Each is None where not
    known. ``audit_string`` is for operators and takes no part in comparing. ``canonical`` is the
    value as it is compared. ``opaque``: see the rules of this module.

    Raises CodecError for a value that is none of its kind.
    """

    __slots__ = (
        "_key",
        "_proof",
        "audit_string",
        "authentication_method",
        "canonical",
        "certificate_authority_dn",
        "certificate_dn",
        "channel_binding",
        "kind",
        "opaque",
        "pub_key_id",
        "value",
    )

    kind: IdentityKind
    value: str
    authentication_method: AuthenticationMethod | None
    certificate_authority_dn: str | None
    certificate_dn: str | None
    pub_key_id: bytes | None
    channel_binding: bytes | None
    audit_string: str
    opaque: bool
    canonical: Name
    _key: Hashable
    _proof: _Proof

    def __init__(
        self,
        kind: IdentityKind,
        value: str = "",
        *,
        authentication_method: AuthenticationMethod | None = None,
        certificate_authority_dn: str | None = None,
        certificate_dn: str | None = None,
        pub_key_id: bytes | None = None,
        channel_binding: bytes | None = None,
        audit_string: str = "",
        opaque: bool = False,
    ) -> None:
        kind = IdentityKind(kind)
        if authentication_method is not None:
            authentication_method = AuthenticationMethod(authentication_method)
        name: Name
        if opaque:
            if kind is not IdentityKind.DN or not _printable(value):
                raise CodecError(f"not the text of a distinguished name: {value!r}")
            name = value
        else:
            name, value = _canonical(kind, value)
        if len(audit_string) > names.MAX_NAME or not _has_utf8(audit_string):
            raise CodecError(f"not an audit string: {audit_string[:80]!r}")
        for octets in (pub_key_id, channel_binding):
            if octets is not None and not 0 < len(octets) <= 1024:
                raise CodecError(f"{len(octets)} octets of a key or a binding")
        put = object.__setattr__
        put(self, "kind", kind)
        put(self, "value", value)
        put(self, "opaque", opaque)
        put(self, "authentication_method", authentication_method)
        put(self, "certificate_authority_dn", certificate_authority_dn)
        put(self, "certificate_dn", certificate_dn)
        put(self, "pub_key_id", pub_key_id)
        put(self, "channel_binding", channel_binding)
        put(self, "audit_string", audit_string)
        put(self, "canonical", name)
        issuer, subject = (
            dn if dn is None else names.parse_dn(dn)
            for dn in (certificate_authority_dn, certificate_dn)
        )
        proof = _Proof(authentication_method, issuer, subject, pub_key_id, channel_binding)
        put(self, "_proof", proof)
        put(self, "_key", (kind, opaque, name, proof))

    @classmethod
    def from_dn(
        cls,
        der: bytes,
        *,
        authentication_method: AuthenticationMethod | None = None,
        audit_string: str = "",
    ) -> IToken:
        """Return the identity that is this DER of an X.501 Name. Raises CodecError."""
        return cls(
            IdentityKind.DN,
            str(names.decode_dn(der)),
            authentication_method=authentication_method,
            audit_string=audit_string,
        )

    @classmethod
    def from_ike(
        cls,
        text: str | bytes,
        *,
        authentication_method: AuthenticationMethod | None = None,
        certificates: Iterable[Certificate] = (),
        local_public_key: bytes | None = None,
        trust_dn_text: bool = False,
        audit_string: str = "",
    ) -> IToken | None:
        """Read an identity as strongSwan prints it (``local-id``, ``remote-eap-id``, …).

        Returns None for ``%any``: nobody. The kind is read off the text, since the daemon does not
        tell it; text that is no name of any other kind is a KEY_ID.

        ``certificates`` are those that the daemon has. Where ``authentication_method`` is one of
        PKIX, those among them that have this identity give its details, as far as they agree (the
        daemon lists what it has loaded and cached, not what the peer used: pass none where a
        certificate with this identity may be valid that is not among them);
        ``local_public_key``, the DER of this end's SubjectPublicKeyInfo, then gives the channel
        binding. A distinguished name of several RDNs is opaque without such a certificate, unless
        ``trust_dn_text`` says that no CA in use issues names with a comma and an ``=`` in a value,
        or with several attributes in an RDN.

        Raises CodecError for what strongSwan could not print whole (a ``?`` in place of a byte,
        text that fills its buffer) and for what can be read in two ways.
        """
        if isinstance(text, bytes):
            text = text.decode("ascii", "replace")
        if text in ("", "%any", "%any6", "(null)"):
            return None
        if not _printable(text):
            raise CodecError(f"not the text of an identity: {text!r}")
        token = _read(text, trust_dn_text)
        if "?" in text and token.kind is not IdentityKind.DN:
            raise CodecError(f"not printed whole: {text!r}")
        proofs: list[Certificate] = []
        if authentication_method in _PKIX:
            seen = (
                cls(IdentityKind.DN, text, opaque=True) if token.kind is IdentityKind.DN else token
            )
            proofs = [each for each in certificates if each.identifies(seen)]
            subjects = {_dn(each.subject) for each in proofs}
            if len(subjects) > 1 or None in subjects:
                # Several holders, or one whose name has no form: it is not told who it was.
                proofs, token = [], seen
            elif proofs and token.kind is IdentityKind.DN:
                token = cls.from_dn(proofs[0].subject)
        keys = {each.public_key for each in proofs}
        key = keys.pop() if len(keys) == 1 else b""
        return cls(
            token.kind,
            token.value,
            opaque=token.opaque,
            authentication_method=authentication_method,
            certificate_authority_dn=_only({_dn(each.issuer) for each in proofs}),
            certificate_dn=_only({_dn(each.subject) for each in proofs}),
            pub_key_id=hashlib.sha256(key).digest() if key else None,
            channel_binding=(
                channel_binding(local_public_key, key) if local_public_key and key else None
            ),
            audit_string=audit_string,
        )

    @classmethod
    def named(cls, text: str) -> IToken:
        """Return the identity that a person wrote, for configuration and tests.

        ``text`` is written as a pattern without wildcards (:class:`IdentityPattern`), or is what
        :meth:`export` returned. Raises ValueError where it is not the name of one identity.
        """
        if text.startswith(f"{_VERSION}:"):
            return cls.parse(text)
        return cls(*_pattern_kind(text))

    @classmethod
    def parse(cls, text: str) -> IToken:
        """Return the token that :meth:`export` wrote. Raises CodecError."""
        if len(text) > _EXPORT_LIMIT:
            raise CodecError(f"an exported token of {len(text)} characters")
        version, _, rest = text.partition(":")
        if version != _VERSION:
            raise CodecError(f"not an exported token of version {_VERSION}: {text[:40]!r}")
        fields: dict[str, str] = {}
        items = rest.split(";")
        for item in items:
            name, _, quoted = item.partition("=")
            try:
                value = unquote_to_bytes(quoted).decode()
            except UnicodeError as error:
                raise CodecError(f"{name} is not UTF-8") from error
            if name not in _FIELDS or not value or quote(value, safe=_SAFE) != quoted:
                raise CodecError(f"not a field of an exported token: {item[:80]!r}")
            fields[name] = value
        if [*fields] != [name for name in _FIELDS if name in fields] or len(items) > len(fields):
            raise CodecError("fields of an exported token twice or out of order")
        kind, opaque = fields.get("kind", ""), False
        if kind == _OPAQUE:
            kind, opaque = IdentityKind.DN.name, True
        method = fields.get("method")
        try:
            return cls(
                IdentityKind[kind],
                fields.get("value", ""),
                opaque=opaque,
                authentication_method=AuthenticationMethod[method] if method else None,
                certificate_authority_dn=fields.get("ca"),
                certificate_dn=fields.get("certificate"),
                pub_key_id=_octets(fields.get("key")),
                channel_binding=_octets(fields.get("binding")),
                audit_string=fields.get("audit", ""),
            )
        except KeyError as error:
            raise CodecError(f"unknown kind or method {error}") from error

    def export(self) -> str:
        """Return text from which :meth:`parse` makes an equal token, in any process, for ever.

        ``itoken1:`` and fields ``name=value`` between semicolons, values percent-encoded (RFC
        3986 2.1).
        """
        method = self.authentication_method
        values = (
            _OPAQUE if self.opaque else self.kind.name,
            self.value,
            method.name if method else "",
            self.certificate_authority_dn,
            self.certificate_dn,
            (self.pub_key_id or b"").hex(),
            (self.channel_binding or b"").hex(),
            self.audit_string,
        )
        fields = zip(_FIELDS, values, strict=True)
        return f"{_VERSION}:" + ";".join(
            f"{name}={quote(value, safe=_SAFE)}" for name, value in fields if value
        )

    def matches(self, pattern: str | IdentityPattern) -> bool:
        """Say whether this identity is one that the pattern admits. Raises ValueError.

        ``pattern`` is read as :class:`IdentityPattern` says.
        """
        if isinstance(pattern, str):
            pattern = _pattern(pattern)
        return pattern.matches(self)

    def same_name(self, other: IToken) -> bool:
        """Say whether both have the same name, however it was proved."""
        return (self.kind, self.opaque, self.canonical) == (
            other.kind,
            other.opaque,
            other.canonical,
        )

    def is_still(self, known: IToken) -> bool | None:
        """Say whether this is who was known before, although it may have been proved anew.

        True: the same name, with all that was known of its proof; a new key counts as renewed
        where the same CA vouches for it. None: nothing speaks against it, but this proof is not
        known in all that the other is, or the other was opaque. False: another name, another way
        of proving it, another CA or certificate's subject; or what may be anybody's (a name by a
        group's key, by a bare key or by nothing, an opaque one) and was not known as such.
        """
        if self == known:
            return True
        read = known.opaque and not self.opaque and self.value == known.value
        if not (read or self.same_name(known)):
            return False
        mine, theirs = self._proof, known._proof
        answers = [None if read else True, _proved_alike(mine.method, theirs.method)]
        answers += [_agrees(mine.issuer, theirs.issuer), _agrees(mine.subject, theirs.subject)]
        if theirs.issuer is None or mine.issuer != theirs.issuer:
            answers += [_agrees(mine.key, theirs.key), _agrees(mine.binding, theirs.binding)]
        return False if False in answers else None if None in answers else True

    def completed(self, other: IToken) -> IToken:
        """Return this identity, with those details of the other's proof that it lacks."""
        details = {
            name: getattr(other, name)
            for name in _DETAILS
            if getattr(self, name) is None and getattr(other, name) is not None
        }
        if not details:
            return self
        for name in _DETAILS:
            details.setdefault(name, getattr(self, name))
        return IToken(
            self.kind, self.value, opaque=self.opaque, audit_string=self.audit_string, **details
        )

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, IToken) and self._key == other._key)

    def __hash__(self) -> int:
        return hash(self._key)

    def __str__(self) -> str:
        return f"@#{self.value}" if self.kind is IdentityKind.KEY_ID else self.value or "%null"

    def __repr__(self) -> str:
        method = self.authentication_method
        proof = f" by {method.name}" if method else ""
        return f"<IToken {self.kind.name}{' opaque' if self.opaque else ''} {str(self)!r}{proof}>"

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("an iToken does not change")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("an iToken does not change")

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> tuple[Callable[[str], IToken], tuple[str]]:
        return IToken.parse, (self.export(),)


@final
@dataclass(frozen=True, slots=True)
class IdentityPattern:
    r"""Which identities are admitted: made from text by :meth:`parse`.

    =============================  =========================================================
    ``moon.example.org``           this DNS name (also ``@moon.example.org``, ``fqdn:…``)
    ``*.example.org``              one label, any, in front of this domain: not two, not none
    ``alice@example.org``          this mailbox (also ``rfc822:…``, ``email:…``)
    ``*@example.org``              any mailbox of this domain itself
    ``192.0.2.0/24``, ``2001:…``   an address in this network, or this address (``ipv4:…``, …)
    ``C=CH, O=Acme, CN=*``         a name of as many RDNs in this order (``dn:…``), where ``*``
                                   is any one value; text as in ``ipsec_aio.names.parse_dn``
    ``@#0fee``, ``keyid:#0fee``    these octets as a KEY_ID (``keyid:text`` is text's octets)
    ``%null``                      an identity that does not want to be known (RFC 7619)
    =============================  =========================================================

    Kinds never match one another: an FQDN pattern admits no certificate subject that contains it.
    """

    text: str
    kind: IdentityKind
    wanted: Name | names.Pattern | ipaddress.IPv4Network | ipaddress.IPv6Network
    wildcard: bool = False

    @classmethod
    def parse(cls, text: str) -> IdentityPattern:
        """Read a pattern. Raises ValueError (CodecError where it contains what is no name)."""
        kind, value = _pattern_kind(text)
        wanted: Name
        wildcard = False
        if kind is IdentityKind.DN:
            return cls(text, kind, names.parse_dn_pattern(value), True)
        if kind in (IdentityKind.IPV4, IdentityKind.IPV6):
            network = ipaddress.ip_network(value)
            if "%" in value or (network.version == 4) != (kind is IdentityKind.IPV4):
                raise ValueError(f"no {kind.name} network: {text!r}")
            return cls(text, kind, network, True)
        head = _WILDCARDS.get(kind)
        if head and value.startswith(head):
            wildcard = True
            wanted = names.domain(value.removeprefix(head))
        else:
            wanted = _canonical(kind, value)[0]
        return cls(text, kind, wanted, wildcard)

    def matches(self, identity: IToken) -> bool:
        """Say whether the identity is admitted. An opaque one never is."""
        if identity.kind is not self.kind or identity.opaque:
            return False
        name = identity.canonical
        if not self.wildcard:
            return name == self.wanted
        if isinstance(name, names.DN):
            return names.match_dn(name, cast("names.Pattern", self.wanted))
        if isinstance(name, ipaddress.IPv4Address | ipaddress.IPv6Address):
            return name in cast("ipaddress.IPv4Network", self.wanted)
        if isinstance(name, tuple):
            return name[1] == self.wanted
        return isinstance(name, str) and name.partition(".")[2] == self.wanted

    def __str__(self) -> str:
        return self.text


def _canonical(kind: IdentityKind, value: str) -> tuple[Name, str]:
    """Return the canonical form of a name, and its text."""
    if kind is IdentityKind.FQDN:
        return names.domain(value), value
    if kind is IdentityKind.RFC822:
        return names.mailbox(value), value
    if kind is IdentityKind.DN:
        return names.parse_dn(value), value
    if kind is IdentityKind.KEY_ID:
        octets = _octets(value)
        if not octets:
            raise CodecError(f"not octets in hex: {value!r}")
        return octets, octets.hex()
    if kind is IdentityKind.NULL:
        if value:
            raise CodecError(f"a NULL identity with a value: {value!r}")
        return "", ""
    try:
        address = ipaddress.ip_address(value)
    except ValueError as error:
        raise CodecError(f"not an address: {value!r}") from error
    if "%" in value or (address.version == 4) != (kind is IdentityKind.IPV4):
        raise CodecError(f"not of kind {kind.name}: {value!r}")
    return address, str(address)


def _octets(text: str | None) -> bytes | None:
    if not text:
        return None
    if not re.fullmatch("(?:[0-9A-Fa-f]{2})+", text):
        raise CodecError(f"not octets in hex: {text[:80]!r}")
    return bytes.fromhex(text)


def _printable(text: str) -> bool:
    return 0 < len(text) < _TEXT_LIMIT and all(" " <= c <= "~" for c in text)


def _has_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# An attribute type as strongSwan prints it: a name, or an OID's content in hex.
_PRINTED_TYPE = re.compile(r"([A-Za-z]+|[0-9a-f]{2}(?::[0-9a-f]{2})+)=")
_PRINTED_COMMA = re.compile(r", (?=[A-Za-z0-9:.-]+=)")
# A surname to strongSwan today, a serial number in older releases.
_AMBIGUOUS_TYPES: Final = frozenset({"SN"})
_HEX_COLONS = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2})+")


def _read(text: str, trust_dn_text: bool) -> IToken:
    """Read an identity off printable text."""
    found = _PRINTED_TYPE.match(text)
    if found and names.printed_type(found[1]):
        parts = _PRINTED_COMMA.split(text)
        if "?" in text or (len(parts) > 1 and not trust_dn_text):
            return IToken(IdentityKind.DN, text, opaque=True)
        attributes: list[names.Attribute] = []
        for part in parts:
            printed, _, value = part.partition("=")
            oid = names.printed_type(printed)
            if oid is None or printed in _AMBIGUOUS_TYPES:
                return IToken(IdentityKind.DN, text, opaque=True)
            attributes.append(names.Attribute(oid, value))
        return IToken(IdentityKind.DN, str(names.DN(tuple((each,) for each in attributes))))
    if text.startswith("("):
        if text == f"(unknown ID type: {IdentityKind.NULL})":
            return IToken(IdentityKind.NULL)
        raise CodecError(f"an identity that was not printed: {text!r}")
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        pass
    else:
        if _HEX_COLONS.fullmatch(text):
            raise CodecError(f"an address or octets: {text!r}")
        return IToken(IdentityKind.IPV4 if address.version == 4 else IdentityKind.IPV6, text)
    if _HEX_COLONS.fullmatch(text):
        return IToken(IdentityKind.KEY_ID, text.replace(":", ""))
    if text.startswith("@#") and len(text) > 2:
        return IToken(IdentityKind.KEY_ID, text[2:])
    try:
        return IToken(IdentityKind.RFC822 if "@" in text else IdentityKind.FQDN, text)
    except CodecError:
        return IToken(IdentityKind.KEY_ID, text.encode().hex())


def _dn(der: bytes) -> names.DN | None:
    """Decode a name, None for what has no canonical form."""
    try:
        return names.decode_dn(der)
    except CodecError:
        return None


def _only(dns: set[names.DN | None]) -> str | None:
    """Return the text of the only name there is, None where there is none, or more than one."""
    if len(dns) != 1:
        return None
    (dn,) = dns
    return None if dn is None else str(dn)


_PREFIXES: Final = {
    "fqdn": IdentityKind.FQDN,
    "rfc822": IdentityKind.RFC822,
    "email": IdentityKind.RFC822,
    "ipv4": IdentityKind.IPV4,
    "ipv6": IdentityKind.IPV6,
    "dn": IdentityKind.DN,
    "asn1dn": IdentityKind.DN,
    "keyid": IdentityKind.KEY_ID,
}


def _pattern_kind(text: str) -> tuple[IdentityKind, str]:
    prefix, colon, rest = text.partition(":")
    if colon and prefix in _PREFIXES:
        kind = _PREFIXES[prefix]
        if kind is IdentityKind.KEY_ID:
            rest = rest[1:] if rest.startswith("#") else rest.encode().hex()
        return kind, rest
    if text == "%null":
        return IdentityKind.NULL, ""
    if text.startswith("@#"):
        return IdentityKind.KEY_ID, text[2:]
    if text.startswith("@"):
        return IdentityKind.FQDN, text[1:]
    if re.match(" *[A-Za-z0-9.-]+ *=", text):
        return IdentityKind.DN, text
    if "@" in text:
        return IdentityKind.RFC822, text
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        return IdentityKind.FQDN, text
    return IdentityKind.IPV4 if network.version == 4 else IdentityKind.IPV6, text


_pattern = lru_cache(maxsize=256)(IdentityPattern.parse)
