"""The SPD in memory, looked up by flow in the kernel's order.

Rules (net/xfrm/xfrm_policy.c):

* Sub policies are asked before main ones; where a sub policy is found, the main one counts too.
* The lowest priority number wins. Among equals the oldest wins; a replacement keeps the place of
  what it replaces while the priority stays the same.
* A mark matches when ``mark & mask == value``; the interface id must be equal.
* Policies of sockets are not in the SPD.

How old equals are is not certain: a dump does not tell, and kernels differ between policies for
host pairs and others. :meth:`SPD.ties` therefore gives all that might be the first.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from itertools import count

from .enums import Direction
from .flow import Flow
from .policy import Policy, PolicyKey

__all__ = ["SPD"]

MAIN = 0
SUB = 1

# Prefix lengths and address lengths of both ends: one dict of policies for each that is in use.
_Shape = tuple[int, int, int]


class _Entry:
    """A policy with its place in the order."""

    __slots__ = ("added", "policy", "rank")

    def __init__(self, policy: Policy, rank: int, added: float) -> None:
        self.policy = policy
        self.rank = rank
        self.added = added

    def __lt__(self, other: _Entry) -> bool:
        mine, theirs = self.policy.priority, other.policy.priority
        return mine < theirs or (mine == theirs and self.rank < other.rank)


class _Table:
    """The policies of one direction, type and interface id.

    Keys are the two masked addresses as one integer; a list holds what shares them, in order.
    """

    __slots__ = ("shapes",)

    def __init__(self) -> None:
        self.shapes: dict[_Shape, dict[int, list[_Entry]]] = {}

    def add(self, entry: _Entry) -> None:
        for shape, key in _places(entry.policy):
            buckets = self.shapes.setdefault(shape, {})
            bucket = buckets.get(key)
            if bucket is None:
                buckets[key] = [entry]
            else:
                insort(bucket, entry)

    def remove(self, entry: _Entry) -> None:
        for shape, key in _places(entry.policy):
            bucket = self.shapes[shape][key]
            del bucket[bisect_left(bucket, entry)]
            if not bucket:
                del self.shapes[shape][key]
                if not self.shapes[shape]:
                    del self.shapes[shape]

    def candidates(self, flow: Flow) -> Iterator[list[_Entry]]:
        size = len(flow.destination)
        bits = size * 8
        source = int.from_bytes(flow.source)
        destination = int.from_bytes(flow.destination)
        for (shape_size, s, d), buckets in self.shapes.items():
            if shape_size == size:
                bucket = buckets.get(source >> (bits - s) << bits | destination >> (bits - d))
                if bucket is not None:
                    yield bucket


def _places(policy: Policy) -> list[tuple[_Shape, int]]:
    selector = policy.selector
    s, d = selector.source_prefix, selector.destination_prefix
    places: list[tuple[_Shape, int]] = []
    for family, size in ((2, 4), (10, 16)):
        if selector.family not in (0, family):
            continue
        if (s and len(selector.source) != size) or (d and len(selector.destination) != size):
            continue
        bits = size * 8
        source = int.from_bytes(selector.source) >> (bits - s) if s else 0
        destination = int.from_bytes(selector.destination) >> (bits - d) if d else 0
        places.append(((size, s, d), source << bits | destination))
    return places


def _matches(policy: Policy, flow: Flow) -> bool:
    """The rest of the match: addresses are in the key already."""
    selector = policy.selector
    return (
        flow.mark & policy.mark.mask == policy.mark.value
        and (not selector.proto or selector.proto == flow.proto)
        and not (flow.source_port ^ selector.source_port) & selector.source_port_mask
        and not (flow.destination_port ^ selector.destination_port) & selector.destination_port_mask
        and (not selector.ifindex or selector.ifindex == flow.ifindex)
    )


class SPD:
    """Policies by key, by the kernel's index, and by flow.

    ``changes`` counts what was added and removed.
    """

    def __init__(self) -> None:
        self.changes = 0
        self._entries: dict[PolicyKey, _Entry] = {}
        self._by_index: dict[int, PolicyKey] = {}
        self._tables: dict[tuple[Direction, int, int], _Table] = {}
        self._rank = count(1)
        self._marked = 0
        self._by_interface = 0
        self._conditional = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Policy]:
        return (entry.policy for entry in self._entries.values())

    @property
    def marked_inbound(self) -> bool:
        """Whether an inbound policy looks at marks."""
        return self._marked > 0

    @property
    def interface_inbound(self) -> bool:
        """Whether an inbound policy names an interface in its selector."""
        return self._by_interface > 0

    @property
    def conditional_outbound(self) -> bool:
        """Whether an outbound policy looks at marks or names an interface."""
        return self._conditional > 0

    def get(self, key: PolicyKey) -> Policy | None:
        """Return the policy with this key."""
        entry = self._entries.get(key)
        return None if entry is None else entry.policy

    def added(self, policy: Policy) -> float:
        """Return since when this policy is here. Raises KeyError where it is not."""
        return self._entries[policy.key].added

    def add(self, policy: Policy, now: float) -> bool:
        """Add or replace; say whether that changes what the SPD says."""
        return self._insert(policy, now, next(self._rank))

    def load(self, policy: Policy, now: float) -> None:
        """Add from a dump, which the kernel gives newest first."""
        self._insert(policy, now, -next(self._rank))

    def restart(self, now: float) -> None:
        """Count every policy's age from now."""
        for entry in self._entries.values():
            entry.added = now

    def _insert(self, policy: Policy, now: float, rank: int) -> bool:
        if policy.of_socket:
            return False
        key = policy.key
        old = self._entries.get(key)
        if old is not None:
            if _same(old.policy, policy):
                self._by_index.pop(old.policy.index, None)
                self._by_index[policy.index] = key
                old.policy = policy
                return False
            if old.policy.priority == policy.priority:
                rank = old.rank
            self.remove(key)
        entry = _Entry(policy, rank, now)
        self._entries[key] = entry
        self._by_index[policy.index] = key
        self._count(policy, 1)
        self._table(policy).add(entry)
        self.changes += 1
        return True

    def remove(self, key: PolicyKey) -> Policy | None:
        """Remove and return the policy with this key, None where there is none."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return None
        policy = entry.policy
        self.changes += 1
        if self._by_index.get(policy.index) == key:
            del self._by_index[policy.index]
        self._count(policy, -1)
        table = self._table(policy)
        table.remove(entry)
        if not table.shapes:
            del self._tables[policy.direction, policy.kind, policy.if_id]
        return policy

    def remove_index(self, index: int) -> Policy | None:
        """Remove and return the policy with the kernel's number."""
        key = self._by_index.get(index)
        return None if key is None else self.remove(key)

    def flush(self, kind: int) -> int:
        """Remove the policies of a type; return how many those were."""
        keys = [key for key in self._entries if key.kind == kind]
        for key in keys:
            self.remove(key)
        return len(keys)

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
        table = self._tables.get((direction, kind, flow.if_id))
        best: list[_Entry] = []
        if table is None:
            return best
        for bucket in table.candidates(flow):
            _collect(bucket, flow, best)
        return best

    def _table(self, policy: Policy) -> _Table:
        place = policy.direction, policy.kind, policy.if_id
        table = self._tables.get(place)
        if table is None:
            table = self._tables[place] = _Table()
        return table

    def _count(self, policy: Policy, step: int) -> None:
        if policy.direction is Direction.IN:
            self._marked += step * bool(policy.mark.mask or policy.mark.value)
            self._by_interface += step * bool(policy.selector.ifindex)
        elif policy.direction is Direction.OUT:
            self._conditional += step * bool(
                policy.mark.mask or policy.mark.value or policy.selector.ifindex
            )


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
