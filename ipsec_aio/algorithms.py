"""The algorithms that the kernel's IPsec knows, by its names for them (net/xfrm/xfrm_algo.c).

Each name comes with the key length that is usual and the ICV length that is the default, in bits.
For AEADs and counter modes the key length includes the salt or nonce, as the kernel counts it.

A name that is not listed is no error, but nothing is claimed of it either.
"""

from __future__ import annotations

__all__ = ["AEADS", "AUTHENTICATORS", "CIPHERS", "COMPRESSORS", "NULL_AUTHENTICATOR", "NULL_CIPHER"]

NULL_CIPHER = "ecb(cipher_null)"
NULL_AUTHENTICATOR = "digest_null"

AEADS = {
    "rfc4106(gcm(aes))": (160, 128),
    "rfc4309(ccm(aes))": (152, 128),
    "rfc4543(gcm(aes))": (160, 128),
    "rfc7539esp(chacha20,poly1305)": (288, 128),
}
CIPHERS = {
    NULL_CIPHER: (0, 0),
    "cbc(des)": (64, 0),
    "cbc(des3_ede)": (192, 0),
    "cbc(cast5)": (128, 0),
    "cbc(blowfish)": (128, 0),
    "cbc(aes)": (128, 0),
    "cbc(serpent)": (128, 0),
    "cbc(camellia)": (128, 0),
    "cbc(twofish)": (128, 0),
    "rfc3686(ctr(aes))": (160, 0),
    "cbc(sm4)": (128, 0),
}
AUTHENTICATORS = {
    NULL_AUTHENTICATOR: (0, 0),
    "hmac(md5)": (128, 96),
    "hmac(sha1)": (160, 96),
    "hmac(sha256)": (256, 128),
    "hmac(sha384)": (384, 192),
    "hmac(sha512)": (512, 256),
    "hmac(rmd160)": (160, 96),
    "hmac(sm3)": (256, 128),
    "xcbc(aes)": (128, 96),
    "cmac(aes)": (128, 96),
}
COMPRESSORS = {"deflate": (0, 0), "lzs": (0, 0), "lzjh": (0, 0)}
