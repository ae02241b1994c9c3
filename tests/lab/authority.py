"""A certification authority for the lab: it signs, and takes back."""

from __future__ import annotations

from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

SINCE, UNTIL = datetime(2020, 1, 1), datetime(2020, 1, 1) + timedelta(days=36500)


def subject(common_name: str) -> x509.Name:
    """``C=CH, O=Lab, CN=…``"""
    attributes = (
        (NameOID.COUNTRY_NAME, "CH"),
        (NameOID.ORGANIZATION_NAME, "Lab"),
        (NameOID.COMMON_NAME, common_name),
    )
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in attributes])


class Authority:
    """A CA. All files are PEM; ``certificate`` is its own."""

    def __init__(self, name: str) -> None:
        self._name = subject(name)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._revoked: list[x509.RevokedCertificate] = []
        self._parsed = self._sign(self._name, self._key.public_key(), ca=True)
        self.certificate = self._parsed.public_bytes(Encoding.PEM)

    def issue(self, common_name: str, *alternatives: str) -> tuple[bytes, bytes]:
        """Return a certificate and its key; ``alternatives`` are DNS names."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = [x509.DNSName(each) for each in alternatives]
        certificate = self._sign(subject(common_name), key.public_key(), names)
        return certificate.public_bytes(Encoding.PEM), key.private_bytes(
            Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()
        )

    def revoke(self, certificate: bytes) -> None:
        """Have later lists name this certificate."""
        number = x509.load_pem_x509_certificate(certificate).serial_number
        builder = x509.RevokedCertificateBuilder().serial_number(number).revocation_date(SINCE)
        self._revoked.append(builder.build())

    def revocations(self) -> bytes:
        """Return the certificate revocation list of now."""
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._name)
            .last_update(SINCE)
            .next_update(UNTIL)
            .add_extension(x509.CRLNumber(len(self._revoked)), critical=False)
            .add_extension(self._authority_key(), critical=False)
        )
        for each in self._revoked:
            builder = builder.add_revoked_certificate(each)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)

    def _authority_key(self) -> x509.AuthorityKeyIdentifier:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())

    def _sign(
        self,
        name: x509.Name,
        key: ec.EllipticCurvePublicKey,
        alternatives: list[x509.DNSName] | None = None,
        *,
        ca: bool = False,
    ) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(SINCE)
            .not_valid_after(UNTIL)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(self._authority_key(), critical=False)
        )
        if alternatives:
            names = x509.SubjectAlternativeName(alternatives)
            builder = builder.add_extension(names, critical=False)
        return builder.sign(self._key, hashes.SHA256())
