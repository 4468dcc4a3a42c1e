"""Clusters of duplicates: exact pairs, components, what is kept, what is written."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from amg_core import sheet
from amg_core.descriptors import DescriptorSpec
from amg_core.errors import AMGError
from amg_core.index import Index, build, mute
from amg_core.similarity import metrics
from index_tools import dedup, near
from tests.index.helpers import fill, options_of, paint

Member = dedup.Member
command = partial(options_of, dedup)


@pytest.fixture
def duplicated(tmp_path):
    """Eight pictures; of p000 also half the size, as a JPEG, and twice byte by byte."""
    folder = fill(tmp_path / "set", 8)
    big = paint(0, (80, 60))
    big.resize((40, 30)).save(folder / "p000.png")
    big.save(folder / "q-big.png")
    big.save(folder / "r-jpeg.jpg", quality=60)
    shutil.copy(folder / "p000.png", folder / "s-same.png")
    shutil.copy(folder / "p003.png", folder / "t-same.png")
    texts = {"p000": "a red fox", "q-big": "a red fox", "r-jpeg": "the red fox", "t-same": "sea"}
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


@pytest.fixture
def index(tmp_path, duplicated, pixel):
    build(duplicated, tmp_path / "index", pixel)
    with Index.open(tmp_path / "index") as index:
        yield index


def hashes(folder) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# -------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize("metric", ["cosine", "nl2"])
@pytest.mark.parametrize("block", [1, 7, 64])
def test_pairs_are_those_of_the_whole_matrix(metric, block, monkeypatch):
    rng = np.random.default_rng(1)
    base = rng.random((9, 12)).astype(np.float32)
    rows = np.concatenate([base, base + 0.1 * rng.random((9, 12)), base[:3] * 0.7])
    rows = (rows - 0.5 if metric == "cosine" else rows).astype(np.float16)
    monkeypatch.setattr(near, "BLOCK", block)
    found = {}
    for a, b, values in near.pairs(rows, metric, 2, 0.6):
        for i, j, value in zip(a.tolist(), b.tolist(), values.tolist(), strict=True):
            assert (i, j) not in found
            found[i, j] = value
    whole = near.prepared(rows, metric, 2, "cpu")
    matrix = near.COMPARE[metric](whole, whole)
    expected = {(i, j) for i in range(len(rows)) for j in range(i + 1, len(rows))}
    expected = {(i, j) for i, j in expected if matrix[i, j] > 0.6}
    assert set(found) == expected and len(expected) > 5
    assert all(value == pytest.approx(float(matrix[ij]), abs=2e-3) for ij, value in found.items())


def test_likeness_is_what_it_says():
    """The closed form against `metrics.matched`, one pair at a time, both ways."""
    pictures = torch.rand(6, 3, 16, generator=torch.Generator().manual_seed(0))
    pictures[3] = pictures[0] * 0.6 + 0.1
    pictures[4] = pictures[1] * 0.2  # more contrast than the gain can undo
    flat = pictures.flatten(1)
    closed = near.likeness_of_pictures(pictures, pictures)
    for i in range(6):
        for j in range(6):
            sizes, left = [], []
            for one, other in ((i, j), (j, i)):
                matched = metrics.matched(flat[one], flat[other : other + 1])
                left.append(float((matched[0] - flat[other]).norm()))
                own = pictures[other] - pictures[other].mean(1, keepdim=True)
                sizes.append(max(float(own.norm()), near.FLAT))
            direct = 1 - max(a / b for a, b in zip(left, sizes, strict=True))
            assert float(closed[i, j]) == pytest.approx(direct, abs=2e-3)
    assert torch.allclose(closed, closed.T, atol=1e-4)
    assert closed[0, 3] > 0.99 and closed[1, 4] < 0.7 and closed[0, 1] < 0.7


def test_mirrored_pictures_are_duplicates():
    pictures = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pictures[1] = pictures[0].flip(-1) * 0.8
    pictures[2] = pictures[0].flip(-2)
    found = near.mirrored_too(*[pictures.flatten(2)] * 2)
    assert found[0, 1] > 0.99 and found[0, 0] > 0.99
    assert found[0, 2] < 0.7 and found[0, 3] < 0.7
    assert torch.allclose(found, found.T, atol=1e-4)


def test_without_scipy_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.sparse.csgraph", None)
    with pytest.raises(AMGError, match=r"Finding duplicates needs scipy: pip install scipy\."):
        dedup.Components(3)


def test_progress_covers_all_blocks(monkeypatch):
    monkeypatch.setattr(near, "BLOCK", 4)
    seen = []
    rows = np.eye(10, dtype=np.float16)
    list(near.pairs(rows, "cosine", 1, 0.5, progress=lambda *state: seen.append(state[:2])))
    assert seen == [(i, 6) for i in range(1, 7)]
    shown = []
    show = dedup.blocks_as_pictures(10, lambda *state: shown.append(state[:2]))
    show(6, 6, "")
    assert shown == [(10, 10)]


# ------------------------------------------------------------------------------ clusters


@pytest.mark.parametrize("seed", range(8))
def test_components_against_a_plain_search(seed):
    rng = np.random.default_rng(seed)
    n, edges = 60, int(rng.integers(5, 70))
    a, b = rng.integers(n, size=(2, edges))
    values = rng.random(edges).astype(np.float32)
    made = dedup.Components(n)
    for part in np.array_split(np.arange(edges), 4):
        made.join(a[part], b[part], values[part])
    label = list(range(n))
    for _ in range(n):
        for i, j in zip(a.tolist(), b.tolist(), strict=True):
            label[i] = label[j] = min(label[i], label[j])
    assert made.root.tolist() == label
    groups = made.groups()
    assert all(len(group) > 1 for group in groups)
    assert sum(len(group) for group in groups) == sum(label.count(x) > 1 for x in label)
    for group in groups:
        inside = [v for i, v in zip(a, values, strict=True) if label[i] == group[0]]
        assert made.weakest[group].min() == min(inside)
        assert made.strongest[group].max() == max(inside)


def member(i, width=10, height=10, caption="", **more) -> Member:
    return Member(i, f"{i}.png", caption, f"{i:064x}", width, height, **more)


def chosen(members, similarity, threshold=0.7):
    def compare(one, others):
        return [similarity.get(frozenset((one, other)), 0.0) for other in others]

    return dedup.choose(members, compare, threshold)


def test_kept_is_the_largest_then_the_best_described_then_the_first():
    alike = {frozenset(p): 0.9 for p in ((0, 1), (0, 2), (1, 2))}

    def kept(*members):
        return [m.id for m in chosen(members, alike) if m.keep]

    assert kept(member(0), member(1, 20), member(2)) == [1]
    assert kept(member(0), member(1, caption="longer"), member(2, caption="x")) == [1]
    assert kept(member(2), member(1)) == [1]


def test_the_ends_of_a_chain_are_both_kept():
    chain = {frozenset((0, 1)): 0.8, frozenset((1, 2)): 0.75}
    members = [member(0), member(1), member(2)]
    found = chosen(members, chain)
    assert [m.keep for m in found] == [True, False, True]
    assert [(m.kept_id, m.likeness) for m in found] == [(0, 1.0), (0, 0.8), (2, 1.0)]
    found = chosen(members, chain, -np.inf)
    assert [m.keep for m in found] == [True, False, False]
    assert [m.likeness for m in found] == [1.0, 0.8, 0.0]


def test_clusters_of_an_index(index):
    first, second = dedup.clusters(index)
    assert {m.source for m in first.members} == {
        "p000.png", "q-big.png", "r-jpeg.jpg", "s-same.png"
    }  # fmt: skip
    assert [m.source for m in first.kept] == ["r-jpeg.jpg"]  # as large as q-big, longer caption
    assert [m.source for m in first.members if m.alias] == ["s-same.png"]
    assert 0.7 < first.weakest <= first.strongest <= 1.0001
    assert first.captions.words == "alike" and first.captions.with_caption == 3
    assert {m.source for m in second.members} == {"p003.png", "t-same.png"}
    assert [m.source for m in second.kept] == ["t-same.png"]  # the one with a caption
    assert second.weakest == 1 and second.captions.words == "missing"
    assert not dedup.clusters(index, 1.1)[0].members[0].likeness < 1  # byte-identical files only
    assert len(dedup.clusters(index, 1.1)) == 2


def test_muted_rows_take_part(tmp_path, index):
    mute(index.path, lambda entry: entry.source == "q-big.png", "mine")
    with Index.open(index.path) as again:
        assert again.muted
        (found, _) = dedup.clusters(again)
    assert [m.source for m in found.members if m.muted] == ["q-big.png"]


def test_a_descriptor_without_a_known_threshold():
    spec = DescriptorSpec("clip_vit_b_32", "cosine", "x", (224,))
    with pytest.raises(AMGError, match="--threshold"):
        dedup.default_threshold(spec)
    assert dedup.default_threshold(DescriptorSpec("sscd_disc_mixup", "cosine", "x", (288,))) == 0.7


# --------------------------------------------------------------------------- complexity


def test_complexity():
    flat = Image.new("RGB", (32, 32), (10, 200, 30))
    halves = Image.new("RGB", (32, 32), "black")
    halves.paste((255, 255, 255), (0, 0, 16, 32))
    noise = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    )
    assert dedup.entropy(flat) == 0
    assert dedup.entropy(halves) == pytest.approx(1)
    assert 7 < dedup.entropy(noise) <= 8
    assert dedup.jpeg_bytes(flat) < dedup.jpeg_bytes(noise)


def test_measured_says_from_what(index, duplicated):
    found = dedup.clusters(index)
    small = dedup.measure(found, index)
    assert {m.measured for one in small for m in one.members} == {"thumbnail"}
    (duplicated / "s-same.png").unlink()
    files = dedup.measure(found, index, duplicated)
    measured = {m.source: m.measured for one in files for m in one.members}
    assert measured["q-big.png"] == "file" and measured["s-same.png"] == "thumbnail"
    values = {m.source: m for one in files for m in one.members}
    big = Image.open(duplicated / "q-big.png")
    assert values["q-big.png"].entropy == pytest.approx(dedup.entropy(big))


# ------------------------------------------------------------------------------ telling


def test_a_person_reads(tmp_path, index, duplicated, capsys):
    before = hashes(duplicated)
    out, picture = tmp_path / "lists", tmp_path / "sheet.png"
    assert dedup.run(command(index.path, "--out", out, "--sheet", picture)) in (None, 0)
    report = capsys.readouterr().out
    assert "6 pictures in 2 clusters" in report and "Keep 2, drop 4" in report
    assert "1 alike, 1 missing" in report and "no text encoder was given" in report
    assert set((out / "drop.txt").read_text().splitlines()) == {
        "p000.png", "s-same.png", "q-big.png", "p003.png"
    }  # fmt: skip
    stay = {"r-jpeg.jpg", "t-same.png", *(f"p{i:03}.png" for i in (1, 2, 4, 5, 6, 7))}
    assert (
        set((out / "keep.txt").read_text().splitlines()) == stay
    )  # not only those of the clusters
    rows = list(csv.DictReader((out / "clusters.csv").open()))
    assert len(rows) == 6 and rows[0]["keep"] in ("True", "False")
    assert json.loads((out / "clusters.json").read_text())["drop"] == 4
    assert Image.open(picture).size[0] > 300
    assert hashes(duplicated) == before  # nothing was deleted or changed
    with pytest.raises(AMGError, match="nothing is overwritten"):
        dedup.run(command(index.path, "--out", out))


def test_json_and_nothing_found(tmp_path, pixel, index, capsys):
    dedup.run(command(index.path, "--json"))
    data = json.loads(capsys.readouterr().out)
    assert (data["clusters"], data["pictures"], data["byte_identical"]) == (2, 6, 2)
    assert data["text"] is None and data["threshold"] == 0.7
    build(fill(tmp_path / "different", 4), tmp_path / "other", pixel)
    dedup.run(command(tmp_path / "other"))
    assert "Nothing to drop" in capsys.readouterr().out


def test_several_indexes_are_one_set(tmp_path, index, pixel, capsys):
    other = fill(tmp_path / "other", 2, first=2)  # p002 and p003 again, byte by byte
    shutil.copy(other / "p003.png", other / "u-same.png")
    (tmp_path / "elsewhere").mkdir()
    build(other, tmp_path / "elsewhere/index", pixel)
    out = tmp_path / "lists"
    dedup.run(command(index.path, tmp_path / "elsewhere/index", "--out", out))
    assert "in index-2" in capsys.readouterr().out
    lists = {path.name: path.read_text().split() for path in out.glob("*.txt")}
    assert sorted(lists["drop.index-2.txt"]) == ["p002.png", "p003.png", "u-same.png"]
    assert lists["keep.index-2.txt"] == []
    assert "p002.png" in lists["keep.index.txt"] and "t-same.png" in lists["keep.index.txt"]
    rows = list(csv.DictReader((out / "clusters.csv").open()))
    assert {row["index"] for row in rows if row["source"] == "p002.png"} == {"index", "index-2"}


def test_names_with_line_breaks_stay_out_of_the_lists(tmp_path, pixel):
    odd = fill(tmp_path / "odd", 1)
    (odd / "p000.png").rename(odd / "a\nb.png")
    build(odd, tmp_path / "index", pixel)
    with Index.open(tmp_path / "index") as index:
        (note,) = dedup.write(tmp_path / "out", [], index, 0.7)
    assert "line break" in note and (tmp_path / "out/keep.txt").read_text() == ""


def test_captions_for_training(tmp_path, index, capsys):
    more = tmp_path / "more.jsonl"
    more.write_text('{"file_name": "p000.png", "text": "from a captioner"}\n')
    dedup.run(
        command(index.path, "--captions", tmp_path / "c", "--variants", 40,
                "--more-captions", more)
    )  # fmt: skip
    lines = (tmp_path / "c/metadata.jsonl").read_text().splitlines()
    rows = {row["file_name"]: row for row in map(json.loads, lines)}
    assert set(rows["p000.png"]["texts"]) == {"a red fox", "the red fox", "from a captioner"}
    assert set(rows["s-same.png"]["texts"]) == {"a red fox", "the red fox"}
    assert len(rows) == 6
    same = rows["p003.png"]["texts"], rows["t-same.png"]["texts"]
    assert set(same[0]) == set(same[1]) == {"sea"}
    dedup.run(command(index.path, "--captions", tmp_path / "d", "--all", "--method", "rt",
                      "--caption-form", "txt", "--probability", 1))  # fmt: skip
    written = {path.stem: path.read_text().strip() for path in (tmp_path / "d").iterdir()}
    assert len(written) == 12
    assert written["p000"] != written["s-same"]  # the same bytes, other words
    assert set(written["p001"].split()) <= {"a", "red", "fox", "the", "sea"}
    dedup.run(command(index.path, "--captions", tmp_path / "e", "--method", "rna",
                      "--caption-form", "txt", "--probability", 1))  # fmt: skip
    words = (tmp_path / "e/p000.txt").read_text().split()
    assert [w for w in words if not w.isdigit()] == ["a", "red", "fox"] and len(words) == 7
    assert (tmp_path / "set/p000.txt").read_text() == "a red fox"


def test_wrong_numbers_are_refused(index):
    for arguments in (
        ("--threshold", 1),
        ("--device", "abacus"),
        ("--probability", 2),
        ("--scale", 5),
    ):
        with pytest.raises(AMGError):
            dedup.run(command(index.path, *arguments))


# -------------------------------------------------------------------------------- sheets


def test_a_sheet_of_what_was_found():
    red, blue = (Image.new("RGB", (50, 25), colour) for colour in ("red", "blue"))
    cells = [sheet.Tile(red, ["query"], sheet.ASKED)]
    cells += [sheet.Tile(blue, ["0.91", "größe 漢字 " * 20])] * 7
    drawn = sheet.draw([sheet.Group(cells)], heading="x", columns=4)
    pixels = np.asarray(drawn).reshape(-1, 3)
    assert (pixels == (255, 0, 0)).all(1).sum() > 5000
    assert (pixels == (0, 0, 255)).all(1).sum() > 7 * 5000
    assert (pixels == sheet.ASKED).all(1).sum() > 300
    assert drawn.height > 2 * sheet.SIDE
    assert sheet.draw([]).size[0] > 0


def test_text_is_cut_to_the_width():
    font = sheet._font(11)
    for width in (20, 60, 300):
        cut = sheet.fit("a rather long caption of many words " * 9, font, width)
        assert font.getlength(cut) <= width and len(cut) > 1
    assert sheet.fit("short", font, 300) == "short"


def test_a_sheet_ends_where_viewers_do(monkeypatch):
    monkeypatch.setattr(sheet, "MAX_SIDE", 900)
    cell = sheet.Tile(Image.new("RGB", (9, 9)), ["x"])
    assert sheet.draw([sheet.Group([cell], "t")] * 50).height < 1000
