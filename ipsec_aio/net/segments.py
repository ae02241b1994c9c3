"""Many datagrams to one address with one system call: UDP_SEGMENT (udp(7), Linux 4.18).

Rules:

* A run is datagrams of one size, of which the last may be shorter, cut by the kernel from one
  buffer. The kernel refuses it where it cannot, above all for what IPsec will protect (EIO): then
  nothing was sent, and each datagram goes by itself.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence

__all__ = ["REFUSALS", "UDP_SEGMENT", "joined", "run", "segment_size"]

UDP_SEGMENT = 103
REFUSALS = frozenset({errno.EIO, errno.EINVAL, errno.EMSGSIZE, errno.ENOPROTOOPT, errno.EOPNOTSUPP})
"""Errors that say that the kernel will not cut."""

_SEGMENTS = 64
_BYTES = 65000
_SMALL = 256
_SIZE = struct.Struct("=H")


def segment_size(size: int) -> bytes:
    """Return the data of a UDP_SEGMENT message."""
    return _SIZE.pack(size)


def joined(
    datagrams: Sequence[bytes | bytearray | memoryview],
) -> Sequence[bytes | bytearray | memoryview]:
    """Return a run's buffers for sendmsg: small ones as one, which costs less than a list."""
    return [b"".join(datagrams)] if len(datagrams[0]) <= _SMALL else datagrams


def run(sizes: Sequence[int], start: int) -> int:
    """Return where the run ends that begins at ``start``: one further, where there is none."""
    size = sizes[start]
    end = start + 1
    if not 0 < size <= _BYTES:
        return end
    limit = min(len(sizes), start + min(_SEGMENTS, _BYTES // size))
    many = limit - start
    if sizes[start:limit] == [size] * many:
        return limit
    while sizes[end] == size:
        end += 1
    if end < limit and 0 < sizes[end] < size:
        end += 1
    return end
