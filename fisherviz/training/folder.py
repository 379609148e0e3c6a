"""The folder of a run: one process at a time, metrics only appended, checkpoints whole or absent.

A checkpoint knows how long the metrics file was; whatever a killed process wrote after it is cut off when
the run is continued, so that the lines are those of a run that was never interrupted.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any, BinaryIO

import yaml

from fisherviz.results.run import CHECKPOINT, CONFIG, METRICS, SUMMARY
from fisherviz.support import files
from fisherviz.support.checksums import opened_text, sealed_json, sealed_text
from fisherviz.support.errors import OptionError, option
from fisherviz.support.plain import from_yaml
from fisherviz.support.sealing import read_sealed, seal
from fisherviz.training.config import BEFORE, FREE, Config

FORMAT = 1
LOCK = ".lock"


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
        with files.writing(self.path):
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
        if not files.taken(stream):
            stream.close()
            raise RuntimeError(
                f"out: another process is at work on the run in {self.path}; wait for it or choose another folder."
            )
        return stream

    def _claim(self) -> None:
        path, mine = self.path / CONFIG, self.config.identity()
        if not path.exists():
            if (self.path / METRICS).exists() or (self.path / CHECKPOINT).exists():
                raise OptionError(f"out: {self.path} holds a run without {CONFIG}; choose another folder.")
            self.write_config()
            return
        text, damaged = path.read_bytes(), ""
        try:
            opened_text(text.decode())
        except ValueError as error:
            damaged = f"; {path} is damaged or was edited ({error})"
        try:
            found = from_yaml(text.decode())
            theirs = {key: value for key, value in (BEFORE | found).items() if key not in FREE}
        except (ValueError, AttributeError, TypeError) as error:
            raise OptionError(f"out: {path} is damaged; choose another folder.") from error
        for key in (*mine, *theirs):
            if mine.get(key) != theirs.get(key):
                raise OptionError(
                    f"out: {self.path} holds a run with {key}={theirs.get(key)!r}, not {mine.get(key)!r}; "
                    f"choose another folder, or give the same options to continue it{damaged}."
                )

    def write_config(self) -> None:
        """Write the configuration, with what a continued run changed."""
        text = yaml.safe_dump(self.config.plain(), sort_keys=False, allow_unicode=True)
        files.write_whole(self.path / CONFIG, sealed_text(text))

    # ---- metrics -------------------------------------------------------------------------------------------

    def open_log(self, length: int, digest: str | None = None) -> None:
        """Start appending to the metrics after their first `length` bytes.

        Args:
            length: of what the checkpoint saw.
            digest: SHA-256 of it; None: older releases did not note it.

        Raises:
            ValueError: they are not there.
        """
        path = self.path / METRICS
        with files.writing(path):
            stream = self._log = open(path, "a+b", buffering=0)  # noqa: SIM115 - held until close
            held = os.fstat(stream.fileno()).st_size
            if held < length:
                raise OptionError(
                    f"out: {path} has {held} bytes where the checkpoint saw {length}; restore it, or remove the folder "
                    "to start again."
                )
            stream.seek(0)
            whole = stream.readall()[:length]
            self._seen = hashlib.sha256(whole)
            if digest is not None and self._seen.hexdigest() != digest:
                raise OptionError(
                    f"out: {path} is damaged: its first {length} bytes are not those that the checkpoint saw; restore "
                    "it, or remove the folder to start again."
                )
            stream.truncate(length)

    def append(self, record: dict[str, Any]) -> None:
        """One line of metrics."""
        assert self._log is not None
        line = (sealed_json(record) + "\n").encode()
        self._seen.update(line)
        with files.writing(self.path / METRICS):
            while line:  # an unbuffered stream may take a part
                line = line[self._log.write(line) :]

    # ---- checkpoints ---------------------------------------------------------------------------------------

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint by a state and the present length of the metrics."""
        assert self._log is not None
        with files.writing(self.path / METRICS):
            os.fsync(self._log.fileno())
        length = os.fstat(self._log.fileno()).st_size
        seen = {"metrics_bytes": length, "metrics_sha256": self._seen.hexdigest()}
        content = seal({"format": FORMAT, **seen, **state})
        files.write_whole(self.path / CHECKPOINT, content)

    def load(self) -> dict[str, Any] | None:
        """The checkpoint, None where there is none yet; no code in it is run.

        Raises:
            ValueError: it is damaged or a newer release's.
        """
        path = self.path / CHECKPOINT
        if not path.exists():
            return None
        with option("out"):
            state = read_sealed(path)
        if not isinstance(state.get("format"), int):
            raise OptionError(f"out: {path} is no checkpoint of a run; remove the folder to start again.")
        if state["format"] > FORMAT:
            raise OptionError(f"out: {path} is in format {state['format']}, this release reads {FORMAT}; upgrade.")
        return state

    # ---- the end -------------------------------------------------------------------------------------------

    def write_summary(self, summary: dict[str, Any]) -> None:
        """How the run ended."""
        files.write_whole(self.path / SUMMARY, sealed_json(summary, indent=1) + "\n")

    def close(self) -> None:
        """Let other processes have the folder."""
        if self._log is not None:
            self._log.close()
            self._log = None
        self._lock.close()
