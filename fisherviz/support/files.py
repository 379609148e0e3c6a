"""Files that are whole or absent: one file, or several that belong together.

Contents go to a staging folder first; a single rename commits them all. What is killed before the rename
leaves the old files, what is killed after it leaves the new ones: readers go through `resolve` to see them.
Writers of one directory wait for each other, and readers for writers, by a lock that ends with its process.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # no locks on this system: several writers of one folder are the user's own care
    fcntl = None

COMMITTED = ".commit"
STAGED = ".staged-"
REMOVED = ".removed"
"""Among the committed files, the names of those that go away with the same commit."""


def write_whole(path: str | os.PathLike[str], content: bytes | str) -> Path:
    """Write one file so that nobody ever sees half of it.

    Args:
        path: the file; its directory is made if needed.
        content: bytes, or text to be written as UTF-8.

    Returns:
        The path written.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_strays(path)
        staged = path.with_name(f".{path.name}-{secrets.token_hex(6)}")
        try:
            with _begun(staged) as stream:
                _fill(stream, content)
                if fcntl is None:  # where there are no locks, what is open cannot be moved
                    stream.close()
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


def taken(stream: BinaryIO | int, *, shared: bool = False, wait: bool = False) -> bool:
    """Take a lock on an open file or directory, which ends when it is closed or its process dies.

    Args:
        stream: the file, or its descriptor.
        shared: with others who share it.
        wait: until it is free.

    Returns:
        False where another has it. True also where the file system has no locks: then two processes in one folder are
        the user's own care.
    """
    if fcntl is None:
        return True
    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(stream, how)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def held(directory: str | os.PathLike[str], *, shared: bool = False) -> Iterator[None]:
    """Wait until nobody else writes a directory's files, and keep them from it meanwhile.

    Args:
        directory: that is there; of one that is not, or that cannot be opened, nothing is held.
        shared: with other readers.

    Yields:
        Nothing.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:  # whoever reads or writes there is told why not
        yield
        return
    try:
        taken(descriptor, shared=shared, wait=True)
        yield
    finally:
        os.close(descriptor)


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
    with replacing(directory):
        return commit(directory, contents)


@contextmanager
def replacing(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Make a directory, and be the only one who writes in it: for `commit` of what hangs on the files that are there.

    Args:
        directory: the directory.

    Yields:
        Nothing.

    Raises:
        ValueError: it is a file.
    """
    directory = check_place(directory, directory=True)
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with held(directory):
        yield


def commit(directory: str | os.PathLike[str], contents: Mapping[str, bytes | str], remove: Iterable[str] = ()) -> Path:
    """As `write_together`, inside `replacing`.

    Args:
        directory: the directory.
        contents: relative file name to content.
        remove: names of files that go with the old ones.

    Returns:
        The directory.

    Raises:
        ValueError: a name leaves the directory.
    """
    directory, remove = Path(directory), sorted(set(remove) - contents.keys())
    for name in (*contents, *remove):
        check_inside(directory, name)
    with writing(directory):
        finish(directory)
        staged = directory / f"{STAGED}{secrets.token_hex(6)}"
        everything = {**contents, REMOVED: json.dumps(remove)} if remove else contents
        try:
            for name, content in everything.items():
                (staged / name).parent.mkdir(parents=True, exist_ok=True)
                with open(staged / name, "xb") as stream:
                    _fill(stream, content)
            os.replace(staged, directory / COMMITTED)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        try:
            finish(directory)
        except KeyboardInterrupt:  # what is committed is the result: it goes to its place first
            finish(directory)
            raise
    return directory


def check_inside(directory: Path, name: str) -> Path:
    """The path of a file of a directory, refused where a name or a link would lead out of it.

    Args:
        directory: the directory.
        name: of the file, relative to it.

    Raises:
        ValueError: it leads out of it, or to a directory.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"the file name {name!r} leaves the directory {directory}.")
    path, whole = directory / name, Path(os.path.realpath(directory))
    above = Path(os.path.realpath(path.parent))
    if above != whole and whole not in above.parents:
        raise ValueError(f"{path.parent} is a link that leaves {directory}; remove the link or give another directory.")
    if path.is_dir() and not path.is_symlink():
        raise ValueError(f"{path} is a directory where a file belongs; remove it or give another directory.")
    return path


def resolve(directory: str | os.PathLike[str], name: str) -> Path:
    """Where the current content of a file written by `write_together` is, also after an interrupted write."""
    directory = Path(directory)
    for committed in (directory / COMMITTED / name, directory.parent / COMMITTED / directory.name / name):
        if committed.exists():
            return committed
    return directory / name


def finish(directory: Path) -> None:
    """Move what an interrupted write had committed to its place, and drop what it had not.

    Raises:
        ValueError: a link would lead out of the directory.
    """
    committed = directory / COMMITTED
    if committed.is_symlink():
        raise ValueError(f"{committed} is a link, which no writing leaves; remove it.")
    if committed.is_dir():
        gone = committed / REMOVED
        if gone.exists():
            for name in json.loads(gone.read_text(encoding="utf-8")):
                check_inside(directory, name).unlink(missing_ok=True)
        for source in sorted(path for path in committed.rglob("*") if path.is_file() and path != gone):
            target = check_inside(directory, str(source.relative_to(committed)))
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
        shutil.rmtree(committed)
    for stray in directory.glob(f"{STAGED}*"):
        shutil.rmtree(stray, ignore_errors=True)


def _begun(path: Path) -> BinaryIO:
    """A new file, locked while this process writes it."""
    while True:
        stream = open(path, "xb")  # noqa: SIM115 - the caller's
        if taken(stream, wait=True) and os.fstat(stream.fileno()).st_nlink:
            return stream
        stream.close()  # somebody took it for a stray before it was locked


def _drop_strays(path: Path) -> None:
    """Remove what killed processes had begun to write beside a file, and nobody writes any more."""
    if fcntl is None:
        return
    mine = re.compile(rf"\.{re.escape(path.name)}-[0-9a-f]{{12}}")
    for name in os.listdir(path.parent):
        if mine.fullmatch(name):
            stray = path.with_name(name)
            try:
                with open(stray, "rb") as stream:
                    if taken(stream):
                        stray.unlink(missing_ok=True)
            except OSError:  # its writer has just moved it to its place, or it is another user's
                continue


def _fill(stream: BinaryIO, content: bytes | str) -> None:
    stream.write(content.encode() if isinstance(content, str) else content)
    stream.flush()
    os.fsync(stream.fileno())
