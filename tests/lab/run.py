"""Run a command as root beside a kernel that has ESP: ``run.py [--limit SECONDS] COMMAND …``.

Where this kernel has ESP and the user is root, the command runs here, in network, mount and
process namespaces of its own. Else Debian's kernel boots in a virtual machine whose root is this
machine's files; what is written there is thrown away. ``LAB=vm`` or ``LAB=native`` decides by hand.

The command's output comes live, its exit code is ours; 125 is a failure of the lab itself.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import BinaryIO

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent
LAB = PROJECT / ".lab"
UNPACKED = LAB / "root"
FAILED = 125
MACHINES = 4  # at once, at most: each takes 2 GB of memory
KEPT = ("CI", "COLUMNS", "FORCE_COLOR", "HYPOTHESIS_PROFILE", "LAB_PART", "NO_COLOR", "TERM")
TRY_ESP = (
    "ip xfrm state add src 192.0.2.1 dst 192.0.2.2 proto esp spi 0x100 mode transport"
    " aead 'rfc4106(gcm(aes))' 0x000102030405060708090a0b0c0d0e0f10111213 128"
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--limit", type=float, default=1800, help="seconds until it is stopped")
    parser.add_argument("--spread", action="store_true", help="run a part on each processor")
    parser.add_argument("--native", action="store_true", help="only say whether no VM is needed")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    if arguments.native:
        return 0 if native() else 1
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    here = native()
    machines = int(os.environ.get("LAB_MACHINES") or min(os.cpu_count() or 1, MACHINES))
    if arguments.spread and machines > 1 and not here:
        return run_parts(machines, ["--limit", f"{arguments.limit:g}", "--", *command])
    LAB.mkdir(exist_ok=True)
    run = Path(tempfile.mkdtemp(prefix="run-", dir=LAB))
    try:
        (run / "command").write_text(script(command))
        if here:
            return run_native(run, arguments.limit)
        return run_machine(run, arguments.limit)
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    finally:
        shutil.rmtree(run, ignore_errors=True)


def native() -> bool:
    """Whether this machine's own kernel will do: it has ESP, and we are root."""
    wish = os.environ.get("LAB", "")
    if wish in ("vm", "native"):
        return wish == "native"
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    trial = ["unshare", "-n", "sh", "-c", TRY_ESP]
    return subprocess.run(trial, capture_output=True, check=False).returncode == 0


def script(command: list[str]) -> str:
    """The shell script that runs the command where the unpacked packages can be found.

    ``LAB_BEGAN`` tells it when we were asked, in seconds since 1970.
    """
    libraries = [str(p) for p in (UNPACKED / "usr/lib", UNPACKED / "lib")]
    triplets = [f"{lib}/x86_64-linux-gnu" for lib in libraries]
    binaries = [str(UNPACKED / p) for p in ("usr/sbin", "usr/bin", "sbin")]
    keep = {name: os.environ[name] for name in KEPT if name in os.environ}
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        keep.setdefault("FORCE_COLOR", "1")  # a machine writes to a file
    keep["LAB_BEGAN"] = f"{time.time():.0f}"
    keep["HOME"] = "/root"
    keep["PATH"] = ":".join(
        [
            f"{PROJECT}/.venv/bin",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            *binaries,
        ]
    )
    keep["LAB_LIBRARIES"] = ":".join(triplets)
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in keep.items())
    return f"{exports}cd {shlex.quote(str(PROJECT))}\nexec {shlex.join(command)}\n"


def run_parts(machines: int, words: list[str]) -> int:
    """Have this program run each part, all at once. The exit code is the greatest."""
    parts = [
        subprocess.Popen(
            [sys.executable, __file__, *words],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "LAB": "vm", "LAB_PART": f"{part}/{machines}"},
            start_new_session=True,
        )
        for part in range(1, machines + 1)
    ]
    try:
        return max([part.wait() for part in parts])
    except KeyboardInterrupt:
        for part in parts:
            part.send_signal(signal.SIGINT)
        return max([part.wait() for part in parts])


def run_native(run: Path, limit: float) -> int:
    say("this kernel has ESP: running here, in namespaces of its own")
    words = [
        "unshare",
        "--net",
        "--mount",
        "--pid",
        "--fork",
        "--mount-proc",
        "--propagation",
        "private",
    ]
    words_inside = ["mount -t tmpfs tmpfs /run", "ip link set lo up"]
    if not Path("/usr/lib/ipsec").exists():  # strongSwan looks for its plugins there only
        lower = f"lowerdir={UNPACKED / 'usr/lib'}:/usr/lib"
        words_inside.append(f"mount -t overlay -o {shlex.quote(lower)} lab /usr/lib")
    inside = " && ".join([*words_inside, "exec sh " + shlex.quote(str(run / "command"))])
    # The run's files are under the project, so the fresh /run hides nothing that is needed.
    child = subprocess.Popen([*words, "sh", "-c", inside], stdin=subprocess.DEVNULL)
    try:
        return child.wait(limit)
    except subprocess.TimeoutExpired:
        say(f"stopped: not done after {limit:.0f} s")
        return FAILED
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()


def run_machine(run: Path, limit: float) -> int:
    kernels = sorted((UNPACKED / "boot").glob("vmlinuz-*"))
    vng = PROJECT / ".venv/bin/vng"
    if not kernels or not vng.exists():
        say("no kernel or no virtme-ng here: `make lab` fetches both")
        return FAILED
    share = "-virtfs local,path={},mount_tag={},security_model=none,multidevs=remap{}"
    shares = " ".join(
        [share.format("/", "labroot", ",readonly=on"), share.format(run, "labrun", "")]
    )
    words = [
        str(vng),
        *("--disable-kvm", "--verbose", "--user", "root"),
        *("--run", str(kernels[-1])),
        *("--memory", os.environ.get("LAB_MEMORY", "2G")),
        *("--cpus", os.environ.get("LAB_CPUS", "1")),
        f"--qemu-opts={shares}",
        *("--exec", f"sh {shlex.quote(str(HERE / 'guest.sh'))}"),
    ]
    environment = {**os.environ, "PATH": f"{vng.parent}:{os.environ.get('PATH', '')}"}
    console = run / "console"
    (run / "output").touch()
    say(f"booting {kernels[-1].name} in a virtual machine")
    with console.open("wb") as log, (run / "output").open("rb") as output:
        machine = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=PROJECT,
            env=environment,
            start_new_session=True,
        )
        try:
            problem = follow(machine, run, output, limit)
        finally:
            if machine.poll() is None:
                os.killpg(machine.pid, signal.SIGKILL)
            machine.wait()
        copy(output, whole=True)
    code = (run / "exit").read_text().strip() if (run / "exit").exists() else ""
    if code:
        return int(code)
    lines = console.read_bytes().decode(errors="replace").splitlines()
    say(problem or "the virtual machine ended without a result", "its last words:", *lines[-20:])
    return FAILED


def follow(machine: subprocess.Popen[bytes], run: Path, output: BinaryIO, limit: float) -> str:
    """Copy the output as it comes. Returns what went wrong, if the run was cut short."""
    begin = time.monotonic()
    live = sys.stderr.isatty() and "LAB_PART" not in os.environ
    started = False
    shown = 0.0
    while machine.poll() is None:
        elapsed = time.monotonic() - begin
        if not started:
            started = (run / "started").exists()
            if started:
                say(f"up after {elapsed:.0f} s", end="\n", live=live)
            elif elapsed > 180:
                return "the virtual machine did not come up within 180 s"
            elif live or elapsed - shown > 10:
                shown = elapsed
                say(f"booting … {elapsed:.0f} s", end="" if live else "\n", live=live)
        copy(output)
        if elapsed > limit:
            return f"stopped: not done after {limit:.0f} s"
        if (run / "exit").exists() and (run / "exit").read_bytes().endswith(b"\n"):
            return ""
        time.sleep(0.1)
    return ""


def copy(output: BinaryIO, *, whole: bool = False) -> None:
    """Copy what came; where others write, too, line by line, and with our part before each."""
    text, part = output.read(), os.environ.get("LAB_PART", "").encode()
    if part and not whole:
        end = text.rfind(b"\n") + 1
        output.seek(end - len(text), os.SEEK_CUR)
        text = text[:end]
    if part:
        text = b"".join(part + b" | " + line + b"\n" for line in text.splitlines())
    if text:
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()


def say(*lines: str, end: str = "\n", live: bool = False) -> None:
    """Tell progress on stderr; ``live`` rewrites the line."""
    sys.stdout.flush()
    label = " ".join(("lab", os.environ.get("LAB_PART", ""))).strip()
    print(
        ("\r\x1b[K" if live else "") + "\n".join(f"{label}: {line}" for line in lines),
        end=end,
        file=sys.stderr,
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
