"""Finding the files of a data set: FISHERVIZ_DATA, then the user's cache, then the public source.

What is fetched is stored in the cache under the names and in the formats of the published files, so that
there is one reader for both. Others rely on `locate`, `Source` and errors that say which file goes where.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import platformdirs

from fisherviz.support.files import write_whole
from fisherviz.support.progress import progress_bar

VARIABLE = "FISHERVIZ_DATA"


@dataclass(frozen=True)
class Source:
    """The files of one data set.

    Args:
        name: name of the data set.
        files: paths relative to the data directory.
        origin: who publishes them, for messages.
        fetch: returns the contents of all files by name; None where no public source serves them.
        size: of all published files, in bytes.
        licence: as its publishers are commonly cited.
        sha256: of the published files' contents without their compression, in hexadecimal digits, by name; empty
            where what is fetched is another edition of them.
    """

    name: str
    files: tuple[str, ...]
    origin: str
    fetch: Callable[[], Mapping[str, bytes]] | None = None
    size: int = 0
    licence: str = ""
    sha256: Mapping[str, str] = field(default_factory=dict)


def cache_directory() -> Path:
    """The directory below the user's cache where fetched data sets are kept."""
    return Path(platformdirs.user_cache_dir("fisherviz")) / "data"


def given_directory() -> Path | None:
    """The directory that FISHERVIZ_DATA names, or None when it is not set.

    Raises:
        ValueError: the variable names something that is no directory.
    """
    value = os.environ.get(VARIABLE, "")
    if not value:
        return None
    directory = Path(value).expanduser()
    if not directory.is_dir():
        raise ValueError(f"{VARIABLE} is {value!r}, which is no directory; correct or unset it.")
    return directory


def present(source: Source) -> dict[str, Path] | None:
    """The files of a source where all of them are at hand, in the order of the look-up; None otherwise."""
    for directory in (given_directory(), cache_directory()):
        if directory is not None:
            paths = {name: directory / name for name in source.files}
            if all(path.is_file() for path in paths.values()):
                return paths
    return None


def locate(source: Source, progress: bool = True) -> dict[str, Path]:
    """Find the files of a source, fetching them into the cache if nobody has them.

    Args:
        source: what to look for.
        progress: show a bar while fetching.

    Returns:
        File name to path.

    Raises:
        RuntimeError: the files are nowhere and can't be fetched; the message says where to put them.
        ValueError: FISHERVIZ_DATA is no directory.
    """
    return present(source) or fetch(source, progress)


def fetch(source: Source, progress: bool = True) -> dict[str, Path]:
    """Fetch all files of a source into the cache: each is written whole, and a set counts only with all of them.

    Args:
        source: what to fetch.
        progress: show a bar.

    Returns:
        File name to path.

    Raises:
        RuntimeError: they can't be fetched; the message says where to put them.
    """
    home = given_directory() or cache_directory()
    advice = f"put {' and '.join(source.files)} ({source.origin}) into {home}"
    if source.fetch is None:
        raise RuntimeError(f"The data set {source.name!r} is not at hand and has no server to fetch it from: {advice}.")
    try:
        with progress_bar(1, f"fetching {source.name}", "set", progress) as bar:
            contents = source.fetch()
            bar.update()
    except Exception as error:
        raise RuntimeError(
            f"The data set {source.name!r} is not at hand and could not be fetched "
            f"({type(error).__name__}: {error}): {advice}."
        ) from error
    return {name: write_whole(cache_directory() / name, contents[name]) for name in source.files}
