"""One training run from configuration to summary: the loop, and everything that continues it bit for bit.

Whatever decides the future of a run (weights, optimizer, generators, position in the data, sums on the
way) is in its checkpoint; whatever the clock says is in "seconds" and decides nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fisherviz.approximations import approximations
from fisherviz.comparison.monitor import Monitor
from fisherviz.datasets.catalogue import Dataset
from fisherviz.network.likelihoods import resolve
from fisherviz.probe import Probe
from fisherviz.results.run import CHECKPOINT, MONITOR, SUMMARY, Run, load_run
from fisherviz.support import files
from fisherviz.support.errors import OptionError, option, sentence
from fisherviz.support.progress import watched
from fisherviz.support.versions import other_versions, said, versions
from fisherviz.training.board import Board
from fisherviz.training.clock import Clock
from fisherviz.training.config import Config, make_config, read_config
from fisherviz.training.continuing import cuda_random, differing, put_back, unsaved
from fisherviz.training.data import Batches, Position, load_dataset, split
from fisherviz.training.diagnosis import NonFiniteLoss, StoppedRun, explain, finite
from fisherviz.training.evaluation import Average, evaluate, score
from fisherviz.training.folder import Folder
from fisherviz.training.network import build_model, shaped_for, usable
from fisherviz.training.optimizers import check_options, dampings, make_optimizer

Say = Callable[[str], None]


def train(
    config: Config | Mapping[str, Any] | str | Path | None = None, /, *, say: Say | None = None, **fields: Any
) -> Run:
    """Train as a configuration says; a run that was interrupted goes on where its checkpoint is.

    Args:
        config: a `Config`, a mapping of its fields, a YAML file, or None for the defaults.
        say: told each evaluation, a line at a time.
        **fields: fields of `Config`, before those of `config`.

    Returns:
        The finished run.

    Raises:
        ValueError: a field is unknown or wrong, or the folder holds another run.
        StoppedRun: the loss is not finite, or the optimizer cannot go on; the last good checkpoint is kept.
        RuntimeError: another process is at work on the run.

    Example:
        >>> import tempfile
        >>> run = train(optimizer="foof", epochs=1, out=tempfile.mkdtemp(), quiet=True)
        >>> run.complete
        True
    """
    if isinstance(config, str | Path):
        config = read_config(config)
    elif isinstance(config, Config):
        config = config.model_dump(exclude_unset=True)
    made = make_config(config or {}, fields)
    device = usable(made.device)
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(made.seed)
        session = Session(made)
        with closing(Folder(made)) as folder:
            session.run(folder, say or (lambda line: None))
    return load_run(made.directory)


class Session:
    """A run in this process; nothing is written before `run`.

    Args:
        config: the run.
        dataset: its data set, if it has been loaded already.

    Raises:
        ValueError: a field is wrong.
    """

    folder: Folder
    board: Board

    def __init__(self, config: Config, dataset: Dataset | None = None) -> None:
        self.config = config
        self.dataset = dataset or load_dataset(config)
        with option("likelihood"):
            self.likelihood = resolve(self.dataset.likelihood if config.likelihood is None else config.likelihood)
        self.model = build_model(config, self.dataset)
        with option("dataset"):
            shaped = shaped_for(self.dataset, self.model)
        self.train_part, self.validation = split(config, shaped)
        self.batches = Batches(*self.train_part, config.batch_size, config.batch_full_at, config.seed)
        self.optimizer = make_optimizer(
            config.optimizer, config.optimizer_options, self.model, self.likelihood, self.batches, config.defaults
        )
        self.average = None if config.averaging is None else Average(self.model, config.averaging)
        self.clock = Clock(torch.device(config.device), config.timings)
        self.position, self.steps, self.examples = Position(), 0, 0
        self.running, self.counted = 0.0, 0
        self.moves: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = {"total": 0.0}
        self.monitor = self._monitor() if config.monitor else None

    # ---- the loop ------------------------------------------------------------------------------------------

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what is measured at the end of an epoch."""
        prefixes = ("",) if self.average is None else ("", "average_")
        keys = ("loss", score(self.likelihood))
        names = [f"{prefix}{part}_{key}" for prefix in prefixes for part in ("train", "validation") for key in keys]
        return (*names, "running_loss")

    def run(self, folder: Folder, say: Say) -> None:
        """Go on until the end, and write the summary."""
        self.folder = folder
        saved = self.folder.load()
        if saved is not None:
            try:
                self.restore(saved)
            except OptionError:
                raise
            except Exception as error:  # whatever somebody else's state makes of torch's ways to take one
                path = self.folder.path / CHECKPOINT
                raise OptionError(
                    f"out: {path} is no checkpoint of this run ({sentence(error)}); remove the folder to start again."
                ) from error
        ended = self.folder.path / SUMMARY
        if self.finished and ended.exists():
            say(f"The run in {self.folder.path} is complete.")
            return
        with files.writing(ended):
            ended.unlink(missing_ok=True)  # the run goes on
        self.folder.write_config()
        seen = (0, None) if saved is None else (saved["metrics_bytes"], saved.get("metrics_sha256"))
        self.folder.open_log(*seen)
        if saved is not None:
            moved = other_versions(saved.get("versions"))
            self.moves += [{"step": self.steps, **moved}] if moved else []
            say(f"Continuing after step {self.steps}{said(moved)}.")
        self.board = Board(self.folder.path, self.config.tensorboard, self.steps)
        try:
            if saved is None:
                self.evaluated(say)
                self.look()
                self.save()
            total = self.config.epochs * len(self.batches)
            begun = min(self.examples, total)
            with tqdm(
                total=total, initial=begun, unit="ex", unit_scale=True, disable=self.config.quiet or not watched()
            ) as bar:
                while not self.finished:
                    before = self.position.epoch
                    loss, count = self.step()
                    bar.update(count)
                    bar.set_postfix(epoch=self.position.epoch, loss=f"{loss:.4g}", refresh=False)
                    every = self.config.evaluate_every
                    if self.position.epoch // every > before // every or self.finished:
                        self.evaluated(say)
                    if self.steps % self.config.monitor_every == 0:
                        self.look()
                    if self.steps % self.config.checkpoint_every == 0 or self.finished:
                        self.save()
        except StoppedRun as error:
            self.folder.write_summary(self.summary("stopped") | {"error": str(error)})
            raise
        finally:
            self.board.close()
        self.folder.write_summary(self.summary("complete"))

    def step(self) -> tuple[float, int]:
        """Take one step, and log it.

        Returns:
            The mini-batch's loss before the step, and its number of examples.

        Raises:
            StoppedRun: the loss is not finite, or the optimizer cannot go on.
        """
        began = time.perf_counter()
        number, epoch = self.steps + 1, self.position.epoch + 1
        x, y, after = self.batches.take(self.position, number)
        seen: list[float] = []

        def closure() -> Tensor:
            with self.clock.part("forward"):
                self.optimizer.zero_grad()
                loss = self.likelihood.nll(self.model(x), y).mean()
            if not seen:  # later evaluations are the optimizer's own trials, which it judges itself
                seen.append(loss.item())
                if not math.isfinite(seen[0]):
                    raise explain(self.model, self.optimizer, x, seen[0], number, epoch)
            with self.clock.part("backward"):
                loss.backward()
            return loss

        try:
            with self.clock.step():
                self.optimizer.step(closure)  # type: ignore[arg-type]
        except (StoppedRun, torch.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError) as error:
            kind = StoppedRun if finite(self.model) else NonFiniteLoss
            raise kind(f"step {number} (epoch {epoch}): {error}") from error
        if self.average is not None:
            self.average.update()
        self.position, self.steps, self.examples = after, number, self.examples + len(x)
        self.running, self.counted = self.running + seen[0] * len(x), self.counted + len(x)
        parts = self.clock.lap()
        for name, value in (parts | {"total": time.perf_counter() - began}).items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value
        if number % self.config.log_every == 0:
            line = {"loss": seen[0], "batch": len(x), **dampings(self.optimizer)}
            self._log("step", line, parts | {"total": self.seconds["total"]})
        return seen[0], len(x)

    def evaluated(self, say: Say) -> None:
        """Evaluate, and log it.

        Raises:
            NonFiniteLoss: a weight or a loss is not finite.
        """
        self._check_weights()
        began = time.perf_counter()
        line = self._measured("")
        if self.average is not None:
            with self.average.inside():
                line |= self._measured("average_")
        if self.counted:
            line["running_loss"] = self.running / self.counted
        self.running, self.counted = 0.0, 0
        if not math.isfinite(line["train_loss"]):
            few, loss = self.train_part[0][:1000], line["train_loss"]
            raise explain(self.model, self.optimizer, few, loss, self.steps, self.position.epoch)
        line = {key: value for key, value in line.items() if math.isfinite(value)}
        self._log("epoch", line, {"total": self.seconds["total"], "evaluation": time.perf_counter() - began})
        judged = f"validation_{score(self.likelihood)}"
        say(
            f"epoch {self._epochs:g}  step {self.steps}  train loss {line['train_loss']:.4g}  "
            f"validation loss {line.get('validation_loss', math.inf):.4g}  {judged.replace('_', ' ')} "
            f"{line.get(judged, math.inf):.4g}"
        )

    def _monitor(self) -> Monitor:
        few = slice(self.config.monitor_examples)
        data = (self.train_part[0][few], self.train_part[1][few])
        with option("monitor_methods"):
            for name in self.config.monitor_methods:
                approximations[name]
        probe = Probe(self.model, self.likelihood)
        return Monitor(probe, self.config.monitor_methods, data=data, optimizer=self.optimizer, seed=self.config.seed)

    def look(self) -> None:
        """Compare the monitored approximations with the exact Fisher, and log it."""
        if self.monitor is None:
            return
        began = time.perf_counter()
        found = self.monitor.measure(self.steps)
        rows = [list(row) for row in found[list(MONITOR)].itertuples(index=False, name=None)]
        self._log("monitor", {"rows": rows}, {"monitor": time.perf_counter() - began})

    def _measured(self, prefix: str) -> dict[str, float]:
        parts = {"train": (self.train_part, self.config.evaluate_limit), "validation": (self.validation, None)}
        return {
            f"{prefix}{name}_{key}": value
            for name, part in parts.items()
            for key, value in evaluate(self.model, self.likelihood, *part).items()
        }

    def _log(self, kind: str, line: dict[str, Any], seconds: dict[str, float]) -> None:
        record = {
            "kind": kind, "step": self.steps, "epoch": self._epochs, "examples": self.examples,
            **line, "seconds": seconds,
        }  # fmt: skip
        self.folder.append(record)
        self.board.add(record)

    @property
    def _epochs(self) -> float:
        return round(self.position.epoch + self.position.offset / len(self.batches), 9)

    @property
    def finished(self) -> bool:
        """Whether the last step has been taken."""
        most = self.config.max_steps
        return self.position.epoch >= self.config.epochs or (most is not None and self.steps >= most)

    # ---- what continues it ---------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint.

        Raises:
            NonFiniteLoss: a weight is not finite; the last good checkpoint stays.
        """
        self._check_weights()
        self.folder.save(
            {
                "model": self.model.state_dict(),
                "buffers": unsaved(self.model),
                "optimizer": self.optimizer.state_dict(),
                "average": None if self.average is None else self.average.values,
                "random": torch.get_rng_state(),
                "random_cuda": cuda_random(self.clock.device),
                "position": [self.position.epoch, self.position.offset],
                "counts": [self.steps, self.examples, self.counted],
                "running": self.running,
                "seconds": dict(self.seconds),
                "data": self.dataset.fingerprint,
                "versions": versions(),
                "moves": self.moves,
            }
        )

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put back what `save` wrote.

        Raises:
            ValueError: the data are not those of the run.
        """
        if state["data"] != self.dataset.fingerprint:
            raise OptionError(
                f"dataset: the examples of {self.config.dataset} are not those that the run in {self.folder.path} was "
                "started with; choose another folder."
            )
        if told := differing(self.model.state_dict(), state["model"]):
            raise OptionError(
                f"model: {self.config.model} does not make the network of the run in {self.folder.path}: {told}; "
                "choose another folder, or put the network back as it was."
            )
        self.model.load_state_dict(state["model"])
        put_back(self.model, state.get("buffers", {}))
        with option("optimizer"):
            self.optimizer.load_state_dict(state["optimizer"])
        self.moves = list(state.get("moves", ()))
        if self.average is not None:
            for name, value in self.average.values.items():
                value.copy_(state["average"][name])
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None and self.clock.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"], self.clock.device)
        numbers = (*state["position"], *state["counts"], state["metrics_bytes"])
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError(f"its numbers of steps, examples and bytes are {numbers}")
        self.position = Position(*state["position"])
        self.steps, self.examples, self.counted = state["counts"]
        self.running, self.seconds = state["running"], dict(state["seconds"])

    def _check_weights(self) -> None:
        if not all(bool(torch.isfinite(p).all()) for p in self.model.parameters()):
            raise explain(
                self.model, self.optimizer, self.train_part[0][:1], None, self.steps, math.ceil(self._epochs) or 1
            )

    def summary(self, status: str) -> dict[str, Any]:
        """How the run ended, from its metrics."""
        records = load_run(self.folder.path).records
        lines = [r for r in records if r["kind"] == "epoch"]
        aside = ("kind", "seconds")
        best: dict[str, float] = {}
        for line in lines:
            for key, value in line.items():
                if key.endswith(("loss", "accuracy", "error")):
                    better = max if key.endswith("accuracy") else min
                    best[key] = better(best.get(key, value), value)
        return {
            "status": status,
            "steps": self.steps,
            "epochs": self._epochs,
            "examples": self.examples,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "optimizer_options": check_options(self.config.optimizer, self.config.optimizer_options),
            "final": {k: v for k, v in lines[-1].items() if k not in aside} if lines else {},
            "best": best,
            "seconds": dict(self.seconds),
            "lines": len(records),
            "config": self.config.plain(),
            "versions": versions(),
            "moves": self.moves,
            "data": {
                "name": self.dataset.name,
                "fingerprint": self.dataset.fingerprint,
                "notes": list(self.dataset.notes),
            },
        }
