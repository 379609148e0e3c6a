"""A row of the catalogue: a network, its data and likelihood, and what must come out; and what does come out.

The oracle is autograd in float64, one example and one label at a time, on a freshly made network for every example, so
that nothing an earlier forward left behind can enter.
"""

import linecache
import random
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

import fisherviz as fv
from tests.oracles import exact, laws

ERRORS = (ValueError, TypeError, RuntimeError, NotImplementedError, MemoryError)
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Of the largest expected entry; solves amplify rounding by the condition number of what they solve, 100."""


CATEGORICAL = laws.Categorical()


@dataclass(frozen=True)
class Row:
    """A network, its data and what must be true.

    Attributes:
        name: of the row.
        build: the network in float64, the same whenever it is called.
        data: what `Probe.fisher` is given, in float64; the same whenever it is called.
        refused: what the refusal says, as a pattern; "" where the answer must be right.
        law: of `laws`, and the name or object that the probe gets.
        likelihood: what the probe gets, where that is not the law's name.
        examples: the arguments of the network for each example, from the data; None: rows of a tensor.
        output: picks the output tensor.
        options: of `Probe.fisher`.
        layers: of the Probe.
        targets: of each example, for the empirical kind.
        around: a context that the user asks in.
        between: what happens to the model after a first request; the requests come after it.
        dtypes: in which it is asked; None: as it is built, which is in float64 for the most part.
        tolerance: for float64 rows whose derivatives are themselves rounded.
        oracle: the network that the definition is applied to, where it is another than `build`.
    """

    name: str
    build: Callable[[], nn.Module]
    data: Callable[[], Any]
    refused: str = ""
    law: Any = CATEGORICAL
    likelihood: Any = None
    examples: Callable[[Any], list[tuple[tuple, dict]]] | None = None
    output: Callable[[Any], torch.Tensor] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    layers: Any = None
    targets: Callable[[], Any] | None = None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    between: Callable[[nn.Module], Any] | None = None
    dtypes: tuple[torch.dtype | None, ...] = (torch.float64, torch.float32)
    tolerance: float | None = None
    oracle: Callable[[], nn.Module] | None = None


@dataclass(frozen=True)
class Outcome:
    """What came out of one row in one precision.

    Attributes:
        verdict: "exact", "refused", or what must not be: "wrong", "raw" (another kind of error), "touched".
        error: largest difference relative to the largest expected entry.
        said: the sentence, or what was wrong.
    """

    verdict: str
    error: float = 0.0
    said: str = ""


def drawn(make: Callable[[], nn.Module], seed: int = 0) -> Callable[[], nn.Module]:
    """The same network in float64 and evaluation mode, with random parameters, whenever it is called."""

    def build() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return make().double().eval()

    return build


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    """Normal random numbers in float64, the same whenever it is called."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cast(data: Any, dtype: torch.dtype) -> Any:
    """Floating tensors of a tensor, tuple, list or dictionary in another precision."""
    return pytree.tree_map(
        lambda leaf: leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf, data
    )


def rows_of(data: Any) -> list[tuple[tuple, dict]]:
    """Each example's arguments of a tensor (N, ...), a pair (inputs, targets), or a list of such batches."""
    batches = data if isinstance(data, list) else [data]
    tensors = [batch[0] if isinstance(batch, tuple) else batch for batch in batches]
    return [((x[n : n + 1],), {}) for x in tensors for n in range(len(x))]


# ---- what must come out ------------------------------------------------------------------------------------------


def expected(row: Row) -> tuple[np.ndarray, list[slice]]:
    """The Fisher by its definition, and the parameters of each module that owns some."""
    build = row.oracle or row.build
    given = (row.examples or rows_of)(row.data())
    targets = row.targets() if row.targets is not None else None
    total, names = 0.0, _probed(build(), row.layers)
    for n, (args, kwargs) in enumerate(given):
        model = build()
        parameters = exact.trainable(model, names)
        with torch.enable_grad():
            z = model(*pytree.tree_map(_copied, args), **pytree.tree_map(_copied, kwargs))
            z = (z if row.output is None else row.output(z)).reshape(-1)
        labels = row.law.labels(z) if targets is None else [(1.0, targets[n])]
        for weight, y in labels:
            found = torch.autograd.grad(
                row.law.log_density(z, y), [p for _, p in parameters], retain_graph=True, allow_unused=True
            )
            score = exact.flatten(found, parameters)
            total = total + weight * np.outer(score, score)
    sums = row.options.get("reduction") == "sum"
    return total if sums else total / len(given), _owners(build(), names)


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def _probed(model: nn.Module, layers: Any) -> set[str] | None:
    if layers is None:
        return None
    chosen = [name for name, p in model.named_parameters() for layer in layers if name.startswith(f"{layer}.")]
    return set(chosen)


def _owners(model: nn.Module, names: set[str] | None) -> list[slice]:
    """Runs of parameters of one owner, in torch order; none where an owner's parameters do not stand together."""
    owners = [(name.rpartition(".")[0], p.numel()) for name, p in exact.trainable(model, names)]
    runs: list[tuple[str, int, int]] = []
    start = 0
    for owner, size in owners:
        if runs and runs[-1][0] == owner:
            runs[-1] = (owner, runs[-1][1], start + size)
        else:
            runs.append((owner, start, start + size))
        start += size
    together = len({owner for owner, _, _ in runs}) == len(runs)
    return [slice(first, last) for _, first, last in runs] if together else []


# ---- what does come out ------------------------------------------------------------------------------------------


def _layer_blocks(f: Any) -> torch.Tensor:
    return fv.approximate(f, "layer").to_dense()


def _inside(F: np.ndarray, blocks: list[slice]) -> np.ndarray:
    out = np.zeros_like(F)
    for part in blocks:
        out[part, part] = F[part, part]
    return out


def _direction(size: int) -> np.ndarray:
    return np.cos(np.arange(size) + 1.0)


REQUESTS: dict[str, tuple[Callable, Callable]] = {
    "dense": (lambda f, v, lam: f.to_dense(), lambda F, v, lam, blocks: F),
    "product": (lambda f, v, lam: f @ v, lambda F, v, lam, blocks: F @ v),
    "diagonal": (lambda f, v, lam: f.diagonal(), lambda F, v, lam, blocks: F.diagonal()),
    "quadratic": (lambda f, v, lam: f.quadratic(v), lambda F, v, lam, blocks: np.array(v @ F @ v)),
    "solve": (
        lambda f, v, lam: f.solve(v, lam),
        lambda F, v, lam, blocks: np.linalg.solve(F + lam * np.eye(len(F)), v),
    ),
    "layer": (lambda f, v, lam: _layer_blocks(f), lambda F, v, lam, blocks: _inside(F, blocks)),
}
"""Name -> what is asked of the package, and what it is by definition."""


def outcome(row: Row, dtype: torch.dtype | None, requests: tuple[str, ...] = tuple(REQUESTS)) -> Outcome:
    """Ask everything of one row, each of a network, a Probe and a Fisher of its own; the worst that comes out."""
    F, blocks = (None, []) if row.refused else expected(row)
    worst, sentence = 0.0, ""
    for name in requests:
        if name == "layer" and F is not None and not blocks:
            continue
        model = row.build() if dtype is None else row.build().to(dtype)
        data = row.data() if dtype is None else cast(row.data(), dtype)
        # models that draw now and then must not hang on what ran before
        random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002
        before, generators = state(model), random_states()
        try:
            with row.around():
                probe = fv.Probe(model, row.likelihood or name_of(row.law), output=row.output, layers=row.layers)
                f = probe.fisher(data, **row.options)
                v, lam = _direction(f.shape[0]), 1.0
                if row.between is not None:
                    f @ torch.as_tensor(v, dtype=dtype or torch.float64)
                    row.between(model)
                    before = state(model)
                if F is not None:
                    lam = 0.01 * float(np.linalg.eigvalsh(F)[-1]) or 1.0
                found = REQUESTS[name][0](f, torch.as_tensor(v, dtype=dtype or torch.float64), lam)
            got = found.detach().double().numpy() if isinstance(found, torch.Tensor) else np.asarray(found)
        except ERRORS as error:
            said = f"{type(error).__name__}: {error}"
            if not row.refused:
                return Outcome("refused" if _ours(error) else "raw", said=f"{name}: {said}")
            if not _ours(error) or "\n" in str(error):
                return Outcome("raw", said=f"{name}: {said}")
            if not re.search(row.refused, str(error)):
                return Outcome("refused otherwise", said=f"{name}: {said}")
            sentence = str(error)
        else:
            if F is None:
                return Outcome("wrong", float("nan"), f"{name} answers where it must refuse")
            want = np.asarray(REQUESTS[name][1](F, v, lam, blocks))
            if got.shape != want.shape or not np.isfinite(got).all():
                return Outcome("wrong", float("inf"), f"{name}: {got.shape} for {want.shape}, or not finite")
            error = float(np.abs(got - want).max() / (np.abs(want).max() or 1.0))
            worst = max(worst, error / (100 if name == "solve" else 1))
            if worst > (row.tolerance or TOLERANCES[dtype or torch.float64]):
                return Outcome("wrong", worst, name)
        if changed := altered(before, state(model)) + altered(generators, random_states()):
            return Outcome("touched", worst, f"{name}: {', '.join(changed)}")
    return Outcome("refused", said=sentence) if row.refused else Outcome("exact", worst)


def _ours(error: BaseException) -> bool:
    """Whether the sentence is the package's own, and not one of torch's or Python's from inside."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or "fisherviz" not in Path(trace.tb_frame.f_code.co_filename).parts:
        return False
    return linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno).strip().startswith("raise")


def name_of(law: Any) -> str:
    """The probe's name of a law."""
    return type(law).__name__.lower()


# ---- the guest ---------------------------------------------------------------------------------------------------


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def state(model: nn.Module) -> dict[str, Any]:
    """All that a user could find changed of a model."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[f"mode of {name}"] = module.training
        for kind in HOOKS:
            found[f"{kind} of {name}"] = list(getattr(module, kind, {}))
        for key, value in vars(module).items():
            if not key.startswith("_") or isinstance(value, torch.Tensor):
                found[f"attribute {name}.{key}"] = _value(value)
    for name, p in model.named_parameters():
        found[f"value of {name}"] = _value(p)
        found[f"identity of {name}"] = (
            id(p),
            p.requires_grad,
            0 if isinstance(p, nn.parameter.UninitializedParameter) or p.is_meta else p.data_ptr(),
        )
        found[f"gradient of {name}"] = None if p.grad is None else _value(p.grad)
        found[f"hooks of {name}"] = list(p._backward_hooks or {})
    for name, buffer in model.named_buffers():
        found[f"buffer {name}"] = (id(buffer), _value(buffer))
    return found


def _value(value: Any) -> Any:
    if isinstance(value, nn.parameter.UninitializedParameter):
        return "no value"
    if isinstance(value, torch.Tensor):
        plain = value.device.type == "cpu" and value.layout == torch.strided and not value.is_quantized
        held = value.detach().contiguous().reshape(-1).view(torch.uint8).tolist() if plain else id(value)
        return value.dtype, tuple(value.shape), held
    if isinstance(value, list | tuple):
        return [_value(v) for v in value]
    if isinstance(value, dict):
        return {key: _value(v) for key, v in value.items()}
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    return repr(value) if isinstance(value, int | float | str | bool | type(None)) else id(value)


def random_states() -> dict[str, Any]:
    """Of the global generators."""
    return {
        "torch's generator": torch.get_rng_state().tolist(),
        "numpy's generator": repr(np.random.get_state()),  # noqa: NPY002
        "Python's generator": random.getstate(),
    }


def altered(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is there no more, is new, or differs."""
    return sorted(key for key in {*before, *after} if before.get(key, "absent") != after.get(key, "absent"))
