"""Network: a model as passes see it: its structure, its hooks, and how it is called with other parameters.

A Probe and every optimizer hold one; captures, forward mode and evidence about the model are made from it alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fisherviz.capture.calls import Call, placed
from fisherviz.capture.hooks import Recorder
from fisherviz.capture.structure import Structure
from fisherviz.network.batches import (
    Inputs,
    arguments,
    cloned,
    count_examples,
    explain_refusal,
    move,
    select,
    take_rows,
)
from fisherviz.network.guest import as_guest, lock_of, refresh
from fisherviz.network.layers import Layer
from fisherviz.network.likelihoods import Likelihood
from fisherviz.network.space import ParameterSpace

CAPTURE_BYTES = 512 * 2**20


class Network:
    """A model with its probed layers.

    Args:
        model: the model.
        likelihood: of its outputs.
        layers: the probed layers, as their classes promise them.
        output: picks the output tensor from what the model returns; None: it is a tensor.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        layers: Sequence[Layer],
        output: Callable[[Any], Any] | None = None,
    ) -> None:
        self.model, self.likelihood, self.output = model, likelihood, output
        space = ParameterSpace(layers, [name for name, _ in model.named_parameters()])
        self.structure = Structure(tuple(layers), space)  # as the layers' classes promise, until it has run
        self.recorder = Recorder(model, layers)
        self.capture_bytes = CAPTURE_BYTES
        """A batch is cut so that the captures of one piece stay below this."""
        self.slopes = False
        """Whether passes show derivatives of what stands between layers; see `capture.slopes`."""
        self._held = False

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The probed layers."""
        return self.structure.layers

    @property
    def space(self) -> ParameterSpace:
        """Their parameters as one vector."""
        return self.structure.space

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The probed parameters by name, in torch order."""
        layers = self.layers
        return {place.name: layers[place.layer].parameters[place.name] for place in self.space.places}

    @property
    def device(self) -> torch.device:
        """Of the first probed parameter."""
        return next(iter(self.layers[0].parameters.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the first probed parameter."""
        return next(iter(self.layers[0].parameters.values())).dtype

    @property
    def precision(self) -> torch.dtype:
        """Of every result: that of the parameters, but float32 for half precisions."""
        return torch.promote_types(self.dtype, torch.float32)

    def coarsest(self, z: Tensor) -> torch.dtype:
        """The type that rounds most, of an output, the parameters and (autocast) the layers: what tolerances go by."""
        return max({z.dtype, self.dtype, *self.recorder.types}, key=lambda dtype: torch.finfo(dtype).eps)

    def settle(self, structure: Structure) -> None:
        """Take a new verdict; layers that became generic lose their hooks."""
        self.structure = structure
        self.recorder.watch(structure.layers)

    def note(self, **findings: Any) -> None:
        """Replace single findings of the structure that leave the layers as they are."""
        self.structure = replace(self.structure, **findings)

    def hold(self, held: bool) -> None:
        """Keep the hooks on the model between passes, or take them off after each."""
        with lock_of(self.model):
            self._held = held
            if held:
                self.recorder.attach()
            else:
                self.recorder.detach()

    def __getstate__(self) -> dict[str, Any]:
        """A copy holds no hooks."""
        return {**self.__dict__, "_held": False}

    @contextlib.contextmanager
    def showing(self, slopes: bool) -> Iterator[None]:
        """Whether passes show slopes, for the length of a call."""
        before, self.slopes = self.slopes, slopes
        try:
            yield
        finally:
            self.slopes = before

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Hooks on the model for the length of a call, or longer where they are held."""
        self.recorder.attach()
        try:
            yield
        finally:
            self.recorder.active = False
            self.recorder.calls.clear()
            if not self._held:
                self.recorder.detach()

    # ---- forward -------------------------------------------------------------------------------------------------

    def forward(self, inputs: Inputs) -> Tensor:
        """The model's output for a batch, (N, ...) with at least two dimensions."""
        refresh(self.model)
        return self._run(inputs)

    def alone(self, inputs: Inputs, n: int) -> Tensor:
        """Output (1, ...) of one example on its own; of twice the example where a batch of one is none."""
        try:
            return self.forward(take_rows(inputs, torch.tensor([n], device="cpu")))
        except (RuntimeError, ValueError, TypeError, IndexError):
            return self.forward(take_rows(inputs, torch.tensor([n, n], device="cpu")))[:1]

    def _run(self, inputs: Inputs) -> Tensor:
        given = arguments(cloned(inputs))
        try:
            out = self.model(*given.args, **given.kwargs)
        except (RuntimeError, TypeError) as error:
            explained = explain_refusal(self.model, inputs, self.dtype, error)
            if explained is None:
                raise
            raise explained from error
        return self._counted(out if self.output is None else self._pick(out), count_examples(inputs))

    def could_be_targets(self, inputs: Inputs, y: Tensor) -> bool:
        """Whether a tensor can be targets of the output for inputs; True where the model does not take them."""
        with as_guest(self.model), torch.no_grad():
            try:
                z = self.forward(move(select(inputs, 0, 2), self.device))
            except Exception:  # the user's own code; a pass over the data will say what is wrong
                return True
        try:
            self.likelihood.check_data(z[:1].expand(len(y), *z.shape[1:]), y.to(z.device))
        except (ValueError, TypeError):
            return False
        return True

    def functional(self, parameters: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
        """The output for a batch with other tensors in the place of some probed parameters."""
        own = self.parameters
        refresh(self.model)
        with replaced(self.model, {own[name]: tensor for name, tensor in parameters.items()}):
            return self._run(inputs)

    def _counted(self, z: Any, n: int) -> Tensor:
        if not isinstance(z, Tensor):
            raise TypeError(
                f"the model returned {type(z).__name__}, not a tensor; "
                "pick the output with fv.Probe(model, likelihood, output=lambda out: ...)."
            )
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

    def record(self, inputs: Inputs) -> tuple[Tensor, dict[str, list[Call]]]:
        """Run the model forward and note the calls of each structured layer."""
        recorder = self.recorder
        for _ in range(2):
            recorder.calls.clear()
            recorder.active = True
            try:
                z = self.forward(inputs)
            finally:
                recorder.active = False
            changed = {call.layer.name for call in recorder.calls if not call.intact}
            if not changed:
                break
            recorder.cloned |= changed  # their input is overwritten later in the forward pass
        calls = placed(recorder.by_layer(), z, self.structure.layouts)
        recorder.calls.clear()
        return z, calls

    def check_trainable(self) -> None:
        """Raise RuntimeError where a probed parameter was frozen since."""
        if frozen := [name for name, p in self.parameters.items() if not p.requires_grad]:
            raise RuntimeError(
                f"parameter {frozen[0]!r} was frozen (requires_grad=False) since the Probe was made; make a new Probe, "
                "which leaves it out, or set requires_grad=True again."
            )

    def check_finite(self, z: Tensor, calls: Mapping[str, Sequence[Call]], first: int) -> None:
        """Raise ValueError where an output or a layer's input is not finite."""
        flat = z.detach().reshape(len(z), -1)
        if bool(torch.isfinite(flat.sum())) and all(bool(torch.isfinite(c.x.sum())) for m in calls.values() for c in m):
            return
        names = [name for name, made in calls.items() if not all(bool(torch.isfinite(c.x).all()) for c in made)]
        bad = (~torch.isfinite(flat).all(1)).nonzero()
        if not names and not len(bad):
            return  # only the sum overflowed
        where = f"the input of layer {names[0]!r}" if names else "the output"
        example = f" (first at example {first + int(bad[0])})" if len(bad) else ""
        raise ValueError(f"NaN or infinite values in {where}{example}; check the data and the weights before probing.")


@contextlib.contextmanager
def replaced(model: nn.Module, tensors: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Other tensors in the place of parameters, wherever the model holds them, for the length of a call.

    Each slot is exchanged once, by what it holds: `torch.func.functional_call` goes by names, and a module that has two
    of them would get one tensor back in the place of its parameter.
    """
    attributes = [(m.__dict__, k, v) for m in model.modules() for k, v in m.__dict__.items() if isinstance(v, Tensor)]
    slots: list[tuple[dict[str, Any], str, nn.Parameter]] = [
        (module._parameters, key, p)
        for module in model.modules()
        for key, p in module._parameters.items()
        if p is not None and p in tensors
    ]
    recurrent = [module._flat_weights for module in model.modules() if isinstance(module, nn.RNNBase)]
    flat: list[tuple[list[Any], list[Any]]] = [(weights, list(weights)) for weights in recurrent]
    try:
        for held, key, p in slots:
            held[key] = tensors[p]
        for weights, own in flat:  # recurrent modules read their parameters from a list of their own
            weights[:] = [tensors.get(w, w) for w in own]
        yield
    finally:
        for held, key, p in slots:
            held[key] = p
        for weights, own in flat:
            weights[:] = own
        for held, key, value in attributes:  # torch's older weight and spectral norms leave their product there
            held[key] = value
