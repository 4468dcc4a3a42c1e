"""Content Credentials (C2PA): a signed statement in a picture of how it was made, with its record.

The package `c2pa-python` does it, and is optional. Nothing here goes to the network, except for a time
stamp, and only if the folder of the certificate has the address of a server for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import cache
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

from .. import __version__
from ..errors import AMGError
from ..files import brief, read_bounded
from ..optional import needed, optional
from .checked import Record, readable

LABEL = "org.anti-memorization.report"  # of the assertion that holds the record
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
PROGRAM = "Anti-Memorization Guidance"
STEP = "pip install c2pa-python"
CERTIFICATE, KEY, TIME_STAMP = "certificate.pem", "key.pem", "time_stamp_server.txt"
TEST_NAME = "TEST CERTIFICATE - proves no identity"
TEST_DAYS = 30
MOST = 1 << 20  # bytes of a certificate or key
UNTRUSTED = "signingCredential.untrusted"
MIMES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
_BOX = b"jumb"  # every store of credentials in a file begins with such a box …
_STORE = b"c2pa"  # … and carries this


@dataclass(frozen=True)
class Identity:
    """What signs: a chain of certificates and the private key (PEM), and the algorithm of C2PA.

    `time_stamp` is the address of a time-stamp server, "" for none. `test` says that the certificate was
    made here and proves nothing.
    """

    certificate: bytes
    key: bytes
    algorithm: str
    time_stamp: str = ""
    test: bool = False

    def __repr__(self) -> str:  # the key never reaches a log
        return f"Identity(algorithm={self.algorithm!r}, test={self.test})"


@dataclass(frozen=True)
class Ingredient:
    """A picture that went into another one: its name and its file."""

    title: str
    data: bytes


@dataclass(frozen=True)
class Credentials:
    """The Content Credentials of a file.

    Attributes
    ----------
    faults : tuple of str
        C2PA's codes for what is wrong, () if the signature is valid and the file unchanged.
    trusted : bool
        Whether the certificate is on a list of trust. Self-made ones are not.
    signer, time : str
        The name in the certificate, and the time stamp (ISO 8601), "" without one.
    test : bool
        Whether the signer is a test certificate of this program.
    record : dict or None
        Our assertion, if it has the form of a record.
    ingredients : tuple of str
        Titles of the pictures that went into it. `credited` are those with credentials of their own.
    source_type : str
        IPTC's digital source type of the first action.
    """

    faults: tuple[str, ...]
    trusted: bool
    signer: str
    time: str
    test: bool
    record: Record | None
    ingredients: tuple[str, ...]
    credited: tuple[str, ...]
    source_type: str

    @property
    def valid(self) -> bool:
        return not self.faults


def available() -> bool:
    """Whether credentials can be made and checked here."""
    return optional("c2pa") is not None


def present(data: bytes) -> bool:
    """Whether a file seems to carry Content Credentials. Needs no package."""
    at = data.find(_BOX)
    return at >= 0 and _STORE in data[at : at + 256]


def of_folder(folder: Path) -> Identity:
    """The artist's own identity: CERTIFICATE (the chain) and KEY in a folder, and TIME_STAMP if wanted.

    Raises
    ------
    AMGError
        A file is missing or unusable. The message says which, and what belongs there.
    """
    _package("Signing")
    parts = []
    for name, what in ((CERTIFICATE, "your certificate with its chain"), (KEY, "its private key")):
        try:
            parts.append(read_bounded(folder / name, MOST))
        except OSError as error:
            raise AMGError(
                f"{folder / name} cannot be read ({brief(error)}): put {what} there, as PEM. Or "
                f"choose the test certificate, or no credentials."
            ) from None
    chain, key = parts
    address = ""
    with suppress(FileNotFoundError):
        address = read_bounded(folder / TIME_STAMP, MOST).decode("utf-8", "replace").strip()
    return Identity(chain, key, _algorithm(key, folder / KEY), address)


def _algorithm(key: bytes, path: Path) -> str:
    """C2PA's name of the signature that fits a private key."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    try:
        private = serialization.load_pem_private_key(key, None)
    except TypeError:
        raise AMGError(f"{path} is locked by a password: give the key without one.") from None
    except ValueError as error:
        raise AMGError(f"{path} is no private key in PEM ({brief(error)}): replace it.") from None
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(private, rsa.RSAPrivateKey):
        return "ps256"
    curves = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
    if isinstance(private, ec.EllipticCurvePrivateKey) and private.curve.name in curves:
        return curves[private.curve.name]
    raise AMGError(f"{path} is of a kind that C2PA does not allow: use P-256, Ed25519 or RSA.")


@cache
def for_tests() -> Identity:
    """A test identity, made anew for each process. Its name says that it proves nothing."""
    _package("Signing")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def name(text: str) -> x509.Name:
        organisation = x509.NameAttribute(NameOID.ORGANIZATION_NAME, TEST_NAME)
        return x509.Name([organisation, x509.NameAttribute(NameOID.COMMON_NAME, text)])

    root, own = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer, now = name(f"{TEST_NAME} (root)"), datetime.now(timezone.utc)

    def certificate(subject: x509.Name, key: ec.EllipticCurvePublicKey, root_of_all: bool) -> bytes:
        usage = dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
             "encipher_only", "decipher_only"), False,
        )  # fmt: skip
        usage |= {"digital_signature": not root_of_all, "key_cert_sign": root_of_all}
        parts: list[tuple[x509.ExtensionType, bool]] = [
            (x509.BasicConstraints(root_of_all, None), True),
            (x509.KeyUsage(**usage, crl_sign=root_of_all), True),
            (x509.SubjectKeyIdentifier.from_public_key(key), False),
            (x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key()), False),
        ]
        if not root_of_all:
            parts.append((x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), False))
        made = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
        made = made.serial_number(x509.random_serial_number())
        made = made.not_valid_before(now - timedelta(days=1))
        made = made.not_valid_after(now + timedelta(days=TEST_DAYS))
        for extension, critical in parts:
            made = made.add_extension(extension, critical)
        return bytes(made.sign(root, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    chain = certificate(name(TEST_NAME), own.public_key(), False)
    chain += certificate(issuer, root.public_key(), True)
    pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    key = own.private_bytes(*pem, serialization.NoEncryption())
    return Identity(chain, key, "es256", test=True)


def sign(
    picture: bytes,
    kind: str,
    identity: Identity,
    *,
    title: str = "",
    record: Mapping[str, Any] | None = None,
    ingredients: Sequence[Ingredient] = (),
    agent: Mapping[str, str] | None = None,
) -> bytes:
    """A picture file with Content Credentials. Nothing in it may change afterwards.

    Parameters
    ----------
    picture : bytes
        The finished file with all its metadata. If it has credentials already, they are kept: it is then
        an ingredient of itself, and the action is "edited".
    kind : str
        A key of MIMES.
    record : mapping, optional
        Becomes our assertion, LABEL.
    ingredients : sequence of Ingredient
        Pictures that went into it. Their credentials are kept.
    agent : mapping, optional
        The program that drew: "name" and "version".

    Raises
    ------
    AMGError
        c2pa-python is missing or broken, or it refuses certificate, key or file.
    """
    package, mime = _package("Signing"), MIMES[kind]
    before = present(picture)
    action: dict[str, Any] = {"action": "c2pa.opened"} if before else {
        "action": "c2pa.created", "digitalSourceType": SOURCE_TYPE,
    }  # fmt: skip
    if agent:
        action["softwareAgent"] = dict(agent)
    assertions: list[dict[str, Any]] = []
    if not before:
        assertions.append({"label": "c2pa.actions.v2", "data": {"actions": [action]}})
    if record is not None:
        # As a text: c2pa hands lists of small numbers back as bytes.
        data = {"schema": record["schema"], "record": json.dumps(record)}
        assertions.append({"label": LABEL, "data": data})
    manifest = {
        "claim_generator_info": [{"name": PROGRAM, "version": __version__}],
        "title": title,
        "format": mime,
        "assertions": assertions,
    }
    settings = {"builder": {"thumbnail": {"enabled": False}}, "verify": _OFFLINE}
    out = BytesIO()
    try:
        signer = package.Signer.from_info(
            package.C2paSignerInfo(
                identity.algorithm, identity.certificate, identity.key, identity.time_stamp or None
            )
        )
        context = package.Context(package.Settings.from_dict(settings))
        with package.Builder(json.dumps(manifest), context) as builder:
            if before:
                builder.set_intent(package.C2paBuilderIntent.EDIT)
                parent = {"title": title, "relationship": "parentOf"}
                builder.add_ingredient(json.dumps(parent), mime, BytesIO(picture))
            for one in ingredients:
                used = {"title": one.title, "relationship": "inputTo"}
                builder.add_ingredient(json.dumps(used), _mime(one.data), BytesIO(one.data))
            builder.sign(signer, mime, BytesIO(picture), out)
    except package.C2paError as error:
        raise AMGError(
            f"The picture cannot be signed ({brief(error)}): check the certificate and its key, or "
            f"choose no credentials."
        ) from error
    return out.getvalue()


_OFFLINE = {"remote_manifest_fetch": False, "ocsp_fetch": False}


def read(data: bytes, kind: str) -> Credentials | None:
    """The Content Credentials of a file of that kind, checked, or None if it has none.

    Raises
    ------
    AMGError
        c2pa-python is missing or broken, or the credentials are damaged beyond reading.
    """
    package = _package("Checking Content Credentials")
    context = package.Context(package.Settings.from_dict({"verify": _OFFLINE}))
    try:
        with package.Reader(MIMES[kind], BytesIO(data), context=context) as reader:
            found = json.loads(reader.json())
    except package.C2paError.ManifestNotFound:
        return None
    except package.C2paError as error:
        raise AMGError(f"Its Content Credentials are damaged ({brief(error)}).") from None
    return _parsed(found)


def _parsed(found: dict[str, Any]) -> Credentials:
    active = found.get("manifests", {}).get(found.get("active_manifest"), {})
    results = found.get("validation_results", {}).get("activeManifest", {})
    codes = [str(each.get("code")) for each in results.get("failure", [])]
    faults = tuple(dict.fromkeys(code for code in codes if code != UNTRUSTED))
    if found.get("validation_state") == "Invalid" and not faults:
        faults = ("invalid",)
    assertions = {each.get("label"): each.get("data") for each in active.get("assertions", [])}
    actions = (assertions.get("c2pa.actions.v2") or {}).get("actions") or [{}]
    record: Record | None = None
    with suppress(AMGError, ValueError, TypeError, KeyError, RecursionError):
        record = readable(json.loads(assertions[LABEL]["record"]))
    signature = active.get("signature_info") or {}
    signer = str(signature.get("common_name") or signature.get("issuer") or "")
    used = active.get("ingredients", [])
    return Credentials(
        faults=faults,
        trusted=UNTRUSTED not in codes,
        signer=signer,
        time=str(signature.get("time") or ""),
        test=signer == TEST_NAME,
        record=record,
        ingredients=tuple(str(one.get("title", "")) for one in used),
        credited=tuple(str(one.get("title", "")) for one in used if one.get("active_manifest")),
        source_type=str(actions[0].get("digitalSourceType", "")),
    )


def _mime(data: bytes) -> str:
    """The MIME type of an ingredient, by its first bytes."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "image/png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return "image/jpeg"


def _package(purpose: str) -> ModuleType:
    """c2pa and cryptography, which comes with it. AMGError if they are missing or broken."""
    needed("cryptography", purpose, STEP)
    return needed("c2pa", purpose, STEP, ("Builder", "Reader", "Signer", "Context", "Settings"))
