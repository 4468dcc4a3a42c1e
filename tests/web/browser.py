"""A headless Chromium, driven through the DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE = 180  # seconds: what takes as long hangs


def chromium() -> str | None:
    """The browser to use: $CHROMIUM, or the first that is installed."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One tab. `errors`: what the page threw or logged as an error."""

    def __init__(self, size: tuple[int, int] = (1600, 1000), *flags: str, **environment) -> None:
        import websocket

        self.folder = tempfile.mkdtemp(prefix="amg-chromium-")
        self.process = subprocess.Popen(
            [
                chromium(), "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
                "--disable-dev-shm-usage", "--disable-background-networking", "--hide-scrollbars",
                "--remote-debugging-port=0", "--remote-allow-origins=*", "--lang=en-US",
                f"--window-size={size[0]},{size[1]}", f"--user-data-dir={self.folder}",
                *flags, "about:blank",
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | environment,
        )  # fmt: skip
        self.errors: list[str] = []
        self._number = 0
        try:
            port = self._port()
            with urllib.request.urlopen(
                f"http://127.0.0.1:{port}/json", timeout=PATIENCE
            ) as answer:
                (tab,) = (each for each in json.load(answer) if each["type"] == "page")
            self._socket = websocket.create_connection(
                tab["webSocketDebuggerUrl"], timeout=PATIENCE, suppress_origin=True
            )
            self.command("Page.enable")
            self.command("Runtime.enable")
        except BaseException:
            self.close()
            raise

    def _port(self) -> int:
        file, end = Path(self.folder) / "DevToolsActivePort", time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if file.is_file() and (lines := file.read_text().split()):
                return int(lines[0])
            if self.process.poll() is not None:
                raise RuntimeError("the browser ended at once")
            time.sleep(0.1)
        raise RuntimeError("the browser did not start")

    def command(self, method: str, **parameters) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv())
            self._note(answer)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _note(self, event: dict) -> None:
        report = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            details = report["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif event.get("method") == "Runtime.consoleAPICalled" and report["type"] == "error":
            parts = (str(arg.get("value", arg.get("description"))) for arg in report["args"])
            self.errors.append(" ".join(parts))

    def open(self, url: str) -> None:
        self.command("Page.navigate", url=url)

    def js(self, body: str):
        """What the body of an async function returns. RuntimeError where it throws."""
        answer = self.command(
            "Runtime.evaluate",
            expression="(async () => {" + body + "})()",
            awaitPromise=True,
            returnByValue=True,
        )
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        return answer["result"].get("value")

    def until(self, condition: str, patience: float = PATIENCE):
        """Wait for a JS expression to be true and return it. AssertionError where it never is."""
        end, error = time.monotonic() + patience, ""
        while time.monotonic() < end:
            try:
                if value := self.js(f"const it = {condition}; return it instanceof Node || it"):
                    return value
            except RuntimeError as caught:
                error = str(caught)
            time.sleep(0.03)
        raise AssertionError(f"never true: {condition} {error}\n" + "\n".join(self.errors[-5:]))

    def mouse(self, kind: str, x: float, y: float, button: str = "left") -> None:
        """kind: "mousePressed", "mouseMoved" or "mouseReleased"."""
        self.command(
            "Input.dispatchMouseEvent",
            type=kind, x=x, y=y, button=button, clickCount=1,
            buttons=0 if kind == "mouseReleased" else 1,
        )  # fmt: skip

    def drag(self, start: tuple[float, float], end: tuple[float, float], steps: int = 8) -> None:
        """Press, move, let go. Waits a frame each time, as a hand would."""
        self.mouse("mousePressed", *start)
        for i in range(1, steps + 1):
            share = i / steps
            self.mouse(
                "mouseMoved", *(a + (b - a) * share for a, b in zip(start, end, strict=True))
            )
            time.sleep(0.03)
        self.mouse("mouseReleased", *end)

    def click(self, x: float, y: float) -> None:
        self.drag((x, y), (x, y), 1)

    def key(self, key: str, code: int, text: str = "") -> None:
        """Press and let go. text: what the key types; a button hears Enter only with "\\r"."""
        for kind in ("keyDown", "keyUp"):
            typed = {"text": text} if text and kind == "keyDown" else {}
            self.command(
                "Input.dispatchKeyEvent",
                type=kind, key=key, code=key, windowsVirtualKeyCode=code, **typed,
            )  # fmt: skip

    def shot(self, path: Path | str) -> None:
        data = self.command("Page.captureScreenshot", format="png")["data"]
        Path(path).write_bytes(base64.b64decode(data))

    def close(self) -> None:
        if hasattr(self, "_socket"):
            self._socket.close()
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
