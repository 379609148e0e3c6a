"""One run of a comparison: kept when it ends, and resumed bit for bit where a long one was interrupted."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fisherviz.network.likelihoods import resolve
from fisherviz.operators.factorise import SingularMatrixError
from fisherviz.operators.finite import NonFiniteMatrixError
from fisherviz.papers.trials.problems import Method, Options, Problem, build
from fisherviz.papers.trials.states import State, kept_state
from fisherviz.papers.trials.work import Run, kept, place
from fisherviz.support.files import write_whole
from fisherviz.support.progress import progress_bar
from fisherviz.support.sealing import read_sealed, seal
from fisherviz.support.versions import other_versions, versions
from fisherviz.training.continuing import differing
from fisherviz.training.data import Batches, Position
from fisherviz.training.diagnosis import NonFiniteLoss, StoppedRun, finite
from fisherviz.training.evaluation import Average, evaluate, score
from fisherviz.training.optimizers import make_optimizer

SAVED = 120.0
"""Seconds between the states that an interrupted run goes on from."""
EXPLODED = 1e3
"""Times the first training loss, or 1 if that is less, above which a mini-batch's loss counts as diverged: Fishers of
such a network are singular to rounding long before its loss is no number."""


def trained(
    problem: Problem, method: Method, options: Options, steps: int, look: int, seed: int, run: Run
) -> dict[str, Any]:
    """One run, or what is kept of it.

    Args:
        problem: what is trained.
        method: the optimizer.
        options: of it, beside those that are fixed.
        steps: how many.
        look: steps between evaluations.
        seed: of weights and batches.
        run: device, and where runs are kept.

    Returns:
        "curve" (a line per evaluation: step, epoch, seconds of its process in steps, train_loss, ..., and
        running_accuracy, the mean accuracy on the batches since the line before, each before its step), "stopped"
        (why it broke off, or None), "seconds".
    """
    what, title = _named(problem, method, options, steps, look, seed, run)

    def measure() -> dict[str, Any]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return _Training(problem, what, title, run).finish()

    return kept(what, measure, run)


@dataclass(frozen=True)
class Reached:
    """Where a run stands after its steps.

    Args:
        found: what `trained` returns.
        model: weights, by name.
        optimizer: its `state_dict`.
        batch: inputs and targets of the step that would come next.
    """

    found: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    batch: tuple[Tensor, Tensor]


def reached(problem: Problem, method: Method, options: Options, steps: int, seed: int, run: Run) -> Reached:
    """One run and the state that it ended in, or what is kept of them; arguments are those of `trained`."""
    what, title = _named(problem, method, options, steps, steps, seed, run)

    def measure() -> tuple[dict[str, Any], State]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            training = _Training(problem, what, title, run)
            return training.finish(), training.state()

    found, state = kept_state({**what, "state": "kept"}, measure, run)
    batches = Batches(*problem.data().to(run.device).train, problem.batch, problem.full_at, seed)
    x, y, _ = batches.take(Position(*state["position"]), steps + 1)
    return Reached(found, state["model"], state["optimizer"], (x, y))


def _named(
    problem: Problem, method: Method, options: Options, steps: int, look: int, seed: int, run: Run
) -> tuple[dict[str, Any], str]:
    """Everything that decides a run, and what its progress bar is called."""
    what = {
        "problem": asdict(problem), "optimizer": method.optimizer,
        "options": {**method.fixed, **options}, "steps": steps, "look": look, "seed": seed, "device": run.device,
    }  # fmt: skip
    return what, f"{problem.dataset} {method.name} {' '.join(f'{k}={v:g}' for k, v in options.items())} seed {seed}"


class _Training:
    """A run under way.

    Args:
        problem: what is trained.
        what: everything that decides the run.
        title: before the progress bar.
        run: where its state is kept.
    """

    def __init__(self, problem: Problem, what: Mapping[str, Any], title: str, run: Run) -> None:
        self.problem, self.what, self.title, self.run = problem, what, title, run
        self.data = problem.data().to(run.device)
        self.likelihood = resolve(self.data.likelihood)
        self.model = build(problem, self.data, what["seed"]).to(run.device, getattr(torch, problem.dtype))
        self.batches = Batches(*self.data.train, problem.batch, problem.full_at, what["seed"])
        self.optimizer: Any = make_optimizer(
            what["optimizer"], what["options"], self.model, self.likelihood, self.batches, "paper"
        )
        self.average = None if problem.averaging is None else Average(self.model, problem.averaging)
        self.position, self.done, self.seconds = Position(), 0, 0.0
        self.curve: list[dict[str, float]] = []
        self.moves: list[dict[str, Any]] = []
        self.right = self.seen = 0
        self.path = place(what, run, ".part")
        self._resume()

    def finish(self) -> dict[str, Any]:
        """Train to the end, or to where the numbers are not finite or a matrix is not positive definite."""
        stopped, saved = None, time.monotonic()
        try:
            if not self.curve:
                self._look()
            steps = range(self.done + 1, self.what["steps"] + 1)
            for step in progress_bar(steps, self.title, "step", self.run.progress):
                x, y, self.position = self.batches.take(self.position, step)
                began = time.process_time()
                self._step(x, y, step)
                self.seconds += time.process_time() - began
                self.done = step
                if self.average is not None:
                    self.average.update()
                if step % self.what["look"] == 0 or step == self.what["steps"]:
                    self._look()
                if self.path is not None and time.monotonic() - saved > SAVED:
                    write_whole(self.path, seal(self.state()))
                    saved = time.monotonic()
        except StoppedRun as error:  # the options' failure; any other is the command's
            stopped = str(error)
        if self.path is not None:
            self.path.unlink(missing_ok=True)
        moves = {"moves": self.moves} if self.moves else {}
        return {"curve": self.curve, "stopped": stopped, "seconds": self.seconds, **moves}

    def _step(self, x: Tensor, y: Tensor, step: int) -> None:
        first: list[float] = []

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            z = self.model(x)
            loss = self.likelihood.nll(z, y).mean()
            if not first:
                first.append(loss.item())
                if not math.isfinite(first[0]):
                    raise NonFiniteLoss(f"the loss is {first[0]} at step {step}")
                if first[0] > EXPLODED * max(self.curve[0]["train_loss"], 1.0):
                    raise NonFiniteLoss(f"the loss has risen to {first[0]:.1e} at step {step}")
                if score(self.likelihood) == "accuracy":
                    self.right += int((z.detach().argmax(-1) == y).sum())
                    self.seen += len(y)
            loss.backward()
            return loss

        try:
            self.optimizer.step(closure)
        except (SingularMatrixError, NonFiniteMatrixError) as error:  # the options led to such weights
            raise StoppedRun(f"step {step}: {error}") from error
        except (RuntimeError, ValueError) as error:
            if finite(self.model):
                raise
            raise NonFiniteLoss(f"step {step} met numbers that are not finite: {error}") from error

    def _look(self) -> None:
        if self.average is None:
            line = self._measured()
        else:
            iterate, averaged = self.average.measured(self._measured)
            line = dict(min(iterate, averaged, key=lambda metrics: metrics["train_loss"]))
            # what averaging is worth is a claim of its own
            for name, metrics in (("iterate", iterate), ("average", averaged)):
                line |= {f"{name}_{key}": value for key, value in metrics.items() if key.startswith("train")}
        if not math.isfinite(line["train_loss"]):
            raise NonFiniteLoss(f"the training loss is {line['train_loss']} after step {self.done}")
        if self.seen:
            line["running_accuracy"] = self.right / self.seen
            self.right = self.seen = 0
        epoch = self.position.epoch + self.position.offset / len(self.batches)
        finite_ones = {key: value for key, value in line.items() if math.isfinite(value)}
        self.curve.append({"step": self.done, "epoch": epoch, "seconds": self.seconds, **finite_ones})

    def _measured(self) -> dict[str, float]:
        limit, data = self.problem.evaluated, self.data
        train = evaluate(self.model, self.likelihood, data.train, limit)
        test = evaluate(self.model, self.likelihood, data.test, limit)
        return {f"train_{k}": v for k, v in train.items()} | {f"validation_{k}": v for k, v in test.items()}

    def state(self) -> State:
        """What the run goes on from."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.values,
            "random": torch.get_rng_state(),
            "position": [self.position.epoch, self.position.offset],
            "counts": [self.done, self.right, self.seen],
            "seconds": self.seconds,
            "curve": self.curve,
            "data": self.data.fingerprint,
            "versions": versions(),
            "moves": self.moves,
        }

    def _resume(self) -> None:
        if self.path is None or not self.path.exists():
            return
        state = read_sealed(self.path)
        if state.get("data", self.data.fingerprint) != self.data.fingerprint:
            raise ValueError(
                f"{self.path} was begun with other examples of {self.problem.dataset} (data); remove it to begin again."
            )
        if told := differing(self.model.state_dict(), state["model"]):
            raise ValueError(
                f"{self.path} was begun with another {self.problem.model} (model): {told}; remove it to begin again."
            )
        if moved := other_versions(state.get("versions")):
            self.moves.append({"step": state["counts"][0], **moved})
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            for name, value in self.average.values.items():
                value.copy_(state["average"][name])
        torch.set_rng_state(state["random"])
        self.position = Position(*state["position"])
        self.done, self.right, self.seen = state["counts"]
        self.seconds, self.curve = state["seconds"], state["curve"]
        self.moves = [*state.get("moves", ()), *self.moves]
