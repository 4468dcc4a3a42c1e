"""From a folder to an index and back."""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from amg_core.descriptors.base import DescriptorSpec
from amg_core.errors import AMGError
from amg_core.images import to_tensor
from amg_core.index import Index, add, build, merge, mute, remove
from amg_core.index.embedding import BATCH_BYTES, Embedder
from amg_core.index.format import CaptionRule, dump_manifest, identity
from amg_core.index.picture import decode, load_picture
from index_tools import cli
from tests.index.helpers import demo_pictures, fill, paint, shard_of


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_round_trip(tmp_path, pixel):
    folder = fill(tmp_path / "in", 3)
    fill(folder / "b", 2, first=10)
    paint(20, (600, 150)).save(folder / "Z.JPEG")
    calls = []
    report = build(folder, tmp_path / "out", pixel, progress=lambda *call: calls.append(call))
    sources = ["Z.JPEG", "b/p010.png", "b/p011.png", "p000.png", "p001.png", "p002.png"]
    assert (report.count, report.skipped, report.path) == (6, [], tmp_path / "out")
    assert calls == [(i + 1, 6, source) for i, source in enumerate(sources)]
    assert hidden(tmp_path) == []
    with Index.open(tmp_path / "out", pixel.spec) as index:
        assert (index.count, index.name, index.spec) == (6, "out", pixel.spec)
        assert index.hash == report.hash
        assert [index.source(i) for i in range(6)] == sources
        assert index.thumbnail(0).size == (256, 64)
        assert index.thumbnail(1).size == (40, 30)
        assert index.thumbnail(1).mode == "RGB"
        for scale in pixel.spec.scales:
            rows = index.rows(scale)
            assert rows.dtype == np.float16
            assert rows.shape == (6, 3 * scale * scale)
            stored = np.load(shard_of(tmp_path / "out") / f"rows.{scale}.f16.npy", mmap_mode="r")
            np.testing.assert_array_equal(stored, rows)
            for i, source in enumerate(sources):
                expected = pixel.embed(to_tensor(Image.open(folder / source)), scale)
                np.testing.assert_allclose(rows[i], expected[0].numpy(), atol=1e-3)
        record = index.record(0)
        assert (record.width, record.height) == (600, 150)
        assert record.sha256 == hashlib.sha256((folder / "Z.JPEG").read_bytes()).hexdigest()
        hashes = np.load(shard_of(tmp_path / "out") / "sha256.npy")
        assert hashes[0].tobytes().hex() == record.sha256


def test_demo_pictures(tmp_path, pixel):
    (tmp_path / "in").mkdir()
    folder = demo_pictures(tmp_path / "in", 40)
    assert build(folder, tmp_path / "out", pixel).count == 40
    lines = map(json.loads, (folder / "metadata.jsonl").read_text().splitlines())
    with Index.open(tmp_path / "out") as index:
        found = {index.source(i): index.caption(i) for i in range(40)}
    assert found == {line["file_name"]: line["text"] for line in lines}


def test_batches_do_not_change_rows(tmp_path, pixel):
    folder = fill(tmp_path / "in", 4)
    for i in range(6):
        paint(50 + i, (20 + 10 * (i % 3), 25)).save(folder / f"q{i}.bmp")
    for batch in (1, 3, 16):
        build(folder, tmp_path / str(batch), pixel, batch=batch)
    one, three, all_ = (Index.open(tmp_path / name) for name in ("1", "3", "16"))
    for scale in pixel.spec.scales:
        np.testing.assert_array_equal(one.rows(scale), three.rows(scale))
        np.testing.assert_array_equal(one.rows(scale), all_.rows(scale))


def test_builds_under_inference_mode_without_random_draws(tmp_path, pictures, pixel):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with torch.inference_mode():
        build(pictures, tmp_path / "out", pixel)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_captions(tmp_path, pixel):
    folder = fill(tmp_path / "in", 6)
    fill(folder / "sub", 3, first=20, prefix="s")
    (folder / "p000.txt").write_text(" from the sidecar\n", encoding="utf-8")
    (folder / "p005.txt").write_text("  \n")  # says nothing: the next source speaks
    (folder / "s.txt").write_bytes("größer".encode("utf-16"))
    records = [
        {"file_name": "p000.png", "text": "jsonl 0"},
        {"file_name": "p001.png", "caption": "jsonl 1 \u2028 \ud800"},
        {"file_name": "./sub\\s020.png", "text": "jsonl sub"},
        {"file_name": "p005.png", "text": "jsonl 5"},
        {"file_name": "p002.png", "text": None},
        ["not", "a", "record"],
    ]
    lines = [json.dumps(record) for record in records] + ["{broken"]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "sub" / "metadata.jsonl").write_text('{"file_name": "s021.png", "text": "near"}')
    (folder / "a.csv").write_text(
        'Image;Prompt\np000.png;csv 0\np001.png;csv 1\np002.png;"csv; ""2"""\nsub/s021.png;far\n',
        encoding="utf-8-sig",
    )
    (folder / "b.CSV").write_text("path,caption\np002.png,late\np003.png,csv 3\n")
    (folder / "other.csv").write_text("x,y\n1,2\n")
    report = build(folder, tmp_path / "out", pixel)
    said = ["2 lines", "s.txt", "no column that names pictures (it has: x, y)"]
    assert len(report.notes) == len(said)
    assert all(any(words in note for note in report.notes) for words in said)
    assert (report.captioned, report.files) == (7, 9)
    with Index.open(tmp_path / "out") as index:
        found = {index.source(i): index.caption(i) for i in range(index.count)}
    assert found == {
        "p000.png": "from the sidecar",
        "p001.png": "jsonl 1 \u2028 ?",
        "p002.png": 'csv; "2"',
        "p003.png": "csv 3",
        "p004.png": "",
        "p005.png": "jsonl 5",
        "sub/s020.png": "jsonl sub",
        "sub/s021.png": "near",
        "sub/s022.png": "",
    }


@pytest.mark.parametrize("kind", ["jpg", "tif", "webp", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation, kind):
    stored = paint(3, (48, 32))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{kind}"
    stored.save(path, exif=exif, **({"lossless": True} if kind == "webp" else {}))
    turned = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: np.rot90,
    }[orientation](np.array(stored).astype(int))
    read = load_picture(path).pixels.astype(int)
    assert read.shape == turned.shape
    assert np.abs(read - turned).mean() < 6


def test_modes(tmp_path):
    ramp = np.linspace(0, 255, 64).round().astype(np.uint8)[None].repeat(8, 0)
    grey = Image.fromarray(ramp)
    clear = Image.new("RGBA", (64, 8), (255, 0, 0, 0))
    wanted = {}

    def put(name, image, expected, **options):
        image.save(tmp_path / name, **options)
        wanted[name] = expected

    put("grey.png", grey, ramp)
    put("grey16.png", Image.fromarray(ramp.astype(np.uint16) * 257), ramp)
    put("grey16.tif", Image.fromarray(ramp.astype(np.uint16) * 257), ramp)
    put("float.tif", Image.fromarray(ramp.astype(np.float32) / 255), ramp)
    put("int.tif", Image.fromarray(ramp.astype(np.int32)), ramp)
    put("cmyk.jpg", grey.convert("RGB").convert("CMYK"), ramp, quality=98)
    put("palette.png", grey.convert("P"), ramp)
    put("bits.png", grey.convert("1", dither=0), (ramp > 127) * 255)
    put("clear.png", clear, ramp * 0 + 255)
    put("clear.webp", clear, ramp * 0 + 255)
    put("la.png", Image.merge("LA", (grey, Image.new("L", grey.size, 255))), ramp)
    put("named.png", Image.new("L", (64, 8), 7), ramp * 0 + 255, transparency=7)
    put("still.webp", grey, ramp, save_all=True, append_images=[Image.new("L", (64, 8))])
    put("frames.png", grey, ramp, save_all=True, append_images=[Image.new("L", (64, 8))])
    put("pages.tif", grey, ramp, save_all=True, append_images=[Image.new("L", (5, 5))])
    for name, expected in wanted.items():
        pixels = load_picture(tmp_path / name).pixels
        assert pixels.shape == (8, 64, 3) and pixels.dtype == np.uint8, name
        assert np.abs(pixels.astype(int) - expected[..., None]).mean() < 4, name


def test_unreadable_among_good(tmp_path, pictures, pixel, monkeypatch):
    paint(5).save(pictures / "cut.png", "WEBP")
    (pictures / "cut.png").write_bytes((pictures / "cut.png").read_bytes()[:-10])
    (pictures / "empty.jpg").write_bytes(b"")
    (pictures / "text.webp").write_text("hello")
    paint(77).save(pictures / "wrong-name.jpg", "PNG")  # read all the same
    (pictures / "phone.HEIC").write_bytes(b"?")
    (pictures / "dangling.png").symlink_to(pictures / "absent.png")
    monkeypatch.setattr("amg_core.index.picture.MAX_PIXELS", 5000)
    paint(1, (100, 51)).save(pictures / "huge.png")
    Image.MAX_IMAGE_PIXELS, limit = 10_000, Image.MAX_IMAGE_PIXELS
    try:
        paint(1, (300, 100)).save(pictures / "bomb.png")
        report = build(pictures, tmp_path / "out", pixel)
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    assert report.count == 6
    reasons = dict(report.skipped)
    assert list(reasons) == sorted(reasons)
    assert set(reasons) == {
        "cut.png", "empty.jpg", "text.webp", "phone.HEIC", "huge.png", "bomb.png", "dangling.png"
    }  # fmt: skip
    assert "damaged" in reasons["cut.png"] and reasons["empty.jpg"] == "empty file"
    assert "too large" in reasons["huge.png"] and "too large" in reasons["bomb.png"]
    assert ".heic" in reasons["phone.HEIC"] and "known format" in reasons["text.webp"]
    with Index.open(tmp_path / "out") as index:
        sources = [index.source(i) for i in range(index.count)]
    assert sources == [*(f"p00{i}.png" for i in range(5)), "wrong-name.jpg"]


def test_not_finite_embedding_is_skipped(tmp_path, pictures, pixel):
    class Odd:
        spec = pixel.spec

        def to(self, device):
            return self

        def embed(self, batch, scale):
            rows = pixel.embed(batch, scale)
            rows[rows.mean(1) > darkest] = 1e6  # beyond float16
            return rows

    means = [to_tensor(Image.open(path)).mean().item() for path in sorted(pictures.iterdir())]
    darkest = sorted(means)[0] + 1e-3
    report = build(pictures, tmp_path / "out", Odd())
    assert report.count == 1 and len(report.skipped) == 4
    assert "not finite" in report.skipped[0][1]
    with Index.open(tmp_path / "out") as index:
        assert index.source(0) == sorted(pictures.iterdir())[int(np.argmin(means))].name


def test_errors_of_the_folder(tmp_path, pixel):
    out = tmp_path / "out"
    with pytest.raises(AMGError, match=r"absent.*does not exist"):
        build(tmp_path / "absent", out, pixel)
    (tmp_path / "file").write_text("")
    with pytest.raises(AMGError, match="file is a file"):
        build(tmp_path / "file", out, pixel)
    (tmp_path / "none").mkdir()
    with pytest.raises(AMGError, match=r"No picture files in .*none"):
        build(tmp_path / "none", out, pixel)
    (tmp_path / "none" / "a.png").write_text("no")
    with pytest.raises(AMGError, match=r"No readable picture in .*none.*a\.png"):
        build(tmp_path / "none", out, pixel)
    assert not out.exists() and hidden(tmp_path) == []


def test_never_replaces_what_is_not_an_index(tmp_path, pictures, made, pixel):
    with pytest.raises(AMGError, match="will not be replaced"):
        build(pictures, pictures, pixel)
    with pytest.raises(AMGError, match="will not be replaced"):
        build(pictures, tmp_path, pixel)
    (made / "notes.txt").write_text("mine")
    with pytest.raises(AMGError, match=r"notes\.txt"):
        build(pictures, made, pixel)
    (made / "notes.txt").unlink()

    def drop_in(done, total, source):
        (made / "late.txt").write_text("mine")

    build(pictures, made, pixel, progress=drop_in)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AMGError, match="is a file"):
        build(pictures, tmp_path / "file", pixel)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "manifest.json").write_text("{}")
    with pytest.raises(AMGError, match="not an index"):
        build(pictures, foreign, pixel)
    assert len(list(pictures.iterdir())) == 5 and hidden(tmp_path) == []
    assert (made / "late.txt").read_text() == "mine"


def test_replaces_a_damaged_index(pictures, made, pixel):
    (made / "manifest.json").write_text("garbage")
    build(pictures, made, pixel)
    Index.open(made).close()


def test_a_cannot_write_error_names_the_index(tmp_path, pictures, pixel):
    (tmp_path / "blocked").write_text("")
    with pytest.raises(AMGError, match=r"Cannot write the index .*inner"):
        build(pictures, tmp_path / "blocked" / "inner", pixel)


@pytest.mark.parametrize("name", ["a b", "größe-画像", "q?x=1#frag%20", "it's; DROP", "-k", "é"])
def test_odd_paths(tmp_path, pixel, name):
    folder = fill(tmp_path / name / "in put", 1, prefix=name)
    os.rename(folder / f"{name}000.png", folder / f"{name}.png")
    (folder / f"{name}.txt").write_text(f"caption {name}", encoding="utf-8")
    build(folder, tmp_path / name / f"{name} out", pixel)
    with Index.open(tmp_path / name / f"{name} out", pixel.spec) as index:
        assert index.source(0) == f"{name}.png" and index.caption(0) == f"caption {name}"
        assert index.thumbnail(0).size == (40, 30)


def test_undecodable_name_and_links(tmp_path, pictures, pixel):
    try:
        os.rename(pictures / "p000.png", os.fsencode(pictures) + b"/\xff.png")
    except OSError:
        pytest.skip("the file system allows UTF-8 names only")
    (tmp_path / "elsewhere").mkdir()
    paint(9).save(tmp_path / "elsewhere" / "linked.png")
    (pictures / "link").symlink_to(tmp_path / "elsewhere")
    (pictures / "loop").symlink_to(pictures)
    (pictures / "self").symlink_to(pictures / "self")
    (tmp_path / "place").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "place")
    build(pictures, tmp_path / "out", pixel)
    assert (tmp_path / "out").is_symlink()
    with Index.open(tmp_path / "out") as index:
        sources = {index.source(i) for i in range(index.count)}
    assert {"\\udcff.png", "link/linked.png", "p001.png"} <= sources and len(sources) == 6


def test_progress_exception_leaves_the_old_index(tmp_path, pictures, made, pixel):
    class Interrupt(BaseException):
        pass

    def stop(done, total, source):
        if done == 3:
            raise Interrupt

    old = (made / "manifest.json").read_bytes()
    for out in (made, tmp_path / "new"):
        with pytest.raises(Interrupt):
            build(pictures, out, pixel, progress=stop, batch=2)
    assert (made / "manifest.json").read_bytes() == old
    assert hidden(tmp_path) == []
    Index.open(made).close()
    with pytest.raises(AMGError, match="interrupted: run it again"):
        Index.open(tmp_path / "new")
    report = build(pictures, tmp_path / "new", pixel)
    assert (report.embedded, report.reused, report.count) == (1, 4, 5)
    assert report.hash == Index.open(made).hash
    assert hidden(tmp_path / "new") == []


def test_one_build_at_a_time(pictures, made, pixel):
    def again(done, total, source):
        with pytest.raises(AMGError, match="is being built"):
            build(pictures, made, pixel)

    build(pictures, made, pixel, progress=again)
    Index.open(made).close()


def test_used_from_several_threads(made):
    index, failures = Index.open(made), []

    def work():
        try:
            for i in range(200):
                assert index.source(i % 5) == f"p00{i % 5}.png"
            index.thumbnail(0)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with pytest.raises(IndexError):
        index.caption(5)
    with pytest.raises(IndexError):
        index.caption(-1)
    with pytest.raises(ValueError, match="no scale"):
        index.rows(7)
    index.close()
    index.close()
    with pytest.raises(ValueError, match="closed"):
        index.caption(0)


def test_dimension_change_is_refused(tmp_path, pictures, pixel):
    class Changing:
        spec = DescriptorSpec("odd", "nl2", "none/1", (8,))
        calls = 0

        def to(self, device):
            return self

        def embed(self, batch, scale):
            self.calls += 1
            return torch.zeros(len(batch), 1 + self.calls // 3)

    with pytest.raises(ValueError, match="dimensions"):
        build(pictures, tmp_path / "out", Changing(), batch=2)
    assert hidden(tmp_path) == []


# --- captions of several lines ------------------------------------------------------------------

TEXT = "A red fox.\n\n  de.utf8=Ein roter Fuchs.\nfr.utf8=Un renard roux."


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        (CaptionRule(), TEXT),
        (CaptionRule("first"), "A red fox."),
        (CaptionRule("joined"), "A red fox. de.utf8=Ein roter Fuchs. fr.utf8=Un renard roux."),
        (CaptionRule("first", 10), "A red fox."),
        (CaptionRule("first", 9), "A red"),
        (CaptionRule("first", 5), "A red"),
        (CaptionRule("joined", 1), "A"),
    ],
)
def test_caption_rules(rule, kept):
    assert rule(TEXT) == kept
    assert rule("") == ""


def test_words_that_are_too_long_are_cut():
    assert CaptionRule(length=4)("abcdefgh ij") == "abcd"
    for wrong in ({"lines": "some"}, {"length": 0}):
        with pytest.raises(ValueError, match="lines must be"):
            CaptionRule(**wrong)


def test_an_index_keeps_its_rule_of_captions(tmp_path, pictures, pixel):
    (pictures / "p000.txt").write_text(TEXT)
    (pictures / "p001.txt").write_text("word " * 1000)
    out = tmp_path / "out"
    report = build(pictures, out, pixel, captions=CaptionRule("first", 8))
    assert any(note.startswith("2 captions are longer than 8 characters") for note in report.notes)
    with Index.open(out) as index:
        assert index.manifest.captions == CaptionRule("first", 8)
        assert [index.caption(i) for i in (0, 1)] == ["A red", "word"]
    more = fill(tmp_path / "more", 2, first=7)
    (more / "p007.txt").write_text("one\ntwo")
    assert not any("longer" in note for note in add(more, out, pixel).notes)
    mute(out, lambda entry: entry.source == "p002.png", "mine")
    remove(out, lambda entry: entry.source == "p003.png")
    with Index.open(out) as index:
        assert index.manifest.captions == CaptionRule("first", 8)
        assert "one" in [index.caption(i) for i in range(index.count)]
    build(pictures, out, pixel)  # nothing is embedded again, captions are
    with Index.open(out) as index:
        assert index.manifest.captions == CaptionRule()
        assert index.caption(0) == TEXT and 1990 < len(index.caption(1)) <= 2000
    other = tmp_path / "other"
    build(more, other, pixel, captions=CaptionRule("joined"))
    merge([out, other], tmp_path / "both")
    with Index.open(tmp_path / "both") as index:
        assert index.manifest.captions is None  # of two kinds
    merge([other], tmp_path / "one")
    with Index.open(tmp_path / "one") as index:
        assert index.manifest.captions == CaptionRule("joined")


def test_an_index_without_a_rule_is_read(pictures, made, pixel):
    with Index.open(made) as index:
        manifest, path = index.manifest, index.path / "manifest.json"
    old = replace(manifest, captions=None)
    path.write_bytes(dump_manifest(old))
    assert b"captions" not in path.read_bytes()
    with Index.open(made) as index:
        assert index.manifest == old and index.hash == identity(old) != identity(manifest)


def test_captions_on_the_command_line(tmp_path, pictures, capsys):
    (pictures / "p000.txt").write_text(TEXT)
    out = str(tmp_path / "out")
    chosen = ["--caption-lines", "joined", "--caption-length", "20", "--descriptor", "pixel"]
    assert cli.main(["build", str(pictures), out, *chosen]) == 0
    assert "1 caption is longer than 20 characters and was cut" in capsys.readouterr().out
    assert cli.main(["info", out]) == 0
    assert "joined lines, at most 20 characters" in capsys.readouterr().out
    assert cli.main(["info", out, "--json"]) == 0
    assert '"lines": "joined"' in capsys.readouterr().out


# --- memory --------------------------------------------------------------------------------------


def test_no_batch_of_large_pictures_is_held(tmp_path, pixel):
    embedder = Embedder(pixel, "cpu", 4)
    large = decode(np.zeros((1200, 1300, 3), np.uint8), "large")
    ready = embedder.prepare(large)
    assert {scale: tuple(one.shape) for scale, one in ready.items()} == {
        16: (1, 3, 16, 16), 32: (1, 3, 32, 32)
    }  # fmt: skip
    assert not embedder.full([ready] * 3) and embedder.full([ready] * 4)

    class Whole:
        """A descriptor whose input has the size of the picture."""

        spec = pixel.spec

        def to(self, device):
            return self

        def embed(self, pictures, scale):
            return pixel.embed(pictures, scale)

    whole = Embedder(Whole(), "cpu", 100)
    one = whole.prepare(large)
    assert one.dtype == torch.uint8 and one.nbytes == large.pixels.nbytes
    most = BATCH_BYTES // one.nbytes
    assert not whole.full([one] * most) and whole.full([one] * (most + 1))
    rows, same = embedder([ready]), whole([one])
    assert all(np.array_equal(rows[scale], same[scale]) for scale in pixel.spec.scales)


def test_a_build_counts_what_it_removes(tmp_path, pictures, pixel):
    out = tmp_path / "made"
    assert build(pictures, out, pixel).removed == 0
    assert build(pictures, out, pixel).removed == 0
    taken = sorted(each for each in pictures.iterdir() if each.suffix != ".txt")[:2]
    for path in taken:
        path.unlink()
    fewer = build(pictures, out, pixel)
    assert (fewer.removed, fewer.embedded, fewer.count) == (2, 0, 3)
    other = tmp_path / "others"
    other.mkdir()
    Image.new("RGB", (40, 40), "red").save(other / "red.png")
    assert build(other, out, pixel).removed == 3
