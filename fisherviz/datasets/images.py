"""The image sets: digits, MNIST, Fashion-MNIST, faces, CIFAR-10; the IDX and CIFAR binary formats.

Every reader returns pixels in [0, 1] as (N, C, H, W) float32. Only `resize` changes the size of images.
scikit-learn takes a second to import: it waits for what asks for it, here and in `tables`.
"""

from __future__ import annotations

import gzip
import io
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fisherviz.datasets.locate import Source, locate
from fisherviz.datasets.raw import Raw
from fisherviz.support.opening import arrays, decompressed

IDX_NAMES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
FASHION_CLASSES = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
REPLACE = "replace it by the published file"
DIGITS = tuple(str(digit) for digit in range(10))
FACE_MAXIMUM = 242  # the brightest pixel of the 64 x 64 Olivetti faces; scikit-learn divides by it


def resize(images: NDArray[np.floating], size: int) -> NDArray[np.float32]:
    """Scale square images: down by averaging areas, up bilinearly (pixel centres aligned, edges repeated).

    Args:
        images: (N, C, H, H) pixels in [0, 1].
        size: new height and width.

    Returns:
        (N, C, size, size) pixels in [0, 1].
    """
    pixels = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))
    if size == pixels.shape[-1]:
        return pixels.numpy()
    smaller = size < pixels.shape[-1]
    options = {"mode": "area"} if smaller else {"mode": "bilinear", "align_corners": False}
    return torch.nn.functional.interpolate(pixels, (size, size), **options).clamp_(0, 1).numpy()


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read a gzipped IDX file of unsigned bytes.

    Raises:
        ValueError: the file is damaged or is something else.
    """
    try:
        content = decompressed(path)
    except ValueError as error:
        raise ValueError(f"{path} is no readable gzip file ({error}); {REPLACE}.") from error
    dimensions = content[3] if len(content) >= 4 else 0
    header = 4 + 4 * dimensions
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4))
    if content[:3] != b"\0\0\x08" or not shape or len(content) != header + math.prod(shape):
        raise ValueError(f"{path} is no IDX file of unsigned bytes; {REPLACE}.")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def write_idx(array: NDArray[np.uint8]) -> bytes:
    """The gzipped IDX file of an array of unsigned bytes."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return gzip.compress(header + array.tobytes(), compresslevel=6, mtime=0)


def _fetch_idx(folder: str, data_id: int) -> Mapping[str, bytes]:
    from sklearn.datasets import fetch_openml

    bunch = fetch_openml(data_id=data_id, as_frame=False, cache=False)
    images = np.asarray(bunch.data)
    if images.shape != (70_000, 784):
        raise ValueError(f"OpenML's data set {data_id} has shape {images.shape} instead of (70000, 784)")
    images = images.astype(np.uint8).reshape(-1, 28, 28)
    labels = np.asarray(bunch.target).astype(np.uint8)
    parts = (images[:60_000], labels[:60_000], images[60_000:], labels[60_000:])
    return {f"{folder}/{name}": write_idx(part) for name, part in zip(IDX_NAMES, parts, strict=True)}


def _fetch_faces() -> Mapping[str, bytes]:
    from sklearn.datasets import fetch_olivetti_faces

    bunch = fetch_olivetti_faces(shuffle=False)
    buffer = io.BytesIO()
    faces = np.rint(bunch.images * FACE_MAXIMUM).astype(np.uint8)
    np.savez_compressed(buffer, faces=faces, subject=bunch.target.astype(np.int64))
    return {"olivetti_faces.npz": buffer.getvalue()}


def _published(folder: str, *digests: str) -> Mapping[str, str]:
    return {f"{folder}/{name}": digest for name, digest in zip(IDX_NAMES, digests, strict=True)}


MNIST = Source(
    "mnist",
    tuple(f"mnist/{name}" for name in IDX_NAMES),
    "yann.lecun.com/exdb/mnist",
    lambda: _fetch_idx("mnist", 554),
    size=11_594_722,
    licence="CC BY-SA 3.0",
    sha256=_published(
        "mnist",
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
)
FASHION = Source(
    "fashion-mnist",
    tuple(f"fashion-mnist/{name}" for name in IDX_NAMES),
    "github.com/zalandoresearch/fashion-mnist",
    lambda: _fetch_idx("fashion-mnist", 40996),
    size=30_878_645,
    licence="MIT",
    sha256=_published(
        "fashion-mnist",
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
)
FACES = Source(
    "faces",
    ("olivetti_faces.npz",),
    "AT&T Laboratories Cambridge, 64 x 64 version",
    _fetch_faces,
    size=1_412_949,
    licence="research, with acknowledgement",
)
CIFAR = Source(
    "cifar10-subset",
    ("cifar10-subset/train_first4000.bin.xz", "cifar10-subset/test_first1000.bin.xz"),
    "the first records of CIFAR-10's data_batch_1 and test_batch, xz-compressed",
    size=10_843_288,
    licence="none stated (Krizhevsky 2009)",
    sha256={
        "cifar10-subset/train_first4000.bin.xz": "0993cf8b8e43bc207603aef9787006995746513f5e3fa5a52e06d1b069926330",
        "cifar10-subset/test_first1000.bin.xz": "8314c96d7cd65618193bab23acdd5d4c4af15bf6dd00a1781d55beedf3be1ef5",
    },
)


def _scale(images: NDArray[np.uint8], maximum: int = 255) -> NDArray[np.float32]:
    return images.astype(np.float32) / np.float32(maximum)


def _read_pair(source: Source, classes: tuple[str, ...], progress: bool) -> Raw:
    paths = locate(source, progress)
    train_x, train_y, test_x, test_y = (read_idx(paths[name]) for name in source.files)
    for images, labels in ((train_x, train_y), (test_x, test_y)):
        if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
            raise ValueError(
                f"The files of {source.name!r} in {paths[source.files[0]].parent} do not belong together "
                f"(images {images.shape}, labels {labels.shape}); replace them by the published ones."
            )
        if labels.max(initial=0) >= len(classes) or images.min(initial=255) == images.max(initial=0):
            raise ValueError(
                f"The files of {source.name!r} in {paths[source.files[0]].parent} are blank or have labels of no "
                "class; replace them by the published ones."
            )
    train_labels, test_labels = train_y.astype(np.int64), test_y.astype(np.int64)
    return Raw(_scale(train_x)[:, None], train_labels, _scale(test_x)[:, None], test_labels, classes=classes)


def mnist(progress: bool) -> Raw:
    """MNIST with its published split of 60,000 and 10,000 images."""
    return _read_pair(MNIST, DIGITS, progress)


def fashion(progress: bool) -> Raw:
    """Fashion-MNIST with its published split of 60,000 and 10,000 images."""
    return _read_pair(FASHION, FASHION_CLASSES, progress)


@cache
def _embedded_digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Images and labels as they are read from text once, however many runs of a sweep take them."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.images, bunch.target


def digits() -> Raw:
    """Scikit-learn's 1,797 handwritten digits; the last 360 rows, by other writers, are the test set."""
    pixels, classes = _embedded_digits()
    images = (pixels / 16.0).astype(np.float32)[:, None]
    labels = classes.astype(np.int64)
    cut = len(images) - 360
    return Raw(
        images[:cut], labels[:cut], images[cut:], labels[cut:], classes=DIGITS,
        notes=("The last 360 rows of the source are the test set: rows of one writer stand together.",),
    )  # fmt: skip


def faces(task: str, progress: bool) -> Raw:
    """Olivetti faces; the test set is ten of the forty people, or two of the ten pictures of each.

    Args:
        task: an autoencoder's holds out people 30 to 39; any other's the last two pictures of everybody.
        progress: show a bar while fetching.
    """
    path = locate(FACES, progress)[FACES.files[0]]
    try:
        found = arrays(path.read_bytes())
        images, people = found["faces"], found["subject"].astype(np.int64)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} holds no arrays 'faces' and 'subject' ({error}); replace it.") from error
    by_person = task == "autoencoder"
    test = people >= 30 if by_person else np.arange(len(people)) % 10 >= 8
    pixels = _scale(images, FACE_MAXIMUM)[:, None]
    held = "The people 30 to 39" if by_person else "The last two pictures of each person"
    return Raw(
        pixels[~test], people[~test], pixels[test], people[test],
        classes=tuple(f"person {number}" for number in range(40)),
        notes=(
            f"{held} are the test set.",
            "These are the 400 Olivetti faces; the autoencoder papers' pieces are the data set faces-cut.",
        ),
    )  # fmt: skip


def _read_cifar(path: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    try:
        content = decompressed(path)
    except ValueError as error:
        raise ValueError(f"{path} is no readable xz file ({error}); replace it.") from error
    if not content or len(content) % 3073:
        raise ValueError(f"{path} does not consist of CIFAR records of 3073 bytes; replace it.")
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, 3073)
    if records[:, 0].max() >= len(CIFAR_CLASSES) or records[:, 1:].min() == records[:, 1:].max():
        raise ValueError(f"{path} is blank or has labels of no class; replace it.")
    return _scale(records[:, 1:].reshape(-1, 3, 32, 32)), records[:, 0].astype(np.int64)


def cifar_subset(progress: bool) -> Raw:
    """The first 4,000 training and 1,000 test images of CIFAR-10."""
    paths = locate(CIFAR, progress)
    train, test = (_read_cifar(paths[name]) for name in CIFAR.files)
    return Raw(
        *train, *test, classes=CIFAR_CLASSES,
        notes=("A subset: accuracies do not compare with published CIFAR-10 results.",),
    )  # fmt: skip
