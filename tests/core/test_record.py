"""Records: their schema, what they say, and what a changed picture does to them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from amg_core import report
from amg_core.descriptors import create
from amg_core.errors import AMGError
from amg_core.index import Index, build
from amg_core.index.picture import Unreadable, stored_pixels
from amg_core.index.search import Searcher
from amg_core.record import (
    check_picture,
    checked,
    credentials,
    decided,
    readable,
    stored,
    verified,
)
from amg_core.record import encoded as written
from amg_core.similarity.matcher import Matcher
from tests.core.test_report import compose
from tests.index.helpers import encoded, fill, paint

SCHEMA = json.loads((Path(report.__file__).with_name("report.schema.json")).read_text("utf-8"))


@pytest.fixture(scope="module")
def valid():
    """`valid(report)`: nothing, or an error of the schema."""
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema")
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    return lambda given: jsonschema.Draft202012Validator(SCHEMA).validate(given)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("records")
    fill(root / "train", 12)
    (root / "train" / "p003.txt").write_text("the secret hero")
    build(root / "train", root / "index", create("pixel"))
    return root


@pytest.fixture(scope="module")
def matcher(place):
    with Index.open(place / "index") as index:
        yield Matcher(Searcher(index), create("pixel"))


@pytest.fixture(scope="module")
def copied(matcher):
    """The full record of a copy of p003.png."""
    return check_picture(matcher, encoded(3), beside=True, privacy=report.FULL)


# ------------------------------------------------------------------------------- the schema


def test_reports_of_runs_fit_the_schema(valid):
    valid(compose([0.1], [0.9, 0.2], seed=7, retries=2))
    valid(compose([0.9], if_still_copied="blank"))
    whole = compose([0.1], [0.9, 0.2], seed=7)
    valid(report.travelling(whole))
    valid(report.travelling(whole, report.FULL))


def test_the_schema_asks_for_what_readers_ask_for():
    assert set(SCHEMA["required"]) == set(report._SHAPE)
    assert {"picture", *SCHEMA["dependentRequired"]["picture"]} == set(checked.SHAPE)
    assert SCHEMA["properties"]["schema"]["const"] == report.SCHEMA


def test_records_fit_the_schema(valid, matcher, copied):
    valid(copied)
    valid(check_picture(matcher, encoded(500)))
    drawn = compose([0.1], [0.9, 0.2], seed=7)
    valid(check_picture(matcher, encoded(500), report=drawn, sample=1))


@pytest.mark.parametrize(
    ("at", "wrong"),
    [
        (("schema",), "amg-report/1"),
        (("picture", "pixels"), "abc"),
        (("answer", "recreates"), "maybe"),
        (("nearest", 0, "row"), "3"),
        (("limits",), {}),
        (("models",), None),
    ],
)
def test_what_does_not_fit_is_refused(valid, copied, at, wrong):
    broken = json.loads(json.dumps(copied))
    *path, last = at
    inner = broken
    for key in path:
        inner = inner[key]
    inner[last] = wrong
    import jsonschema

    with pytest.raises(jsonschema.ValidationError):
        valid(broken)
    with pytest.raises(AMGError):
        readable(broken)
    del broken[at[0]]
    with pytest.raises(AMGError):
        readable(broken)


@pytest.mark.parametrize("wrong", [None, [], {}, "x", True, float("nan"), 10**400, -1e9])
def test_hostile_records_are_refused(copied, wrong):
    """Whatever stands where a reader takes something out."""
    places = [
        ("index", "hash"), ("index", "count"), ("answer", "recreates"), ("answer", "reason"),
        ("picture", "pixels"), ("nearest", 0), ("nearest", 0, "row"), ("nearest", 0, "score"),
        ("limits", "likeness"), ("limits", "composition", "limit"), ("verdicts",), ("verdicts", 0),
        ("verdicts", 0, "neighbor"), ("verdicts", 0, "score"), ("verdicts", 0, "source"),
    ]  # fmt: skip
    for *path, last in places:
        broken = json.loads(json.dumps(copied))
        inner = broken
        for key in path:
            inner = inner[key]
        if (
            isinstance(wrong, str)
            and isinstance(inner[last], str)
            and last in ("reason", "hash", "source")
        ):
            continue  # any text may stand there
        inner[last] = wrong
        with pytest.raises(AMGError, match="damaged"):
            readable(broken)


# ------------------------------------------------------------------------------- a record


def test_a_copy_is_answered_with_yes(copied, matcher):
    assert copied["answer"]["recreates"] == "yes" and "p003.png" in copied["answer"]["reason"]
    assert copied["index"]["hash"] == matcher.index.hash and copied["index"]["count"] == 12
    assert copied["index"]["created"] == matcher.index.created
    first, *rest = copied["nearest"]
    assert (first["row"], first["source"], first["caption"]) == (3, "p003.png", "the secret hero")
    assert first["score"] > 0.99 and first["composition"] > copied["limits"]["composition"]["limit"]
    assert len(rest) == 4 and all(near["score"] < first["score"] for near in rest)
    assert copied["limits"]["likeness"]["false_alarms"] == 0.01
    assert (copied["picture"]["width"], copied["picture"]["height"]) == (40, 30)


def test_another_picture_is_answered_with_no(matcher):
    record = check_picture(matcher, encoded(500))
    assert record["answer"]["recreates"] == "no" and record["verdicts"][0]["outcome"] == "no_copy"


def test_an_anonymous_record_names_nothing(matcher, copied):
    models = [{"kind": "loras", "name": "client.safetensors", "sha256": "a" * 64}]
    named = check_picture(matcher, encoded(3), privacy=report.FULL, models=models)
    silent = check_picture(matcher, encoded(3), models=models)
    secrets = "p003", "secret", "client.safetensors", matcher.index.record(3).sha256
    assert all(secret in json.dumps(named) for secret in secrets)
    assert not [secret for secret in secrets if secret in json.dumps(silent)]
    assert silent["nearest"][0]["row"] == 3 and silent["models"][0]["sha256"] == "a" * 64
    assert silent["index"]["name"] == "" and silent["answer"]["recreates"] == "yes"
    with pytest.raises(AMGError, match="privacy"):
        check_picture(matcher, encoded(3), privacy="some")


def test_a_drawn_picture_has_its_attempts(matcher):
    drawn = compose([0.1], [0.9, 0.2], seed=7)
    record = check_picture(matcher, encoded(500), report=drawn, sample=1)
    assert [a["verdicts"][0]["copy"] for a in record["attempts"]] == [True, False]
    assert record["verdicts"][0]["attempt"] == 1 and record["drawn_with"]["hash"] == "abc"
    assert record["settings"] == {"preset": "main"} and "cats" not in json.dumps(record)
    outside = check_picture(matcher, encoded(500), report=drawn, sample=5)
    assert outside["attempts"] == [] and "drawn_with" not in outside


def test_the_checksum_sees_a_change(copied):
    assert checked.checksum(copied) == copied["checksum"]
    again = json.loads(json.dumps(copied))
    assert checked.checksum(again) == copied["checksum"]
    again["answer"]["recreates"] = "no"
    assert checked.checksum(again) != copied["checksum"]


# ----------------------------------------------------------------------------- its pixels


def test_the_hash_is_of_the_pixels():
    picture = paint(3)
    plain = stored_pixels(encoded(picture)).sha256
    assert stored_pixels(encoded(picture, compress_level=1)).sha256 == plain
    assert stored_pixels(encoded(picture, "WEBP", lossless=True)).sha256 == plain
    picture.putpixel((7, 5), tuple(value ^ 1 for value in picture.getpixel((7, 5))))
    assert stored_pixels(encoded(picture)).sha256 != plain
    assert stored_pixels(encoded(picture.convert("RGBA"))).sha256 != plain
    with pytest.raises(Unreadable):
        stored_pixels(encoded(picture)[:-40])
    with pytest.raises(Unreadable):
        stored_pixels(b"no picture")


def test_a_large_jpeg_is_hashed_in_full():
    """`decode` reads it at half its size, where a changed pixel can vanish."""
    large = paint(3, (1400, 1400))
    first = stored_pixels(encoded(large, "JPEG", quality=95))
    assert (first.width, first.height) == (1400, 1400)


# --------------------------------------------------------------------------- where it lies


def test_beside_the_picture(tmp_path, copied):
    picture = tmp_path / "a.png"
    picture.write_bytes(encoded(3))
    assert stored.read_beside(picture) is None
    assert stored.write_beside(picture, copied).name == "a.png.amg.json"
    assert stored.read_beside(picture) == copied and picture.read_bytes() == encoded(3)
    stored.write_beside(picture, copied)
    (tmp_path / "b.png.amg.json").write_text('{"mine": 1}')
    with pytest.raises(AMGError):
        stored.write_beside(tmp_path / "b.png", copied)
    assert (tmp_path / "b.png.amg.json").read_text() == '{"mine": 1}'
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.png", "a.png.amg.json", "b.png.amg.json",
    ]  # fmt: skip


def test_decisions_are_kept(tmp_path):
    picture, pixels = tmp_path / "a.png", "0" * 64
    assert decided.decisions(picture) == []
    decided.decide(picture, pixels, "unsure", "Ada", "ask the lawyer")
    decided.decide(picture, pixels, "no", "Ben")
    first, second = decided.decisions(picture)
    assert (first.answer, first.by, first.note) == ("unsure", "Ada", "ask the lawyer")
    assert (second.answer, second.by, second.pixels) == ("no", "Ben", pixels)
    for answer, by in (("perhaps", "Ada"), ("no", " ")):
        with pytest.raises(AMGError):
            decided.decide(picture, pixels, answer, by)
    assert len(decided.decisions(picture)) == 2
    for text in ("{", "[]", '{"schema": "amg-decision/1", "decisions": [{"answer": "no"}]}'):
        decided.beside(picture).write_text(text)
        with pytest.raises(AMGError):
            decided.decisions(picture)


# ------------------------------------------------------------------------- what has changed


def bad(findings) -> set[str]:
    return {finding.what for finding in findings if finding.good is False}


@pytest.fixture
def recorded(tmp_path, copied):
    """A picture with its record beside it."""
    picture = tmp_path / "a.png"
    picture.write_bytes(encoded(3))
    stored.write_beside(picture, copied)
    return picture


def test_nothing_has_changed(recorded, matcher):
    findings = verified.verify(recorded, matcher)
    assert bad(findings) == set()
    assert {"record", "pixels", "file", "index", "neighbours", "scores", "answer"} == {
        finding.what for finding in findings
    }


@pytest.mark.parametrize("at", [0.2, 0.5, 0.9])
def test_one_flipped_bit_is_seen(recorded, at):
    data = bytearray(recorded.read_bytes())
    data[int(at * len(data))] ^= 1
    recorded.write_bytes(data)
    assert bad(verified.verify(recorded)) & {"file", "pixels", "picture"}


def test_one_changed_pixel_is_seen(recorded):
    picture = paint(3)
    picture.putpixel((0, 0), tuple(value ^ 1 for value in picture.getpixel((0, 0))))
    recorded.write_bytes(encoded(picture))
    assert bad(verified.verify(recorded)) == {"pixels", "file"}


def test_changed_metadata_is_no_changed_picture(recorded):
    recorded.write_bytes(encoded(3, compress_level=1))
    assert bad(verified.verify(recorded)) == {"file"}


def test_a_changed_record_is_seen(recorded, copied, matcher):
    altered = copied | {"answer": {"recreates": "no", "reason": "Not a copy"}}
    stored.write_json(stored.beside(recorded), altered)
    assert bad(verified.verify(recorded)) == {"record"}
    stored.write_json(stored.beside(recorded), checked.sealed(altered))
    assert bad(verified.verify(recorded)) == set()  # only a new check finds this
    assert bad(verified.verify(recorded, matcher)) == {"answer"}
    moved = [near | {"score": near["score"] - 0.2} for near in copied["nearest"]]
    stored.write_json(stored.beside(recorded), checked.sealed(copied | {"nearest": moved}))
    assert bad(verified.verify(recorded, matcher)) == {"scores"}
    others = [near | {"row": near["row"] + 900} for near in copied["nearest"]]
    stored.write_json(stored.beside(recorded), checked.sealed(copied | {"nearest": others}))
    assert bad(verified.verify(recorded, matcher)) == {"neighbours"}
    stored.beside(recorded).write_text("{")
    assert bad(verified.verify(recorded)) == {"record"}


def test_the_wrong_index_is_named(recorded, tmp_path):
    build(fill(tmp_path / "others", 6, first=100), tmp_path / "other", create("pixel"))
    with Index.open(tmp_path / "other") as index:
        findings = verified.verify(recorded, Matcher(Searcher(index), create("pixel")))
    (wrong,) = [finding for finding in findings if finding.good is False]
    assert wrong.what == "index" and "another index" in wrong.words
    assert "the answer is no, and the record says yes" in wrong.words


def test_a_picture_without_a_record(tmp_path):
    picture = tmp_path / "a.png"
    picture.write_bytes(encoded(3))
    assert bad(verified.verify(picture)) == {"record"}
    with pytest.raises(AMGError):
        verified.verify(tmp_path / "none.png")


def test_a_decision_belongs_to_the_pixels(recorded):
    decided.decide(recorded, stored_pixels(recorded.read_bytes()).sha256, "no", "Ada", "ours")
    (decision,) = [f for f in verified.verify(recorded) if f.what == "decision"]
    assert decision.good and decision.words.startswith("no, by Ada")
    recorded.write_bytes(encoded(4))
    assert "decision" in bad(verified.verify(recorded))


def test_a_record_inside_is_read(tmp_path, matcher):
    for kind, choice in ((kind, choice) for choice, kind in written.KINDS.items()):
        texts = {"prompt": "{}", "workflow": '{"nodes": []}'}
        plain = written.encode(paint(3), kind, texts)
        record = check_picture(matcher, plain)
        picture = tmp_path / f"a{written.ENDINGS[choice]}"
        picture.write_bytes(
            written.encode(paint(3), kind, texts | {stored.KEY: json.dumps(record)})
        )
        findings = verified.verify(picture, matcher)
        assert bad(findings) == set() and {"pixels", "answer"} <= {f.what for f in findings}
        data = picture.read_bytes()
        assert dict(stored.texts(data))["workflow"] == '{"nodes": []}'
        assert credentials.SOURCE_TYPE.encode() in data and not credentials.present(data)


def test_metadata_that_does_not_fit():
    texts = {f"key{i}": "1" for i in range(12)}
    assert texts.items() <= dict(stored.texts(written.encode(paint(1), "WEBP", texts))).items()
    with pytest.raises(written.TooLong):
        written.encode(paint(1), "JPEG", {"workflow": "x" * 70_000})
    assert len(written.encode(paint(1), "PNG", {"workflow": "x" * 70_000})) > 0
