"""Sweeps: many runs over any fields of a configuration, and the best of them; a sweep that was stopped goes on.

Every point is trained with the same number of seeds and judged by the mean of one metric. Runs live in the sweep's
folder under the digest of their configuration, so that a trial that somebody left goes on from its checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from fisherviz.results.run import load_run
from fisherviz.support import files
from fisherviz.support.choices import count, one_of
from fisherviz.support.errors import OptionError, option
from fisherviz.support.names import no_formula
from fisherviz.support.tables import html_table
from fisherviz.training.config import Config, make_config
from fisherviz.training.diagnosis import NonFiniteLoss
from fisherviz.training.network import usable
from fisherviz.training.run import Say, Session, train
from fisherviz.training.space import Space, configure, load_preset, make_space, probes
from fisherviz.training.study import (
    SAID,
    SAMPLERS,
    SEAL,
    default_storage,
    opened_study,
    optuna,
    quietly,
    sealed,
    stored,
    work,
)

DATA = {"dataset", "size", "task", "standardise", "limit", "data_seed", "model", "dtype", "device"}
"""Fields that the data set hangs on."""


@dataclass(frozen=True, eq=False)
class Sweep:
    """A sweep's trials, best first.

    Args:
        path: its folder.
        metric: what they are judged by.
        maximise: whether larger is better.
        table: one row per finished point: value, low and high of its seeds, what was varied, seconds, run.
        space: what is varied.
        suffix: of its files' names, where it is not the folder's own study.
    """

    path: Path
    metric: str
    maximise: bool
    table: pd.DataFrame
    space: Space = field(default_factory=dict)
    suffix: str = ""

    @property
    def files(self) -> tuple[Path, Path]:
        """The table, which `sweep` writes, and the picture, which the command does."""
        return self.path / f"runs{self.suffix}.csv", self.path / f"sweep{self.suffix}.png"

    @property
    def varied(self) -> tuple[str, ...]:
        """Names of what was varied."""
        return tuple(c for c in self.table.columns if c not in ("value", "low", "high", "seconds", "stopped", "run"))

    @property
    def best(self) -> dict[str, Any]:
        """What was varied, at the best point: the values themselves, as a configuration takes them."""
        labels = self.table.iloc[0][list(self.varied)].to_dict() if len(self.table) else {}
        return {name: self.space[name].value(v) if name in self.space else v for name, v in labels.items()}

    def __repr__(self) -> str:
        if not len(self.table):
            return f"Sweep({str(self.path)!r}, no point finished)"
        at = ", ".join(f"{k.split('.')[-1]}={v}" for k, v in self.best.items())
        return f"Sweep({len(self.table)} points, best {self.metric} {self.table['value'].iloc[0]:.4g} at {at})"

    def _repr_html_(self) -> str:
        shown = self.table.head(20)
        rows = [
            [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row]
            for row in shown.itertuples(index=False)
        ]
        return html_table([str(name) for name in shown], rows, words=(), caption=repr(self))


def sweep(
    base: Mapping[str, Any] | Config | None = None,
    over: Mapping[str, Any] | None = None,
    *,
    preset: str | None = None,
    sampler: str = "grid",
    trials: int = 20,
    metric: str | None = None,
    seeds: int = 1,
    out: str | Path = "sweeps/sweep",
    storage: str | None = None,
    study: str | None = None,
    heartbeat: int = 10,
    say: Say | None = None,
) -> Sweep:
    """Run a sweep, or help with one that other processes work on, or go on with one that was stopped.

    Args:
        base: fields of `Config` that stay the same.
        over: what is varied: name to a list of values, or "LOW..HIGH"; options of the optimizer by their bare names.
        preset: a grid that ships with the package: benzing, benzing-sgd, benzing-adam.
        sampler: "grid", "random" or "tpe".
        trials: points of random and tpe.
        metric: of the final evaluation, by whose mean over the seeds a point is judged; None: train_loss.
        seeds: runs per point, with the seeds base.seed, base.seed + 1, ...
        out: folder of this machine's runs, the table and, by default, the study.
        storage: Optuna storage; None: SQLite in `out`. A postgresql:// URL is shared by any number of machines.
        study: name of the study; None: the folder's name. Another in the folder's own storage has files of its own.
        heartbeat: seconds between a worker's signs of life.
        say: told each finished point, a line at a time.

    Returns:
        The finished points, best first.

    Raises:
        ValueError: a field, a value, the storage or the study is wrong.
        RuntimeError: Optuna is not installed.
    """
    fields = dict(base.model_dump(exclude_unset=True) if isinstance(base, Config) else base or {})
    grids = load_preset(preset) if preset is not None else {}
    fields = grids.get("base", {}) | fields
    space = make_space({**grids.get("over", {}), **(over or {})})
    metric = metric or grids.get("metric") or "train_loss"
    with option("sampler"):
        one_of("it", sampler, SAMPLERS)
    for name, value in (("trials", trials), ("seeds", seeds), ("heartbeat", heartbeat)):
        with option(name):
            count("it", value)
    if seeds > 1 and "seed" in space:
        raise OptionError("over: seed is varied and seeds asks for several too; leave one of them out.")
    first = make_config(fields).seed
    make_config(fields, {"seed": first + seeds - 1})
    data = _try(fields, space, probes(space, sampler == "grid"), metric)
    folder = Path(out)
    maximise = metric.endswith("accuracy")
    identity = {
        "base": {k: v for k, v in make_config(fields).identity().items() if k not in space},
        "over": {name: dimension.plain() for name, dimension in space.items()},
        "epochs": make_config(fields).epochs, "max_steps": make_config(fields).max_steps,
        "sampler": sampler, "metric": metric, "seeds": seeds, "data": data,
    }  # fmt: skip
    with option("out"):
        files.check_place(folder, directory=True)
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    url = storage or default_storage(folder)
    tell = say or (lambda line: None)

    def objective(trial: Any, point: dict[str, Any]) -> float:
        config = configure(fields, space, point, out=None, quiet=True)
        place = folder / "runs" / _digest(config)
        values, seconds, stopped = [], 0.0, []
        for seed in range(first, first + seeds):
            one = config.model_copy(update={"seed": seed} if "seed" not in space else {})
            path = place / f"seed-{one.seed}"
            try:
                run = train(one.model_copy(update={"out": path}))
                values.append(float(run.summary["final"].get(metric, _worst(maximise))))
            except NonFiniteLoss as error:  # the point's failure; any other is the sweep's
                run = load_run(path)
                values.append(_worst(maximise))
                stopped.append(str(error))
            seconds += run.summary["seconds"]["total"]
        value = float(np.mean(values))
        said = dict(zip(SAID, (min(values), max(values), seconds, " ".join(stopped[:1]), str(place)), strict=True))
        said = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in said.items()}
        for key, attribute in (said | {SEAL: sealed(value, point, said)}).items():
            trial.set_user_attr(key, attribute)
        tell(f"{metric} {value:.4g}  " + "  ".join(f"{k.split('.')[-1]}={v}" for k, v in point.items()))
        return value

    named = study or folder.name
    with quietly(), stored(url), opened_study(url, named, maximise, identity, heartbeat, files.held(folder)) as opened:
        work(opened, space, sampler, trials, first, objective, heartbeat)
        suffix = "" if storage or named == folder.name else _suffix(named)
        found = Sweep(folder, metric, maximise, _table(opened, list(space), maximise), space, suffix)
    written = found.table.map(lambda cell: no_formula(cell) if isinstance(cell, str) else cell)
    files.write_whole(found.files[0], written.rename(columns=no_formula).to_csv(index=False))
    return found


def _try(fields: Mapping[str, Any], space: Space, points: list[dict[str, Any]], metric: str) -> list[str]:
    """Build what a run at each point needs, so that whatever is refused is refused before the first run.

    Returns:
        The fingerprints of the data sets, in the order of their first point.
    """
    dataset, seen = None, {}
    for point in points:
        config = configure(fields, space, point, out=None, quiet=True)
        usable(config.device)
        with torch.random.fork_rng():
            session = Session(config, dataset)
        with option("metric"):
            one_of("it", metric, session.metrics)
        seen[session.dataset.fingerprint] = True
        dataset = None if space.keys() & DATA else session.dataset
    return list(seen)


def _suffix(study: str) -> str:
    """The end of a study's file names: its own, without what is no part of a file's name."""
    plain = re.sub(r"[^\w.-]+", "_", study)
    return f"-{plain}" if plain == study else f"-{plain}-{hashlib.sha256(study.encode()).hexdigest()[:6]}"


def _worst(maximise: bool) -> float:
    return -math.inf if maximise else math.inf


def _digest(config: Config) -> str:
    plain = {k: v for k, v in config.plain().items() if k not in ("seed", "out", "quiet")}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def _table(study: Any, names: list[str], maximise: bool) -> pd.DataFrame:
    """Finished points, each once, best first."""
    done = [t for t in study.get_trials(deepcopy=False) if t.state == optuna().trial.TrialState.COMPLETE]
    rows = [
        {"value": t.value, "low": float(t.user_attrs["low"]), "high": float(t.user_attrs["high"]), **t.params,
         "seconds": t.user_attrs["seconds"], "stopped": t.user_attrs["stopped"], "run": t.user_attrs["run"]}
        for t in done
    ]  # fmt: skip
    columns = ["value", "low", "high", *names, "seconds", "stopped", "run"]
    table = pd.DataFrame(rows, columns=columns)
    for name in names:  # pandas writes NaN for None among numbers and texts
        own: list[Any] = [row[name] for row in rows]
        if None in own:
            table[name] = pd.Series(own, dtype=object)
    table = table.drop_duplicates(names)
    return table.sort_values("value", ascending=not maximise, kind="stable").reset_index(drop=True)
