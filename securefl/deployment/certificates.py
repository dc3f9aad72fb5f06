"""X.509 as a consortium uses it: one root, one certificate a participant, keys of RSA-3072.

RSA because FLARE signs jobs and challenges with RSA-PSS (nvflare.lighter.utils.sign_content). A
site's certificate is good for clients only: it can never be shown as the server's. Certificates
begin a day before they are made, so that a clock which is an hour off does not break a connection.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, NoReturn, final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.asymmetric.rsa import (
    RSAPrivateKey,
    RSAPublicKey,
    generate_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from securefl.config import ConfigurationError

ROOT_DAYS: Final = 3650
DAYS: Final = 360
BEFORE: Final = timedelta(days=1)
"""How long before they are made certificates begin."""

_BITS: Final = 3072
_PSS: Final = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.DIGEST_LENGTH)
_PEM: Final = serialization.Encoding.PEM
_SPKI: Final = serialization.PublicFormat.SubjectPublicKeyInfo


def make_key() -> RSAPrivateKey:
    """A new TLS key, from the operating system's entropy."""
    return generate_private_key(public_exponent=65537, key_size=_BITS)


def key_pem(key: RSAPrivateKey) -> bytes:
    """The private key as PEM, not encrypted: FLARE reads it at every start, without a person."""
    return key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def read_key(path: Path) -> RSAPrivateKey:
    """The private key in `path`. Raises ConfigurationError: there is none, others may read it."""
    try:
        others = path.stat().st_mode & 0o077
        pem = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(
            f"cannot read {path}: {error.strerror}; it is made once, and never handed out twice: "
            "restore it from a copy, or ask for a kit under a new name"
        ) from None
    if others:
        raise ConfigurationError(f"{path} can be read by others: chmod 600 {path}")
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError):
        raise ConfigurationError(f"{path} holds no key: restore it from a copy") from None
    if not isinstance(key, RSAPrivateKey):
        raise ConfigurationError(f"{path} holds another kind of key than RSA: restore it")
    return key


def read_certificate(path: Path) -> x509.Certificate:
    """The certificate in `path`. Raises ConfigurationError when there is none."""
    try:
        return parse_certificate(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigurationError(
            f"cannot read {path}: {error.strerror}; install the kit again "
            "(`securefl consortium update FOLDER --kit KIT`)"
        ) from None


def parse_certificate(pem: bytes, origin: str) -> x509.Certificate:
    """The certificate in `pem`. Raises ConfigurationError that names `origin`."""
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise ConfigurationError(
            f"{origin} holds no certificate: install the kit again "
            "(`securefl consortium update FOLDER --kit KIT`)"
        ) from None


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """The certificate as PEM."""
    return certificate.public_bytes(_PEM)


def public_bytes(key: RSAPublicKey) -> bytes:
    """The public key as DER (SubjectPublicKeyInfo): what is compared, and fingerprinted."""
    return key.public_bytes(serialization.Encoding.DER, _SPKI)


def public_key(holder: x509.Certificate | x509.CertificateSigningRequest) -> RSAPublicKey:
    """The RSA key in a certificate or request. Raises ConfigurationError when it is another."""
    key = holder.public_key()
    if not isinstance(key, RSAPublicKey) or key.key_size < _BITS:
        raise ConfigurationError(
            f"the key is not RSA of {_BITS} bits or more: make it with `securefl site enroll`"
        )
    return key


def name_of(certificate: x509.Certificate) -> str:
    """The name that the certificate is for (its common name)."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


def check_issued(certificate: x509.Certificate, root: x509.Certificate) -> None:
    """Raise ConfigurationError unless `root` signed the certificate. Says nothing of the time."""
    try:
        certificate.verify_directly_issued_by(root)
    except (ValueError, TypeError, InvalidSignature):
        raise ConfigurationError(
            f'the certificate of "{name_of(certificate)}" was not issued by this consortium: '
            "install the kit that its keeper made"
        ) from None


def sign_request(key: RSAPrivateKey, name: str, signing_key: bytes) -> bytes:
    """A certificate signing request (PEM) that also names the Ed25519 key, 32 bytes."""
    bound = x509.UniformResourceIdentifier(f"urn:securefl:ed25519:{signing_key.hex()}")
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .add_extension(x509.SubjectAlternativeName([bound]), critical=False)
        .sign(key, hashes.SHA256())
        .public_bytes(_PEM)
    )


def parse_request(pem: bytes, name: str, signing_key: bytes) -> x509.CertificateSigningRequest:
    """The request, whose maker holds its key. Raises ValueError: of another name or Ed25519 key."""
    request = x509.load_pem_x509_csr(pem)
    names = request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    try:
        bound = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise ValueError("it names no Ed25519 key") from None
    uris = bound.get_values_for_type(x509.UniformResourceIdentifier)
    if not request.is_signature_valid:
        raise ValueError("its signature is not valid")
    if [part.value for part in names] != [name]:
        raise ValueError("it is for another name")
    if uris != [f"urn:securefl:ed25519:{signing_key.hex()}"]:
        raise ValueError("it is for another Ed25519 key")
    return request


@final
@dataclass(frozen=True, slots=True)
class Root:
    """The consortium's certification authority. Whoever holds its key can admit anyone."""

    certificate: x509.Certificate
    key: RSAPrivateKey = field(repr=False)

    @classmethod
    def make(cls, consortium: str, now: datetime) -> Root:
        """A new root for `consortium`, good for ten years."""
        key = make_key()
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, consortium)])
        public = key.public_key()
        certificate = (
            _builder(name, name, public, now, now + timedelta(days=ROOT_DAYS), public)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(authority=True), critical=True)
            .sign(key, hashes.SHA256())
        )
        return cls(certificate, key)

    def issue(
        self,
        name: str,
        key: RSAPublicKey,
        now: datetime,
        days: int,
        *,
        host: str | None = None,
        role: str | None = None,
    ) -> x509.Certificate:
        """A certificate for `key`, for `days` days, and no longer than the root's own.

        host: the name or IP address that a server is reached by; None for a client.
        role: what FLARE may let an administrator do (nvflare reads it as unstructuredName).

        Raises ConfigurationError when the root has expired.
        """
        end = min(now + timedelta(days=days), self.certificate.not_valid_after_utc)
        if end <= now:
            raise ConfigurationError(
                "the consortium's own certificate has expired: make a new one with "
                "`securefl consortium new`, and enrol the sites again"
            )
        parts = [
            x509.NameAttribute(NameOID.COMMON_NAME, name),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, name),
        ]
        if role is not None:
            parts.append(x509.NameAttribute(NameOID.UNSTRUCTURED_NAME, role))
        purposes = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if host is not None:
            purposes.append(ExtendedKeyUsageOID.SERVER_AUTH)
        builder = (
            _builder(
                x509.Name(parts),
                self.certificate.subject,
                key,
                now,
                end,
                self.key.public_key(),
            )
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        )
        if host is not None:
            names = x509.SubjectAlternativeName([_general_name(host)])
            builder = builder.add_extension(names, critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def sign(self, statement: bytes) -> bytes:
        """RSA-PSS over `statement`, as `check_signature` reads it."""
        return self.key.sign(statement, _PSS, hashes.SHA256())

    def __reduce__(self) -> NoReturn:
        raise TypeError("a root's key is not serialised")


def check_signature(root: x509.Certificate, signature: bytes, statement: bytes) -> None:
    """Raise ValueError unless the root's key signed `statement`."""
    try:
        public_key(root).verify(signature, statement, _PSS, hashes.SHA256())
    except InvalidSignature:
        raise ValueError("the signature is not this consortium's") from None


def now_utc() -> datetime:
    """The time, to the second."""
    return datetime.now(UTC).replace(microsecond=0)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: RSAPublicKey,
    now: datetime,
    end: datetime,
    signer: RSAPublicKey,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BEFORE)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=not authority,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.DNSName | x509.IPAddress:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
