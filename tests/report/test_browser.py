"""The page in a real browser."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from saelens_matryoshka.report.page import PageContent, write_page
from saelens_matryoshka.report.samples import Samples
from saelens_matryoshka.widths import latent_levels
from tests.report.pages import HOSTILE, MadeUpText, made_up_page

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

WIDTHS = [20, 80, 240]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def content() -> PageContent:
    return made_up_page(WIDTHS)


@pytest.fixture(scope="module")
def file(content: PageContent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(content, path)
    return path


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:
    """Opens a file; at the end nothing was written to the console, and nothing but the file was asked for."""
    contexts, complaints, requests = [], [], []

    def open_(path: Path, *, width: int = 1366, height: int = 768, scheme: str = "light") -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]", timeout=30_000)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []


def _count(page: Any) -> int:
    return int(page.text_content("#count").split()[0].replace(",", ""))


def _shown(page: Any) -> list[int]:
    return page.eval_on_selector_all(".latent", "boxes => boxes.map(box => +box.dataset.latent)")


def _search(page: Any, text: str) -> None:
    before = page.evaluate("document.getElementById('list').firstChild.marked = true")
    assert before
    page.fill("#search", text)
    page.wait_for_function("() => !document.getElementById('list').firstChild.marked")


def test_every_section_is_there_with_labelled_axes(opened: Open, file: Path) -> None:
    page = opened(file)
    assert page.locator("#prefix-charts figure").count() == 4
    assert page.locator("#training-charts figure").count() == 6
    labels = page.eval_on_selector_all("figure svg", "all => all.map(s => s.textContent)")
    assert all("tokens" in label or "latents" in label for label in labels)
    assert page.locator("#prefixes tbody tr").count() == len(WIDTHS)
    assert page.locator("#matrix tbody tr").count() == len(WIDTHS) - 1
    assert page.locator(".family").count() > 0
    page.hover("#training-charts figure >> nth=1")
    tip = page.text_content("#training-charts figure >> nth=1 >> .tip")
    assert "tokens" in tip
    assert "240" in tip


def test_filters_leave_exactly_the_latents_they_say(opened: Open, file: Path, content: PageContent) -> None:
    samples = content.samples
    assert samples is not None
    live = samples.fired > 0
    level = latent_levels(WIDTHS)
    page = opened(file)
    assert _count(page) == int(live.sum())
    page.select_option("#filter-state", "dead")
    assert _count(page) == int((~live).sum())
    assert "dead" in page.text_content(".latent >> nth=0")
    page.select_option("#filter-state", "all")
    assert _count(page) == WIDTHS[-1]
    page.select_option("#filter-level", "1")
    assert _count(page) == int((level == 1).sum())
    page.select_option("#density-low", "0.01")
    page.select_option("#density-high", "0.1")
    expected = (level == 1) & (samples.density >= 0.01) & (samples.density <= 0.1)
    assert _count(page) == int(expected.sum()) > 0
    page.select_option("#sort", "dense")
    ids = expected.nonzero().squeeze(1)
    order = samples.fired[ids].argsort(descending=True, stable=True)
    assert _shown(page) == ids[order][:20].tolist()
    page.click("#reset")
    assert _count(page) == int(live.sum())


def _contexts(samples: Samples, text: MadeUpText, latent: int) -> list[str]:
    examples = samples.top_of(latent)
    drawn = [interval.examples[:1] for interval in samples.intervals_of(latent)]
    shown = [*examples, *(example for group in drawn for example in group)]
    return [text.text_of(example.tokens).lower() for example in shown]


def test_search_finds_text_across_tokens_numbers_and_logits(
    opened: Open, file: Path, content: PageContent
) -> None:
    samples, text, logits = content.samples, MadeUpText(), content.logits
    assert samples is not None
    assert logits is not None
    page = opened(file)
    page.select_option("#filter-state", "all")
    page.select_option("#search-in", "contexts")
    example = next(
        e for latent in range(9, 48) for e in samples.top_of(latent) if min(e.tokens[:3]) >= len(HOSTILE)
    )
    query = text.text_of(example.tokens[:3])[2:-1]
    _search(page, query.upper())
    expected = [j for j in range(WIDTHS[-1]) if any(query in c for c in _contexts(samples, text, j))]
    assert expected
    assert _count(page) == len(expected)
    assert _shown(page) == expected[:20]

    page.select_option("#search-in", "logits")
    token = next(t for t in logits.top_tokens[7].tolist() if t >= len(HOSTILE))
    query = text.string_of(token).strip()
    _search(page, query)
    hits = [
        j for j in range(WIDTHS[-1]) if any(query in text.string_of(t) for t in logits.top_tokens[j].tolist())
    ]
    assert _shown(page) == hits[:20]
    assert 7 in hits

    page.select_option("#search-in", "all")
    _search(page, "#123")
    assert _shown(page) == [123]
    _search(page, "nothing has this in it")
    assert "No latent" in page.text_content("#list")


def test_pages_follow_each_other_and_only_one_is_in_the_document(opened: Open, file: Path) -> None:
    page = opened(file)
    page.select_option("#filter-state", "all")
    assert _shown(page) == list(range(20))
    page.click("#pager button[aria-label='Next page']")
    assert _shown(page) == list(range(20, 40))
    page.fill("#pager input", "12")
    page.press("#pager input", "Enter")
    assert _shown(page) == list(range(220, 240))
    assert page.is_disabled("#pager button[aria-label='Next page']")
    page.click("#pager button[aria-label='Previous page']")
    assert _shown(page) == list(range(200, 220))


def test_a_latent_opens_with_its_contexts_and_leads_to_its_parent(
    opened: Open, file: Path, content: PageContent
) -> None:
    samples = content.samples
    assert samples is not None
    page = opened(file)
    page.click(".latent[data-latent='3'] button.row")
    box = page.locator(".latent[data-latent='3']")
    assert box.locator(".example").count() >= len(samples.top_of(3))
    first = samples.top_of(3)[0]
    assert box.locator(".example .val").first.text_content() == f"{first.value:.2f}"
    assert box.locator(".example >> nth=0").locator(".tok.peak").count() == 1
    page.evaluate("location.hash = '#latent-200'")
    page.wait_for_selector(".latent.open[data-latent='200']")
    parent = int(content.relations.parent[200])
    page.click(f".latent[data-latent='200'] a.jump[href='#latent-{parent}']")
    page.wait_for_selector(f".latent.open[data-latent='{parent}']")
    assert _shown(page) == [parent]


def test_no_token_title_or_fact_becomes_markup(opened: Open, file: Path, content: PageContent) -> None:
    page = opened(file)
    for _ in range(0, 240, 20):
        rows = page.locator(".latent button.row")
        for i in range(0, rows.count(), 4):
            rows.nth(i).click()
        if not page.locator("#pager button[aria-label='Next page']").is_disabled():
            page.click("#pager button[aria-label='Next page']")
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    assert page.text_content("h1") == content.title
    assert page.locator("h1 b, #about script, .kind i").count() == 0


def test_control_and_direction_characters_are_shown_and_parts_of_a_character_joined(
    opened: Open, file: Path
) -> None:
    page = opened(file)
    shown = page.evaluate(
        "texts => texts.map(visible)", ["a\u202eb", "\x00\x1b\x7f", "\u200b\ufeff", "é🙂\n\t"]
    )
    assert shown == ["a⟨U+202E⟩b", "␀␛␡", "⟨U+200B⟩⟨U+FEFF⟩", "é🙂\n\t"]
    joined = page.evaluate(
        """() => {
          const text = Object.create(Latents.prototype);
          text.vocabulary = ["a", [0xf0, 0x9f], [0x99, 0x82], [0xff]];
          const all = [[0, 1, 2, 0], [1, 0], [3], [1, 2, 1, 2]].map((ids) => text.pieces(ids));
          return all.map((pieces) => pieces.map((p) => [p.text, p.from, p.to]));
        }"""
    )
    assert joined[0] == [["a", 0, 1], ["🙂", 1, 3], ["a", 3, 4]]
    assert joined[1] == [["\ufffd", 0, 1], ["a", 1, 2]]
    assert joined[2] == [["\ufffd", 0, 1]]
    assert joined[3] == [["🙂", 0, 2], ["🙂", 2, 4]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1366, 768), (390, 844)], ids=["laptop", "phone"])
def test_it_fits_a_laptop_and_a_phone_in_light_and_dark(
    opened: Open, file: Path, size: tuple[int, int], scheme: str
) -> None:
    page = opened(file, width=size[0], height=size[1], scheme=scheme)
    page.click(".latent >> nth=1 >> button.row")
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0] < 100")
    assert dark == (scheme == "dark")
    cut = page.evaluate(
        "[...document.querySelectorAll('figure svg')]"
        ".filter(s => s.getBoundingClientRect().right > innerWidth).length"
    )
    assert cut == 0


def test_a_token_of_many_spaces_stays_within_its_context(opened: Open, file: Path) -> None:
    page = opened(file)
    page.click(".latent >> nth=1 >> button.row")
    beyond = page.evaluate(
        """() => {
          const context = document.querySelector(".ctx:not(.line)"), token = context.querySelector("*");
          token.textContent = " ".repeat(400);
          const right = Math.max(...[...token.getClientRects()].map((part) => part.right));
          return right - context.getBoundingClientRect().right;
        }"""
    )
    assert beyond <= 0


def test_a_page_without_log_metrics_and_samples_says_what_is_missing(
    browser: Any, content: PageContent, tmp_path: Path
) -> None:
    bare = dataclasses.replace(content, log=None, evaluation=None, samples=None, logits=None, text=None)
    write_page(bare, tmp_path / "bare.html")
    page = browser.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto((tmp_path / "bare.html").as_uri())
    page.wait_for_selector("#matrix table")
    for section in ("prefixes", "training", "density", "latents"):
        assert page.locator(f"#{section} .missing").count() == 1
    assert complaints == []
    page.close()


def test_a_plain_dictionary_without_logits_has_a_page(opened: Open, tmp_path: Path) -> None:
    plain = dataclasses.replace(made_up_page([30]), logits=None, no_logits="because")
    write_page(plain, tmp_path / "plain.html")
    page = opened(tmp_path / "plain.html")
    page.click(".latent >> nth=0 >> button.row")
    assert "because" in page.text_content(".latent >> nth=0")
    assert "one level" in page.text_content("#levels")


@pytest.mark.slow
def test_a_page_of_18432_latents_is_ready_and_answers_within_seconds(opened: Open, tmp_path: Path) -> None:
    content = made_up_page([1152, 3456, 8064, 18432], n_tokens=262_144, vocabulary=30_000)
    size = write_page(content, tmp_path / "big.html")
    assert size < 20e6
    page = opened(tmp_path / "big.html")
    assert page.evaluate("performance.now()") < 10_000
    assert page.locator(".latent").count() == 20
    waited = page.evaluate(
        """async (query) => {
          const started = performance.now(), search = document.getElementById("search");
          search.value = query;
          search.dispatchEvent(new Event("input"));
          const before = document.getElementById("list").firstChild;
          while (document.getElementById("list").firstChild === before)
            await new Promise(requestAnimationFrame);
          return performance.now() - started;
        }""",
        MadeUpText().string_of(1_000).strip(),
    )
    assert waited < 5_000
    assert 0 < _count(page) < 18432


def _luminance(colour: str) -> float:
    """WCAG's relative luminance of "rgb(...)"."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_level_stands_out_from_the_ground(opened: Open, file: Path, scheme: str) -> None:
    page = opened(file, scheme=scheme)
    style = "getComputedStyle(document.querySelector('figure.chart')).backgroundColor"
    ground = _luminance(page.evaluate(style))
    levels = page.evaluate("[0, 1, 2, 3, 4].map(level => levelColour(level, 5))")
    for lighter, darker in (sorted((_luminance(level), ground), reverse=True) for level in levels):
        assert (lighter + 0.05) / (darker + 0.05) >= 3  # what WCAG asks of graphics
