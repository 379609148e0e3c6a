"""The user's data as a re-iterable of batches: no one-shot iterators, and every pass shows the same examples.

Relied on by the Probe and the Fisher, which make several passes over the same data.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset

from fisherviz.network.distributions import Likelihood
from fisherviz.network.forms import is_pair, is_split_batch
from fisherviz.network.guest import digest, fingerprint_of, undisturbing

Inputs = Any
"""A tensor, a tuple or list of positional or a dictionary of keyword arguments, or `Arguments`."""
LABELS = "labels"
"""The entry of a dictionary that Hugging Face's collators make of the targets."""


class Arguments(NamedTuple):
    """What a model is called with, as a hook sees it, and what its outputs weigh in the Fisher.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        weight: of each position of the output (N, ...), 0 where it is left out; None: 1.
        targets: that came with them and are still to be held against the output.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    weight: Tensor | None = None
    targets: Tensor | None = None

    @property
    def examples(self) -> Tensor | None:
        """Positions (N',) of the examples that count; None: all."""
        return None if self.weight is None else counted_examples(self.weight)


def counted_examples(counted: Tensor) -> Tensor:
    """Positions (N',) of the examples with a position that counts, of (N, ...)."""
    return (counted.flatten(1) if counted.dim() > 1 else counted.unsqueeze(1)).any(1).nonzero()[:, 0]


def arguments(inputs: Inputs) -> Arguments:
    """A batch's inputs as the model's arguments."""
    if isinstance(inputs, Arguments):
        return inputs
    if isinstance(inputs, dict):
        return Arguments((), inputs)
    return Arguments((inputs,) if isinstance(inputs, Tensor) else tuple(inputs), {})


def cloned(inputs: Inputs) -> Inputs:
    """The same with tensors of its own: some models change their input in place."""
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, inputs)


class Batches:
    """Data given as a tensor, a tuple (inputs, targets) or a re-iterable of batches.

    Args:
        data: inputs (a tensor or dictionary), a tuple (inputs, targets), or a list or DataLoader of such batches.
        targets: targets of all examples, when `data` is inputs alone; or the entry of each batch's dictionary that
            holds them, which the model then is not given.
        repeats: whether every pass must show the same examples; False for a stream of mini-batches, which may shuffle.
        counted: tells which positions (N, ...) of targets count, None for all: examples without any are left out.
        likelihood: whose targets they are, which may tell what a list of two tensors is; None: of any.
        belongs: whether a tensor can be targets of the model's outputs for some inputs, which may tell too.

    Raises:
        TypeError: the data is a one-shot iterator, a Dataset, a list that may be one batch or two, or nothing that can
            be iterated.
    """

    def __init__(
        self,
        data: Any,
        targets: Tensor | str | None = None,
        *,
        repeats: bool = True,
        counted: Callable[[Tensor], Tensor | None] = lambda targets: None,
        likelihood: Likelihood | None = None,
        belongs: Callable[[Any, Tensor], bool] | None = None,
    ) -> None:
        if isinstance(data, Iterator):
            raise TypeError(
                f"the data is a one-shot iterator ({type(data).__name__}), and several passes see the same examples; "
                "pass a list of batches or a DataLoader."
            )
        if isinstance(data, Dataset):
            raise TypeError(
                f"the data is a Dataset ({type(data).__name__}) of single examples; "
                "wrap it: DataLoader(dataset, batch_size=256)."
            )
        if isinstance(data, list) and is_split_batch(data, likelihood, belongs):
            data = tuple(data)
        whole = isinstance(data, Tensor | tuple | Mapping)
        self._entry = targets if isinstance(targets, str) else None
        if targets is not None and self._entry is None and not (whole and not is_pair(data)):
            raise TypeError(
                "targets= goes with a tensor of inputs; batches carry their own targets as tuples (inputs, targets), "
                "or as an entry of their dictionaries, targets='labels'."
            )
        if not whole and not isinstance(data, Iterable):
            raise TypeError(f"data must be a tensor, a tuple (inputs, targets) or batches, got {type(data).__name__}.")
        if isinstance(data, Sequence) and len(data) == 0:
            raise ValueError("the data set is empty; pass at least one example.")
        with_targets = targets is not None and self._entry is None
        self._source: Iterable[Any] = [(data, targets) if with_targets else data] if whole else data
        self._repeats, self._counted = repeats, counted
        self._seen: list[str] | None = None

    def __iter__(self) -> Iterator[tuple[Inputs, Tensor | None]]:
        """Yield (inputs, targets) batches; RuntimeError if they differ from the first pass's, unless none repeats."""
        seen: list[str] = []
        sides, empty = _SideInputs(), True
        plain = isinstance(self._source, list | tuple) or not self._repeats
        for batch in self._source if plain else undisturbing(self._source):
            inputs, targets = split_batch(batch, self._entry)
            sides.check(inputs)
            mark = _mark(inputs, targets) if self._repeats else ""
            if self._seen is not None and (len(seen) >= len(self._seen) or self._seen[len(seen)] != mark):
                self._complain()
            seen.append(mark)
            if targets is not None and (counted := self._counted(targets)) is not None:
                rows = counted_examples(counted)
                if not len(rows):
                    continue
                if len(rows) < len(targets):
                    inputs, targets = take_rows(inputs, rows), targets[rows]
            empty = False
            yield inputs, targets
        if not seen:
            raise ValueError(
                "the data set is empty; pass at least one example, in a list of batches or a DataLoader, which can be "
                "iterated again."
            )
        if empty:
            raise ValueError("the targets leave out every position of the data; pass some that count.")
        if not self._repeats:
            return
        if self._seen is not None and len(seen) != len(self._seen):
            self._complain()
        self._seen = seen

    @property
    def certainly_without_targets(self) -> bool:
        """Whether it is known without iterating that no batch has targets."""
        source = self._source if isinstance(self._source, list) else ()
        return bool(source) and all(split_batch(batch, self._entry)[1] is None for batch in source)

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of the examples of the first pass, "" before it and for streams."""
        return digest(tuple(self._seen)) if self._seen else ""

    @staticmethod
    def _complain() -> None:
        raise RuntimeError(
            "a pass over the data saw other examples than the first one (shuffling, augmentation, or changed tensors); "
            "pass a DataLoader with shuffle=False and without random transforms, or a fixed list of batches."
        )


class _SideInputs:
    """Notices inputs that are no examples, such as a mask (T, T), in a batch of as many examples as they are long."""

    def __init__(self) -> None:
        self.lengths: dict[int, set[bool]] = {}
        self.previous: list[Any] = []

    def check(self, inputs: Inputs) -> None:
        """Look at one more batch; ValueError where an input was taken for examples that cannot be."""
        leaves = pytree.tree_leaves(inputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
        if len(tensors) > 1:
            n = len(tensors[0])
            other = bool(self.previous) and self.previous[0] is not tensors[0]
            for i, leaf in enumerate(tensors[1:], 1):
                kinds = self.lengths.setdefault(i, set())
                kinds.add(len(leaf) == n)
                shared = other and len(leaf) == n and i < len(self.previous) and self.previous[i] is leaf
                if len(kinds) > 1 or shared:
                    raise ValueError(
                        f"input {i} of a batch, {tuple(leaf.shape)}, belongs to no single example, but a batch has as "
                        "many examples as it is long, so that it would be cut into examples; keep it in the model, or "
                        "use batches of another size."
                    )
        self.previous = tensors


def split_batch(batch: Any, entry: str | None = None) -> tuple[Inputs, Tensor | None]:
    """A batch's inputs and targets.

    Args:
        batch: a pair (inputs, targets), or inputs alone; any mapping is a dictionary.
        entry: the entry of the inputs' dictionary that holds the targets; it is taken out.
    """
    inputs, targets = batch, None
    if is_pair(batch):
        inputs, targets = batch
    elif isinstance(batch, tuple | list) and len(batch) == 1:
        inputs = batch[0]
    if isinstance(inputs, Mapping):
        inputs = dict(inputs)  # also Hugging Face's BatchEncoding, a mapping that is no dict
    if entry is not None:
        inputs, targets = _without(inputs, targets, entry)
    elif targets is None and isinstance(inputs, dict) and LABELS in inputs:
        raise ValueError(
            f"a batch's dictionary has an entry {LABELS!r}: pass targets={LABELS!r} to have the targets there and not "
            "give them to the model (for a causal model shifted as its loss shifts them, so that those of position t "
            "are the token at t + 1), or pairs (inputs, targets)."
        )
    if targets is not None:
        targets = _as_targets(targets)
    n = count_examples(inputs)
    if targets is not None and len(targets) != n:
        raise ValueError(f"a batch has {n} inputs but {len(targets)} targets; their first dimensions must agree.")
    return inputs, targets


def _without(inputs: Inputs, targets: Any, entry: str) -> tuple[Inputs, Any]:
    """The inputs' dictionary without one entry, and that entry."""
    if targets is not None or not isinstance(inputs, dict) or entry not in inputs:
        there = f"has the entries {', '.join(map(repr, inputs))}" if isinstance(inputs, dict) else "is none"
        there = "has other targets in a pair" if targets is not None else there
        raise ValueError(
            f"targets={entry!r} names an entry of each batch's dictionary, and a batch {there}; name another, or leave "
            "targets= out."
        )
    return {name: value for name, value in inputs.items() if name != entry}, inputs[entry]


def _as_targets(targets: Any) -> Tensor:
    """Targets given as a tensor or as numbers that make one: of numpy and pandas in any byte order, by position."""
    if not isinstance(targets, Tensor):
        if isinstance(targets, np.ma.MaskedArray) and np.ma.is_masked(targets):
            raise ValueError(
                f"{int(np.ma.count_masked(targets))} targets are masked, and what is under a mask is no target; give "
                "those labels the likelihood's ignore_index, or leave their examples out."
            )
        try:
            if hasattr(targets, "__array__"):
                array = np.asarray(targets)
                targets = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
            targets = torch.as_tensor(targets, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"targets must be a tensor, or numbers that make one, got {type(targets).__name__} ({error}); "
                "give class indices (N,) or values (N, D)."
            ) from error
    if targets.layout != torch.strided or targets.is_nested or targets.is_complex() or targets.is_quantized:
        raise TypeError(
            "targets must be dense and real tensors, got a sparse, nested, quantised or complex one; convert it with "
            "to_dense(), torch.nested.to_padded_tensor, dequantize() or torch.view_as_real."
        )
    if targets.is_meta:
        raise TypeError("targets are on the meta device, where tensors have no values; give those of the data.")
    if targets.dim() == 0:
        raise ValueError("targets need a first dimension that counts examples, got a single number.")
    return targets


def explain_refusal(model: nn.Module, inputs: Inputs, dtype: torch.dtype, error: Exception) -> Exception | None:
    """What to tell a user whose model did not take a batch: how batches are given, or which types differ.

    Args:
        model: the model.
        inputs: what it was called with.
        dtype: of its parameters.
        error: what it raised.

    Returns:
        A clearer error, or None where the model itself failed.
    """
    given = arguments(inputs)
    try:
        inspect.signature(model.forward).bind(*given.args, **given.kwargs)
    except TypeError as mismatch:
        return TypeError(
            f"{type(model).__name__}.forward does not take a batch's inputs ({mismatch}); a batch is inputs or a pair "
            "(inputs, targets), and inputs are a tensor, a tuple of positional or a dictionary of keyword arguments: "
            "bring yours into that form, for example ({'x': x}, labels)."
        )
    except ValueError:  # a forward without a signature
        return None
    types = {leaf.dtype for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)} - {dtype}
    of_types = re.search("dtype|scalar type|input type", str(error), re.IGNORECASE)
    if isinstance(error, RuntimeError) and types and of_types:
        names = ", ".join(sorted(str(t).removeprefix("torch.") for t in types))
        wanted = str(dtype).removeprefix("torch.")
        return ValueError(
            f"the model's parameters are {wanted} and the data is {names}, which it refuses ({error}); "
            f"convert one of them: inputs.to(torch.{wanted}), or model.to(...) before the Probe is made."
        )
    return None


def count_examples(inputs: Inputs) -> int:
    """Number of examples in a batch's inputs: the first dimension of its first tensor."""
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    if any(leaf.layout != torch.strided or leaf.is_nested or leaf.is_complex() for leaf in leaves):
        raise TypeError(
            "a batch's inputs must be dense and real tensors, got a sparse, nested or complex one; convert it with "
            "to_dense(), torch.nested.to_padded_tensor or torch.view_as_real."
        )
    if not leaves:
        raise TypeError(f"a batch's inputs must be tensors, got {_kinds(inputs)}; convert them with torch.as_tensor.")
    if leaves[0].dim() == 0:
        raise ValueError("a batch's inputs need a first dimension that counts examples, got a scalar.")
    if len(leaves[0]) == 0:
        raise ValueError("a batch is empty; pass at least one example in each batch.")
    return len(leaves[0])


def _kinds(inputs: Any) -> str:
    """What inputs without a tensor are, and what they hold."""
    held = sorted({type(leaf).__name__ for leaf in pytree.tree_leaves(inputs)})
    own = type(inputs).__name__
    return own if held in ([], [own]) else f"{own} of {' and '.join(held[:3])}"


def select(inputs: Inputs, start: int, stop: int) -> Inputs:
    """Examples start..stop of a batch's inputs."""
    return _cut(inputs, lambda leaf: leaf[start:stop])


def take_rows(inputs: Inputs, index: Tensor) -> Inputs:
    """Examples of a batch's inputs by their positions (R,)."""
    return _cut(inputs, lambda leaf: leaf[index.to(leaf.device)])


def _cut(inputs: Inputs, rows: Callable[[Tensor], Tensor]) -> Inputs:
    n = count_examples(inputs)

    def cut(leaf: Any) -> Any:
        return rows(leaf) if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == n else leaf

    return pytree.tree_map(cut, inputs)


def move(inputs: Inputs, device: torch.device) -> Inputs:
    """A batch's inputs on a device, as ordinary tensors also when made under inference mode."""

    def put(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.to(device)
        return leaf.clone() if leaf.is_inference() else leaf.detach()

    return pytree.tree_map(put, inputs)


def _mark(inputs: Inputs, targets: Tensor | None) -> str:
    """Digest of a batch's content: any other examples, or the same ones altered or reordered, have another."""
    leaves = pytree.tree_leaves((inputs, targets))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    others = [leaf for leaf in leaves if isinstance(leaf, int | float | str)]
    return digest((*fingerprint_of(tensors), *others))
