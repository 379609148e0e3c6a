"""Which passes count in training: loops of all kinds with every optimizer against what the rule says of each."""

from __future__ import annotations

import math
import random
import time
import warnings
from collections.abc import Callable
from typing import Any

import fisherviz as fv
from benchmarks.markdown import table
from benchmarks.trust.dense import Dense
from benchmarks.trust.loops import LOOPS, WORKERS, Make, Trial
from benchmarks.trust.random_loops import ACTIONS, Walk

TITLE = "Which passes count in training"
LR, DAMPING = 0.05, 0.1
TOLERANCE = 1e-8


def natural(method: str, kind: str) -> Make:
    """`NaturalGradient` of the step's own statistics."""
    return lambda m, like: fv.optim.NaturalGradient(m, like, method, lr=LR, damping=DAMPING, decay=0.0, kind=kind)


def preset(name: str, **options: Any) -> Make:
    """A preset without what joins steps."""
    common = {"lr": LR, "damping": DAMPING, "momentum": 0.0, "kl_clip": math.inf}
    return lambda m, like: getattr(fv.optim, name)(m, like, **(common | options))


KINDS = ("exact", "mc", "empirical")
FIXED = {"rescale": False, "adapt": False}


def presets() -> dict[str, tuple[Make, Dense | None]]:
    """Every optimizer of each kind, with its dense oracle where it has one."""
    made: dict[str, tuple[Make, Dense | None]] = {}
    for method, oracle in {
        "exact": "exact",
        "layer": "layer",
        "kfac": "kfac",
        "ekfac": "ekfac",
        "diagonal": "diagonal",
    }.items():
        for kind in KINDS:
            made[f"NaturalGradient {method}, {kind}"] = natural(method, kind), Dense(oracle, kind, LR, DAMPING)
    for kind in KINDS:
        made[f"KFAC plain, {kind}"] = (
            preset("KFAC", **FIXED, decay=0.0, kind=kind),
            Dense("kfac-factored", kind, LR, DAMPING),
        )
        made[f"EKFAC, {kind}"] = preset("EKFAC", decay=0.0, T=1, kind=kind), Dense("ekfac", kind, LR, DAMPING)
        made[f"TENGraD, {kind}"] = preset("TENGraD", kind=kind), Dense("layer", kind, LR, DAMPING)
        made[f"CWNGD, {kind}"] = preset("CWNGD", kind=kind), Dense("units", kind, LR, DAMPING)
        made[f"KFAC block-tridiagonal, {kind}"] = (
            preset("KFAC", **FIXED, inverse="block-tridiagonal", kind=kind),
            None,
        )
        made[f"KFAC every 10, averaged, {kind}"] = preset("KFAC", **FIXED, T=10, kind=kind, momentum=0.9), None
        made[f"NaturalGradient nearest-kronecker, {kind}"] = natural("nearest-kronecker", kind), None
    made["FOOF"] = preset("FOOF", decay=0.0), Dense("foof", "exact", LR, DAMPING)
    made["FOOF averaged"] = preset("FOOF"), None
    for kind in KINDS[:2]:
        made[f"SubsampledNaturalGradient same, {kind}"] = (
            preset("SubsampledNaturalGradient", fisher_data="same", kind=kind),
            Dense("inputs", kind, LR, DAMPING),
        )
        made[f"SubsampledNaturalGradient, {kind}"] = preset("SubsampledNaturalGradient", kind=kind), None
        made[f"KFAC rescaled, {kind}"] = (
            lambda m, like, kind=kind: fv.optim.KFAC.paper(
                m, like, damping=0.5, kind=kind, adapt=False, tau1=1.0, tau2=1.0
            ),
            None,
        )
        made[f"KFAC complete, {kind}"] = (
            lambda m, like, kind=kind: fv.optim.KFAC.paper(
                m, like, damping=0.5, T=2, T1=2, T2=4, tau1=1.0, tau2=1.0, kind=kind
            ),
            None,
        )
        made[f"HessianFree, {kind}"] = (
            lambda m, like, kind=kind: fv.optim.HessianFree.paper(m, like, damping=1.0, kind=kind),
            None,
        )
        made[f"KSD, {kind}"] = (
            lambda m, like, kind=kind: fv.optim.KSD.paper(m, like, dimension=3, iterations=4, kind=kind),
            None,
        )
        made[f"NaturalGradient kfra, {kind}"] = natural("kfra", kind), None
    made["KBFGS"] = lambda m, like: fv.optim.KBFGS(m, like, lr=LR, damping=0.3), None
    return made


def tried(run: Callable[[Trial], None], make: Make, oracle: Dense | None, seed: int = 0) -> tuple[str, float, str]:
    """How a loop ends with an optimizer: "equal", "warned", "refused", or "wrong"; the difference; what was said."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        t = Trial(make, oracle, seed)
        try:
            run(t)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            if type(error).__module__ != "builtins" or not str(error).endswith("."):
                return "wrong", t.worst, f"{type(error).__name__}: {error}"
            return "refused", t.worst, str(error)
    other = [sentence for sentence in t.said if not sentence.startswith(SCALE)]
    if not other and (t.unsayable or t.worst > TOLERANCE):
        return "wrong", t.worst, ""
    return ("warned" if t.said else "equal"), t.worst, (other or t.said or [""])[0]


SCALE = "the step averages"
"""How the warning begins that scores of several passes are taken for those of means: the step is the oracle's still."""


def measure(long: bool) -> dict[str, Any]:
    """Every loop with every optimizer, or with a share of them; then loops drawn at random."""
    names = list(presets())
    kinds = LOOPS | {"worker processes": WORKERS}
    rows: dict[str, Any] = {kind: _row(len(loops)) for kind, loops in kinds.items()}
    wrong: list[dict[str, Any]] = []
    begun = time.monotonic()
    for turn in range(ROUNDS):  # each loop with other optimizers in every turn, until all have been tried
        at = turn
        for kind, loops in kinds.items():
            for name, run in loops.items():
                for chosen in names[at % ROUNDS :: ROUNDS]:
                    _enter(rows[kind], wrong, f"{name}, {chosen}", tried(run, *presets()[chosen]))
                at += 1
        if not long or time.monotonic() - begun > SECONDS["loops"]:
            break
    drawn = _row(0) | {"steps": 0}
    begun = time.monotonic()
    for seed in range(100_000 if long else 40):
        if time.monotonic() - begun > SECONDS["random loops"]:
            break
        chosen = random.Random(seed).choice(names)
        walk = Walk(seed)
        known = len(wrong)
        _enter(drawn, wrong, f"random loop {seed}, {chosen}", tried(walk, *presets()[chosen], seed))
        for one in wrong[known:]:
            one["did"] = walk.done
        drawn["loops"] += 1
        drawn["steps"] += walk.done.count("a step")
    return {"optimizers": len(names), "actions": len(ACTIONS), "kinds": rows, "random": drawn, "wrong": wrong}


ROUNDS = 16
SECONDS = {"loops": 700.0, "random loops": 300.0}
"""After which no further round begins, and no further random loop."""


def _row(loops: int) -> dict[str, Any]:
    return {"loops": loops, "tried": 0, "equal": 0, "warned": 0, "refused": 0, "worst": 0.0}


def _enter(row: dict[str, Any], wrong: list[dict[str, Any]], name: str, found: tuple[str, float, str]) -> None:
    how, worst, said = found
    row["tried"] += 1
    if how == "wrong":
        wrong.append({"what": name, "difference": worst, "said": said})
        return
    row[how] += 1
    if how == "equal":
        row["worst"] = max(row["worst"], worst)


def broken(found: dict[str, Any]) -> list[str]:
    """Loops whose step was another than the rule says, without a word."""
    return [
        f"{one['what']}: the step differs by {one['difference']:.1e}, and what was said is {one['said']!r}"
        for one in found["wrong"]
    ]


def _where(wrong: list[dict[str, Any]]) -> str:
    """What the loops have in common whose steps are open."""
    frozen = sum("freezing or thawing" in one.get("did", ()) for one in wrong)
    return f", {frozen} of them where a layer was frozen or thawed between two passes" if frozen else ""


def words(found: dict[str, Any]) -> list[str]:
    """The rule's table."""
    kinds, drawn = found["kinds"], found["random"]
    rows = [(kind, row, f"{row['loops']}") for kind, row in kinds.items()]
    rows.append(("drawn at random", drawn, f"{drawn['loops']}"))
    body = [
        [kind, loops, str(row["tried"]), str(row["equal"]), str(row["warned"]), str(row["refused"]),
         f"{row['worst']:.0e}" if row["equal"] else "–"]
        for kind, row, loops in rows
    ]  # fmt: skip
    tried_in_all = sum(row["tried"] for _, row, _ in rows)
    return [
        "The rule is stated in [training](use/training.md#which-passes-count). Loops were run with "
        f"{found['optimizers']} optimizers: every preset, with every kind of Fisher that it takes. Each step was "
        "compared with that of dense float64 matrices made by plain autograd from exactly the examples that count; "
        "where a preset has no such matrix (K-BFGS, Hessian-free, re-scaled and averaged steps), with one that saw "
        "nothing but those passes. "
        f"Of {tried_in_all} trainings {len(found['wrong'])} took another step without a word{_where(found['wrong'])}.",
        table(["loops", "how many", "trainings", "equal", "said", "refused", "largest relative difference"], body),
        f"Random loops join {found['actions']} actions (passes, dropped gradients, freezing, attacks, evaluation, …) "
        f"in any order, {drawn['steps']} steps in all. *Said* are trainings with a warning: of the scale that several "
        "passes' losses are taken to have, where scores are read from them, and wherever a part of the gradient is in "
        "no Fisher; *refused* are those that end in a sentence.",
    ]
