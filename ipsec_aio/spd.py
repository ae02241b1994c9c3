"""The SPD in memory, looked up by flow in the kernel's order.

Rules (net/xfrm/xfrm_policy.c):

* Sub policies are asked before main ones; where a sub policy is found, the main one counts too.
* The lowest priority number wins. Among equals the oldest wins; a replacement keeps the place of
  what it replaces while the priority stays the same.
* A mark matches when ``mark & mask == value``; the interface id must be equal.
* Policies of sockets are not in the SPD.
* Which interface a flow has is not known (:mod:`.flow`): one that a selector names is taken to fit,
  and nothing that is found is certain while :meth:`SPD.names_interface`.

How old equals are is not certain: a dump does not tell, and kernels differ between policies for
host pairs and others. :meth:`SPD.ties` therefore gives all that might be the first.

What is found is what applies now. Whether it applied when a packet came, :meth:`SPD.stood` tells:
by the number of changes at which the first ones were added, and by those of late that are gone.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, count
from math import inf

from .enums import Direction
from .flow import Flow, Mark, Selector
from .policy import Policy, PolicyKey
from .prefixes import Place, Prefixes, places

__all__ = ["GONE_LIMIT", "SPD"]

MAIN = 0
SUB = 1
GONE_LIMIT = 64
"""How many removed inbound policies are remembered; what came before an older one went is in doubt
altogether.
"""

# What tells policies of one table apart. The selector alone is most of them.
_Key = Policy | PolicyKey
_Name = Selector | tuple[Selector, Mark, int]


class _Entry:
    """A policy with its place in the order."""

    __slots__ = ("added", "policy", "rank")

    def __init__(self, policy: Policy, rank: int, added: int) -> None:
        self.policy = policy
        self.rank = rank
        self.added = added

    def __lt__(self, other: _Entry) -> bool:
        mine, theirs = self.policy.priority, other.policy.priority
        return mine < theirs or (mine == theirs and self.rank < other.rank)


class _Table:
    """The policies of one direction and type.

    What shares a place is a list in order; mostly there is one alone, and a list for each would be
    a lot of memory. Such a one is found by its place; ``named`` are all others.
    """

    __slots__ = ("named", "places")

    def __init__(self) -> None:
        self.named: dict[_Name, _Entry] = {}
        self.places: Prefixes[_Entry | list[_Entry]] = Prefixes()

    def __iter__(self) -> Iterator[_Entry]:
        alone = (e for e in self.places if isinstance(e, _Entry) and e.policy.selector.family)
        return chain(alone, self.named.values())

    def find(self, key: _Key, where: list[Place]) -> _Entry | None:
        if len(where) == 1:
            found = self.places.get(where[0])
            if found is None:
                return None
            if isinstance(found, _Entry):
                return found if _name_of(found.policy) == _name_of(key) else None
        return self.named.get(_name_of(key))

    def add(self, entry: _Entry, where: list[Place]) -> None:
        crowded = len(where) != 1 or not entry.policy.selector.family
        for shape, key in where:
            at = self.places.at(shape)
            found = at.setdefault(key, entry)
            if isinstance(found, list):
                insort(found, entry)
                crowded = True
            elif found is not entry:
                at[key] = sorted((found, entry))
                self.named[_name_of(found.policy)] = found
                crowded = True
        if crowded:
            self.named[_name_of(entry.policy)] = entry

    def remove(self, entry: _Entry, where: list[Place]) -> None:
        self.named.pop(_name_of(entry.policy), None)
        for shape, key in where:
            at = self.places.at(shape)
            found = at[key]
            if isinstance(found, list):
                del found[bisect_left(found, entry)]
                if len(found) == 1:
                    (left,) = found
                    at[key] = left
                    if left.policy.selector.family:
                        del self.named[_name_of(left.policy)]
                continue
            del at[key]
            self.places.prune(shape)


def _name_of(key: _Key) -> _Name:
    selector, mark, if_id = key.selector, key.mark, key.if_id
    return (selector, mark, if_id) if if_id or any(mark) else selector


def _matches(policy: Policy, flow: Flow) -> bool:
    """The rest of the match: addresses are in the key already."""
    selector = policy.selector
    return (
        policy.mark.matches(flow.mark)
        and (not selector.proto or selector.proto == flow.proto)
        and not (flow.source_port ^ selector.source_port) & selector.source_port_mask
        and not (flow.destination_port ^ selector.destination_port) & selector.destination_port_mask
    )


class SPD:
    """Policies by key and by flow.

    ``changes`` counts what was added and removed, and whatever else its owner counts there,
    ``edits`` the former alone.
    """

    def __init__(self) -> None:
        self.changes = self.edits = 0
        # Removed inbound policies, each with what `changes` came to, oldest first.
        self._gone: deque[tuple[Policy, int]] = deque()
        # What came before this is in doubt.
        self._known_since = 0
        self._size = 0
        self._tables: dict[tuple[Direction, int], _Table] = {}
        self._rank = count(1)
        self._marked = 0
        self.mark_changes = 0
        """Counts the changes of policies that look at marks."""
        self._bound = dict.fromkeys(Direction, 0)
        self._conditional = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Policy]:
        return (entry.policy for entry in self._entries())

    @property
    def marked_inbound(self) -> bool:
        """Whether an inbound policy looks at marks."""
        return self._marked > 0

    def names_interface(self, direction: Direction) -> bool:
        """Whether a policy of this direction names an interface in its selector."""
        return self._bound[direction] > 0

    @property
    def conditional_outbound(self) -> bool:
        """Whether an outbound policy looks at marks or names an interface."""
        return self._conditional > 0

    def get(self, key: PolicyKey) -> Policy | None:
        """Return the policy with this key."""
        entry = self._find(key)
        return None if entry is None else entry.policy

    def stood(self, ties: Iterable[Iterable[Policy]], flow: Flow, after: int) -> bool:
        """Whether what :meth:`ties` gives for an inbound flow came first ever since ``changes``
        was ``after``.
        """
        if after < self._known_since:
            return False
        top: dict[int, int] = {}
        for policy in chain.from_iterable(ties):
            entry = self._find(policy.key)
            if entry is None or entry.added > after:
                return False
            top[policy.kind] = policy.priority
        # Marks and interfaces of what came meanwhile are not known: each may have matched.
        for gone, when in reversed(self._gone):
            if when <= after:
                break
            if (
                gone.priority <= top.get(gone.kind, inf)
                and gone.if_id == flow.if_id
                and gone.selector.matches(flow)
            ):
                return False
        return True

    def doubt(self, changes: int = 0) -> None:
        """Count a change of which nothing is known, and no fewer changes than these."""
        self.changes = max(self.changes, changes) + 1
        self._known_since = self.changes
        self._gone.clear()

    def add(self, policy: Policy) -> bool:
        """Add or replace; say whether that changes what the SPD says."""
        return self._insert(policy, next(self._rank))

    def load(self, policy: Policy) -> None:
        """Add from a dump, which the kernel gives newest first; :meth:`doubt` is to follow."""
        self._insert(policy, -next(self._rank))

    def _insert(self, policy: Policy, rank: int) -> bool:
        if policy.of_socket:
            return False
        where = places(policy.selector, policy.if_id)
        table = self._table(policy.direction, policy.kind)
        old = table.find(policy, where)
        if old is not None:
            if _same(old.policy, policy):
                old.policy = policy
                return False
            if old.policy.priority == policy.priority:
                rank = old.rank
            self._drop(old)
            table = self._table(policy.direction, policy.kind)
        self._count(policy, 1)
        table.add(_Entry(policy, rank, self.changes), where)
        return True

    def remove(self, key: PolicyKey) -> Policy | None:
        """Remove and return the policy with this key, None where there is none."""
        entry = self._find(key)
        return None if entry is None else self._drop(entry)

    def remove_index(self, index: int) -> Policy | None:
        """Remove and return the policy with the kernel's number."""
        found = [entry for entry in self._entries() if entry.policy.index == index]
        return self._drop(max(found, key=_rank)) if found else None

    def flush(self, kind: int) -> int:
        """Remove the policies of a type; return how many those were."""
        entries = [entry for entry in self._entries() if entry.policy.kind == kind]
        for entry in entries:
            self._drop(entry)
        return len(entries)

    def _drop(self, entry: _Entry) -> Policy:
        policy = entry.policy
        table = self._table(policy.direction, policy.kind)
        table.remove(entry, places(policy.selector, policy.if_id))
        if not (table.named or table.places):
            del self._tables[policy.direction, policy.kind]
        self._count(policy, -1)
        if policy.direction is Direction.IN:
            if len(self._gone) >= GONE_LIMIT:
                _, self._known_since = self._gone.popleft()
            self._gone.append((policy, self.changes))
        return policy

    def _entries(self) -> Iterator[_Entry]:
        return chain.from_iterable(self._tables.values())

    def _find(self, key: PolicyKey) -> _Entry | None:
        table = self._tables.get((key.direction, key.kind))
        return None if table is None else table.find(key, places(key.selector, key.if_id))

    def lookup(self, flow: Flow, direction: Direction) -> Policy | None:
        """Return the policy that the kernel applies first to this flow, None for the default."""
        for kind in (SUB, MAIN):
            entries = self._best(flow, direction, kind)
            if entries:
                return min(entries).policy
        return None

    def ties(self, flow: Flow, direction: Direction) -> list[list[Policy]]:
        """Return what applies to this flow: for the sub and the main type, where one has any,
        the policies of the lowest priority number, in the kernel's order.
        """
        found = (self._best(flow, direction, kind) for kind in (SUB, MAIN))
        return [[entry.policy for entry in sorted(entries)] for entries in found if entries]

    def _best(self, flow: Flow, direction: Direction, kind: int) -> list[_Entry]:
        table = self._tables.get((direction, kind))
        best: list[_Entry] = []
        if table is None:
            return best
        for found in table.places.matching(flow.source, flow.destination, flow.if_id):
            _collect(found if isinstance(found, list) else (found,), flow, best)
        return best

    def _table(self, direction: Direction, kind: int) -> _Table:
        table = self._tables.get((direction, kind))
        if table is None:
            table = self._tables[direction, kind] = _Table()
        return table

    def _count(self, policy: Policy, step: int) -> None:
        self.changes += 1
        self.edits += 1
        self._size += step
        marked, bound = policy.mark != (0, 0), policy.selector.ifindex != 0
        if not (marked or bound):
            return
        self.mark_changes += marked
        self._bound[policy.direction] += step * bound
        if policy.direction is Direction.IN:
            self._marked += step * marked
        elif policy.direction is Direction.OUT:
            self._conditional += step


def _rank(entry: _Entry) -> int:
    return entry.rank


def _collect(bucket: Iterable[_Entry], flow: Flow, best: list[_Entry]) -> None:
    """Add the bucket's matches to ``best``, which holds those of the lowest number alone."""
    for entry in bucket:
        priority = entry.policy.priority
        if best and priority > best[0].policy.priority:
            return
        if _matches(entry.policy, flow):
            if best and priority < best[0].policy.priority:
                best.clear()
            best.append(entry)


def _same(one: Policy, other: Policy) -> bool:
    """Whether two policies of one key say the same; counters and numbers do not count."""
    return (
        one.action is other.action
        and one.priority == other.priority
        and one.templates == other.templates
        and one.flags == other.flags
        and one.security_context == other.security_context
    )
