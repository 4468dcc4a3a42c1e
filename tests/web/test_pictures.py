"""Nodes and views look as they did when somebody looked at them; every help page shows its node."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import re

import pytest
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from tests.web.browser import chromium
from tests.web.conftest import INDEX, ROOT, missing
from tests.web.pictures import ACCEPT, FRONT_END, LIMIT, difference, save, side_by_side
from tests.web.scenes import HELP, NODES, REFERENCES, VIEWS

IDS = sorted(json.loads((ROOT / "tests/nodes/schema.json").read_text()))
BY_KIND = {scene.kind: scene for scene in NODES}
SCENES = [*NODES, *VIEWS]


@pytest.fixture(scope="module")
def studio(request):
    if reason := missing("comfyui_frontend_package", "aiohttp", "websocket"):
        pytest.skip(reason)
    if (here := importlib.metadata.version("comfyui-frontend-package")) != FRONT_END:
        pytest.skip(f"pictures are of front end {FRONT_END}, this is {here}")
    if chromium() is None:
        pytest.skip("needs a Chromium: install one, or set CHROMIUM to its path")
    from amg_core.index import Index
    from tests.web.studio import Studio

    host, indexes = map(request.getfixturevalue, ("small", "indexes"))
    with Index.open(indexes / INDEX) as index:
        made = Studio(host, index.find)
        try:
            yield made
            assert [error for error in made.page.errors if "amg" in error.lower()] == []
        finally:
            made.close()


def opened(path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.path.stem)
def test_it_looks_as_it_did(studio, scene, tmp_path):
    new, path = studio.take(scene), scene.path
    accept = os.environ.get(ACCEPT)
    if not path.is_file():
        assert accept, (
            f"{path} is missing: python -m tests.web.pictures {path.stem}, and look at it"
        )
        save(new, path)
        return
    old = opened(path)
    worst, at = difference(old, new)
    if worst > LIMIT and accept:
        save(new, path)
    elif worst > LIMIT:
        save(new, tmp_path / path.name)
        side_by_side(old, new, at).save(tmp_path / "old_and_new.png")
        pytest.fail(
            f"{path.relative_to(ROOT)} looks different at {at}: {worst}, at most {LIMIT} is the same. "
            f"Look at {tmp_path / 'old_and_new.png'}. If it is as it should be now: "
            f"python -m tests.web.pictures {path.stem}"
        )


# ---------------------------------------------------------------- the comparison can fail


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        ("AMG_Sampler", ".amg-line { display: none }"),
        ("AMG_Sampler", ".amg-line.amg-c3 { display: none }"),
        ("AMG_Sampler", ".amg-threshold { display: none }"),
        ("AMG_Sampler", ".amg-threshold { stroke: #3b8fe0 !important }"),
        ("AMG_Sampler", ".amg-thumb { visibility: hidden }"),
        ("AMG_SimilarityProbe", ".amg-mark { display: none }"),
        ("AMG_SimilarityProbe", ".amg-fill { background: #3b8fe0 !important }"),
    ],
)
def test_what_is_lost_on_a_panel_is_seen(studio, kind, rule):
    scene = BY_KIND[kind]
    if getattr(studio, "shown", None) is not scene:
        studio.show(scene)
        studio.shown = scene
    studio.front.js(
        "window.amgRule = document.createElement('style');"
        f"amgRule.textContent = {json.dumps(rule)}; document.head.append(amgRule)"
    )
    try:
        broken = studio.shot()
    finally:
        studio.front.js("amgRule.remove()")
    assert difference(opened(scene.path), broken)[0] > LIMIT


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("AMG_Sampler", {"widgets": BY_KIND["AMG_Sampler"].widgets | {"dissimilarity": 1.05}}),
        ("AMG_Sampler", {"palette": "arc"}),
        ("AMG_Apply", {"report": BY_KIND["AMG_Apply"].report[:10]}),
        ("AMG_DelayedGuidance", {"widgets": {"mode": "opposite"}}),
        ("AMG_CombineIndexes", {"before": BY_KIND["AMG_CombineIndexes"].before[:1]}),
        ("AMG_StrengthGrid", {"text": ""}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_another_state_is_seen(studio, kind, change):
    scene = BY_KIND[kind]
    other = studio.take(dataclasses.replace(scene, **change))
    assert difference(opened(scene.path), other)[0] > LIMIT


def test_a_missing_widget_is_seen(studio):
    scene = BY_KIND["AMG_PromptNoise"]
    studio.show(scene)
    studio.front.js(
        "amgOn('AMG_PromptNoise')[0].widgets.splice(1, 1); app.canvas.setDirty(true, true)"
    )
    assert difference(opened(scene.path), studio.shot())[0] > LIMIT


def test_what_another_machine_does_is_let_through():
    """Half a pixel of shift, softer edges, slightly other colours; not a word less."""
    picture = opened(BY_KIND["AMG_Sampler"].path)
    picture = picture.crop((0, picture.height - 500, picture.width, picture.height))
    assert difference(picture, picture) == (0, (0, 0))
    half = picture.transform(picture.size, Image.AFFINE, (1, 0, 0.5, 0, 1, 0.5), Image.BILINEAR)
    for same in (
        ImageChops.offset(picture, 1, 0),
        ImageChops.offset(picture, 0, 1),
        half,
        picture.filter(ImageFilter.GaussianBlur(0.5)),
        picture.point(lambda value: min(255, value + 8)),
    ):
        inner = [each.crop((4, 4, each.width - 4, each.height - 4)) for each in (picture, same)]
        assert difference(*inner)[0] <= LIMIT
    lost = picture.copy()
    ImageDraw.Draw(lost).rectangle((124, 372, 250, 388), fill=lost.getpixel((330, 380)))  # words
    assert difference(picture, lost)[0] > LIMIT
    assert difference(picture, picture.crop((0, 0, picture.width, picture.height - 4)))[0] > LIMIT


# ---------------------------------------------------------------- what is committed


def test_the_help_panel_shows_the_picture(front):
    """The relative path of the page is resolved by the front end, in every version alike."""
    front.render("classic")
    front.load({"nodes": [], "links": [], "version": 0.4})
    front.js(
        "const n = LiteGraph.createNode('AMG_SimilarityProbe'); app.graph.add(n); n.pos = [300, 300];"
        "app.canvas.selectNode(n); app.canvas.setDirty(true, true)"
    )
    front.until("document.querySelector('[data-testid=info-button]')")
    front.js("document.querySelector('[data-testid=info-button]').click()")
    picture = "document.querySelector('img[src$=\"/docs/AMG_SimilarityProbe.webp\"]')"
    front.until(f"{picture}?.naturalWidth > 200")
    assert front.js(f"return {picture}.alt").startswith("Similarity Probe after a run.")


def test_there_is_a_scene_for_every_node():
    assert sorted(BY_KIND) == IDS
    assert len({scene.path for scene in SCENES}) == len(SCENES)


@pytest.mark.parametrize("node_id", IDS)
def test_the_help_page_begins_with_its_picture(node_id):
    """Before the first table, with a sentence for those who do not see it."""
    page = (HELP / f"{node_id}.md").read_text()
    found = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page.split("\n| ")[0])
    assert [name for _, name in found][:1] == [f"{node_id}.webp"]
    for alt, name in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page):
        assert (HELP / name).is_file()
        assert 60 < len(alt) < 400 and alt.endswith("."), alt


def test_pictures_are_small_and_none_is_left_over():
    pages = "".join(path.read_text() for path in HELP.glob("*.md"))
    files = [path for path in HELP.rglob("*") if path.is_file() and path.suffix != ".md"]
    assert all(f"({path.name})" in pages for path in files)
    assert sum(path.stat().st_size for path in files) < 700_000
    references = {path for path in REFERENCES.glob("*") if path.is_file()}
    assert references == {scene.path for scene in VIEWS}
    assert all(path.stat().st_size < 60_000 for path in files)
    assert all(path.stat().st_size < 80_000 for path in references)


def test_the_front_end_is_the_one_that_tests_install():
    assert f"comfyui-frontend-package=={FRONT_END}" in (ROOT / "run.py").read_text()
