"""As much of a ComfyUI server as its front end needs, with this pack's schema, page and routes.

Prompts are not run: a recorded run (events.json, of example_workflows/amg_first_look) is played back.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import struct
import threading
from pathlib import Path

from aiohttp import WSMsgType, web

from tests.web.browser import PATIENCE

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
FOLDER = "anti-memorization-guidance"
TEMPLATES = sorted((ROOT / "example_workflows").glob("*.json"))
TEXT_EVENT = 3  # of the host's binary messages
WIDGETS = {"INT", "FLOAT", "STRING", "COMBO", "BOOLEAN"}


def core_nodes() -> dict:
    """/object_info of the host's own nodes that the example workflows use; recorded."""
    return json.loads((HERE / "core_nodes.json").read_text())


def info_of(schema, options: dict[str, list]) -> dict:
    """A V3 schema, as tests/nodes reads it, in the form of /object_info.

    options : of combos that are the host's to fill.
    """
    inputs: dict[str, dict] = {"required": {}, "optional": {}}
    for slot in schema.inputs:
        report = {key: value for key, value in vars(slot).items() if value is not None}
        name, kind = report.pop("id"), report.pop("io_type")
        part = "optional" if report.pop("optional") else "required"
        if "display_mode" in report:
            report["display"] = report.pop("display_mode")
        if kind == "COMBO":
            report = (
                {"multiselect": False} | report | {"options": options.get(name, report["options"])}
            )
        inputs[part][name] = [kind, report]
    outputs = schema.outputs
    return {
        "input": inputs,
        "input_order": {part: list(each) for part, each in inputs.items()},
        "output": [slot.io_type for slot in outputs],
        "output_is_list": [False for _ in outputs],
        "output_name": [slot.display_name for slot in outputs],
        "output_tooltips": [slot.tooltip for slot in outputs],
        "name": schema.node_id,
        "display_name": schema.display_name,
        "description": schema.description,
        "python_module": f"custom_nodes.{FOLDER}",
        "category": schema.category,
        "output_node": bool(schema.is_output_node),
        "deprecated": False,
        "experimental": False,
        "api_node": False,
    }


def blueprints() -> dict[str, tuple[dict, Path]]:
    """id -> (entry, file) of each subgraph blueprint of this pack."""
    found = {}
    for file in sorted((ROOT / "subgraphs").glob("*.json")):
        info = {"node_pack": f"custom_nodes.{FOLDER}"}
        entry = {"source": "custom_node", "name": file.stem, "info": info}
        found[hashlib.sha256(f"custom_node{file.as_posix()}".encode()).hexdigest()] = entry, file
    return found


class Host:
    """The server, in a thread of its own. `pause`: seconds between two messages of a run."""

    def __init__(self, front_end: Path, info: dict, messages: list, add_routes) -> None:
        self.front_end, self.info, self.add_routes = front_end, info, add_routes
        self.messages = messages
        self.pause, self.prompts = 0.02, []
        self.past: dict[str, dict] = {}  # /history
        self.texts: dict[str, str] = {}  # files of text, by their name
        self.settings = {
            "Comfy.Workflow.Persist": False,
            "Comfy.TutorialCompleted": True,
            "Comfy.Minimap.Visible": False,
            "Comfy.Workflow.ShowMissingModelsWarning": False,
        }
        self.sockets: dict[str, web.WebSocketResponse] = {}
        self.unknown: set[str] = set()
        self.loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        if not self._ready.wait(PATIENCE):
            raise RuntimeError("the small server did not start")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(self._start())
        self._ready.set()
        self.loop.run_forever()

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self.loop).result(PATIENCE)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(PATIENCE)

    def play(self, messages: list[tuple[str, dict]]) -> None:
        """Send them to every page; returns when all are sent."""
        asyncio.run_coroutine_threadsafe(self._play(messages, 0), self.loop).result(PATIENCE)

    # ------------------------------------------------------------ what the front end asks

    async def _start(self) -> None:
        app = web.Application()
        table = web.RouteTableDef()
        self.add_routes(table)
        self._answer(table)
        for route in list(table):
            app.router.add_route(route.method, "/api" + route.path, route.handler)
            app.router.add_route(route.method, route.path, route.handler)
        app.router.add_static(f"/extensions/{FOLDER}", ROOT / "web")
        for prefix in ("", "/api"):
            app.router.add_static(f"{prefix}/workflow_templates/{FOLDER}", TEMPLATES[0].parent)
        app.router.add_get("/", self._page)
        app.router.add_get("/{path:.*}", self._file)
        app.router.add_post("/{path:.*}", self._nothing)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]

    def _answer(self, table: web.RouteTableDef) -> None:
        scripts = [f"/extensions/{FOLDER}/{file.name}" for file in (ROOT / "web").glob("*.js")]
        fixed = {
            "/object_info": self.info,
            "/extensions": sorted(scripts),
            "/users": {"storage": "server", "migrated": True},
            "/system_stats": {
                "system": {"os": "posix", "comfyui_version": "0", "python_version": "3",
                           "pytorch_version": "2", "embedded_python": False, "argv": []},
                "devices": [],
            },
            "/features": {},
            "/embeddings": [],
            "/workflow_templates": {FOLDER: [file.stem for file in TEMPLATES]},
            "/experiment/models": [],
            "/queue": {"queue_running": [], "queue_pending": []},
            "/jobs": {"jobs": [], "pagination": {"offset": 0, "limit": 0, "total": 0, "has_more": False}},
            "/userdata": [],
            "/v2/userdata": [],
        }  # fmt: skip

        def constant(value):
            async def handler(_request):
                return web.json_response(value)

            return handler

        for path, value in fixed.items():
            table.get(path)(constant(value))
        table.get("/i18n")(self._languages)
        table.get("/history")(self._history)
        table.get("/history/{prompt}")(self._history)
        table.get("/global_subgraphs")(self._blueprints)
        table.get("/global_subgraphs/{id}")(self._blueprint)
        table.get("/settings")(self._settings)
        table.post("/settings")(self._save_settings)
        table.post("/settings/{id}")(self._save_setting)
        table.post("/prompt")(self._prompt)
        table.get("/view")(self._view)
        table.get("/ws")(self._socket)

    async def _page(self, _request):
        return web.FileResponse(self.front_end / "index.html")

    async def _file(self, request):
        """Of the front end."""
        path = (self.front_end / request.match_info["path"]).resolve()
        if path.is_file() and path.is_relative_to(self.front_end):
            return web.FileResponse(path)
        return await self._nothing(request)

    async def _nothing(self, request):
        self.unknown.add(request.path)
        return web.json_response({}, status=404)

    async def _languages(self, _request):
        """main.json at the top, the other files under their names."""
        report = {}
        for folder in (ROOT / "locales").iterdir():
            files = {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}
            report[folder.name] = files.pop("main", {}) | files
        return web.json_response(report)

    async def _history(self, request):
        """All runs, or the one that is asked for."""
        one = request.match_info.get("prompt")
        return web.json_response({k: v for k, v in self.past.items() if one in (None, k)})

    async def _blueprints(self, _request):
        """As ComfyUI does from 0.3.67 on: by a hash of where it lies, without its content."""
        return web.json_response({name: entry for name, (entry, _) in blueprints().items()})

    async def _blueprint(self, request):
        entry, file = blueprints().get(request.match_info["id"], (None, None))
        return web.json_response(entry and entry | {"data": file.read_text()})

    async def _settings(self, _request):
        return web.json_response(self.settings)

    async def _save_settings(self, request):
        self.settings |= await request.json()
        return web.json_response({})

    async def _save_setting(self, request):
        self.settings[request.match_info["id"]] = await request.json()
        return web.json_response({})

    async def _view(self, request):
        if (name := request.query.get("filename", "")) in self.texts:
            return web.Response(text=self.texts[name])
        named = HERE / "references/views" / Path(request.query.get("filename", "")).name
        known = ROOT / "amg_demo/pictures/memorised-000.webp"
        return web.FileResponse(named if named.is_file() else known)

    async def _prompt(self, request):
        self.prompts.append(await request.json())
        self.loop.create_task(self._play(self.messages, self.pause))
        return web.json_response({"prompt_id": self.messages[0][1]["prompt_id"], "number": 1})

    async def _socket(self, request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        name = request.query.get("clientId") or f"client{len(self.sockets)}"
        self.sockets[name] = socket
        status = {"status": {"exec_info": {"queue_remaining": 0}}, "sid": name}
        await socket.send_json({"type": "status", "data": status})
        async for message in socket:
            if message.type == WSMsgType.ERROR:
                break
        self.sockets.pop(name, None)
        return socket

    async def _play(self, messages, pause: float) -> None:
        for kind, data in messages:
            for socket in list(self.sockets.values()):
                if socket.closed:
                    continue
                if kind == "progress_text":
                    node, text = (part.encode() for part in data)
                    head = struct.pack(">II", TEXT_EVENT, len(node))
                    await socket.send_bytes(head + node + text)
                else:
                    await socket.send_json({"type": kind, "data": data})
            await asyncio.sleep(pause)
