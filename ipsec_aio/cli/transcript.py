"""What a demonstration prints: numbered steps, who said what, and what was checked."""

from __future__ import annotations

import os
import re
from typing import TextIO

__all__ = ["Transcript", "wants_colour"]

_BOLD, _DIM, _RED, _GREEN, _YELLOW, _BLUE = "1", "2", "31", "32", "33", "36"
_WORDS = {"PROTECTED": _GREEN, "EXACT": _GREEN, "CLEAR": _YELLOW, "NONE": _YELLOW, "UNKNOWN": _RED}
_PATTERN = re.compile(rf"\b({'|'.join(_WORDS)})\b")


def wants_colour(stream: TextIO) -> bool:
    """Whether to colour what goes to a stream: NO_COLOR and FORCE_COLOR decide, then a terminal."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or stream.isatty()


class Transcript:
    """Writes to a text stream; ``failures`` counts the checks that failed."""

    def __init__(self, stream: TextIO) -> None:
        self.failures = 0
        self._stream = stream
        self._colour = wants_colour(stream)
        self._steps = 0

    def title(self, text: str) -> None:
        """Say what this is."""
        self._write(self._paint(_BOLD, text))

    def step(self, text: str) -> None:
        """Begin the next step."""
        self._steps += 1
        self._write("")
        self._write(self._paint(_BOLD, f"{self._steps}. {text}"))

    def say(self, who: str, text: str) -> None:
        """Give a line that somebody printed or did."""
        painted = _PATTERN.sub(lambda found: self._paint(_WORDS[found[0]], found[0]), text)
        self._write(f"   {self._paint(_BLUE, f'{who:>8}')} {self._paint(_DIM, '|')} {painted}")

    def check(self, text: str, *, holds: bool) -> bool:
        """Tell whether what was seen is what it should be."""
        mark = self._paint(_GREEN, "✓") if holds else self._paint(_RED, "✗ NOT SO:")
        self._write(f"   {mark} {text}")
        self.failures += not holds
        return holds

    def end(self) -> int:
        """Give the verdict. Returns the exit status."""
        self._write("")
        if self.failures:
            self._write(
                self._paint(_RED, f"{self.failures} of what was seen is not as it should be")
            )
            return 1
        self._write(self._paint(_GREEN, "All of this is as it should be."))
        return 0

    def _paint(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour else text

    def _write(self, text: str) -> None:
        print(text, file=self._stream, flush=True)
