"""Make the screenshots of the server's page in docs/images, from a server that runs.

    medusa-export serve build/int8 &
    python scripts/page_screenshots.py http://127.0.0.1:8000/

It needs the packages playwright and pillow (both are in the extra dev) and the program chromium.
"""

from __future__ import annotations

import argparse
import io
import shutil
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

IMAGES = Path(__file__).parents[1] / "docs" / "images"
MOST_BYTES = 200_000
QUESTION = "Explain in three short steps how to make a cup of tea."
MINUTES = 3 * 60_000  # milliseconds that an answer may take


def ask(page: Page) -> None:
    page.fill("#question", QUESTION)
    page.press("#question", "Enter")
    page.locator("#stop").wait_for()
    page.locator("#send").wait_for(timeout=MINUTES)
    page.wait_for_timeout(300)


def show_a_telling_step(page: Page) -> None:
    """Choose a token of a step that gave out several tokens and in which some guesses were wrong."""
    steps = page.locator(".step")
    sizes = {at: steps.nth(at).get_by_role("option").count() for at in range(steps.count())}
    for at in sorted(sizes, key=lambda at: -sizes[at]):
        steps.nth(at).get_by_role("option").first.click()
        if page.locator("#panel-step .node.rejected").count() >= 3:
            return
    raise SystemExit("no step had 3 wrong guesses; ask something else")


def welcome(page: Page) -> None:
    page.locator("#model:not(:empty)").wait_for()


def chat(page: Page) -> None:
    ask(page)
    show_a_telling_step(page)
    page.locator("#main").evaluate("main => { main.scrollTop = 0; }")


def comparison(page: Page) -> None:
    page.keyboard.press("Escape")
    page.check("#compare")
    ask(page)
    page.locator(".verdict").wait_for()


SHOTS: dict[str, tuple[Callable[[Page], None], str, int, int]] = {
    "page-explained": (welcome, "light", 1440, 1020),
    "page-light": (chat, "light", 1440, 900),
    "page-dark": (chat, "dark", 1440, 900),
    "page-compare": (comparison, "light", 1280, 1220),
    "page-phone": (chat, "dark", 390, 844),
}


def take(browser: Browser, url: str, name: str) -> None:
    prepare, scheme, width, height = SHOTS[name]
    with browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme) as context:
        page = context.new_page()
        page.goto(url)
        prepare(page)
        shot = page.screenshot()
    image = Image.open(io.BytesIO(shot)).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    path = IMAGES / f"{name}.png"
    image.save(path, optimize=True)
    size = path.stat().st_size
    print(f"{path}: {size:,} bytes")
    if size > MOST_BYTES:
        raise SystemExit(f"{path} has {size:,} bytes; at most {MOST_BYTES:,} are wanted")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the screenshots of the page of a server that runs.")
    parser.add_argument("url", help="where the server is, such as http://127.0.0.1:8000/")
    parser.add_argument("only", nargs="*", choices=[[], *SHOTS], help="which ones; omit for all")
    chosen = parser.parse_args()
    program = shutil.which("chromium")
    if program is None:
        raise SystemExit("chromium is not installed; on Debian: apt-get install chromium")
    IMAGES.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        for name in chosen.only or SHOTS:
            take(browser, chosen.url, name)
        browser.close()


if __name__ == "__main__":
    main()
