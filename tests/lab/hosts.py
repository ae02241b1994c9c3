"""Hosts in network namespaces, and the SAs and policies between them.

One process is every host at once. A socket belongs to the namespace that its thread was in when it
was made, so a test makes each host's sockets inside that host and then uses them all from one
event loop::

    async def test_protected_datagram(bob, alice):
        pair = protect(alice, bob, GCM)                     # SAs and policies, both ways
        with bob.udp(5000) as server, alice.udp() as client:    # non-blocking sockets
            client.sendto(b"hello", (bob.v4, 5000))
            assert (await receive(server))[0] == b"hello"
        assert pair.packets(bob) == 1                       # … which came in by this SA
        pair.rekey()                                        # a second pair; the first still works
        pair.retire()                                       # the first is deleted

Every test runs inside *bob*, the server: what it opens without saying where is his. ``with
alice:`` makes what follows hers; never await in there. After each test SAs, policies, rulesets and
changed sysctls are gone.

=========  ============================================================
bob        the server that the tests are about
alice      a peer with SAs
carol      another peer with other SAs
mallory    a peer in clear, who can put any packet on the wire
=========  ============================================================

Host number *n* has 10.9.0.n and fd09::n on eth0, all on one bridge, and 10.8.n.1 and fd08:n::1 on
``lo`` as inner addresses for tunnels. Neighbours are permanent entries: no policy can break them.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fcntl import ioctl
from itertools import count
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 30.0
"""Seconds that a test waits for what must happen: an emulated processor is slow."""

HOME = Path("/run/netns")
NAMES = ("bob", "alice", "carol", "mallory")
SWITCH = "switch"
FAMILIES = (4, 6)
MODES = ("transport", "tunnel")
TUNNELS = ("tunnel", "beet")

_CLONE_NEWNET = 0x40000000
_SO_RCVMARK, _ETH_P_ALL = 75, 3
_END = "end-of-lines"
_libc = ctypes.CDLL(None, use_errno=True)


def enter(namespace: int) -> None:
    """Move this thread into the network namespace that a file descriptor stands for."""
    if _libc.setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def run(*words: str, stdin: str = "") -> str:
    """Run a program in the namespace of the moment; returns its output. Its errors are ours."""
    environment = dict(os.environ)
    if {"nft", "swanctl"} & {*words[:4]}:  # unpacked, and so are the libraries that they need
        environment["LD_LIBRARY_PATH"] = os.environ.get("LAB_LIBRARIES", "")
    done = subprocess.run(
        words, input=stdin, capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}\n{stdin}")
    return done.stdout


@dataclass(eq=False)
class Host:
    """A host: a network namespace. As a context manager it is where this thread is."""

    name: str
    number: int
    _namespace: int = -1
    _stack: list[int] = field(default_factory=list)
    _undo: list[Callable[[], object]] = field(default_factory=list)
    _tool: subprocess.Popen[str] | None = None
    _wire: socket.socket | None = None

    @property
    def v4(self) -> str:
        """The IPv4 address on the wire."""
        return f"10.9.0.{self.number}"

    @property
    def v6(self) -> str:
        """The IPv6 address on the wire."""
        return f"fd09::{self.number}"

    @property
    def inner4(self) -> str:
        """The IPv4 address behind a tunnel."""
        return f"10.8.{self.number}.1"

    @property
    def inner6(self) -> str:
        """The IPv6 address behind a tunnel."""
        return f"fd08:{self.number}::1"

    @property
    def mac(self) -> str:
        """The address on the link."""
        return f"02:00:00:00:00:{self.number:02x}"

    def address(self, family: int = 4, *, inner: bool = False) -> str:
        """Return one of the four addresses; ``family`` is 4 or 6."""
        if inner:
            return self.inner6 if family == 6 else self.inner4
        return self.v6 if family == 6 else self.v4

    def __enter__(self) -> Host:
        self._stack.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
        enter(self._namespace)
        return self

    def __exit__(self, *_: object) -> None:
        before = self._stack.pop()
        try:
            enter(before)
        finally:
            os.close(before)

    # -- sockets ---------------------------------------------------------------------------

    def udp(self, port: int = 0, family: int = 4, *, inner: bool = False) -> socket.socket:
        """Return a non-blocking UDP socket, bound to an address of this host."""
        return self._socket(socket.SOCK_DGRAM, port, family, inner)

    def tcp(self, port: int = 0, family: int = 4, *, inner: bool = False) -> socket.socket:
        """Return a non-blocking TCP socket, bound to an address of this host."""
        return self._socket(socket.SOCK_STREAM, port, family, inner)

    def listener(self, port: int, family: int = 4, *, inner: bool = False) -> socket.socket:
        """Return a listening TCP socket."""
        listening = self.tcp(port, family, inner=inner)
        listening.listen(100)
        return listening

    def _socket(self, kind: int, port: int, family: int, inner: bool) -> socket.socket:
        with self:
            made = socket.socket(socket.AF_INET6 if family == 6 else socket.AF_INET, kind)
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((self.address(family, inner=inner), port))
        return made

    # -- configuration ---------------------------------------------------------------------

    def ip(self, *lines: str) -> str:
        """Have ``ip`` carry out lines here: ``bob.ip("xfrm policy flush")``; returns its output.

        One process per host does it, since starting one takes long. (``ip xfrm state list`` would
        end it: use :meth:`show` for lists.)
        """
        tool = self._tool
        if tool is None or tool.poll() is not None:
            with self:
                tool = self._tool = subprocess.Popen(
                    ["stdbuf", "-oL", "ip", "-s", "-force", "-batch", "-"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
        assert tool.stdin is not None
        assert tool.stdout is not None
        tool.stdin.write("\n".join((*lines, _END, "")))
        tool.stdin.flush()
        said: list[str] = []
        while (line := tool.stdout.readline()) and not line.startswith(f'Object "{_END}"'):
            said.append(line)
        if line:
            tool.stdout.readline()  # it calls that a failed command, too
        else:
            self._forget_tool()
        text = "".join(said)
        if not line or "Command failed" in text:
            raise RuntimeError("\n".join((f"ip, on {self.name}:", *lines, text)))
        return text

    def _forget_tool(self) -> None:
        tool, self._tool = self._tool, None
        if tool is not None:
            assert tool.stdin is not None
            assert tool.stdout is not None
            with suppress(BrokenPipeError):
                tool.stdin.close()
            tool.stdout.close()
            tool.wait()

    def close(self) -> None:
        """End what serves this host."""
        self._forget_tool()
        if self._wire is not None:
            self._wire.close()
        os.close(self._namespace)

    def show(self, *words: str) -> str:
        """Return what a program prints here."""
        with self:
            return run(*words)

    def nft(self, text: str) -> str:
        """Load a ruleset here; the whole ruleset is flushed after the test."""
        self._undo.append(lambda: self.show("nft", "flush", "ruleset"))
        with self:
            return run("nft", "-f", "-", stdin=text)

    def sysctl(self, key: str, value: object) -> None:
        """Write a sysctl (``net/ipv4/conf/all/rp_filter``) until the end of the test."""
        path = Path("/proc/sys", key)
        with self:
            before = path.read_text()
            path.write_text(str(value))
        self._undo.append(lambda: self._restore(path, before))

    def _restore(self, path: Path, value: str) -> None:
        with self:
            path.write_text(value)

    def after(self, undo: Callable[[], object]) -> None:
        """Have something done after the test, last registered first."""
        self._undo.append(undo)

    def interface(self, name: str, if_id: int) -> None:
        """Make an xfrm interface, until the end of the test."""
        self.ip(f"link add {name} type xfrm dev eth0 if_id {if_id:#x}", f"link set {name} up")
        self._undo.append(lambda: self.ip(f"link del {name}"))

    def flush(self) -> None:
        """Delete every SA and every policy."""
        self.flush_policies()
        self.flush_sas()

    def flush_sas(self) -> None:
        """Delete every SA (XFRM_MSG_FLUSHSA)."""
        self._xfrm(0x1C, b"\x00")

    def flush_policies(self) -> None:
        """Delete every policy (XFRM_MSG_FLUSHPOLICY)."""
        self._xfrm(0x1D, b"")

    def _xfrm(self, kind: int, body: bytes) -> None:
        with self:
            link = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 6)
        with link:
            size = 16 + len(body)
            link.send(struct.pack("=IHHII", size, kind, 0x05, 1, 0) + body + bytes(-size % 4))
            error = struct.unpack_from("=i", link.recv(4096), 16)[0]
        if error not in (0, -3):  # ESRCH: there was nothing to flush
            raise OSError(-error, os.strerror(-error))

    def reset(self) -> None:
        """Take back what a test did here."""
        while self._undo:
            self._undo.pop()()
        self._destroy_streams()
        self.flush()
        with self:  # whoever installs a stamp and is killed leaves it
            Path("/proc/sys/net/ipv4/tcp_fwmark_accept").write_text("0")

    def _destroy_streams(self) -> None:
        """End connections that nobody holds any more: they would repeat their last words."""
        with self:
            lines = [
                line.split()
                for name in ("sockstat", "sockstat6")
                for line in Path("/proc/thread-self/net", name).read_text().splitlines()
            ]
            if any(words[0] in ("TCP:", "TCP6:") and words[2] != "0" for words in lines):
                run("ss", "--tcp", "--all", "--kill")

    # -- what the kernel says --------------------------------------------------------------

    def statistics(self) -> dict[str, int]:
        """Return the counters of /proc/net/xfrm_stat that are not 0."""
        with self:
            lines = Path("/proc/thread-self/net/xfrm_stat").read_text().split("\n")
        pairs = (line.split() for line in lines if line)
        return {name: int(value) for name, value in pairs if value != "0"}

    def sa(self, peer: str, local: str, proto: str, spi: int) -> str:
        """Return ``ip -s xfrm state get`` of the SA from ``peer`` to ``local``."""
        return self.ip(f"xfrm state get src {peer} dst {local} proto {proto} spi {spi:#x}")

    # -- what no honest host sends ---------------------------------------------------------

    def inject(self, packet: bytes, to: Host) -> None:
        """Put an IP packet on the wire to another host as it is, past routing and IPsec."""
        if self._wire is None:  # kept: to close one takes the kernel long
            with self:
                self._wire = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
        ether_type = 0x86DD if packet[0] >> 4 == 6 else 0x0800
        mac = bytes.fromhex(to.mac.replace(":", ""))
        self._wire.sendto(packet, ("eth0", ether_type, 0, 0, mac))

    def send_packet(self, packet: bytes, to: str) -> None:
        """Send an IP packet with our own header the ordinary way: policies apply to it."""
        family = socket.AF_INET6 if packet[0] >> 4 == 6 else socket.AF_INET
        with self:
            raw = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
        with raw:
            raw.sendto(packet, (to, 0))


class Network:
    """All hosts on one bridge. Made once; ``reset`` between tests."""

    def __init__(self) -> None:
        self.hosts = {name: Host(name, number) for number, name in enumerate(NAMES, 1)}
        self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        run("ip", "-batch", "-", stdin="".join(f"netns add {n}\n" for n in (SWITCH, *NAMES)))
        switch = Host(SWITCH, 0, os.open(HOME / SWITCH, os.O_RDONLY | os.O_CLOEXEC))
        self._switch = switch
        switch.ip(
            "link add bridge type bridge",
            *(
                f"link add {n} type veth peer name eth0 address {h.mac} netns {n}"
                for n, h in self.hosts.items()
            ),
            *(f"link set {n} up master bridge" for n in self.hosts),
            "link set bridge up",
        )
        for host in self.hosts.values():
            host._namespace = os.open(HOME / host.name, os.O_RDONLY | os.O_CLOEXEC)
            self._configure(host)

    def _configure(self, host: Host) -> None:
        with host:
            Path("/proc/sys/net/ipv6/conf/all/accept_dad").write_text("0")
            Path("/proc/sys/net/ipv6/conf/eth0/accept_dad").write_text("0")
        others = [h for h in self.hosts.values() if h is not host]
        lines = [
            "link set lo up",
            "link set eth0 up",
            f"addr add {host.v4}/24 dev eth0",
            f"addr add {host.v6}/64 dev eth0 nodad",
            f"addr add {host.inner4}/32 dev lo",
            f"addr add {host.inner6}/128 dev lo nodad",
        ]
        for other in others:
            lines += (
                f"neigh replace {a} lladdr {other.mac} dev eth0 nud permanent"
                for a in (other.v4, other.v6)
            )
            lines += (
                f"route add {other.inner4}/32 via {other.v4} src {host.inner4}",
                f"route add {other.inner6}/128 via {other.v6} src {host.inner6}",
            )
        host.ip(*lines)

    def reset(self) -> None:
        """Take back what a test did, on every host."""
        for host in self.hosts.values():
            host.reset()

    def close(self) -> None:
        """Leave no trace."""
        enter(self._home)
        os.close(self._home)
        for host in (*self.hosts.values(), self._switch):
            host.close()
        run("ip", "-batch", "-", stdin="".join(f"netns del {n}\n" for n in (SWITCH, *NAMES)))


# -- SAs and policies ----------------------------------------------------------------------


@dataclass(frozen=True)
class Suite:
    """What protects: ``words`` are how ``ip xfrm state`` says it, with keys of no worth."""

    name: str
    proto: str
    words: str
    private: bool
    intact: bool

    def __str__(self) -> str:
        return self.name


def _key(length: int) -> str:
    return "0x" + bytes(range(1, length + 1)).hex()


_SHA256 = f"auth-trunc hmac(sha256) {_key(32)} 128"

GCM = Suite("gcm", "esp", f"aead rfc4106(gcm(aes)) {_key(20)} 128", private=True, intact=True)
CBC = Suite("cbc", "esp", f"enc cbc(aes) {_key(16)} {_SHA256}", private=True, intact=True)
NULL = Suite("null", "esp", f"enc ecb(cipher_null) '' {_SHA256}", private=False, intact=True)
GMAC = Suite("gmac", "esp", f"aead rfc4543(gcm(aes)) {_key(20)} 128", private=False, intact=True)
BARE = Suite("bare", "esp", f"enc cbc(aes) {_key(16)}", private=True, intact=False)
AH = Suite("ah", "ah", _SHA256, private=False, intact=True)
COMP = Suite("comp", "comp", "comp deflate", private=False, intact=False)

SUITES = (GCM, CBC, NULL, GMAC, AH)
"""Those that keep traffic intact: tokens for them are ``protected``."""

_spis = count(0x1001)


@dataclass(eq=False)
class Pair:
    """SAs both ways between two hosts, and the policies that demand them.

    ``spis`` are the SPIs of the living pairs, oldest first: (into ``two``, into ``one``).
    """

    one: Host
    two: Host
    suite: Suite
    mode: str = "transport"
    family: int = 4
    reqid: int = 1
    extra: str = ""
    spis: list[tuple[int, int]] = field(default_factory=list)

    @property
    def inner(self) -> bool:
        """Whether protected traffic has other addresses than its packets on the wire."""
        return self.mode in TUNNELS

    def address(self, host: Host) -> str:
        """The address that protected traffic with this host has."""
        return host.address(self.family, inner=self.inner)

    def spi(self, host: Host) -> int:
        """The newest SPI of what comes into a host."""
        return self.spis[-1][0 if host is self.two else 1]

    def packets(self, host: Host, spi: int = 0) -> int:
        """How many packets came into a host by one SA (the newest)."""
        peer = self.one if host is self.two else self.two
        text = host.sa(
            peer.address(self.family),
            host.address(self.family),
            self.suite.proto,
            spi or self.spi(host),
        )
        return int(text.split("lifetime current:")[1].split("(bytes),")[1].split("(packets)")[0])

    def rekey(self, *, suite: Suite | None = None, spis: tuple[int, int] | None = None) -> None:
        """Add a new pair of SAs, which takes over what is sent. The older ones still receive."""
        self.suite = suite or self.suite
        rekey(self, spis=spis)

    def retire(self, *hosts: Host) -> None:
        """Delete the oldest pair of SAs, on both hosts or on those named."""
        lines = self.states("delete", oldest=True)
        self.spis.pop(0)
        for host in hosts or (self.one, self.two):
            host.ip(*lines)

    def demand(
        self, *hosts: Host, selector: str = "", level: str = "required", more: str = ""
    ) -> None:
        """Add the policies, on both hosts or on those named.

        ``selector`` is what it is for beside the addresses (``proto udp dport 5000``); ``more`` is
        ``priority 10``, ``mark 5``, ``if_id 7`` and the like.
        """
        for host in hosts or (self.one, self.two):
            host.ip(*self.policies("add", host, selector, level, more))

    def release(self, *hosts: Host, selector: str = "", more: str = "") -> None:
        """Delete the policies again."""
        for host in hosts or (self.one, self.two):
            host.ip(*self.policies("delete", host, selector, "", more))

    def states(self, verb: str, *, oldest: bool = False) -> list[str]:
        """The lines for ``ip`` that add or delete the two SAs, into ``two`` first."""
        into_two, into_one = self.spis[0 if oldest else -1]
        return [
            self._state(verb, self.one, self.two, into_two),
            self._state(verb, self.two, self.one, into_one),
        ]

    def _state(self, verb: str, source: Host, destination: Host, spi: int) -> str:
        key = (
            f"xfrm state {verb} src {source.address(self.family)} "
            f"dst {destination.address(self.family)} proto {self.suite.proto} spi {spi:#x}"
        )
        if verb == "delete":
            return key
        ends = f"sel src {self.address(source)} dst {self.address(destination)}"
        selector = ends if self.mode == "beet" else ""  # which there is what is inside
        mode = f"mode {self.mode} reqid {self.reqid}"
        return f"{key} {mode} {selector} {self.extra} {self.suite.words}"

    def policies(
        self, verb: str, host: Host, selector: str = "", level: str = "required", more: str = ""
    ) -> list[str]:
        """The lines for ``ip`` that add or delete a host's two policies."""
        peer = self.one if host is self.two else self.two
        lines = []
        for direction, source, destination in (("in", peer, host), ("out", host, peer)):
            line = (
                f"xfrm policy {verb} src {self.address(source)} dst {self.address(destination)} "
                f"{selector} dir {direction} {more}"
            )
            if verb == "add":
                line += (
                    f" tmpl src {source.address(self.family)} dst "
                    f"{destination.address(self.family)} proto {self.suite.proto} "
                    f"reqid {self.reqid} mode {self.mode} level {level}"
                )
            lines.append(line)
        return lines


def protect(
    one: Host,
    two: Host,
    suite: Suite = GCM,
    *,
    mode: str = "transport",
    family: int = 4,
    reqid: int = 1,
    extra: str = "",
    spis: tuple[int, int] | None = None,
    policies: bool = True,
) -> Pair:
    """Key two hosts by hand: SAs both ways and, unless told not to, policies that demand them.

    ``extra`` goes to ``ip xfrm state add``: ``mark 5``, ``output-mark 0x1001``, ``if_id 7``,
    ``encap espinudp 4500 4500 0.0.0.0``, ``flag esn``, ``limit packet-hard 10`` and the like.
    """
    pair = Pair(one, two, suite, mode, family, reqid, extra)
    pair.spis.append(spis or (next(_spis), next(_spis)))
    for host in (one, two):
        host.ip(*pair.states("add"), *(pair.policies("add", host) if policies else ()))
    return pair


def lenient(
    one: Host,
    two: Host,
    suite: Suite = GCM,
    mode: str = "transport",
    family: int = 4,
    extra: str = "",
    reqid: int = 7,
) -> Pair:
    """Key two hosts so that ``one`` sends protected and ``two`` demands nothing of what he gets."""
    pair = protect(
        one, two, suite, mode=mode, family=family, policies=False, reqid=reqid, extra=extra
    )
    pair.demand(one)
    two.ip(pair.policies("add", two, level="use")[0], pair.policies("add", two)[1])
    return pair


def rekey(*pairs: Pair, spis: tuple[int, int] | None = None, keep: int | None = None) -> None:
    """Rekey pairs together, in few steps. Of SAs beyond the newest ``keep`` the oldest go."""
    steps: list[dict[Host, list[str]]] = [{}, {}, {}]

    def at(step: int, host: Host, *lines: str) -> None:
        steps[step].setdefault(host, []).extend(lines)

    for pair in pairs:
        pair.spis.append(spis or (next(_spis), next(_spis)))
        to_two, to_one = pair.states("add")
        # Each receives by the new SA before the other sends by it.
        at(0, pair.two, to_two)
        at(1, pair.one, to_one, to_two)
        at(2, pair.two, to_one)
        if keep is not None and len(pair.spis) > keep:
            old = pair.states("delete", oldest=True)
            pair.spis.pop(0)
            at(1, pair.one, *old)
            at(2, pair.two, *old)
    for step in steps:
        for host, lines in step.items():
            host.ip(*lines)


# -- the wire ------------------------------------------------------------------------------


@contextmanager
def sniffing(host: Host, port: int, proto: int = socket.IPPROTO_TCP) -> Iterator[list[bytes]]:
    """What comes to a host in clear for a port, or from it; told in the end."""
    with host:
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL))
    wire.setblocking(False)
    wire.bind(("eth0", _ETH_P_ALL))
    seen: list[bytes] = []
    with wire:
        yield seen
        with suppress(BlockingIOError):
            while True:
                data, address = wire.recvfrom(65536)
                if address[2] == socket.PACKET_OUTGOING or data[9] != proto:
                    continue
                if port.to_bytes(2, "big") in (data[20:22], data[22:24]):
                    seen.append(data)


# -- marks ---------------------------------------------------------------------------------

_SO_MARK = 36
_IP_TRANSPARENT = 19


def mark_of(spi: int) -> int:
    """The mark that stands for an SPI."""
    return int.from_bytes(spi.to_bytes(4, "big"), sys.byteorder)


def set_mark(sock: socket.socket, mark: int) -> None:
    """Have what a socket sends carry a mark (SO_MARK)."""
    sock.setsockopt(socket.SOL_SOCKET, _SO_MARK, mark.to_bytes(4, sys.byteorder))


def forger(host: Host, source: str, mark: int) -> socket.socket:
    """Return an IPv4 UDP socket as a local process with privilege can have: any source, any mark.

    The marks of what it sends cross loopback.
    """
    with host:
        local = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    local.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)
    set_mark(local, mark)
    local.bind((source, 4000))
    return local


# -- TCP from outside ----------------------------------------------------------------------

_TCP_REPAIR, _TCP_REPAIR_QUEUE, _TCP_QUEUE_SEQ = 19, 20, 21
_RECEIVED, _SENT = 1, 2
_NO_PROBE = -1
_SIOCOUTQ = 0x5411


def numbers(client: socket.socket) -> tuple[int, int]:
    """Return the sequence numbers of what a connected socket sends and receives next.

    Of what it has sent, all that its peer has not acknowledged comes next.
    """

    def last(queue: int) -> int:
        client.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR_QUEUE, queue)
        return client.getsockopt(socket.IPPROTO_TCP, _TCP_QUEUE_SEQ) & 0xFFFFFFFF

    client.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)
    try:
        waiting = int.from_bytes(ioctl(client, _SIOCOUTQ, bytes(4)), sys.byteorder)
        return (last(_SENT) - waiting) & 0xFFFFFFFF, last(_RECEIVED)
    finally:
        client.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, _NO_PROBE)


# -- waiting -------------------------------------------------------------------------------


async def receive(server: socket.socket, within: float = PATIENCE) -> tuple[bytes, str, int]:
    """Return the next datagram, with the packet's mark and where it came from.

    Returns (data, source address, SPI that the mark names); raises TimeoutError.
    """
    data, control, _, address = await ready(server, lambda: server.recvmsg(65536, 64), within)
    mark = b"".join(d for level, kind, d in control if (level, kind) == (socket.SOL_SOCKET, 36))
    return data, address[0], int.from_bytes(mark, "big")


def read_marks(server: socket.socket) -> None:
    """Have :func:`receive` tell marks (SO_RCVMARK)."""
    server.setsockopt(socket.SOL_SOCKET, _SO_RCVMARK, 1)


async def ready(sock: socket.socket, attempt: Callable[[], T], within: float = PATIENCE) -> T:
    """Return what a non-blocking call gives as soon as it can; raises TimeoutError."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(within):
        while True:
            try:
                return attempt()
            except BlockingIOError:
                woken = asyncio.Event()
                loop.add_reader(sock.fileno(), woken.set)
                try:
                    await woken.wait()
                finally:
                    loop.remove_reader(sock.fileno())


async def refused(host: Host, send: Callable[[], object]) -> None:
    """Send, and wait until the host's policies drop a packet; raises TimeoutError."""

    def dropped() -> int:
        return host.statistics().get("XfrmInTmplMismatch", 0)

    before = dropped()
    send()
    await eventually(lambda: dropped() > before)


async def eventually(condition: Callable[[], bool], within: float = PATIENCE) -> None:
    """Wait until something holds that tells nobody; raises TimeoutError."""
    end = time.monotonic() + within
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("it never came true")
        await asyncio.sleep(0.01)
