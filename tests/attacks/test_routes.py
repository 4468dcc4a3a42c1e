"""Other pages than the host's own, and indexes that keep the routes busy."""

from __future__ import annotations

import asyncio
import shutil
import threading
from pathlib import Path

import pytest

pytest.importorskip("aiohttp", reason="needs pip install aiohttp")

from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from amg_core.descriptors import create
from amg_core.index import Index, build
from tests.index.helpers import fill

BASE = "/amg/indexes"
OWN = {"Cross-Origin-Resource-Policy": "same-origin", "X-Content-Type-Options": "nosniff"}


@pytest.fixture(scope="module")
def indexes(pack, tmp_path_factory) -> Path:
    folder = Path(pack.folders["amg_indexes"][0][0])
    pictures = fill(tmp_path_factory.mktemp("pictures"), 3)
    build(pictures, folder / "private", create("pixel"))
    return folder


@pytest.fixture
def ask(pack, indexes):
    """`ask((path, headers), …)` -> [(status, headers, body)], asked one after the other."""

    def all_of(*questions, together: bool = False):
        async def run():
            routes = web.RouteTableDef()
            pack.module("nodes.routes").add_to(routes)
            app = web.Application()
            app.add_routes(routes)
            async with TestClient(TestServer(app)) as client:

                async def one(path, headers):
                    headers = dict(headers)
                    done = headers.pop("done", lambda: None)
                    kind = client.get if not headers.pop("post", None) else client.post
                    async with kind(path, headers=headers) as answer:
                        found = answer.status, answer.headers, await answer.read()
                    done()
                    return found

                if together:
                    return await asyncio.gather(*(one(*each) for each in questions))
                return [await one(*each) for each in questions]

        return asyncio.run(run())

    return all_of


def hash_of(indexes, i=0) -> str:
    with Index.open(indexes / "private") as index:
        return index.record(i).sha256


def test_a_part_of_a_hash_tells_nothing(ask, indexes):
    """Else sixteen pictures on any web page tell the first digit, sixteen more the next."""
    right = hash_of(indexes)
    path = f"{BASE}/private/thumbnails/0"
    for part in ("", right[:1], right[:63], right + "0", right.upper(), "?", hash_of(indexes, 1)):
        ((status, _, body),) = ask((f"{path}?sha256={part}", {}))
        assert status in (400, 404), part
        assert b"error" in body
    ((status, headers, _),) = ask((f"{path}?sha256={right}", {}))
    assert (status, headers["Content-Type"]) == (200, "image/webp")


STRANGERS = [
    {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Sec-Fetch-Site": "odd"},
    {"Sec-Fetch-Site": "cross-site", "Origin": "http://studio:8188", "Host": "studio:8188"},
    {"Origin": "null"}, {"Origin": "https://example.org"}, {"Origin": ""},
    {"Origin": "http://studio:9999", "Host": "studio:8188"},  # another program on that machine
    {"Origin": "http://studio", "Host": "studio:8188"},
    {"Origin": "http://studio:8188.example.org", "Host": "studio:8188"},
]  # fmt: skip
FRIENDS = [
    {},  # a program
    {"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"},
    {"Origin": "http://192.168.1.20:8188", "Host": "192.168.1.20:8188"},
    {"Origin": "http://Studio.local:8188", "Host": "studio.local:8188"},
    {"Origin": "https://studio.example", "Host": "studio.example"},
    # behind a proxy that does not hand the name on
    {"Sec-Fetch-Site": "same-origin", "Origin": "https://studio.example", "Host": "127.0.0.1:8188"},
]  # fmt: skip


@pytest.mark.parametrize("headers", STRANGERS, ids=str)
def test_other_pages_are_refused_everywhere(ask, indexes, headers):
    right = hash_of(indexes)
    paths = ["", "/private", "/private/entries", f"/private/thumbnails/0?sha256={right}"]
    asked = [(BASE + path, dict(headers)) for path in paths]
    asked += [(f"{BASE}/private/{what}", headers | {"post": True}) for what in ("mute", "unmute")]
    for status, _, body in ask(*asked):
        assert (status, body) == (
            403, b'{"error": "Only the page of this server may ask for that."}'
        )  # fmt: skip


@pytest.mark.parametrize("headers", FRIENDS, ids=str)
def test_the_page_itself_and_programs_are_answered(ask, headers):
    for status, _, _ in ask((BASE, dict(headers)), (f"{BASE}/private/entries", dict(headers))):
        assert status == 200


def test_no_answer_may_be_embedded_elsewhere(ask, indexes):
    """A picture that loads, and one that does not, look the same from another page."""
    right = hash_of(indexes)
    thumbnail = f"{BASE}/private/thumbnails/0?sha256="
    paths = [thumbnail + right, thumbnail + "0" * 64, thumbnail, BASE, f"{BASE}/nothing",
             f"{BASE}/private/entries?limit=0"]  # fmt: skip
    found = ask(*((path, {}) for path in paths), (BASE, {"Origin": "null"}))
    assert [status for status, _, _ in found] == [200, 404, 400, 200, 404, 400, 403]
    for _, headers, _ in found:
        assert {key: headers[key] for key in OWN} == OWN


# ---------------------------------------------------------------- indexes that are slow to read


@pytest.fixture
def stuck(pack, indexes, monkeypatch):
    """An index beside the other, whose pages are not answered before this event is set."""
    routes, free = pack.module("nodes.routes"), threading.Event()
    if not (indexes / "stuck").exists():
        shutil.copytree(indexes / "private", indexes / "stuck")
    real = routes.page

    def page(index, *rest):
        if index.name == "stuck":
            free.wait(600)
        return real(index, *rest)

    monkeypatch.setattr(routes, "page", page)
    yield free
    free.set()


def test_an_index_that_is_stuck_delays_no_other(ask, stuck):
    """Also when it is asked for again and again."""
    order = []

    def done(name):
        order.append(name)
        if name == "private":
            stuck.set()

    found = ask(*((f"{BASE}/{name}/entries", {"done": lambda name=name: done(name)})
                  for name in ["stuck"] * 9 + ["private"]), together=True)  # fmt: skip
    assert [status for status, _, _ in found] == [200] * 10
    assert order[0] == "private"


def test_a_page_is_told_that_an_index_is_slow(ask, stuck, pack, monkeypatch):
    monkeypatch.setattr(pack.module("nodes.routes"), "WAIT", 0.2)
    found = ask(*[(f"{BASE}/stuck/entries", {})] * 3)
    for status, _, body in found:
        assert status == 503
        assert b"Index stuck takes long to read" in body


def test_nothing_that_is_stuck_keeps_the_host_from_ending(ask):
    ask((BASE, {}))
    threads = [thread for thread in threading.enumerate() if "amg-routes" in thread.name]
    assert threads and all(thread.daemon for thread in threads)
