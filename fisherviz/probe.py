"""Probe: the front door. Attach to a trained network, see which layers were picked up and how, ask for its Fisher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fisherviz.capture.look import look
from fisherviz.capture.network import Network
from fisherviz.exact.fisher import Fisher
from fisherviz.network.batches import Inputs
from fisherviz.network.discover import check_types, find_layers
from fisherviz.network.guest import as_guest, lock_of
from fisherviz.network.layers import HEADS, WORDS, LayerInfos
from fisherviz.network.likelihoods import Likelihood, resolve
from fisherviz.network.space import ParameterSpace
from fisherviz.support.tables import html_table, text_table


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
        law = resolve(likelihood)
        if output is not None and not callable(output):
            raise TypeError(f"output= is a function that picks the output tensor, got {type(output).__name__}.")
        with as_guest(model):  # a parametrisation may move its buffers when its weight is read
            found, self.left_out = find_layers(model, layers)
        check_types(found)
        self.network = Network(model, law, found, output)

    # ---- what was attached -----------------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The network that is probed."""
        return self.network.model

    @property
    def likelihood(self) -> Likelihood:
        """The predictive distribution of its outputs."""
        return self.network.likelihood

    @property
    def layers(self) -> LayerInfos:
        """What was attached, in torch order; until a first pass (`looked`), `path` is what each class promises."""
        return LayerInfos(layer.info() for layer in self.network.layers)

    @property
    def space(self) -> ParameterSpace:
        """The probed parameters as one vector."""
        return self.network.space

    @property
    def device(self) -> torch.device:
        """Device of the first probed parameter."""
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the first probed parameter."""
        return self.network.dtype

    @property
    def precision(self) -> torch.dtype:
        """Type of every result: that of the first probed parameter, but float32 for half precisions."""
        return self.network.precision

    @property
    def looked(self) -> bool:
        """Whether the model has been seen running: paths, positions and the chain are known."""
        return self.network.structure.looked

    @property
    def forward_mode(self) -> bool | None:
        """Whether forward-mode derivatives of this model are right; None: not tried yet."""
        return self.network.structure.forward_mode

    @property
    def one_at_a_time(self) -> bool:
        """Whether per-example gradients loop over examples, because `vmap` was found wrong for this model."""
        return self.network.structure.one_at_a_time

    def parameters(self) -> dict[str, nn.Parameter]:
        """The probed parameters by name, in torch order."""
        return self.network.parameters

    def _rows(self) -> list[tuple[str, ...]]:
        left_out = [(name, "", "", "", f"left out: {why}") for name, why in self.left_out]
        return self.layers.rows(self.looked) + left_out

    @property
    def _title(self) -> str:
        return f"Probe of {type(self.model).__name__}: {self.likelihood!r}, {self.space.size:,} parameters"

    def __repr__(self) -> str:
        return f"{self._title}\n{text_table(HEADS, self._rows(), WORDS)}"

    def _repr_html_(self) -> str:
        return html_table(HEADS, self._rows(), words=WORDS, caption=self._title)

    # ---- hooks -----------------------------------------------------------------------------------------------------

    def attach(self) -> Probe:
        """Put the hooks on the model until `detach`."""
        self.network.hold(True)
        return self

    def detach(self) -> None:
        """Take the hooks off the model."""
        self.network.hold(False)

    def __enter__(self) -> Probe:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    # ---- running ---------------------------------------------------------------------------------------------------

    def forward(self, inputs: Inputs) -> Tensor:
        """The model's output for a batch, (N, ...) with at least two dimensions."""
        return self.network.forward(inputs)

    def look(self, inputs: Inputs) -> None:
        """Decide each layer's path on a few examples of a batch, without computing anything."""
        look(self.network, inputs)

    def fisher(
        self,
        data: Any,
        targets: Tensor | str | None = None,
        *,
        kind: str = "exact",
        samples: int = 1,
        reduction: str = "mean",
        generator: torch.Generator | None = None,
        processes: bool = False,
    ) -> Fisher:
        """The Fisher information matrix of the probed parameters over data.

        Args:
            data: a tensor of inputs (N, ...), a tuple (inputs, targets), or a re-iterable of batches; several inputs
                are a tuple of their own, ((a, b), targets or None), or a mapping, of the model's keyword arguments.
                Targets are held against the outputs by every kind.
            targets: targets (N, ...) when `data` is inputs alone, or the entry of each batch's mapping that holds them
                ("labels") and that the model then is not given. Every kind leaves out the positions at which they are
                the likelihood's `ignore_index`, and no others: an attention mask is the model's affair.
            kind: "exact" (expectation over the model's labels, analytic), "mc" (labels sampled from the model) or
                "empirical" (the data's labels).
            samples: sampled labels per example, for kind "mc".
            reduction: "mean" over examples (1/N) or "sum".
            generator: source of the sampled labels; None: a private one seeded from `torch.initial_seed()`.
            processes: share the work with the other processes of torch's process group. All of them make this Fisher
                of the same data and weights, and ask the same of it in the same order; each runs the network on its
                own share of every batch, and all get the same results. False: this process works for itself.

        Returns:
            A `Fisher`; nothing is computed before it is asked for.

        Raises:
            ValueError: an option is unknown, or kind "empirical" comes without targets.
            TypeError: the data is a one-shot iterator, a list that may be one batch or two, or nothing that can be
                iterated.
            RuntimeError: the model's parameters are others than when the Probe was made, or one was frozen since; or
                there is no process group.
        """
        with lock_of(self.model):  # a pass in another thread has other tensors in their place for a while
            now = dict(self.model.named_parameters(remove_duplicate=False))
        if gone := [name for name, p in self.parameters().items() if now.get(name) is not p]:
            raise RuntimeError(
                f"parameter {gone[0]!r} is not the model's any more: a module was replaced, pruned or reparametrised "
                "since the Probe was made; make a new Probe."
            )
        self.network.check_trainable()
        return Fisher(
            self, data, targets, kind=kind, samples=samples, reduction=reduction, generator=generator,
            processes=processes,
        )  # fmt: skip
