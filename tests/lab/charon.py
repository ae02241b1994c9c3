"""strongSwan's daemons, one per host, keying them by IKEv2 with a shared secret::

    with Charon(bob) as ours, Charon(alice) as theirs:
        connect(ours, theirs)              # trap policies: the first packet starts IKE
        theirs.initiate()                  # … or do not wait for one

``load(conf({"connections": …, "secrets": …}))`` gives a daemon any other configuration. Each has
its own, its log, its credentials and its VICI socket in a directory of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from hosts import PATIENCE, Host, run

_PLUGINS = (
    "random nonce aes md5 sha1 sha2 hmac kdf pem pkcs1 x509 revocation pubkey openssl gcm"
    " kernel-netlink socket-default vici updown eap-identity eap-md5"
)
_DAEMON = """
charon {{
    load = {plugins}
    install_routes = no
    install_virtual_ip_on = lo
    retransmit_timeout = 2
    delete_rekeyed_delay = 1
    filelog {{
        log {{
            path = {directory}/log
            flush_line = yes
            ike_name = yes
        }}
    }}
    plugins {{
        vici {{
            socket = {uri}
        }}
    }}
}}
swanctl {{
    load = random openssl pem pkcs1 x509 pubkey
}}
"""
_CONNECTION = """
connections {{
    net {{
        version = 2
        mobike = no
        local_addrs = {local}
        remote_addrs = {remote}
        proposals = aes128gcm16-prfsha256-x25519
        local {{
            auth = psk
            id = {local_id}
        }}
        remote {{
            auth = psk
            id = {remote_id}
        }}
        children {{
            net {{
                mode = {mode}
                {selectors}
                esp_proposals = aes128gcm16
                start_action = trap
                {child}
            }}
        }}
    }}
}}
secrets {{
    ike-1 {{
        id-1 = {local_id}
        id-2 = {remote_id}
        secret = "a secret for the lab alone"
    }}
}}
"""

Settings = Mapping[str, "str | Sequence[str] | Settings"]


def conf(settings: Settings, indent: str = "") -> str:
    """Return sections and settings as text for strongSwan."""
    lines = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            lines.append(f"{indent}{name} {{\n{conf(value, indent + '    ')}{indent}}}\n")
        else:
            text = value if isinstance(value, str) else ", ".join(value)
            lines.append(f"{indent}{name} = {text}\n")
    return "".join(lines)


class Charon:
    """A daemon in a host's namespace; a context manager that starts and stops it."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.directory = Path(tempfile.mkdtemp(prefix=f"charon-{host.name}-"))
        self.socket = self.directory / "vici"
        self.uri = f"unix://{self.socket}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def identity(self) -> str:
        """The IKE identity of this host."""
        return f"{self.host.name}.example"

    @property
    def log(self) -> str:
        """What the daemon logged so far."""
        path = self.directory / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self) -> None:
        """Start it, and do not wait. Entering waits, and starts it where that was not done."""
        conf = self.directory / "strongswan.conf"
        conf.write_text(_DAEMON.format(plugins=_PLUGINS, directory=self.directory, uri=self.uri))
        environment = {
            **os.environ,
            "STRONGSWAN_CONF": str(conf),
            "LD_LIBRARY_PATH": os.environ.get("LAB_LIBRARIES", ""),
        }
        # The pid file has one fixed place: each daemon gets a /run of its own.
        alone = "mount -t tmpfs tmpfs /run && exec /usr/lib/ipsec/charon"
        with self.host:
            self._process = subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", alone],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def __enter__(self) -> Charon:
        if self._process is None:
            self.start()
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait(self) -> None:
        end = time.monotonic() + PATIENCE
        while True:
            with socket.socket(socket.AF_UNIX) as trial:
                try:
                    trial.connect(str(self.socket))
                except OSError:
                    assert self._process is not None
                    if self._process.poll() is not None or time.monotonic() > end:
                        raise RuntimeError(f"charon did not start:\n{self.log}") from None
                else:
                    return
            time.sleep(0.05)

    def kill(self) -> None:
        """Let it die at once, with all that it knows; the kernel keeps SAs and policies."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        shutil.rmtree(self.directory, ignore_errors=True)

    def load(self, configuration: str) -> None:
        """Load connections, secrets and what was put into the directories (swanctl.conf)."""
        (self.directory / "swanctl.conf").write_text(configuration)
        self.reload()

    def reload(self) -> None:
        """Load the same again, after a restart."""
        path = self.directory / "swanctl.conf"
        self.swanctl("--load-all", "--noprompt", "--file", str(path))

    def put(self, directory: str, name: str, data: bytes) -> None:
        """Put a file into one of swanctl's directories: ``x509``, ``x509ca``, ``private``, …"""
        path = self.directory / directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)

    def swanctl(self, command: str, *words: str) -> str:
        """Run swanctl on this daemon; returns what it prints, raises RuntimeError.

        Any thread can, for it is in no namespace.
        """
        places = (
            f"STRONGSWAN_CONF={self.directory / 'strongswan.conf'}",
            f"SWANCTL_DIR={self.directory}",
        )
        return run("env", *places, "swanctl", command, "--uri", self.uri, *words)

    def initiate(self, connection: str = "net") -> None:
        """Key the connection now. Raises RuntimeError where that fails."""
        words = ("--ike", connection, "--child", "net", "--timeout", str(int(PATIENCE)))
        try:
            self.swanctl("--initiate", *words)
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{self.log[-2000:]}") from None

    def rekey(self) -> None:
        """Replace the child SAs by new ones; the old are deleted soon after."""
        self.swanctl("--rekey", "--child", "net")

    def terminate(self, connection: str = "net") -> None:
        """Take everything down; the trap policies stay."""
        self.swanctl("--terminate", "--ike", connection)

    def forget(self) -> None:
        """Take down every IKE SA there is, whether the peer answers or not."""
        for number in re.findall(r"^\S+: #(\d+)", self.swanctl("--list-sas"), re.MULTILINE):
            with suppress(RuntimeError):  # it went by itself
                self.swanctl("--terminate", "--ike-id", number, "--force", "--timeout", "1")

    def spis(self) -> list[int]:
        """The SPIs of the living SAs into this host, as swanctl says, newest first."""
        text = self.swanctl("--list-sas")
        return [int(spi, 16) for spi in re.findall(r"in +([0-9a-f]{8})", text)]


def connect(
    one: Charon, two: Charon, *, mode: str = "transport", family: int = 4, child: str = ""
) -> None:
    """Give two daemons a connection ``net`` with each other, and trap policies for it.

    ``child`` is more for the child's section (``rekey_time = 5s``).
    """
    for ours, theirs in ((one, two), (two, one)):
        selectors = ""
        if mode == "tunnel":
            local, remote = (c.host.address(family, inner=True) for c in (ours, theirs))
            length = 128 if family == 6 else 32
            selectors = f"local_ts = {local}/{length}\n remote_ts = {remote}/{length}"
        ours.load(
            _CONNECTION.format(
                local=ours.host.address(family),
                remote=theirs.host.address(family),
                local_id=ours.identity,
                remote_id=theirs.identity,
                mode=mode,
                selectors=selectors,
                child=child,
            )
        )
