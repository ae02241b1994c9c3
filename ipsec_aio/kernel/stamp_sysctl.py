"""The sysctl net.ipv4.tcp_fwmark_accept: accepted TCP sockets inherit their handshake's mark.

A descriptor kept open stays with the network namespace of the thread that opened it, and reading
it costs about a microsecond. Changes of a sysctl make no event: it is read whenever it matters.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress

from ipsec_aio.errors import BackendDenied, BackendError, BackendUnavailable

__all__ = ["PATH", "FwmarkAccept"]

PATH = "/proc/sys/net/ipv4/tcp_fwmark_accept"
_NAME = "net.ipv4.tcp_fwmark_accept"


class FwmarkAccept:
    """The sysctl of the calling thread's network namespace. Where there is none it is off."""

    def __init__(self, path: str = PATH) -> None:
        self._mine = False
        self._fd = -1
        self.writable = False
        for access in (os.O_RDWR, os.O_RDONLY):
            with suppress(OSError):
                self._fd = os.open(path, access | os.O_CLOEXEC)
                self.writable = access == os.O_RDWR
                break

    @property
    def enabled(self) -> bool:
        """Whether the sysctl is on now."""
        return self._fd >= 0 and self._read() != b"0"

    def enable(self) -> None:
        """Turn it on, and remember what it was. Raises BackendDenied where that is not allowed."""
        if self.enabled:
            return
        if self._fd < 0:
            raise BackendUnavailable(errno.ENOENT, f"this system has no sysctl {_NAME}")
        if not self.writable:
            raise BackendDenied(
                errno.EPERM,
                f"cannot set {_NAME}, without which no accepted TCP connection carries a stamp: "
                f"it is read-only here; set it from outside (sysctl -w {_NAME}=1)",
            )
        try:
            os.pwrite(self._fd, b"1\n", 0)
        except OSError as error:
            raise BackendError(error.errno, f"cannot set {_NAME}: {error.strerror}") from None
        self._mine = True

    def restore(self) -> bool:
        """Turn it off where :meth:`enable` turned it on; False where there was nothing to do."""
        mine, self._mine = self._mine, False
        return mine and self._read() == b"1" and self.disable()

    def disable(self) -> bool:
        """Turn it off; False where that is not allowed."""
        with suppress(OSError):
            os.pwrite(self._fd, b"0\n", 0)
            return True
        return False

    def close(self) -> None:
        """Close the descriptor. Idempotent; changes nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _read(self) -> bytes:
        return os.pread(self._fd, 16, 0).strip()
