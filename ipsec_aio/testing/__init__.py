"""For tests of backends: what each of them must do. Needs pytest; ipsec_aio does without it."""

import pytest

# Or its assertions would not say what they compared.
pytest.register_assert_rewrite(f"{__name__}.conformance")

from .conformance import (  # noqa: E402
    Arrivals,
    BackendConformance,
    Bench,
    IdentityBench,
    IdentityConformance,
)

__all__ = ["Arrivals", "BackendConformance", "Bench", "IdentityBench", "IdentityConformance"]
