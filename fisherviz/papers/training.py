"""Training comparisons: every method gets the same number of trials, then the same seeds; runs are kept one by one.

A trial is a run with other options; the setting with the lowest final training loss is trained again from seeds that
no trial saw. Each run is a JSON file, written when it ends, so that an interrupted command goes on with the next run.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fisherviz import datasets, models
from fisherviz.network.likelihoods import resolve
from fisherviz.papers.registry import Run
from fisherviz.support.files import write_whole
from fisherviz.support.importing import imported
from fisherviz.support.progress import progress_bar
from fisherviz.training.data import Batches, Position
from fisherviz.training.diagnosis import NonFiniteLoss, finite
from fisherviz.training.evaluation import Average, evaluate
from fisherviz.training.optimizers import make_optimizer

Options = Mapping[str, Any]
FORMAT = 1
TITLES = {"fashion-mnist": "Fashion-MNIST", "mnist": "MNIST", "digits": "digits"}
_load = lru_cache(maxsize=4)(datasets.load)


@dataclass(frozen=True)
class Problem:
    """What is trained.

    Args:
        dataset: name of a data set.
        model: name of a network, or "pkg.mod:factory" called with the number of inputs and `generator`.
        model_options: of the network, as pairs.
        batch: examples per step.
        limit: first training examples that are kept.
        size: side that images are scaled to.
        task: of the data set; None: its usual one.
        standardise: as for `datasets.load`.
        full_at: step at which growing batches hold all examples.
        averaging: ξ of the averaged iterate; the better of it and the last iterate counts.
        evaluated: most examples of each part that are evaluated; None: all.
        dtype: floating-point type.
    """

    dataset: str
    model: str
    model_options: tuple[tuple[str, Any], ...] = ()
    batch: int = 100
    limit: int | None = None
    size: int | None = None
    task: str | None = None
    standardise: bool | None = None
    full_at: int | None = None
    averaging: float | None = None
    evaluated: int | None = None
    dtype: str = "float32"

    def data(self) -> datasets.Dataset:
        """The data set."""
        found = _load(self.dataset, limit=self.limit, size=self.size, task=self.task, standardise=self.standardise)
        return found if self.dtype == "float32" else found.to(dtype=getattr(torch, self.dtype))

    @property
    def title(self) -> str:
        """What the data set is called in sentences."""
        return TITLES.get(self.dataset, self.dataset)

    @property
    def examples(self) -> int:
        """How many training examples there are."""
        return len(self.data().train.inputs)

    def effort(self, epochs: int, trial_epochs: int, trials: int, seeds: int) -> Effort:
        """An effort counted in epochs, with an evaluation after each."""
        epoch = -(-self.examples // self.batch)
        return Effort(epochs * epoch, epoch, seeds, trials, trial_epochs * epoch)


@dataclass(frozen=True)
class Method:
    """One line of a comparison.

    Args:
        name: in tables and legends.
        optimizer: as for `fisherviz train`.
        fixed: options that are not tuned.
        grid: options that are tuned, each with its values in order.
        start: where tuning begins, a value of each.
    """

    name: str
    optimizer: str
    fixed: Options = field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    start: Options = field(default_factory=dict)


@dataclass(frozen=True)
class Effort:
    """How much training each method gets.

    Args:
        steps: of a run that counts.
        look: steps between evaluations.
        seeds: how many runs count.
        trials: settings tried.
        trial_steps: steps of a trial.
    """

    steps: int
    look: int
    seeds: int
    trials: int
    trial_steps: int

    def __str__(self) -> str:
        seeds = f"{self.seeds} seed{'s' if self.seeds > 1 else ''}"
        return (
            f"{self.trials} trials of {self.trial_steps} steps for each tuned method, chosen by final training loss, "
            f"then {self.steps} steps from each of {seeds} that no trial saw; medians, ranges in brackets"
        )


@dataclass(frozen=True)
class Trained:
    """A method after tuning.

    Args:
        method: which.
        options: those that were chosen.
        trials: options and final training loss of every trial.
        runs: one for each seed.
    """

    method: Method
    options: Options
    trials: tuple[tuple[Options, float], ...]
    runs: tuple[dict[str, Any], ...]

    def last(self, key: str) -> list[float]:
        """A metric at the end of each seed's run; a run that broke off counts as the worst that it can be."""
        return [final(run, key) for run in self.runs]

    def at(self, key: str, step: int) -> list[float]:
        """A metric at a step of each seed's run."""
        return [next((line[key] for line in run["curve"] if line["step"] == step), worst(key)) for run in self.runs]

    @property
    def stopped(self) -> int:
        """How many runs broke off."""
        return sum(run["stopped"] is not None for run in self.runs)


def worst(key: str) -> float:
    """What a run that broke off counts as."""
    return -math.inf if key.endswith("accuracy") else math.inf


def final(run: Mapping[str, Any], key: str) -> float:
    """A metric at the end of a run."""
    return worst(key) if run["stopped"] is not None else float(run["curve"][-1][key])


def compare(problem: Problem, methods: Sequence[Method], effort: Effort, run: Run) -> dict[str, Trained]:
    """Tune each method with the same number of trials, then train it from the same seeds.

    Args:
        problem: what is trained.
        methods: the lines of the comparison; one without a grid is not tuned.
        effort: how much training.
        run: seed of the trials (those that count have the next ones), device, where runs are kept.

    Returns:
        Name to method.
    """
    return {method.name: tune(problem, method, effort, run) for method in methods}


def tune(problem: Problem, method: Method, effort: Effort, run: Run) -> Trained:
    """Tune one method and train it; see `compare`."""

    def loss(options: Options) -> float:
        found = trained(problem, method, options, effort.trial_steps, effort.trial_steps, run.seed, run)
        return final(found, "train_loss")

    trials = search(method, effort.trials, loss) if method.grid else []
    options = min(trials, key=lambda trial: trial[1])[0] if trials else {}
    seeds = range(run.seed + 1, run.seed + 1 + effort.seeds)
    runs = tuple(trained(problem, method, options, effort.steps, effort.look, seed, run) for seed in seeds)
    return Trained(method, options, tuple(trials), runs)


def search(method: Method, trials: int, loss: Callable[[Options], float]) -> list[tuple[Options, float]]:
    """Walk over a grid: from the start always to the nearest setting not tried yet around the best so far.

    Args:
        method: with its grid.
        trials: how many settings to try.
        loss: of a setting; lower is better.

    Returns:
        The settings in the order tried, with their losses.
    """
    places = list(itertools.product(*(range(len(values)) for values in method.grid.values())))
    tried: dict[tuple[int, ...], float] = {}
    best = tuple(list(values).index(method.start[name]) for name, values in method.grid.items())

    def chosen(place: Sequence[int]) -> Options:
        return {name: values[i] for (name, values), i in zip(method.grid.items(), place, strict=True)}

    for _ in range(min(trials, len(places))):
        left = [place for place in places if place not in tried]
        here = min(left, key=lambda place: sum(abs(i - j) for i, j in zip(place, best, strict=True)))
        tried[here] = loss(chosen(here))
        best = min(tried, key=lambda place: tried[place])
    return [(chosen(place), value) for place, value in tried.items()]


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
        "curve" (a line per evaluation: step, epoch, train_loss, ...), "stopped" (why it broke off, or None), "seconds".
    """
    what = {
        "problem": asdict(problem), "optimizer": method.optimizer,
        "options": {**method.fixed, **options}, "steps": steps, "look": look, "seed": seed, "device": run.device,
    }  # fmt: skip
    title = f"{problem.dataset} {method.name} {' '.join(f'{k}={v:g}' for k, v in options.items())} seed {seed}"

    def measure() -> dict[str, Any]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return _train(problem, what, title, run)

    return kept(what, measure, run)


def kept(what: Mapping[str, Any], measure: Callable[[], dict[str, Any]], run: Run) -> dict[str, Any]:
    """A measurement, or what is kept of it.

    Args:
        what: everything that decides it, as JSON holds it.
        measure: makes it.
        run: where measurements are kept.

    Returns:
        It, with `what`.
    """
    text = json.dumps({"format": FORMAT, **what}, sort_keys=True)
    path = None if run.work is None else run.work / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"
    if path is not None and path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    found = {"what": json.loads(text), **measure()}
    if path is not None:
        write_whole(path, json.dumps(found, indent=1, allow_nan=False) + "\n")
    return found


def _train(problem: Problem, what: Mapping[str, Any], title: str, run: Run) -> dict[str, Any]:
    data = problem.data().to(run.device)
    likelihood = resolve(data.likelihood)
    model = build(problem, data, what["seed"]).to(device=run.device, dtype=getattr(torch, problem.dtype))
    batches = Batches(*data.train, problem.batch, problem.full_at, what["seed"])
    optimizer = make_optimizer(what["optimizer"], what["options"], model, likelihood, batches, "paper")
    average = None if problem.averaging is None else Average(model, problem.averaging)
    position, curve, stopped, seconds = Position(), [], None, 0.0

    def look(step: int) -> None:
        line = _measured(model, likelihood, data, problem.evaluated)
        if average is not None:
            with average.inside():
                other = _measured(model, likelihood, data, problem.evaluated)
            line = min(line, other, key=lambda metrics: metrics["train_loss"])
        if not math.isfinite(line["train_loss"]):
            raise NonFiniteLoss(f"the training loss is {line['train_loss']} after step {step}")
        kept = {key: value for key, value in line.items() if math.isfinite(value)}
        epoch = position.epoch + position.offset / len(batches)
        curve.append({"step": step, "epoch": epoch, **kept})

    try:
        look(0)
        for step in progress_bar(range(1, what["steps"] + 1), title, "step", run.progress):
            x, y, position = batches.take(position, step)
            began = time.process_time()
            _step(model, likelihood, optimizer, x, y, step)
            seconds += time.process_time() - began
            if average is not None:
                average.update()
            if step % what["look"] == 0 or step == what["steps"]:
                look(step)
    except NonFiniteLoss as error:  # the options' failure; any other is the command's
        stopped = str(error)
    return {"curve": curve, "stopped": stopped, "seconds": seconds}


def _step(model: nn.Module, likelihood: Any, optimizer: Any, x: Tensor, y: Tensor, step: int) -> None:
    first: list[float] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = likelihood.nll(model(x), y).mean()
        if not first:
            first.append(loss.item())
            if not math.isfinite(first[0]):
                raise NonFiniteLoss(f"the loss is {first[0]} at step {step}")
        loss.backward()
        return loss

    try:
        optimizer.step(closure)
    except (RuntimeError, ValueError) as error:
        if finite(model):
            raise
        raise NonFiniteLoss(f"step {step} met numbers that are not finite: {error}") from error


def _measured(model: nn.Module, likelihood: Any, data: datasets.Dataset, limit: int | None) -> dict[str, float]:
    train = evaluate(model, likelihood, data.train, limit)
    test = evaluate(model, likelihood, data.test, limit)
    return {f"train_{k}": v for k, v in train.items()} | {f"validation_{k}": v for k, v in test.items()}


def build(problem: Problem, data: datasets.Dataset, seed: int) -> nn.Module:
    """The network of a problem with a seed's weights."""
    options = dict(problem.model_options)
    if ":" in problem.model:
        return imported(problem.model)(data.inputs, generator=torch.Generator().manual_seed(seed), **options)
    return models.build(problem.model, seed=seed, dataset=data, **options)


def at_hand(name: str, run: Run) -> bool:
    """Whether a data set is to be used: at "paper" always, at "desk" if its files are there, at "smoke" never."""
    return run.scale == "paper" or (run.scale == "desk" and datasets.where(name) is not None)
