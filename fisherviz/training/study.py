"""Optuna's side of a sweep: the study in its storage, which points are left, and who works on what.

Several processes and machines may work on one study. A worker that dies stops beating, and its trial is handed on.
Points of a grid are queued, so that each is tried once whoever works on it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import itertools
import json
import os
import platform
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fisherviz.support.errors import OptionError
from fisherviz.support.warning import warn
from fisherviz.training.config import BEFORE
from fisherviz.training.space import Space, grid

SAMPLERS = ("grid", "random", "tpe")
FILE = "sqlite:///"
SAID = ("low", "high", "seconds", "stopped", "run")
"""What is said of a finished trial, beside its value and its point."""
SEAL = "seal"
ATTRIBUTE, POINT, WORKER, PLACE = "fisherviz", "point", "worker", "place"
Objective = Callable[[Any, dict[str, Any]], float]


def optuna() -> Any:
    """The library.

    Raises:
        RuntimeError: it is not installed.
    """
    try:
        import optuna as found
    except ImportError as error:
        raise RuntimeError('sweeps need Optuna; run pip install "fisherviz[sweep]".') from error
    return found


@contextmanager
def quietly() -> Iterator[None]:
    """Without Optuna's own lines, its tracebacks, and its warnings about what is experimental in it."""
    library = optuna()
    level = library.logging.get_verbosity()
    library.logging.set_verbosity(library.logging.ERROR)  # a failed trial is told once, by whoever asked
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", library.exceptions.ExperimentalWarning)
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        library.logging.set_verbosity(level)


@contextmanager
def opened_study(
    url: str, name: str, maximise: bool, identity: Mapping[str, Any], heartbeat: int, among: AbstractContextManager[Any]
) -> Iterator[Any]:
    """The study of a name, made if there is none; its connections are closed afterwards.

    Args:
        url: of the storage, sqlite:///... or postgresql://...
        name: of the study.
        maximise: whether larger values are better.
        identity: what the sweep is; a study of another sweep is refused.
        heartbeat: seconds between signs of life; a trial silent for three of them is taken over.
        among: entered while it is opened: two that begin at once would both make the tables of one file.

    Raises:
        ValueError: the storage cannot be used, or the study is another sweep's.
    """
    with ExitStack() as ends:
        with among:
            study = _open(url, name, maximise, heartbeat, ends)
            _check_identity(study, name, identity)
        yield study


def _open(url: str, name: str, maximise: bool, heartbeat: int, ends: ExitStack) -> Any:
    """The study; its storage is closed with `ends`."""
    library = optuna()
    shown = url.rsplit("@", 1)[-1]  # without a password
    retry = library.storages.RetryFailedTrialCallback()
    known = inspect.signature(library.storages.RDBStorage.__init__).parameters
    callback = "heartbeat_stale_trial_callback"
    options: dict[str, Any] = {callback if callback in known else "failed_trial_callback": retry}
    if url.startswith("sqlite:"):
        options["engine_kwargs"] = {"connect_args": {"timeout": 60}}
    try:
        if url.startswith(FILE) and Path(url.removeprefix(FILE)).exists():
            _check_file(url.removeprefix(FILE))
        storage = library.storages.RDBStorage(
            with_driver(url), heartbeat_interval=heartbeat, grace_period=3 * heartbeat, **options
        )
        ends.callback(storage.engine.dispose)
        ends.callback(storage.remove_session)
        study = library.create_study(
            storage=storage, study_name=name, direction="maximize" if maximise else "minimize", load_if_exists=True
        )
    except Exception as error:  # drivers and servers fail in classes of their own
        told = " ".join(str(error).split())[:300]
        raise OptionError(f"storage: {shown} cannot be used: {told}") from error
    _check(study, shown)
    return study


def _check_identity(study: Any, name: str, identity: Mapping[str, Any]) -> None:
    """Refuse another sweep's study, and warn of other data; a new one becomes that of this sweep."""
    plain = json.loads(json.dumps(identity, sort_keys=True))
    found = study.user_attrs.get(ATTRIBUTE)
    if found is None:
        study.set_user_attr(ATTRIBUTE, plain)
        return
    data = plain.pop("data")
    known = found.pop("data", data)  # studies that were begun before have none
    found["base"] = BEFORE | found["base"]
    if found != plain:
        wrong = next(key for key in plain if found.get(key) != plain[key])
        raise OptionError(
            f"storage: the study {name!r} is one with {wrong}={found.get(wrong)!r}, not {plain[wrong]!r}; choose "
            "another study or folder, or give the same options to continue it."
        )
    if known != data:  # no refusal: processors differ in the last digits of data that are standardised or scaled
        warn(
            f"the study {name!r} was begun with other data ({', '.join(known)}, now {', '.join(data)}), and "
            "points finished then are ranked beside those of now; choose another folder if the examples differ."
        )


def _check_file(path: str) -> None:
    """Refuse a SQLite file whose pages do not belong together."""
    with closing(sqlite3.connect(path)) as opened:
        told = opened.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if told != "ok":
        raise ValueError(f"it is damaged ({told}); remove it, and the sweep goes on with the runs that are kept.")


def _check(study: Any, shown: str) -> None:
    """Refuse a study with a trial that cannot be read, or that is not what was written."""
    try:
        for trial in study.get_trials(deepcopy=False):
            attributes = dict(trial.user_attrs)
            seal = attributes.pop(SEAL, None)
            if trial.state.name == "COMPLETE" and seal not in (None, sealed(trial.value, trial.params, attributes)):
                raise ValueError(f"trial {trial.number} is not what was written")
    except Exception as error:  # damaged rows fail in classes of their own
        told = " ".join(str(error).split())[:300]
        raise OptionError(
            f"storage: {shown} is damaged ({told}); remove it, and the sweep goes on with the runs that are kept."
        ) from error


def sealed(value: float, point: Mapping[str, Any], attributes: Mapping[str, Any]) -> str:
    """The checksum of a finished trial.

    Args:
        value: of it.
        point: where it is.
        attributes: what else is said of it.
    """
    said = {name: attributes.get(name) for name in SAID}
    return hashlib.sha256(json.dumps([repr(value), point, said], sort_keys=True).encode()).hexdigest()


@contextmanager
def stored(url: str) -> Iterator[None]:
    """What the storage does not do inside is told in a sentence that names it.

    Args:
        url: of the storage.

    Raises:
        RuntimeError: it failed.
    """
    from sqlalchemy.exc import SQLAlchemyError  # comes with Optuna

    try:
        yield
    except (optuna().exceptions.StorageInternalError, SQLAlchemyError) as error:
        cause = error.__cause__ or error
        told = " ".join(str(cause).split()).partition(" [SQL")[0][:300]
        raise RuntimeError(
            f"storage: {url.rsplit('@', 1)[-1]} cannot be used ({told}); make room there or give another, and the "
            "sweep goes on with the runs that are kept."
        ) from error


def with_driver(url: str) -> str:
    """A PostgreSQL URL that names no driver, with the one that is installed; any other as it is.

    Raises:
        RuntimeError: none is installed.
    """
    scheme, colon, rest = url.partition(":")
    if scheme not in ("postgresql", "postgres"):
        return url
    for driver in ("psycopg", "psycopg2"):
        if importlib.util.find_spec(driver) is not None:
            return f"postgresql+{driver}{colon}{rest}"
    raise RuntimeError("storage: PostgreSQL needs a driver; run pip install psycopg[binary].")


def work(
    study: Any, space: Space, sampler: str, trials: int, seed: int, objective: Objective, heartbeat: int
) -> None:  # fmt: skip
    """Take trials until none is left, or all that are left are finished by others.

    Args:
        study: the study.
        space: what is varied.
        sampler: "grid", "random" or "tpe".
        trials: how many random and tpe try.
        seed: of random and tpe.
        objective: the value of a trial at a point.
        heartbeat: seconds between signs of life.
    """
    points = grid(space) if sampler == "grid" else drawn(space, trials, seed) if sampler == "random" else None
    if points is not None:
        for point in points:
            study.enqueue_trial(point, user_attrs={POINT: _key(point)}, skip_if_exists=True)

    def tried(trial: Any) -> float:
        trial.set_user_attr(WORKER, [platform.node(), os.getpid(), trial.number])
        if points is None:
            trial.set_user_attr(PLACE, place := _place(study, trial.number))
            study.sampler = optuna().samplers.TPESampler(seed=_seed(seed, place), constant_liar=True)
        elif POINT not in trial.user_attrs:
            raise optuna().TrialPruned("another worker took the last point of the grid")
        point = {name: dimension.suggest(trial, name) for name, dimension in space.items()}
        if points is not None and _someone_else(study, trial):
            raise optuna().TrialPruned("two workers queued this point")
        return objective(trial, point)

    _bury(study)
    unclaimed: dict[int, float] = {}
    while (left := _left(study, points, trials)) is not None:
        if left:
            _one(study, tried)
        else:
            time.sleep(1.0)  # others are at work; what they leave behind is taken over
            optuna().storages.fail_stale_trials(study)
            _fail_unclaimed(study, unclaimed, 3 * heartbeat)


def _one(study: Any, tried: Callable[[Any], float]) -> None:
    """One trial; if this worker was silent for so long that another took it over, its result is left to the other."""
    ended: list[int] = []

    def noted(trial: Any) -> float:
        value = tried(trial)
        ended.append(trial.number)
        return value

    try:
        study.optimize(noted, n_trials=1)
    except optuna().exceptions.UpdateFinishedTrialError:
        return
    except Exception as error:  # Optuna fails in several ways where a trial has been failed by somebody else meanwhile
        if ended and study.get_trials(deepcopy=False)[ended[0]].state == optuna().trial.TrialState.FAIL:
            return
        if str(error) == "Should not reach." and error.__context__ is not None:
            raise error.__context__ from None  # why the end of a trial could not be stored, which an assertion hides
        raise


def _left(study: Any, points: list[dict[str, Any]] | None, total: int) -> bool | None:
    """Whether there is a trial to take now; None: all are done."""
    found = study.get_trials(deepcopy=False)
    done, waiting, running = (
        [t for t in found if t.state.name == state] for state in ("COMPLETE", "WAITING", "RUNNING")
    )
    if points is None:
        if len(done) >= total:
            return None
        return bool(waiting) or len(done) + len(running) < total
    if waiting:
        return True
    finished = {_key(t.params) for t in done}
    missing = [point for point in points if _key(point) not in finished]
    if not missing:
        return None
    if running:
        return False
    for point in missing:  # a worker was interrupted before its end
        study.enqueue_trial(point, user_attrs={POINT: _key(point)})
    return True


def _someone_else(study: Any, trial: Any) -> bool:
    """Whether an earlier trial has this point too, and is at work on it or done."""
    states = optuna().trial.TrialState
    mine = trial.user_attrs[POINT]
    return any(
        t.number < trial.number and t.user_attrs.get(POINT) == mine and t.state in (states.RUNNING, states.COMPLETE)
        for t in study.get_trials(deepcopy=False)
    )


def _key(point: Mapping[str, Any]) -> str:
    return json.dumps(point, sort_keys=True)


def drawn(space: Space, trials: int, seed: int) -> list[dict[str, Any]]:
    """The points of a random search: they hang on the seed alone, whoever tries them and whatever is interrupted."""
    samplers = (optuna().samplers.RandomSampler(seed=_seed(seed, number)) for number in range(trials))
    asked = (optuna().create_study(sampler=sampler).ask() for sampler in samplers)
    return [{name: dimension.suggest(trial, name) for name, dimension in space.items()} for trial in asked]


def _seed(*words: int) -> int:
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def _place(study: Any, number: int) -> int:
    """Which of the points a trial draws: the first that none has that did not fail, the trials taken in their order."""
    failed = optuna().trial.TrialState.FAIL
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state != failed]
    taken = {trial.user_attrs[PLACE] for trial in trials if PLACE in trial.user_attrs}
    for trial in trials:
        place = trial.user_attrs.get(PLACE)
        if place is None:
            place = next(free for free in itertools.count() if free not in taken)
            taken.add(place)
        if trial.number == number:
            return int(place)
    return len(trials)  # it has been failed meanwhile, and whatever it draws is nobody's


def _bury(study: Any) -> None:
    """Fail the trials that processes of this machine left when they were killed, without waiting for their silence."""
    states = optuna().trial.TrialState
    for trial in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
        node, process = trial.user_attrs.get(WORKER, ("", 0))[:2]
        if node == platform.node() and not _alive(process):
            study.tell(trial.number, state=states.FAIL, skip_if_finished=True)


def _fail_unclaimed(study: Any, seen: dict[int, float], after: float) -> None:
    """Fail trials that nobody claims: a worker killed before its first sign of life leaves one that never goes stale.

    Args:
        study: the study.
        seen: when this worker has seen which of them first, by its own clock; kept from call to call.
        after: seconds without a claim.
    """
    states, now = optuna().trial.TrialState, time.monotonic()
    for trial in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
        # one that takes a failed one's place has its attributes, and so another's claim; earlier ones had no number
        claim = trial.user_attrs.get(WORKER, [None])
        if len(claim) != 2 and claim[-1] != trial.number and now - seen.setdefault(trial.number, now) >= after:
            study.tell(trial.number, state=states.FAIL, skip_if_finished=True)


def _alive(process: int) -> bool:
    if os.name != "posix":  # elsewhere signal 0 is no question
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def default_storage(out: Path) -> str:
    """The study's own SQLite file."""
    return f"sqlite:///{(out / 'study.db').absolute()}"
