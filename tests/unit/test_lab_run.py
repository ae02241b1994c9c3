"""``tests/lab/run.py``, with shell scripts in the places of the virtual machine and of unshare."""

from __future__ import annotations

import importlib.util
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RUN = Path(__file__).parents[1] / "lab/run.py"

MACHINE = """#!/bin/sh
for word in "$@"; do
    case $word in --qemu-opts=*) run=${word##*path=}; run=${run%%,*} ;; esac
done
echo "Linux version" >&2
"""
"""The beginning of what is run as vng: it finds the directory that it shares with run.py."""
GUEST = MACHINE + (
    'touch "$run/started"; sh "$run/command" >"$run/output" 2>&1; echo $? >"$run/exit"; sleep 60\n'
)
UNSHARE = """#!/bin/sh
for inside; do :; done
exec sh -c "$inside"
"""


class Lab:
    """A project of its own, in which run.py's ``main`` is called."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        spec = importlib.util.spec_from_file_location("lab_run", RUN)
        assert spec is not None
        assert spec.loader is not None
        self.module: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self.path = path
        self._monkeypatch = monkeypatch
        for name, value in (
            ("PROJECT", path),
            ("LAB", path / ".lab"),
            ("UNPACKED", path / ".lab/root"),
        ):
            monkeypatch.setattr(self.module, name, value)
        kernel = path / ".lab/root/boot/vmlinuz-6.1"
        kernel.parent.mkdir(parents=True)
        kernel.touch()
        monkeypatch.setenv("PATH", f"{path}/bin:{os.environ['PATH']}")
        for name in ("CI", "FORCE_COLOR", "NO_COLOR"):
            monkeypatch.delenv(name, raising=False)

    def program(self, name: str, text: str) -> None:
        """Put a script into the project."""
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)

    def run(self, where: str, *words: str) -> int:
        """Call ``main`` with the words of a command line."""
        self._monkeypatch.setenv("LAB", where)
        self._monkeypatch.setattr(sys, "argv", ["run.py", *words])
        code: int = self.module.main()
        assert not list((self.path / ".lab").glob("run-*")), "the run's directory was left"
        return code


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    return Lab(tmp_path, monkeypatch)


@pytest.fixture
def machine(lab: Lab) -> Callable[[str], None]:
    """Says what the virtual machine does."""
    return lambda text: lab.program(".venv/bin/vng", text)


# The machine


@pytest.mark.parametrize("code", [0, 3])
def test_the_command_s_output_and_exit_code_are_ours(
    lab: Lab, machine: Any, capfdbinary: pytest.CaptureFixture[bytes], code: int
) -> None:
    machine(GUEST)
    assert lab.run("vm", "--", "sh", "-c", f'echo "it\'s $(pwd)"; exit {code}') == code
    shown = capfdbinary.readouterr()
    assert shown.out == f"it's {lab.path}\n".encode()
    assert b"booting vmlinuz-6.1" in shown.err
    assert b"lab: up after 0 s" in shown.err


def test_a_machine_that_ends_without_a_result(
    lab: Lab, machine: Any, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    machine(MACHINE + 'echo half >"$run/output"; echo "Kernel panic" >&2\n')
    assert lab.run("vm", "true") == lab.module.FAILED
    shown = capfdbinary.readouterr()
    assert shown.out == b"half\n"
    assert b"ended without a result\nlab: its last words:\nlab: Linux version\n" in shown.err
    assert shown.err.endswith(b"lab: Kernel panic\n")


def test_a_command_that_takes_too_long_is_stopped_with_its_machine(
    lab: Lab, machine: Any, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    machine(GUEST)
    os.mkfifo(lab.path / "held")
    with open(os.open(lab.path / "held", os.O_RDONLY | os.O_NONBLOCK), "rb") as held:
        words = ["sh", "-c", "exec 3>held; echo begun; exec sleep 600"]
        assert lab.run("vm", "--limit", "1", *words) == lab.module.FAILED
        os.set_blocking(held.fileno(), True)
        assert held.read() == b"", "its end comes when nobody is left who could write"
    shown = capfdbinary.readouterr()
    assert shown.out == b"begun\n"
    assert b"lab: stopped: not done after 1 s\n" in shown.err


def test_without_a_kernel_or_virtme_ng_it_says_what_to_type(
    lab: Lab, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert lab.run("vm", "true") == lab.module.FAILED
    assert b"`make lab` fetches both" in capfdbinary.readouterr().err


def test_an_interrupt_ends_it(lab: Lab, machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    machine(GUEST)
    monkeypatch.setattr(lab.module, "follow", interrupted)
    assert lab.run("vm", "true") == 130


# Several machines


class Spread:
    """A project that has its own run.py, which is run as a program, in two machines.

    The command of each part is a shell script.
    """

    def __init__(self, lab: Lab, machine: Any) -> None:
        machine(GUEST)
        lab.program("tests/lab/run.py", RUN.read_text())
        self.path = lab.path

    def start(self, script: str) -> subprocess.Popen[bytes]:
        program = self.path / "tests/lab/run.py"
        return subprocess.Popen(
            [sys.executable, str(program), "--spread", "--", "sh", "-c", script],
            env={**os.environ, "LAB": "vm", "LAB_MACHINES": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )


@pytest.fixture
def spread(lab: Lab, machine: Any) -> Spread:
    return Spread(lab, machine)


def test_each_machine_does_its_part(spread: Spread) -> None:
    with spread.start('echo "one of $LAB_PART"; printf half; exit ${LAB_PART%/2}') as running:
        out, err = running.communicate()
    assert running.returncode == 2, "the worst counts"
    lines = [line.split(" | ") for line in out.decode().splitlines()]
    for part in ("1/2", "2/2"):
        assert [text for name, text in lines if name == part] == [f"one of {part}", "half"]
        assert f"lab {part}: booting vmlinuz-6.1" in err.decode()


def test_of_several_lines_come_whole(spread: Spread) -> None:
    os.mkfifo(spread.path / "1")
    os.mkfifo(spread.path / "2")
    script = 'printf "begun, "; echo >${LAB_PART%/2}; read -r _ <${LAB_PART%/2}; echo done'
    with spread.start(script) as running:
        assert running.stdout is not None
        for part in ("1", "2"):
            (spread.path / part).read_text()
        (spread.path / "2").write_text("go\n")
        assert running.stdout.readline() == b"2/2 | begun, done\n"
        (spread.path / "1").write_text("go\n")
        assert running.stdout.readline() == b"1/2 | begun, done\n"
    assert running.returncode == 0


def test_an_interrupt_ends_all_of_them(spread: Spread) -> None:
    os.mkfifo(spread.path / "held")
    with open(os.open(spread.path / "held", os.O_RDONLY | os.O_NONBLOCK), "rb") as held:
        with spread.start("exec 3>held; echo begun; exec sleep 600") as running:
            assert running.stdout is not None
            assert {running.stdout.readline() for _ in range(2)} == {
                b"1/2 | begun\n",
                b"2/2 | begun\n",
            }
            running.send_signal(signal.SIGINT)
            _, err = running.communicate()
        os.set_blocking(held.fileno(), True)
        assert held.read() == b"", "its end comes when nobody is left who could write"
    assert running.returncode == 130
    assert err.decode().count("interrupted") == 2
    assert not list((spread.path / ".lab").glob("run-*"))


# Following it


class Time:
    """A clock that goes only while somebody sleeps."""

    def __init__(self, *events: tuple[float, Callable[[], object]]) -> None:
        self._now = 1000.0
        self._events = sorted(events, key=lambda event: event[0])

    def monotonic(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds
        while self._events and self._events[0][0] <= self._now - 1000.0:
            self._events.pop(0)[1]()


class Machine:
    """A process that ends when it is told to."""

    code: int | None = None

    def poll(self) -> int | None:
        return self.code

    def end(self) -> None:
        self.code = 1


def follow(lab: Lab, machine: Machine, limit: float, *events: tuple[float, Any]) -> str:
    lab.module.time = Time(*events)
    (lab.path / "output").touch()
    with (lab.path / "output").open("rb") as output:
        said: str = lab.module.follow(machine, lab.path, output, limit)
    return said


def test_it_tells_that_the_machine_boots(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    started, done = lab.path / "started", lab.path / "exit"
    told = follow(lab, Machine(), 300, (25, started.touch), (40, lambda: done.write_bytes(b"0\n")))
    assert told == ""
    assert capsys.readouterr().err.splitlines() == [
        "lab: booting … 10 s",
        "lab: booting … 20 s",
        "lab: up after 25 s",
    ]


def test_on_a_terminal_one_line_tells_it(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    started = lab.path / "started"
    machine = Machine()
    assert follow(lab, machine, 300, (2, started.touch), (3, machine.end)) == ""
    shown = terminal.getvalue()
    assert shown.startswith("\r\x1b[Klab: booting … 0 s\r\x1b[Klab: booting … 0 s")
    assert shown.endswith("\r\x1b[Klab: up after 2 s\n")
    assert shown.count("\n") == 1


def test_output_comes_while_the_command_runs(
    lab: Lab, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    shown: list[bytes] = []
    output = lab.path / "output"

    def write(text: bytes) -> Callable[[], None]:
        def append() -> None:
            shown.append(capfdbinary.readouterr().out)
            with output.open("ab") as file:
                file.write(text)

        return append

    machine = Machine()
    events = ((1, (lab.path / "started").touch), (2, write(b"one\n")), (3, write(b"two\n")))
    assert follow(lab, machine, 300, *events, (4, write(b"")), (5, machine.end)) == ""
    assert shown == [b"", b"one\n", b"two\n"]


def test_a_machine_that_does_not_come_up(lab: Lab) -> None:
    assert "did not come up within 180 s" in follow(lab, Machine(), 1000)


def test_a_half_written_exit_code_is_not_read(lab: Lab) -> None:
    (lab.path / "started").touch()
    (lab.path / "exit").write_bytes(b"1")
    assert follow(lab, Machine(), 5) == "stopped: not done after 5 s"


# This machine's own kernel


@pytest.fixture
def own(lab: Lab) -> Lab:
    """A machine whose kernel has ESP."""
    lab.program("bin/unshare", UNSHARE)
    for name in ("ip", "mount"):
        lab.program(f"bin/{name}", "#!/bin/sh\n")
    return lab


def test_where_the_kernel_will_do_the_command_runs_here(
    own: Lab, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert own.run("", "--native") == 0
    assert own.run("", "--spread", "sh", "-c", "echo here $LAB_PART; exit 4") == 4
    shown = capfd.readouterr()
    assert "this kernel has ESP" in shown.err
    assert shown.out == "here\n"


def test_where_it_will_not_a_machine_boots(
    own: Lab, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own.program(".venv/bin/vng", GUEST)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert own.run("", "--native") == 1
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    own.program("bin/ip", "#!/bin/sh\nexit 2\n")
    assert own.run("", "--native") == 1
    assert own.run("", "true") == 0
    assert "booting" in capfd.readouterr().err


def test_who_asks_is_obeyed(own: Lab) -> None:
    assert own.run("native", "--native") == 0
    assert own.run("vm", "--native") == 1


def test_a_command_here_that_takes_too_long_is_stopped(
    own: Lab, capfd: pytest.CaptureFixture[str]
) -> None:
    assert own.run("native", "--limit", "0.2", "sleep", "600") == own.module.FAILED
    assert "stopped: not done after 0 s" in capfd.readouterr().err


# What is run


def told(lab: Lab, name: str) -> str:
    """What the command finds in its environment."""
    text = lab.module.script(["printenv", name])
    done = subprocess.run(
        ["env", "-i", "sh", "-c", text], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def test_it_is_coloured_where_we_write_to_a_terminal(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert told(lab, "FORCE_COLOR") == ""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert told(lab, "FORCE_COLOR") == "1"
    monkeypatch.setenv("NO_COLOR", "1")
    assert told(lab, "FORCE_COLOR") == ""
    assert told(lab, "NO_COLOR") == "1"


def test_what_decides_about_output_is_kept(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "yes, 'please'")
    monkeypatch.setenv("CI", "true")
    monkeypatch.setenv("SECRET", "x")
    assert [told(lab, name) for name in ("FORCE_COLOR", "CI", "SECRET")] == [
        "yes, 'please'",
        "true",
        "",
    ]


def test_it_knows_when_we_began(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab.module.time, "time", lambda: 1700000000.4)
    assert told(lab, "LAB_BEGAN") == "1700000000"
