"""Series, other colours and mirror images are no duplicates; what a copy goes through does not matter."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

from amg_core.images import to_tensor
from amg_core.index import Index, build
from index_tools import dedup, verifying
from tests.index.helpers import fill


def drawing(points: int = 5, colour: str = "crimson", shift: int = 0) -> Image.Image:
    """A disc with lines, and a mark at one side, 200 px."""
    image = Image.new("RGB", (200, 200), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((30, 30, 170, 170), fill=colour, outline="black", width=4)
    for i in range(points):
        draw.line((50 + i * 100 // points, 40, 100, 160), fill="black", width=3)
    draw.polygon([(120 + shift, 60), (150 + shift, 70), (130 + shift, 100)], fill="gold")
    return image


def jpeg(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=40)
    return Image.open(file).convert("RGB")


def share(a: Image.Image, b: Image.Image, **options) -> float:
    return verifying.compare(to_tensor(a), [to_tensor(b)], **options)[0]


COPIES = {
    "same": lambda x: x,
    "jpeg": jpeg,
    "half the size": lambda x: x.resize((100, 100)),
    "blurred": lambda x: x.filter(ImageFilter.GaussianBlur(1.5)),
    "darker": lambda x: x.point(lambda v: int(v * 0.7)),
    "cropped": lambda x: x.crop((10, 10, 190, 190)),
}


@pytest.mark.parametrize("edit", COPIES)
def test_copies_agree(edit):
    assert share(COPIES[edit](drawing()), drawing()) > 0.9


OTHERS = {
    "another of the series": drawing(points=6),
    "another colour": drawing(colour="purple"),
    "moved mark": drawing(shift=-60),
    "mirrored": drawing().transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "blank": Image.new("RGB", (200, 200), "white"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others_do_not(name):
    assert share(OTHERS[name], drawing()) == 0


def test_variants_on_demand():
    assert share(OTHERS["mirrored"], drawing(), also=("mirrored",)) > 0.9
    assert share(OTHERS["another colour"], drawing(), also=("recoloured",)) > 0.9


def test_a_symmetric_picture_is_its_copy():
    image = Image.new("RGB", (200, 200), "white")
    ImageDraw.Draw(image).polygon([(100, 20), (180, 180), (20, 180)], fill="navy")
    assert share(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), image) > 0.9


def test_a_series_needs_more():
    faint = drawing().filter(ImageFilter.GaussianBlur(2))
    assert share(drawing(), drawing(), series=True) > 0.9
    assert share(faint.crop((6, 6, 194, 194)), drawing(), series=True) == 0


def test_two_blank_pictures_are_not_verified():
    blank = torch.ones(1, 3, 64, 64)
    assert verifying.compare(blank, [blank]) == [0.0]


@pytest.fixture
def index(tmp_path, pixel):
    folder = fill(tmp_path / "set", 3)
    drawing().save(folder / "red.png")
    drawing().resize((150, 150)).save(folder / "small.png")
    drawing(colour="firebrick").save(folder / "fire.png")
    drawing(colour="purple").save(folder / "purple.png")
    drawing().transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "left.png")
    build(folder, tmp_path / "index", pixel)
    with Index.open(tmp_path / "index") as index:
        yield index


def test_dedup_drops_the_copy_only(index):
    found = dedup.clusters(index, 0.3, verify=verifying.verification(index))
    (one,) = [one for one in found if any(m.source == "red.png" for m in one.members)]
    assert "small.png" in [m.source for m in one.dropped]
    dropped = {m.source for cluster in found for m in cluster.dropped}
    assert not dropped & {"purple.png", "left.png"}
    assert all(m.verified > 0.9 for m in one.dropped)
    paper = dedup.clusters(index, 0.3, linkage="components")
    assert any(len(one.members) > 3 for one in paper)  # a chain of variants


def test_stars_verify_with_the_kept_only():
    """a is like b, b like c, but a is not c: c stays. Chains would drop it."""
    similarity = {0: {1: 0.9}, 1: {0: 0.9, 2: 0.9}, 2: {1: 0.9}}
    assert dedup.stars([0, 1, 2], similarity, None) == {0: {1: None}}
    asked = []

    def verify(i, others, series):
        asked.append((i, others, series))
        return [0.0 for _ in others]

    assert dedup.stars([0, 1, 2], similarity, verify) == {}
    assert asked == [(1, [0], False), (2, [1], False)]


def test_a_picture_like_many_others_is_in_a_series():
    count = dedup.SERIES + 2
    similarity = {i: {j: 0.9 for j in range(count) if j != i} for i in range(count)}
    asked = []

    def verify(i, others, series):
        asked.append((len(others), series))
        return [0.0 for _ in others]

    dedup.stars(list(range(count)), similarity, verify)
    assert max(asked) == (dedup.COMPARED, True) and all(series for _, series in asked)


def test_a_caption_counts_more_than_the_area():
    def member(i, side, caption):
        return dedup.Member(i, f"{i}.png", caption, "", side, side)

    plain, told, long = member(0, 900, ""), member(1, 10, "a cat"), member(2, 500, "cat")
    assert min((plain, told, long), key=dedup.preference) is long
    assert min((plain, told), key=dedup.preference) is told
