"""Moving averages of an approximation's statistics, fed by the passes between two steps.

The same `Statistic`s and the same `build` as in the analysis: fresh sums over the passes since the last step are
blended into the averages, and every T steps a snapshot of their means becomes the matrix.
Where layers are coupled, all averages are over the same examples, or the whole would be indefinite: one that did not
run a layer adds zeros to what is the layer's, from the first step on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fisherviz.approximations import Approximation
from fisherviz.capture.batch import Batch
from fisherviz.capture.captures import AnyCapture, GenericCapture
from fisherviz.capture.joined import concatenate
from fisherviz.capture.network import Network
from fisherviz.matrices.layered import LayeredMatrix
from fisherviz.network.layers import Layer
from fisherviz.network.space import ParameterSpace
from fisherviz.optim.deferred import DeferredAverage, deferrable, rows_of
from fisherviz.optim.packing import pack, unpack
from fisherviz.statistics import Statistic, add_up
from fisherviz.statistics.costs import require_statistics
from fisherviz.support.processes import Processes, grouped, summed
from fisherviz.support.warning import warn

Named = dict[str, Statistic]
_T = TypeVar("_T")


class Moments:
    """Fresh and averaged statistics of all layers and pairs of layers.

    Args:
        approximation: says which statistics are needed and builds the matrix.
        layers: the preconditioned layers, structured or not for good.
        positions: weight-sharing positions of each structured layer.
        adjacent: names of structured layers that are neighbours in execution.
        defer: whether averages are read rarely enough to bring them up to date only then.
    """

    def __init__(
        self,
        approximation: Approximation,
        layers: Sequence[Layer],
        positions: Mapping[str, int],
        adjacent: Sequence[tuple[str, str]],
        defer: bool = False,
    ) -> None:
        self.approximation, self.space = approximation, ParameterSpace(layers)
        self.positions, self.adjacent = dict(positions), tuple((a, b) for a, b in adjacent)
        approximation.prepare(self.space.layers, self.positions)
        self.pairs = approximation.pairs(self.space.layers, self.adjacent)
        self.average, self.fresh = self._new(), self._new()
        held = [statistic for named in self.fresh for statistic in named.values()]
        require_statistics(held, layers, torch.empty(0, device=self.device), copies=2)
        self.refined: list[Named] = [{} for _ in self.space.layers]
        self._defer, self._said = defer, set[str]()
        self.deferred = [self._deferring(named) for named in self.average]
        self._rows: dict[tuple[int, str], list[tuple[Tensor, float, int]]] = {}
        self.window: list[dict[str, AnyCapture]] = []
        self.examples = 0
        """Examples since the last step; of all processes, once the averages have advanced."""
        self.values: list[dict[str, Any]] | None = None
        """Snapshot: per layer, then per pair, what the matrix is built from."""
        self.snapshot_examples = 1
        """Examples of the step that the snapshot was taken at, of all processes."""

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next((p.device for layer in self.space.layers for p in layer.parameters.values()), torch.device("cpu"))

    def _new(self) -> list[Named]:
        layers = self.space.layers
        own = [self.approximation.needs(layer) for layer in layers]
        return own + [self.approximation.pair_statistics(layers[i], layers[j]) for i, j in self.pairs]

    def _deferring(self, average: Named) -> dict[str, DeferredAverage]:
        return {key: DeferredAverage(s) for key, s in average.items() if self._defer and deferrable(s)}

    def follow(self, adjacent: Sequence[tuple[str, str]]) -> None:
        """Couple layers that are neighbours in a pass that ran some for the first time.

        What is known of pairs that stay is kept; a pair is no longer one where either has another neighbour now.

        Args:
            adjacent: names of the layers that follow one another in that pass.
        """
        first, second = {row for row, _ in adjacent}, {col for _, col in adjacent}
        kept = [(a, b) for a, b in self.adjacent if (a, b) in adjacent or not (a in first or b in second)]
        self.adjacent = (*kept, *(pair for pair in adjacent if pair not in kept))
        before, self.pairs = self.pairs, self.approximation.pairs(self.space.layers, self.adjacent)
        self.average = self._carried(before, self.average, self._new())
        self.fresh = self._carried(before, self.fresh, self._new())
        self.deferred = self._carried(before, self.deferred, [self._deferring(named) for named in self.average])
        if self.values is not None:
            self.values = self._carried(before, self.values, [{} for _ in self.average])

    def _carried(self, before: Sequence[tuple[int, int]], held: list[_T], new: list[_T]) -> list[_T]:
        """What is held of the layers and of those pairs that were there before; what is new of the others."""
        n = len(self.space.layers)
        old = dict(zip(before, held[n:], strict=True))
        return held[:n] + [old.get(pair, made) for pair, made in zip(self.pairs, new[n:], strict=True)]

    @property
    def keeps_captures(self) -> bool:
        """Whether captures are needed until the step."""
        return any(self._wants(layer) or self.refines for layer in self.space.layers)

    @property
    def refines(self) -> bool:
        """Whether the operators change with every step, by statistics in the snapshot's bases (EKFAC)."""
        return type(self.approximation).refine is not Approximation.refine

    def _wants(self, layer: Layer) -> bool:
        return self.approximation.reads_capture(layer)

    # ---- a pass ------------------------------------------------------------------------------------------------------

    def collect(self, captures: dict[str, AnyCapture], examples: int) -> None:
        """Add a pass; layers that it did not run are left out."""
        batch = Batch(captures, examples)
        for i, named in enumerate(self.fresh):
            for key, statistic in named.items():
                if all(name in captures for name in statistic.layers) and not self._hold(i, key, captures, examples):
                    statistic.update(batch)
        self.examples += examples
        self.window.append(captures if self.keeps_captures and examples else dict.fromkeys(captures, _SEEN))

    def _hold(self, i: int, key: str, captures: dict[str, AnyCapture], examples: int) -> bool:
        """Keep the rows of a factor where they are few; they are multiplied when they are averaged."""
        statistic = self.fresh[i][key]
        if not deferrable(statistic) or statistic.total is not None or grouped():
            return False
        found = rows_of(statistic, captures[statistic.layers[0]])
        if found is None:
            return False
        # a copy: the rows may be the user's own input, which is free to change before the step
        self._rows.setdefault((i, key), []).append((found[0].clone(), found[1], examples))
        return True

    def _blend(self, i: int, key: str, decay: float, begun: bool) -> None:
        """One statistic's window into its average; `begun` says whether there was a step before."""
        average, fresh, held = self.average[i][key], self.fresh[i][key], self._rows.pop((i, key), [])
        deferred = self.deferred[i].get(key)
        if held and average.total is not None and fresh.total is None:
            examples = self.examples if self.pairs else sum(n for _, _, n in held)
            for j, (rows, weight, _) in enumerate(held):
                # the decay is one step's, however many passes it has
                before = decay if j == 0 else 1.0
                if deferred is not None and decay > 0:
                    deferred.add(rows, weight / examples, before, 1 - decay)
                else:  # product and average in one
                    share = (1 - decay) * weight / examples
                    average.total.addmm_(rows.mT, rows, beta=before, alpha=share)
            return
        for rows, weight, n in held:
            fresh.add(rows.mT @ rows * weight, n)
        if deferred is not None:
            deferred.flush()
        if fresh.total is None:
            if self.pairs and average.total is not None and self.examples:
                average.normalise()
                average.total.mul_(decay)
            return
        if decay == 0:
            average.total, average.count = None, 0.0
        if self.pairs and not grouped():
            fresh.count = self.examples
            if begun and decay > 0 and average.total is None:
                average.total, average.count = torch.zeros_like(fresh.total), 1.0
        average.blend(fresh, decay)

    def saw(self, layer: Layer) -> bool:
        """Whether a pass since the last step ran the layer."""
        return any(layer.name in captures for captures in self.window)

    def lacks(self, layers: Sequence[Layer]) -> bool:
        """Whether the snapshot was taken before one of the layers first ran."""
        at = {id(layer): i for i, layer in enumerate(self.space.layers)}
        return self.values is None or not all(self._complete(x, self.values[at[id(x)]]) for x in layers)

    def capture(self, name: str) -> AnyCapture | None:
        """All examples of a layer since the last step."""
        parts = [c for captures in self.window if (c := captures.get(name, _SEEN)) is not _SEEN]
        return concatenate(parts) if parts else None

    def forget(self) -> None:
        """Start the next window."""
        self.window, self.examples, self._rows = [], 0, {}
        for named in self.fresh:
            for statistic in named.values():
                statistic.total, statistic.count = None, 0.0

    def drop(self, names: Collection[str], examples: int) -> None:
        """Forget what passes showed of the named layers; so many examples no longer count for any."""
        for i, named in enumerate(self.fresh):
            for key, statistic in named.items():
                if any(name in names for name in statistic.layers):
                    statistic.total, statistic.count = None, 0.0
                    self._rows.pop((i, key), None)
        self.window = [{k: v for k, v in captures.items() if k not in names} for captures in self.window]
        self.examples -= examples

    # ---- a step ------------------------------------------------------------------------------------------------------

    def advance(self, decay: float, refresh: bool, keep: bool) -> None:
        """Blend the window into the averages; on a refresh take the snapshot that the matrix is built from.

        Args:
            decay: weight of the past, 0 for none.
            refresh: whether to take a snapshot.
            keep: whether the snapshot outlives the averages' next change, and is copied.
        """
        self._reduce()
        begun = any(s.total is not None for named in self.average for s in named.values())
        for i, named in enumerate(self.average):
            for key in named:
                self._blend(i, key, decay, begun)
        if refresh or self.values is None:
            self.snapshot(keep)
        elif self.refines:
            self._refine(decay, ())

    def snapshot(self, keep: bool, missing: bool = False) -> None:
        """Take what the matrix is built from.

        Args:
            keep: whether it outlives the averages' next change, and is copied.
            missing: whether to take only what is not there yet, for layers that have run for the first time.
        """
        for waiting in self.deferred:
            for deferred in waiting.values():
                deferred.flush()
        missing = missing and self.examples == self.snapshot_examples
        old = self.values if missing and self.values is not None else [{}] * len(self.average)
        self.values = []
        self.snapshot_examples = self.examples
        for i, named in enumerate(self.average):
            if old[i]:
                self.values.append(old[i])
                continue
            values: dict[str, Any] = {
                key: s.mean.clone() if keep else s.mean for key, s in named.items() if s.total is not None
            }
            layer = self.space.layers[i] if i < len(self.space.layers) else None
            capture = self.capture(layer.name) if layer is not None and self._wants(layer) else None
            if capture is not None:
                values["capture"] = capture
            if layer is not None and (self.refines or self._wants(layer)) and not self.saw(layer):
                values = {}  # what is made of the step's own examples waits for a step that runs the layer
            self.values.append(values)
        self._refine(0.0, [i for i, values in enumerate(self.values) if values and not old[i]])

    def _refine(self, decay: float, renewed: Sequence[int]) -> None:
        """Statistics in the snapshot's bases: of the renewed layers from the start, or of all one step on."""
        assert self.values is not None
        for i, layer in enumerate(self.space.layers):
            if not self.refines or not self.approximation._handles(layer):
                continue
            if i in renewed:
                self.refined[i] = self.approximation.refine(layer, self.values[i])
            capture = self.capture(layer.name)
            if capture is None or not self.refined[i] or (renewed and i not in renewed):
                continue
            for statistic in self.refined[i].values():
                new = statistic.contribution(capture) / capture.examples
                if statistic.total is None:
                    statistic.total, statistic.count = new, 1.0
                else:
                    statistic.total.mul_(decay).add_(new, alpha=1 - decay)

    def build(self, over: Collection[str] | None = None) -> LayeredMatrix:
        """The matrix from the snapshot, over the layers that have run so far, or those of them that are named."""
        assert self.values is not None
        n, layers = len(self.space.layers), self.space.layers
        own = [
            v | {k: s.mean for k, s in more.items()} if v else {}
            for v, more in zip(self.values[:n], self.refined, strict=True)
        ]
        there = [i for i in range(n) if self._complete(layers[i], own[i]) and (over is None or layers[i].name in over)]
        space = self.space if len(there) == n else self.space.over([layers[i] for i in there])
        couplings = {
            (there.index(i), there.index(j)): v
            for (i, j), v in zip(self.pairs, self.values[n:], strict=True)
            if v and i in there and j in there
        }
        matrix = self.approximation.build(space, [own[i] for i in there], couplings)
        for sentence in self.approximation.fallbacks(space.layers):
            if sentence not in self._said:
                self._said.add(sentence)
                warn(f"{self.approximation.name}: {sentence}")
        return matrix

    def _complete(self, layer: Layer, values: Mapping[str, Any]) -> bool:
        return set(self.approximation.needs(layer)) <= set(values) and (not self._wants(layer) or "capture" in values)

    # ---- several processes -------------------------------------------------------------------------------------------

    def _reduce(self) -> None:
        """Make of the fresh sums those of all processes that train together; what reads examples gets all of them."""
        processes, fresh = Processes.training(), [statistic for named in self.fresh for statistic in named.values()]
        if processes.count == 1:
            return
        there = summed([statistic.total is not None for statistic in fresh], self.device)
        if set(there) <= {0, processes.count}:
            counts = summed([statistic.count for statistic in fresh], self.device)
            for statistic, count in zip(fresh, counts, strict=True):
                if statistic.total is not None:
                    statistic.total, statistic.count = processes.total(statistic.total), count
        else:  # a process has not run a layer
            add_up(fresh, processes)
        self.gather(self.keeps_captures)

    def gather(self, captures: bool) -> None:
        """Count the examples of all processes, and take over their captures where these are wanted."""
        (examples,) = summed([self.examples], self.device)
        self.examples = int(examples)
        if captures:
            shown = [captures for captures in self.window if _SEEN not in captures.values()]
            gathered = Processes.training().gather(shown, self.device)
            self.window = [captures for part in gathered for captures in part]

    # ---- saving ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Averages, snapshot and layout."""
        return {
            "layers": {layer.name: layer.note if not layer.structured else "" for layer in self.space.layers},
            "positions": dict(self.positions),
            "adjacent": [list(pair) for pair in self.adjacent],
            "average": [{k: s.state_dict() for k, s in named.items()} for named in self.average],
            "deferred": [{k: d.state_dict() for k, d in named.items()} for named in self.deferred],
            "refined": [{k: s.state_dict() for k, s in named.items()} for named in self.refined],
            "values": None if self.values is None else [pack(v) for v in self.values],
            "snapshot_examples": self.snapshot_examples,
        }

    @classmethod
    def from_state(
        cls, approximation: Approximation, network: Network, state: Mapping[str, Any], defer: bool
    ) -> Moments:
        """Restore what `state_dict` gave.

        Args:
            approximation: as at the time of saving.
            network: the optimizer's; it takes the layers' paths from the state.
            state: what was saved.
            defer: as for the constructor.

        Returns:
            The moments.

        Raises:
            ValueError: the state belongs to another network or method.
        """
        unknown = [name for name in state["layers"] if name not in network.space.names]
        if unknown:
            raise ValueError(
                f"the saved statistics have a layer {unknown[0]!r} that this model lacks; load the state of this model."
            )
        network.settle(network.structure.without({name: why for name, why in state["layers"].items() if why}))
        kept = [layer for layer in network.layers if layer.name in state["layers"]]
        made = cls(approximation, kept, state["positions"], [(a, b) for a, b in state["adjacent"]], defer)
        if [set(named) for named in made.average] != [set(named) for named in state["average"]]:
            raise ValueError("the saved statistics are those of another method; load the state of this one.")
        for named, saved in zip(made.average, state["average"], strict=True):
            _load(named, saved, made.device)
        for waiting, held, named in zip(made.deferred, state["deferred"], made.average, strict=True):
            for key, rows in held.items():
                deferred = waiting[key] if key in waiting else DeferredAverage(named[key])
                deferred.load_state_dict(rows, made.device)
                if key not in waiting:  # the state's optimizer factorised less often, and put its rows off
                    deferred.flush()
        made.snapshot_examples = state["snapshot_examples"]
        if state["values"] is None:
            return made
        made.values = [unpack(v, made.device) for v in state["values"]]
        for i, layer in enumerate(kept):
            if state["refined"][i] and made.values[i]:
                made.refined[i] = approximation.refine(layer, made.values[i])
                _load(made.refined[i], state["refined"][i], made.device)
        return made


def _load(named: Named, saved: Mapping[str, Any], device: torch.device) -> None:
    for key, statistic in named.items():
        statistic.load_state_dict(saved[key])
        if statistic.total is not None:
            statistic.total = statistic.total.to(device)


_SEEN = GenericCapture(torch.empty(0, 0, 0, device="cpu"))
"""Stands in a window for captures that need not be kept."""
