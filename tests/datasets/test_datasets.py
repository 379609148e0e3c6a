"""Data sets: shapes, splits, standardisation, the sources' quirks, the look-up and its messages."""

import gzip
from urllib.error import URLError

import numpy as np
import pandas as pd
import pytest
import sklearn.datasets
import torch
from sklearn.utils import Bunch

from fisherviz import datasets
from fisherviz.datasets import curves, images, locate, tables


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """No FISHERVIZ_DATA, nothing in the cache; the cache is a temporary directory, which is returned."""
    monkeypatch.delenv("FISHERVIZ_DATA", raising=False)
    monkeypatch.setattr(locate, "cache_directory", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def offline(monkeypatch, bare):
    """As `bare`, and nothing can be fetched."""

    def refuse(*args, **options):
        raise URLError("no route to host")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", refuse)
    monkeypatch.setattr(sklearn.datasets, "fetch_olivetti_faces", refuse)
    return bare


def test_digits_are_scikit_learns():
    data = datasets.load("digits")
    source = sklearn.datasets.load_digits()
    assert torch.equal(torch.cat([data.train.inputs, data.test.inputs]), torch.tensor(source.data / 16).float())
    assert torch.equal(torch.cat([data.train.targets, data.test.targets]), torch.tensor(source.target))
    assert (data.task, data.likelihood, data.outputs, data.inputs) == (
        "classification",
        "categorical",
        10,
        64,
    )
    assert data.train.inputs.dtype == torch.float32
    assert data.train.targets.dtype == torch.int64


def test_digits_at_16_are_bilinear_at_pixel_centres():
    small = datasets.load("digits").images().train.inputs[:20, 0].double().numpy()
    large = datasets.load("digits", size=16).images().train.inputs[:20, 0].double().numpy()
    # new pixel i lies at (i + 1/2) / 2 - 1/2 of the old grid, values beyond the edge repeat it
    place = np.clip((np.arange(16) + 0.5) / 2 - 0.5, 0, 7)
    low = np.floor(place).astype(int)
    high, part = np.minimum(low + 1, 7), place - low
    rows = small[:, low] * (1 - part)[:, None] + small[:, high] * part[:, None]
    expected = rows[:, :, low] * (1 - part) + rows[:, :, high] * part
    np.testing.assert_allclose(large, expected, atol=1e-6)


def test_scaling_down_averages_areas():
    picture = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4) / 16
    expected = picture.reshape(2, 2, 2, 2).mean(axis=(1, 3))
    np.testing.assert_allclose(images.resize(picture, 2)[0, 0], expected)


def test_flat_and_image_inputs_are_the_same_numbers():
    flat = datasets.load("digits", size=16)
    shaped = datasets.load("digits", size=16, flatten=False)
    assert shaped.train.inputs.shape == (1437, 1, 16, 16)
    assert torch.equal(flat.images().train.inputs, shaped.train.inputs)
    assert torch.equal(flat.train.inputs, shaped.train.inputs.flatten(1))


def test_standardised_images_use_one_mean_and_one_deviation_of_the_training_images():
    plain, done = datasets.load("digits"), datasets.load("digits", standardise=True)
    mean, deviation = plain.train.inputs.double().mean(), plain.train.inputs.double().std(correction=0)
    expected = (plain.test.inputs.double() - mean) / deviation
    torch.testing.assert_close(done.test.inputs.double(), expected, atol=1e-5, rtol=1e-5)
    back = done.test.inputs * done.input_standard.scale + done.input_standard.mean
    torch.testing.assert_close(back, plain.test.inputs, atol=1e-5, rtol=1e-5)


def test_autoencoder_targets_are_the_flattened_inputs():
    data = datasets.load("digits", task="autoencoder", flatten=False)
    assert torch.equal(data.train.targets, data.train.inputs.flatten(1))
    assert (data.likelihood, data.outputs, data.classes) == ("bernoulli", 64, ())
    assert datasets.load("digits", task="autoencoder", standardise=True).likelihood == "gaussian"


def test_loading_twice_gives_the_same_fingerprint_and_leaves_the_random_state_alone():
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = datasets.load("digits", size=16)
    assert first.fingerprint == datasets.load("digits", size=16).fingerprint
    assert first.fingerprint != datasets.load("digits").fingerprint
    assert first.fingerprint != first.subset(100).fingerprint
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def test_subset_limit_and_to():
    data = datasets.load("digits")
    assert torch.equal(data.subset(7, 3).train.inputs, data.train.inputs[:7])
    assert len(data.subset(7, 3).test.targets) == 3
    assert torch.equal(datasets.load("digits", limit=7).train.targets, data.train.targets[:7])
    double = data.to(dtype=torch.float64)
    assert double.train.inputs.dtype == torch.float64
    assert double.input_standard.mean.dtype == torch.float64
    assert double.test.targets.dtype == torch.int64


def test_a_data_set_shows_itself():
    data = datasets.load("digits")
    expected = "Dataset('digits', classification, categorical, 1437 + 360 examples, (1, 8, 8) -> 10)"
    assert repr(data) == expected
    assert data._repr_html_().count("<p>") == 1 + len(data.notes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "cifar"}, ["'cifar'", "digits", "weather"]),
        ({"name": "digits", "task": "regression"}, ["'regression'", "classification, autoencoder"]),
        ({"name": "curves", "task": "classification"}, ["'classification'", "autoencoder"]),
        ({"name": "house", "size": 16}, ["size=16", "table"]),
        ({"name": "digits", "size": 0}, ["size=0", "at least 1"]),
        ({"name": "digits", "limit": 0}, ["limit=0", "1437"]),
        ({"name": "digits", "limit": 5000}, ["limit=5000", "1437"]),
    ],
)
def test_what_does_not_exist_is_refused_with_the_choice(options, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        datasets.load(**options)
    assert all(word in str(caught.value) for word in words)


def test_subset_and_images_refuse_what_is_not_there(bare):
    with pytest.raises(ValueError, match="train=0 examples of 'digits'; choose 1 to 1437"):
        datasets.load("digits").subset(0)
    frame = pd.DataFrame(np.random.default_rng(0).random((16, 7)), columns=list("abcdefg"))
    frame.columns = ["mcg", "gvh", "lip", "chg", "aac", "alm1", "alm2"]
    frame["class"] = ["cp", "im", "pp", "imU", "om", "omL", "imL", "imS"] * 2
    frame.to_csv(bare / "ecoli.csv.gz", index=False)
    with pytest.raises(ValueError, match="'ecoli' is a table and has no images"):
        datasets.load("ecoli").images()


# CURVES


def test_curves_depend_on_their_seed_alone(monkeypatch):
    monkeypatch.setattr(curves, "TRAIN", 30)
    monkeypatch.setattr(curves, "TEST", 10)
    first, again, other = (datasets.load("curves", seed=seed) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert (first.task, first.likelihood, first.shape) == ("autoencoder", "bernoulli", (1, 28, 28))
    assert first.train.inputs.shape == first.train.targets.shape == (30, 784)
    assert first.train.inputs.min() == 0
    assert first.train.inputs.max() <= 1


def test_a_curve_passes_through_its_points():
    points = torch.tensor([[[0.2, 0.3], [0.5, 0.8], [0.8, 0.4]]])
    image = curves.draw(points)[0]
    # the middle point is passed at full ink, the ends at half of it (the pen stops there)
    column, row = (points[0] * curves.SIDE).floor().long().T
    assert image[row[1], column[1]] > 0.7
    assert (image[row, column] > 0.25).all()
    assert max(image[0, 0], image[-1, -1]) < 1e-6


def test_a_long_straight_stroke_has_ink_one_along_its_middle():
    y = 14.5 / curves.SIDE
    image = curves.draw(torch.tensor([[[0.1, y], [0.5, y], [0.9, y]]]))[0]
    torch.testing.assert_close(image[14, 8:20], torch.ones(12), atol=0.02, rtol=0)
    torch.testing.assert_close(image[13, 8:20], torch.full((12,), np.exp(-1 / (2 * 0.7**2))), atol=0.02, rtol=0)


def test_curves_stay_inside_the_frame():
    corners = torch.tensor([[[curves.LOW, curves.LOW], [curves.HIGH, curves.LOW], [curves.LOW, curves.HIGH]]])
    image = curves.draw(corners)[0]
    border = torch.cat([image[0], image[-1], image[:, 0], image[:, -1]])
    assert border.max() < 0.5


# Look-up


def test_files_are_read_from_the_directory_that_fisherviz_data_names(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    pictures, labels = rng.integers(0, 256, (5, 28, 28), dtype=np.uint8), np.arange(5, dtype=np.uint8)
    (tmp_path / "mnist").mkdir()
    for name in images.IDX_NAMES:
        content = images.write_idx(pictures if "images" in name else labels)
        (tmp_path / "mnist" / name).write_bytes(content)
    monkeypatch.setenv("FISHERVIZ_DATA", str(tmp_path))
    data = datasets.load("mnist")
    torch.testing.assert_close(data.train.inputs, torch.tensor(pictures).flatten(1) / 255)
    assert data.test.targets.tolist() == [0, 1, 2, 3, 4]
    assert datasets.where("mnist") == tmp_path


def test_fisherviz_data_that_is_no_directory_is_an_error(monkeypatch):
    monkeypatch.setenv("FISHERVIZ_DATA", "/no/such/place")
    with pytest.raises(ValueError, match="FISHERVIZ_DATA is '/no/such/place', which is no directory"):
        datasets.load("ecoli")


@pytest.mark.parametrize("name", [name for name in datasets.names() if datasets.files(name)])
def test_offline_the_error_says_where_to_put_which_file(offline, name):
    with pytest.raises(RuntimeError) as caught:
        datasets.load(name, progress=False)
    message = str(caught.value)
    assert repr(datasets.source(name).name) in message
    assert f"into {offline}" in message
    assert all(file in message for file in datasets.files(name))
    assert datasets.where(name) is None


def test_digits_and_curves_need_no_file(offline):
    assert datasets.files("digits") == datasets.files("curves") == ()
    assert datasets.load("digits").outputs == 10


def test_fetched_files_are_cached_and_read_like_the_published_ones(monkeypatch, bare):
    rng = np.random.default_rng(0)
    pictures = np.zeros((70_000, 784), dtype=np.uint8)
    pictures[:, 300:304] = rng.integers(0, 256, (70_000, 4), dtype=np.uint8)
    labels = np.array([str(n % 10) for n in range(70_000)], dtype=object)
    asked = []

    def serve(*, data_id, as_frame, cache):
        asked.append(data_id)
        return Bunch(data=pictures, target=labels)

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", serve)
    data = datasets.load("mnist", progress=False)
    assert (len(data.train.inputs), len(data.test.inputs)) == (60_000, 10_000)
    assert torch.equal((data.test.inputs * 255).round().to(torch.uint8), torch.tensor(pictures[60_000:]))
    assert data.test.targets[:12].tolist() == [*range(10), 0, 1]
    assert datasets.load("mnist").fingerprint == data.fingerprint
    assert asked == [554]
    assert datasets.where("mnist") == bare


def test_a_fetched_set_of_another_shape_is_refused(monkeypatch, bare):
    monkeypatch.setattr(
        sklearn.datasets, "fetch_openml", lambda **options: Bunch(data=np.zeros((3, 784)), target=[1, 2, 3])
    )
    with pytest.raises(RuntimeError, match=r"\(3, 784\) instead of \(70000, 784\)"):
        datasets.load("mnist", progress=False)
    assert list(bare.iterdir()) == []


def test_fetched_tables_and_faces_are_cached(monkeypatch, bare):
    columns = ["mcg", "gvh", "lip", "chg", "aac", "alm1", "alm2"]
    table = pd.DataFrame(np.random.default_rng(0).random((336, 7)), columns=columns)
    table["class"] = (["cp", "im", "pp", "imU", "om", "omL", "imL", "imS"] * 42)[:336]
    monkeypatch.setattr(sklearn.datasets, "fetch_openml", lambda **options: Bunch(frame=table))
    people = np.arange(400) // 10
    grey = np.random.default_rng(0).integers(0, 243, (400, 64, 64))
    faces = Bunch(images=grey.astype(np.float32) / 242, target=people)
    monkeypatch.setattr(sklearn.datasets, "fetch_olivetti_faces", lambda **options: faces)
    assert datasets.load("ecoli", progress=False).train.inputs.shape[1] == 7
    data = datasets.load("faces", progress=False, standardise=False)
    np.testing.assert_allclose(data.train.inputs.numpy(), grey[:300].reshape(300, -1) / 242, atol=1e-6)
    assert datasets.where("ecoli") == datasets.where("faces") == bare


@pytest.mark.parametrize(
    "content",
    [b"no gzip", gzip.compress(b"short"), gzip.compress(b"\0\0\x08\x01\0\0\0\x09one")],
    ids=["no gzip", "no header", "too short"],
)
def test_a_damaged_image_file_is_named(monkeypatch, bare, content):
    (bare / "mnist").mkdir()
    for name in images.IDX_NAMES:
        (bare / "mnist" / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz is no .* file.*replace it"):
        datasets.load("mnist")


def test_image_and_label_files_that_do_not_belong_together_are_refused(bare):
    (bare / "mnist").mkdir()
    for name in images.IDX_NAMES:
        array = np.zeros((3, 28, 28) if "images" in name else (4,), dtype=np.uint8)
        (bare / "mnist" / name).write_bytes(images.write_idx(array))
    with pytest.raises(ValueError, match="do not belong together"):
        datasets.load("mnist")


@pytest.mark.parametrize("text", ["c," * 100_000 + "c\n1\n", '"c\n",' * 100_000 + "c\n1\n", "a\n" + "1," * 100_000])
def test_a_table_of_a_hundred_thousand_columns_is_refused_before_they_are_told_apart(bare, monkeypatch, text):
    monkeypatch.setattr("fisherviz.datasets.tables.pd.read_csv", None)  # it takes minutes
    (bare / "ecoli.csv.gz").write_bytes(gzip.compress(text.encode()))
    with pytest.raises(ValueError, match=r"ecoli.csv.gz is no readable gzipped table \(it has 100,001 columns\)"):
        datasets.load("ecoli")


def test_damaged_tables_faces_and_records_are_named(bare):
    (bare / "ecoli.csv.gz").write_bytes(gzip.compress(b"a,b\n1,2\n"))
    with pytest.raises(ValueError, match=r"ecoli.csv.gz has no rows or lacks the columns \['mcg'"):
        datasets.load("ecoli")
    text = ",".join([*tables.ECOLI_FEATURES, "class"]) + "\n" + "1," * len(tables.ECOLI_FEATURES) + "\x1b[31mcp\n"
    (bare / "ecoli.csv.gz").write_bytes(gzip.compress(text.encode()))
    with pytest.raises(ValueError, match=r"^ecoli.csv.gz has the unknown classes \['\\x1b\[31mcp'\]; replace"):
        datasets.load("ecoli")
    (bare / "kc_house_data.csv.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=r"kc_house_data.csv.gz is no readable gzipped table"):
        datasets.load("house")
    (bare / "olivetti_faces.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"olivetti_faces.npz holds no arrays"):
        datasets.load("faces")
    (bare / "cifar10-subset").mkdir()
    for name in images.CIFAR.files:
        (bare / name).write_bytes(b"no xz")
    with pytest.raises(ValueError, match=r"train_first4000.bin.xz is no readable xz file"):
        datasets.load("cifar10-subset")
