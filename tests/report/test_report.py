"""The page is well-formed, self-contained, escaped, drawn from the saved comparison; its folder is whole."""

import base64
import csv
import hashlib
import io
import json
import os
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fisherviz.commands.report import differing_alone, side_by_side
from fisherviz.report import Section, paragraph, verdict, write_page, write_report
from fisherviz.report.charts import means_map, panels
from fisherviz.report.explorer import explorer
from fisherviz.report.pictures import LARGEST, _Sheet, closest_first
from fisherviz.report.ranked import csv_link, ranked
from fisherviz.report.tables import layer_tables, summary_table
from fisherviz.results.comparison import Comparison, load_comparison
from fisherviz.support import files
from fisherviz.support.checksums import opened_json, sealed_json
from tests.factory import METHODS, make_comparison

EVIL = "<script>alert('1')</script>"
DRAWN = ("heatmap", "difference", "inverse")  # the arrays that pictures of matrices are drawn of
VOID = {"meta", "img", "br", "link", "input", "hr", "wbr"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; complains about tags that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["script"], ["style"]):
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def comparison():
    return make_comparison(layers=("in", "mid", "out"), methods=METHODS[3:8])


@pytest.fixture(scope="module")
def text(comparison, tmp_path_factory):
    return write_page(tmp_path_factory.mktemp("page") / "page.html", comparison).read_text()


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_the_page_is_well_formed_and_says_its_language(text, page):
    assert text.lstrip().startswith("<!DOCTYPE html>")
    assert page.all("html") == [{"lang": "en"}]
    assert page.all("meta")[0] == {"charset": "utf-8"}


def test_the_page_needs_nothing_from_elsewhere(text, page):
    assert "http" not in text.replace("http-equiv", "")
    assert page.all("link") == page.all("iframe") == []
    assert all("src" not in script for script in page.all("script"))
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert all(image["href"].startswith("data:image/png;base64,") for image in page.all("image"))
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert all(link["href"].startswith(("#", "data:text/csv")) for link in page.all("a"))
    assert "@import" not in text


def test_nothing_runs_but_the_pages_own_script(text, page):
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["connect-src"] == "'none'"
    assert rules["img-src"] == "data:"
    for element, name in (("style", "style-src"), ("script", "script-src")):
        inside = re.findall(rf"<{element}>(.*?)</{element}>", text, flags=re.DOTALL)
        assert len(inside) == 1
        digest = base64.b64encode(hashlib.sha256(inside[0].encode()).digest()).decode()
        assert rules[name] == f"'sha256-{digest}'"
    assert [script for script in page.all("script") if script.get("type") != "application/json"] == [{}]
    assert not [attributes for _, attributes in page.tags if "style" in attributes]  # the policy would ignore it
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


def test_the_page_is_light_whatever_is_in_it(text):
    assert len(text) < 5_000_000


def test_methods_without_room_are_left_out_and_named():
    comparison = make_comparison(methods=METHODS)
    order = closest_first(comparison)
    whole = explorer(comparison, order)
    assert whole.methods == tuple(order)
    assert whole.error == 2**-8  # as saved
    coarser = explorer(comparison, order, room=int(0.9 * len(whole.data)))
    assert coarser.methods == whole.methods
    assert coarser.error > whole.error
    some = explorer(comparison, order, room=len(whole.data) // 4)
    assert 0 < len(some.methods) < len(order)
    assert some.methods + some.left_out == tuple(order)


def test_the_downloaded_table_holds_every_digit():
    comparison = make_comparison(methods=("kfac", "=foof"))
    prefix, data = csv_link(comparison).split(",")
    assert prefix == "data:text/csv;charset=utf-8;base64"
    rows = list(csv.reader(io.StringIO(base64.b64decode(data).decode())))
    summary = comparison.summary()
    assert rows[0] == ["method", *summary.columns]
    assert [row[0] for row in rows[1:]] == ["kfac", "'=foof"]  # no spreadsheet takes it for a formula
    assert [float(text) for text in rows[1][1:]] == summary.loc["kfac"].astype(float).tolist()


def test_bars_grow_with_the_numbers():
    comparison = make_comparison()
    found = ranked(summary_table(comparison), comparison)
    for k, (name, _) in enumerate(found["columns"]):
        values = comparison.whole(name)
        for method, cells in found["rows"]:
            assert cells[k].value == values.get(method)
        known = sorted((cells[k].value, cells[k].bar) for _, cells in found["rows"] if cells[k].value is not None)
        assert all(0 <= bar <= 100 for _, bar in known)
        assert [bar for _, bar in known] == sorted(bar for _, bar in known)
        assert max(bar for _, bar in known) == pytest.approx(100)


def test_metrics_of_ones_own_keep_their_numbers_whatever_they_are_called():
    frame = make_comparison(methods=("kfac", "foof")).frame
    own = pd.DataFrame(
        [(method, "all", "all", name, value, 0.0) for method in ("kfac", "foof")
         for name, value in (("cosine", 0.25), ("memory", 7.0))], columns=list(frame.columns),
    )  # fmt: skip
    comparison = Comparison(pd.concat([frame, own]))
    found = ranked(summary_table(comparison), comparison)
    shown = {name: [cells[k].value for _, cells in found["rows"]] for k, (name, _) in enumerate(found["columns"])}
    assert shown["cosine"] == [0.25, 0.25]
    assert shown["memory"] == [7.0, 7.0]
    assert shown["bytes"] == [comparison.whole("bytes")[method] for method, _ in found["rows"]]


def plain(comparison):
    """Without what its charts are drawn of."""
    return Comparison(comparison.frame.query("metric == 'relative_frobenius'"), comparison.meta)


def test_a_name_from_right_to_left_turns_no_sentence(tmp_path):
    name = "\u202efoof"
    comparison = make_comparison(methods=(name, "kfac"))
    text = write_page(tmp_path / "p.html", Comparison(comparison.frame, comparison.meta)).read_text()
    sentence = re.search(r'<div class="verdict">(.*?)</div>', text, flags=re.DOTALL)[1]
    sentence = re.sub(r'<span class="whole">(.*?)</span>', r"\1", sentence)
    assert sentence.count(name) == sentence.count(f"<bdi>{name}</bdi>") > 0


def test_the_root_modules_layer_has_a_name_in_every_table(tmp_path):
    comparison = make_comparison(layers=("", "head"))
    assert all(head[0] == "(root)" for head in (table.heads for table in layer_tables(comparison)))
    many = make_comparison(layers=("", *map(str, range(9))))
    assert all(table.rows[0][0] == "(root)" for table in layer_tables(many))
    assert all("<title>(root): " in chart for chart in panels(comparison, "relative_frobenius"))


def test_small_panels_write_powers_of_ten_and_no_cosine_on_a_logarithmic_axis():
    comparison = make_comparison(methods=("kfac", "foof"))
    frame = comparison.frame
    inside = (frame["row"] == frame["col"]) & (frame["row"] != "all")
    for metric in ("relative_frobenius", "direction_cosine"):
        chosen = inside & (frame["metric"] == metric)
        frame.loc[chosen, "value"] = 10.0 ** -np.linspace(0, 5, chosen.sum())
    ticks = [
        re.findall(r'class="tick">(.*?)<', str(panels(comparison, metric)[0]))
        for metric in ("relative_frobenius", "direction_cosine")
    ]
    assert "10⁻⁴" in ticks[0]
    assert not any("·" in tick for tick in ticks[0])
    assert ticks[1] == ["0", "0.5", "1"]


def test_the_names_beside_a_map_of_means_fit_into_it():
    parts = ("norm1", "norm2", "attention", "attention.out_proj", "mlp.0", "mlp.2")
    layers = ["", "tokens", *(f"blocks.{k}.{part}" for k in range(2) for part in parts), "head"]
    chart = str(means_map(make_comparison(layers=layers), False))
    left = [
        (float(x), name) for x, name in re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="end">(.*?)<', chart)
    ]
    assert len(left) == len(layers)
    assert max(len(name) for _, name in left) > 10
    assert all(x >= 6 * len(name) for x, name in left)


def test_a_comparison_without_blocks_shows_its_picture_for_good(tmp_path):
    comparison = make_comparison()
    for name in [name for name in comparison.arrays if name.startswith(("blocks", "entries", "block_rms"))]:
        del comparison.arrays[name]
    found = Page(write_page(tmp_path / "p.html", comparison).read_text())
    assert "nothing to explore" in found.text
    assert len(found.all("img")) == 1
    assert not any("still" in attributes.get("class", "") for _, attributes in found.tags)


def test_links_and_references_inside_the_page_arrive(text, page):
    identities = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identities) == len(set(identities))
    wanted = re.findall(r'href="#([^"]*)"', text) + re.findall(r"url\(#([^)]*)\)", text)
    assert set(wanted) <= set(identities)
    assert len(wanted) > 50


def test_every_picture_is_described_and_light(page):
    pictures = page.all("img")
    assert len(pictures) == 1  # what stands for the explorer where no script runs
    assert all(len(image["alt"]) > 30 for image in pictures)
    sizes = [len(base64.b64decode(image["src"].split(",")[1])) for image in pictures]
    assert max(sizes) < LARGEST
    described = [svg for svg in page.all("svg") if svg.get("aria-hidden") != "true"]
    assert all(svg["role"] == "img" and len(svg["aria-label"]) > 30 for svg in described)
    assert len(described) >= 6


def test_every_table_has_a_caption_and_heads(text, page):
    assert len(page.all("table")) == len(page.all("caption")) > 4
    assert {head["scope"] for head in page.all("th")} == {"col", "row", "colgroup"}


def test_the_page_shows_what_was_asked_for(page):
    for words in (
        "kfac-full is closest to the exact Fisher",
        "Quality against cost",
        "Block explorer",
        "Which layers interact",
        "Spectra",
        "Layer by layer",
        "What was probed",
        "requires_grad is False",
        "Settings and versions",
        "fingerprint of the weights",
        "What the numbers mean",
        "kl of foof is left out",
    ):
        assert words in page.text, words


def test_a_heatmap_too_detailed_for_the_page_becomes_coarser(tmp_path):
    rng = np.random.default_rng(0)
    comparison = make_comparison(methods=("kfac",), units=15, fan_in=9)
    for name, array in comparison.arrays.items():
        if array.shape == (600, 600):
            comparison.arrays[name] = rng.random((600, 600)).astype(np.float32)
    matrices = {name: array for name, array in comparison.arrays.items() if name.startswith(DRAWN)}
    page = Page(write_page(tmp_path / "p.html", Comparison(plain(comparison).frame, {}, matrices)).read_text())
    sizes = [len(base64.b64decode(image["src"].split(",")[1])) for image in page.all("img")]
    assert 0.5 * LARGEST < max(sizes) <= LARGEST


def test_names_are_escaped_wherever_they_stand(tmp_path):
    comparison = make_comparison(layers=(EVIL, "b"), methods=(EVIL,))
    comparison.meta["notes"] = [EVIL]
    comparison.meta["settings"] = {EVIL: EVIL}
    comparison.meta["left_out"] = [{"name": EVIL, "why": EVIL}]
    comparison.meta["likelihood"] = comparison.meta["damping"] = comparison.meta["kind"] = EVIL
    text = write_page(tmp_path / "p.html", [Section(EVIL, comparison, EVIL)], title=EVIL).read_text()
    found = Page(text)
    assert len(found.all("script")) == 3  # the explorer's data, the colours, and the page's own
    assert found.text.count(EVIL) > 15
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', text, flags=re.DOTALL)[1])
    assert data["methods"] == [EVIL]
    assert data["layers"][0]["name"] == EVIL


def test_the_page_is_the_same_from_the_loaded_comparison_and_every_time(comparison, text, tmp_path):
    loaded = load_comparison(comparison.save(tmp_path / "saved"))
    assert loaded.to_html(tmp_path / "p.html").read_text() == text


def test_the_users_style_changes_nothing(comparison, text, tmp_path):
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "svg.fonttype": "none"}):
        assert write_page(tmp_path / "p.html", comparison).read_text() == text


def test_the_papers_sums_stand_beside_ours_in_the_papers_setting_only(comparison, page, tmp_path):
    assert "2,189.0" in page.text
    assert "2,894.4" in page.text
    assert "4,134.6" in page.text
    assert "0.716" in page.text
    assert "0.700" in page.text
    other = plain(make_comparison(methods=("kfac",)))
    other.meta["settings"] = {}
    text = Page(write_page(tmp_path / "p.html", other).read_text()).text
    assert "2,189.0" in text
    assert "2,894.4" not in text


def test_a_comparison_of_almost_nothing_still_makes_a_page(tmp_path):
    full = make_comparison(methods=("kfac",))
    frame = full.frame[full.frame["metric"] == "frobenius_cosine"]
    page = Page(write_page(tmp_path / "p.html", Comparison(frame)).read_text())
    assert "cosine" in page.text


# ---- words and tables ------------------------------------------------------------------------------


def test_the_verdict_names_the_closest_the_best_step_and_the_front():
    words = paragraph(verdict(make_comparison()))
    assert "kfac-full is closest to the exact Fisher: its relative Frobenius error is 0.310" in words
    assert "kfac-full agrees best with the exact natural gradient (cosine 0.845)" in words
    assert "the plain gradient has 0.502" in words
    assert "identity (0.0200), foof (0.900), kfac (2.40), kfac-tridiagonal (2.90), kfac-full (3.10)" in words


def with_values(methods, **given):
    """A comparison of some methods with some of the whole matrix's values set."""
    comparison = make_comparison(methods=methods)
    frame = comparison.frame
    for metric, values in given.items():
        for method, value in values.items():
            frame.loc[(frame["metric"] == metric) & (frame["row"] == "all") & (frame["method"] == method), "value"] = (
                value
            )
    return comparison


def test_the_verdict_on_one_method_compares_it_with_nothing():
    words = paragraph(verdict(make_comparison(methods=("kfac",))))
    assert words == (
        "The relative Frobenius error of kfac to the exact Fisher is 0.620, its cosine with it 0.785. What an "
        "optimizer would feel is the direction of the step at λ = 0.01: there the cosine of kfac with the exact "
        "natural gradient is 0.690. kfac costs 2.40 forward and backward passes over the same data."
    )
    (only,) = verdict(with_values(("layer",), relative_frobenius={"layer": 1e-9}, passes={"layer": 8.0}))[:1]
    assert str(only) == "layer equals the exact Fisher to rounding."


def test_the_verdict_on_two_methods_knows_no_others():
    traded = paragraph(verdict(make_comparison(methods=("kfac", "foof"))))
    assert "kfac is closer to the exact Fisher" in traded
    assert "kfac agrees better with" in traded
    assert traded.endswith("the worthwhile trade-offs of error against cost are foof (0.900), kfac (2.40).")
    beaten = paragraph(verdict(with_values(("kfac", "diagonal"), passes={"diagonal": 3.0})))
    assert beaten.endswith(
        "kfac is closer than diagonal and costs no more: 2.40 forward and backward passes over the same data."
    )
    for words in (traded, beaten):
        assert not any(word in words for word in ("every", "other", "best", "closest"))


def test_the_verdict_says_ties_as_ties():
    equal = {"kfac": 0.6, "ekfac": 0.60004, "kfac-full": 0.6}
    cosines = {"kfac": 0.865, "ekfac": 0.8651, "kfac-full": 0.865, "foof": 0.86}
    methods = ("identity", "kfac", "ekfac", "kfac-full", "foof")
    words = paragraph(verdict(with_values(methods, relative_frobenius=equal, direction_cosine=cosines)))
    assert "relative Frobenius error is 0.600, like kfac-full and ekfac," in words
    assert "(cosine 0.865, like kfac and kfac-full), with foof within 0.01 of it" in words
    assert (
        "are identity (0.0200), foof (0.900), kfac (2.40); as close as one of these and no cheaper: kfac-full" in words
    )
    two = with_values(("kfac", "ekfac"), relative_frobenius=equal, direction_cosine=cosines)
    assert paragraph(verdict(two)) == (
        "Both are equally close to the exact Fisher: the relative Frobenius error is 0.600. What an optimizer would "
        "feel is the direction of the step at λ = 0.01: there both agree equally well with the exact natural "
        "gradient (cosine 0.865). kfac costs 2.40 forward and backward passes over the same data; ekfac is as close "
        "and costs no less."
    )


def test_the_verdict_on_nothing_but_exact_methods_is_about_cost():
    words = paragraph(verdict(with_values(("layer", "kfac"), relative_frobenius={"layer": 1e-9, "kfac": 0.0})))
    assert words == (
        "Every approximation equals the exact Fisher to rounding. kfac costs 2.40 forward and backward passes over the "
        "same data; layer is as close and costs no less."
    )


def test_the_verdict_counts_what_costs_nothing():
    words = paragraph(verdict(with_values(METHODS, passes={"identity": 0.0})))
    assert "are identity (0), foof (0.900)" in words
    assert "for each of the other 5 one of these is closer at no more cost." in words


def test_the_verdict_says_seconds_where_nothing_was_counted():
    comparison = make_comparison(methods=("kfac", "foof"))
    comparison.frame = comparison.frame[comparison.frame["metric"] != "passes"]
    assert "In seconds, the worthwhile trade-offs" in paragraph(verdict(comparison))


def test_damped_tables_name_their_strength():
    comparison = make_comparison()
    titles = [title for title, _ in summary_table(comparison).groups]
    assert "what an optimizer feels, λ = 0.01" in titles
    captions = [table.caption for table in layer_tables(comparison)]
    assert captions == [
        "Relative error in Frobenius norm",
        "Cosine of the natural gradients, λ = 0.01",
        *captions[2:],
    ]
    comparison.meta["damping"] = None
    assert any("each layer at its own λ" in table.caption for table in layer_tables(comparison))


def test_the_verdict_says_what_is_exact_and_goes_on():
    comparison = make_comparison()
    frame = comparison.frame
    whole = (frame["metric"] == "relative_frobenius") & (frame["row"] == "all")
    frame.loc[whole & (frame["method"] == "layer"), "value"] = 1e-9
    words = paragraph(verdict(comparison))
    assert words.startswith("layer equals the exact Fisher to rounding. Of the others, kfac-full is closest")


def test_the_verdict_calls_a_sampled_fisher_by_its_name():
    comparison = make_comparison()
    comparison.meta["kind"] = "mc"
    assert "closest to the sampled Fisher" in paragraph(verdict(comparison))
    assert "agrees best with the natural gradient of the sampled Fisher" in paragraph(verdict(comparison))


def test_the_summary_marks_the_best_of_each_column():
    table = summary_table(make_comparison())
    best = {head: [name for name, cells in table.rows if cells[k].best] for k, head in enumerate(table.heads)}
    assert best["Frobenius"] == ["kfac-full"]
    assert best["step, cosine"] == ["kfac-full"]
    assert best["passes"] == ["identity"]
    foof = next(cells for name, cells in table.rows if name == "foof")
    assert foof[table.heads.index("KL, nats")].text == "–"


def test_standard_errors_stand_in_every_table():
    plain = make_comparison()
    comparison = Comparison(plain.frame.assign(stderr=0.125), plain.meta, plain.arrays)
    for table, other in zip(
        [summary_table(comparison), *layer_tables(comparison)],
        [summary_table(plain), *layer_tables(plain)],
        strict=True,
    ):
        for (_, cells), (_, bare) in zip(table.rows, other.rows, strict=True):
            assert [cell.best for cell in cells] == [cell.best for cell in bare]
            for cell, alone in zip(cells, bare, strict=True):
                without = alone.text == "–" or alone.text.endswith(("B", "bytes"))  # a missing value, or a size
                assert cell.text == alone.text + ("" if without else " ± 0.12")


def test_layers_tables_are_sorted_best_first():
    table = layer_tables(make_comparison())[0]
    assert table.rows[0][0] == "layer"
    assert table.heads == ("0", "2", "4", "6")


def test_many_layers_become_rows():
    layers = tuple(f"layer{k}" for k in range(12))
    table = layer_tables(make_comparison(layers=layers, units=1, fan_in=1, methods=("kfac", "foof")))[0]
    assert table.heads == ("kfac", "foof")
    assert [name for name, _ in table.rows] == list(layers)


def test_single_layers_are_put_side_by_side():
    found = [(name, make_comparison(layers=(name,), methods=("kfac", "foof"))) for name in "ab"]
    joined = side_by_side(found, {"model": "m", "setting": "kfac-figure-2"})
    assert joined.layers == ("a", "b")
    assert joined.whole("relative_frobenius") == {}
    blocks = joined.blocks("relative_frobenius")
    assert list(blocks["row"]) == list(blocks["col"]) == ["a", "a", "b", "b"]
    assert list(blocks["value"]) == [0.62, 0.9, 0.62, 0.9]
    assert len(joined.blocks("off_unit_share")) == 4
    assert joined.meta["parameters"] == 48
    assert "setting" not in joined.meta["settings"]
    assert "in the median over the layers" in paragraph(verdict(joined))


def test_what_is_the_same_for_a_single_layer_is_compared_once():
    assert differing_alone(METHODS)[0] == tuple(
        name for name in METHODS if name not in ("layer", "kfac-full", "kfac-tridiagonal")
    )
    assert differing_alone(("kfac-full",)) == (("kfac-full",), [])
    assert differing_alone(("layer",)) == (("layer",), [])


# ---- the folder ------------------------------------------------------------------------------------


def test_the_folder_holds_page_data_and_pictures(tmp_path):
    comparison = make_comparison(layers=("in", "out"), methods=("kfac", "kfac-full", "foof"))
    other = few_pictures(("kfac",))
    drawn = []
    sections = [Section("Jointly", comparison), Section("Alone", other, slug="layers")]
    write_report(tmp_path, sections, progress=drawn.append)
    facts = json.loads((tmp_path / "report.json").read_text())
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert facts["files"] == found
    assert {"index.html", "comparison.parquet", "comparison.json", "arrays.npz"} <= set(facts["files"])
    assert load_comparison(tmp_path).methods == comparison.methods
    assert load_comparison(tmp_path / "layers").layers == ("a",)
    assert [section["title"] for section in facts["sections"]] == ["Jointly", "Alone"]
    assert facts["sections"][0]["summary"]["kfac"]["relative_frobenius"] == 0.62
    assert "closest" in facts["sections"][0]["verdict"]
    pictures = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert {f"{name}.png" for name in drawn} <= pictures
    assert {"front-relative_frobenius.svg", "matrix-kfac.png", "inverse-kfac.png"} <= pictures
    assert (tmp_path / "pictures" / "spectra.svg").read_text().startswith("<?xml")


def few_pictures(methods, seed=0):
    """A comparison of one layer by one metric: its report has pictures of matrices and inverses alone."""
    whole = make_comparison(layers=("a",), methods=methods, seed=seed)
    arrays = {name: array for name, array in whole.arrays.items() if name.startswith(DRAWN)}
    return Comparison(plain(whole).frame, whole.meta, arrays)


def test_a_second_report_replaces_the_first_and_spares_what_is_not_its_own(tmp_path):
    write_report(tmp_path, few_pictures(("kfac", "foof")))
    (tmp_path / "mine.txt").write_text("mine")
    write_report(tmp_path, few_pictures(("kfac",)))
    assert not (tmp_path / "pictures" / "matrix-foof.png").exists()
    assert (tmp_path / "pictures" / "matrix-kfac.png").exists()
    assert (tmp_path / "mine.txt").exists()


def test_a_report_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    write_report(tmp_path, few_pictures(("kfac",)))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    calls = iter(range(100))

    def fill(stream, content):
        if next(calls) == 5:
            raise OSError("disk full")
        stream.write(content.encode() if isinstance(content, str) else content)

    monkeypatch.setattr(files, "_fill", fill)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path, few_pictures(("foof",), seed=1))
    assert {path: path.read_bytes() for path in before} == before
    assert load_comparison(tmp_path).methods == ("kfac",)


def test_methods_with_strange_names_make_ordinary_files(tmp_path):
    write_report(tmp_path, few_pictures(("../a/b c",)))
    assert (tmp_path / "pictures" / "matrix-.._a_b_c.png").exists()


def test_a_sheet_draws_what_a_whole_new_drawing_would_show():
    def figure():
        made = Figure(figsize=(3, 2), dpi=60)
        for ax in made.subplots(1, 2):
            ax.imshow([[0.0, 1.0], [2.0, 3.0]])
            ax.vlines([0.5], -0.5, 1.5, colors="white", alpha=0.5)
            ax.set_title("before")
            ax.tick_params(length=0)  # ticks would lie above the spines
        return made

    def change(made):
        made.axes[1].images[0].set_data([[3.0, 0.0], [1.0, 2.0]])
        made.axes[1].set_title("a longer title")

    kept, ax = (made := figure()), made.axes[1]
    sheet = _Sheet(kept, [*ax.images, *ax.collections, *ax.spines.values(), ax.title])
    first = {dpi: np.asarray(sheet.drawn(dpi)) for dpi in (60, 40)}
    change(kept)
    for dpi in (60, 40):
        whole = figure()
        whole.set_dpi(dpi)
        for state, seen in ((None, first[dpi]), (change, np.asarray(sheet.drawn(dpi)))):
            if state is not None:
                state(whole)
            canvas = FigureCanvasAgg(whole)
            canvas.draw()
            assert np.array_equal(seen, np.asarray(canvas.buffer_rgba())[..., :3])


def test_labels_that_differ_have_pictures_of_their_own(tmp_path):
    methods = ("a/b", "a b", "a_b", "A_B", "a:b" + "x" * 300)
    write_report(tmp_path, few_pictures(methods))
    names = [path.name for path in (tmp_path / "pictures").glob("matrix-*.png")]
    assert len({name.casefold() for name in names}) == len(methods)


@pytest.mark.skipif(os.name != "posix", reason="links as Unix has them")
def test_a_report_deletes_nothing_but_its_own_files(tmp_path):
    """Whatever report.json lists, and whatever its folders have become."""
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    write_report(out, few_pictures(("kfac", "foof")))
    (out / "mine.txt").write_text("mine")
    (out / "pictures" / "matrix-foof.png").write_bytes(b"edited by the user")
    (out / "pictures").rename(elsewhere)
    facts = opened_json((out / "report.json").read_text())
    facts["sha256"] |= {
        "mine.txt": "0" * 64,
        "../elsewhere/matrix-kfac.png": facts["sha256"]["pictures/matrix-kfac.png"],
    }
    (out / "report.json").write_text(sealed_json(facts))
    (out / "pictures").symlink_to(elsewhere)
    before = {path: path.read_bytes() for path in (*elsewhere.iterdir(), out / "mine.txt", out / "index.html")}
    with pytest.raises(ValueError, match="pictures is a link that leaves"):
        write_report(out, few_pictures(("kfac",)))
    assert {path: path.read_bytes() for path in before} == before
    (out / "pictures").unlink()
    write_report(out, few_pictures(("kfac",)))
    kept = {path: content for path, content in before.items() if path.name != "index.html"}
    assert {path: path.read_bytes() for path in kept} == kept


def test_a_file_that_a_report_wrote_and_somebody_changed_stays(tmp_path):
    write_report(tmp_path, few_pictures(("kfac", "foof")))
    (tmp_path / "pictures" / "matrix-foof.png").write_bytes(b"edited")
    write_report(tmp_path, few_pictures(("kfac",)))
    assert (tmp_path / "pictures" / "matrix-foof.png").read_bytes() == b"edited"
    assert not (tmp_path / "pictures" / "inverse-foof.png").exists()
