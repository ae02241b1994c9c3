"""What charon says of its IKE SAs and their children: facts, and a table kept true by events.

No I/O: VICI messages in (``ipsec_aio.wire.vici``), immutable records out; time is an argument.

Rules:

* Records hold what charon said, identities as it printed them (``IToken.from_ike`` reads them).
  What is not said is None or empty; keys that are not known here are ignored; whatever is not of
  the form it must have is a CodecError.
* An SPI names a child for as long as the kernel may still have packets of it. A child that was
  rekeyed stays alive for seconds without a word of its end, and one that was taken down leaves
  packets in queues: both are kept for :attr:`IKETable.linger` seconds, and found with
  ``alive=False``. The kernel knows which of them still work.
* Children are told apart by their unique id: their keys differ between messages (``net-1`` in one,
  ``net`` in another).
* On a termination the IKE SA goes first and its children after it: an event of an end never brings
  anything to life.
* ``ike-update`` tells new addresses, not what becomes of the children: their reqid and traffic
  selectors can have changed too. :meth:`IKETable.apply` says which IKE SAs to list again.
* A reqid can belong to many peers.
* What charon says of a child is true of the SAs that were there when it said so. An SPI may be used
  again, so :meth:`IKETable.told` says when it spoke of a child last, and :meth:`IKETable.asked`
  since when that was no old news.
* Who an IKE SA's peer is was proved when it came up, and is handed on when it is rekeyed. charon
  lists IKE SAs before that as well, with what the peer has merely said of itself so far.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from ipaddress import ip_address
from math import inf
from typing import TYPE_CHECKING, Final, Generic, NamedTuple, TypeVar

from .enums import Mode
from .errors import BackendOverrun, CodecError
from .flow import Mark, unmap
from .identity import AuthenticationMethod
from .sa import IPPROTO_AH, IPPROTO_ESP

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator

    from .wire.vici import Message, Value

__all__ = [
    "EVENTS",
    "IKESA",
    "AuthenticationRound",
    "ChildSA",
    "Connection",
    "IKEKey",
    "IKETable",
    "Negotiated",
    "decode_connection",
    "decode_ike_sa",
]

EVENTS: Final = ("ike-updown", "ike-rekey", "ike-update", "child-updown", "child-rekey")
"""The events that :meth:`IKETable.apply` wants."""

_MODES: Final = {"TRANSPORT": Mode.TRANSPORT, "TUNNEL": Mode.TUNNEL, "BEET": Mode.BEET}
_PROTOS: Final = {"ESP": IPPROTO_ESP, "AH": IPPROTO_AH}
# A peer can take a half-open IKE SA straight to DELETING: that state proves nothing.
_ESTABLISHED: Final = frozenset({"ESTABLISHED", "PASSIVE", "REKEYING", "REKEYED"})
# An id that admits several: a wildcard, ``%any``, an expression, a network or a range of addresses.
_SEVERAL: Final = re.compile(r"\*|^[%^]|^[0-9A-Fa-f.:]+(/[0-9]+|-[0-9A-Fa-f.:]+)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSA:
    """A CHILD_SA: a pair of ESP or AH SAs that charon negotiated.

    ``name`` is its configuration's, ``proto`` an IP protocol number, 0 where nothing is installed;
    SPIs and CPIs are numbers, 0 where there are none. ``state`` is charon's word: ``INSTALLED``,
    ``REKEYED``, ``DELETED``, …
    """

    unique_id: int
    name: str = ""
    reqid: int = 0
    state: str = ""
    mode: Mode | None = None
    proto: int = 0
    spi_in: int = 0
    spi_out: int = 0
    cpi_in: int = 0
    cpi_out: int = 0
    encapsulated: bool = False
    mark_in: Mark = Mark()
    mark_out: Mark = Mark()
    if_id_in: int = 0
    if_id_out: int = 0
    local_ts: tuple[str, ...] = ()
    remote_ts: tuple[str, ...] = ()


class IKEKey(NamedTuple):
    """charon's number of an IKE SA, and its SPIs."""

    unique_id: int
    initiator_spi: int
    responder_spi: int


@dataclass(frozen=True, slots=True, kw_only=True)
class IKESA:
    """An IKE SA.

    ``name`` is its configuration's. Hosts and virtual addresses are packed; ids are text as charon
    prints it. ``remote_eap_id`` (IKEv2) and ``remote_xauth_id`` (IKEv1) are empty where they are
    not other than ``remote_id``.
    """

    unique_id: int
    name: str
    version: int
    state: str
    local_host: bytes = b""
    local_port: int = 0
    local_id: str = ""
    remote_host: bytes = b""
    remote_port: int = 0
    remote_id: str = ""
    remote_eap_id: str = ""
    remote_xauth_id: str = ""
    initiator: bool = False
    initiator_spi: int = 0
    responder_spi: int = 0
    nat_local: bool = False
    nat_remote: bool = False
    local_vips: tuple[bytes, ...] = ()
    remote_vips: tuple[bytes, ...] = ()

    @property
    def key(self) -> IKEKey:
        """What tells IKE SAs apart, also across restarts of charon, which count from 1 again."""
        return IKEKey(self.unique_id, self.initiator_spi, self.responder_spi)

    @property
    def peer_id(self) -> str:
        """The peer's identity that was proved last: by EAP, by XAuth, else that of IKE itself.

        Under EAP and XAuth ``remote_id`` is only what the peer called itself.
        """
        return self.remote_eap_id or self.remote_xauth_id or self.remote_id

    @property
    def established(self) -> bool:
        """Whether the peer has proved who it is: before, its ids are what it claims."""
        return self.state in _ESTABLISHED

    @property
    def ids(self) -> tuple[str, str, str, str]:
        """All that is said of who is at its ends."""
        return self.local_id, self.remote_id, self.remote_eap_id, self.remote_xauth_id


@dataclass(frozen=True, slots=True)
class AuthenticationRound:
    """How one end is to prove itself in a round. ``kind`` is charon's word, as ``public key``.

    ``id`` is empty where any identity will do; ``certificates`` and ``authorities`` are the
    subjects of those that it is restricted to.
    """

    kind: str
    id: str = ""
    certificates: tuple[str, ...] = ()
    authorities: tuple[str, ...] = ()

    def is_for(self, peer_id: str) -> bool:
        """Say whether it admits this identity, as charon prints it, and no other."""
        # charon compares names without case.
        return self.id.lower() == peer_id.lower() and bool(self.id) and not _SEVERAL.search(self.id)


@dataclass(frozen=True, slots=True)
class Connection:
    """A connection as it is loaded now, which need not be as it was when an IKE SA came up."""

    name: str
    version: str
    local: tuple[AuthenticationRound, ...]
    remote: tuple[AuthenticationRound, ...]

    @property
    def naming(self) -> AuthenticationRound | None:
        """The round in which a peer proved its identity of IKE itself: the last one does.

        XAuth without an identity of its own does not: it may be one that asks for nothing.
        """
        rounds = [each for each in self.remote if each.kind != "XAuth"] or self.remote
        return rounds[-1] if rounds else None

    def weakness(self, peer_id: str, *, bare_keys: bool) -> AuthenticationMethod | None:
        """Return how a peer may have chosen this identity of IKE for itself, None if in no way.

        ``bare_keys``: charon may have public keys of peers without certificates. A pre-shared key
        for more than one identity is a group's: any member can take the name of another.
        """
        naming = self.naming
        if naming is None:
            return AuthenticationMethod.GROUPKEY
        if naming.is_for(peer_id) or naming.kind in ("EAP", "XAuth"):
            return None
        if naming.kind == "public key":
            return AuthenticationMethod.BTNS if bare_keys and not naming.authorities else None
        return AuthenticationMethod.GROUPKEY

    def peer_method(self, peer_id: str, *, bare_keys: bool) -> AuthenticationMethod | None:
        """Return how a peer of this connection proved its identity, as far as that tells.

        None for several rounds, and for a public key that no CA has to vouch for: it might be a
        bare one.
        """
        weakness = self.weakness(peer_id, bare_keys=bare_keys)
        if weakness is not None or len(self.remote) != 1:
            return weakness
        (only,) = self.remote
        if only.kind == "public key" and only.authorities:
            return AuthenticationMethod.PKIX_INLINE
        return _METHODS.get(only.kind)


_METHODS: Final = {
    "pre-shared key": AuthenticationMethod.PRESHAREDKEY,
    "EAP": AuthenticationMethod.EAP,
    "XAuth": AuthenticationMethod.XAUTH,
}


class Negotiated(NamedTuple):
    """A child and the IKE SA that it belongs to. ``alive``: neither rekeyed nor taken down."""

    ike: IKESA
    child: ChildSA
    alive: bool


# -- decoding

_DIGITS: Final = {10: re.compile("[0-9]+"), 16: re.compile("[0-9A-Fa-f]+")}
_ANY: Final = ("", "%any", "%any6")


def decode_ike_sa(message: Message) -> tuple[IKESA, tuple[ChildSA, ...]]:
    """Decode a ``list-sa`` event. Raises CodecError."""
    name, section = _only_section(message)
    return _ike(name, section), tuple(_children(section))


def decode_connection(message: Message) -> Connection:
    """Decode a ``list-conn`` event. Raises CodecError."""
    name, section = _only_section(message)
    rounds: dict[str, list[AuthenticationRound]] = {"local": [], "remote": []}
    for key, value in section.items():
        end, _, number = key.partition("-")
        if end in rounds and number.isdigit():
            auth = _section(key, value)
            rounds[end].append(
                AuthenticationRound(
                    _text(auth, "class"),
                    _text(auth, "id"),
                    _texts(auth, "certs"),
                    _texts(auth, "cacerts"),
                )
            )
    return Connection(
        name, _text(section, "version"), tuple(rounds["local"]), tuple(rounds["remote"])
    )


def _ike(name: str, section: Message) -> IKESA:
    return IKESA(
        unique_id=_number(section, "uniqueid", needed=True),
        name=name,
        version=_number(section, "version", needed=True),
        state=_text(section, "state", needed=True),
        local_host=_address(section, "local-host"),
        local_port=_number(section, "local-port"),
        local_id=_text(section, "local-id"),
        remote_host=_address(section, "remote-host"),
        remote_port=_number(section, "remote-port"),
        remote_id=_text(section, "remote-id"),
        remote_eap_id=_text(section, "remote-eap-id"),
        remote_xauth_id=_text(section, "remote-xauth-id"),
        initiator=_flag(section, "initiator"),
        initiator_spi=_number(section, "initiator-spi", 16, 64),
        responder_spi=_number(section, "responder-spi", 16, 64),
        nat_local=_flag(section, "nat-local"),
        nat_remote=_flag(section, "nat-remote"),
        local_vips=_addresses(section, "local-vips"),
        remote_vips=_addresses(section, "remote-vips"),
    )


def _children(section: Message) -> Iterator[ChildSA]:
    for key, value in _section("child-sas", section.get("child-sas", {})).items():
        yield _child(key, _section(key, value))


def _child(key: str, section: Message) -> ChildSA:
    return ChildSA(
        unique_id=_number(section, "uniqueid", needed=True),
        name=_text(section, "name") or key,
        reqid=_number(section, "reqid"),
        state=_text(section, "state", needed=True),
        mode=_MODES.get(_text(section, "mode").upper()),
        proto=_PROTOS.get(_text(section, "protocol").upper(), 0),
        spi_in=_number(section, "spi-in", 16),
        spi_out=_number(section, "spi-out", 16),
        cpi_in=_number(section, "cpi-in", 16, 16),
        cpi_out=_number(section, "cpi-out", 16, 16),
        encapsulated=_flag(section, "encap"),
        mark_in=_mark(section, "in"),
        mark_out=_mark(section, "out"),
        if_id_in=_number(section, "if-id-in", 16),
        if_id_out=_number(section, "if-id-out", 16),
        local_ts=_texts(section, "local-ts"),
        remote_ts=_texts(section, "remote-ts"),
    )


def _mark(section: Message, end: str) -> Mark:
    if f"mark-{end}" not in section:
        return Mark()
    # A mask of all ones is not printed.
    mask = f"mark-mask-{end}"
    return Mark(
        _number(section, f"mark-{end}", 16),
        _number(section, mask, 16) if mask in section else 0xFFFFFFFF,
    )


def _only_section(message: Message) -> tuple[str, Message]:
    sections = [(name, value) for name, value in message.items() if isinstance(value, dict)]
    if len(sections) != 1:
        raise CodecError(f"{len(sections)} sections in place of one")
    return sections[0]


def _section(key: str, value: Value) -> Message:
    if not isinstance(value, dict):
        raise CodecError(f"{key} is no section")
    return value


def _text(section: Message, key: str, *, needed: bool = False) -> str:
    value = section.get(key, b"")
    if not isinstance(value, bytes) or (needed and not value):
        raise CodecError(f"{key}: {value!r}")
    return _decoded(value)


def _texts(section: Message, key: str) -> tuple[str, ...]:
    values = section.get(key, [])
    if not isinstance(values, list):
        raise CodecError(f"{key} is no list")
    return tuple(map(_decoded, values))


def _decoded(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")


def _number(
    section: Message, key: str, base: int = 10, bits: int = 32, *, needed: bool = False
) -> int:
    text = _text(section, key, needed=needed)
    if not text:
        return 0
    if len(text) > 20 or not _DIGITS[base].fullmatch(text):
        raise CodecError(f"{key}: {text[:80]!r}")
    number = int(text, base)
    if number.bit_length() > bits:
        raise CodecError(f"{key}: {text!r} has more than {bits} bits")
    return number


def _flag(section: Message, key: str) -> bool:
    return _text(section, key) == "yes"


def _address(section: Message, key: str) -> bytes:
    text = _text(section, key)
    return b"" if text in _ANY else _packed(text)


def _addresses(section: Message, key: str) -> tuple[bytes, ...]:
    return tuple(_packed(text) for text in _texts(section, key) if text not in _ANY)


def _packed(text: str) -> bytes:
    try:
        return unmap(ip_address(text.partition("%")[0]).packed)
    except ValueError as error:
        raise CodecError(f"not an address: {text!r}") from error


# -- the table


K = TypeVar("K", bound="Hashable")

# States from which a child goes without an event.
_ENDING: Final = frozenset({"REKEYED", "DELETING", "DELETED"})


@dataclass(slots=True)
class _Entry:
    child: ChildSA
    ike: IKESA
    told: float  # when charon spoke of it last, other than to say that it ended
    asked: float  # when it was asked what it listed of it last
    until: float | None = None  # when it is forgotten; None while it is alive


class _Index(Generic[K]):
    """Which children have something, in order of arrival."""

    __slots__ = ("_ids",)

    def __init__(self) -> None:
        self._ids: dict[K, dict[int, None]] = {}

    def __getitem__(self, key: K) -> tuple[int, ...]:
        return tuple(self._ids.get(key, ()))

    def add(self, key: K, unique_id: int) -> None:
        self._ids.setdefault(key, {})[unique_id] = None

    def discard(self, key: K, unique_id: int) -> None:
        ids = self._ids[key]
        del ids[unique_id]
        if not ids:
            del self._ids[key]


class IKETable:
    """The IKE SAs of a charon, and whose SPI an SPI is.

    Whenever events may have been missed: :meth:`begin_resync`, register for :data:`EVENTS`, pass
    each ``list-sa`` to :meth:`load` and the events that come meanwhile to :meth:`apply`, then
    :meth:`finish_resync`. While it is not ``synced``, it may lack what there is and hold what is
    gone: it still finds, and the caller decides what that is worth.
    """

    def __init__(self, *, linger: float = 30.0, limit: int = 65536) -> None:
        """``linger`` in seconds; at most ``limit`` children that are not alive are remembered,
        and events during a resync.
        """
        self.linger = linger
        self.limit = limit
        self.epoch = 0
        """Changes with every change of what can be found."""
        self.arrivals = 0
        """Changes when an IKE SA came to be known as established, or with other ids."""
        self.synced = False
        self.listed = -inf
        """When the last complete listing was asked for."""
        self._sas: dict[int, IKESA] = {}
        self._children: dict[int, _Entry] = {}
        self._gone: dict[int, None] = {}  # children that are not alive, oldest first
        self._of_ike: _Index[IKEKey] = _Index()
        self._of_spi: _Index[int] = _Index()
        self._of_reqid: _Index[int] = _Index()
        self._staged: dict[int, tuple[IKESA, tuple[ChildSA, ...]]] | None = None
        self._early: list[tuple[str, Message]] = []
        self._began = -inf
        self._came: dict[IKEKey, float] = {}
        self._origins: dict[IKEKey, IKEKey] = {}

    def __len__(self) -> int:
        """Number of IKE SAs."""
        return len(self._sas)

    def sas(self) -> tuple[IKESA, ...]:
        """Return all IKE SAs."""
        return tuple(self._sas.values())

    def parents(self) -> tuple[IKESA, ...]:
        """Return all IKE SAs, and those that are gone of children which are not forgotten."""
        known = {ike.key: ike for ike in self._sas.values()}
        for entry in self._children.values():
            known.setdefault(entry.ike.key, entry.ike)
        return tuple(known.values())

    def origin(self, key: IKEKey) -> IKEKey:
        """Return the key of the IKE SA that was rekeyed, as often as it was, to become this one."""
        return self._origins.get(key, key)

    def came(self, key: IKEKey) -> float | None:
        """Return when an IKE SA, or the one that it was rekeyed from, was told to have come up.

        None where it was there before, or came while nobody listened.
        """
        return self._came.get(self.origin(key))

    def told(self, child: ChildSA) -> float:
        """Return when charon spoke of a child last, other than to say that it ended.

        What it said in answer to a question counts from the question on; an event counts from its
        arrival, and may have been raised some time before.
        """
        entry = self._children.get(child.unique_id)
        return -inf if entry is None else entry.told

    def asked(self, child: ChildSA) -> float:
        """Return when charon was asked what it listed of a child last: it said so after that."""
        entry = self._children.get(child.unique_id)
        return -inf if entry is None else entry.asked

    def children(self, ike: IKESA) -> tuple[ChildSA, ...]:
        """Return the children of an IKE SA that are alive."""
        entries = (self._children[each] for each in self._of_ike[ike.key])
        return tuple(entry.child for entry in entries if entry.until is None)

    def find(
        self, destination: bytes, proto: int, spi: int, *, inbound: bool = True
    ) -> tuple[Negotiated, ...]:
        """Return every child that has this SA, those that are alive first.

        ``destination`` is the SA's packed destination address: inbound that is the IKE SA's own
        host. ``proto`` is an IP protocol number, ``spi`` a number.
        """
        found: list[Negotiated] = []
        for unique_id in self._of_spi[spi]:
            entry = self._children[unique_id]
            child, ike = entry.child, entry.ike
            end = (child.spi_in, ike.local_host) if inbound else (child.spi_out, ike.remote_host)
            if child.proto == proto and end == (spi, destination):
                found.append(Negotiated(ike, child, entry.until is None))
        return tuple(sorted(found, key=lambda each: not each.alive))

    def peers_of_reqid(self, reqid: int) -> frozenset[IKEKey]:
        """Return the keys of the IKE SAs that have children of this reqid, alive or not.

        Only where it is one does a reqid name a peer.
        """
        return frozenset(self._children[each].ike.key for each in self._of_reqid[reqid])

    def begin_resync(self, now: float = -inf) -> None:
        """Say that events may have been missed. What is loaded is as of ``now``."""
        self._began = now
        self.synced = False
        self.epoch += 1
        self._staged = {}
        self._early.clear()

    def load(self, message: Message) -> None:
        """Take a ``list-sa`` event, between :meth:`begin_resync` and :meth:`finish_resync`.

        Raises CodecError, and RuntimeError out of a resync.
        """
        if self._staged is None:
            raise RuntimeError("load() needs begin_resync()")
        ike, children = decode_ike_sa(message)
        self._staged[ike.unique_id] = ike, children

    def finish_resync(self, now: float) -> frozenset[int]:
        """Replace what was known by what was loaded, then take the events that came meanwhile.

        Returns IKE SAs to be listed again, and raises, as :meth:`apply` does.
        """
        if self._staged is None:
            raise RuntimeError("finish_resync() needs begin_resync()")
        staged, self._staged = self._staged, None
        listed = {child.unique_id for _, children in staged.values() for child in children}
        for unique_id in [*self._children]:
            if unique_id not in listed:
                self._end(unique_id, now)
        self._sas.clear()
        for ike, children in staged.values():
            self._set(ike, children, now, asked=self._began)
        self._tidy()
        self.listed = self._began
        self.epoch += 1
        again: frozenset[int] = frozenset()
        early, self._early = self._early, []
        for name, message in early:
            again |= self.apply(name, message, now)
        self.synced = True
        return again

    def refresh(self, message: Message, now: float) -> None:
        """Take a ``list-sa`` event of an IKE SA that was to be listed again.

        ``now`` is when it was asked for. Raises CodecError.
        """
        ike, children = decode_ike_sa(message)
        if ike.unique_id in self._sas:
            self._set(ike, children, now, asked=now)
            self.epoch += 1

    def apply(self, name: str, message: Message, now: float) -> frozenset[int]:
        """Take an event. ``now`` is monotonic, in seconds.

        Returns the unique ids of IKE SAs whose children may not be as known any more: list them
        (``list-sas`` with ``ike-id``) and pass what comes to :meth:`refresh`. Raises CodecError for
        what is not understood and BackendOverrun for too many events during a resync: in both
        cases a resync is due.
        """
        if self._staged is not None:
            if len(self._early) >= self.limit:
                raise BackendOverrun(f"more than {self.limit} events during a resync")
            self._early.append((name, message))
            return frozenset()
        take = {
            "ike-updown": self._ike_updown,
            "ike-rekey": self._ike_rekey,
            "ike-update": self._ike_update,
            "child-updown": self._child_updown,
            "child-rekey": self._child_rekey,
        }.get(name)
        if take is None:
            return frozenset()
        self.epoch += 1
        again = take(message, now)
        self.advance(now)
        return again

    def advance(self, now: float) -> None:
        """Forget what has lingered long enough."""
        while self._gone:
            oldest = next(iter(self._gone))
            until = self._children[oldest].until
            if until is not None and until > now and len(self._gone) <= self.limit:
                return
            self._forget(oldest)
            self.epoch += 1

    def next_deadline(self) -> float | None:
        """Return when :meth:`advance` has something to do, None for never."""
        return self._children[next(iter(self._gone))].until if self._gone else None

    def _ike_updown(self, message: Message, now: float) -> frozenset[int]:
        ike = _ike(*_only_section(message))
        if _flag(message, "up"):
            self._set(ike, (), now)
            self._came.setdefault(ike.key, now)
            if len(self._came) > 2 * len(self._sas) + len(self._children) + 64:
                self._tidy()
        else:
            self._sas.pop(ike.unique_id, None)
            for unique_id in self._of_ike[ike.key]:
                self._end(unique_id, now)
        return frozenset()

    def _ike_rekey(self, message: Message, now: float) -> frozenset[int]:
        name, section = _only_section(message)
        old, new = (_ike(name, _section(k, section.get(k, b""))) for k in ("old", "new"))
        self._sas.pop(old.unique_id, None)
        for unique_id in self._of_ike[old.key]:
            self._of_ike.discard(old.key, unique_id)
            self._of_ike.add(new.key, unique_id)
        self._origins[new.key] = self.origin(old.key)
        self._set(new, (), now)
        return frozenset()

    def _ike_update(self, message: Message, now: float) -> frozenset[int]:
        told = _ike(*_only_section(message))
        known = self._sas.get(told.unique_id)
        if known is None or known.key != told.key:
            return frozenset()  # not established yet: ike-updown will tell
        # The section still has the old addresses, the message itself the new ones.
        moved = replace(
            known,
            local_host=_address(message, "local-host"),
            local_port=_number(message, "local-port"),
            remote_host=_address(message, "remote-host"),
            remote_port=_number(message, "remote-port"),
        )
        self._set(moved, (), now)
        return frozenset((moved.unique_id,))

    def _child_updown(self, message: Message, now: float) -> frozenset[int]:
        name, section = _only_section(message)
        children = tuple(_children(section))
        if _flag(message, "up"):
            self._set(_ike(name, section), children, now)
        else:
            for child in children:
                self._end(child.unique_id, now)
        return frozenset()

    def _child_rekey(self, message: Message, now: float) -> frozenset[int]:
        name, section = _only_section(message)
        ike = _ike(name, section)
        for key, value in _section("child-sas", section.get("child-sas", b"")).items():
            both = _section(key, value)
            old, new = (_child(key, _section(k, both.get(k, b""))) for k in ("old", "new"))
            self._set(ike, (old, new), now)
            self._end(old.unique_id, now)
        return frozenset()

    def _set(
        self, ike: IKESA, children: Iterable[ChildSA], now: float, *, asked: float | None = None
    ) -> None:
        """Put an IKE SA, and some of its children, in place of what is known of them."""
        before = self._sas.get(ike.unique_id)
        if ike.established and (before is None or _proved(before) != _proved(ike)):
            self.arrivals += 1
        self._sas[ike.unique_id] = ike
        for unique_id in self._of_ike[ike.key]:
            self._children[unique_id].ike = ike
        for child in children:
            known = self._forget(child.unique_id)
            if asked is not None:
                entry = _Entry(child, ike, asked, asked)
            else:
                entry = _Entry(child, ike, now, -inf if known is None else known.asked)
            self._children[child.unique_id] = entry
            self._of_ike.add(ike.key, child.unique_id)
            self._of_reqid.add(child.reqid, child.unique_id)
            for spi in _spis(child):
                self._of_spi.add(spi, child.unique_id)
            if child.state in _ENDING:
                # Said again, an end is not put off.
                until = known.until if known is not None else None
                self._end(child.unique_id, now, until)

    def _end(self, unique_id: int, now: float, until: float | None = None) -> None:
        """Let a child linger, if it is known and alive."""
        entry = self._children.get(unique_id)
        if entry is not None and entry.until is None:
            entry.until = now + self.linger if until is None else until
            self._gone[unique_id] = None

    def _tidy(self) -> None:
        """Forget the beginnings of IKE SAs that nothing is left of."""
        keys = {ike.key for ike in self.parents()}
        self._origins = {key: old for key, old in self._origins.items() if key in keys}
        keys.update(self._origins.values())
        self._came = {key: when for key, when in self._came.items() if key in keys}

    def _forget(self, unique_id: int) -> _Entry | None:
        entry = self._children.pop(unique_id, None)
        if entry is not None:
            self._gone.pop(unique_id, None)
            self._of_ike.discard(entry.ike.key, unique_id)
            self._of_reqid.discard(entry.child.reqid, unique_id)
            for spi in _spis(entry.child):
                self._of_spi.discard(spi, unique_id)
        return entry


def _proved(ike: IKESA) -> tuple[object, ...]:
    return ike.key, ike.established, ike.ids


def _spis(child: ChildSA) -> set[int]:
    return {child.spi_in, child.spi_out} - {0}
