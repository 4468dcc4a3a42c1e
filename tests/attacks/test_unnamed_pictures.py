"""No file between pictures goes without a trace, whatever it is called."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from amg_core.errors import AMGError
from amg_core.index import build
from amg_core.index.sources import open_source
from tests.index.helpers import as_folder, as_tar, as_zip, encoded, paint

PICTURES = {
    "plain": encoded(1, "PNG"),
    "from-the-web.jpg_large": encoded(2, "JPEG"),
    "old.png.bak": encoded(3, "PNG"),
    "a.tga": encoded(4, "TGA"),
    "b.ppm": encoded(5, "PPM"),
    "c.PGM": encoded(6, "PPM"),
    "d": encoded(7, "BMP"),
    "e.orig": encoded(8, "WEBP"),
    "f.1": encoded(9, "TIFF"),
    "g.download": encoded(10, "GIF"),
    "h.jp2": encoded(11, "JPEG2000"),
    "i.blob": encoded(12, "JPEG2000"),
}
REPORTED = {
    "phone": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200),
    "new.data": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(200),
    "broken": encoded(1, "PNG")[:50],
    "render.hdr": b"#?RADIANCE\n",
    "icon.ico": b"\0\0\1\0",
    "inner.zip": b"PK",
    "inner.rar": b"Rar!",
    "inner.tar.zst": b"\x28\xb5\x2f\xfd",
}
LEFT_OUT = {
    "README.md": b"# no picture",
    "model.safetensors": bytes(100),
    "film.mp4": b"\0\0\0\x18ftypisom\0\0\2\0" + bytes(100),
    "BM": b"BM is how this text begins, and it is no picture",
    "Makefile": b"P is a letter",
    "empty": b"",
}
SILENT = {"words.txt": b"words", "table.csv": b"file_name,text\n", "._plain": b"\x89PNG\r\n\x1a\n",
          "Thumbs.db": b"?", ".DS_Store": b"?", "__MACOSX/plain": encoded(1, "PNG")}  # fmt: skip
ALL = PICTURES | REPORTED | LEFT_OUT | SILENT


def as_folder_of_tars(files: dict[str, bytes], at: Path) -> Path:
    at.mkdir()
    as_tar(files, at / "00000")
    return at


@pytest.mark.parametrize("form", [as_folder, as_zip, as_tar, as_folder_of_tars])
def test_pictures_are_known_by_what_is_in_them(tmp_path, pixel, form):
    source = form(ALL, tmp_path / "given")
    report = build(source, tmp_path / "out", pixel)
    prefix = "00000.tar/" if form is as_folder_of_tars else ""
    assert report.count == len(PICTURES)
    assert {name for name, _ in report.skipped} == {prefix + name for name in REPORTED}
    assert all(reason for _, reason in report.skipped)
    (note,) = [note for note in report.notes if "left out" in note]
    assert note.startswith(f"{len(LEFT_OUT)} files are left out")
    for name in LEFT_OUT:
        assert name in note
    assert "words.txt" not in note and "Thumbs" not in note


def test_the_same_names_in_every_form(tmp_path):
    for form in (as_folder, as_zip, as_tar):
        items = [item.source for item in open_source(form(ALL, tmp_path / "given"))]
        assert set(items) == {*PICTURES, "broken", "phone", "new.data"}


def test_many_left_out_files_stay_one_short_note(tmp_path):
    paint(1).save(tmp_path / "a.png")
    for n in range(40):
        for kind in range(12):
            (tmp_path / f"{n}.kind{kind}").write_bytes(b"no")
    source = open_source(tmp_path)
    assert len(list(source)) == 1
    (note,) = source.notes
    assert note.startswith("480 files") and "40 .kind0 (0.kind0" in note and len(note) < 500


def test_what_lies_beside_shards_is_reported(tmp_path):
    as_folder({"phone.heic": b"?", "README": b"?"}, tmp_path / "in")
    as_tar({"a.png": PICTURES["plain"]}, tmp_path / "in" / "0")
    source = open_source(tmp_path / "in")
    assert [item.source for item in source] == ["0.tar/a.png"]
    assert [name for name, _ in source.skipped] == ["phone.heic"]
    assert "README" in source.notes[0]


def test_a_folder_without_pictures_says_what_is_in_it(tmp_path):
    (tmp_path / "movie.mp4").write_bytes(b"?")
    with pytest.raises(AMGError, match=r"1 file is left out, being no picture: 1 \.mp4"):
        open_source(tmp_path)
    with pytest.raises(AMGError, match=r"1 file is left out, being no picture: 1 \.mp4"):
        open_source(as_zip({"movie.mp4": b"?"}, tmp_path / "x"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    paint(1).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe")
    source = open_source(tmp_path)
    assert len(list(source)) == 1
    assert source.skipped == [("pipe", "cannot be looked at (not a file)")]


def test_a_webdataset_field_is_no_left_out_file(tmp_path):
    files = {"0.cls": b"7", "0.jpg": PICTURES["plain"], "0.npy": b"?", "1.npy": b"?"}
    source = open_source(as_tar(files, tmp_path / "0"))
    assert len(list(source)) == 1
    assert [note for note in source.notes if "left out" in note] == [
        "1 file is left out, being no picture: 1 .npy (1.npy)"
    ]


def test_names_and_content_agree_for_every_format_that_is_read():
    """Whatever Pillow writes of the formats that are read is known by its first bytes."""
    from amg_core.index.picture import FORMATS
    from amg_core.index.sources.kinds import HEAD, is_picture

    Image.init()
    for kind in {*FORMATS, "JPEG2000", "AVIF"} - {"TGA", "PCX", "DIB"}:  # these have no mark
        if kind in Image.SAVE:
            assert is_picture(encoded(1, kind)[:HEAD]), kind
