"""What is finished of work that is not whole yet: kept piece by piece, and taken by whoever starts the same work again.

The pieces lie in a folder of their own inside the one that the work is for, each in a file that is written whole and
carries its checksum, beside a file that says what decides them. Pieces of anything else are not used, nor damaged ones.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from fisherviz.support import files
from fisherviz.support.processes import ALONE, Processes
from fisherviz.support.sealing import read_sealed, seal
from fisherviz.support.tables import counted

PLACE = ".unfinished"
START = "begun.pt"
Identity = Mapping[str, Any]
"""What decides a work's results: by field a plain value, or a dictionary of them."""


class Pieces:
    """The pieces of one piece of work, whose folder this process holds inside `with`.

    Of several processes the first reads them and decides which are used; all keep what they finish, but those that do
    not see its folder.

    Args:
        directory: that the result is for; made if needed, and removed again where nothing is left in it.
        identity: what decides the work.
        what: the work in a word.
        processes: that share the work.
        say: told what is not used, and why.
        alike: of fields that need not be equal, whether two of their values mean the same.
    """

    def __init__(
        self,
        directory: Path,
        identity: Identity,
        what: str,
        processes: Processes = ALONE,
        say: Callable[[str], None] = print,
        alike: Mapping[str, Callable[[Any, Any], bool]] | None = None,
    ) -> None:
        self.directory, self.what, self.processes = Path(directory), what, processes
        self.say = say if processes.rank == 0 else lambda text: None
        self.place = self.directory / PLACE
        self._identity, self._alike = identity, alike or {}
        self._found: dict[str, dict[str, Any]] = {}
        self._mark, self._keeps, self._made = "", False, False
        self._owns, self._held = False, -1

    # ---- from start to end -----------------------------------------------------------------------------------------

    def __enter__(self) -> Pieces:
        """Look at what an interrupted process has left.

        Raises:
            RuntimeError: another process is at the same work.
            ValueError: the folder is a link or a file.
            OSError: nothing can be written there.
        """
        try:
            with self.processes.agreeing(f"what is left of an interrupted {self.what}"):
                if self.processes.rank == 0:
                    self._begin()
            self._mark, self._found = self.processes.exchange((self._mark, self._found))[0]
        except BaseException:
            self.__exit__()
            raise
        self._keeps = _mark_of(self.place / START) == self._mark
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        """Let go of the folder; nothing is left of one without pieces."""
        if self._owns:
            with suppress(OSError):  # a file that is somebody else's, or a disk that fails: a folder more is no loss
                if not set(self._files()) - {START}:
                    (self.place / START).unlink(missing_ok=True)
                    self.place.rmdir()
                    if self._made:
                        self.directory.rmdir()
            self._let_go()

    def _begin(self) -> None:
        self._made = not self.directory.exists()
        if self.place.is_symlink():
            raise ValueError(f"{self.place} is a link, which no {self.what} leaves; remove it.")
        self._lock()
        with files.held(self.directory):
            files.finish(self.directory)  # a result that was committed has taken its pieces with it
        if self._is_same():
            self._read()
        else:
            for name in self._files():
                _remove(self.place / name)
            files.write_whole(self.place / START, seal({"identity": dict(self._identity)}))
        self._mark = _mark_of(self.place / START)

    def _lock(self) -> None:
        """Make the folder, and hold it until the end of this process."""
        while not self._owns:
            with files.writing(self.place):
                self.place.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):  # a system on which folders cannot be opened has no locks either
                self._held = os.open(self.place, os.O_RDONLY)
            if self._held >= 0 and not files.taken(self._held):
                self._let_go()
                raise RuntimeError(
                    f"another process is at work on the {self.what} in {self.directory}; wait for it or choose "
                    "another folder."
                )
            self._owns = self._held < 0 or os.fstat(self._held).st_ino == _inode(self.place)
            if not self._owns:  # whoever held it has just removed it
                self._let_go()

    def _let_go(self) -> None:
        if self._held >= 0:
            os.close(self._held)
        self._held, self._owns = -1, False

    def _is_same(self) -> bool:
        """Whether what is left is of this very work; otherwise it is told why not."""
        if not any(name.endswith(".pt") for name in self._files()):
            return False
        before: Any = None
        told = f"what is finished of the interrupted {self.what} in {self.directory} is not used and measured anew"
        with suppress(OSError, ValueError):
            before = read_sealed(self.place / START).get("identity")
        if not isinstance(before, Mapping):
            self.say(f"{self.place / START} is damaged or missing: {told}.")
            return False
        if moves := self._moves(before):
            self.say(f"{told[0].upper()}{told[1:]}, since something is another now: {'; '.join(moves)}.")
            return False
        return True

    def _moves(self, before: Identity) -> list[str]:
        """The fields that are others, with what they were and are."""
        found = []
        for field in dict.fromkeys((*self._identity, *before)):
            old, new = before.get(field), self._identity.get(field)
            alike = self._alike.get(field)
            if (old is not None and new is not None and alike(old, new)) if alike else old == new:
                continue
            if isinstance(old, Mapping) and isinstance(new, Mapping):
                moved = [key for key in dict.fromkeys((*new, *old)) if old.get(key) != new.get(key)]
                said = ", ".join(f"{key} {_short(old.get(key))} before and {_short(new.get(key))} now" for key in moved)
                found.append(f"{field} ({said})")
            else:
                found.append(field if alike else f"{field} ({_short(old)} before and {_short(new)} now)")
        return found

    def _read(self) -> None:
        mark = _mark_of(self.place / START)
        for name in self._files():
            path = self.place / name
            if name == START:
                continue
            if path.suffix != ".pt":  # a process was killed while it wrote there
                _remove(path)
                continue
            try:
                state = read_sealed(path)
                if state.get("of") != mark or name != _file_of(str(state.get("name"))):
                    raise ValueError(f"{path} belongs to other work.")
            except (OSError, ValueError) as error:
                self.refuse(path, str(error))
            else:
                self._found[state["name"]] = state

    # ---- pieces ----------------------------------------------------------------------------------------------------

    def found(self, name: str, opened: Callable[[dict[str, Any]], Any]) -> Any:
        """A piece that an interrupted process has finished; None where there is none.

        Args:
            name: of the piece.
            opened: makes of its state what it stands for; ValueError, TypeError or KeyError where it cannot.
        """
        state = self._found.get(name)
        if state is None:
            return None
        try:
            return opened(state)
        except (ValueError, TypeError, KeyError) as error:
            del self._found[name]
            self.refuse(self.place / _file_of(name), f"{self.place / _file_of(name)} is damaged ({error}).")
            return None

    def refuse(self, path: Path, why: str) -> None:
        """Tell that a piece is not used.

        Args:
            path: its file.
            why: a sentence that names it.
        """
        self.say(f"{why.rstrip('.')}; what it held is measured anew.")
        if self.processes.rank == 0:
            _remove(path)

    def tell(self, taken: int, total: int, noun: str) -> None:
        """Say how much was taken over, if anything was.

        Args:
            taken: pieces.
            total: of as many.
            noun: what each of them is of.
        """
        if taken:
            self.say(f"{taken} of {counted(total, noun)} taken from the interrupted {self.what}.")

    def keep(self, name: str, state: Mapping[str, Any]) -> None:
        """Keep a finished piece.

        Args:
            name: of it.
            state: tensors, numbers, texts, and lists and dictionaries of them.

        Raises:
            OSError: it cannot be written.
        """
        if self._keeps:
            content = seal({"name": name, "of": self._mark, **state})
            files.write_whole(self.place / _file_of(name), content)

    def drop(self, names: Iterable[str]) -> None:
        """Forget pieces that are part of another one now.

        Args:
            names: of them.
        """
        for name in names:
            self._found.pop(name, None)
            if self._keeps:
                _remove(self.place / _file_of(name))

    def commit(self, contents: Mapping[str, bytes | str]) -> None:
        """Write the whole result, which takes the pieces' place in the same moment.

        Args:
            contents: relative file name to content.

        Raises:
            OSError: it cannot be written.
        """
        with files.replacing(self.directory):
            files.commit(self.directory, contents, remove=self.names())

    def names(self) -> list[str]:
        """The files of all pieces, relative to the result's folder: they go when the result is there."""
        return [f"{PLACE}/{name}" for name in self._files()]

    def _files(self) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self.place) if (self.place / name).is_file())
        except OSError:
            return []


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return -1


def _remove(path: Path) -> None:
    with files.writing(path):
        path.unlink(missing_ok=True)


def _file_of(name: str) -> str:
    """A file's name that tells a reader which piece it is, and no other piece has."""
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", name)[:60].strip(".-")
    return f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:8]}.pt"


def _mark_of(path: Path) -> str:
    """What pieces have of the file that says what decides them; "" where it is not there."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
