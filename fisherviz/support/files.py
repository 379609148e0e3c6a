"""Files that are whole or absent: one file, or several that belong together.

Contents go to a staging folder first; a single rename commits them all. What is killed before the rename
leaves the old files, what is killed after it leaves the new ones: readers go through `resolve` to see them.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

COMMITTED = ".commit"
STAGED = ".staged-"


def write_whole(path: str | os.PathLike[str], content: bytes | str) -> Path:
    """Write one file so that nobody ever sees half of it.

    Args:
        path: the file; its directory is made if needed.
        content: bytes, or text to be written as UTF-8.

    Returns:
        The path written.
    """
    path = Path(path)
    staged = path.with_name(f".{path.name}-{secrets.token_hex(6)}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _fill(staged, content)
            os.replace(staged, path)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
    return path


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tell which path could not be written: a full disk's own error does not.

    Args:
        path: what is written inside.

    Yields:
        Nothing.

    Raises:
        OSError: it could not be written.
    """
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        told = f"{path} cannot be written ({why}); make room or give another path."
        raise OSError(error.errno, told) from error


def check_place(path: str | os.PathLike[str], *, directory: bool) -> Path:
    """Refuse a path that cannot be written to, before the work whose result it is meant for; nothing is made.

    Args:
        path: where a file, or a directory with files, is going to be.
        directory: whether it is a directory.

    Returns:
        The path.

    Raises:
        TypeError: it is no path.
        ValueError: something else is there, or nothing can be written there.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"a path is a string or a Path, got {type(path).__name__}.")
    path = Path(path)
    wanted, other = ("directory", "file") if directory else ("file", "directory")
    if path.exists() and path.is_dir() != directory:
        raise ValueError(f"{path} is a {other}; give the path of a {wanted} to write to.")
    above = path if directory else path.parent
    while not above.exists() and above != above.parent:
        above = above.parent
    try:
        tempfile.TemporaryFile(dir=above).close()
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written to ({above}: {error.strerror or error}); give another path."
        ) from error
    return path


def write_together(directory: str | os.PathLike[str], contents: Mapping[str, bytes | str]) -> Path:
    """Write several files of one directory so that readers see all of the old ones or all of the new ones.

    Args:
        directory: made if needed; other files in it are left alone.
        contents: relative file name ("a.json", "pictures/b.png") to content.

    Returns:
        The directory.

    Raises:
        ValueError: `directory` is a file, or a name leaves the directory.
    """
    directory = check_place(directory, directory=True)
    for name in contents:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"the file name {name!r} leaves the directory {directory}.")
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        finish(directory)
        staged = directory / f"{STAGED}{secrets.token_hex(6)}"
        for name, content in contents.items():
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            _fill(staged / name, content)
        os.replace(staged, directory / COMMITTED)
        finish(directory)
    return directory


def resolve(directory: str | os.PathLike[str], name: str) -> Path:
    """Where the current content of a file written by `write_together` is, also after an interrupted write."""
    directory = Path(directory)
    for committed in (directory / COMMITTED / name, directory.parent / COMMITTED / directory.name / name):
        if committed.exists():
            return committed
    return directory / name


def finish(directory: Path) -> None:
    """Move what an interrupted write had committed to its place, and drop what it had not."""
    committed = directory / COMMITTED
    if committed.is_dir():
        for source in sorted(path for path in committed.rglob("*") if path.is_file()):
            target = directory / source.relative_to(committed)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
        shutil.rmtree(committed)
    for stray in directory.glob(f"{STAGED}*"):
        shutil.rmtree(stray, ignore_errors=True)


def _fill(path: Path, content: bytes | str) -> None:
    with open(path, "xb") as stream:
        stream.write(content.encode() if isinstance(content, str) else content)
        stream.flush()
        os.fsync(stream.fileno())
