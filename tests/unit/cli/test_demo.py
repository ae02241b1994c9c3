"""``ipsec-aio demo`` on the memory backend, and the transcript that it prints."""

from __future__ import annotations

import io
import re

import pytest

from ipsec_aio.__main__ import main
from ipsec_aio.backends.memory import MemoryBackend
from ipsec_aio.cli.transcript import Transcript, wants_colour


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)


def test_it_shows_protected_and_clear_and_says_that_all_is_well(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["demo"]) == 0
    shown = capsys.readouterr().out
    assert "a datagram from alice: PROTECTED, EXACT, by esp/transport spi 0x" in shown
    assert "a connection from alice: PROTECTED, EXACT" in shown
    assert "a datagram from mallory: CLEAR" in shown
    assert "a connection from mallory: CLEAR" in shown
    assert "UNKNOWN: events were lost" in shown
    assert "NOT SO" not in shown
    assert "\x1b" not in shown


def test_it_fails_where_what_is_seen_is_not_what_it_should_be(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemoryBackend, "restore_stamp", MemoryBackend.lose_stamp)
    assert main(["demo"]) == 1
    shown = capsys.readouterr().out
    assert "✗ NOT SO: alice's datagram is protected" in shown
    assert re.search(r"\d+ of what was seen is not as it should be", shown)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_are_for_terminals_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert wants_colour(Terminal())
    assert not wants_colour(io.StringIO())
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert wants_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colour(Terminal())


def test_a_transcript_in_colour_reads_the_same() -> None:
    texts: list[str] = []
    for stream in (Terminal(), io.StringIO()):
        script = Transcript(stream)
        script.title("a title")
        script.step("a step")
        script.say("bob", "PROTECTED and CLEAR")
        assert script.check("it holds", holds=True)
        assert not script.check("it does not", holds=False)
        assert script.end() == 1
        texts.append(stream.getvalue())
    coloured, plain = texts
    assert "\x1b[32mPROTECTED\x1b[0m" in coloured
    assert re.sub(r"\x1b\[\d+m", "", coloured) == plain
