"""Throw-away certificates for one control plane; nothing here is meant to be safe beyond loopback."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

# The training-operator replaces what ends within 90 days.
_VALID_FOR = datetime.timedelta(days=365)


@dataclass(frozen=True)
class KeyPair:
    """A certificate and its private key, as PEM."""

    certificate: bytes
    key: bytes

    def write(self, folder: Path, name: str) -> tuple[Path, Path]:
        """Write `<name>.crt` and `<name>.key` and return their paths."""
        certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
        certificate.write_bytes(self.certificate)
        key.touch(mode=0o600)
        key.write_bytes(self.key)
        return certificate, key


class Authority:
    """A certificate authority that lives as long as one control plane."""

    def __init__(self, name: str) -> None:
        self._key = _new_key()
        self._certificate = (
            _builder(_name(name), _name(name), self._key)
            # The training-operator checks that its CA is valid for its own name, as a server is.
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.pair = _pem(self._certificate, self._key)

    def server(self, *names: str) -> KeyPair:
        """Issue a serving certificate for loopback and the given DNS names or addresses."""
        key = _new_key()
        alternatives = [_alternative(name) for name in ("localhost", "127.0.0.1", *names)]
        certificate = (
            _builder(_name(names[0] if names else "localhost"), self._certificate.subject, key)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return _pem(certificate, key)

    def client(self, user: str, *groups: str) -> KeyPair:
        """Issue a client certificate that authenticates as a user in groups."""
        key = _new_key()
        certificate = (
            _builder(_name(user, *groups), self._certificate.subject, key)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return _pem(certificate, key)


def signing_key() -> bytes:
    """Return a private key, as PEM, for signing service account tokens."""
    return _private_pem(_new_key())


def _new_key() -> rsa.RSAPrivateKey:
    # RSA because the training-operator's certificate rotation reads nothing else.
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def _name(common_name: str, *groups: str) -> x509.Name:
    organizations = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups]
    return x509.Name([*organizations, x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _builder(subject: x509.Name, issuer: x509.Name, key: rsa.RSAPrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + _VALID_FOR)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_encipherment=True,
        key_cert_sign=signs_certificates,
        content_commitment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate, key: rsa.RSAPrivateKey) -> KeyPair:
    return KeyPair(certificate.public_bytes(Encoding.PEM), _private_pem(key))


def _private_pem(key: rsa.RSAPrivateKey) -> bytes:
    # "Traditional" is PKCS#1, the one format that the training-operator's certificate rotation reads.
    return key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
