"""Tests of pages in a real browser: no requests, no errors, and working controls."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lorameter.cli import main
from lorameter.records import store
from lorameter.report.figures import draw_run_figures
from lorameter.report.html.page import save_html, write_html
from lorameter.report.run import describe_run
from lorameter.report.run_view import make_run_view

playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser: pip install -e .[dev]")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-core finds accessibility faults")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine (Debian: apt-get install chromium)"
)
SWEPT = max((Path(__file__).parents[2] / "reports").glob("*_llama2-lora-parameters"))


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The committed run with the most variants and charts, written as a page."""
    run = store.read_run(str(SWEPT), SWEPT.parent)
    view = make_run_view(run)
    figures = draw_run_figures(view)
    document = describe_run(view)
    written = write_html(
        document, title=view.study.title, names=view.variants, figures=figures, reproduction="lorameter run x"
    )
    return save_html(written, tmp_path_factory.mktemp("pages") / "page.html")


@pytest.fixture
def page(browser, file):
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.goto(file.as_uri())
    yield opened
    opened.close()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_opens_without_console_messages_or_requests(browser, file, width, scheme):
    """The page opens from a file without console messages, requests, horizontal scrolling or axe findings."""
    opened, messages, requests = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme), [], []
    opened.on("console", lambda message: messages.append(message.text))
    opened.on("pageerror", lambda error: messages.append(str(error)))
    opened.on("request", lambda request: requests.append(request.url))
    opened.goto(file.as_uri())
    assert not messages
    assert [url for url in requests if not url.startswith("data:")] == [file.as_uri()]
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert width > 390 or opened.evaluate(
        "[...document.querySelectorAll('.scroll')].every(one => one.scrollWidth <= one.clientWidth)"
    )
    opened.close()


@pytest.mark.parametrize("width", [1280, 1920, 2560])
def test_the_verdicts_on_claims_are_in_sight(browser, tmp_path, width):
    """No column of the table of claims lies beyond its right border."""
    assert main(["report", str(SWEPT), "--html", str(tmp_path / "page.html")]) == 0
    opened = browser.new_page(viewport={"width": width, "height": 900})
    opened.goto((tmp_path / "page.html").as_uri())
    table = opened.locator("table", has=opened.locator("th:has-text('the original said')")).first
    assert table.evaluate("one => one.parentElement.scrollWidth <= one.parentElement.clientWidth")
    opened.close()


def test_a_page_is_complete_without_scripts(browser, file):
    """Without scripts the page has the same text and charts, and no inactive controls."""
    both = []
    for scripts in (True, False):
        context = browser.new_context(java_script_enabled=scripts)
        opened = context.new_page()
        opened.goto(file.as_uri())
        both.append(
            (opened.locator("svg").count(), opened.locator("tbody tr").count(), opened.locator("main").inner_text())
        )
        assert opened.locator("th button").count() == 0 or scripts
        assert opened.locator("fieldset").is_visible() == scripts
        context.close()
    assert both[0][:2] == both[1][:2]
    assert set(both[1][2].split()) <= set(both[0][2].split())


def test_a_column_sorts_by_its_numbers_and_back(page):
    """Clicks sort ascending, descending and back, by the numeric value; missing values are last."""
    table = page.locator("h2:text-is('Training') ~ .scroll table.sortable").first
    written = table.locator("tbody tr").all_inner_texts()
    column = next(n for n, head in enumerate(table.locator("thead th").all()) if "step time" in head.inner_text())
    values = f"rows => rows.map(row => row.cells[{column}].dataset.value).filter(one => one).map(Number)"
    button, orders = table.locator("thead th").nth(column).locator("button"), []
    for _ in range(3):
        button.click()
        orders.append(table.locator("tbody tr").evaluate_all(values))
    assert orders[0] == sorted(orders[0])
    assert orders[1] == sorted(orders[0], reverse=True)
    assert table.locator("tbody tr").all_inner_texts() == written


def test_a_variant_is_hidden_everywhere_and_shown_again(page):
    """Tables and charts change together."""
    box = page.locator("fieldset label").nth(1)
    elements = page.locator(f'[data-variant="{box.inner_text().strip()}"]')
    assert elements.count() > 3
    box.locator("input").uncheck()
    assert elements.evaluate_all("all => all.every(one => one.classList.contains('off'))")
    assert elements.evaluate_all("all => all.every(one => getComputedStyle(one).display === 'none')")
    box.locator("input").check()
    assert elements.evaluate_all("all => all.some(one => getComputedStyle(one).display !== 'none')")
