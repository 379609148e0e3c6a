"""The main job behind `fisherviz report`: a trained network, its exact Fisher, every approximation, the page.

Without a model it is the example of the K-FAC paper's figure 2: a tanh network with five hidden layers of 20
trained to 5 % error, its middle four layers jointly, then all layers one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import nn

from fisherviz import models
from fisherviz.approximations import FAILURES, approximations, resolve
from fisherviz.commands.again import command_of
from fisherviz.commands.inputs import Data, load_data, load_model
from fisherviz.commands.job import Job
from fisherviz.commands.outputs import picked
from fisherviz.commands.weights import load_weights
from fisherviz.comparison.compare import compare, compare_in, piece_of
from fisherviz.comparison.keeping import ALIKE, comparison_of, comparison_state, identity
from fisherviz.exact.cumulants import cumulants
from fisherviz.exact.fisher import Fisher
from fisherviz.network import likelihoods
from fisherviz.network.vectors import KINDS
from fisherviz.probe import Probe
from fisherviz.report.page import write_report
from fisherviz.report.section import PAPER_SETTING, Section
from fisherviz.results.comparison import WHOLE, Comparison
from fisherviz.results.metrics import check_metrics, needing
from fisherviz.support.choices import one_of
from fisherviz.support.errors import OptionError, option
from fisherviz.support.files import check_place
from fisherviz.support.numbers import human
from fisherviz.support.pieces import Pieces
from fisherviz.support.plan import Plan, billions, duration
from fisherviz.support.processes import ALONE, Processes
from fisherviz.support.progress import progress_bar
from fisherviz.training.network import usable

ERROR = 0.05  # share of wrong training examples at which the K-FAC paper's figure 2 was taken
DATA = "digits:16"
CUMULANT_PARAMETERS = 3000
JOINTLY = "all layers jointly"
"""What the piece of the first section is called."""
OWN_WEIGHTS = "the factory's own, which are random unless it loads some"


def run(job: Job, say: Callable[[str], None] = print, processes: Processes = ALONE) -> list[Section]:
    """Do the job and write its folder.

    Args:
        job: what to report on.
        say: told what is going on, a line at a time.
        processes: that share the work, all with the same job; the first alone says and writes anything.

    Returns:
        The sections of the page.

    Raises:
        OptionError: an option cannot be followed; the message begins with it.
        ValueError: the network, its data or a matrix refuses.
    """
    if processes.rank > 0:
        job, say = job.model_copy(update={"quiet": True}), lambda line: None
    with processes.agreeing("the network and its data"):
        device = _checked(job)
        with option("--likelihood"):
            asked = None if job.likelihood is None else likelihoods.resolve(job.likelihood)
        data = load_data(job.data or DATA, job.examples, likelihood=asked, progress=not job.quiet)
        likelihood, chosen = data.likelihood_for(job.likelihood, job.targets)
        with option("--likelihood"):
            likelihoods.resolve(likelihood)
        model, settings = _network(job, data)
        said = f"{settings['model']}: {_first(settings)}; {likelihood} likelihood"
        if chosen:
            settings["likelihood chosen"] = chosen
            said += f" ({chosen}{'; --likelihood gives another' if chosen.startswith('a guess') else ''})"
        say(f"{said}.")
        model.to(device)
        output = partial(picked, job.output)
        data = data.shaped_for(model, output)
    if processes.count > 1:
        settings["processes"] = processes.count
    joint_layers = job.layers
    if job.model is None and job.layers is None:
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        joint_layers = tuple(linear[1:-1])

    def fisher(layers: Sequence[str] | None, together: bool = False) -> Fisher:
        with option("--model" if layers is None else "--layers"):
            probe = Probe(model, likelihood, layers=layers, output=output)
        generator = torch.Generator(device).manual_seed(job.seed)
        return probe.fisher(data.batches, job.targets, kind=job.kind, generator=generator, processes=together)

    joint = fisher(joint_layers, together=processes.count > 1)
    joint.look()  # the table then tells each layer's path as it is
    say(repr(joint.probe))
    everything = joint_layers if job.layers is not None else fisher(None).space.names
    alone = everything if everything and len(everything) > 1 and not job.compare_only else ()
    plan = compare(joint, job.methods, metrics=job.metrics, plan=True)
    if job.plan:
        _say_plan(job, plan, fisher, everything or (), say)
        return []
    said = f"To be done{', before each layer alone' if alone else ''}: {plan.verdict}"
    decided = identity(joint, resolve(job.methods), _decisive(job))
    with Pieces(job.out, decided, "report", processes, say, ALIKE) as pieces:
        say(said)
        sections = [_jointly(job, joint, settings, data, pieces)]
        if alone:
            sections.append(_one_by_one(job, fisher, alone, settings, pieces, sections[0].comparison))
        for section in sections:
            section.comparison.meta["command"] = command_of(job)
        with processes.agreeing("the page"):
            if processes.rank == 0:
                _write(job, sections, pieces)
    return sections


def _decisive(job: Job) -> dict[str, Any]:
    """What of a job decides its numbers and words, as JSON holds it."""
    return job.model_dump(mode="json", exclude={"out", "plan", "quiet"})


@option("--out")
def _write(job: Job, sections: Sequence[Section], pieces: Pieces) -> None:
    """The whole report, or its numbers, in the place of what was kept of it."""
    if job.compare_only:
        pieces.commit(sections[0].comparison.to_files())
        return
    with progress_bar(None, "drawing", "picture", not job.quiet) as bar:
        write_report(job.out, sections, progress=lambda name: bar.update(), remove=pieces.names())


def _say_plan(
    job: Job, jointly: Plan, fisher: Callable[[Sequence[str] | None], Fisher], layers: Sequence[str],
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """What both sections of the page will take."""
    say(repr(jointly))
    if len(layers) > 1 and not job.compare_only:
        methods, _ = differing_alone(job.methods or tuple(approximations))
        plans = [compare(fisher([name]), methods, metrics=job.metrics, plan=True) for name in layers]
        count, seconds = sum(p.multiply_adds for p in plans), sum(p.seconds for p in plans)
        say(
            f"Then each of {len(layers)} layers alone: {sum(p.passes for p in plans):.1f} passes and "
            f"{billions(count)} billion multiply-adds, about {duration(seconds)} here; the largest peak is "
            f"{human(max(p.bytes for p in plans))}."
        )


def _checked(job: Job) -> torch.device:
    for name in ("methods", "layers", "metrics"):
        if getattr(job, name) == ():
            raise OptionError(f"--{name}: give at least one name.")
    if job.weights is not None and job.model is None:
        raise OptionError("--weights: they need their network; give --model package.module:factory too.")
    if job.model is not None and job.data is None:
        raise OptionError("--data: say what the network was trained on, a data set or package.module:loader.")
    with option("--kind"):
        one_of("kind", job.kind, KINDS)
    with option("--metrics"):
        check_metrics(job.metrics)
    if job.model is None:
        _check_methods(job)
    if job.damping is not None and not 0 < job.damping < math.inf:
        raise OptionError(f"--damping: {job.damping} does not damp; choose a positive number.")
    if not 0 <= job.seed < 2**63:
        raise OptionError(f"--seed: {job.seed} is no seed; choose a whole number from 0 to 2^63 - 1.")
    with option("--out"):
        check_place(job.out, directory=True)
        if job.compare_only and (job.out / "index.html").exists():
            raise ValueError(f"{job.out} holds a page, which would no longer tell the numbers beside it; give another.")
    return usable(job.device)


@option("--methods")
def _check_methods(job: Job) -> None:
    resolve(job.methods)


def _network(job: Job, data: Data) -> tuple[nn.Module, dict[str, Any]]:
    """The network to look at, and what to say about it."""
    settings: dict[str, Any] = {"data": data.name, "seed": job.seed, "device": job.device}
    if job.model is not None:
        model = load_model(job.model)
        _check_methods(job)  # the model's module may have registered its own
        weights = OWN_WEIGHTS
        if job.weights is not None:
            part = load_weights(model, job.weights)
            weights = f"{job.weights} ({part})" if part else str(job.weights)
        return model, {"model": job.model, "weights": weights, **settings}
    if data.dataset is None or data.dataset.task != "classification":
        raise OptionError(f"--model: {data.name} is no classification to train a network on; give yours.")
    network = models.build("kfac-mlp", seed=job.seed, dataset=data.dataset)
    inputs, targets = data.batches
    history = models.train_to_error(network, inputs, targets, error=ERROR, progress=not job.quiet)
    error, steps = f"{history['error'][-1]:.2%}", history["steps"]
    widths = [module.in_features for module in network if isinstance(module, nn.Linear)]
    name = "-".join(map(str, [*widths, data.dataset.outputs]))
    paper = {"setting": PAPER_SETTING} if job.kind == "exact" and job.layers is None else {}
    trained = f"full-batch Adam, {steps} steps, {error} training error"
    return network.eval(), {"model": f"{name}, tanh", "trained by": trained, **settings, **paper}


def _first(settings: dict[str, Any]) -> str:
    """Where the network's weights come from."""
    if "trained by" in settings:
        return f"trained here ({settings['trained by']})"
    hint = "; --weights reads others" if settings["weights"] == OWN_WEIGHTS else ""
    return f"weights: {settings['weights']}{hint}"


def _jointly(job: Job, fisher: Fisher, settings: dict[str, Any], data: Data, pieces: Pieces) -> Section:
    comparison = pieces.found(JOINTLY, comparison_of)
    if comparison is None:
        comparison = _compared(job, fisher, settings, data, pieces)
        if pieces.processes.rank == 0:
            pieces.keep(JOINTLY, comparison_state(comparison))
            pieces.drop(map(piece_of, comparison.methods))
    else:
        pieces.tell(len(comparison.methods), len(comparison.methods), "method")
    if job.compare_only:
        return Section("", comparison)
    count = len(fisher.space.names)
    middle = job.model is None and job.layers is None
    title = "The middle four layers, jointly" if middle else "All probed layers, jointly" if count > 1 else ""
    intro = (
        f"{fisher.shape[0]:,} parameters of {count} {'layers' if count > 1 else 'layer'} as one matrix, "
        f"{fisher.examples:,} examples."
    )
    return Section(title, comparison, intro)


def _compared(job: Job, fisher: Fisher, settings: dict[str, Any], data: Data, pieces: Pieces) -> Comparison:
    """All methods on all layers together."""
    comparison: Comparison = compare_in(
        pieces, fisher, job.methods, damping=job.damping, metrics=job.metrics, progress=not job.quiet
    )
    comparison.meta["settings"] = {**settings, **comparison.meta.get("settings", {})}
    comparison.meta["notes"] += list(data.notes)
    if job.compare_only:
        return comparison
    if fisher.shape[0] > CUMULANT_PARAMETERS:
        comparison.meta["notes"].append(
            f"cumulant sums are left out: they take P² numbers, and P is above {CUMULANT_PARAMETERS:,} here."
        )
        return comparison
    try:
        bound = cumulants(fisher)
    except NotImplementedError as error:
        comparison.meta["notes"].append(f"cumulant sums are left out: {error}")
    else:
        comparison.meta["cumulants"] = {"error": float(bound.error), "bound": float(bound.bound)}
    return comparison


def _one_by_one(
    job: Job,
    fisher: Callable[[Sequence[str] | None], Fisher],
    layers: Sequence[str],
    settings: dict[str, Any],
    pieces: Pieces,
    jointly: Comparison,
) -> Section:
    """Each layer's block alone, with the λ of the joint view: what both show has one value."""
    methods, same = differing_alone(job.methods or tuple(approximations))
    kept = {name: pieces.found(_alone(name), comparison_of) for name in layers}
    taken = {name: comparison for name, comparison in kept.items() if comparison is not None}
    pieces.tell(len(taken), len(layers), "layer")
    bar = progress_bar(len(layers), "layer by layer", "layer", not job.quiet)

    def compared(name: str) -> Comparison | str:
        try:
            if name in taken:
                return taken[name]
            found = compare(
                fisher([name]), methods, damping=jointly.meta["damping"], metrics=job.metrics, progress=False
            )
            found.arrays.clear()  # the section has no pictures of single layers
            pieces.keep(_alone(name), comparison_state(found))
            return found
        except FAILURES as error:
            return f"Layer {name} is left out: {error}"
        finally:
            bar.update()

    with bar:  # each layer is one process's: with its own passes, it waits for nobody
        outcomes = pieces.processes.deal(layers, compared, "the layers one by one")
    found = [(name, outcome) for name, outcome in zip(layers, outcomes, strict=True) if isinstance(outcome, Comparison)]
    failed = [outcome for outcome in outcomes if isinstance(outcome, str)]
    if not found:
        raise ValueError(" ".join(failed))
    intro = " ".join(["One comparison per layer, with the λ from above; each sees its own block only.", *same, *failed])
    return Section("Every layer alone", side_by_side(found, settings), intro, "layers")


def _alone(name: str) -> str:
    """What the piece of a layer is called."""
    return f"layer {name}"


def differing_alone(methods: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """The methods worth comparing on one layer, where some are the same thing by definition.

    Args:
        methods: names.

    Returns:
        The names that remain, and sentences about those that don't.
    """
    kept, said = list(methods), []
    coupled = [name for name in ("kfac-full", "kfac-tridiagonal") if name in kept]
    if "kfac" in kept and coupled:
        kept = [name for name in kept if name not in coupled]
        said.append(f"For a single layer {' and '.join(coupled)} {'are' if len(coupled) > 1 else 'is'} kfac.")
    if "layer" in kept and len(kept) > 1:
        kept.remove("layer")
        said.append("The method “layer” is then the exact block itself.")
    return tuple(kept), said


def side_by_side(found: Sequence[tuple[str, Comparison]], settings: dict[str, Any]) -> Comparison:
    """Comparisons of single layers as one: each one's whole matrix becomes the block of its layer.

    Args:
        found: the layers' names and comparisons.
        settings: of the run.

    Returns:
        A comparison without rows for a whole matrix.
    """
    parts = []
    for name, comparison in found:
        frame = comparison.frame
        own = frame[(frame["row"] == WHOLE) | frame["metric"].isin(needing("exact"))]
        parts.append(own.assign(row=name, col=name))
    first = found[0][1].meta
    every = [comparison.meta for _, comparison in found]
    notes = [f"{name}: {note}" for name, c in found for note in c.meta.get("notes", [])]
    meta = {
        **first,
        "damping": first["damping"] if len({m["damping"] for m in every}) == 1 else None,
        "layers": [layer for m in every for layer in m["layers"]],
        "left_out": [],
        "parameters": sum(m["parameters"] for m in every),
        "settings": {**settings, **first.get("settings", {})},
        "notes": notes,
    }
    if meta["damping"] is None:
        meta["settings"]["damping"] = "each layer's own, see the notes"
    meta["settings"].pop("setting", None)
    return Comparison(pd.concat(parts, ignore_index=True), meta)
