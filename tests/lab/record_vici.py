"""Record what real charons say over VICI; run as root in a guest whose kernel has ESP.

``record_vici.py ROOT OUT``: ROOT holds strongSwan unpacked with ``dpkg -x`` (strongswan-charon,
strongswan-libcharon, libstrongswan, libstrongswan-standard-plugins, libcharon-extra-plugins), OUT
receives ``initiator.json`` and ``responder.json``, the test data of ``tests/unit/wire``. It binds
ROOT's plugins over ``/usr/lib/ipsec``, so let it run where that is thrown away::

    vng --disable-kvm --verbose --run VMLINUZ --memory 1G --rwdir=OUT \
        --exec '.venv/bin/python tests/lab/record_vici.py ROOT OUT'

A recording is a list of exchanges: the step that it belongs to, the connection ("commands" or
"events"), and the packets sent and received on it, each with its length header, in hex.
Credentials are loaded before the recording starts.
"""

from __future__ import annotations

import datetime
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ipsec_aio.wire.vici import PacketType, decode_packet, encode_packet

PLUGINS = (
    "random nonce aes sha1 sha2 md5 hmac kdf pem pkcs1 pkcs8 x509 pubkey openssl gcm revocation "
    "kernel-netlink socket-default vici updown eap-identity eap-md5"
)
EVENTS = ("ike-updown", "ike-rekey", "ike-update", "child-updown", "child-rekey")
INITIATOR, MOVED, RESPONDER = "192.0.2.1", "192.0.2.3", "192.0.2.2"


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def say(text: str) -> None:
    print(f"@@ {time.monotonic():.1f} {text}", flush=True)


class Connection:
    """One VICI connection, blocking."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(os.fspath(path))
        self.socket.settimeout(60)

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self) -> bytes:
        header = self._exactly(4)
        return header + self._exactly(int.from_bytes(header))

    def quiet(self, seconds: float) -> bool:
        return not select.select([self.socket], [], [], seconds)[0]

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.socket.recv(count - len(data))
            if not piece:
                raise EOFError("charon closed the connection")
            data += piece
        return data


class Host:
    """A charon in its own network namespace, and what it said."""

    def __init__(self, name: str, directory: Path, root: Path) -> None:
        self.name, self.exchanges = name, []
        self.directory = directory / name
        self.directory.mkdir()
        self.socket = self.directory / "vici"
        (self.directory / "strongswan.conf").write_text(
            f"""charon {{
  load = {PLUGINS}
  filelog {{ log {{ path = {self.directory}/log
    default = 1
    ike = 2
    cfg = 2 }} }}
  plugins {{ vici {{ socket = unix://{self.socket} }} }}
}}
"""
        )
        charon = "mount -t tmpfs tmpfs /var/run && exec /usr/lib/ipsec/charon"
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", name, "unshare", "-m", "sh", "-c", charon],
            env={
                **os.environ,
                "STRONGSWAN_CONF": f"{self.directory}/strongswan.conf",
                "LD_LIBRARY_PATH": f"{root}/usr/lib/ipsec",
            },
        )
        deadline = time.monotonic() + 60
        while not self.socket.exists():
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise RuntimeError((self.directory / "log").read_text())
            time.sleep(0.2)
        self.commands = Connection(self.socket)
        self.events = Connection(self.socket)

    def load(self, command: str, message: dict) -> None:
        """Configure, unrecorded."""
        self.commands.send(encode_packet(PacketType.CMD_REQUEST, command, message))
        answer = decode_packet(self.commands.receive()[4:])
        if answer.message.get("success") != b"yes":
            raise RuntimeError(f"{self.name}: {command}: {answer}")

    def note(self, step: str, connection: str, sent: list[bytes], received: list[bytes]) -> None:
        if sent or received:
            self.exchanges.append(
                {
                    "step": step,
                    "connection": connection,
                    "sent": [packet.hex() for packet in sent],
                    "received": [packet.hex() for packet in received],
                }
            )

    def register(self, *names: str) -> None:
        sent, received = [], []
        for name in names:
            sent.append(encode_packet(PacketType.EVENT_REGISTER, name))
            self.events.send(sent[-1])
            received.append(self.events.receive())
        self.note("register", "events", sent, received)

    def command(self, step: str, command: str, message: dict | None = None, stream: str = ""):
        """Send a command; with ``stream``, register for that event around it."""
        sent, received = [], []

        def exchange(packet: bytes) -> None:
            sent.append(packet)
            self.commands.send(packet)
            while True:
                received.append(self.commands.receive())
                if received[-1][4] != PacketType.EVENT:
                    return

        if stream:
            exchange(encode_packet(PacketType.EVENT_REGISTER, stream))
        exchange(encode_packet(PacketType.CMD_REQUEST, command, message))
        answer = decode_packet(received[-1][4:])
        if stream:
            exchange(encode_packet(PacketType.EVENT_UNREGISTER, stream))
        self.note(step, "commands", sent, received)
        return answer

    def hear(self, step: str, quiet: float = 1.0) -> None:
        """Note the events that came, until none comes for some seconds."""
        received = []
        while not self.events.quiet(quiet):
            received.append(self.events.receive())
            packet = decode_packet(received[-1][4:])
            say(f"{self.name}: {step}: {packet.name} {packet.message}")
        self.note(step, "events", [], received)


def name(*rdns: list[tuple[x509.ObjectIdentifier, str]]) -> x509.Name:
    return x509.Name(
        [
            x509.RelativeDistinguishedName([x509.NameAttribute(oid, value) for oid, value in rdn])
            for rdn in rdns
        ]
    )


LAB = ([(NameOID.COUNTRY_NAME, "CH")], [(NameOID.ORGANIZATION_NAME, "Lab")])
SUBJECTS = {
    "alice": name(*LAB, [(NameOID.COMMON_NAME, "alice.example.org")]),
    # One value that looks like two attributes, two attributes in one RDN, a name beyond ASCII.
    "comma": name(*LAB, [(NameOID.COMMON_NAME, "mallory, OU=Admins")]),
    "multi": name(
        *LAB, [(NameOID.COMMON_NAME, "multi"), (NameOID.ORGANIZATIONAL_UNIT_NAME, "Admins")]
    ),
    "zoe": name(*LAB, [(NameOID.COMMON_NAME, "Zoë")]),
}


class Authority:
    """A CA that signs anything."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = name(*LAB, [(NameOID.COMMON_NAME, "Lab CA")])
        self.certificate = self._sign(self.name, self.key.public_key(), ca=True)

    def _sign(self, subject, key, dns=(), ca=False) -> bytes:
        now = datetime.datetime(2026, 1, 1)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now)
            .not_valid_after(now + datetime.timedelta(days=36500))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if dns:
            names = [x509.DNSName(each) for each in dns]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(self.key, hashes.SHA256())
        return certificate.public_bytes(serialization.Encoding.DER)

    def issue(self, subject, *dns: str) -> tuple[bytes, bytes]:
        key = ec.generate_private_key(ec.SECP256R1())
        return self._sign(subject, key.public_key(), dns), key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )


def connection(local: dict, remote: dict, mine: str, theirs: str, child: dict, **more) -> dict:
    return {
        "version": 2,
        "local_addrs": [mine] if mine == RESPONDER else ["%any"],
        "remote_addrs": [theirs] if theirs == RESPONDER else ["%any"],
        "proposals": ["aes128-sha256-ecp256"],
        "local": local,
        "remote": remote,
        "children": {"net": {"esp_proposals": ["aes128gcm16"], **child}},
        **more,
    }


TRANSPORT = {"mode": "transport"}
# Marks and interface ids of the responder's own: they are not negotiated.
MARKED = {**TRANSPORT, "if_id_in": 7, "if_id_out": 8, "mark_in": "5/255", "set_mark_in": "0x2a"}


def configure(a: Host, b: Host) -> None:
    authority = Authority()
    server, server_key = authority.issue(
        name(*LAB, [(NameOID.COMMON_NAME, "server.example.org")]),
        "server.example.org",
        "eap.example.org",
    )
    for host in (a, b):
        host.load("load-cert", {"type": "X509", "flag": "CA", "data": authority.certificate})
        host.load(
            "load-shared",
            {"type": "IKE", "data": "secret", "owners": ["b.psk.example.org", "a@example.org"]},
        )
        host.load("load-shared", {"type": "EAP", "data": "secret", "owners": ["carol@example.org"]})
    b.load("load-key", {"type": "ECDSA", "data": server_key})
    b.load("load-pool", {"pool": {"addrs": "10.9.0.0/24"}})

    psk = {"auth": "psk", "id": "a@example.org"}, {"auth": "psk", "id": "b.psk.example.org"}
    a.load("load-conn", {"psk": connection(*psk, INITIATOR, RESPONDER, TRANSPORT)})
    b.load("load-conn", {"psk": connection(*psk[::-1], RESPONDER, INITIATOR, TRANSPORT)})

    gate = {"auth": "pubkey", "certs": [server], "id": "server.example.org"}
    remote = {"auth": "pubkey", "cacerts": [authority.certificate]}
    b.load("load-conn", {"x509": connection(gate, remote, RESPONDER, INITIATOR, MARKED)})
    for who, subject in SUBJECTS.items():
        certificate, key = authority.issue(subject)
        a.load("load-key", {"type": "ECDSA", "data": key})
        local = {"auth": "pubkey", "certs": [certificate]}
        remote = {"auth": "pubkey", "id": "server.example.org"}
        a.load("load-conn", {who: connection(local, remote, INITIATOR, RESPONDER, TRANSPORT)})

    gate = {"auth": "pubkey", "certs": [server], "id": "eap.example.org"}
    remote = {"auth": "eap-md5", "eap_id": "%any"}
    tunnel = {"mode": "tunnel", "local_ts": ["10.8.0.0/24"]}
    b.load(
        "load-conn",
        {"eap": connection(gate, remote, RESPONDER, INITIATOR, tunnel, pools=["pool"])},
    )
    local = {"auth": "eap-md5", "id": "road@example.org", "eap_id": "carol@example.org"}
    remote = {"auth": "pubkey", "id": "eap.example.org"}
    tunnel = {"mode": "tunnel", "remote_ts": ["10.8.0.0/24"]}
    a.load(
        "load-conn",
        {"eap": connection(local, remote, INITIATOR, RESPONDER, tunnel, vips=["0.0.0.0"])},
    )


def record(a: Host, b: Host) -> None:
    both = (a, b)

    def hear(step: str) -> None:
        for host in both:
            host.hear(step)

    def sas(step: str) -> None:
        for host in both:
            host.command(step, "list-sas", stream="list-sa")

    def do(step: str, command: str, message: dict, host: Host = a) -> None:
        say(f"{step}: {host.command(step, command, message).message}")
        hear(step)

    for host in both:
        host.register(*EVENTS)
        host.command("version", "version")
        host.command("stats", "stats")
        host.command("conns", "list-conns", stream="list-conn")
        host.command("authorities", "list-authorities", stream="list-authority")
        host.command("unknown command", "no-such-command")
        host.command("unknown event", "version", stream="no-such-event")
    sas("nothing yet")

    do("psk up", "initiate", {"child": "net", "ike": "psk"})
    sas("psk up")
    do("psk child rekeyed", "rekey", {"child": "net", "ike": "psk"})
    sas("psk child rekeyed")
    time.sleep(7)
    sas("psk child rekeyed and gone")
    do("psk ike rekeyed", "rekey", {"ike": "psk"})
    sas("psk ike rekeyed")
    # Without it, the first address takes the second one of its subnet away with it.
    promote = "net.ipv4.conf.all.promote_secondaries=1"
    run("ip", "netns", "exec", a.name, "sysctl", "-q", "-w", promote)
    run("ip", "-n", a.name, "addr", "add", f"{MOVED}/24", "dev", "eth0")
    run("ip", "-n", a.name, "addr", "del", f"{INITIATOR}/24", "dev", "eth0")
    for host in both:
        host.hear("psk moved", 4)
    sas("psk moved")
    do("psk down", "terminate", {"ike": "psk"})
    sas("psk down")

    for who in SUBJECTS:
        do(f"{who} up", "initiate", {"child": "net", "ike": who})
    sas("x509 up")
    for host in both:
        host.command("certs", "list-certs", stream="list-cert")
    do("alice child rekeyed by the responder", "rekey", {"child": "net"}, b)
    sas("alice child rekeyed by the responder")
    for who in SUBJECTS:
        do(f"{who} down", "terminate", {"ike": who})

    do("eap up", "initiate", {"child": "net", "ike": "eap"})
    sas("eap up")
    do("eap child down", "terminate", {"child": "net"}, b)
    sas("eap child down")
    do("eap down", "terminate", {"ike": "eap"}, b)
    sas("all down")


def main(root: str, out: str) -> None:
    Path("/usr/lib/ipsec").mkdir(parents=True, exist_ok=True)
    run("mount", "--bind", f"{root}/usr/lib/ipsec", "/usr/lib/ipsec")
    directory = Path(tempfile.mkdtemp())
    for each in ("initiator", "responder"):
        run("ip", "netns", "add", each)
        run("ip", "-n", each, "link", "set", "lo", "up")
    veth = ["type", "veth", "peer", "name", "eth0", "netns", "responder"]
    run("ip", "-n", "initiator", "link", "add", "eth0", *veth)
    for each, address in (("initiator", INITIATOR), ("responder", RESPONDER)):
        run("ip", "-n", each, "addr", "add", f"{address}/24", "dev", "eth0")
        run("ip", "-n", each, "link", "set", "eth0", "up")
    hosts = [Host(each, directory, Path(root)) for each in ("initiator", "responder")]
    say("charons are up")
    try:
        configure(*hosts)
        record(*hosts)
    finally:
        for host in hosts:
            Path(out, f"{host.name}.json").write_text(json.dumps(host.exchanges, indent=1) + "\n")
            Path(out, f"{host.name}.log").write_text((host.directory / "log").read_text())
            host.process.terminate()
    say("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
