"""What is kept of a packet when it arrives: cheap, immutable, resolved later.

Rules:

* ``mark`` is only what the kernel said of this datagram (SO_RCVMARK) or of this connection's
  handshake (SO_MARK of a socket that our own accept returned). Where anything about it is in
  doubt it is None and ``doubt`` says why: then the token is UNKNOWN.
* ``generation`` is the stamp's at arrival. 0 means that no verified stamp covered the packet:
  then the mark proves nothing.
* ``after`` tells what may have been waiting: what packets are judged by as they arrive changes,
  and a packet lies in a queue for as long as its program is busy.
* ``enforced`` is only what a socket policy of ours has demanded since before the socket was bound
  or listened, so that nothing else can be in its queue.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .flow import Flow

if TYPE_CHECKING:
    from .policy import Template

__all__ = ["IPPROTO_TCP", "IPPROTO_UDP", "LATE", "NEVER", "Evidence"]

IPPROTO_TCP = 6
IPPROTO_UDP = 17
NEVER = -1
"""Less than every number of changes."""
LATE = 5.0
"""Seconds after which a mark is not resolved any more: removed SAs are known for twice as long, and
then their numbers may be others'.
"""
_HOST = sys.byteorder


@dataclass(frozen=True, slots=True)
class Evidence:
    """Evidence of one datagram, or of one connection.

    ``protocol`` is IPPROTO_UDP or IPPROTO_TCP; addresses are packed and unmapped. ``mark`` is the
    packet's mark as the host's number.
    ``doubt`` is empty, or the reason why nothing may be concluded from this evidence.
    ``enforced`` is the template of the socket's own policy, None where it has none.
    ``after`` is what the backend's ``policies`` was when the queue that it came out of was last
    known to be empty, NEVER where it was not.
    """

    protocol: int
    local: bytes
    local_port: int
    peer: bytes
    peer_port: int
    mark: int | None = None
    generation: int = 0
    doubt: str = ""
    enforced: Template | None = None
    after: int = NEVER

    @property
    def spi(self) -> int:
        """The stamp read as an SPI: its bytes in memory are in network order."""
        return int.from_bytes((self.mark or 0).to_bytes(4, _HOST), "big")

    @property
    def flow(self) -> Flow:
        """The inbound flow: from the peer to the local end."""
        return Flow(self.peer, self.local, self.protocol, self.peer_port, self.local_port)
