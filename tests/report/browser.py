"""A page in headless Chromium, with everything that it asks for or complains about."""

import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@contextmanager
def chromium():
    """A browser; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the dev extra has it)")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no Chromium here; install it to test the page in a browser")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def opened(browser, path: Path, address: str = "", width=1280, height=900, **options):
    """A page in a window of its own; fails if it asked for anything or complained."""
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri() + address)
    if options.get("java_script_enabled", True):
        page.evaluate("document.fonts.ready")
        if page.locator(".explorer").count():
            page.locator(".explorer.live").first.wait_for(state="attached")
            until(page, "[...document.querySelectorAll('.resolution')].every((e) => e.textContent)")
    yield page
    assert said == []
    assert [url for url in asked if not url.startswith(("data:", "blob:")) and url.split("#")[0] != path.as_uri()] == []
    context.close()


def until(page, condition: str, seconds: float = 20) -> None:
    """Wait until a condition holds; playwright's own waiting evaluates text in the page, which its policy forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(20)


def reading(page) -> dict[str, float]:
    """The three values at the cursor."""
    found = page.locator(".reading").first.evaluate("(element) => ({...element.dataset})")
    return {name: float(found[name]) for name in ("exact", "own", "gap")}


def place(page) -> tuple[str, str, str]:
    """What the cursor's cell is, its row and its column, in words."""
    return tuple(page.locator(f"[data-read={name}]").first.text_content() for name in ("what", "row", "col"))
