"""A real headless Chromium, driven over its DevTools protocol: a WebSocket of JSON, which aiohttp speaks already.

Everything that a page complains of (exceptions, console errors, refused content) is kept in `complaints`.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WAIT_S = 60.0
_POLL_S = 0.02


class PageFailed(AssertionError):
    """The page did not do what a test relies on."""


def find() -> str:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        raise PageFailed(f"none of {', '.join(NAMES)} is installed")
    return found


class Page:
    """One tab."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.complaints: list[str] = []
        self._socket = socket
        self._numbers = itertools.count(1)
        self._loaded = asyncio.Event()
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reader = asyncio.create_task(self._read(), name="devtools")

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        async with asyncio.timeout(2 * WAIT_S):
            result: dict[str, Any] = await answer
            return result

    async def open(self, url: str) -> None:
        self._loaded.clear()
        await self.call("Page.navigate", url=url)
        async with asyncio.timeout(WAIT_S):
            await self._loaded.wait()

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, as JSON has it."""
        answer = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise PageFailed(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    async def until(self, expression: str, what: str) -> None:
        """Until an expression is true."""
        # Looked at by the page itself, after each of its turns.
        looking = f"""new Promise((resolve) => {{
            const end = Date.now() + {WAIT_S * 1000};
            const look = () => {expression} ? resolve(true) : Date.now() > end ? resolve(false) : setTimeout(look, 20);
            look();
        }})"""
        if not await self.evaluate(looking):
            text = await self.evaluate("document.body.innerText")
            raise PageFailed(f"waited {WAIT_S} s for {what}: {expression}\n{self.complaints}\n{text}")

    async def text(self, selector: str = "body") -> str:
        return str(await self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText"))

    async def look(self, *, width: int, height: int, dark: bool = False, phone: bool = False) -> None:
        """Be a screen of that size, light or dark."""
        await self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])

    async def screenshot(self, path: Path) -> None:
        """The whole page, as far as it can be scrolled."""
        size = (await self.call("Page.getLayoutMetrics"))["cssContentSize"]
        clip = {**size, "scale": 1}
        answer = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        await asyncio.to_thread(path.write_bytes, base64.b64decode(answer["data"]))

    async def close(self) -> None:
        await self._socket.close()
        await self._reader

    async def _read(self) -> None:
        async for message in self._socket:
            said = json.loads(message.data)
            waiting = self._answers.pop(said.get("id", 0), None)
            if waiting is not None and not waiting.done():
                if "error" in said:
                    waiting.set_exception(PageFailed(str(said["error"])))
                else:
                    waiting.set_result(said["result"])
            elif "method" in said:
                self._note(said["method"], said["params"])

    def _note(self, method: str, parameters: dict[str, Any]) -> None:
        match method:
            case "Page.loadEventFired":
                self._loaded.set()
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(parameters["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "warning", "assert"):
                self.complaints.append(json.dumps(parameters["args"]))
            case "Log.entryAdded" if parameters["entry"]["level"] in ("error", "warning"):
                self.complaints.append(json.dumps(parameters["entry"]))


@asynccontextmanager
async def browser(folder: Path) -> AsyncIterator[Page]:
    """A page in a browser of its own, whose profile is in `folder`."""
    flags = (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-extensions",
        "--disable-dev-shm-usage",
    )
    words = [
        find(),
        *flags,
        "--disable-background-networking",
        "--remote-debugging-port=0",
        f"--user-data-dir={folder}",
        "about:blank",
    ]
    process = await asyncio.create_subprocess_exec(
        *words, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL, start_new_session=True
    )
    try:
        async with aiohttp.ClientSession() as session:
            port = await _port(folder / "DevToolsActivePort", process)
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                tab = next(each for each in await answer.json() if each["type"] == "page")
            page = Page(await session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0))
            for domain in ("Page", "Runtime", "Log", "Network"):
                await page.call(f"{domain}.enable")
            yield page
            await page.close()
    finally:
        process.terminate()
        await process.wait()


async def _port(path: Path, process: asyncio.subprocess.Process) -> int:
    """Which one it chose: the first line of a file that it writes."""

    def written() -> list[str]:
        return path.read_text().split() if path.exists() else []

    async with asyncio.timeout(WAIT_S):
        while process.returncode is None:
            if len(lines := await asyncio.to_thread(written)) > 1:
                return int(lines[0])
            await asyncio.sleep(_POLL_S)
    raise PageFailed(f"the browser ended at once, with status {process.returncode}")
