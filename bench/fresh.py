"""asyncio's own datagram endpoint in a process that has done nothing else.

What other modules leave behind in the heap when they are imported may be room enough for its
datagrams' 256 KiB, by chance.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from typing import Any


class Counting(asyncio.DatagramProtocol):
    """Stops the loop when all have come."""

    left = 0

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.left -= 1
        if not self.left:
            self.loop.stop()


def main() -> None:
    """Receive as many as each line says, and answer with the CPU time in ns."""
    sock = socket.socket(fileno=int(sys.argv[1]))
    loop = asyncio.new_event_loop()
    opening = loop.create_datagram_endpoint(lambda: Counting(loop), sock=sock)
    _, protocol = loop.run_until_complete(opening)
    print("ready", flush=True)
    for line in sys.stdin:
        protocol.left = int(line)
        start = time.thread_time_ns()
        loop.run_forever()
        print(time.thread_time_ns() - start, flush=True)


if __name__ == "__main__":
    main()
