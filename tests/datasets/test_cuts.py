"""Pieces of faces: where they lie, by pictures on which interpolation is exact, and what of them the seed decides."""

import math

import numpy as np
import pytest
import torch

from fisherviz import datasets, models
from fisherviz.datasets import cuts
from fisherviz.datasets.cuts import SCALES, SIDE, cut, face_cuts
from fisherviz.datasets.raw import Raw


def pictures(count, seed):
    return np.random.default_rng(seed).random((count, 1, 64, 64)).astype(np.float32)


@pytest.fixture
def faces(monkeypatch):
    """Noise in place of the 400 pictures."""
    raw = Raw(pictures(300, 0), None, pictures(100, 1), None, notes=("Noise.",))
    monkeypatch.setattr(cuts, "faces", lambda task, progress: raw)
    return raw


@pytest.mark.parametrize("angle", [-math.pi / 2, -0.4, 0.0, 1.1, math.pi / 2])
@pytest.mark.parametrize("scale", SCALES)
def test_a_piece_is_the_picture_seen_through_a_turned_square(scale, angle):
    rows, columns = np.meshgrid(np.arange(64.0), np.arange(64.0), indexing="ij")
    places = (np.arange(SIDE) - (SIDE - 1) / 2) * scale
    down, right = np.meshgrid(places, places, indexing="ij")
    turned = (
        31.5 + math.cos(angle) * down - math.sin(angle) * right,
        31.5 + math.sin(angle) * down + math.cos(angle) * right,
    )
    for ramp, expected in zip((rows, columns), turned, strict=True):  # linear: interpolation and averaging are exact
        np.testing.assert_allclose(cut(ramp, scale, angle, (0.5, 0.5)), expected, rtol=1e-5)


@pytest.mark.parametrize("angle", [-1.2, 0.0, math.pi / 4])
def test_pieces_reach_the_borders_of_the_picture_and_no_further(angle):
    rows, columns = np.meshgrid(np.arange(64.0), np.arange(64.0), indexing="ij")
    for ramp, axis in ((rows, 0), (columns, 1)):
        for place, border in ((0.0, -0.5), (1.0, 63.5)):
            position = [0.5, 0.5]
            position[axis] = place
            piece = cut(ramp, 1.4, angle, tuple(position))
            corner = piece.min() if place == 0.0 else piece.max()
            # the outermost pixel's middle is half its extent from the border; at most half of the points that it
            # averages lie beyond the middles of the picture's outermost pixels, by at most half a pixel
            extent = 1.4 * (abs(math.cos(angle)) + abs(math.sin(angle)))
            assert extent / 2 - 1e-5 <= abs(corner - border) <= extent / 2 + 0.25
    assert SIDE * SCALES[1] * math.sqrt(2) < 64


def test_as_many_pieces_of_each_picture_are_cut_as_are_wanted(faces):
    few, more = face_cuts(0, 450, False), face_cuts(0, 900, False)
    assert len(few.train_inputs) == 600
    assert len(few.test_inputs) == 200
    np.testing.assert_array_equal(few.train_inputs, more.train_inputs[:600])
    np.testing.assert_array_equal(few.test_inputs, more.test_inputs[:200])
    assert not np.array_equal(face_cuts(1, 450, False).train_inputs, few.train_inputs)


def test_pieces_are_of_the_picture_whose_turn_it_is(faces, monkeypatch):
    flat = Raw(
        np.broadcast_to(np.arange(300.0)[:, None, None, None], (300, 1, 64, 64)), None, faces.test_inputs, None,
        notes=faces.notes,
    )  # fmt: skip
    monkeypatch.setattr(cuts, "faces", lambda task, progress: flat)
    found = face_cuts(0, 600, False).train_inputs
    np.testing.assert_allclose(found[:, 0, 12, 12], np.tile(np.arange(300.0), 2), rtol=1e-6)


def test_every_pixel_has_mean_zero_and_the_mean_variance_is_one(faces):
    data = datasets.load("faces-cut", limit=600)
    inputs = data.train.inputs.double()
    torch.testing.assert_close(inputs.mean(0), torch.zeros(625, dtype=torch.float64), rtol=0, atol=1e-6)
    assert float(inputs.var(0, correction=0).mean()) == pytest.approx(1.0, rel=1e-5)
    raw = face_cuts(0, 600, False)
    back = data.test.inputs * data.input_standard.scale + data.input_standard.mean
    torch.testing.assert_close(back, torch.tensor(raw.test_inputs).flatten(1), rtol=0, atol=1e-5)
    assert torch.equal(data.train.inputs, data.train.targets)
    assert (data.likelihood, data.shape) == ("gaussian", (1, 25, 25))


def test_the_papers_network_takes_them(faces):
    data = datasets.load("faces-cut", limit=300)
    net = models.build("faces-autoencoder", seed=0, dataset=data)
    assert net(data.test.inputs[:2]).shape == (2, 625)


def test_without_the_pictures_the_error_names_their_file(monkeypatch, tmp_path):
    monkeypatch.setenv("FISHERVIZ_DATA", str(tmp_path))
    monkeypatch.setattr("fisherviz.datasets.locate.cache_directory", lambda: tmp_path / "cache")
    monkeypatch.setattr("sklearn.datasets.fetch_olivetti_faces", lambda **options: 1 / 0)
    with pytest.raises(RuntimeError, match=r"olivetti_faces\.npz"):
        datasets.load("faces-cut", progress=False)


@pytest.mark.skipif(datasets.where("faces") is None, reason="the Olivetti faces are not at hand")
def test_a_check_reads_the_pictures_that_they_are_cut_from():
    assert datasets.check("faces-cut") == "made from faces: 400 examples as they should be"
