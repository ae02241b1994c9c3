"""The clauses of a requirement: what each one asks of a token.

Rules:

* An answer is True (proved), False (known not to be so) or None (it cannot be told, or not yet).
  Nothing is True or False of a token that is UNKNOWN.
* A clause about protection is True of a protected token only, and False of what is known to be
  clear or unauthenticated.
* Clauses about SAs go by what the token was fixed with, not by the SAs of this moment. Several may
  have carried the packet: what holds of all of them is True, of none False, else it is None.
* An identity counts on a protected token only, and its name only where it was proved: who sends
  in the clear, shares a group's key or shows a bare one may be anybody, so that is None.
"""

# What a token was fixed with is no public attribute.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

from . import names
from .algorithms import AEADS, AUTHENTICATORS, CIPHERS, NULL_AUTHENTICATOR, NULL_CIPHER
from .enums import Assurance, Mode
from .identity import AuthenticationMethod, IdentityKind, IdentityPattern, IToken
from .protection import TUNNELS, Group
from .sa import IPPROTO_AH, IPPROTO_ESP

if TYPE_CHECKING:
    from .protection import Strength
    from .sa import Algorithm
    from .tokens import PToken

__all__ = ["FLAGS", "NAMES", "Atom", "Clause", "all_of", "any_of"]

Atom = str | int
"""What a value is written with: a word, a text or a number."""


def all_of(answers: Iterable[bool | None]) -> bool | None:
    """Return the conjunction (Kleene's)."""
    result: bool | None = True
    for answer in answers:
        if answer is False:
            return False
        if answer is None:
            result = None
    return result


def any_of(answers: Iterable[bool | None]) -> bool | None:
    """Return the disjunction (Kleene's)."""
    result: bool | None = False
    for answer in answers:
        if answer is True:
            return True
        if answer is None:
            result = None
    return result


@dataclass(frozen=True, slots=True)
class Clause:
    """One clause, its value in the form in which it is compared. Made by :meth:`read`."""

    name: str
    value: Any

    @classmethod
    def read(cls, name: str, value: object) -> Clause | None:
        """Return the clause for an argument; None where that demands nothing.

        Raises TypeError for a value of a wrong type, ValueError for one that makes no sense.
        """
        if value is None:
            return None
        read = _KINDS[name].read(name, value)
        return None if read is None else cls(name, read)

    def decide(self, ptoken: PToken) -> bool | None:
        """Return the answer."""
        return _KINDS[self.name].ask(ptoken, self.value)

    @property
    def atoms(self) -> tuple[Atom, ...]:
        """What the value is written with, so that reading it again gives an equal clause."""
        value = self.value
        items: tuple[Any, ...] = cast("tuple[Any, ...]", value)
        if not isinstance(value, tuple):
            items = (value,)
        return () if value is True else tuple(_atom(self.name, item) for item in items)

    def explain(self, ptoken: PToken) -> str:
        """Say what is demanded and what was found."""
        found = f"this is {ptoken.assurance.name} ({ptoken.information_string})"
        if self.name in FLAGS:
            return found
        if self.name in _IDENTITIES and _protected(ptoken) is True:
            local = self.name == "local"
            identity = ptoken.local if local else ptoken.peer
            found = "this end" if local else "the peer"
            found += " is not known" if identity is None else f" is {identity!r}"
        demanded = " or ".join(str(atom) for atom in self.atoms)
        return f"{demanded} is demanded, but {found}"


def _atom(name: str, item: Any) -> Atom:
    if name == "protocol":
        return _PROTOCOL_NAMES[item]
    if isinstance(item, Assurance | AuthenticationMethod):
        return item.name
    if isinstance(item, Mode):
        return item.name.lower()
    if isinstance(item, IToken):
        return item.export()
    return item if isinstance(item, int) else str(item)


# -- reading values

_PROTOCOLS: Final = {"esp": IPPROTO_ESP, "ah": IPPROTO_AH}
_PROTOCOL_NAMES: Final = {number: name for name, number in _PROTOCOLS.items()}
_MODES: Final = {mode.name: mode for mode in (Mode.TRANSPORT, *TUNNELS)}
_ALGORITHMS: Final = {**AEADS, **CIPHERS, **AUTHENTICATORS}
_EXPORTED: Final = "itoken1:"


def _flag(name: str, value: object) -> bool | None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is True, False or None, not {value!r}")
    return value or None


def _bits(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is a number of bits, not {value!r}")
    if not 0 < value <= 1024:
        raise ValueError(f"{name} is between 1 and 1024, not {value}")
    return value


def _assurance(name: str, value: object) -> Assurance | None:
    return _member(name, value, Assurance, Assurance.__members__) or None


def _mode(name: str, value: object) -> Mode:
    mode: Mode = _member(name, value, Mode, _MODES)
    return mode


def _member(name: str, value: object, kind: type[Any], members: Any) -> Any:
    if isinstance(value, str):
        found = members.get(value.upper())
    elif isinstance(value, kind) or (isinstance(value, int) and not isinstance(value, bool)):
        found = next((each for each in members.values() if each == value), None)
    else:
        raise TypeError(f"{name} is of {kind.__name__}, not {value!r}")
    if found is None:
        raise ValueError(f"{name} is one of {', '.join(members)}, not {value!r}")
    return found


def _protocol(name: str, value: object) -> int:
    if isinstance(value, str) and value.lower() in _PROTOCOLS:
        return _PROTOCOLS[value.lower()]
    if isinstance(value, int) and not isinstance(value, bool) and value in _PROTOCOL_NAMES:
        return value
    if isinstance(value, str | int):
        raise ValueError(f"{name} is 'esp' or 'ah', not {value!r}")
    raise TypeError(f"{name} is 'esp' or 'ah', not {value!r}")


def _items(name: str, value: object, *kinds: type[object]) -> list[Any]:
    """Return one or several values as a list."""
    items: list[Any] = [value]
    if isinstance(value, Iterable) and not isinstance(value, (*kinds, str, bytes)):
        items = [*value]
    if not items:
        raise ValueError(f"{name} is empty: nobody could meet it")
    for item in items:
        if not isinstance(item, (*kinds, str)):
            raise TypeError(f"{name} is of {' or '.join(k.__name__ for k in kinds)}, not {item!r}")
    return items


def _algorithms(name: str, value: object) -> tuple[str, ...]:
    chosen = sorted(set(_items(name, value, str)))
    for algorithm in chosen:
        if algorithm not in _ALGORITHMS:
            # A misspelt one would forbid nothing.
            raise ValueError(
                f"{name}: no algorithm {algorithm!r}; the kernel calls them "
                f"{', '.join(sorted(_ALGORITHMS))}"
            )
    return tuple(chosen)


def _methods(name: str, value: object) -> tuple[AuthenticationMethod, ...]:
    chosen = {
        _member(name, item, AuthenticationMethod, AuthenticationMethod.__members__)
        for item in _items(name, value, AuthenticationMethod)
    }
    return tuple(method for method in AuthenticationMethod if method in chosen)


def _identities(name: str, value: object) -> tuple[IdentityPattern | IToken, ...]:
    wanted = {_identity(name, item) for item in _items(name, value, IToken, IdentityPattern)}
    return tuple(sorted(wanted, key=lambda each: _atom(name, each)))


def _identity(name: str, item: str | IdentityPattern | IToken) -> IdentityPattern | IToken:
    try:
        if isinstance(item, str) and item.startswith(_EXPORTED):
            item = IToken.parse(item)
        if isinstance(item, IToken):
            if item.opaque:
                raise ValueError("its text is that of several names, it cannot be demanded")
            return item
        return IdentityPattern.parse(str(item))
    except ValueError as error:
        raise ValueError(f"{name}: {str(item)!r}: {error}") from error


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} is text, not {value!r}")
    if not value:
        raise ValueError(f"{name} is empty")
    return value


# -- asking

_UNPROVED: Final = (
    AuthenticationMethod.NONE,
    AuthenticationMethod.BTNS,
    AuthenticationMethod.GROUPKEY,
)
_PROOF: Final = ("authentication_method", "pub_key_id", "channel_binding")
_NAMES_OF_PROOF: Final = ("certificate_authority_dn", "certificate_dn")
# What a key is worth where that is less than its length (NIST SP 800-57 part 1, 5.6.1).
_WORTH: Final = {
    "cbc(des)": 56,
    "cbc(des3_ede)": 112,
    **{name: bits for name, (bits, _) in AUTHENTICATORS.items()},
}


def _protected(ptoken: PToken) -> bool | None:
    if ptoken.protected:
        return True
    assurance = ptoken.assurance
    if assurance is Assurance.NONE:
        return False
    # Inference that nobody trusts proves nothing, not even that protection was missing.
    return ptoken.integrity_protected if assurance >= Assurance.INTERFACE else None


def _ask_encrypted(ptoken: PToken, value: bool) -> bool | None:
    del value
    protected = _protected(ptoken)
    return protected if protected is None else all_of((protected, ptoken.privacy_protected))


def _ask_integrity(ptoken: PToken, value: bool) -> bool | None:
    del value
    return _protected(ptoken)


def _ask_assurance(ptoken: PToken, value: Assurance) -> bool | None:
    assurance = ptoken.assurance
    return None if assurance is Assurance.UNKNOWN else assurance >= value


def _of_all(ptoken: PToken, ask: Callable[[Group | Strength], bool | None]) -> bool | None:
    protected = _protected(ptoken)
    if not protected:
        return protected
    protection = ptoken._now().verdict.protection
    candidates: list[Group | Strength] = [*protection.groups, *protection.others]
    answers = {ask(each) for each in candidates}
    return answers.pop() if len(answers) == 1 else None


def _ask_min_bits(ptoken: PToken, value: int) -> bool | None:
    def ask(group: Group | Strength) -> bool | None:
        bits = [
            _strength(a) for a in _used(group) if a.name not in (NULL_CIPHER, NULL_AUTHENTICATOR)
        ]
        return all_of(None if each is None else each >= value for each in bits) if bits else None

    return _of_all(ptoken, ask)


def _strength(algorithm: Algorithm) -> int | None:
    if algorithm.name not in _ALGORITHMS or not algorithm.strength_bits:
        return None
    return min(algorithm.strength_bits, _WORTH.get(algorithm.name, algorithm.strength_bits))


def _used(group: Group | Strength) -> list[Algorithm]:
    return [a for a in (group.aead, group.encryption, group.authentication) if a is not None]


def _ask_protocol(ptoken: PToken, value: int) -> bool | None:
    return _of_all(ptoken, lambda group: group.proto == value)


def _ask_mode(ptoken: PToken, value: Mode) -> bool | None:
    return _of_all(ptoken, lambda group: group.mode == value)


def _ask_algorithms(ptoken: PToken, value: tuple[str, ...]) -> bool | None:
    return _of_all(ptoken, lambda group: _all_known(group, lambda name: name in value))


def _ask_forbidden(ptoken: PToken, value: tuple[str, ...]) -> bool | None:
    return _of_all(ptoken, lambda group: _all_known(group, lambda name: name not in value))


def _all_known(group: Group | Strength, fit: Callable[[str], bool]) -> bool | None:
    used = [algorithm.name for algorithm in _used(group)]
    answers = (fit(name) if name in _ALGORITHMS else None for name in used)
    return all_of(answers) if used else None


def _ask_end_to_end(ptoken: PToken, value: bool) -> bool | None:
    del value
    ends = ptoken._ends

    def ask(group: Group | Strength) -> bool | None:
        if group.mode is Mode.TRANSPORT:
            return True
        if isinstance(group, Group) and (group.source, group.destination) == ends:
            return True
        # Whose the inner addresses are is not told: a host may have a virtual one.
        return None

    # A tunnel may be demanded of which no SA is known.
    protected = _of_all(ptoken, ask)
    modes = {group.mode for group in ptoken._now().verdict.protection.groups}
    hidden = ptoken.tunnel_mode is not False and modes.isdisjoint(TUNNELS)
    return None if protected and hidden else protected


def _ask_peer(ptoken: PToken, value: tuple[IdentityPattern | IToken, ...]) -> bool | None:
    return _is_any(ptoken, ptoken.peer, value)


def _ask_local(ptoken: PToken, value: tuple[IdentityPattern | IToken, ...]) -> bool | None:
    return _is_any(ptoken, ptoken.local, value)


def _is_any(
    ptoken: PToken, identity: IToken | None, wanted: tuple[IdentityPattern | IToken, ...]
) -> bool | None:
    if identity is None or not _protected(ptoken):
        return None
    return any_of(_is(identity, each) for each in wanted)


def _is(identity: IToken, wanted: IdentityPattern | IToken) -> bool | None:
    if identity.kind is IdentityKind.NULL and wanted.kind is not IdentityKind.NULL:
        return None
    if identity.authentication_method in _UNPROVED and identity.kind is not IdentityKind.NULL:
        return None
    if identity.kind is wanted.kind and identity.opaque:
        return None
    if isinstance(wanted, IdentityPattern):
        return identity.matches(wanted)
    if not identity.same_name(wanted):
        return False
    return all_of(
        [
            *(_agree(getattr(identity, name), getattr(wanted, name)) for name in _PROOF),
            *(_agree(_dn(identity, name), _dn(wanted, name)) for name in _NAMES_OF_PROOF),
        ]
    )


def _dn(identity: IToken, name: str) -> names.DN | None:
    text: str | None = getattr(identity, name)
    return None if text is None else names.parse_dn(text)


def _agree(have: object, want: object) -> bool | None:
    """Whether a detail of the proof is as demanded; None demands nothing."""
    if want is None:
        return True
    return None if have is None else have == want


def _ask_method(ptoken: PToken, value: tuple[AuthenticationMethod, ...]) -> bool | None:
    peer = ptoken.peer
    method = None if peer is None else peer.authentication_method
    return None if method is None or not _protected(ptoken) else method in value


def _ask_policy(ptoken: PToken, value: str) -> bool | None:
    name = ptoken.policy_name
    return None if name is None or not _protected(ptoken) else name == value


# -- all of them, in the order in which they are asked


@dataclass(frozen=True, slots=True)
class _Kind:
    read: Callable[[str, object], Any]
    ask: Callable[[PToken, Any], bool | None]


_KINDS: Final = {
    "encrypted": _Kind(_flag, _ask_encrypted),
    "integrity": _Kind(_flag, _ask_integrity),
    "min_bits": _Kind(_bits, _ask_min_bits),
    "protocol": _Kind(_protocol, _ask_protocol),
    "mode": _Kind(_mode, _ask_mode),
    "algorithms": _Kind(_algorithms, _ask_algorithms),
    "forbidden_algorithms": _Kind(_algorithms, _ask_forbidden),
    "end_to_end": _Kind(_flag, _ask_end_to_end),
    "assurance": _Kind(_assurance, _ask_assurance),
    "peer": _Kind(_identities, _ask_peer),
    "local": _Kind(_identities, _ask_local),
    "authentication_method": _Kind(_methods, _ask_method),
    "policy_name": _Kind(_text, _ask_policy),
}
NAMES: Final = tuple(_KINDS)
"""The clauses' names, in the order in which they are asked."""
FLAGS: Final = frozenset({"encrypted", "integrity", "end_to_end"})
"""Those that are demanded or not, without a value."""
_IDENTITIES: Final = frozenset({"peer", "local", "authentication_method"})
