"""The page in a real browser, on the real front end.

With COMFYUI_PATH: served by a real ComfyUI, with its own front end or the one whose static folder
COMFYUI_FRONT_END names. Without: by `host`, a small server, which needs the packages
comfyui-frontend-package, aiohttp and websocket-client. Both need a Chromium ($CHROMIUM, or on the PATH).
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.server import served
from tests.nodes.conftest import loaded_pack
from tests.web.browser import PATIENCE, Page, chromium
from tests.web.front import MODES

ROOT = Path(__file__).parents[2]
COMFYUI = os.environ.get("COMFYUI_PATH", "")
EVENTS = Path(__file__).parent / "events.json"
INDEX = "amg-demo"
PICTURES = 60  # in the index of the small server
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))


def missing(*packages: str) -> str:
    """Why tests that need these packages cannot run; "" where they can."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"needs pip install {' '.join(absent)}".replace("_", "-") if absent else ""


@pytest.fixture(scope="session")
def pack(tmp_path_factory):
    """The nodes on a stand-in for the host, with the index that all tests of the page look at."""
    with loaded_pack(tmp_path_factory.mktemp("models")) as made:
        made.module("nodes.routes").WAIT = PATIENCE
        yield made


@pytest.fixture(scope="session")
def indexes(pack, tmp_path_factory) -> Path:
    """The index folder of the small server, with the index `amg-demo` and a file beside it."""
    from amg_core.descriptors import create
    from amg_core.index import build
    from tests.index.helpers import demo_pictures

    pictures = demo_pictures(tmp_path_factory.mktemp("pictures"), PICTURES, EVENTS.read_text())
    folder = Path(pack.folders["amg_indexes"][0][0])
    build(pictures, folder / INDEX, create("pixel"))
    (folder / "secret.json").write_text('{"secret": true}')
    return folder


@pytest.fixture(scope="session")
def messages(indexes) -> list[tuple[str, dict]]:
    """(type, data) of every message of the recorded run, with the ids that pictures have here."""
    from amg_core.index import Index

    found = [tuple(each) for each in json.loads(EVENTS.read_text())]
    with Index.open(indexes / INDEX) as index:
        for kind, data in found:
            if kind == "amg.step":
                for near in data.get("neighbors", {}).values():
                    near["id"] = index.find(near["sha256"])
    return found


@pytest.fixture(scope="session")
def schemas(pack) -> dict:
    return {name: node.define_schema() for name, node in pack.nodes.items()}


@pytest.fixture(scope="session")
def info(schemas, indexes) -> dict:
    """/object_info as the small server gives it."""
    from tests.web.host import core_nodes, info_of

    core = core_nodes()
    sampler = core["KSampler"]["input"]["required"]
    options = {name: sampler[name][0] for name in ("sampler_name", "scheduler")}
    options |= {"index_name": [INDEX]}
    return core | {name: info_of(schema, options) for name, schema in schemas.items()}


@pytest.fixture(scope="session")
def small(pack, request):
    """The small server."""
    if reason := missing("aiohttp", "comfyui_frontend_package"):
        pytest.skip(reason)
    from tests.web.host import Host

    spec = importlib.util.find_spec("comfyui_frontend_package")
    front_end = Path(spec.origin).resolve().parent / "static"
    info, messages = map(request.getfixturevalue, ("info", "messages"))
    host = Host(front_end, info, messages, pack.module("nodes.routes").add_to)
    yield host
    host.close()


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """A real server (`benchmarks.server.Server`)."""
    other = os.environ.get("COMFYUI_FRONT_END")
    options = ["--front-end-root", other] if other else []
    with served(Path(COMFYUI), tmp_path_factory.mktemp("base"), *options) as started:
        yield started


@pytest.fixture(scope="session")
def server(request):
    """The one or the other. `real`: whether a prompt is really run."""
    host = request.getfixturevalue("real" if COMFYUI else "small")
    return SimpleNamespace(url=host.url, real=bool(COMFYUI), host=host)


@pytest.fixture(scope="module")
def front(server):
    """The front end in a browser, with what the tests do to it; our modules throw nothing there.

    Closed at the end of each file: it draws, and takes time from the tests after it.
    """
    if chromium() is None:
        pytest.skip("needs a Chromium: install one, or set CHROMIUM to its path")
    if reason := missing("websocket"):
        pytest.skip(reason)
    from tests.web.front import Front

    page = Page()
    try:
        made = Front(page, server)
        made.open()
        yield made
        ours = ("anti-memorization", "amg")
        assert [each for each in page.errors if any(word in each.lower() for word in ours)] == []
    finally:
        page.close()


@pytest.fixture(params=MODES)
def mode(request, front):
    """A way of rendering nodes that this front end has, switched on."""
    if request.param not in front.modes:
        pytest.skip("this front end has no Nodes 2.0 yet")
    front.render(request.param)
    return request.param
