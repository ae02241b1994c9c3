"""The errors, by who can do something about them.

::

    IPsecError
    ├── TokenError                      a token was misused
    │   └── StaleTokenError             … outside the process or backend that made it
    ├── ProtectionError (PermissionError)   a peer does not meet a requirement
    ├── BackendError (OSError)          the source of facts failed
    │   ├── BackendUnavailable          not on this kernel, not at this address, or closed
    │   ├── BackendDenied               a privilege is missing
    │   └── BackendOverrun              events were lost; a resync is under way
    └── CodecError (ValueError)         bytes that are not what they should be
"""

from __future__ import annotations

__all__ = [
    "BackendDenied",
    "BackendError",
    "BackendOverrun",
    "BackendUnavailable",
    "CodecError",
    "IPsecError",
    "ProtectionError",
    "StaleTokenError",
    "TokenError",
]


class IPsecError(Exception):
    """Base of every error that ipsec_aio raises of its own."""


class TokenError(IPsecError):
    """A token was used in a way that tokens cannot be used."""


class StaleTokenError(TokenError):
    """A token outlived its process: it is valid in the one that made it (draft, 3.3)."""


class ProtectionError(IPsecError, PermissionError):
    """Traffic did not meet a requirement.

    ``clause`` names the first clause that failed (``"encrypted"``), ``reason`` says what was
    found instead.
    """

    def __init__(self, clause: str, reason: str) -> None:
        super().__init__(f"{clause}: {reason}")
        self.clause = clause
        self.reason = reason

    def __reduce__(self) -> tuple[type[ProtectionError], tuple[str, str]]:
        return type(self), (self.clause, self.reason)


class BackendError(IPsecError, OSError):
    """The backend cannot supply facts."""


class BackendUnavailable(BackendError):  # noqa: N818  (a public name fixed by the design)
    """The backend does not exist here, is closed, or belongs to another loop."""


class BackendDenied(BackendError):  # noqa: N818
    """A privilege is missing; the message says which and how to get it."""


class BackendOverrun(BackendError):  # noqa: N818
    """The kernel dropped events; tokens are UNKNOWN until the tables are read again."""


class CodecError(IPsecError, ValueError):
    """Bytes from outside do not have the form that they must have."""
