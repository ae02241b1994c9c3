"""What an SA's values say by themselves."""

from __future__ import annotations

import pytest

from ipsec_aio.sa import Algorithm


@pytest.mark.parametrize(
    ("name", "key_bits", "strength"),
    [
        ("rfc4106(gcm(aes))", 160, 128),
        ("rfc4543(gcm(aes))", 288, 256),
        ("rfc4309(ccm(aes))", 152, 128),
        ("rfc3686(ctr(aes))", 160, 128),
        ("rfc7539esp(chacha20,poly1305)", 288, 256),
        ("cbc(aes)", 256, 256),
        ("ecb(cipher_null)", 0, 0),
        ("rfc4309(ccm(aes))", 0, 0),
    ],
)
def test_strength_is_the_key_without_salt_or_nonce(name: str, key_bits: int, strength: int) -> None:
    assert Algorithm(name, key_bits).strength_bits == strength
