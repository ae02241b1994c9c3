"""Identities that the operator declares, for SAs that he keyed by hand.

Rules:

* An entry is for the SAs that have all that it names, and for those that lead back between the same
  addresses: local and peer are the same ends. Where several entries are for one SA and do not say
  the same, nobody is known.
* Only an SA that leads out leads back: nothing follows for what comes in.
* Who negotiates SAs knows better: an SA that a keying daemon knows, or might, is not one of these.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ipsec_aio.enums import Direction
from ipsec_aio.flow import pack_address
from ipsec_aio.identities import UNIDENTIFIED, Identities, agreed
from ipsec_aio.identity import IToken

from . import declaration

if TYPE_CHECKING:
    from typing import Self

    from ipsec_aio.sa import SA

__all__ = ["StaticIdentities"]

# What an entry may name of an SA, the most telling first.
_FIELDS = ("spi", "source", "reqid", "destination", "if_id", "proto")


class _Entry(NamedTuple):
    """What an SA must have, and who is at its ends then."""

    wanted: dict[str, object]
    ends: Identities

    def fits(self, sa: SA) -> bool:
        return all(getattr(sa, field) == value for field, value in self.wanted.items())


class StaticIdentities:
    """A table of identities, from TOML.

    ``[[identity]]`` tables have ``peer``, ``local`` or both, text for :meth:`IToken.named`, and at
    least one of ``spi``, ``proto`` (``"esp"``, ``"ah"``, a number), ``src``, ``dst`` (the SA's
    outer addresses, so the peer's and one's own for what comes in), ``reqid`` and ``if_id``. It is
    for the SAs that lead back as well, where it names no ``spi`` or they have that, too.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[str, object], list[_Entry]] = {}

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file. Raises ValueError that names the table and the key, OSError."""
        where = os.fspath(path)
        with declaration.at(where):
            try:
                document = tomllib.loads(Path(path).read_text("utf-8"))
            except tomllib.TOMLDecodeError as error:
                raise ValueError(str(error)) from error
            return cls.of(declaration.checked(document, {"identity": (list,)}))

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Self:
        """Take the ``[[identity]]`` tables of a document. Raises ValueError."""
        identities = cls()
        for place, table in declaration.tables(document, "identity", declaration.IDENTITY):
            with declaration.at(place):
                identities.add(**table)
        return identities

    def add(
        self,
        *,
        peer: str | None = None,
        local: str | None = None,
        spi: int | None = None,
        proto: str | int | None = None,
        src: str | None = None,
        dst: str | None = None,
        reqid: int | None = None,
        if_id: int | None = None,
    ) -> None:
        """Add an entry. Raises ValueError."""
        if peer is None and local is None:
            raise ValueError("peer and local are missing")
        wanted: dict[str, object] = {}
        for field, value in (("spi", spi), ("reqid", reqid), ("if_id", if_id)):
            if value is not None:
                wanted[field] = declaration.within(value, field, 0xFFFFFFFF)
        if proto is not None:
            wanted["proto"] = declaration.number_of(declaration.PROTOS, proto, "proto", 255)
        for key, field, text in (("src", "source", src), ("dst", "destination", dst)):
            if text is not None:
                with declaration.at(key):
                    wanted[field] = pack_address(text)
        if not wanted:
            raise ValueError("it is for no SA: name its spi, proto, src, dst, reqid or if_id")
        entry = _Entry(wanted, Identities(_named("local", local), _named("peer", peer)))
        first = next(field for field in _FIELDS if field in wanted)
        self._entries.setdefault((first, wanted[first]), []).append(entry)

    def find(self, sa: SA, direction: Direction = Direction.IN) -> Identities:
        """Return who is at the ends of an SA that leads in, or out."""
        sas = [sa]
        if direction is Direction.OUT:
            sas.append(replace(sa, source=sa.destination, destination=sa.source))
        answer = agreed(
            entry.ends
            for each in sas
            for field in _FIELDS
            for entry in self._entries.get((field, getattr(each, field)), ())
            if entry.fits(each)
        )
        return answer if isinstance(answer, Identities) else UNIDENTIFIED


def _named(key: str, text: str | None) -> IToken | None:
    if text is None:
        return None
    with declaration.at(key):
        return IToken.named(text)
