# ruff: noqa: E501  (commands are one line each)
"""Record what a real kernel says on NETLINK_XFRM, as test data for the decoder.

Run it as root beside a kernel with ESP; it makes and deletes its own network namespaces:

    python tests/lab/run.py -- python tests/unit/wire/record_xfrm.py > tests/unit/wire/data/xfrm.txt

The format, one block for each step: ``== name``, ``$ command``, ``< message in hex`` for each
message of the multicast groups (``D`` instead of ``<`` for those of a dump), ``| line`` for what
``ip xfrm monitor`` (or ``ip xfrm state`` beside a dump) made of it.
"""

from __future__ import annotations

import os
import platform
import select
import socket
import struct
import subprocess
import sys
import time

KEY = b"KEY-OF-THE-TESTS-NOT-A-SECRET-0123456789ABCDEFGHIJKLMNOPQRSTUVWX"
GROUPS = (1, 2, 3, 4, 7, 8)
SA4 = "src 192.0.2.1 dst 192.0.2.2"
SA6 = "src 2001:db8::1 dst 2001:db8::2"


def key(size: int) -> str:
    return "0x" + KEY[:size].hex()


GCM = f"aead 'rfc4106(gcm(aes))' {key(20)} 128"
CBC = f"auth-trunc 'hmac(sha256)' {key(32)} 128 enc 'cbc(aes)' {key(16)}"

STEPS: list[tuple[str, str] | tuple[str, str, float]] = [
    (
        "gcm transport",
        f"state add {SA4} proto esp spi 0x1001 reqid 7 mode transport {GCM} replay-window 32",
    ),
    (
        "gcm updated",
        f"state update {SA4} proto esp spi 0x1001 reqid 8 mode transport {GCM} replay-window 64",
    ),
    ("gcm deleted", "state delete dst 192.0.2.2 proto esp spi 0x1001"),
    (
        "cbc tunnel",
        f"state add {SA4} proto esp spi 0x1002 reqid 9 mode tunnel {CBC}"
        " sel src 10.1.0.0/16 dst 10.2.3.0/24 proto udp sport 53 dport 4242",
    ),
    (
        "sha1 default icv",
        f"state add {SA4} proto esp spi 0x1003 mode transport auth 'hmac(sha1)' {key(20)}"
        f" enc 'cbc(des3_ede)' {key(24)}",
    ),
    (
        "null encryption",
        f"state add {SA4} proto esp spi 0x1004 mode transport"
        f" auth-trunc 'hmac(sha256)' {key(32)} 128 enc 'ecb(cipher_null)' ''",
    ),
    (
        "ah",
        f"state add {SA4} proto ah spi 0x1005 mode transport auth-trunc 'hmac(sha256)' {key(32)} 128",
    ),
    ("ipcomp", f"state add {SA4} proto comp spi 0x1006 mode transport comp deflate"),
    ("beet", f"state add {SA4} proto esp spi 0x1007 mode beet {GCM} sel src 10.1.0.1 dst 10.2.0.1"),
    (
        "v6 tunnel esn",
        f"state add {SA6} proto esp spi 0x1008 reqid 1 mode tunnel {GCM}"
        " flag esn replay-window 256",
    ),
    ("v6 transport", f"state add {SA6} proto esp spi 0x1009 mode transport {CBC}"),
    ("mark", f"state add {SA4} proto esp spi 0x100a mode transport {GCM} mark 0x5 mask 0xff"),
    ("mark deleted", "state delete dst 192.0.2.2 proto esp spi 0x100a mark 0x5 mask 0xff"),
    ("if_id", f"state add {SA4} proto esp spi 0x100b mode tunnel {GCM} if_id 0x2a"),
    ("if_id deleted", "state delete dst 192.0.2.2 proto esp spi 0x100b"),
    (
        "encapsulation",
        f"state add {SA4} proto esp spi 0x100c mode transport {GCM}"
        " encap espinudp 4500 4501 198.51.100.7",
    ),
    (
        "output mark",
        f"state add {SA4} proto esp spi 0x100d mode transport {GCM} output-mark 0x10 mask 0xf0",
    ),
    (
        "limits",
        f"state add {SA4} proto esp spi 0x100e mode transport {GCM} limit time-soft 3000"
        " limit time-hard 3600 limit time-use-soft 100 limit time-use-hard 200 limit byte-soft 1000"
        " limit byte-hard 2000 limit packet-soft 30 limit packet-hard 40",
    ),
    (
        "flags",
        f"state add {SA4} proto esp spi 0x100f mode tunnel {GCM} flag noecn decap-dscp af-unspec"
        " extra-flag dont-encap-dscp",
    ),
    (
        "gmac",
        f"state add {SA4} proto esp spi 0x1010 mode transport aead 'rfc4543(gcm(aes))' {key(20)} 128",
    ),
    (
        "ccm",
        f"state add {SA4} proto esp spi 0x1011 mode transport aead 'rfc4309(ccm(aes))' {key(19)} 64",
    ),
    (
        "chacha",
        f"state add {SA4} proto esp spi 0x1012 mode transport"
        f" aead 'rfc7539esp(chacha20,poly1305)' {key(36)} 128",
    ),
    (
        "soft expiry",
        f"state add {SA4} proto esp spi 0x1013 mode transport {GCM} mark 7 limit time-soft 1",
        2.5,
    ),
    (
        "hard expiry",
        f"state add {SA4} proto esp spi 0x1014 mode transport {GCM} if_id 9 limit time-hard 1",
        2.5,
    ),
    ("flushed esp", "state flush proto esp"),
    ("flushed all", "state flush"),
    (
        "policy in",
        "policy add src 192.0.2.1 dst 192.0.2.2 proto udp sport 1000 dport 5000 dir in priority 3"
        " tmpl proto esp mode transport reqid 7",
    ),
    (
        "policy updated",
        "policy update src 192.0.2.1 dst 192.0.2.2 proto udp sport 1000 dport 5000 dir in"
        " priority 2 tmpl proto esp mode transport reqid 8",
    ),
    (
        "policy deleted",
        "policy delete src 192.0.2.1 dst 192.0.2.2 proto udp sport 1000 dport 5000 dir in",
    ),
    (
        "policy templates",
        "policy add src 10.1.0.0/16 dst 10.2.0.0/16 dir in priority 100"
        " tmpl src 192.0.2.1 dst 192.0.2.2 proto comp mode tunnel reqid 1 level use"
        " tmpl src 192.0.2.1 dst 192.0.2.2 proto esp spi 0x77 mode tunnel reqid 2",
    ),
    (
        "policy v6 marked",
        "policy add src 2001:db8:1::/48 dst 2001:db8:2::/64 dir fwd mark 6 mask 0xf"
        " tmpl src 2001:db8::1 dst 2001:db8::2 proto ah mode tunnel",
    ),
    (
        "policy if_id",
        "policy add src 10.3.0.0/16 dst 10.4.0.0/16 dir in if_id 0x2a tmpl proto esp mode beet",
    ),
    ("policy block", "policy add src 10.5.0.0/16 dst 10.6.0.0/16 dir in action block priority 1"),
    (
        "policy device",
        "policy add src 10.5.0.0/16 dst 10.7.0.0/16 dev lo dir in flag icmp localok"
        " limit time-hard 3600 limit byte-soft 10",
    ),
    (
        "policy sub",
        "policy add src 10.8.0.0/16 dst 10.9.0.0/16 dir in ptype sub tmpl proto esp mode transport",
    ),
    (
        "policy expiry",
        "policy add src 10.10.0.0/16 dst 10.11.0.0/16 dir in mark 3 limit time-hard 1",
        2.5,
    ),
    ("policies flushed", "policy flush"),
    ("sub policies flushed", "policy flush ptype sub"),
    ("defaults", "policy setdefault in block fwd accept out block"),
    ("defaults back", "policy setdefault in accept out accept"),
]


class Recorder:
    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 6)
        self.socket.bind((0, 0))
        for group in GROUPS:
            self.socket.setsockopt(270, 1, group)
        self.monitor = subprocess.Popen(
            ["ip", "xfrm", "monitor", "nokeys"], stdout=subprocess.PIPE, bufsize=0
        )
        time.sleep(1)

    def step(self, name: str, command: str, wait: float = 0.4) -> None:
        if subprocess.run(f"ip xfrm {command}", shell=True, check=False).returncode:
            print(f"this kernel or ip cannot: {name}", file=sys.stderr)
        self.take(name, f"ip xfrm {command}", wait)

    def take(self, name: str, command: str, wait: float = 0.4) -> None:
        assert self.monitor.stdout is not None
        time.sleep(wait)
        print(f"== {name}\n$ {command}")
        told = 0
        while select.select([self.socket], [], [], 0)[0]:
            for message in split(self.socket.recv(1 << 16)):
                print("<", message.hex())
                told += 1
        # The monitor writes each message at once, but may be late with the first.
        while told and select.select([self.monitor.stdout], [], [], 3 if told > 0 else 0.3)[0]:
            told = -1
            for line in os.read(self.monitor.stdout.fileno(), 1 << 16).decode().splitlines():
                print("|", line)
        print(flush=True)

    def dump(self, name: str, what: str, kind: int) -> None:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 6) as requests:
            requests.send(struct.pack("=IHHII", 16, kind, 0x301, 1, 0))
            print(f"== {name}\n$ ip xfrm {what}")
            done = False
            while not done:
                for message in split(requests.recv(1 << 16)):
                    print("D", message.hex())
                    done |= struct.unpack_from("=H", message, 4)[0] == 3
        text = subprocess.run(f"ip xfrm {what}", shell=True, capture_output=True, text=True)
        print("".join(f"| {line}\n" for line in text.stdout.splitlines()), flush=True)


def split(data: bytes) -> list[bytes]:
    found = []
    while data:
        size = struct.unpack_from("=I", data)[0]
        found.append(data[:size])
        data = data[size + 3 & ~3 :]
    return found


def selector(source: str, destination: str) -> bytes:
    """A selector between two IPv4 hosts."""
    return struct.pack(
        "@16s16s8xHBBBxxxiI",
        socket.inet_aton(destination), socket.inet_aton(source), 2, 32, 32, 0, 0, 0,
    )  # fmt: skip


def migrate() -> None:
    """Move an SA pair and its policy, as a MOBIKE daemon would."""
    old_from, old_to = socket.inet_aton("192.0.2.1"), socket.inet_aton("192.0.2.2")
    new_from, new_to = socket.inet_aton("192.0.2.11"), socket.inet_aton("192.0.2.12")
    move = struct.pack("@16s16s16s16sBBxxIHH", old_to, old_from, new_to, new_from, 50, 1, 5, 2, 2)
    body = selector("10.20.0.1", "10.20.0.2") + struct.pack("@IB3x", 0, 1)
    body += struct.pack("=HH", 4 + len(move), 17) + move
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 6) as requests:
        requests.send(struct.pack("=IHHII", 16 + len(body), 0x21, 0x5, 1, 0) + body)
        answer = requests.recv(4096)
        code = struct.unpack_from("=i", answer, 16)[0]
        if code:
            raise OSError(-code, os.strerror(-code))


def mapping(recorder: Recorder) -> None:
    """Have a peer's encapsulation port change, as behind a NAT that rebooted."""
    run = subprocess.check_call
    run(
        "ip link add m0 type veth peer name m1 && ip netns add peer && ip link set m1 netns peer",
        shell=True,
    )
    run("ip addr add 198.51.100.1/24 dev m0 && ip link set m0 up", shell=True)
    run("ip -n peer addr add 198.51.100.2/24 dev m1 && ip -n peer link set m1 up", shell=True)
    sa = f"src 198.51.100.2 dst 198.51.100.1 proto esp spi 0x3001 reqid 3 mode transport {GCM}"
    run(f"ip xfrm state add {sa} encap espinudp 4500 4500 0.0.0.0 sel dst 198.51.100.1", shell=True)
    run(f"ip -n peer xfrm state add {sa} encap espinudp 4555 4500 0.0.0.0", shell=True)
    run("ip -n peer xfrm policy add src 198.51.100.2 dst 198.51.100.1 proto udp dport 9 dir out"
        " tmpl proto esp mode transport reqid 3", shell=True)  # fmt: skip
    here = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    here.setsockopt(socket.IPPROTO_UDP, 100, 2)
    here.bind(("198.51.100.1", 4500))
    run(["ip", "netns", "exec", "peer", sys.executable, "-c",
         "import socket as s; a=s.socket(2,2); a.setsockopt(17,100,2); a.bind(('',4555))\n"
         "b=s.socket(2,2); b.sendto(b'x',('198.51.100.1',9)); b.sendto(b'x',('198.51.100.1',9))"])  # fmt: skip
    recorder.take("mapping", "(a datagram from port 4555 instead of 4500)", 1)
    recorder.dump("states after mapping", "state list nokeys", 0x12)
    here.close()
    run("ip netns del peer", shell=True)


def main() -> None:
    if os.environ.get("RECORDING") != "1":
        os.environ["RECORDING"] = "1"
        os.execvp("unshare", ["unshare", "-n", sys.executable, *sys.argv])
    subprocess.run("modprobe -a esp4 esp6 ah4 ah6 ipcomp xfrm_user", shell=True)
    subprocess.run("ip link set lo up", shell=True, check=True)
    print(f"# {platform.system()} {platform.release()} {platform.machine()} {sys.byteorder}\n")
    recorder = Recorder()
    for step in STEPS:
        recorder.step(*step)
    add = subprocess.check_call
    add(f"ip xfrm state allocspi {SA4} proto esp reqid 4 min 0x500 max 0x500", shell=True,
        stdout=subprocess.DEVNULL)  # fmt: skip
    add(
        "ip xfrm policy add src 127.0.0.1 dst 203.0.113.9 dir out tmpl proto esp mode transport reqid 6",
        shell=True,
    )
    add("ip route add 203.0.113.0/24 dev lo src 127.0.0.1; ping -c1 -W1 203.0.113.9 || true", shell=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    recorder.take("acquire", "ping 203.0.113.9")
    recorder.dump("larval states", "state list nokeys", 0x12)
    recorder.step("all flushed", "state flush")
    recorder.step("policies gone", "policy flush")
    add(f"ip xfrm state add {SA4} proto esp spi 0x2001 reqid 5 mode tunnel {GCM}", shell=True)
    add("ip xfrm policy add src 10.20.0.1 dst 10.20.0.2 dir out"
        " tmpl src 192.0.2.1 dst 192.0.2.2 proto esp mode tunnel reqid 5", shell=True)  # fmt: skip
    recorder.take("before migrate", "state add, policy add")
    migrate()
    recorder.take("migrate", "(XFRM_MSG_MIGRATE to 192.0.2.11, 192.0.2.12)")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        template = socket.inet_aton("0.0.0.0") + bytes(16)
        info = struct.pack("@56x8Q32xIIBBBB", *[2**64 - 1] * 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        info += struct.pack("@16s4sB3xHxx16sIBBB3I", b"", b"", 50, 2, template[:16], 0, 0, 0, 0,
                            0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF)  # fmt: skip
        info = struct.pack("@40xH14x", 2) + info[56:]
        own.setsockopt(socket.IPPROTO_IP, 17, info)
        recorder.dump("dump of states", "state list nokeys", 0x12)
        recorder.dump("dump of policies", "policy list", 0x15)
    mapping(recorder)
    recorder.monitor.terminate()
    recorder.monitor.wait()


if __name__ == "__main__":
    main()
