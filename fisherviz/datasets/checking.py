"""Whether the files of a data set are those that its publishers gave out, and read as they should."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fisherviz.datasets import catalogue
from fisherviz.datasets.locate import present
from fisherviz.support.opening import decompressed


def check(name: str) -> str:
    """Read a data set and count its examples; the contents of published files are compared by their digests.

    Args:
        name: of the data set.

    Returns:
        What was compared, in words.

    Raises:
        ValueError: there is no such data set, a file is damaged or another one, or examples are missing.
        RuntimeError: its files are not at hand.
    """
    origin = catalogue.made_from(name)
    if origin is not None:
        return f"made from {origin}: {check(origin)}"
    source = catalogue.source(name)
    if source is not None:
        paths = present(source)
        if paths is None:
            advice = f"`fisherviz data fetch {name}` fetches them or says where to put them."
            raise RuntimeError(f"the files of {name!r} are not at hand; {advice}")
        for file, wanted in source.sha256.items():
            if _digest(paths[file]) != wanted:
                raise ValueError(f"{paths[file]} is not the published file; replace it ({source.origin}).")
    loaded = catalogue.load(name, progress=False)
    found = len(loaded.train.inputs) + len(loaded.test.inputs)
    if found != catalogue.examples(name):
        raise ValueError(f"{name!r} has {found:,} examples instead of {catalogue.examples(name):,}; replace its files.")
    digests = "digests and " if source is not None and source.sha256 else ""
    return f"{digests}{found:,} examples as they should be"


def _digest(path: Path) -> str:
    """Of a file's content without its compression, which may differ from program to program."""
    try:
        return hashlib.sha256(decompressed(path)).hexdigest()
    except ValueError as error:
        raise ValueError(f"{path} cannot be decompressed ({error}); replace it by the published file.") from error
