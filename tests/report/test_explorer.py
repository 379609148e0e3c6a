"""The block explorer in a browser: its values are those of the matrices, its views are linked and can be sent."""

import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn

import fisherviz as fv
from fisherviz.comparison.sample import Sample
from fisherviz.report import Section, write_page
from fisherviz.results import blocks
from fisherviz.results.comparison import Comparison
from tests.report.browser import chromium, opened, place, reading, until

METHODS = ("kfac", "ekfac", "diagonal", "kfac-full", "kfac-tridiagonal", "cw-ngd", "layer", "identity", "foof")
UNPACKED = """async ([kind, method]) => {
  const data = JSON.parse(document.querySelector(".explorer script").textContent);
  const matrices = new Matrices(data);
  await matrices.prepare();
  const list = (values) => values && [...values];
  return JSON.stringify([...(await matrices.of(kind, method))].map(([key, b]) =>
    [...key.split(",").map(Number), b.n, b.m, b.factor, ...[b.largest, b.mean, b.gapLargest, b.gapMean].map(list)]));
}"""


def network(*widths):
    torch.manual_seed(0)
    modules = []
    for width, following in itertools.pairwise(widths):
        modules += [nn.Linear(width, following), nn.Tanh()]
    return nn.Sequential(*modules[:-1]).double()


def fisher_of(net, examples=24):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(examples, net[0].in_features, generator=generator, dtype=torch.float64)
    targets = torch.randint(net[-1].out_features, (examples,), generator=generator)
    return fv.Probe(net, "categorical").fisher((inputs, targets))


def dense(fisher, method, damping=None):
    """The matrix itself, or its damped inverse, in unit order."""
    matrix = fisher if method == "exact" else fv.approximate(fisher, method)
    if damping is None:
        return matrix.to_dense("unit").double().numpy()
    if method == "exact":
        return np.linalg.inv(dense(fisher, "exact") + damping * np.eye(fisher.shape[0]))
    return matrix.inverse(damping).to_dense("unit").double().numpy()


def unpacked(page, kind, method):
    """The blocks of a matrix as the page has them; as one text, since playwright takes each number apart."""
    return json.loads(page.evaluate(UNPACKED, [kind, method]))


def compared_by(fisher, methods, damping=0.05):
    """A comparison of which a page shows the explorer and its still, and no charts."""
    compared = fv.compare(fisher, methods, damping=damping, metrics=["relative_frobenius"], progress=False)
    arrays = {name: array for name, array in compared.arrays.items() if not name.startswith("spectrum/")}
    return Comparison(compared.frame, compared.meta, arrays)


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def small():
    return fisher_of(network(5, 6, 4, 3))


@pytest.fixture(scope="module")
def compared(small):
    return compared_by(small, METHODS)


@pytest.fixture(scope="module")
def path(compared, tmp_path_factory):
    return write_page(tmp_path_factory.mktemp("page") / "page.html", compared)


def check_blocks(browser, path, fisher, methods, damping):
    """Every cell of every block against the dense matrices."""
    sizes = fisher.space.sizes
    ends = np.concatenate([[0], np.cumsum(sizes)])
    with opened(browser, path) as page:
        for kind, strength in (("matrix", None), ("inverse", damping)):
            exact = dense(fisher, "exact", strength)
            for method in ("exact", *methods):
                own = dense(fisher, method, strength)
                for i, j, n, m, factor, *arrays in unpacked(page, kind, method):
                    place = slice(ends[i], ends[i + 1]), slice(ends[j], ends[j + 1])
                    parts = [own[place], own[place], exact[place] - own[place], exact[place] - own[place]]
                    scale = max(np.linalg.norm(exact[place]), np.linalg.norm(own[place]))
                    for k, (found, part) in enumerate(zip(arrays, parts, strict=True)):
                        if found is None:
                            assert method == "exact"
                            continue
                        shown = np.array(found).reshape(n, m)
                        largest = cells(np.abs(part), factor, np.maximum)
                        if k % 2 == 0:  # of two that are equally large either may be shown
                            shown, wanted = np.abs(shown), largest
                        else:
                            wanted = cells(part, factor, np.add) / cells(np.ones_like(part), factor, np.add)
                        both = cells(np.abs(exact[place]), factor, np.maximum)
                        size = np.maximum(largest, both) if k else largest
                        bound = 2.1 * 2**-8 * size + 3 * blocks.ROUNDING * scale
                        assert (np.abs(shown - wanted) <= bound).all(), (kind, method, i, j, k)


def cells(matrix, factor, over):
    """What a ufunc makes of each cell of `factor` rows and columns; the last ones may be narrower."""
    for axis in (0, 1):
        matrix = over.reduceat(matrix, np.arange(0, matrix.shape[axis], factor), axis=axis)
    return matrix


def test_every_value_is_the_matrixs(browser, path, small):
    check_blocks(browser, path, small, METHODS, 0.05)


def convolution():
    torch.manual_seed(2)
    parts = nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 3, bias=False)
    net = nn.Sequential(*parts).double()
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(20, 2, 3, 3, generator=generator, dtype=torch.float64)
    return fv.Probe(net, "categorical").fisher((inputs, torch.arange(20) % 3))


@pytest.mark.filterwarnings("ignore:.*single features are scaled")
def test_convolutions_and_normalisations_have_their_values_and_orders(browser, tmp_path):
    fisher = convolution()
    compared = compared_by(fisher, METHODS)
    path = write_page(tmp_path / "p.html", compared)
    check_blocks(browser, path, fisher, METHODS, 0.05)
    whole = {order: fisher.to_dense(order).numpy() for order in ("unit", "input", "torch")}
    with opened(browser, path) as page:
        orders = page.evaluate("""async () => {
          const matrices = new Matrices(JSON.parse(document.querySelector(".explorer script").textContent));
          await matrices.prepare();
          const all = (order) => matrices.sizes.map((_, i) => [...matrices.permutation(i, order)]);
          return { unit: all("unit"), input: all("input"), torch: all("torch") };
        }""")
    for order, layers in orders.items():
        starts = fisher.space.offsets
        index = np.concatenate([np.array(own) + start for own, start in zip(layers, starts, strict=False)])
        assert np.allclose(whole["unit"][np.ix_(index, index)], whole[order], rtol=1e-9, atol=1e-12), order


def test_a_comparison_without_blocks_says_so(compared, tmp_path):
    arrays = {name: array for name, array in compared.arrays.items() if not name.startswith(("blocks", "entries"))}
    old = Comparison(compared.frame, compared.meta, arrays)
    text = write_page(tmp_path / "p.html", old).read_text()
    assert "saved without its matrices’ blocks" in text
    assert 'class="explorer"' not in text


def test_cells_hold_the_largest_entry_and_the_mean(browser, small, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "SIDE", 20)
    methods = ("kfac", "kfac-full", "kfac-tridiagonal")
    for full in (1200, 100):  # layers' own blocks entry by entry, and as cells too
        monkeypatch.setattr(blocks, "FULL", full)
        compared = compared_by(small, methods)
        cut = compared.arrays["blocks_layout"][0].tolist()
        assert cut == [1 if full == 1200 else 4, 4]
        check_blocks(browser, write_page(tmp_path / "p.html", compared), small, methods, 0.05)


def test_the_cursor_reads_what_stands_there_in_every_order(browser, path, small):
    exact, own = dense(small, "exact"), dense(small, "kfac")
    start, fan_in, units = small.space.offsets[1], 7, 4  # the second layer: 6 inputs and the bias, 4 units
    steps = ["ArrowDown"] + ["ArrowRight"] * 7
    orders = {"unit": lambda k: k, "input": lambda k: (k % units) * fan_in + k // units, "torch": None}
    weights = [u * fan_in + i for u in range(units) for i in range(fan_in - 1)] + [
        u * fan_in + fan_in - 1 for u in range(units)
    ]
    orders["torch"] = weights.__getitem__
    for order, index in orders.items():
        address = f"#section=section-1&block=2/2&method=kfac&order={order}"
        with opened(browser, path, address) as page:
            page.locator(".panels").focus()
            for key in ["ArrowDown", *steps]:  # the first puts the cursor into the corner
                page.keyboard.press(key)
            row, col = start + index(1), start + index(7)
            found = reading(page)
            assert found["exact"] == pytest.approx(exact[row, col], rel=2**-7, abs=1e-9)
            assert found["own"] == pytest.approx(own[row, col], rel=2**-7, abs=1e-4 * np.abs(own).max())
            size = abs(exact[row, col]) + abs(own[row, col])
            assert found["gap"] == pytest.approx(exact[row, col] - own[row, col], abs=2**-7 * size)
            unit, number = divmod(index(7), fan_in)
            what = "bias" if number == fan_in - 1 else f"weight of input {number + 1}"
            assert place(page)[2] == f"2, unit {unit + 1}, {what}"
            assert f"Column 2, unit {unit + 1}, {what}." in page.locator("[role=status]").text_content()


def test_pointing_reads_the_cell_under_the_pointer(browser, path, small):
    exact, side = dense(small, "exact"), small.shape[0]
    with opened(browser, path, "#section=section-1&block=all&method=kfac-full") as page:
        page.locator(".panels").scroll_into_view_if_needed()
        box = page.locator(".panel canvas").nth(1).bounding_box()
        row, col = 50, 20
        page.mouse.move(box["x"] + (col + 0.5) / side * box["width"], box["y"] + (row + 0.5) / side * box["height"])
        assert reading(page)["exact"] == pytest.approx(exact[row, col], rel=2**-7, abs=1e-9)
        assert place(page)[0] == "Entry"


def state(page):
    return dict(part.split("=", 1) for part in page.evaluate("location.hash.slice(1)").split("&"))


LOWER_HALVES = """() => Promise.all([...document.querySelectorAll(".panel canvas")].map(async (canvas) => {
  const { width, height } = canvas, copy = new OffscreenCanvas(width, height / 2);
  const context = copy.getContext("2d", { willReadFrequently: true });
  context.drawImage(canvas, 0, -height / 2);
  const pixels = context.getImageData(0, 0, width, height / 2).data;
  return new Uint8Array(await crypto.subtle.digest("SHA-256", pixels)).join();
}))"""


def test_the_three_views_are_one(browser, path):
    # inside its own block the method "layer" is exact, so the first two pictures agree wherever both look
    with opened(browser, path, "#section=section-1&method=layer&block=0/0") as page:
        seen = [page.evaluate(LOWER_HALVES)]
        page.locator(".panels").focus()
        for key in ("+", "+", "Shift+ArrowRight", "Shift+ArrowDown", "-"):
            page.keyboard.press(key)
            page.wait_for_timeout(60)  # drawn with the next frame
            seen.append(page.evaluate(LOWER_HALVES))
        _x, _y, w, h = map(float, state(page)["view"].replace("%2C", ",").split(","))
        assert (w, h) == (18, 18)  # half of 36
        page.keyboard.press("0")
        until(page, "!location.hash.includes('view=')")
        assert all(exact == own != gap for exact, own, gap in seen)
        assert all(before[0] != after[0] for before, after in itertools.pairwise(seen))
        assert page.evaluate(LOWER_HALVES) == seen[0]


def test_dragging_moves_all_views(browser, path):
    with opened(browser, path, "#section=section-1&method=layer&block=0/0&view=10,10,12,12") as page:
        page.locator(".panels").scroll_into_view_if_needed()
        box = page.locator(".panel canvas").nth(2).bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2, steps=4)
        page.mouse.up()
        until(page, "location.hash.includes('view=13')")
        exact, own, gap = page.evaluate(LOWER_HALVES)
        assert exact == own != gap


def test_two_fingers_zoom_where_they_are(browser, path):
    address = "#section=section-1&method=layer&block=0/0"
    with opened(browser, path, address, width=390, height=844, is_mobile=True, has_touch=True) as page:
        page.locator(".panels").scroll_into_view_if_needed()
        box = page.locator(".panel canvas").first.bounding_box()
        hands = page.context.new_cdp_session(page)
        middle = box["x"] + box["width"] / 2, box["y"] + 150

        def touch(kind, apart):
            points = [] if apart is None else [{"x": middle[0] + d, "y": middle[1]} for d in (-apart, apart)]
            hands.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

        touch("touchStart", 20)
        for apart in range(22, 41, 2):
            touch("touchMove", apart)
        touch("touchEnd", None)
        until(page, "location.hash.includes('view=')")
        page.wait_for_timeout(60)
        x, y, w, h = map(float, state(page)["view"].replace("%2C", ",").split(","))
        assert (w, h) == pytest.approx((18, 18), rel=0.1)  # twice as far apart: half of 36
        assert x == pytest.approx(9, abs=1.5)
        assert y > 0


def test_the_wheel_zooms_only_matrices_that_have_focus(browser, path):
    with opened(browser, path) as page:
        page.locator(".panels").scroll_into_view_if_needed()
        box = page.locator(".panel canvas").first.bounding_box()
        page.mouse.move(box["x"] + 50, box["y"] + 50)
        page.mouse.wheel(0, -120)
        page.wait_for_timeout(150)
        assert "view=" not in page.evaluate("location.hash")
        page.locator(".panels").focus()
        box = page.locator(".panel canvas").first.bounding_box()
        page.mouse.move(box["x"] + 50, box["y"] + 50)
        page.mouse.wheel(0, -120)
        until(page, "location.hash.includes('view=')")


def test_an_address_restores_the_view(browser, path):
    address = "#section=section-1&block=0/2&method=ekfac&kind=inverse&order=input&scale=signed&cell=mean&view=3,4,10,12"
    with opened(browser, path, address) as page:
        chosen = {
            name: page.locator(f"[data-field={name}]").input_value()
            for name in ("method", "kind", "order", "scale", "cell", "row", "col")
        }
        assert chosen == {
            "method": "ekfac", "kind": "inverse", "order": "input", "scale": "signed", "cell": "mean", "row": "0",
            "col": "1",
        }  # fmt: skip
        page.locator("[data-field=scale]").select_option("log")
        found = state(page)
        assert found["view"].replace("%2C", ",") == "3,4,10,12"
        assert found["scale"] == "log"
        assert found["block"].replace("%2F", "/") == "0/2"


def test_an_address_of_what_is_not_there_shows_the_beginning(browser, path):
    with opened(browser, path, "#section=section-1&block=none/x&method=nobody&view=1,2&order=%00") as page:
        assert page.locator("[data-field=row]").input_value() == ""
        assert page.locator("[data-field=order]").input_value() == "unit"


def test_a_click_on_the_map_enters_a_block_and_escape_leaves_it(browser, path):
    with opened(browser, path) as page:
        page.locator(".views").scroll_into_view_if_needed()
        box = page.locator(".map canvas").bounding_box()
        page.mouse.click(box["x"] + 0.9 * box["width"], box["y"] + 0.5 * box["height"])
        assert [page.locator(f"[data-field={name}]").input_value() for name in ("row", "col")] == ["1", "2"]
        page.locator(".panels").focus()
        page.keyboard.press("Escape")
        assert [page.locator(f"[data-field={name}]").input_value() for name in ("row", "col")] == ["", ""]


def far_above_the_dense_limit(monkeypatch, fisher, methods, most):
    """A comparison as of a network too large for its matrices, with a sample of some parameters."""
    monkeypatch.setattr("fisherviz.comparison.planning.why_not_dense", lambda *given: "which are too many")
    monkeypatch.setattr("fisherviz.comparison.structured.Sample", lambda fisher: Sample(fisher, most))
    return compared_by(fisher, methods)


def test_above_the_dense_limit_blocks_are_root_mean_squares(browser, small, tmp_path, monkeypatch):
    compared = far_above_the_dense_limit(monkeypatch, small, ("kfac", "kfac-full"), 30)
    exact, own, ends = dense(small, "exact"), dense(small, "kfac-full"), small.space.offsets
    path = write_page(tmp_path / "p.html", compared)
    with opened(browser, path, "#section=section-1&method=kfac-full&kind=rms") as page:
        page.locator(".panels").focus()
        for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowRight"):
            page.keyboard.press(key)
        block = slice(ends[1], ends[2]), slice(ends[2], ends[3])
        assert place(page) == ("Root mean square of the block’s entries", "2", "4")
        for name, matrix in (("exact", exact), ("own", own), ("gap", exact - own)):
            wanted = np.sqrt(np.mean(matrix[block] ** 2))
            assert reading(page)[name] == pytest.approx(wanted, rel=1e-5), name


def chosen_of(compared, fisher):
    """The sample's parameters: their places in unit order, and for each its layer, unit and input."""
    shapes = compared.arrays["blocks_layout"][1:].astype(int)
    units, inputs = (blocks.of_digits(compared.arrays[f"sample_{side}"]).tolist() for side in ("units", "inputs"))
    places, names = [], []
    for layer, start, (rows, cols) in zip(fisher.space.layers, fisher.space.offsets, shapes, strict=False):
        mine, units = units[:rows], units[rows:]
        its, inputs = inputs[:cols], inputs[cols:]
        places += [start + unit * layer.da + column for unit in mine for column in its]
        names += [(layer, unit, column) for unit in mine for column in its]
    return np.array(places), names


@pytest.mark.filterwarnings("ignore:.*single features are scaled")
@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: fisher_of(network(9, 8, 7, 3)), marks=pytest.mark.soak, id="mlp"),
        pytest.param(lambda: convolution(), id="conv"),
    ],
)
def test_above_the_dense_limit_a_sample_has_every_entry(browser, build, tmp_path, monkeypatch):
    fisher = build()
    compared = far_above_the_dense_limit(monkeypatch, fisher, METHODS, 60)
    places, names = chosen_of(compared, fisher)
    grid, sizes = np.ix_(places, places), compared.arrays["blocks_layout"][1:].astype(int).prod(1)
    ends = np.concatenate([[0], np.cumsum(sizes)])
    assert ends[-1] == len(places) <= 60 < fisher.shape[0]
    exact = dense(fisher, "exact")
    path = write_page(tmp_path / "p.html", compared)
    with opened(browser, path, "#section=section-1&method=kfac-full") as page:
        for method in ("exact", *METHODS):
            own = dense(fisher, method)[grid]
            gap = exact[grid] - own
            found = unpacked(page, "matrix", method)
            assert [(i, j) for i, j, *_ in found] == [(i, j) for i in range(len(sizes)) for j in range(i, len(sizes))]
            for i, j, n, m, factor, largest, _mean, away, _ in found:
                where = slice(ends[i], ends[i + 1]), slice(ends[j], ends[j + 1])
                assert (n, m, factor) == (sizes[i], sizes[j], 1)
                scale = max(np.linalg.norm(exact[grid][where]), np.linalg.norm(own[where]))
                for values, wanted in ((largest, own), (away, gap)):
                    if values is not None:
                        error = np.abs(np.reshape(values, (n, m)) - wanted[where])
                        size = np.abs(exact[grid][where]) + np.abs(own[where])
                        assert (error <= 2**-7 * size + 3 * blocks.ROUNDING * scale).all(), (method, i, j)
        said = page.locator(".resolution").text_content()
        assert f"A sample of {len(places)} of {fisher.shape[0]} parameters: " in said
        assert "damped inverses are left out" in said
        page.locator(".panels").focus()
        for key in ("ArrowDown", "End", *["ArrowLeft"] * 4, *["ArrowDown"] * 7):
            page.keyboard.press(key)
        row, col = 7, len(places) - 5
        found, own = reading(page), dense(fisher, "kfac-full")[grid]
        assert found["exact"] == pytest.approx(exact[grid][row, col], rel=2**-7, abs=1e-9)
        assert found["own"] == pytest.approx(own[row, col], rel=2**-7, abs=1e-4 * np.abs(own).max())
        words = []
        for layer, unit, column in (names[row], names[col]):
            bias = layer.has_bias and column == layer.fan_in
            words.append(f"{layer.name}, unit {unit + 1}, {'bias' if bias else f'weight of input {column + 1}'}")
        assert place(page) == ("Entry", *words)


def test_a_sample_and_root_mean_squares_are_two_views_of_one_network(browser, tmp_path, monkeypatch):
    fisher = fisher_of(network(9, 8, 7, 3))
    compared = far_above_the_dense_limit(monkeypatch, fisher, ("kfac", "diagonal"), 60)
    path = write_page(tmp_path / "p.html", compared)
    with opened(browser, path, "#section=section-1&view=3,4,10,12") as page:
        options = page.locator("[data-field=kind] option").all_text_contents()
        assert options == ["Fisher F, a sample", "RMS of each block"]
        assert page.locator("[data-field=order] option").all_text_contents() == ["by output unit", "by input"]
        page.locator("[data-field=kind]").select_option("rms")
        until(page, "location.hash.includes('kind=rms')")
        assert "view" not in state(page)
        assert page.locator("[data-field=order]").is_disabled()
        assert "root mean square of a block" in page.locator(".resolution").text_content()
        assert page.locator(".rounding").is_hidden()  # as they are, of float32
        page.locator("[data-field=kind]").select_option("matrix")
        until(page, "location.hash.includes('kind=matrix')")
        assert "view" not in state(page)
        assert page.locator("[data-field=order]").is_enabled()
        assert page.locator(".rounding").is_visible()
        page.locator("[data-field=order]").select_option("input")
        page.locator("[data-field=row]").select_option("0")
        page.locator(".panels").focus()
        for key in ("ArrowDown", "ArrowDown"):
            page.keyboard.press(key)
        places, names = chosen_of(compared, fisher)
        units = int(compared.arrays["blocks_layout"][1][0])
        inputs = len([1 for layer, unit, _ in names if (layer.name, unit) == (names[0][0].name, names[0][1])])
        own, second = dense(fisher, "exact"), places[inputs]  # by input, the next unit comes first
        assert units > 1
        assert reading(page)["exact"] == pytest.approx(own[second, places[0]], rel=2**-7, abs=1e-9)
        assert place(page)[1] == f"0, unit {names[inputs][1] + 1}, weight of input {names[0][2] + 1}"


def test_a_comparison_without_a_sample_shows_root_mean_squares(browser, small, tmp_path, monkeypatch):
    compared = far_above_the_dense_limit(monkeypatch, small, ("kfac", "diagonal"), 30)
    arrays = {n: array for n, array in compared.arrays.items() if not n.startswith(("blocks", "entries", "sample"))}
    path = write_page(tmp_path / "p.html", Comparison(compared.frame, compared.meta, arrays))
    with opened(browser, path) as page:
        assert page.locator("[data-field=kind] option").all_text_contents() == ["RMS of each block"]
        assert page.locator("[data-field=order]").is_hidden()
        assert "Single entries were not saved." in page.locator(".resolution").text_content()


def test_two_sections_have_explorers_of_their_own(browser, small, compared, tmp_path):
    other = compared_by(small, ["diagonal", "kfac"], 0.1)
    path = write_page(tmp_path / "p.html", [Section("One", compared), Section("Two", other, slug="two")])
    with opened(browser, path, "#section=section-2&method=diagonal") as page:
        methods = [page.locator("[data-field=method]").nth(k).input_value() for k in (0, 1)]
        assert methods[1] == "diagonal"
        assert methods[0] != "diagonal"
