"""Headless Chromium for tests of pages."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
KEYS = {"left": "\ue012", "up": "\ue013", "right": "\ue014", "down": "\ue015", "escape": "\ue00c", "control": "\ue009"}
"""Selenium's letters for keys."""


class Browser:
    """A window. ``driver`` is Selenium's."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        """Go to an address, and forget what was logged before."""
        self.driver.get("about:blank")
        self.requests(), self.complaints()
        self.driver.get(url)

    def look(self, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """Set the window's size, and which colours the user prefers: light or dark."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def all(self, selector: str) -> list[Any]:
        """The elements of a CSS selector."""
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        """The first element of a CSS selector."""
        return self.driver.find_element("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        """What is written in elements that are seen."""
        return [element.text for element in self.all(selector)]

    def choose(self, selector: str, text: str) -> None:
        """Choose an option of a select by what is written on it."""
        next(o for o in self.all(f"{selector} option") if o.get_attribute("textContent") == text).click()

    def press(self, *keys: str) -> None:
        """Press keys, by a name of :data:`KEYS` or the letter itself."""
        for key in keys:
            self.driver.switch_to.active_element.send_keys(KEYS.get(key, key))

    def run(self, script: str) -> Any:
        """The value of a JavaScript function's body."""
        return self.driver.execute_script(script)

    def wait(self, condition: Callable[[], Any], seconds: float = 20) -> None:
        """Wait until a condition holds; fails the test when it does not come."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.02)

    def requests(self) -> list[str]:
        """What pages asked for since the last call, without what was inside them."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [
            event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in urls if not url.startswith(("data:", "about:"))]

    def complaints(self) -> list[str]:
        """Errors and warnings in the console since the last call: exceptions, refused resources."""
        return [
            entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")
        ]


@contextmanager
def chromium() -> Iterator[Browser]:
    """A fresh Chromium; skips the test where there is none."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed (Debian: chromium, chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        try:
            yield Browser(opened)
        finally:
            opened.quit()
