"""The tables: ecoli, house prices, weather. What each column is, which rows are left out and why.

Columns stay in the units of the source; `fisherviz.datasets.catalogue` standardises them on the training rows.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fisherviz.datasets.locate import Source, locate
from fisherviz.datasets.raw import Raw, shuffled
from fisherviz.support.opening import decompressed

REPLACE = "replace it by the published file"
COLUMNS = 100
"""More than any of the tables has."""
ECOLI_FEATURES = ("mcg", "gvh", "lip", "chg", "aac", "alm1", "alm2")
ECOLI_CLASSES = ("cp", "im", "pp", "imU", "om", "omL", "imL", "imS")
HOUSE_COLUMNS = (
    "date", "price", "bedrooms", "bathrooms", "sqft_living", "sqft_lot", "floors", "waterfront", "view",
    "condition", "grade", "sqft_above", "yr_built", "yr_renovated", "lat", "long",
    "sqft_living15", "sqft_lot15",
)  # fmt: skip
WEATHER_COLUMNS = (
    "Formatted Date", "Precip Type", "Temperature (C)", "Apparent Temperature (C)", "Humidity", "Wind Speed (km/h)",
    "Wind Bearing (degrees)", "Visibility (km)", "Pressure (millibars)",
)  # fmt: skip


def _fetch_frame(data_id: int, rows: int) -> pd.DataFrame:
    from sklearn.datasets import fetch_openml

    frame = fetch_openml(data_id=data_id, as_frame=True, cache=False).frame
    if len(frame) != rows:
        raise ValueError(f"OpenML's data set {data_id} has {len(frame)} rows instead of {rows}")
    return frame


def _csv(frame: pd.DataFrame) -> bytes:
    return gzip.compress(frame.to_csv(index=False).encode(), mtime=0)


def _fetch_ecoli() -> Mapping[str, bytes]:
    frame = _fetch_frame(39, 336)
    return {"ecoli.csv.gz": _csv(frame[[*ECOLI_FEATURES, "class"]])}


def _fetch_house() -> Mapping[str, bytes]:
    return {"kc_house_data.csv.gz": _csv(_fetch_frame(42092, 21_613))}


ECOLI = Source(
    "ecoli", ("ecoli.csv.gz",), "UCI Machine Learning Repository, Ecoli", _fetch_ecoli, size=4_021, licence="CC BY 4.0"
)
HOUSE = Source(
    "house", ("kc_house_data.csv.gz",), "Kaggle, House Sales in King County", _fetch_house, size=740_561, licence="CC0"
)
WEATHER = Source(
    "weather",
    ("weatherHistory.csv.gz",),
    "Kaggle, Weather in Szeged 2006-2016, gzipped",
    size=2_232_365,
    licence="CC BY-NC-SA 4.0",
)


def _read(source: Source, columns: Iterable[str], progress: bool) -> pd.DataFrame:
    path = locate(source, progress)[source.files[0]]
    try:
        content = decompressed(path)
        _check_width(content)
        frame = pd.read_csv(io.BytesIO(content), keep_default_na=False)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is no readable gzipped table ({error}); {REPLACE}.") from error
    missing = [column for column in columns if column not in frame.columns]
    if missing or frame.empty:
        raise ValueError(f"{path} has no rows or lacks the columns {missing}; {REPLACE}.")
    return frame


def _check_width(content: bytes) -> None:
    """Refuse more columns than a table of ours has: pandas takes minutes to tell 100,000 of one name apart."""
    for row in itertools.islice(csv.reader(io.StringIO(content.decode("utf-8", "replace"), newline="")), 2):
        if len(row) > COLUMNS:
            raise ValueError(f"it has {len(row):,} columns")


@contextmanager
def _meant(source: Source) -> Iterator[None]:
    """Cells that are not what their columns mean are the file's fault."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"{source.files[0]} is not the table of {source.name!r} ({error}); {REPLACE}.") from error


def _numbers(table: pd.DataFrame | pd.Series) -> NDArray[np.float64]:
    found = table.to_numpy(dtype=np.float64)
    if not np.isfinite(found).all():
        raise ValueError("a number is missing or infinite")
    return found


def _regression(frame: pd.DataFrame, target: pd.Series, test: np.ndarray, notes: tuple[str, ...]) -> Raw:
    inputs = _numbers(frame)
    values = _numbers(target)[:, None]
    features = tuple(frame.columns)
    return Raw(inputs[~test], values[~test], inputs[test], values[test], features=features, notes=notes)


def ecoli(seed: int, progress: bool) -> Raw:
    """336 proteins, 7 features, 8 classes; a fifth of each class, at least one protein, is the test set."""
    frame = _read(ECOLI, (*ECOLI_FEATURES, "class"), progress)
    unknown = sorted(set(frame["class"]) - set(ECOLI_CLASSES))
    if unknown:
        raise ValueError(f"{ECOLI.files[0]} has the unknown classes {unknown}; {REPLACE}.")
    labels = frame["class"].map(ECOLI_CLASSES.index).to_numpy(dtype=np.int64)
    with _meant(ECOLI):
        inputs = _numbers(frame[list(ECOLI_FEATURES)])
    test = np.zeros(len(frame), dtype=bool)
    order = shuffled(len(frame), seed)
    for label in range(len(ECOLI_CLASSES)):
        members = order[labels[order] == label]
        test[members[: max(1, round(len(members) / 5))]] = True
    return Raw(
        inputs[~test], labels[~test], inputs[test], labels[test],
        features=ECOLI_FEATURES, classes=ECOLI_CLASSES,
        notes=(
            "The sequence name is left out; lip and chg are kept though they are close to constant.",
            "A fifth of each class, at least one protein, is the test set (two classes have two members).",
        ),
    )  # fmt: skip


def house(seed: int, progress: bool) -> Raw:
    """Sale prices in King County; all sales of a house are on one side of the split."""
    frame = _read(HOUSE, ("id", *HOUSE_COLUMNS), progress)
    with _meant(HOUSE):
        return _house(frame, seed)


def _house(frame: pd.DataFrame, seed: int) -> Raw:
    frame = frame[frame["bedrooms"] != 33].reset_index(drop=True)
    houses, index = np.unique(frame["id"].to_numpy(), return_inverse=True)
    test = (shuffled(len(houses), seed) < len(houses) // 5)[index]
    table = frame[list(HOUSE_COLUMNS)].drop(columns=["date", "price"])
    table["yr_renovated"] = table["yr_renovated"].where(table["yr_renovated"] > 0, table["yr_built"])
    sold = pd.to_datetime(frame["date"].str[:8], format="%Y%m%d")
    table.insert(0, "days", (sold - pd.Timestamp("2014-05-01")).dt.days)
    notes = (
        "The house with 33 bedrooms, a typing error of the source, is left out.",
        "A fifth of the houses is the test set; all sales of one house are on one side.",
        "Left out: id, zipcode (lat and long say where), sqft_basement (it is sqft_living - sqft_above).",
        "yr_renovated is the year of building for houses never renovated; days counts from 1 May 2014.",
    )
    return _regression(table, frame["price"], test, notes)


def weather(progress: bool) -> Raw:
    """Hourly weather in Szeged, the temperature as target; the last fifth of the hours is the test set."""
    return _weather(progress, apparent=False)


def weather_apparent(progress: bool) -> Raw:
    """The same with the apparent temperature among the inputs, which the source computes from the target."""
    return _weather(progress, apparent=True)


def _weather(progress: bool, apparent: bool) -> Raw:
    frame = _read(WEATHER, WEATHER_COLUMNS, progress)
    with _meant(WEATHER):
        return _hours(frame, apparent)


def _hours(frame: pd.DataFrame, apparent: bool) -> Raw:
    count = len(frame)
    frame = frame.drop_duplicates()
    duplicates = count - len(frame)
    missing = (frame["Pressure (millibars)"] == 0) | (frame["Humidity"] == 0)
    frame = frame[~missing].copy()
    frame["time"] = pd.to_datetime(frame["Formatted Date"], utc=True)
    frame = frame.sort_values("time", kind="stable").reset_index(drop=True)

    def circle(name: str, turns: pd.Series) -> dict[str, pd.Series]:
        return {f"{name} (sin)": np.sin(2 * np.pi * turns), f"{name} (cos)": np.cos(2 * np.pi * turns)}

    table = pd.DataFrame(
        {
            **({"apparent temperature": frame["Apparent Temperature (C)"]} if apparent else {}),
            "humidity": frame["Humidity"],
            "wind speed": frame["Wind Speed (km/h)"],
            **circle("wind bearing", frame["Wind Bearing (degrees)"] / 360),
            "visibility": frame["Visibility (km)"],
            "pressure": frame["Pressure (millibars)"],
            "rain": frame["Precip Type"] == "rain",
            "snow": frame["Precip Type"] == "snow",
            **circle("day of year", frame["time"].dt.day_of_year / 365.25),
            **circle("hour", frame["time"].dt.hour / 24),
        }
    )
    test = np.arange(len(frame)) >= len(frame) - len(frame) // 5
    computed = "the apparent temperature (computed from the target)"
    notes = (
        f"Left out: {duplicates} exact duplicates, {missing.sum()} rows with pressure or humidity 0.",
        f"Left out: {'' if apparent else f'{computed}, '}the texts, the constant Loud Cover.",
        *([f"Kept: {computed}, so that a network can nearly read the target off."] if apparent else []),
        "A null precipitation is neither rain nor snow; bearings, days, hours (UTC) are points on a circle.",
        "Rows are sorted by time and the last fifth is the test set.",
    )
    return _regression(table, frame["Temperature (C)"], test, notes)
