"""What protocols write down of what they are told."""

from __future__ import annotations

import asyncio
from typing import Any

PATIENCE = 5.0


class Log:
    """What happened, in order, and a way to wait for it."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self._grown = asyncio.Event()

    def note(self, *event: Any) -> None:
        self.events.append(event)
        self._grown.set()

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        return [event[1:] for event in self.events if event[0] == kind]

    @property
    def kinds(self) -> list[str]:
        return [event[0] for event in self.events]

    async def until(self, kind: str, count: int = 1) -> list[tuple[Any, ...]]:
        async with asyncio.timeout(PATIENCE):
            while len(self.of(kind)) < count:
                self._grown.clear()
                await self._grown.wait()
        return self.of(kind)

    async def bytes(self, size: int) -> bytes:
        async with asyncio.timeout(PATIENCE):
            while sum(len(data) for (data, *_) in self.of("data")) < size:
                self._grown.clear()
                await self._grown.wait()
        return b"".join(data for (data, *_) in self.of("data"))
