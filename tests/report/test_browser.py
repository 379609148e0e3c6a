"""The page in a browser: tables, keyboard, dark, phone, paper, no script, hostile names; no request, no complaint."""

import itertools
import re

import pytest

from fisherviz.report import Section, write_page
from fisherviz.results.comparison import Comparison
from tests.factory import METHODS, make_comparison
from tests.report.browser import chromium, opened, until

EVIL = "</script><script>alert('1')</script>\"'&<img src=x onerror=alert(2)>\u202eabc\u202c" + "x" * 250


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    sections = [
        Section("Jointly", make_comparison(methods=METHODS), "Several layers as one matrix."),
        Section("Alone", make_comparison(layers=("a", "b"), methods=METHODS[3:6]), slug="alone"),
    ]
    return write_page(tmp_path_factory.mktemp("page") / "page.html", sections)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A page of one section with few methods: it has everything once."""
    comparison = make_comparison(layers=("a", "b"), methods=METHODS[3:6])
    return write_page(tmp_path_factory.mktemp("short") / "page.html", comparison)


CLICKED = """(table) => [...table.querySelectorAll("thead tr:last-child th")].slice(1).map((head, k) =>
[1, 2].map(() => {
  head.querySelector("button.sort").click();
  const cells = [...table.querySelectorAll(`tbody td:nth-child(${k + 2})`)].map((cell) => cell.dataset.value);
  return [head.ariaSort, cells.map((value) => value === undefined ? null : Number(value)),
    table.querySelectorAll("[aria-sort]").length];
}))"""


def test_every_column_sorts_both_ways_and_the_missing_come_last(browser, path):
    with opened(browser, path) as page:
        table = page.locator("table.ranked").first
        for column in (found := table.evaluate(CLICKED)):
            for direction, (said, values, sorting) in zip(("ascending", "descending"), column, strict=True):
                assert (said, sorting) == (direction, 1)
                known = [value for value in values if value is not None]
                assert known == sorted(known, reverse=direction == "descending")
                assert values[: len(known)] == known
        heads = table.locator("thead tr:last-child th")
        assert len(found) == heads.count() - 1 > 8
        heads.first.locator("button.sort").click()
        assert table.locator("tbody th").all_text_contents() == sorted(METHODS)


def test_a_definition_opens_from_the_head_by_keyboard(browser, short):
    with opened(browser, short) as page:
        button = page.locator("button.about").first
        button.focus()
        page.keyboard.press("Enter")
        popover = page.locator("#about-relative_frobenius")
        assert popover.is_visible()
        assert "calling every entry zero" in popover.text_content()
        page.keyboard.press("Escape")
        assert not popover.is_visible()


def test_everything_is_reached_by_keyboard_and_its_focus_is_seen(browser, short):
    with opened(browser, short) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        wanted = page.evaluate(
            "[...document.querySelectorAll('a, button, select, summary, .panels, .wide')]"
            ".filter((e) => e.checkVisibility()).length"
        )
        seen = set()
        for _ in range(wanted + 5):
            page.keyboard.press("Tab")
            seen.add(
                page.evaluate("""() => {
              const e = document.activeElement, style = getComputedStyle(e);
              const outlined = style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 1;
              return `${[...document.querySelectorAll('*')].indexOf(e)} ${outlined || e === document.body}`;
            }""")
            )
        assert len(seen) >= wanted - 1
        assert all(entry.endswith("true") for entry in seen)


def luminances(page, selector):
    """Of the text in an element and of the page behind it."""
    return page.locator(selector).first.evaluate("""(element) => {
      const light = (color) => {
        const [r, g, b] = color.match(/[\\d.]+/g).map(Number);
        return (0.2126 * r + 0.7152 * g + 0.0722 * b) / 255;
      };
      const page = getComputedStyle(document.documentElement);
      return [light(getComputedStyle(element).color), light(page.backgroundColor)];
    }""")


def test_a_dark_page_is_dark_and_its_charts_too(browser, path):
    with opened(browser, path, color_scheme="dark") as page:
        for selector in ("p", "caption", "td", "svg.chart", "button", "select"):
            ink, paper = luminances(page, selector)
            assert paper < 0.15, selector
            assert ink > 0.5, selector
        white = page.evaluate("""() => [...document.querySelectorAll('svg.chart *, .panel-chart *')].filter((e) => {
          const style = getComputedStyle(e), box = e.getBoundingClientRect();
          return style.fill === 'rgb(255, 255, 255)' && box.width * box.height > 400;
        }).length""")
        assert white == 0


def test_a_phone_shows_whole_words_and_never_scrolls_sideways(browser, path):
    with opened(browser, path, width=390, height=844, is_mobile=True, has_touch=True) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        beyond = page.evaluate("""() => [...document.querySelectorAll('body *')].filter((e) => {
          const box = e.getBoundingClientRect();
          return box.width && box.right > 391 && !e.closest('.wide, pre, .visually-hidden, svg');
        }).map((e) => e.outerHTML.slice(0, 80))""")
        assert beyond == []
        broken = page.evaluate("""() => {
          const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
          for (let node; (node = walker.nextNode());) {
            const parent = node.parentElement;
            if (!parent.checkVisibility() || parent.closest('script, style, pre, select')) continue;
            for (const word of node.data.matchAll(/[\\p{L}]{2,}/gu)) {
              const range = document.createRange();
              range.setStart(node, word.index);
              range.setEnd(node, word.index + word[0].length);
              if (new Set([...range.getClientRects()].map((r) => Math.round(r.top))).size > 1) found.push(word[0]);
            }
          }
          return found;
        }""")
        assert broken == []
        canvas = page.locator(".panel canvas").first.bounding_box()
        assert canvas["width"] > 300


def test_paper_shows_one_picture_for_the_explorer_on_few_pages(browser, path):
    with opened(browser, path) as page:
        pages = len(re.findall(rb"/Type\s*/Page\b", page.pdf(format="A4")))
        assert 2 <= pages <= 8
        page.emulate_media(media="print")
        assert page.locator(".still").first.is_visible()
        assert not page.locator(".bench").first.is_visible()


def test_without_script_a_picture_stands_for_the_explorer(browser, path):
    with opened(browser, path, java_script_enabled=False) as page:
        assert page.locator(".still").count() == page.locator(".still:visible").count() == 2
        assert page.locator(".bench:visible").count() == 0
        assert page.locator(".sort").count() == 0
        assert page.locator("a[download]").first.get_attribute("href").startswith("data:text/csv")


def test_hostile_names_stay_text(browser, tmp_path):
    comparison = make_comparison(layers=(EVIL, "b"), methods=(EVIL, "kfac"))
    comparison.meta["notes"] = [EVIL]
    comparison.meta["settings"] = {EVIL: EVIL}
    comparison.meta["command"] = EVIL
    path = write_page(tmp_path / "p.html", [Section(EVIL, comparison, EVIL, "x")], title=EVIL)
    with opened(browser, path) as page:
        assert page.locator("img[src=x]").count() == 0
        assert page.locator("[data-field=method] option").first.get_attribute("value") in (EVIL, "kfac")
        page.locator("[data-field=method]").select_option(EVIL)
        page.locator("[data-field=row]").select_option(index=1)
        until(page, "location.hash.includes('block=')")
        assert page.evaluate("document.documentElement.scrollWidth") <= 1280
        page.locator(".panels").focus()
        page.keyboard.press("ArrowDown")
        assert EVIL in page.locator("[data-read=row]").text_content()
        address = page.evaluate("location.hash")
    with opened(browser, path, address) as page:
        assert page.locator("[data-field=method]").input_value() == EVIL
        assert page.locator("[data-field=row]").input_value() == "0"


def test_many_layers_with_long_names_fit(browser, tmp_path):
    layers = tuple(f"encoder.layers.{k}.attention.output_projection" for k in range(30))
    comparison = make_comparison(layers=layers, units=1, fan_in=2, methods=("kfac", "ekfac"))
    measured = comparison.frame[comparison.frame["metric"].isin(["relative_frobenius", "direction_cosine"])]
    arrays = {name: array for name, array in comparison.arrays.items() if not name.startswith("spectrum/")}
    path = write_page(tmp_path / "p.html", Comparison(measured, comparison.meta, arrays))
    with opened(browser, path) as page:
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") == width
            names = page.locator(".panel-chart").first.locator("title").all_text_contents()
            assert [name.split(":")[0] for name in names] == list(layers)


def test_what_is_read_aloud_has_an_order_and_names(browser, path):
    with opened(browser, path) as page:
        levels = page.locator("h1, h2, h3, h4").evaluate_all(
            "(all) => all.filter((e) => e.checkVisibility()).map((e) => Number(e.tagName[1]))"
        )
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
        nameless = page.locator("canvas, button, select, svg, [role=region]").evaluate_all("""(all) =>
          all.filter((e) => {
          if (e.closest('[aria-hidden=true]')) return false;
          const name = e.getAttribute('aria-label') || e.textContent.trim() || (e.labels && e.labels.length);
          return !name;
        }).map((e) => e.outerHTML.slice(0, 90))""")
        assert nameless == []
        assert page.locator("table").count() == page.locator("table > caption").count()
        assert page.locator("canvas:not([role=img])").count() == 0
        assert page.locator("[role=status][aria-live=polite]").count() == 2


def test_motion_is_reduced_where_that_is_asked_for(browser, short):
    with opened(browser, short) as page:
        for wish, behaviour in (("reduce", "auto"), ("no-preference", "smooth")):
            page.emulate_media(reduced_motion=wish)
            assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == behaviour


def test_the_table_is_downloaded(browser, short):
    with opened(browser, short) as page, page.expect_download() as found:
        page.locator("a[download]").first.click()
    assert found.value.suggested_filename == "fisherviz-summary.csv"
