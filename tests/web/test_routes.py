"""The routes: what they give, and that they give nothing else."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from io import BytesIO

import pytest
from PIL import Image

from amg_core.index import Index
from tests.web.browser import PATIENCE
from tests.web.conftest import INDEX, PICTURES


@pytest.fixture
def ask(small):
    """`ask(path, body=None)` -> (status, parsed answer); the path goes out as it is written."""

    def request(path: str, body=None, kind: str = "application/json"):
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        headers = {"Content-Type": kind} if data is not None else {}
        sent = urllib.request.Request(f"{small.url}/api/amg/indexes{path}", data, headers)
        try:
            with urllib.request.urlopen(sent, timeout=PATIENCE) as answer:
                text, status = answer.read(), answer.status
                if answer.headers.get_content_type() != "application/json":
                    return status, text
        except urllib.error.HTTPError as error:
            text, status = error.read(), error.code
        return status, json.loads(text)

    return request


@pytest.fixture
def entries(ask):
    def found(**query):
        status, answer = ask(f"/{INDEX}/entries?{urllib.parse.urlencode(query)}")
        assert status == 200, answer
        return answer

    return found


def test_what_there_is(ask):
    assert ask("") == (200, {"indexes": [INDEX]})
    status, about = ask(f"/{INDEX}")
    assert status == 200
    assert set(about) == {"name", "count", "muted", "descriptor", "created"}
    assert (about["name"], about["count"], about["muted"]) == (INDEX, PICTURES, 0)


def test_pages_are_the_whole_index_once(entries, indexes):
    start, seen = 0, []
    while start is not None:
        page = entries(start=start, limit=25)
        assert len(page["entries"]) <= 25
        seen += page["entries"]
        start = page["next"]
    with Index.open(indexes / INDEX) as index:
        wanted = [(i, r.sha256, r.source, r.caption) for i, r in enumerate(index.records())]
    assert [(e["id"], e["sha256"], e["source"], e["caption"]) for e in seen] == wanted


def test_search_is_what_python_finds(entries, indexes):
    with Index.open(indexes / INDEX) as index:
        records = list(index.records())
    for text in ("fox", "FOX violet", "once-1", "rays on", "100%", "_", "' OR 1=1 --"):
        words = text.lower().split()
        wanted = [
            i
            for i, r in enumerate(records)
            if all(w in f"{r.source} {r.caption}".lower() for w in words)
        ]
        found = entries(text=text, limit=100)
        assert [e["id"] for e in found["entries"]] == wanted, text
        assert found["next"] is None
    assert entries(text="fox")["entries"]


def test_a_page_of_a_search_leads_to_the_next(entries):
    every = [e["id"] for e in entries(text="on", limit=100)["entries"]]
    assert len(every) > 7
    start, seen = 0, []
    while start is not None:
        page = entries(text="on", limit=7, start=start)
        assert page["entries"]
        seen += [e["id"] for e in page["entries"]]
        start = page["next"]
    assert seen == every


def test_a_long_search_says_how_far_it_came(pack, indexes):
    routes = pack.module("nodes.routes")
    with Index.open(indexes / INDEX) as index:
        found = routes.page(index, 0, 10, "not there at all", False, patience=-1)
        assert found == {"entries": [], "next": 1, "done": False}
        found = routes.page(index, 1, 10, "not there at all", False)
        assert found == {"entries": [], "next": None, "done": True}


def test_thumbnails(ask, entries, indexes):
    first, second = entries()["entries"][:2]
    status, data = ask(f"/{INDEX}/thumbnails/0?sha256={first['sha256']}")
    assert status == 200
    shown = Image.open(BytesIO(data)).convert("RGB")
    with Index.open(indexes / INDEX) as index:
        stored = index.thumbnail(0)
    assert shown.size == stored.size
    difference = zip(shown.resize((8, 8)).tobytes(), stored.resize((8, 8)).tobytes(), strict=True)
    assert max(abs(a - b) for a, b in difference) < 24
    status, answer = ask(f"/{INDEX}/thumbnails/0?sha256={second['sha256']}")
    assert status == 404
    assert "no longer in index" in answer["error"]


def test_muting_and_back(ask, entries, indexes):
    chosen = entries(text="fox")["entries"][0]
    body = {"sha256": [chosen["sha256"]]}
    assert ask(f"/{INDEX}/mute", body | {"reason": "my own"}) == (200, {"changed": 1})
    with Index.open(indexes / INDEX) as index:
        assert index.muted == {chosen["id"]: "my own"}
    assert [e["muted"] for e in entries(muted=1)["entries"]] == ["my own"]
    assert ask(f"/{INDEX}")[1]["muted"] == 1
    assert ask(f"/{INDEX}/unmute", body) == (200, {"changed": 1})
    assert entries(muted=1)["entries"] == []
    with Index.open(indexes / INDEX) as index:
        assert index.muted == {}


NAMES = [
    "..", ".", "../amg_indexes", "secret.json", "nothing", "amg-demo/..", "amg-demo/", "", " ",
    "/etc", "C:\\", "..\\..", "amg-demo\x00", "~", "(no index yet: use Build Memorization Index)",
    "%2e%2e", "x" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=[repr(n)[:20] for n in NAMES])
@pytest.mark.parametrize("rest", ["", "/entries", "/thumbnails/0"])
def test_other_names_open_nothing(ask, indexes, name, rest):
    """Also where a manifest lies: the folder above holds one."""
    (indexes.parent / "manifest.json").write_text("{}")
    (indexes / "manifest.json").write_text("{}")
    try:
        status, answer = ask(f"/{urllib.parse.quote(name, safe='')}{rest}")
    finally:
        (indexes.parent / "manifest.json").unlink()
        (indexes / "manifest.json").unlink()
    assert 400 <= status < 500
    assert str(indexes.parent) not in json.dumps(answer)
    if rest and name.strip("./"):
        assert answer == {"error": "There is no index of that name. Press R to refresh the list."}


@pytest.mark.parametrize(
    "path",
    ["/../../manifest.json", "/..%2f..%2fmanifest.json", "/amg-demo/../../secret.json",
     "/amg-demo/thumbnails/..%2f..%2fsecret.json", "/amg-demo/secret.json"],
)  # fmt: skip
def test_traversal_leads_nowhere(ask, path):
    status, answer = ask(path)
    assert 400 <= status < 500
    assert "secret" not in json.dumps(answer)


@pytest.mark.parametrize(
    "query",
    ["limit=101", "limit=0", "limit=-1", "limit=1e9", "limit=99999999999999999999", "start=-1",
     "start=x", "start=٣", "muted=2", "text=" + "x" * 201, f"start={1 << 50}"],
)  # fmt: skip
def test_sizes_are_bounded(ask, query):
    status, answer = ask(f"/{INDEX}/entries?{urllib.parse.quote(query, safe='=')}")
    assert status == 400
    assert answer["error"].startswith(query.split("=")[0])


def test_a_start_beyond_the_end_is_an_empty_page(entries):
    assert entries(start=10**9) == {"entries": [], "next": None, "done": True}


@pytest.mark.parametrize("number", ["60", "-1", "0x0", "1.5", "999999999999", "²"])
def test_thumbnails_that_are_not_there(ask, number):
    status, answer = ask(f"/{INDEX}/thumbnails/{urllib.parse.quote(number)}")
    assert status in (400, 404)
    assert set(answer) == {"error"}


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"null", b'"x"', b"{", b'{"sha256": "x"}', b'{"sha256": []}', b'{"sha256": [1]}',
     b'{"sha256": ["../x"]}', {"sha256": ["0" * 64] * 101}, {"sha256": ["A" * 64]},
     {"sha256": ["0" * 64], "reason": 1}, {"sha256": ["0" * 64], "reason": "x" * 501},
     b"[" * 60_000],
    ids=str,
)  # fmt: skip
def test_muting_takes_nothing_else(ask, body, indexes):
    status, answer = ask(f"/{INDEX}/mute", body)
    assert status == 400
    assert answer["error"].startswith("Send JSON")
    with Index.open(indexes / INDEX) as index:
        assert index.muted == {}


def test_muting_is_bounded_and_asks_for_json(ask):
    assert ask(f"/{INDEX}/mute", b" " * 70_000)[0] == 413
    status, answer = ask(f"/{INDEX}/mute", {"sha256": ["0" * 64]}, kind="text/plain")
    assert (status, set(answer)) == (415, {"error"})
    assert ask(f"/{INDEX}/mute", {"sha256": ["0" * 64]}) == (200, {"changed": 0})


def test_a_damaged_index_is_told_without_its_folder(ask, indexes):
    broken = indexes / "broken"
    broken.mkdir()
    (broken / "manifest.json").write_text("{}")
    try:
        status, answer = ask("/broken/entries")
    finally:
        (broken / "manifest.json").unlink()
        broken.rmdir()
    assert status == 500
    assert answer["error"].startswith("Index broken cannot be opened")
    assert str(indexes) not in answer["error"]


def test_a_changed_index_is_opened_anew(ask, entries, indexes):
    """Also one that another program changed."""
    from amg_core.index import mute, unmute

    assert entries(muted=1)["entries"] == []
    mute(indexes / INDEX, lambda entry: entry.source.startswith("once"), "elsewhere")
    try:
        assert {e["muted"] for e in entries(muted=1)["entries"]} == {"elsewhere"}
    finally:
        unmute(indexes / INDEX, lambda _: True)
    assert entries(muted=1)["entries"] == []


def test_weights_that_are_not_there(small):
    """Where they are published and where to put them; no folder of this machine."""
    with urllib.request.urlopen(f"{small.url}/api/amg/weights", timeout=PATIENCE) as answer:
        found = json.loads(answer.read())
    assert found["ready"] is False
    assert "github.com/facebookresearch/sscd-copy-detection" in found["words"]
    assert "models/amg" in found["words"] and "/tmp" not in found["words"]
