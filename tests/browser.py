"""A headless Chromium, driven over its DevTools protocol: what a page shows, as a person's browser shows it.

The protocol goes through a pair of pipes (--remote-debugging-pipe: JSON messages that end with a zero byte), so that
nothing but the standard library is needed. https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from select import select
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 120  # for an answer, on a machine that is busy
HEIGHT = 900  # pixels of the window; its width is the test's choice


class Browser:
    """One tab. `complaints` and `requests` are of the page that was opened last."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self.complaints: list[str] = []  # errors and warnings of scripts, of the network, of the page's own policy
        self.requests: list[str] = []  # addresses
        self._to, self._from = to_browser, from_browser
        self._buffer, self._count, self._session, self._events = b"", 0, "", list[dict[str, Any]]()
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")

    def open(self, page: Path, *, width: int, theme: str) -> None:
        """Loads the file in a window of `width` pixels, for a reader who prefers "light" or "dark"."""
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=HEIGHT, deviceScaleFactor=1, mobile=False)
        self._ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self._ask("Page.navigate", url="about:blank")
        self._until("Page.loadEventFired")
        self.complaints, self.requests = [], []
        self._ask("Page.navigate", url=page.as_uri())
        self._until("Page.loadEventFired")

    def value(self, script: str) -> Any:
        """What the JavaScript expression comes to on the open page; a promise is waited for."""
        answer = self._ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> Path:
        """The whole page, also what is below the window, as a PNG."""
        answer = self._ask("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))
        return path

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        while True:
            answer = self._message()
            if answer.get("id") == self._count:
                assert "error" not in answer, (method, answer)
                result: dict[str, Any] = answer["result"]
                return result

    def _until(self, event: str) -> None:
        while event not in [each["method"] for each in self._events]:
            self._message()
        self._events = []

    def _message(self) -> dict[str, Any]:
        """The next message; what an event says of the page is kept."""
        end = time.monotonic() + SECONDS
        while b"\0" not in self._buffer:
            if not select([self._from], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError(f"the browser said nothing for {SECONDS} s")
            part = os.read(self._from, 1 << 20)
            if not part:
                raise EOFError("the browser has ended")
            self._buffer += part
        text, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(text)
        if "method" in message:
            self._keep(message)
        return message

    def _keep(self, event: dict[str, Any]) -> None:
        self._events.append(event)
        told = event.get("params", {})
        if event["method"] == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif event["method"] == "Network.loadingFailed":
            self.complaints.append(f"not loaded: {told['errorText']}")
        elif event["method"] == "Log.entryAdded" and told["entry"]["level"] in ("warning", "error"):
            self.complaints.append(told["entry"]["text"])
        elif event["method"] == "Runtime.consoleAPICalled" and told["type"] in ("warning", "error", "assert"):
            self.complaints.append(str([each.get("value") for each in told["args"]]))
        elif event["method"] == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description", details["text"]))


@contextmanager
def browsing(folder: Path) -> Iterator[Browser]:
    """A browser with an empty profile in `folder`. Skips where there is none."""
    command = next((found for name in NAMES if (found := shutil.which(name))), None)
    if command is None:
        pytest.skip("no Chromium here (Debian's chromium)")
    read_by_browser, to_browser = os.pipe()
    from_browser, written_by_browser = os.pipe()
    # The browser reads at descriptor 3 and writes at 4: a shell puts the pipes there.
    script = f'exec "$@" 3<&{read_by_browser} 4>&{written_by_browser}'
    options = ["--headless=new", "--remote-debugging-pipe", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    options += [f"--user-data-dir={folder / 'profile'}", "--disable-dev-shm-usage"]
    options += ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses to sandbox for root
    with (folder / "browser.log").open("wb") as log:
        child = subprocess.Popen(
            ["bash", "-c", script, "bash", command, *options],
            pass_fds=(read_by_browser, written_by_browser),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    os.close(read_by_browser)
    os.close(written_by_browser)
    try:
        yield Browser(to_browser, from_browser)
    finally:
        os.close(to_browser)  # at which it ends
        os.close(from_browser)
        try:
            child.wait(30)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
