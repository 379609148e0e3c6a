"""The real files that FISHERVIZ_DATA names: what their descriptions say of them holds after loading."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from fisherviz import datasets

REAL = Path(os.environ.get("FISHERVIZ_DATA", "/nowhere"))
pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="FISHERVIZ_DATA names no directory with the real files")


@pytest.mark.parametrize("name", ["mnist", pytest.param("fashion-mnist", marks=pytest.mark.soak)])
def test_real_mnist_and_fashion_mnist(name):
    data = datasets.load(name, size=16)
    assert data.train.inputs.shape == (60_000, 256)
    assert data.test.inputs.shape == (10_000, 256)
    assert 0 <= data.train.inputs.min() < data.train.inputs.max() <= 1
    if name == "fashion-mnist":
        assert torch.bincount(data.train.targets).tolist() == [6000] * 10
    else:
        assert data.train.targets[:5].tolist() == [5, 0, 4, 1, 9]


def test_real_ecoli_has_every_class_on_both_sides():
    data = datasets.load("ecoli")
    train, test = (torch.bincount(part.targets, minlength=8) for part in (data.train, data.test))
    assert (train + test).tolist() == [143, 77, 52, 35, 20, 5, 2, 2]
    assert (train > 0).all()
    assert (test > 0).all()
    torch.testing.assert_close(data.train.inputs.mean(0), torch.zeros(7), atol=1e-5, rtol=0)


def test_real_house_prices():
    data = datasets.load("house", standardise=False)
    assert len(data.train.inputs) + len(data.test.inputs) == 21_612
    assert data.train.inputs.shape[1] == len(data.features)
    bedrooms = data.features.index("bedrooms")
    assert max(data.train.inputs[:, bedrooms].max(), data.test.inputs[:, bedrooms].max()) == 11
    assert min(part.inputs[:, data.features.index("yr_renovated")].min() for part in (data.train, data.test)) == 1900
    frame = pd.read_csv(REAL / "kc_house_data.csv.gz")
    prices = frame.loc[frame["bedrooms"] != 33, "price"].sort_values().to_numpy()
    assert np.array_equal(np.sort(torch.cat([data.train.targets, data.test.targets])[:, 0].numpy()), prices)
    standard = datasets.load("house")
    torch.testing.assert_close(standard.train.targets.std(correction=0), torch.tensor(1.0), atol=1e-5, rtol=0)
    back = standard.test.targets * standard.target_standard.scale + standard.target_standard.mean
    torch.testing.assert_close(back, data.test.targets, rtol=1e-5, atol=1.0)


def test_real_house_sales_of_one_house_are_on_one_side():
    data = datasets.load("house", standardise=False)
    columns = [data.features.index(name) for name in ("sqft_lot", "yr_built", "lat", "long", "sqft_living")]
    frame = pd.read_csv(REAL / "kc_house_data.csv.gz")
    sold_twice = frame[frame["id"].duplicated(keep=False)]
    # location, plot and year of building identify a house
    keys = {
        tuple(np.float32(row)) for row in sold_twice[["sqft_lot", "yr_built", "lat", "long", "sqft_living"]].to_numpy()
    }
    train, test = ({tuple(row) for row in part.inputs[:, columns].numpy()} & keys for part in (data.train, data.test))
    assert len(train) > 100
    assert len(test) > 20
    assert not train & test


def test_real_weather_is_in_time_order_without_missing_values():
    data = datasets.load("weather", standardise=False)
    assert len(data.train.inputs) + len(data.test.inputs) == 96_453 - 24 - 1_310
    column = {name: data.train.inputs[:, index] for index, name in enumerate(data.features)}
    assert column["pressure"].min() > 900
    assert column["humidity"].min() > 0
    assert ((column["rain"] + column["snow"]) <= 1).all()
    assert not any("apparent" in name for name in data.features)
    # the test set is the last fifth, so that it starts where training ends
    assert len(data.test.inputs) == (96_453 - 24 - 1_310) // 5


def test_real_weather_with_the_apparent_temperature_has_that_column_beside_the_others():
    without, with_it = (datasets.load(name, standardise=False) for name in ("weather", "weather-apparent"))
    assert with_it.features == ("apparent temperature", *without.features)
    assert torch.equal(with_it.train.targets, without.train.targets)
    assert torch.equal(with_it.test.inputs[:, 1:], without.test.inputs)
    frame = pd.read_csv(REAL / "weatherHistory.csv.gz").drop_duplicates()
    kept = frame.loc[(frame["Humidity"] > 0) & (frame["Pressure (millibars)"] > 0), "Apparent Temperature (C)"]
    both = torch.cat([with_it.train.inputs[:, 0], with_it.test.inputs[:, 0]]).sort().values
    torch.testing.assert_close(both, torch.tensor(kept.sort_values().to_numpy(), dtype=torch.float32))
    kept_notes, left_notes = (" ".join(data.notes) for data in (with_it, without))
    assert "Kept: the apparent temperature" in kept_notes
    assert "Left out: the apparent temperature" not in kept_notes
    assert "Left out: the apparent temperature" in left_notes


def test_real_faces_hold_out_people_or_pictures():
    data = datasets.load("faces", size=25)
    assert (data.task, data.likelihood) == ("autoencoder", "gaussian")
    assert data.train.inputs.shape == (300, 625)
    assert data.test.targets.shape == (100, 625)
    assert abs(data.train.inputs.mean()) < 1e-5
    named = datasets.load("faces", task="classification")
    assert torch.bincount(named.train.targets).tolist() == [8] * 40
    assert torch.bincount(named.test.targets).tolist() == [2] * 40


def test_real_cifar_subset():
    data = datasets.load("cifar10-subset", flatten=False)
    assert data.train.inputs.shape == (4_000, 3, 32, 32)
    assert torch.bincount(data.train.targets).tolist() == [396, 366, 420, 384, 422, 393, 414, 385, 407, 413]
    assert torch.bincount(data.test.targets).tolist() == [103, 89, 100, 103, 90, 86, 112, 102, 106, 109]
