"""Drives a headless Chromium over a pipe: sends pointer events and evaluates JavaScript in a page."""

import contextlib
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# Chromium runs without a display, as root, and makes no network connections for its own services.
FLAGS = """--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --remote-debugging-pipe""".split()
SECONDS = 60


class Page:
    """An open page of 1200 x 900 pixels."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = os.fdopen(commands, "wb"), os.fdopen(answers, "rb")
        self._session: dict[str, str] = {}
        self._sent, self._unread = 0, b""
        target = self.send("Target.createTarget", url="about:blank", newWindow=True, width=1200, height=900)
        target = target["targetId"]
        self._session = {
            "sessionId": self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        }

    def send(self, method: str, **parameters: Any) -> Any:
        """Sends a command of the DevTools protocol and returns its result."""
        self._sent += 1
        command = {"id": self._sent, "method": method, "params": parameters, **self._session}
        self._commands.write(json.dumps(command).encode() + b"\0")
        self._commands.flush()
        while True:
            while b"\0" not in self._unread:
                readable, _, _ = select.select([self._answers], [], [], SECONDS)
                chunk = self._answers.read1() if readable else b""
                assert chunk, "Chromium has ended, or does not answer"
                self._unread += chunk
            message, self._unread = self._unread.split(b"\0", 1)
            answer = json.loads(message)
            if answer.get("id") == self._sent:
                assert "result" in answer, answer
                return answer["result"]

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; if that is a promise, the value to which it resolves."""
        answer = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def move(self, x: float, y: float, click: bool = False) -> None:
        """Moves the pointer to a place in the window, clicks if asked to, and waits for the page to draw."""
        events = ["mouseMoved", "mousePressed", "mouseReleased"] if click else ["mouseMoved"]
        for event in events:
            self.send("Input.dispatchMouseEvent", type=event, x=x, y=y, button="left", clickCount=int(click))
        self.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")


@contextlib.contextmanager
def opened(file: Path, profile: Path) -> Iterator[Page]:
    """Opens a file in a new browser; the browser stores its own files in the folder `profile`."""
    for_browser, commands = os.pipe()
    answers, from_browser = os.pipe()
    arguments = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}"]
    # Chromium reads commands from descriptor 3 and writes answers to descriptor 4.
    script = f'exec "$@" 3<&{for_browser} 4>&{from_browser}'
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", *arguments],
        pass_fds=(for_browser, from_browser),
        stderr=subprocess.DEVNULL,
    )
    os.close(for_browser)
    os.close(from_browser)
    try:
        page = Page(commands, answers)
        page.send("Page.enable")
        page.send("Page.navigate", url=file.resolve().as_uri())
        loaded = "document.readyState == 'complete' || new Promise(done => addEventListener('load', done))"
        page.evaluate(loaded)
        yield page
        page.send("Browser.close")  # a terminated Chromium leaves temporary files
        process.wait(30)
    finally:
        process.terminate()
        process.wait(30)
