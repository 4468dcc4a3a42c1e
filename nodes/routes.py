"""The server's routes for the page of this pack: show the pictures of an index, and mute them.

===============================================  ==================================================
GET  /amg/indexes                                {"indexes": [name]}
GET  /amg/indexes/{name}                         {"name", "count", "muted", "descriptor", "created"}
GET  /amg/indexes/{name}/entries                 {"entries", "next", "done"}; see `page`
     ?start=0&limit=24&text=&muted=0
GET  /amg/indexes/{name}/thumbnails/{id}         a picture of at most 256 px; 404 unless sha256 is the
     ?sha256=…                                   whole hash of its file
POST /amg/indexes/{name}/mute                    {"sha256": [hash], "reason": text} -> {"changed"}
POST /amg/indexes/{name}/unmute                  {"sha256": [hash]} -> {"changed"}
GET  /amg/weights                                {"ready", "words"}: is the file of SSCD's weights there?
===============================================  ==================================================

Only names in `paths.index_names` are opened. Requests and responses have limited sizes. An error is JSON,
{"error": a sentence}, without folder names, which only the log has. All access to the disk is in separate
threads, never on the event loop. Each index is in one thread at a time, so a slow one does not delay
others. After `WAIT` seconds the page gets an error.

The host answers every request, and a browser lets any web page send one. So a request is refused if the
browser says that it comes from another page (`foreign`), and other pages cannot use a response
(Cross-Origin-Resource-Policy). They cannot even find out from an image that loads or fails whether a
picture is in an index.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import contextmanager
from io import BytesIO
from queue import SimpleQueue
from urllib.parse import urlsplit

from ..amg_core.errors import AMGError
from . import paths, show

PAGE = 24  # default number of entries
MOST = 100  # largest number of entries of a page, and of pictures muted at once
TEXT = 200  # characters of a search
REASON = 500
BODY = 64 * 1024  # bytes of a POST
PATIENCE = 2.0  # seconds after which a search returns what it has found
OPEN = 4  # indexes kept open
WORKERS = 4  # threads
WAIT = 20.0  # seconds that a request waits for its index
SHOWN = 1000  # characters of a caption or a name in an entry
log = logging.getLogger(__name__)


class Refused(Exception):
    """A request is refused with this sentence and HTTP status."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


# ---------------------------------------------------------------- responses, without a server


class OpenIndexes:
    """Keeps the most recently used indexes open. It is thread-safe for different indexes."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, tuple[tuple, object]] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def index(self, name: str):
        """The index of that name as it is on the disk now. `Refused` if there is none."""
        with self._lock:
            known, index = self._open.pop(name, (None, None))
        found = self._fresh(name, known, index)
        try:
            yield found[1]
        finally:
            with self._lock:
                self._open[name] = found
                over = [self._open.popitem(last=False)[1] for _ in range(len(self._open) - OPEN)]
            for _, index in over:
                index.close()

    @staticmethod
    def _fresh(name: str, known, index) -> tuple:
        """(stamp, index), opened again if the stamp is not `known`."""
        from ..amg_core.index import Index

        folder = folder_of(name)
        try:
            state = (folder / paths.MANIFEST).stat()
            stamp = (str(folder), state.st_mtime_ns, state.st_size, state.st_ino)
            if known != stamp:
                if index is not None:
                    index.close()
                index = Index.open(folder)
        except (AMGError, OSError) as error:
            log.warning("AMG: index %s cannot be opened: %s", name, error)
            raise Refused(
                500, f"Index {name} cannot be opened. The log of the server says why."
            ) from error
        return stamp, index


def folder_of(name: str):
    """The folder of an index in the host's list. `Refused` for any other name."""
    if name in names():
        try:
            return paths.find_index(name)
        except AMGError:  # removed after it was listed
            pass
    raise Refused(404, "There is no index of that name. Press R to refresh the list.")


def names() -> list[str]:
    return [name for name in paths.index_names() if name != paths.NO_INDEX]


def about(index) -> dict:
    return {
        "name": index.name,
        "count": index.count,
        "muted": len(index.muted),
        "descriptor": index.spec.id,
        "created": index.created,
    }


def page(index, start: int, limit: int, text: str, muted: bool, patience=PATIENCE) -> dict:
    """Entries from id `start` on whose name and caption contain every word of `text`.

    Upper and lower case are the same. With `muted`, only excluded pictures are returned.

    Returns
    -------
    dict
        entries : at most `limit` of {"id", "sha256", "source", "caption", "width", "height",
        "muted": reason or None}; next : the id at which to continue, None at the end; done : whether the
        page is full or the index is at its end, False if `patience` (seconds) ran out before.
    """
    words = text.casefold().split()
    deadline, found = time.monotonic() + patience, []
    if muted:
        ids = (i for i in sorted(index.muted) if i >= start)
        rows = ((i, index.record(i)) for i in ids)
    else:
        rows = enumerate(index.records(start), start)
    for i, record in rows:
        report = f"{record.source} {record.caption}".casefold()
        if not all(word in report for word in words):
            if i % 256 == 0 and time.monotonic() > deadline:
                return {"entries": found, "next": i + 1, "done": False}
            continue
        if len(found) == limit:
            return {"entries": found, "next": i, "done": True}
        found.append(
            {
                "id": i,
                "sha256": record.sha256,
                "source": record.source[:SHOWN],
                "caption": record.caption[:SHOWN],
                "width": record.width,
                "height": record.height,
                "muted": index.muted.get(i),
            }
        )
    return {"entries": found, "next": None, "done": True}


def thumbnail(index, i: int, sha256: str) -> bytes:
    """Picture i, encoded again as WebP. `Refused` if it is missing or is another picture."""
    if not _is_hash(sha256):
        raise Refused(400, "sha256 must be the whole hash of the picture's file.")
    if i >= index.count or index.record(i).sha256 != sha256:
        raise Refused(
            404,
            f"That picture is no longer in index {index.name}. Close this window "
            "and open it again.",
        )
    try:
        picture = index.thumbnail(i)
    except AMGError as error:
        log.info("AMG: %s", error)
        raise Refused(404, f"Index {index.name} holds no picture to show there.") from error
    data = BytesIO()
    picture.save(data, "WEBP", quality=85)
    return data.getvalue()


def change(name: str, chosen: list[str], reason: str | None) -> int:
    """Mute the pictures with these hashes for that `reason`, or unmute them for None."""
    from ..amg_core.index import mute, unmute

    folder, wanted = folder_of(name), set(chosen)
    try:
        if reason is None:
            return unmute(folder, lambda entry: entry.sha256 in wanted)
        return mute(folder, lambda entry: entry.sha256 in wanted, reason)
    except (AMGError, OSError) as error:
        log.warning("AMG: index %s cannot be changed: %s", name, error)
        raise Refused(
            409, f"Index {name} cannot be changed now. The log of the server says why."
        ) from error


class Workers:
    """Daemon threads, which do not keep the host from exiting even if one of them hangs."""

    def __init__(self, count: int) -> None:
        self._tasks: SimpleQueue = SimpleQueue()
        self._missing = count

    def submit(self, task: Callable) -> Future:
        if self._missing:  # none before the first request
            self._missing -= 1
            threading.Thread(target=self._run, name="amg-routes", daemon=True).start()
        future: Future = Future()
        self._tasks.put((future, task))
        return future

    def _run(self) -> None:
        while True:
            future, task = self._tasks.get()
            try:
                future.set_result(task())
            except BaseException as error:
                future.set_exception(error)


# ---------------------------------------------------------------- requests


def number(query, key: str, default: int, low: int, high: int) -> int:
    text = query.get(key, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 16 and low <= int(text) <= high):
        raise Refused(400, f"{key} must be a whole number from {low} to {high}.")
    return int(text)


def wanted(body: bytes, with_reason: bool) -> tuple[list[str], str | None]:
    """Hashes and reason of a POST. `Refused` if it is anything else."""
    try:
        tree = json.loads(body)
        chosen, reason = tree["sha256"], tree.get("reason", "") if with_reason else None
        right = isinstance(chosen, list) and 0 < len(chosen) <= MOST
        right = right and all(isinstance(each, str) and _is_hash(each) for each in chosen)
        right = right and (reason is None or (isinstance(reason, str) and len(reason) <= REASON))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        right = False
    if not right:
        raise Refused(
            400,
            f"Send JSON with sha256, a list of 1 to {MOST} hashes, and for muting a reason of at "
            f"most {REASON} characters.",
        )
    return chosen, None if reason is None else " ".join(reason.split())


def _is_hash(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def foreign(headers) -> bool:
    """Whether the browser says that the request comes from another page than the host's own.

    Browsers send Sec-Fetch-Site if the host is this machine or uses https. Its value "none" is an address
    that the user typed. Over plain http in a local network there is only an Origin, which then must be the
    host itself. "null", from a page without an origin, is refused. Programs send neither header.
    """
    site = headers.get("Sec-Fetch-Site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = headers.get("Origin")
    return origin is not None and urlsplit(origin).netloc.lower() != headers.get("Host", "").lower()


# ---------------------------------------------------------------- the server

# Headers of every response: no other page may embed it, and no browser may guess another type.
OURS_ALONE = {"Cross-Origin-Resource-Policy": "same-origin", "X-Content-Type-Options": "nosniff"}


def register() -> None:
    """Add the routes to the host's server, if there is one, once."""
    server = show.server()
    if server is not None and not getattr(server, "amg_routes", False):
        add_to(server.routes)
        server.amg_routes = True


def about_weights() -> dict:
    """Whether a file of SSCD's weights is there and right, and what to do next; names no folder."""
    from ..amg_core.descriptors import registry, sscd

    (file, *_) = [*paths.weights(registry.named("sscd")), None]
    try:
        return {"ready": True, "words": sscd.examine(file).words()}
    except AMGError as error:
        words = str(error) if file is None else str(error).replace(str(file), file.name)
        return {"ready": False, "words": words}


def add_to(routes) -> None:
    """Add the routes to an `aiohttp.web.RouteTableDef`."""
    from aiohttp import web

    indexes, workers = OpenIndexes(), Workers(WORKERS)
    busy: dict[
        str, asyncio.Future
    ] = {}  # the current task on each index, or on the list of indexes ("")
    base = "/amg/indexes"

    def answer(handle: Callable):
        """A handler that returns the result of `handle` as JSON or its own response, and errors as JSON."""

        async def handler(request: web.Request) -> web.StreamResponse:
            status = 200
            try:
                if foreign(request.headers):
                    raise Refused(403, "Only the page of this server may ask for that.")
                found = await handle(request, request.match_info.get("name", ""))
                if isinstance(found, web.StreamResponse):
                    return found
            except Refused as refused:
                found, status = {"error": str(refused)}, refused.status
            except Exception:
                log.exception("AMG: %s %s failed", request.method, request.path)
                found, status = {"error": "That failed. The log of the server says why."}, 500
            return web.json_response(found, status=status, headers=OURS_ALONE)

        return handler

    async def work(name: str, task: Callable):
        """The result of `task`, which runs after all other tasks on that index."""
        end = time.monotonic() + WAIT
        while (before := busy.get(name)) is not None and time.monotonic() < end:
            await asyncio.wait({before}, timeout=end - time.monotonic())
        if name not in busy:
            busy[name] = mine = asyncio.wrap_future(workers.submit(task))
            mine.add_done_callback(lambda _: busy.pop(name))
            if (await asyncio.wait({mine}, timeout=max(0.0, end - time.monotonic())))[0]:
                return mine.result()
        raise Refused(503, f"Index {name} takes long to read. Try again in a while.")

    async def with_index(name: str, task: Callable):
        def opened():
            with indexes.index(name) as index:
                return task(index)

        return await work(name, opened)

    @routes.get(base)
    @answer
    async def list_all(_request, _name):
        return {"indexes": await work("", names)}

    @routes.get("/amg/weights")
    @answer
    async def check_weights(_request, _name):
        return await work("/weights", about_weights)  # no index has such a name

    @routes.get(base + "/{name}")
    @answer
    async def info(_request, name):
        return await with_index(name, about)

    @routes.get(base + "/{name}/entries")
    @answer
    async def entries(request, name):
        query = request.query
        start = number(query, "start", 0, 0, 1 << 40)
        limit = number(query, "limit", PAGE, 1, MOST)
        muted = bool(number(query, "muted", 0, 0, 1))
        text = query.get("text", "")
        if len(text) > TEXT:
            raise Refused(400, f"text must have at most {TEXT} characters.")
        return await with_index(name, lambda index: page(index, start, limit, text, muted))

    @routes.get(base + "/{name}/thumbnails/{id}")
    @answer
    async def picture(request, name):
        i = number(request.match_info, "id", 0, 0, 1 << 40)
        sha256 = request.query.get("sha256", "")
        data = await with_index(name, lambda index: thumbnail(index, i, sha256))
        # The hash identifies the content, so the response may be cached.
        headers = OURS_ALONE | {"Cache-Control": "private, max-age=86400, immutable"}
        return web.Response(body=data, content_type="image/webp", headers=headers)

    def changing(with_reason: bool):
        @answer
        async def handler(request, name):
            if request.content_type != "application/json":  # otherwise any web page could send it
                raise Refused(415, "Send it as application/json.")
            body = await request.content.read(BODY + 1)
            while len(body) <= BODY and not request.content.at_eof():
                body += await request.content.read(BODY + 1 - len(body))
            if len(body) > BODY:
                raise Refused(413, f"A request may have at most {BODY} bytes.")
            chosen, reason = wanted(body, with_reason)
            return {"changed": await work(name, lambda: change(name, chosen, reason))}

        return handler

    routes.post(base + "/{name}/mute")(changing(True))
    routes.post(base + "/{name}/unmute")(changing(False))
