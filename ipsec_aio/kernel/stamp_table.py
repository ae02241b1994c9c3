"""The stamp's table in the kernel: read and verified as a whole, put in place, taken away."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ipsec_aio.errors import BackendDenied, BackendError, BackendUnavailable, CodecError

from . import nfnetlink
from .nfnetlink import (
    Attributes,
    Message,
    NftError,
    NftSocket,
    Request,
    cells,
    data,
    named,
    nft,
    number,
    sent,
    text,
)
from .stamp_foreign import (
    ForeignTable,
    is_late,
    is_leaving,
    own_table,
    readers,
    tables_with,
    writers,
)
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
)

__all__ = [
    "PROTOCOLS",
    "Port",
    "TableState",
    "add_ports",
    "install",
    "ports_of",
    "read",
    "read_readers",
    "remove",
    "remove_ports",
    "try_out",
]

PROTOCOLS = {"tcp": 6, "udp": 17}
_NAMES = {number: name for name, number in PROTOCOLS.items()}
_ESP_IN_UDP = 4500

_THIS_TABLE: Attributes = (("NFTA_TABLE_NAME", TABLE),)
_THIS_SET: Attributes = (("NFTA_SET_ELEM_LIST_TABLE", TABLE), ("NFTA_SET_ELEM_LIST_SET", PORTS))
_Elements = nft.nft_set_elem_list_msg

_OWNER, _PERSIST = 0x2, 0x4
_BASE_CHAIN = 0x1
_ACCEPT = 1
_ADD: int = nft.NLM_F_CREATE
_CREATE: int = _ADD | nft.NLM_F_EXCL
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
    write the mark or the packet after it. ``comment`` is the table's; ``handle`` tells it from one
    that was there before under the same name.
    """

    installed: bool = False
    owner: int = 0
    keeps_fragments: bool = False
    ports: frozenset[Port] = frozenset()
    faults: tuple[str, ...] = ()
    late_writers: tuple[str, ...] = ()
    late: frozenset[ForeignTable] = frozenset()
    comment: str = ""
    handle: int = 0

    @property
    def problem(self) -> str:
        """Why this is no verified stamp; empty when it is one."""
        if self.late_writers:
            return (
                f"a later rule could write the mark or the packet: {'; '.join(self.late_writers)}"
            )
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
                raise nfnetlink.failure(error.errno, "read the tables") from None
        except CodecError as error:
            raise BackendError(errno.EBADMSG, f"cannot read the tables: {error}") from None
    raise BackendError(errno.EAGAIN, "cannot read the tables: they change all the time")


def _read(netlink: NftSocket) -> TableState:
    chains = netlink.dump(nft.NFT_MSG_GETCHAIN, family=0)
    late = tables_with(is_late, chains)
    found = writers(chains, _rules_of(netlink, late))
    try:
        table = netlink.get(nft.NFT_MSG_GETTABLE, _THIS_TABLE)
    except NftError as error:
        if error.errno != errno.ENOENT:
            raise
        return TableState(late_writers=found, late=late)
    own = [chain for chain in chains if own_table(chain)]
    faults = list(_table_faults(table))
    faults += _chain_faults(own)
    faults += _rule_faults(netlink.dump(nft.NFT_MSG_GETRULE, [("NFTA_RULE_TABLE", TABLE)]), own)
    sets = [
        item
        for item in netlink.dump(nft.NFT_MSG_GETSET, [("NFTA_SET_TABLE", TABLE)])
        if own_table(item)
    ]
    ports: frozenset[Port] = frozenset()
    if wrong := _set_fault(sets):
        faults.append(wrong)
    else:
        elements = netlink.dump(nft.NFT_MSG_GETSETELEM, _THIS_SET)
        try:
            ports = frozenset(port for message in elements for port in ports_of(message))
        except CodecError as error:
            faults.append(str(error))
    return TableState(
        installed=True,
        owner=number(table.attributes.get("NFTA_TABLE_OWNER")),
        keeps_fragments=all(_name(chain) != FRAGMENTS.name for chain in own),
        ports=ports,
        faults=tuple(faults),
        late_writers=found,
        late=late,
        comment=text(table.attributes.get("NFTA_TABLE_USERDATA", b"")[2:]),
        handle=number(table.attributes.get("NFTA_TABLE_HANDLE")),
    )


def read_readers(netlink: NftSocket) -> tuple[str, ...]:
    """Name the foreign rules that look at the mark of what this host sends; may take long.

    Raises as :func:`read`.
    """
    try:
        chains = netlink.dump(nft.NFT_MSG_GETCHAIN, family=0)
        return readers(chains, _rules_of(netlink, tables_with(is_leaving, chains)))
    except NftError as error:
        raise nfnetlink.failure(error.errno, "read the tables") from None


def _rules_of(netlink: NftSocket, tables: Iterable[ForeignTable]) -> list[Message]:
    return [
        rule
        for table in tables
        for rule in netlink.dump(
            nft.NFT_MSG_GETRULE, [("NFTA_RULE_TABLE", table.name)], family=table.family
        )
    ]


def _name(chain: Message) -> str:
    return text(chain.attributes.get("NFTA_CHAIN_NAME"))


def _table_faults(table: Message) -> Iterable[str]:
    if number(table.attributes.get("NFTA_TABLE_FLAGS")) & ~(_OWNER | _PERSIST):
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
    told, given = found.attributes, sent(_chain(meant))
    return number(told.get("NFTA_CHAIN_FLAGS"), _BASE_CHAIN) == _BASE_CHAIN and all(
        told.get(name) == given[name]
        for name in ("NFTA_CHAIN_HOOK", "NFTA_CHAIN_POLICY", "NFTA_CHAIN_TYPE")
    )


def _rule_faults(rules: list[Message], chains: list[Message]) -> Iterable[str]:
    for name in sorted({_name(chain) for chain in chains} & set(CHAINS)):
        meant = CHAINS[name].rules
        found = [r for r in rules if text(r.attributes.get("NFTA_RULE_CHAIN")) == name]
        if len(found) != len(meant):
            yield f"chain {name} has {len(found)} rules, not {len(meant)}"
            continue
        for rule, message in zip(meant, found, strict=True):
            if message.attributes.get("NFTA_RULE_EXPRESSIONS") != rule.encoded:
                yield f"chain {name}: the rule to {rule.purpose} was altered"


def _set_fault(sets: list[Message]) -> str:
    if [text(item.attributes.get("NFTA_SET_NAME")) for item in sets] != [PORTS]:
        return f"the set {PORTS} is missing, or there are others"
    told = sets[0].attributes
    plain = not number(told.get("NFTA_SET_FLAGS"))
    plain = plain and number(told.get("NFTA_SET_KEY_LEN")) == KEY_LENGTH
    return "" if plain else f"the set {PORTS} has other flags or another key"


def ports_of(message: Message) -> frozenset[Port]:
    """Return the ports in a message of set elements. Raises CodecError for any other element."""
    found: set[Port] = set()
    for element in cells(message.attributes.get("NFTA_SET_ELEM_LIST_ELEMENTS", b"")):
        values = named(_Elements.set_elem, element)
        holder = named(_Elements.set_elem.data_attributes, values.get("NFTA_SET_ELEM_KEY", b""))
        key = holder.get("NFTA_DATA_VALUE", b"")
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
    requests = [Request(nft.NFT_MSG_DELTABLE, _THIS_TABLE)] if replace else []
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
    table = [*_THIS_TABLE, ("NFTA_TABLE_FLAGS", _OWNER if owned else 0)]
    if comment:
        table.append(("NFTA_TABLE_USERDATA", {"value": comment}))
    requests = [
        Request(nft.NFT_MSG_NEWTABLE, table, _CREATE),
        Request(nft.NFT_MSG_NEWSET, _SET, _CREATE),
        *_elements(nft.NFT_MSG_NEWSETELEM, ports),
    ]
    for chain in (INPUT,) if keep_fragments else (INPUT, FRAGMENTS):
        requests.append(_chain(chain))
        requests += [_rule(chain, rule) for rule in chain.rules]
    return requests


_SET: Attributes = (
    ("NFTA_SET_TABLE", TABLE),
    ("NFTA_SET_NAME", PORTS),
    ("NFTA_SET_FLAGS", ()),
    ("NFTA_SET_KEY_TYPE", SET_TYPE),
    ("NFTA_SET_KEY_LEN", KEY_LENGTH),
    ("NFTA_SET_ID", 1),
)


def _chain(chain: Chain) -> Request:
    hook = [("NFTA_HOOK_HOOKNUM", chain.hook), ("NFTA_HOOK_PRIORITY", chain.priority)]
    attributes: Attributes = (
        ("NFTA_CHAIN_TABLE", TABLE),
        ("NFTA_CHAIN_NAME", chain.name),
        ("NFTA_CHAIN_HOOK", {"attrs": hook}),
        ("NFTA_CHAIN_POLICY", _ACCEPT),
        ("NFTA_CHAIN_TYPE", "filter"),
    )
    return Request(nft.NFT_MSG_NEWCHAIN, attributes, _CREATE)


def _rule(chain: Chain, rule: Rule) -> Request:
    attributes: Attributes = (
        ("NFTA_RULE_TABLE", TABLE),
        ("NFTA_RULE_CHAIN", chain.name),
        ("NFTA_RULE_EXPRESSIONS", rule.expressions),
    )
    return Request(nft.NFT_MSG_NEWRULE, attributes, _ADD | nft.NLM_F_APPEND, rule.module)


def remove(netlink: NftSocket) -> bool:
    """Take the table away; False where there was none. Raises as :func:`install`."""
    try:
        _commit(netlink, [Request(nft.NFT_MSG_DELTABLE, _THIS_TABLE)], "remove the stamp")
    except FileNotFoundError:
        return False
    return True


def add_ports(netlink: NftSocket, ports: Iterable[Port]) -> None:
    """Have the stamp cover ports; those in the set already are left. Raises as :func:`install`."""
    requests = _elements(nft.NFT_MSG_NEWSETELEM, ports, _ADD)
    _commit(netlink, requests, "add to the stamp's ports")


def remove_ports(netlink: NftSocket, ports: Iterable[Port]) -> None:
    """Take ports out of the set. Raises as :func:`install`; FileNotFoundError for one not in it."""
    requests = _elements(nft.NFT_MSG_DELSETELEM, ports)
    _commit(netlink, requests, "remove from the stamp's ports")


def _elements(kind: int, ports: Iterable[Port], flags: int = 0) -> list[Request]:
    listed = [{"attrs": [("NFTA_SET_ELEM_KEY", data(port.key))]} for port in sorted(set(ports))]
    parts = [listed[n : n + _PER_MESSAGE] for n in range(0, len(listed), _PER_MESSAGE)]
    name = "NFTA_SET_ELEM_LIST_ELEMENTS"
    return [Request(kind, (*_THIS_SET, (name, part)), flags) for part in parts]


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
        return nfnetlink.failure(error.errno, what)
    if request.label and error.errno in (errno.ENOENT, errno.EOPNOTSUPP):
        return BackendUnavailable(
            error.errno, f"cannot {what}: this kernel lacks {request.label} (try modprobe)"
        )
    if request.kind == nft.NFT_MSG_NEWTABLE and error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
        return BackendUnavailable(
            error.errno,
            f"cannot {what}: this kernel has no tables with an owner (Linux 5.12); "
            "install it with the command line, where it stays",
        )
    if error.errno == errno.ENOENT:
        return _NotThereError(errno.ENOENT, f"cannot {what}: there is none")
    return nfnetlink.failure(error.errno, what)


def _owner(netlink: NftSocket) -> int:
    try:
        table = netlink.get(nft.NFT_MSG_GETTABLE, _THIS_TABLE)
    except NftError:
        return 0
    return number(table.attributes.get("NFTA_TABLE_OWNER"))
