"""The folder of a run: one process at a time, metrics only appended, checkpoints whole or absent.

A checkpoint knows how long the metrics file was; whatever a killed process wrote after it is cut off when
the run is continued, so that the lines are those of a run that was never interrupted.
"""

from __future__ import annotations

import json
import os
from types import ModuleType
from typing import Any, BinaryIO

import yaml

from fisherviz.results.run import CHECKPOINT, CONFIG, METRICS, SUMMARY
from fisherviz.support import files
from fisherviz.support.errors import OptionError, option
from fisherviz.support.plain import from_yaml
from fisherviz.support.sealing import seal, unseal
from fisherviz.training.config import BEFORE, FREE, Config

FORMAT = 1
LOCK = ".lock"
fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # no locks on this system: two processes in one folder are the user's own care
    fcntl = None


class Folder:
    """A run's folder, held by this process until `close`.

    Args:
        config: of the run.

    Raises:
        ValueError: the folder holds another run, or something else.
        RuntimeError: another process is at work on it.
    """

    def __init__(self, config: Config) -> None:
        self.path, self.config = config.directory, config
        with option("out"):
            files.check_place(self.path, directory=True)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = self._locked()
        self._log: BinaryIO | None = None
        try:
            self._claim()
        except BaseException:
            self.close()
            raise

    def _locked(self) -> BinaryIO:
        stream = open(self.path / LOCK, "ab")  # noqa: SIM115 - held until the process ends
        if fcntl is not None:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                stream.close()
                raise RuntimeError(
                    f"out: another process is at work on the run in {self.path}; wait for it or choose another folder."
                ) from error
        return stream

    def _claim(self) -> None:
        path, mine = self.path / CONFIG, self.config.identity()
        if not path.exists():
            if (self.path / METRICS).exists() or (self.path / CHECKPOINT).exists():
                raise OptionError(f"out: {self.path} holds a run without {CONFIG}; choose another folder.")
            self.write_config()
            return
        try:
            found = from_yaml(path.read_text(encoding="utf-8"))
            theirs = {key: value for key, value in (BEFORE | found).items() if key not in FREE}
        except (ValueError, AttributeError, TypeError) as error:
            raise OptionError(f"out: {path} is damaged; choose another folder.") from error
        for key in (*mine, *theirs):
            if mine.get(key) != theirs.get(key):
                raise OptionError(
                    f"out: {self.path} holds a run with {key}={theirs.get(key)!r}, not {mine.get(key)!r}; "
                    "choose another folder, or give the same options to continue it."
                )

    def write_config(self) -> None:
        """Write the configuration, with what a continued run changed."""
        text = yaml.safe_dump(self.config.plain(), sort_keys=False, allow_unicode=True)
        files.write_whole(self.path / CONFIG, text)

    # ---- metrics -------------------------------------------------------------------------------------------

    def open_log(self, length: int) -> None:
        """Start appending to the metrics after their first `length` bytes.

        Raises:
            ValueError: there are fewer.
        """
        path = self.path / METRICS
        held = path.stat().st_size if path.exists() else 0
        if held < length:
            raise OptionError(
                f"out: {path} has {held} bytes where the checkpoint saw {length}; restore it, or remove the folder to "
                "start again."
            )
        stream = open(path, "ab", buffering=0)  # noqa: SIM115 - held until close
        stream.truncate(length)
        self._log = stream

    def append(self, record: dict[str, Any]) -> None:
        """One line of metrics."""
        assert self._log is not None
        line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
        with files.writing(self.path / METRICS):
            while line:  # an unbuffered stream may take a part
                line = line[self._log.write(line) :]

    # ---- checkpoints ---------------------------------------------------------------------------------------

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint by a state and the present length of the metrics."""
        assert self._log is not None
        os.fsync(self._log.fileno())
        length = os.fstat(self._log.fileno()).st_size
        content = seal({"format": FORMAT, "metrics_bytes": length, **state})
        files.write_whole(self.path / CHECKPOINT, content)

    def load(self) -> dict[str, Any] | None:
        """The checkpoint, None where there is none yet; no code in it is run.

        Raises:
            ValueError: it is damaged or a newer release's.
        """
        for stray in self.path.glob(f".{CHECKPOINT}-*"):  # what a killed process had not finished
            stray.unlink(missing_ok=True)
        path = self.path / CHECKPOINT
        if not path.exists():
            return None
        content = path.read_bytes()
        try:
            state = unseal(content)
        except Exception as error:
            raise OptionError(f"out: {path} cannot be read; remove the folder to start again.") from error
        if not isinstance(state.get("format"), int):
            raise OptionError(f"out: {path} is no checkpoint of a run; remove the folder to start again.")
        if state["format"] > FORMAT:
            raise OptionError(f"out: {path} is in format {state['format']}, this release reads {FORMAT}; upgrade.")
        return state

    # ---- the end -------------------------------------------------------------------------------------------

    def write_summary(self, summary: dict[str, Any]) -> None:
        """How the run ended."""
        files.write_whole(self.path / SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Let other processes have the folder."""
        if self._log is not None:
            self._log.close()
            self._log = None
        self._lock.close()
