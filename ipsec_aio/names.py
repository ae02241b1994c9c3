"""The names that IKE identities are made of: DNS names, mailboxes, distinguished names.

Rules:

* Every name has one canonical form, and two names are equal where those are. A name that has none
  is refused with a CodecError, never repaired.
* A DNS name is compared by its A-labels in lower case (RFC 5890). A label beyond ASCII must be
  what IDNA 2008 would take as it stands, but for upper case: nothing is mapped, so that no
  full-width, ligature or other compatibility character becomes a letter that it looks like.
* A mailbox's local part is compared exactly (RFC 5321 2.4), its domain as a DNS name.
* A distinguished name is written in the order of its encoding, root first, as IKE daemons print
  it (RFC 4514 has it the other way round), with RFC 4514's escapes, and is compared RDN by RDN in
  that order. The values of attributes known here are compared without regard to case and to
  spaces that do not count (X.520 caseIgnoreMatch, RFC 4518 2.6.1), after NFC; there is no
  compatibility mapping, unlike RFC 4518: what looks alike need not be equal. Values of other
  attributes are compared exactly.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple, TypeVar

from .errors import CodecError

__all__ = [
    "DN",
    "MAX_NAME",
    "Attribute",
    "Pattern",
    "decode_dn",
    "domain",
    "ike_text",
    "mailbox",
    "match_dn",
    "parse_dn",
    "parse_dn_pattern",
    "printed_type",
]

MAX_NAME: Final = 8192
"""The longest text of a name, in characters."""
_MAX_RDNS: Final = 64

# -- DNS names and mailboxes

_category = unicodedata.category
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_ATEXT = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+")
# PVALID of RFC 5892, nearly: letters without case or in lower case, marks, decimal digits.
_LABEL_CATEGORIES = frozenset({"Ll", "Lo", "Lm", "Mn", "Mc", "Nd"})
_LOCAL_CATEGORIES = _LABEL_CATEGORIES | {"Lu", "Lt"}


def domain(text: str) -> str:
    """Return the canonical form of a DNS name: A-labels in lower case.

    Raises CodecError for empty labels and a trailing dot, for what is not letters, digits, ``-``
    and ``_``, for labels over 63 and names over 253 octets, and for names whose last label is a
    number: those are read as addresses elsewhere.
    """
    if len(text) > MAX_NAME:
        raise CodecError(f"a name of {len(text)} characters")
    labels = [_label(label, text) for label in text.split(".")]
    name = ".".join(labels)
    if len(name) > 253:
        raise CodecError(f"a DNS name of {len(name)} octets")
    if labels[-1].isdigit() or re.fullmatch("0x[0-9a-f]*", labels[-1]):
        raise CodecError(f"a DNS name that ends in a number: {text!r}")
    return name


def mailbox(text: str) -> tuple[str, str]:
    """Return the local part of an RFC 822 name as it is, and its domain in canonical form.

    Raises CodecError for quoted local parts, comments, and what :func:`domain` refuses.
    """
    local, at, host = text.rpartition("@")
    if not at or not 0 < len(local) <= 255:
        raise CodecError(f"not a mailbox: {text!r}")
    for atom in local.split("."):
        _ascii_or_stable(atom, text)
    return local, domain(host)


def _label(label: str, name: str) -> str:
    if label.isascii():
        encoded = label.lower()
    else:
        if unicodedata.normalize("NFKC", label) != label:
            raise CodecError(f"a label with compatibility characters: {name!r}")
        folded = label.lower()
        if (
            folded.casefold() != folded
            or unicodedata.normalize("NFKC", folded) != folded
            or _category(folded[0]).startswith("M")
            or "-" in (folded[0], folded[-1])
            or not all(c in "-_" or _category(c) in _LABEL_CATEGORIES for c in folded)
        ):
            raise CodecError(f"a label that IDNA 2008 has no one form of: {name!r}")
        encoded = "xn--" + folded.encode("punycode").decode("ascii")
    if not _LABEL.fullmatch(encoded):
        raise CodecError(f"not a DNS name: {name!r}")
    return encoded


def _ascii_or_stable(atom: str, name: str) -> None:
    ascii_part = "".join(c for c in atom if c.isascii())
    if (ascii_part and not _ATEXT.fullmatch(ascii_part)) or not atom or atom == "*":
        raise CodecError(f"not a mailbox: {name!r}")
    if unicodedata.normalize("NFKC", atom) != atom or not all(
        c.isascii() or _category(c) in _LOCAL_CATEGORIES for c in atom
    ):
        raise CodecError(f"a mailbox that has no one form: {name!r}")


# -- distinguished names


class Attribute(NamedTuple):
    """Type (a dotted OID) and value: text, or the DER of a value that is no string."""

    type: str
    value: str | bytes


class DN:
    """A distinguished name (X.501): RDNs, root first, each one or more attributes.

    ``==`` and ``hash`` go by the canonical form, ``str`` gives text that :func:`parse_dn` reads.
    """

    __slots__ = ("_canonical", "rdns")

    rdns: tuple[tuple[Attribute, ...], ...]
    _canonical: tuple[tuple[Attribute, ...], ...]

    def __init__(self, rdns: tuple[tuple[Attribute, ...], ...]) -> None:
        """Raise CodecError for no RDNs, an empty RDN, a type twice in one, an unfit value."""
        if not 0 < len(rdns) <= _MAX_RDNS:
            raise CodecError(f"a distinguished name of {len(rdns)} RDNs")
        object.__setattr__(self, "rdns", rdns)
        object.__setattr__(self, "_canonical", tuple(_sorted(map(_canonical, rdn)) for rdn in rdns))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a distinguished name does not change")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("a distinguished name does not change")

    def __reduce__(self) -> tuple[type[DN], tuple[tuple[tuple[Attribute, ...], ...]]]:
        return type(self), (self.rdns,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DN) and self._canonical == other._canonical

    def __hash__(self) -> int:
        return hash(self._canonical)

    def __str__(self) -> str:
        return ", ".join(
            "+".join(f"{_NAMES.get(type_, type_)}={_escape(value)}" for type_, value in rdn)
            for rdn in self.rdns
        )

    def __repr__(self) -> str:
        return f"<DN {self}>"

    @property
    def canonical(self) -> tuple[tuple[Attribute, ...], ...]:
        """What is compared: attributes of an RDN sorted by type, values in canonical form."""
        return self._canonical


Pattern = tuple[tuple[Attribute | tuple[str, None], ...], ...]
"""A canonical DN in which the value None is any value."""

A = TypeVar("A", bound=Attribute | tuple[str, None])

# Attribute types whose values are compared without regard to case (X.520, RFC 4519, RFC 2985).
# The first name of each is how strongSwan prints it.
_TYPES: Final[dict[str, tuple[str, ...]]] = {
    "2.5.4.3": ("CN", "commonName"),
    "2.5.4.4": ("SN", "surname"),
    "2.5.4.5": ("serialNumber",),
    "2.5.4.6": ("C", "countryName"),
    "2.5.4.7": ("L", "localityName"),
    "2.5.4.8": ("ST", "stateOrProvinceName"),
    "2.5.4.9": ("STREET", "streetAddress"),
    "2.5.4.10": ("O", "organizationName"),
    "2.5.4.11": ("OU", "organizationalUnitName"),
    "2.5.4.12": ("T", "title"),
    "2.5.4.13": ("D", "description"),
    "2.5.4.16": ("postalAddress",),
    "2.5.4.17": ("postalCode",),
    "2.5.4.41": ("N", "name"),
    "2.5.4.42": ("G", "GN", "givenName"),
    "2.5.4.43": ("I", "initials"),
    "2.5.4.45": ("ID", "uniqueIdentifier"),
    "2.5.4.46": ("dnQualifier",),
    "2.5.4.54": ("dmdName",),
    "2.5.4.65": ("pseudonym",),
    "0.9.2342.19200300.100.1.1": ("UID", "userId"),
    "0.9.2342.19200300.100.1.25": ("DC", "domainComponent"),
    "1.2.840.113549.1.9.1": ("E", "emailAddress", "Email"),
    "1.2.840.113549.1.9.2": ("unstructuredName", "UN"),
    "1.2.840.113549.1.9.8": ("unstructuredAddress", "UA"),
    "2.16.840.1.113730.3.1.3": ("employeeNumber", "EN"),
}
_NAMES: Final = {oid: names[0] for oid, names in _TYPES.items()}
_OIDS: Final = {name.lower(): oid for oid, names in _TYPES.items() for name in names}
_OID = re.compile(r"[012](?:\.(?:0|[1-9][0-9]{0,19})){1,30}")

# Categories that no value may have: controls, invisible formatting, surrogates, private use and
# unassigned characters. RFC 4518 2.2 drops some of them, 2.3 prohibits the others.
_UNFIT = frozenset({"Cc", "Cf", "Cs", "Co", "Cn"})
_SPECIAL = frozenset(',+"\\<>;')


def parse_dn(text: str) -> DN:
    r"""Parse the text of a distinguished name, root first: ``C=CH, O=Acme\, Inc., CN=a+UID=7``.

    Types are names (RFC 4514's and strongSwan's) or dotted OIDs. Values escape ``, + " \ < > ;``
    (and ``#`` or a space in front, a space at the end) with a backslash, or give UTF-8 bytes as
    hex pairs (``\C3\AB``); ``#`` and hex digits are a value's DER. An asterisk must be escaped
    (``\2A``), so that no name reads as a pattern.

    Raises CodecError.
    """
    rdns: list[tuple[Attribute, ...]] = []
    for rdn in _parse(text):
        attributes: list[Attribute] = []
        for type_, value in rdn:
            if value is None:
                raise CodecError(f"an asterisk that is not escaped: {text!r}")
            attributes.append(Attribute(type_, value))
        rdns.append(tuple(attributes))
    return DN(tuple(rdns))


def parse_dn_pattern(text: str) -> Pattern:
    """Parse text like that of :func:`parse_dn` in which an unescaped ``*`` is any one value.

    Raises CodecError, also for a ``*`` that is only part of a value.
    """
    rdns: list[tuple[Attribute | tuple[str, None], ...]] = []
    for rdn in _parse(text):
        wanted = [
            (type_, None) if value is None else _canonical(Attribute(type_, value))
            for type_, value in rdn
        ]
        rdns.append(_sorted(wanted))
    return tuple(rdns)


def match_dn(name: DN, pattern: Pattern) -> bool:
    """Say whether a name has the pattern's RDNs: as many, in the same order, with its values."""
    return len(name.canonical) == len(pattern) and all(
        len(rdn) == len(wanted)
        and all(
            have.type == want[0] and want[1] in (None, have.value)
            for have, want in zip(rdn, wanted, strict=True)
        )
        for rdn, wanted in zip(name.canonical, pattern, strict=True)
    )


def _sorted(rdn: Iterable[A]) -> tuple[A, ...]:
    """Sort the attributes of an RDN, which has one of each type (X.501 9.3)."""
    attributes = sorted(rdn, key=lambda attribute: attribute[0])
    types = [attribute[0] for attribute in attributes]
    if not types or len(set(types)) < len(types):
        raise CodecError("an RDN without attributes, or with two of one type")
    return tuple(attributes)


def _canonical(attribute: Attribute) -> Attribute:
    type_, value = attribute
    if isinstance(value, bytes):
        value = _value(value)
        if isinstance(value, bytes):
            return attribute
    for character in value:
        if _category(character) in _UNFIT:
            raise CodecError(f"a value with U+{ord(character):04X}")
    text = unicodedata.normalize("NFC", value)
    if type_ in _TYPES:
        text = unicodedata.normalize("NFC", text.lower())
        text = " ".join(part for part in text.split(" ") if part)
    if not text:
        raise CodecError(f"an empty value of {_NAMES.get(type_, type_)}")
    return Attribute(type_, text)


def _escape(value: str | bytes) -> str:
    if isinstance(value, bytes):
        return "#" + value.hex().upper()
    out: list[str] = []
    for index, character in enumerate(value):
        if character == "*":
            out.append("\\2A")
        elif (
            character in _SPECIAL
            or (character == "#" and index == 0)
            or (character == " " and index in (0, len(value) - 1))
        ):
            out.append("\\" + character)
        else:
            out.append(character)
    return "".join(out)


_TYPE = re.compile(r" *([A-Za-z][A-Za-z0-9-]*|[0-9.]+) *= *")
_HEX_VALUE = re.compile(r"#((?:[0-9A-Fa-f]{2})+) *(?=[,+]|$)")
_HEX_PAIR = re.compile(r"[0-9A-Fa-f]{2}")


def _parse(text: str) -> list[list[tuple[str, str | bytes | None]]]:
    if len(text) > MAX_NAME:
        raise CodecError(f"a distinguished name of {len(text)} characters")
    rdns: list[list[tuple[str, str | bytes | None]]] = [[]]
    position = 0
    while True:
        found = _TYPE.match(text, position)
        if not found:
            raise CodecError(f"no attribute type at {position}: {text!r}")
        type_ = _type(found[1])
        value, position = _parse_value(text, found.end())
        rdns[-1].append((type_, value))
        if position == len(text):
            return rdns
        if text[position] == ",":
            rdns.append([])
        position += 1


def _type(name: str) -> str:
    oid = _OIDS.get(name.lower(), name)
    if not _OID.fullmatch(oid):
        raise CodecError(f"unknown attribute type {name}")
    return oid


def _parse_value(text: str, position: int) -> tuple[str | bytes | None, int]:
    """Return a value, or None for an asterisk alone, and where it ended."""
    found = _HEX_VALUE.match(text, position)
    if found:
        return _value(bytes.fromhex(found[1])), found.end()
    out = bytearray()
    end = stars = 0
    while position < len(text) and text[position] not in ",+":
        character = text[position]
        position += 1
        if character == "\\":
            escaped = text[position : position + 1]
            pair = _HEX_PAIR.match(text, position)
            if pair:
                out += bytes.fromhex(pair[0])
                position += 2
            elif escaped and escaped in ',+"\\<>;= #':
                out += escaped.encode()
                position += 1
            else:
                raise CodecError(f"a backslash before {escaped!r}: {text!r}")
            end = len(out)
            continue
        if character in _SPECIAL or (character == "#" and not out):
            raise CodecError(f"{character!r} is not escaped: {text!r}")
        stars += character == "*"
        out += character.encode("utf-8", "surrogatepass")
        if character != " ":
            end = len(out)
    if stars:
        if bytes(out[:end]) == b"*":
            return None, position
        raise CodecError(f"an asterisk within a value is not escaped: {text!r}")
    try:
        return out[:end].decode(), position
    except UnicodeDecodeError as error:
        raise CodecError(f"a value that is not UTF-8: {text!r}") from error


# -- DER (X.690), as much of it as a Name needs

_SEQUENCE, _SET, _OBJECT_IDENTIFIER = 0x30, 0x31, 0x06
# UTF8, Numeric, Printable, Teletex (read as Latin-1, as is done everywhere), IA5, Visible,
# Universal and BMP strings.
_STRINGS: Final = {
    0x0C: "utf-8",
    0x12: "ascii",
    0x13: "ascii",
    0x14: "latin-1",
    0x16: "ascii",
    0x1A: "ascii",
    0x1C: "utf-32-be",
    0x1E: "utf-16-be",
}


def decode_dn(der: bytes) -> DN:
    """Decode the DER of an X.501 Name, as ID_DER_ASN1_DN carries it. Raises CodecError."""
    return DN(
        tuple(
            tuple(Attribute(_oid(oid), _value(whole)) for oid, whole, _ in rdn)
            for rdn in _decode(der)
        )
    )


def ike_text(der: bytes) -> str:
    """Write the DER of a Name as strongSwan prints it: without escapes.

    Attributes of one RDN look like several RDNs, ``, X=`` within a value looks like another
    attribute, and each byte beyond printable ASCII is a ``?``. Many names have the same text: it
    can be made from a name, never read back with certainty. Raises CodecError.
    """
    return ", ".join(
        f"{_NAMES.get(_oid(oid)) or oid.hex(':')}={_printable(content)}"
        for rdn in _decode(der)
        for oid, _, content in rdn
    )


def printed_type(text: str) -> str | None:
    """Return the OID of an attribute type as strongSwan prints it, None where it is none."""
    if ":" in text:
        try:
            oid = _oid(bytes.fromhex(text.replace(":", "")))
        except ValueError:
            return None
        return None if oid in _NAMES else oid
    return next((oid for oid, name in _NAMES.items() if name == text), None)


def _printable(content: bytes) -> str:
    return "".join(chr(byte) if 0x20 <= byte < 0x7F else "?" for byte in content)


def _decode(der: bytes) -> Iterator[list[tuple[bytes, bytes, bytes]]]:
    """Yield each RDN's attributes: OID, the value's whole encoding, and its content."""
    if len(der) > MAX_NAME:
        raise CodecError(f"a distinguished name of {len(der)} bytes")
    for tag, rdn, _ in _elements(_only(der, _SEQUENCE)):
        if tag != _SET:
            raise CodecError(f"tag {tag:#04x} in place of an RDN")
        attributes: list[tuple[bytes, bytes, bytes]] = []
        for tag_, attribute, _ in _elements(rdn):
            parts = list(_elements(attribute))
            if tag_ != _SEQUENCE or len(parts) != 2 or parts[0][0] != _OBJECT_IDENTIFIER:
                raise CodecError("not an attribute of a distinguished name")
            attributes.append((parts[0][1], parts[1][2], parts[1][1]))
        yield attributes


def _only(der: bytes, tag: int) -> bytes:
    elements = list(_elements(der))
    if len(elements) != 1 or elements[0][0] != tag:
        raise CodecError(f"not one element with tag {tag:#04x}")
    return elements[0][1]


def _elements(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield tag, content and whole encoding of the elements that follow one another in data."""
    position = 0
    while position < len(data):
        header = data[position : position + 2]
        if len(header) < 2 or header[0] & 0x1F == 0x1F:
            raise CodecError(f"no DER element at {position}")
        start, length = position + 2, header[1]
        if length & 0x80:
            start += length & 0x7F
            octets = data[position + 2 : start]
            length = int.from_bytes(octets)
            if not 0x81 <= header[1] <= 0x84 or octets[:1] == b"\0" or length < 0x80:
                raise CodecError(f"a length at {position} that is not DER")
        end = start + length
        if end > len(data):
            raise CodecError(f"an element ends {end - len(data)} bytes after its parent")
        yield header[0], data[start:end], data[position:end]
        position = end


def _value(der: bytes) -> str | bytes:
    """Return a string's text, any other value's encoding."""
    elements = list(_elements(der))
    if len(elements) != 1:
        raise CodecError("not one value")
    tag, content, _ = elements[0]
    if tag not in _STRINGS:
        return der
    try:
        return content.decode(_STRINGS[tag])
    except UnicodeDecodeError as error:
        raise CodecError(f"a string with tag {tag:#04x} that is none") from error


def _oid(content: bytes) -> str:
    if not content or content[-1] & 0x80:
        raise CodecError("not an object identifier")
    arcs: list[int] = []
    arc = 0
    for byte in content:
        if byte == 0x80 and arc == 0:
            raise CodecError("an object identifier that is not DER")
        arc = arc << 7 | byte & 0x7F
        if not byte & 0x80:
            arcs.append(arc)
            arc = 0
    first = min(arcs[0] // 40, 2)
    return ".".join(map(str, (first, arcs[0] - 40 * first, *arcs[1:])))
