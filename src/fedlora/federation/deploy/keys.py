"""Certificates and keys of a federation, in files readable only by their owner."""

from __future__ import annotations

import datetime
import ipaddress
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

YEARS = 2
_USAGES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
    *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


class Authority(NamedTuple):
    """The certificate authority that signs a federation's certificates."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate


def make_authority(key: ec.EllipticCurvePrivateKey | None = None) -> Authority:
    """Creates a certificate authority.

    Args:
        key: its key; by default a new one.
    """
    key = key or ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedlora federation")])
    builder = _certificate(name, name, key.public_key())
    builder = builder.add_extension(x509.BasicConstraints(True, 0), critical=True)
    builder = builder.add_extension(_usage("key_cert_sign", "crl_sign", "digital_signature"), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    return Authority(key, builder.sign(key, hashes.SHA384()))


def make_server(authority: Authority, host: str) -> tuple[bytes, bytes]:
    """A server's key and certificate, as PEM, valid only for ``host`` and for this machine (loopback).

    Args:
        authority: signs the certificate.
        host: name or address by which sites reach the server.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    return private_pem(key), sign_server(authority, host, key.public_key())


def sign_server(authority: Authority, host: str, key: CertificatePublicKeyTypes) -> bytes:
    """A certificate of a server's key, as PEM; see ``make_server``."""
    names: list[x509.GeneralName] = [x509.DNSName("localhost"), _ip("127.0.0.1"), _ip("::1")]
    try:
        names.append(_ip(host))
    except ValueError:
        names.append(x509.DNSName(host))
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])])
    signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    builder = _certificate(subject, authority.certificate.subject, key)
    builder = builder.add_extension(x509.SubjectAlternativeName(list(dict.fromkeys(names))), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(False, None), critical=True)
    builder = builder.add_extension(_usage("digital_signature"), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    builder = builder.add_extension(signer, critical=False)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    return certificate_pem(builder.sign(authority.key, hashes.SHA384()))


def make_site() -> tuple[bytes, bytes]:
    """A site's private and public key, in OpenSSH's format."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return private, public + b"\n"


def public_point(public: bytes) -> bytes:
    """What tells a site's public key from another's: its file without the comment.

    Raises:
        ValueError: it is not a public key of the type that sites have.
    """
    try:
        key = serialization.load_ssh_public_key(public)
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError("it is of another type than ECDSA")
    point: bytes = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return point


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as PEM."""
    pem: bytes = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return pem


def load_private(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """The inverse of ``private_pem``.

    Raises:
        ValueError: it is not such a key.
    """
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (TypeError, UnsupportedAlgorithm) as error:  # encrypted, or of an unknown type
        raise ValueError(str(error)) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("the authority's key is of another type than ECDSA")
    return key


def load_certificate(pem: bytes) -> x509.Certificate:
    """The inverse of ``certificate_pem``.

    Raises:
        ValueError: it is not a certificate.
    """
    return x509.load_pem_x509_certificate(pem)


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """A certificate as PEM."""
    pem: bytes = certificate.public_bytes(serialization.Encoding.PEM)
    return pem


def _certificate(subject: x509.Name, issuer: x509.Name, key: CertificatePublicKeyTypes) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=365 * YEARS))
    )


def _usage(*allowed: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{name: name in allowed for name in _USAGES})


def _ip(text: str) -> x509.IPAddress:
    return x509.IPAddress(ipaddress.ip_address(text))
