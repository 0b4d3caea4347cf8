"""A page in a real Chromium, driven by mouse and keys over its own protocol; choreographer comes with kaleido."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from choreographer import Browser

KEYS = {"Enter": "\r", "Escape": "", "ArrowDown": "", "ArrowUp": "", "ArrowLeft": "", "ArrowRight": "", "Tab": ""}


class Page:
    """One tab."""

    def __init__(self, tab: Any) -> None:
        self.tab = tab

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the DevTools protocol."""
        answer = await self.tab.send_command(method, params)
        assert "error" not in answer, (method, answer["error"])
        return answer.get("result", {})

    async def js(self, code: str) -> Any:
        """The value of an expression on the page."""
        found = await self.send("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    async def open(
        self,
        path: Path,
        width: int = 1400,
        dark: bool = False,
        address: str = "",
        height: int = 1000,
        ready: str = "document.querySelector('#kt-explorer')?.dataset.ready === ''",
    ) -> None:
        """Open a file at a width, and wait until the explorer has drawn itself."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        await self.send("Emulation.setEmulatedMedia", features=scheme)
        await self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        await self.send("Page.navigate", url="about:blank")
        await self.send("Page.navigate", url=path.resolve().as_uri() + address)
        await self.until(f"document.readyState === 'complete' && {ready}")

    async def until(self, condition: str, seconds: float = 20) -> None:
        """Wait until an expression is true."""
        for _ in range(int(seconds / 0.05)):
            if await self.js(condition):
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"never: {condition}")

    async def click(self, selector: str) -> None:
        """Press the mouse on the middle of the first element that the selector finds."""
        place = await self.js(
            f"(() => {{ const e = document.querySelector({selector!r});"
            " e.scrollIntoView({block: 'center', behavior: 'instant'});"
            " const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            await self.send("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    async def press(self, *keys: str) -> None:
        """Type keys, one after another."""
        for key in keys:
            text = KEYS.get(key, key)
            await self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **({"text": text} if text else {}))
            await self.send("Input.dispatchKeyEvent", type="keyUp", key=key)

    async def picture(self, path: Path, top: int = 0, bottom: int | None = None) -> Path:
        """The whole page as PNG, or the part from `top` to `bottom`."""
        width, height = await self.js("[document.documentElement.clientWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": top, "width": width, "height": (bottom or height) - top, "scale": 1}
        shot = await self.send("Page.captureScreenshot", captureBeyondViewport=True, format="png", clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path


def drive(what: Callable[[Page], Awaitable[Any]]) -> Any:
    """Run `what` on a new page of a new browser."""

    async def run() -> Any:
        async with Browser(headless=True, enable_sandbox=False) as browser:
            tab = await browser.create_tab("about:blank")
            page = Page(tab)
            await page.send("Page.enable")
            await page.send("Runtime.enable")
            return await what(page)

    return asyncio.run(run())
