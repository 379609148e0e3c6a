"""Probe: attach to a trained network, and capture what each batch shows at each layer.

The Probe owns the hooks, the checks on the model and the backpropagation of a likelihood's vectors (DESIGN sections 2
and 5, "Exact Fisher"). What is computed from the captures lives above, in `statistics` and `fisher`.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fisherviz.capture.captures import AnyCapture, Batch, GenericCapture
from fisherviz.capture.hooks import Call, Recorder, capture_calls
from fisherviz.capture.per_example import per_example_gradients
from fisherviz.capture.structure import PathChanged, check_paths
from fisherviz.network.batches import Inputs, count_examples, explain_refusal, move, select
from fisherviz.network.discover import find_layers
from fisherviz.network.guest import as_guest, check_modes, lock_of
from fisherviz.network.layers import Layer, LayerInfo, ParameterSpace
from fisherviz.network.likelihoods import Likelihood, resolve

if TYPE_CHECKING:
    from fisherviz.exact.fisher import Fisher

CAPTURE_BYTES = 512 * 2**20
"""A batch is cut so that the captures of one piece stay below this."""
_BATCHED_BACKWARD_ENTRIES = 2**17
"""Above this many entries per vector and layer one backward pass per vector is faster than a batched one."""


class VectorSource(Protocol):
    """The vectors that are backpropagated from an output: what the kind of a Fisher comes down to."""

    def start(self, first: int, examples: int) -> None:
        """Announce a batch that may come in pieces."""

    def count(self, z: Tensor) -> int:
        """Number K of vectors per example."""

    def __call__(self, z: Tensor, targets: Tensor | None, first: int) -> Tensor:
        """The vectors (K, N, ...), scaled so that the sum of their outer products is the output Fisher."""


class Probe:
    """A view of a network's parameters through which its Fisher is computed.

    Args:
        model: any `nn.Module`; it is left exactly as it was found.
        likelihood: "categorical", "bernoulli", "gaussian", a `Likelihood`, or an unweighted `nn.CrossEntropyLoss`,
            `nn.BCEWithLogitsLoss` or `nn.MSELoss`.
        layers: names or modules to probe, each together with all layers inside it (so that "" is the whole model);
            None: every module that owns trainable parameters.
        output: picks the output tensor from what the model returns, for models that return tuples or dictionaries.

    Raises:
        ValueError: a layer is unknown or nothing trainable is left.
        TypeError: the model is no module, or the likelihood cannot be told.

    As a context manager, hooks stay on the model until exit; otherwise each call attaches and detaches its own.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood | nn.Module,
        *,
        layers: Sequence[str | nn.Module] | str | nn.Module | None = None,
        output: Callable[[Any], Tensor] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"the model must be a torch.nn.Module, got {type(model).__name__}.")
        self.model = model
        if isinstance(model, torch.jit.ScriptModule):
            raise TypeError(
                f"the model is a {type(model).__name__}, which takes no hooks; pass the module it was made of."
            )
        self.likelihood = resolve(likelihood)
        if output is not None and not callable(output):
            raise TypeError(f"output= is a function that picks the output tensor, got {type(output).__name__}.")
        self.output = output
        with lock_of(model):
            self._layers, self.left_out = find_layers(model, layers)
        _check_types(self._layers)
        self.space = ParameterSpace(self._layers)
        self._recorder = Recorder(self._layers)
        self._held = False
        self.looked = False
        """Whether the model has been seen running: paths, positions and the chain are known."""
        self.forward_mode: bool | None = None
        """Whether forward-mode derivatives of this model are right; None: not tried yet."""
        self.one_at_a_time = False
        """Whether per-example gradients loop over examples, because `vmap` was found wrong for this model."""
        self._example_output: Tensor | None = None
        self._example_bytes = (1, 1)
        self.positions: dict[str, int] = {}
        """Weight-sharing positions T of each structured layer, known after the first pass."""
        self.chain_pairs: tuple[tuple[str, str], ...] = ()
        """Layers that are adjacent in execution (KFAC's chain), known after the first pass."""
        self.is_chain = True
        """Whether each layer is fed by the one before it alone, known after the first pass."""

    # ---- what was attached -----------------------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        """What was attached, in torch order; until a first pass (`looked`), `path` is what each class promises."""
        return tuple(layer.info() for layer in self._layers)

    @property
    def device(self) -> torch.device:
        """Device of the first probed parameter."""
        return next(iter(self._layers[0].parameters.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the first probed parameter."""
        return next(iter(self._layers[0].parameters.values())).dtype

    @property
    def precision(self) -> torch.dtype:
        """Type of every result: that of the first probed parameter, but float32 for half precisions."""
        return torch.promote_types(self.dtype, torch.float32)

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = []
        for info in self.layers:
            shape = (
                f"{info.out_features} x {info.in_features}{' + 1' if info.bias else ''}" if info.out_features else ""
            )
            unchecked = info.path == "structured" and not self.looked
            why = f": {info.note}" if info.note else " if the first pass confirms it" if unchecked else ""
            rows.append((info.name or "(root)", info.kind, f"{info.num_parameters:,}", shape, info.path + why))
        rows += [(name, "", "", "", f"left out: {why}") for name, why in self.left_out]
        return rows

    def __repr__(self) -> str:
        header = ("layer", "kind", "parameters", "out x in", "path")
        rows = [header, *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        title = f"Probe of {type(self.model).__name__}: {self.likelihood!r}, {self.space.size:,} parameters"
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([title, *lines])

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{h}</th>" for h in ("layer", "kind", "parameters", "out × in", "path"))
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self._rows()
        )
        title = html.escape(
            f"Probe of {type(self.model).__name__}: {self.likelihood!r}, {self.space.size:,} parameters"
        )
        return f"<table><caption>{title}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def __getstate__(self) -> dict[str, Any]:
        """A copy holds no hooks."""
        return {**self.__dict__, "_held": False}

    # ---- hooks -----------------------------------------------------------------------------------------------------

    def attach(self) -> Probe:
        """Put the hooks on the model until `detach`."""
        with lock_of(self.model):
            self._recorder.attach()
        self._held = True
        return self

    def detach(self) -> None:
        """Take the hooks off the model."""
        with lock_of(self.model):
            self._recorder.detach()
        self._held = False

    def __enter__(self) -> Probe:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    # ---- the Fisher ------------------------------------------------------------------------------------------------

    def fisher(
        self,
        data: Any,
        targets: Tensor | None = None,
        *,
        kind: str = "exact",
        samples: int = 1,
        reduction: str = "mean",
        generator: torch.Generator | None = None,
    ) -> Fisher:
        """The Fisher information matrix of the probed parameters over data.

        Args:
            data: a tensor of inputs (N, ...), a tuple (inputs, targets), or a re-iterable of batches.
            targets: targets (N, ...) when `data` is inputs alone.
            kind: "exact" (expectation over the model's labels, analytic), "mc" (labels sampled from the model) or
                "empirical" (the data's labels).
            samples: sampled labels per example, for kind "mc".
            reduction: "mean" over examples (1/N) or "sum".
            generator: source of the sampled labels; None: a private one seeded from `torch.initial_seed()`.

        Returns:
            A `Fisher`; nothing is computed before it is asked for.

        Raises:
            ValueError: an option is unknown, or kind "empirical" comes without targets.
            TypeError: the data is a one-shot iterator or nothing that can be iterated.
        """
        from fisherviz.exact.fisher import Fisher

        return Fisher(self, data, targets, kind=kind, samples=samples, reduction=reduction, generator=generator)

    # ---- forward and backward --------------------------------------------------------------------------------------

    def forward(self, inputs: Inputs) -> Tensor:
        """The model's output for a batch, (N, ...) with at least two dimensions."""
        return self.call(self.model, inputs)

    def call(self, function: Callable[..., Any], inputs: Inputs) -> Tensor:
        """The output of a function with the model's signature, (N, ...) with at least two dimensions."""
        inputs = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, inputs)
        try:
            if isinstance(inputs, Tensor):  # a clone: some models change their input in place
                out = function(inputs)
            elif isinstance(inputs, dict):
                out = function(**inputs)
            else:
                out = function(*inputs)
        except (RuntimeError, TypeError) as error:
            explained = explain_refusal(self.model, inputs, self.dtype, error)
            if explained is None:
                raise
            raise explained from error
        z = out if self.output is None else self._pick(out)
        if not isinstance(z, Tensor):
            raise TypeError(
                f"the model returned {type(z).__name__}, not a tensor; "
                "pick the output with fv.Probe(model, likelihood, output=lambda out: ...)."
            )
        n = count_examples(inputs)
        if z.dim() == 0 and n == 1:
            z = z.reshape(1)  # a model that squeezes its output
        if z.dim() == 0 or len(z) != n:
            raise ValueError(
                f"the model's output has shape {tuple(z.shape)} for a batch of {n} examples; "
                "its first dimension must count them: pick or reshape it with output=."
            )
        return z.unsqueeze(1) if z.dim() == 1 else z

    def _pick(self, out: Any) -> Any:
        """The output tensor that `output=` finds in what the model returned."""
        assert self.output is not None
        try:
            return self.output(out)
        except (KeyError, IndexError, AttributeError, TypeError) as error:
            keys = f" with keys {', '.join(map(repr, out))}" if isinstance(out, dict) else ""
            raise ValueError(
                f"output= failed on what the model returned ({type(out).__name__}{keys}): "
                f"{type(error).__name__} {error}; change the callable."
            ) from error

    def loss_gradient(self, inputs: Inputs, targets: Tensor | None = None) -> tuple[Tensor, ...]:
        """Gradients of a batch's mean loss by one forward+backward pass; without targets, of the output's mean."""
        check_modes(self.model)
        inputs = move(inputs, self.device)
        with as_guest(self.model):
            z = self.forward(inputs)
            self.likelihood.check_output(z)
            loss = z.mean() if targets is None else self.likelihood.nll(z, targets).mean()
            return torch.autograd.grad(loss, list(self.parameters().values()), allow_unused=True)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The probed parameters by name, in torch order."""
        return {name: p for layer in self._layers for name, p in layer.parameters.items()}

    def capture(
        self,
        inputs: Inputs,
        targets: Tensor | None,
        vectors: VectorSource,
        consume: Callable[[Batch], None],
        first: int = 0,
    ) -> int:
        """Hand a batch's captures to a consumer, in pieces that fit the memory meant for them.

        Args:
            inputs: the batch's inputs.
            targets: its targets, if `vectors` needs them.
            vectors: the vectors to backpropagate.
            consume: called with each `Batch`.
            first: position of the batch's first example in the data.

        Returns:
            The number of examples.

        Raises:
            ValueError: the model is in a mode without a Fisher, or an activation is not finite.
            RuntimeError: examples are coupled or the model is random.
        """
        check_modes(self.model)
        inputs = move(inputs, self.device)
        n = count_examples(inputs)
        with lock_of(self.model):
            own = not self._recorder.attached
            try:
                with as_guest(self.model):
                    if not self.looked:
                        self._look(inputs)
                    self._recorder.attach()
                    step = self._piece(vectors)
                    vectors.start(first, n)
                    for start in range(0, n, step):
                        part = None if targets is None else targets[start : start + step]
                        consume(self._capture_piece(select(inputs, start, start + step), part, vectors, first + start))
            finally:
                self._recorder.active = False
                self._recorder.calls.clear()
                if own and not self._held:
                    self._recorder.detach()
        return n

    def look(self, inputs: Inputs) -> None:
        """Decide each layer's path on the first examples of a batch, without computing anything."""
        check_modes(self.model)
        with lock_of(self.model):
            try:
                with as_guest(self.model):
                    self._look(move(inputs, self.device))
            finally:
                if not self._held:
                    self._recorder.detach()

    def _look(self, inputs: Inputs) -> None:
        """Before the first pass: which path each layer takes, what an example's captures weigh, who feeds whom."""
        self._recorder.attach()
        found = check_paths(self, inputs)
        self._recorder.detach()  # layers that became generic keep no hook
        if self._held:
            self._recorder.attach()
        self._example_output, self._example_bytes = found.output, found.bytes
        self.positions, self.chain_pairs, self.is_chain = found.positions, found.chain_pairs, found.is_chain
        self.looked = True

    def _capture_piece(
        self,
        inputs: Inputs,
        targets: Tensor | None,
        vectors: VectorSource,
        first: int,
    ) -> Batch:
        z, calls = self.record(inputs)
        n = len(z)
        self.likelihood.check_output(z)
        if not z.requires_grad:
            raise RuntimeError(
                "the model's output does not depend on the probed parameters; "
                "is its forward under torch.no_grad(), or detached?"
            )
        self._check_examples(n, calls)
        self._check_absent(z, calls)
        self.check_finite(z, calls, first)
        v = vectors(z.detach(), targets, first)
        captures: dict[str, AnyCapture] = {}
        structured = {name: made for name, made in calls.items() if made}
        for name, gradients in self.backward(z, structured, v).items():
            captures[name] = capture_calls(structured[name], gradients)
        generic = [layer for layer in self._layers if not layer.structured]
        if generic and len(v):
            captures |= self.generic_captures(generic, inputs, v)
        for layer in self._layers:
            if layer.name not in captures:
                captures[layer.name] = GenericCapture(z.new_zeros(len(v), n, layer.size))
        return Batch({layer.name: captures[layer.name].to(self.precision) for layer in self._layers}, n, first)

    def _check_absent(self, z: Tensor, calls: dict[str, list[Call]]) -> None:
        """A structured layer that did not run has no gradient, unless its parameters act some other way."""
        for layer in self._layers:
            if not layer.structured or layer.name in calls:
                continue
            own = list(layer.parameters.values())
            found = torch.autograd.grad(z, own, torch.ones_like(z), retain_graph=True, allow_unused=True)
            if any(g is not None for g in found):
                layer.make_generic("its forward did not run, but its parameters act")
                raise PathChanged

    def _check_examples(self, n: int, calls: dict[str, list[Call]]) -> None:
        """A layer that sees only some of the examples (a mixture of experts) goes the generic way, from the start."""
        partial = {
            call.layer.name: call.layer
            for made in calls.values()
            for call in made
            if call.x.shape[:1] != (n,) or call.shape[:1] != (n,)
        }
        for layer in partial.values():
            layer.make_generic("it sees only some of the examples")
        if partial:
            self._recorder.detach()
            raise PathChanged

    def record(self, inputs: Inputs) -> tuple[Tensor, dict[str, list[Call]]]:
        """Run the model forward with the recorder on."""
        recorder = self._recorder
        for _ in range(2):
            recorder.calls.clear()
            recorder.active = True
            try:
                z = self.forward(inputs)
            finally:
                recorder.active = False
            changed = {call.layer.name: call.layer for call in recorder.calls if not call.intact}
            if not changed:
                break
            for layer in changed.values():  # its input is overwritten later in the forward pass
                layer.clone_input = True
        calls = recorder.by_layer()
        recorder.calls.clear()
        return z, calls

    def backward(self, z: Tensor, calls: dict[str, list[Call]], vectors: Tensor) -> dict[str, list[Tensor]]:
        """Gradients (K, N, ...) of each vector's product with z at each call's output."""
        flat = [call for made in calls.values() for call in made]
        if not flat or not z.requires_grad or not len(vectors):
            return {name: [z.new_zeros(len(vectors), *c.shape) for c in made] for name, made in calls.items()}
        edges = [call.edge for call in flat]
        out: list[Tensor | None] | None = None
        widest = max(call.shape.numel() for call in flat)
        if len(vectors) > 1 and widest <= _BATCHED_BACKWARD_ENTRIES:
            try:
                out = list(
                    torch.autograd.grad(z, edges, vectors, is_grads_batched=True, allow_unused=True, retain_graph=True)
                )
            except RuntimeError:
                out = None  # an operation without a batching rule: one vector at a time gives the same numbers
        if out is None:
            if len(vectors) == 1:
                return _regroup(calls, torch.autograd.grad(z, edges, vectors[0], allow_unused=True), z)
            stacked = [z.new_empty(len(vectors), *call.shape) for call in flat]
            for k, vector in enumerate(vectors):
                keep = k + 1 < len(vectors)
                gradients = torch.autograd.grad(z, edges, vector, retain_graph=keep, allow_unused=True)
                for whole, gradient in zip(stacked, gradients, strict=True):
                    if gradient is None:
                        whole[k].zero_()
                    else:
                        whole[k] = gradient
            out = list(stacked)
        filled = iter(
            z.new_zeros(len(vectors), *call.shape) if g is None else g.detach()
            for g, call in zip(out, flat, strict=True)
        )
        return {name: [next(filled) for _ in made] for name, made in calls.items()}

    def generic_captures(self, layers: Sequence[Layer], inputs: Inputs, vectors: Tensor) -> dict[str, AnyCapture]:
        """Per-example gradients of layers without structure, by layer name."""
        n = count_examples(inputs)
        in_dims = pytree.tree_map(
            lambda leaf: 0 if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == n else None, inputs
        )
        parameters = {name: p for layer in layers for name, p in layer.parameters.items()}
        gradients = per_example_gradients(
            self.model, self.call, parameters, inputs, vectors, in_dims, self.one_at_a_time
        )
        return {
            layer.name: GenericCapture(torch.cat([gradients[name].detach().flatten(2) for name in layer.parameters], 2))
            for layer in layers
        }

    def check_finite(self, z: Tensor, calls: dict[str, list[Call]], first: int) -> None:
        """Raise ValueError where an output or a layer's input is not finite."""
        flat = z.detach().reshape(len(z), -1)
        if bool(torch.isfinite(flat.sum())) and all(bool(torch.isfinite(c.x.sum())) for m in calls.values() for c in m):
            return
        where = "the output"
        for name, made in calls.items():
            if any(not bool(torch.isfinite(call.x).all()) for call in made):
                where = f"the input of layer {name!r}"
                break
        else:
            if bool(torch.isfinite(flat).all()):
                return  # only the sum overflowed
        bad = (~torch.isfinite(flat).all(1)).nonzero()
        example = f" (first at example {first + int(bad[0])})" if len(bad) else ""
        raise ValueError(f"NaN or infinite values in {where}{example}; check the data and the weights before probing.")

    def _piece(self, vectors: VectorSource) -> int:
        """Examples per piece, so that the captures of a piece stay below CAPTURE_BYTES."""
        assert self._example_output is not None
        inputs, per_vector = self._example_bytes
        return max(1, CAPTURE_BYTES // (inputs + per_vector * vectors.count(self._example_output)))


def _check_types(layers: Sequence[Layer]) -> None:
    for layer in layers:
        for name, p in layer.parameters.items():
            if p.is_complex() or p.is_meta:
                what = "complex" if p.is_complex() else "on the meta device, without values"
                raise TypeError(
                    f"parameter {name!r} is {what}; a Fisher needs real numbers: leave its layer out, or "
                    "give the model real parameters on a device."
                )
    kinds = {p.dtype: name for layer in layers for name, p in layer.parameters.items()}
    if len(kinds) > 1:
        examples = ", ".join(f"{name!r} is {str(dtype).removeprefix('torch.')}" for dtype, name in kinds.items())
        raise ValueError(f"the probed parameters have several types ({examples}); convert the model to one with .to().")


def _regroup(calls: dict[str, list[Call]], gradients: Sequence[Tensor | None], z: Tensor) -> dict[str, list[Tensor]]:
    """Gradients of one vector (1, N, ...) by layer and call."""
    found = iter(gradients)
    out: dict[str, list[Tensor]] = {}
    for name, made in calls.items():
        own = [(call, next(found)) for call in made]
        out[name] = [(z.new_zeros(c.shape) if g is None else g.detach()).unsqueeze(0) for c, g in own]
    return out
