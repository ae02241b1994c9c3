"""The stamp's table in the kernel: read and verified as a whole, put in place, taken away."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ipsec_aio.errors import BackendDenied, BackendError, BackendUnavailable, CodecError

from . import nfnetlink as nft
from .nfnetlink import Attributes, Message, NftError, NftSocket, Request, be32, number, text
from .stamp_foreign import LateTable, late_tables, own_table, writers
from .stamp_rules import (
    CHAINS,
    FRAGMENTS,
    INPUT,
    KEY_LENGTH,
    PORTS,
    SET_TYPE,
    TABLE,
    Chain,
    Rule,
    same,
)

__all__ = [
    "PROTOCOLS",
    "Port",
    "TableState",
    "add_ports",
    "install",
    "ports_of",
    "read",
    "remove",
    "remove_ports",
    "try_out",
]

PROTOCOLS = {"tcp": 6, "udp": 17}
_NAMES = {number: name for name, number in PROTOCOLS.items()}
_ESP_IN_UDP = 4500

_OWNER, _PERSIST = 0x2, 0x4
_BASE_CHAIN = 0x1
_ATTEMPTS = 20
_PER_MESSAGE = 1000


class Port(NamedTuple):
    """A served (IP protocol number, local port)."""

    protocol: int
    number: int

    @classmethod
    def parse(cls, written: str) -> Port:
        """Read ``"udp/5000"``. Raises ValueError for what is none or must not be stamped."""
        name, slash, digits = written.partition("/")
        if not slash or name not in PROTOCOLS:
            raise ValueError(f"{written!r} is no port: write udp/5000 or tcp/5000")
        if not (digits.isascii() and digits.isdigit()) or not 0 < int(digits) < 65536:
            raise ValueError(f"{written!r}: the port must be a number from 1 to 65535")
        return cls.checked(PROTOCOLS[name], int(digits))

    @classmethod
    def checked(cls, protocol: int, port: int) -> Port:
        """Return the port. Raises ValueError for one that must not be stamped."""
        if protocol not in _NAMES or not 0 < port < 65536:
            raise ValueError(f"protocol {protocol} port {port} cannot be stamped: TCP and UDP can")
        if (protocol, port) == (PROTOCOLS["udp"], _ESP_IN_UDP):
            raise ValueError("udp/4500 carries ESP itself (RFC 3948) and cannot be stamped")
        return cls(protocol, port)

    def __str__(self) -> str:
        return f"{_NAMES.get(self.protocol, self.protocol)}/{self.number}"

    @property
    def key(self) -> bytes:
        """The set element's key: each field padded to four bytes."""
        return bytes((self.protocol, 0, 0, 0)) + self.number.to_bytes(2, "big") + bytes(2)


@dataclass(frozen=True, slots=True)
class TableState:
    """What the tables of a namespace say of the stamp, all read at one moment.

    ``owner`` is the netlink port id of the socket that the table goes with, 0 for none. ``faults``
    names everything that differs from what is meant; ``late_writers`` the foreign rules that could
    write the mark after it. ``comment`` is the table's; ``handle`` tells it from one that was there
    before under the same name.
    """

    installed: bool = False
    owner: int = 0
    keeps_fragments: bool = False
    ports: frozenset[Port] = frozenset()
    faults: tuple[str, ...] = ()
    late_writers: tuple[str, ...] = ()
    late: frozenset[LateTable] = frozenset()
    comment: str = ""
    handle: int = 0

    @property
    def problem(self) -> str:
        """Why this is no verified stamp; empty when it is one."""
        if self.late_writers:
            return f"a later rule could write the mark: {'; '.join(self.late_writers)}"
        if not self.installed:
            return "the stamp is not installed"
        if self.faults:
            return f"table inet {TABLE} is not as it must be: {'; '.join(self.faults)}"
        return ""


def read(netlink: NftSocket) -> TableState:
    """Read everything that the stamp's truth depends on, at one moment.

    Raises BackendDenied without privilege, BackendUnavailable without nf_tables, and BackendError
    where other processes change the tables so fast that no moment can be had.
    """
    for _ in range(_ATTEMPTS):
        try:
            before = netlink.generation_id()
            state = _read(netlink)
            if netlink.generation_id() == before:
                return state
        except NftError as error:
            if error.errno not in (errno.EINTR, errno.ENOENT):
                raise nft.failure(error.errno, "read the tables") from None
        except CodecError as error:
            raise BackendError(errno.EBADMSG, f"cannot read the tables: {error}") from None
    raise BackendError(errno.EAGAIN, "cannot read the tables: they change all the time")


def _read(netlink: NftSocket) -> TableState:
    chains = netlink.dump(nft.GETCHAIN, family=0)
    late = late_tables(chains)
    rules = [
        rule
        for table in late
        for rule in netlink.dump(nft.GETRULE, ((1, text(table.name)),), family=table.family)
    ]
    found = writers(chains, rules, late)
    try:
        table = netlink.get(nft.GETTABLE, ((1, text(TABLE)),))
    except NftError as error:
        if error.errno != errno.ENOENT:
            raise
        return TableState(late_writers=found, late=late)
    own = [chain for chain in chains if own_table(chain)]
    faults = list(_table_faults(table))
    faults += _chain_faults(own)
    faults += _rule_faults(netlink.dump(nft.GETRULE, ((1, text(TABLE)),)), own)
    sets = [item for item in netlink.dump(nft.GETSET, ((1, text(TABLE)),)) if own_table(item)]
    ports: frozenset[Port] = frozenset()
    if wrong := _set_fault(sets):
        faults.append(wrong)
    else:
        elements = netlink.dump(nft.GETSETELEM, ((1, text(TABLE)), (2, text(PORTS))))
        try:
            ports = frozenset(port for message in elements for port in ports_of(message))
        except CodecError as error:
            faults.append(str(error))
    return TableState(
        installed=True,
        owner=number(table.attributes.get(7)),
        keeps_fragments=all(_name(chain) != FRAGMENTS.name for chain in own),
        ports=ports,
        faults=tuple(faults),
        late_writers=found,
        late=late,
        comment=nft.unpack_text(table.attributes.get(6, b"")[2:]),
        handle=number(table.attributes.get(4)),
    )


def _name(chain: Message) -> str:
    return nft.unpack_text(chain.attributes.get(3))


def _table_faults(table: Message) -> Iterable[str]:
    if number(table.attributes.get(2)) & ~(_OWNER | _PERSIST):
        yield "the table is dormant"


def _chain_faults(chains: list[Message]) -> Iterable[str]:
    names = {_name(chain) for chain in chains}
    if INPUT.name not in names:
        yield f"chain {INPUT.name} is missing"
    for chain in chains:
        meant = CHAINS.get(_name(chain))
        if meant is None:
            yield f"chain {_name(chain)} is not ours"
        elif not _is(chain, meant):
            yield f"chain {meant.name} has another type, hook, priority or policy"


def _is(found: Message, meant: Chain) -> bool:
    attributes = found.attributes
    return (
        same(_hook(meant), attributes.get(4, b""))
        and attributes.get(5) == be32(1)
        and nft.unpack_text(attributes.get(7)) == "filter"
        and number(attributes.get(10), _BASE_CHAIN) == _BASE_CHAIN
    )


def _hook(chain: Chain) -> Attributes:
    return (1, be32(chain.hook)), (2, be32(chain.priority))


def _rule_faults(rules: list[Message], chains: list[Message]) -> Iterable[str]:
    for name in sorted({_name(chain) for chain in chains} & set(CHAINS)):
        meant = CHAINS[name].rules
        found = [r for r in rules if nft.unpack_text(r.attributes.get(2)) == name]
        if len(found) != len(meant):
            yield f"chain {name} has {len(found)} rules, not {len(meant)}"
            continue
        for rule, message in zip(meant, found, strict=True):
            if not same(rule.expressions, message.attributes.get(4, b"")):
                yield f"chain {name}: the rule to {rule.purpose} was altered"


def _set_fault(sets: list[Message]) -> str:
    if [nft.unpack_text(item.attributes.get(2)) for item in sets] != [PORTS]:
        return f"the set {PORTS} is missing, or there are others"
    attributes = sets[0].attributes
    plain = not number(attributes.get(3)) and number(attributes.get(5)) == KEY_LENGTH
    return "" if plain else f"the set {PORTS} has other flags or another key"


def ports_of(message: Message) -> frozenset[Port]:
    """Return the ports in a message of set elements. Raises CodecError for any other element."""
    found: set[Port] = set()
    for _, element in nft.parse(message.attributes.get(3, b"")):
        values = dict(nft.parse(element))
        key = dict(nft.parse(values.get(1, b""))).get(1, b"")
        if len(key) != KEY_LENGTH:
            raise CodecError(f"the set {PORTS} has an element that cannot be read")
        found.add(Port(key[0], int.from_bytes(key[4:6], "big")))
    return frozenset(found)


def install(
    netlink: NftSocket,
    ports: Iterable[Port] = (),
    *,
    owned: bool,
    keep_fragments: bool = False,
    replace: bool = False,
    comment: str = "",
) -> None:
    """Put the table in place, in one transaction.

    ``owned``: it goes with ``netlink``, and nobody else can change or flush it (Linux 5.12).
    ``replace``: take away one that is there. ``comment`` is kept in the table.

    Raises BackendDenied without privilege or where the table is another process's,
    BackendUnavailable where the kernel lacks a part, BackendError otherwise.
    """
    requests = [Request(nft.DELTABLE, ((1, text(TABLE)),))] if replace else []
    requests += _whole(ports, owned, keep_fragments, comment)
    _commit(netlink, requests, "install the stamp")


def try_out(netlink: NftSocket, *, owned: bool) -> str:
    """Have the kernel check the whole table and forget it; return what it lacks, or ``""``.

    For where no stamp is installed. Raises BackendDenied without privilege.
    """
    requests = _whole((), owned, False, "")
    try:
        netlink.rehearse(requests)
    except NftError as error:
        explained = _explain(netlink, error, requests, "install the stamp")
        if isinstance(explained, BackendDenied):
            raise explained from None
        return explained.strerror or str(explained)
    return ""


def _whole(ports: Iterable[Port], owned: bool, keep_fragments: bool, comment: str) -> list[Request]:
    table: Attributes = ((1, text(TABLE)), (2, be32(_OWNER if owned else 0)))
    if comment:
        # nftables keeps comments as user data of type 0, with their length.
        value = text(comment)
        table += ((6, bytes((0, len(value))) + value),)
    requests = [
        Request(nft.NEWTABLE, table, nft.CREATE | nft.EXCL),
        Request(nft.NEWSET, _SET, nft.CREATE | nft.EXCL),
        *_elements(nft.NEWSETELEM, ports),
    ]
    for chain in (INPUT,) if keep_fragments else (INPUT, FRAGMENTS):
        requests.append(Request(nft.NEWCHAIN, _chain(chain), nft.CREATE | nft.EXCL))
        requests += [_rule(chain, rule) for rule in chain.rules]
    return requests


_SET: Attributes = (
    (1, text(TABLE)),
    (2, text(PORTS)),
    (3, be32(0)),
    (4, be32(SET_TYPE)),
    (5, be32(KEY_LENGTH)),
    (10, be32(1)),
)


def _chain(chain: Chain) -> Attributes:
    return (
        (1, text(TABLE)),
        (3, text(chain.name)),
        (4, _hook(chain)),
        (5, be32(1)),
        (7, text("filter")),
    )


def _rule(chain: Chain, rule: Rule) -> Request:
    attributes: Attributes = ((1, text(TABLE)), (2, text(chain.name)), (4, rule.expressions))
    return Request(nft.NEWRULE, attributes, nft.CREATE | nft.APPEND, rule.module)


def remove(netlink: NftSocket) -> bool:
    """Take the table away; False where there was none. Raises as :func:`install`."""
    try:
        _commit(netlink, [Request(nft.DELTABLE, ((1, text(TABLE)),))], "remove the stamp")
    except FileNotFoundError:
        return False
    return True


def add_ports(netlink: NftSocket, ports: Iterable[Port]) -> None:
    """Have the stamp cover ports; those in the set already are left. Raises as :func:`install`."""
    _commit(netlink, list(_elements(nft.NEWSETELEM, ports, nft.CREATE)), "add to the stamp's ports")


def remove_ports(netlink: NftSocket, ports: Iterable[Port]) -> None:
    """Take ports out of the set. Raises as :func:`install`; FileNotFoundError for one not in it."""
    _commit(netlink, list(_elements(nft.DELSETELEM, ports)), "remove from the stamp's ports")


def _elements(kind: int, ports: Iterable[Port], flags: int = 0) -> Iterable[Request]:
    listed = sorted(set(ports))
    for first in range(0, len(listed), _PER_MESSAGE):
        elements: Attributes = tuple(
            (1, ((1, ((1, port.key),)),)) for port in listed[first : first + _PER_MESSAGE]
        )
        yield Request(kind, ((1, text(TABLE)), (2, text(PORTS)), (3, elements)), flags)


class _NotThereError(BackendError, FileNotFoundError):
    """There is no such table or element."""


def _commit(netlink: NftSocket, requests: list[Request], what: str) -> None:
    try:
        netlink.commit(requests)
    except NftError as error:
        raise _explain(netlink, error, requests, what) from None


def _explain(
    netlink: NftSocket, error: NftError, requests: list[Request], what: str
) -> BackendError:
    request = requests[error.index] if 0 <= error.index < len(requests) else None
    if error.errno == errno.EPERM and (owner := _owner(netlink)):
        return BackendDenied(
            errno.EPERM,
            f"cannot {what}: table inet {TABLE} is owned by another process "
            f"(netlink port id {owner}) and goes when that ends; where several programs "
            "serve, install it by `ipsec-aio stamp install` and open with stamp='use'",
        )
    if request is None:
        return nft.failure(error.errno, what)
    if request.label and error.errno in (errno.ENOENT, errno.EOPNOTSUPP):
        return BackendUnavailable(
            error.errno, f"cannot {what}: this kernel lacks {request.label} (try modprobe)"
        )
    if request.kind == nft.NEWTABLE and error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
        return BackendUnavailable(
            error.errno,
            f"cannot {what}: this kernel has no tables with an owner (Linux 5.12); "
            "install it with the command line, where it stays",
        )
    if error.errno == errno.ENOENT:
        return _NotThereError(errno.ENOENT, f"cannot {what}: there is none")
    return nft.failure(error.errno, what)


def _owner(netlink: NftSocket) -> int:
    try:
        table = netlink.get(nft.GETTABLE, ((1, text(TABLE)),))
    except NftError:
        return 0
    return number(table.attributes.get(7))
