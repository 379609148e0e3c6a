"""`fisherviz data`: what is at hand, fetching whole or not at all, checking with an exit code."""

import gzip

import pytest
import sklearn.datasets
from sklearn.utils import Bunch
from typer.testing import CliRunner

from fisherviz import datasets
from fisherviz.cli import app
from fisherviz.datasets import images, locate


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """No FISHERVIZ_DATA, nothing in the cache; the cache is a temporary directory, which is returned."""
    monkeypatch.delenv("FISHERVIZ_DATA", raising=False)
    monkeypatch.setattr(locate, "cache_directory", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def call(*arguments, columns=80):
    return CliRunner().invoke(app, ["data", *arguments], env={"COLUMNS": str(columns)})


def serve_ecoli(monkeypatch, rows=336):
    import pandas as pd

    from fisherviz.datasets.tables import ECOLI_CLASSES, ECOLI_FEATURES

    columns = {name: [0.1 * k for k in range(rows)] for name in ECOLI_FEATURES}
    frame = pd.DataFrame({**columns, "class": [ECOLI_CLASSES[k % 8] for k in range(rows)]})
    monkeypatch.setattr(sklearn.datasets, "fetch_openml", lambda **options: Bunch(frame=frame))


def test_the_list_says_where_each_set_is(monkeypatch, bare, tmp_path):
    given = tmp_path / "given"
    (given).mkdir()
    (given / "ecoli.csv.gz").write_bytes(gzip.compress(b""))
    bare.mkdir()
    (bare / "olivetti_faces.npz").write_bytes(b"")
    monkeypatch.setenv("FISHERVIZ_DATA", str(given))
    lines = {line.split()[0]: line for line in call("list").output.splitlines() if line.strip()}
    assert "FISHERVIZ_DATA" in lines["ecoli"]
    assert "cache" in lines["faces"]
    assert "embedded" in lines["digits"]
    assert "generated" in lines["curves"]
    assert all("missing" in lines[name] for name in ("mnist", "weather", "house"))
    assert all(f"{datasets.examples(name):,}" in lines[name] for name in datasets.names())
    wide = call("list", columns=200).output
    assert all(datasets.source(name).licence in wide for name in datasets.names() if datasets.source(name))
    assert all(datasets.source(name).origin in wide for name in datasets.names() if datasets.source(name))


def test_what_is_fetched_is_in_the_cache_and_read(monkeypatch, bare):
    serve_ecoli(monkeypatch)
    fetched = call("fetch", "ecoli", "--quiet")
    assert (fetched.exit_code, fetched.output) == (0, "")
    assert [path.name for path in bare.iterdir()] == ["ecoli.csv.gz"]
    assert "ecoli is at hand in" in call("fetch", "ecoli").output
    checked = call("check")
    assert checked.exit_code == 0
    assert "ecoli: 336 examples as they should be." in checked.output


@pytest.mark.parametrize("fails", ["server", "disk"])
def test_what_cannot_be_fetched_leaves_nothing(monkeypatch, bare, fails):
    if fails == "server":
        serve_ecoli(monkeypatch, rows=3)
    else:
        serve_ecoli(monkeypatch)
        monkeypatch.setattr(
            "fisherviz.support.files.os.replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "full"))
        )
    told = call("fetch", "ecoli", "--quiet")
    assert told.exit_code == 1
    assert told.output.startswith("fisherviz: ")
    assert not [path for path in bare.rglob("*") if path.is_file()]
    assert datasets.where("ecoli") is None


def test_an_interrupted_set_does_not_count(monkeypatch, bare):
    written = []

    def stop(path, content):
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        return files(path, content)

    files = locate.write_whole
    contents = dict.fromkeys(images.MNIST.files, b"x")
    monkeypatch.setattr(locate, "write_whole", stop)
    monkeypatch.setattr(images, "_fetch_idx", lambda folder, number: contents)
    with pytest.raises(KeyboardInterrupt):
        locate.fetch(images.MNIST, progress=False)
    assert sum(path.is_file() for path in bare.rglob("*")) == 2
    assert datasets.where("mnist") is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cifar10-subset", b"damaged", "cannot be decompressed"),
        ("mnist", b"damaged", "cannot be decompressed"),
        ("mnist", gzip.compress(b"another file"), "is not the published file"),
        ("ecoli", gzip.compress(b"mcg,gvh\n1,2\n"), "lacks the columns"),
    ],
    ids=["text", "no archive", "another file", "no columns"],  # archives hold the time: as names they would differ
)
def test_a_damaged_file_is_named_and_the_exit_code_is_1(bare, name, content, message):
    for file in datasets.files(name):
        (bare / file).parent.mkdir(parents=True, exist_ok=True)
        (bare / file).write_bytes(content)
    told = call("check")
    assert told.exit_code == 1
    assert message in told.output
    assert datasets.files(name)[0] in told.output
    assert "digits: 1,797 examples as they should be." in told.output  # the others are checked all the same


def test_a_table_with_too_few_rows_is_damaged(monkeypatch, bare):
    serve_ecoli(monkeypatch)
    assert call("fetch", "ecoli", "--quiet").exit_code == 0
    path = bare / "ecoli.csv.gz"
    rows = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
    path.write_bytes(gzip.compress(b"".join(rows[:-20])))
    told = call("check", "ecoli")
    assert told.exit_code == 1
    assert "'ecoli' has 316 examples instead of 336" in told.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["check", "weather"], 1, "the files of 'weather' are not at hand; `fisherviz data fetch weather`"),
        (["check", "wether"], 2, "there is no data set 'wether'; did you mean 'weather'?"),
        (["fetch", "wether"], 2, "there is no data set 'wether'; did you mean 'weather'?"),
        (["fetch", "weather"], 1, "has no server to fetch it from: put weatherHistory.csv.gz"),
        (["fetch", "digits", "curves"], 0, "digits is embedded and needs no files.\ncurves is generated and needs"),
    ],
)
def test_sets_that_are_not_there_or_need_no_files(bare, arguments, code, message):
    told = call(*arguments)
    assert told.exit_code == code
    assert message in told.output


# their formats are those of others, and tests/datasets/test_real.py reads the images
DEAR = {"cifar10-subset", "fashion-mnist", "weather-apparent"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.soak if name in DEAR else [])
        for name in datasets.names()
        if datasets.where(name)
    ],
)
def test_the_real_files_are_as_published(name):
    assert "as they should be" in datasets.check(name)
    source = datasets.source(name)
    assert sum((datasets.where(name) / file).stat().st_size for file in source.files) == source.size
