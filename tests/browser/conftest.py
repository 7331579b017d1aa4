"""Chromium driven by Playwright, and a page that must cause no console error and no network request."""

from __future__ import annotations

import os
import shutil

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: make test-browser installs it")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="session")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Chromium: install it with the system's package manager")
    with playwright.sync_playwright() as driver:
        # As root, in a container, Chromium runs only without its sandbox.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if os.getuid() == 0 else [])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Open a file at a width, wait until it is drawn, and check afterwards that nothing went wrong."""
    problems, contexts = [], []

    def open_file(path, width=1400, address=""):
        context = browser.new_context(viewport={"width": width, "height": 900}, accept_downloads=True)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith(("file:", "data:", "blob:")) else problems.append(request.url)
            ),
        )
        page.goto(f"file://{path}{address}")
        page.wait_for_selector("#view[data-ready=true]")
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert problems == []
