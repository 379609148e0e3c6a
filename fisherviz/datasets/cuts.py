"""FACES: square pieces cut and turned from the Olivetti faces, as Hinton & Salakhutdinov 2006 made theirs.

Their supporting text: 165,600 images of 25 x 25 pixels (414 of each picture) by rotating (-90 to 90 degrees), scaling
(1.4 to 1.8), cropping and subsampling the 400 pictures of 64 x 64; people 1 to 30 are the training set. Where the
pieces were cut, and by which filter, is not said: here anywhere that they fit whole, by averaging. A pixel of a
piece is 1.4 to 1.8 of the picture's, so that at the middle a piece fits at any angle (25 · 1.8 · √2 < 64).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fisherviz.datasets.images import faces
from fisherviz.datasets.raw import Raw

SIDE = 25
EACH = 414  # pieces of a picture
SCALES = (1.4, 1.8)  # pixels of the picture to a pixel of the piece
TURN = math.pi / 2  # largest angle
FINE = 2  # points of the picture that a pixel averages, along each side


def cut(picture: NDArray[np.floating], scale: float, angle: float, place: tuple[float, float]) -> NDArray[np.float32]:
    """One piece of a picture.

    Args:
        picture: (H, W) pixels.
        scale: pixels of the picture to a pixel of the piece.
        angle: that the piece is turned by, in radians.
        place: of its middle among the places where it fits whole, (row, column), each in [0, 1].

    Returns:
        (25, 25) pixels.
    """
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    half = SIDE * scale / 2 * (abs(math.cos(angle)) + abs(math.sin(angle)))  # of the upright square around it
    size = np.array(picture.shape, dtype=np.float64)
    middle = half + np.array(place) * (size - 2 * half) - 0.5  # pixel i covers i - 1/2 to i + 1/2
    points = SIDE * FINE
    matrix = turn * (scale / FINE)
    offset = middle - matrix @ np.full(2, (points - 1) / 2)
    fine = ndimage.affine_transform(picture, matrix, offset, (points, points), np.float64, order=1, mode="nearest")
    return fine.reshape(SIDE, FINE, SIDE, FINE).mean((1, 3)).astype(np.float32)


def face_cuts(seed: int, limit: int | None, progress: bool) -> Raw:
    """The pieces of all pictures: the first piece of each picture, then the second, and so on.

    Args:
        seed: of scales, angles and places.
        limit: training examples that are wanted; as many pieces of every picture are cut as this takes.
        progress: show a bar while the pictures are fetched.
    """
    pictures = faces("autoencoder", progress)
    train, test = pictures.train_inputs[:, 0], pictures.test_inputs[:, 0]
    each = EACH if limit is None else max(1, min(EACH, -(-limit // len(train))))
    generator = np.random.default_rng(seed)
    first, second = (generator.spawn(1)[0].random((each, len(part), 4)) for part in (train, test))
    note = (
        f"{each} pieces of 25 x 25 pixels from each of the 400 Olivetti faces, cut and turned from seed {seed} after the "
        "description of the autoencoder papers' set, which is not at hand."
    )
    return Raw(_pieces(train, first), None, _pieces(test, second), None, notes=(pictures.notes[0], note))


def _pieces(pictures: NDArray[np.floating], drawn: NDArray[np.float64]) -> NDArray[np.float32]:
    """(pieces, 1, 25, 25) from (n, 64, 64) pictures and (each, n, 4) numbers in [0, 1)."""
    found = np.empty((drawn.shape[0] * len(pictures), 1, SIDE, SIDE), dtype=np.float32)
    low, high = SCALES
    for place, numbers in enumerate(drawn.reshape(-1, 4)):
        scale, angle = low + (high - low) * numbers[0], TURN * (2 * numbers[1] - 1)
        found[place, 0] = cut(pictures[place % len(pictures)], scale, angle, (numbers[2], numbers[3]))
    return found
