"""Netlink attributes that lie as they did in earlier messages.

Rules:

* Messages of one kind mostly have the same attributes of the same lengths. Where they lie is worked
  out once, with every check; equal headers in an area of equal length then mean equal places.
* Headers are compared before anything else is looked at, and nothing is cut out that was not asked
  for: what lies behind it may be a key. A layout holds kinds and lengths, never content.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from struct import Struct

from ..errors import CodecError
from .netlink import Buffer, attributes

__all__ = ["Cuts", "Cutter", "Layout"]

Cuts = Mapping[int, Struct | None]
"""What is cut out of each attribute, by type: one field of bytes, or all of it."""

_LAYOUTS = 64
_HEADER = Struct("=I")


class Layout:
    """Where attributes lie in an area.

    ``kinds`` are the types of what :meth:`Cutter.cut` returns, and ``sizes`` the attributes'
    lengths; ``apart`` are the types that are told by :meth:`set_apart`.
    """

    __slots__ = ("_apart", "apart", "expected", "headers", "kinds", "sizes", "values")

    def __init__(
        self,
        headers: tuple[Struct, tuple[int, ...]],
        common: list[tuple[int, int]],
        values: Struct,
        apart: list[int],
        apart_values: Struct,
    ) -> None:
        self.headers, self.expected = headers
        self.kinds = [kind for kind, _ in common]
        self.sizes = [size for _, size in common]
        self.values = values
        self.apart = apart
        self._apart = apart_values

    def set_apart(self, buffer: Buffer, start: int) -> dict[int, bytes]:
        """Cut out what varies from message to message."""
        return dict(zip(self.apart, self._apart.unpack_from(buffer, start), strict=True))


class Cutter:
    """Cuts values out of attributes: those of the types ``apart`` by themselves."""

    def __init__(self, cuts: Cuts, apart: Collection[int] = ()) -> None:
        self._cuts = cuts
        self._apart = apart
        self._known: dict[int, list[Layout]] = {}
        self._count = 0

    def cut(self, buffer: Buffer, start: int, end: int) -> tuple[Layout, tuple[bytes, ...]]:
        """Return what was asked for, and where it lay.

        Raises CodecError where an attribute's length is wrong, or too short for what is cut out.
        """
        for layout in self._known.get(end - start, ()):
            if layout.headers.unpack_from(buffer, start) == layout.expected:
                return layout, layout.values.unpack_from(buffer, start)
        layout = self._laid_out(buffer, start, end)
        if self._count < _LAYOUTS:
            self._count += 1
            self._known.setdefault(end - start, []).append(layout)
        return layout, layout.values.unpack_from(buffer, start)

    def parts(self, buffer: Buffer, start: int, end: int) -> dict[int, bytes]:
        """Return what was asked for by type."""
        layout, values = self.cut(buffer, start, end)
        return dict(zip(layout.kinds, values, strict=True)) | layout.set_apart(buffer, start)

    def _laid_out(self, buffer: Buffer, start: int, end: int) -> Layout:
        headers, common, apart = _Format(start), _Format(start), _Format(start)
        expected: list[int] = []
        kinds: list[tuple[int, int]] = []
        kinds_apart: list[int] = []
        for kind, place, stop in attributes(buffer, start, end):
            headers.add(place - _HEADER.size, _HEADER)
            expected += _HEADER.unpack_from(buffer, place - _HEADER.size)
            if kind not in self._cuts:
                continue
            size = stop - place
            cut = self._cuts[kind] or Struct(f"{size}s")
            if size < cut.size:
                raise CodecError(f"attribute {kind} has {size} bytes, {cut.size} expected")
            if kind in self._apart:
                apart.add(place, cut)
                kinds_apart.append(kind)
            else:
                common.add(place, cut)
                kinds.append((kind, size))
        return Layout(
            (headers.struct(), tuple(expected)), kinds, common.struct(), kinds_apart, apart.struct()
        )


class _Format:
    """A structure's format, with gaps."""

    def __init__(self, start: int) -> None:
        self._text = "="
        self._place = start

    def add(self, place: int, what: Struct) -> None:
        self._text += f"{place - self._place}x{what.format.lstrip('=@')}"
        self._place = place + what.size

    def struct(self) -> Struct:
        return Struct(self._text)
