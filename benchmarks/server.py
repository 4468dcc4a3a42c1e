"""A ComfyUI server of its own with this pack in it, asked over HTTP as its page asks it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = "anti-memorization-guidance"  # dashes, as users have them
PATIENCE = 300  # seconds; continuous integration is slow


class Server:
    """`server(path, data=None)` -> the parsed answer. `url`, `base` (its folder) and `pid`."""

    def __init__(self, url: str, base: Path, process: subprocess.Popen) -> None:
        self.url, self.base, self.process, self.pid = url, base, process, process.pid

    def __call__(self, path: str, data: dict | None = None, raw: bool = False):
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.url + path, body)
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return text if raw else json.loads(text)

    def log(self) -> str:
        return (self.base / "log.txt").read_text(errors="replace")

    def queue(self, prompt: dict, metadata: dict | None = None) -> str:
        """Queue a workflow, with what its pictures are to carry; its id."""
        extra = {} if metadata is None else {"extra_data": {"extra_pnginfo": metadata}}
        return self("/prompt", {"prompt": prompt} | extra)["prompt_id"]

    def finish(self, number: str, poll: float = 0.3) -> dict:
        """Wait until a workflow has ended; its history entry."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            history = self(f"/history/{number}")
            if history:
                return history[number]
            time.sleep(poll)
        raise AssertionError("the workflow did not end")


@contextmanager
def served(comfyui: Path, base: Path, *options: str) -> Iterator[Server]:
    """A server on the CPU, in the empty folder `base`, until the block ends. options : of main.py."""
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / FOLDER).symlink_to(ROOT, target_is_directory=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (base / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [
                sys.executable, "main.py", "--cpu", "--base-directory", str(base),
                "--database-url", f"sqlite:///{base}/db.sqlite", "--disable-api-nodes",
                "--port", str(port), *options,
            ],
            cwd=comfyui, stdout=log, stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        server = Server(f"http://127.0.0.1:{port}", base, process)
        try:
            _await(server)
            yield server
        finally:
            process.terminate()
            process.wait(30)


def _await(server: Server) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            server("/system_stats")
            return
        except OSError as error:
            if server.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError("no server:\n" + server.log()[-3000:]) from error
            time.sleep(0.5)
