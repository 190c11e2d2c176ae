"""A headless Chromium for tests, spoken to in the DevTools protocol through two pipes: no driver, no port."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class Browser:
    """One page. `problems` are its errors and what it asked the network for."""

    def __init__(self, write: IO[bytes], read: IO[bytes]) -> None:
        self._write, self._read = write, read
        self._number, self._session, self._rest = 0, "", b""
        self.problems: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method and wait for its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        self._write.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return dict(answer["result"])
            self._note(answer)

    def open(self, url: str) -> None:
        """Go to a page and wait until its script says that all is drawn."""
        self.problems.clear()
        self.call("Page.navigate", url=url)
        asking = "const ask = () => document.body?.dataset.ready ? done(1) : setTimeout(ask, 30); ask();"
        self.run(f"new Promise(done => {{ {asking} }})")

    def run(self, script: str) -> Any:
        """The value of an expression, awaited."""
        asked = {"expression": script, "awaitPromise": True, "returnByValue": True}
        answer = self.call("Runtime.evaluate", **asked)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._read.fileno(), 1 << 16)
            assert more, "the browser has ended"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.problems.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(str(params["entry"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.problems.append(str(params["args"]))
        elif method == "Network.requestWillBeSent" and params["request"]["url"].split(":")[0] not in (
            "file",
            "data",
            "blob",
        ):
            self.problems.append(params["request"]["url"])


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser that runs for the length of the block; the test is skipped where none is installed."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if not found:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    read_in, write_in = os.pipe()
    read_out, write_out = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += ["--disable-extensions", "--disable-background-networking", f"--user-data-dir={profile}"]
        command = [found, *options, "--remote-debugging-pipe", "about:blank"]
        # The protocol's ends are descriptors 3 and 4 of the browser; sh knows none above 9.
        redirected = ["bash", "-c", f'exec "$@" 3<&{read_in} 4>&{write_out}', "bash", *command]
        process = subprocess.Popen(redirected, pass_fds=(read_in, write_out), stderr=subprocess.DEVNULL)
        os.close(read_in)
        os.close(write_out)
        with process, os.fdopen(write_in, "wb", buffering=0) as write, os.fdopen(read_out, "rb") as read:
            try:
                browser = Browser(write, read)
                yield browser
                browser.call("Browser.close")
                process.wait(20)
            finally:
                process.kill()
