"""Takes the guides' picture of a report, docs/img/report.png, in a headless Chromium.

    saelens-matryoshka train --preset tiny --name first
    saelens-matryoshka report results/tiny/mlp-2/first
    python docs/screenshot.py results/tiny/mlp-2/first/report.html

Of the sections between the first and the latents only the names in the navigation are left, and the second
latent is open.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

OUT = Path(__file__).parent / "img" / "report.png"
SIZE = {"width": 1166, "height": 1518}
LEFT_OUT = "#training, #density, #levels { display: none }"


def main(report: Path) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        page.goto(report.resolve().as_uri())
        page.wait_for_selector("html[data-ready]")
        page.add_style_tag(content=LEFT_OUT)
        page.click(".latent >> nth=1")
        page.mouse.move(0, 0)  # nothing is under the pointer
        page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
        page.screenshot(path=OUT)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
