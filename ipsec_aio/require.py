"""What a program demands of a channel before it talks on it.

Rules:

* A clause that is None or False demands nothing; a requirement without a clause is an error.
* What a token cannot tell counts as not met.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass
from typing import NoReturn, final

from .enums import Assurance
from .errors import ProtectionError
from .tokens import PToken

__all__ = ["Require"]


@final
@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Require:
    """A requirement; immutable, comparable, hashable.

    ``encrypted``: the token is protected, and its payload was private. ``integrity``: it is
    protected, and its payload was authenticated. ``assurance``: it is at least that sure.

    The other clauses, and combining with ``&``, ``|`` and ``~``, raise NotImplementedError in
    this release. Raises ValueError where nothing is demanded, TypeError for a clause of a wrong
    type.
    """

    encrypted: bool | None = None
    integrity: bool | None = None
    assurance: Assurance | None = None
    peer: InitVar[object] = None
    local: InitVar[object] = None
    min_bits: InitVar[object] = None
    mode: InitVar[object] = None
    protocol: InitVar[object] = None
    algorithms: InitVar[object] = None
    end_to_end: InitVar[object] = None
    authentication_method: InitVar[object] = None
    policy_name: InitVar[object] = None

    def __post_init__(self, *later: object) -> None:
        if any(clause is not None for clause in later):
            raise NotImplementedError(
                "this release knows the clauses encrypted, integrity and assurance"
            )
        for name in ("encrypted", "integrity"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                raise TypeError(f"{name} is True, False or None, not {value!r}")
            object.__setattr__(self, name, value or None)
        if self.assurance is not None:
            try:
                object.__setattr__(self, "assurance", Assurance(self.assurance))
            except ValueError:
                raise TypeError(f"assurance is an Assurance, not {self.assurance!r}") from None
        if not (self.encrypted or self.integrity or self.assurance):
            raise ValueError("a requirement needs a clause, such as encrypted=True")

    def check(self, ptoken: PToken) -> ProtectionError | None:
        """Return None where the token meets every clause, else the error that names the first
        one it does not meet, and what was found.
        """
        if self.encrypted and not (ptoken.protected and ptoken.privacy_protected is True):
            return ProtectionError("encrypted", _found(ptoken))
        if self.integrity and not (ptoken.protected and ptoken.integrity_protected is True):
            return ProtectionError("integrity", _found(ptoken))
        if self.assurance is not None and ptoken.assurance < self.assurance:
            return ProtectionError(
                "assurance", f"{self.assurance.name} is demanded, but {_found(ptoken)}"
            )
        return None

    def _combine(self, other: object = None) -> NoReturn:
        raise NotImplementedError("this release cannot combine requirements")

    __and__ = __or__ = __invert__ = _combine

    def __repr__(self) -> str:
        clauses = [f"{name}=True" for name in ("encrypted", "integrity") if getattr(self, name)]
        if self.assurance is not None:
            clauses.append(f"assurance=Assurance.{self.assurance.name}")
        return f"Require({', '.join(clauses)})"


def _found(ptoken: PToken) -> str:
    return f"this is {ptoken.assurance.name} ({ptoken.information_string})"
