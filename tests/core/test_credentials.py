"""Content Credentials: signed, checked, tampered with, and kept. Needs c2pa-python."""

from __future__ import annotations

import json
import sys
from io import BytesIO

import pytest
from PIL import Image

from amg_core import optional
from amg_core.errors import AMGError
from amg_core.record import check_picture, credentials, encoded, stored, verified
from tests.core.test_record import bad, copied, matcher, place  # noqa: F401
from tests.index.helpers import paint

TEXTS = {"prompt": '{"1": {}}', "workflow": '{"nodes": []}'}


@pytest.fixture(scope="module", autouse=True)
def c2pa():
    return pytest.importorskip("c2pa", reason="needs c2pa-python")


@pytest.fixture(scope="module")
def identity(c2pa):
    return credentials.for_tests()


@pytest.fixture(scope="module", params=list(credentials.MIMES))
def signed(request, identity, matcher):  # noqa: F811
    """(kind, picture with metadata and record, the same signed, the record)."""
    kind = request.param
    record = check_picture(matcher, encoded.encode(paint(3), kind, TEXTS))
    data = encoded.encode(paint(3), kind, TEXTS | {stored.KEY: json.dumps(record)})
    made = credentials.sign(data, kind, identity, title="a", record=record)
    return kind, data, made, record


def test_signed_and_valid(signed):
    kind, data, made, record = signed
    found = credentials.read(made, kind)
    assert found.valid and found.test and not found.trusted
    assert found.source_type == credentials.SOURCE_TYPE and found.time == ""
    assert found.record == record and found.ingredients == ()
    assert credentials.read(data, kind) is None
    assert credentials.present(made) and not credentials.present(data)
    assert "TEST" in found.signer and "no identity" in found.signer


def test_the_workflow_survives(signed):
    _, data, made, _ = signed
    assert dict(stored.texts(made)) == dict(stored.texts(data))
    assert TEXTS.items() <= dict(stored.texts(made)).items()
    with Image.open(BytesIO(made)) as after, Image.open(BytesIO(data)) as before:
        assert after.tobytes() == before.tobytes()
    assert b"Iptc4xmpExt:DigitalSourceType" in made


def test_one_flipped_bit_is_seen(signed, tmp_path):
    """Anywhere in the pixels, the metadata and the record. What C2PA leaves empty is not signed."""
    kind, data, made, _ = signed
    picture = tmp_path / "a"
    places = [made.index(part) for part in (b"workflow", b"trainedAlgorithmicMedia", b'"picture"')]
    places += [made.rindex(b"c2pa.actions"), made.rindex(b'recreates"'), len(made) - 20]
    if kind == "PNG":
        places += [made.index(bytes(99)) + 9, made.index(b"IDAT") + 9, len(made) - 1]
    for at in places:
        altered = bytearray(made)
        altered[at] ^= 1
        picture.write_bytes(bytes(altered))
        assert bad(verified.verify(picture)) & {"signature", "file"}, at
    assert credentials.read(made, kind).valid and len(data) < len(made)


def test_pixels_that_were_changed_break_the_signature(signed, tmp_path):
    kind, _, made, _ = signed
    start = {"PNG": b"IDAT", "JPEG": b"\xff\xda", "WEBP": b"VP8 "}[kind]
    altered = bytearray(made)
    altered[made.rindex(start) + 200] ^= 1
    found = credentials.read(bytes(altered), kind)
    assert "assertion.dataHash.mismatch" in found.faults


def test_verified_with_everything(signed, tmp_path, matcher):  # noqa: F811
    _, _, made, _ = signed
    picture = tmp_path / "a.png"
    picture.write_bytes(made)
    findings = verified.verify(picture, matcher)
    assert bad(findings) == set()
    assert {"signature", "record", "pixels", "index", "scores", "answer"} <= {
        finding.what for finding in findings
    }
    (signature,) = [finding for finding in findings if finding.what == "signature"]
    assert "proves no identity" in signature.words and "without a time stamp" in signature.words


def test_a_text_added_afterwards_breaks_it(signed, tmp_path):
    kind, _, made, _ = signed
    texts = dict(stored.texts(made)) | {"more": "1"}
    again = encoded.encode(Image.open(BytesIO(made)), kind, texts)
    assert not credentials.present(again)  # other programs drop credentials as they save
    if kind == "PNG":
        at = made.index(b"IEND") - 4
        chunk = b"\0\0\0\x05tEXta\0b c\x83\xd1\xcf\xd4"
        assert not credentials.read(made[:at] + chunk + made[at:], kind).valid


def test_existing_credentials_are_kept(signed, identity):
    kind, data, made, record = signed
    used = credentials.Ingredient("sketch", made)
    derived = credentials.sign(data, kind, identity, record=record, ingredients=[used])
    found = credentials.read(derived, kind)
    assert found.valid and found.ingredients == found.credited == ("sketch",)
    again = credentials.sign(made, kind, identity, title="b", record=record)
    found = credentials.read(again, kind)
    assert found.valid and found.credited == ("b",) and found.record == record
    plain = credentials.Ingredient("photo", data)
    found = credentials.read(credentials.sign(data, kind, identity, ingredients=[plain]), kind)
    assert found.ingredients == ("photo",) and found.credited == ()


def test_ones_own_certificate(tmp_path, identity, signed):
    kind, data, _, _ = signed
    with pytest.raises(AMGError, match=r"certificate\.pem"):
        credentials.of_folder(tmp_path)
    (tmp_path / credentials.CERTIFICATE).write_bytes(identity.certificate)
    with pytest.raises(AMGError, match=r"key\.pem"):
        credentials.of_folder(tmp_path)
    (tmp_path / credentials.KEY).write_bytes(identity.key)
    own = credentials.of_folder(tmp_path)
    assert (own.algorithm, own.time_stamp, own.test) == ("es256", "", False)
    assert identity.key.decode()[60:90] not in repr(own)
    assert credentials.read(credentials.sign(data, kind, own), kind).valid
    (tmp_path / credentials.TIME_STAMP).write_text("http://time.example\n")
    assert credentials.of_folder(tmp_path).time_stamp == "http://time.example"
    (tmp_path / credentials.KEY).write_text("no key")
    with pytest.raises(AMGError, match="no private key"):
        credentials.of_folder(tmp_path)
    other = credentials.for_tests.__wrapped__()
    wrong = credentials.Identity(identity.certificate, other.key, "es256")
    try:  # refused, or found out by who checks it
        made = credentials.sign(data, kind, wrong)
    except AMGError:
        return
    assert not credentials.read(made, kind).valid


@pytest.mark.parametrize(("kind", "algorithm"), [("rsa", "ps256"), ("ed25519", "ed25519")])
def test_kinds_of_keys(tmp_path, kind, algorithm):
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

    makers = {
        "rsa": lambda: rsa.generate_private_key(65537, 2048),
        "ed25519": ed25519.Ed25519PrivateKey.generate,
    }
    pem = form.Encoding.PEM, form.PrivateFormat.PKCS8
    key = makers[kind]()
    (tmp_path / credentials.CERTIFICATE).write_text("chain")
    (tmp_path / credentials.KEY).write_bytes(key.private_bytes(*pem, form.NoEncryption()))
    assert credentials.of_folder(tmp_path).algorithm == algorithm
    locked = key.private_bytes(*pem, form.BestAvailableEncryption(b"secret"))
    (tmp_path / credentials.KEY).write_bytes(locked)
    with pytest.raises(AMGError, match="password"):
        credentials.of_folder(tmp_path)


def test_without_the_package(signed, monkeypatch, tmp_path):
    """It says what to install, and that nothing was checked."""
    kind, data, made, _ = signed
    monkeypatch.setitem(sys.modules, "c2pa", None)
    monkeypatch.setattr(optional, "_broken", {})
    with pytest.raises(AMGError, match="pip install c2pa-python"):
        credentials.sign(data, kind, credentials.Identity(b"", b"", "es256"))
    picture = tmp_path / "a.png"
    picture.write_bytes(made)
    findings = verified.verify(picture)
    (signature,) = [finding for finding in findings if finding.what == "signature"]
    assert signature.good is None and "NOT checked" in signature.words
