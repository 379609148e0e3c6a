"""Processes that work on one request together: what each one's share is, and how what they found becomes one result.

All make the same requests in the same order (SPMD). At each exchange they tell what they are at and what went wrong, so
that all go on or all stop with the same sentence, and decisions that depend on sums are the same everywhere.
"""

from __future__ import annotations

import io
import itertools
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")
R = TypeVar("R")


class ProcessesParted(ConnectionError):
    """The processes have lost one another: one has ended, or they ask for different things."""


def grouped() -> bool:
    """Whether torch's process group has several processes."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def summed(values: Sequence[float], device: torch.device) -> list[float]:
    """Sums over the processes of torch's group, in float64; the values themselves in a run of one process.

    Args:
        values: this process's.
        device: where the processes exchange tensors.

    Returns:
        As many numbers, the same bits in every process.
    """
    if not grouped():
        return list(values)
    total = torch.tensor(list(values), dtype=torch.float64, device=device)
    with _connected():
        distributed.all_reduce(total)
    return total.tolist()


@dataclass(frozen=True)
class Processes:
    """The processes of torch's default group; by default this one alone, for which nothing here costs anything.

    Args:
        rank: of this process.
        count: of the processes.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def of_group(cls) -> Processes:
        """Those of the group that `torch.distributed.init_process_group` made; RuntimeError without one."""
        if not (distributed.is_available() and distributed.is_initialized()):
            raise RuntimeError(
                "processes=True shares the work among the processes of torch's group, and there is none; call "
                "torch.distributed.init_process_group() in each of them first, or leave processes= out."
            )
        return cls(distributed.get_rank(), distributed.get_world_size())

    @classmethod
    def training(cls) -> Processes:
        """Those that train together: the group's, where there is one."""
        return cls.of_group() if grouped() else ALONE

    # ---- shares ----------------------------------------------------------------------------------------------------

    def share(self, size: int, first: int = 0) -> tuple[int, int]:
        """The range start..stop of `size` things, number `first` and following of all, that is this process's.

        Ranges follow one another by rank, nothing is in two of them, and what the processes have of all things so far
        differs by one at most.
        """
        each, extra = divmod(size, self.count)
        sizes = [each + ((rank - first) % self.count < extra) for rank in range(self.count)]
        start = sum(sizes[: self.rank])
        return start, start + sizes[self.rank]

    def deal(self, items: Sequence[T], work: Callable[[T], R], what: str) -> list[R]:
        """The work's result for each item, in order and in all processes, each item done by the next that is free.

        Args:
            items: the same in all processes.
            work: must wait for no other process; its results are pickled.
            what: the work in words.
        """
        if self.count == 1:
            return [work(item) for item in items]
        mine: dict[int, R] = {}
        board = _Board()
        with self.agreeing(what) as check:
            while (i := board.take()) < len(items):
                mine[i] = work(items[i])
                check()
        found = {i: result for part in self.exchange(mine) for i, result in part.items()}
        return [found[i] for i in range(len(items))]

    # ---- exchange --------------------------------------------------------------------------------------------------

    @contextmanager
    def agreeing(self, what: str) -> Iterator[Callable[[], None]]:
        """Work of each process for itself, after which all go on, or all raise what ended it in the first of them.

        Args:
            what: the work in words.

        Yields:
            What long work calls now and then, to end early where another process has failed.

        Raises:
            ProcessesParted: other processes are at other work, or gone.
            Exception: with the failing one's sentence and rank, of its builtin class; where all fail alike, their own.
        """
        if self.count == 1:
            yield lambda: None
            return
        board, error = _Board(), None
        try:
            yield board.check
        except ProcessesParted:
            raise
        except _Stopped:
            pass
        except Exception as raised:
            error = raised
            board.leave()
        said = self.exchange((what, None if error is None else (type(plain(error)), str(error))))
        if others := [(rank, other) for rank, (other, _) in enumerate(said) if other != said[0][0]]:
            rank, other = others[0]
            raise ProcessesParted(
                f"process 0 is at {said[0][0]} and process {rank} at {other}; "
                "make the same requests in the same order in every process."
            ) from error
        failures = [(rank, found) for rank, (_, found) in enumerate(said) if found is not None]
        if not failures:
            return
        rank, (kind, sentence) = failures[0]
        if error is not None and len(failures) == self.count and len({found for _, found in failures}) == 1:
            raise error
        raise kind(f"process {rank} of {self.count}: {sentence}") from error

    def exchange(self, mine: T) -> list[T]:
        """What each process gives, by rank, in all of them; small things that pickle."""
        if self.count == 1:
            return [mine]
        found: list[Any] = [None] * self.count
        with _connected():
            distributed.all_gather_object(found, mine)
        return found

    def all(self, mine: bool) -> bool:
        """Whether it is so in all processes."""
        return all(self.exchange(mine))

    def add_up(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Sums over the processes, in place where there is a place, of tensors that some may not have.

        Args:
            tensors: as many in all processes, each of one shape and type; None: nothing to add.

        Returns:
            The sums, the same bits in all processes; None where no process has anything.
        """
        if self.count == 1:
            return list(tensors)
        kinds = self.exchange([None if t is None else (tuple(t.shape), t.dtype, t.device.type) for t in tensors])
        if len({len(theirs) for theirs in kinds}) > 1:
            raise ProcessesParted("the processes add up different things; make the same requests in every process.")
        found: list[Tensor | None] = []
        for mine, theirs in zip(tensors, zip(*kinds, strict=True), strict=True):
            known = {kind for kind in theirs if kind is not None}
            if len(known) > 1:
                raise RuntimeError(f"sums of several processes have different shapes: {sorted(map(str, known))}.")
            if not known:
                found.append(None)
                continue
            ((shape, dtype, device),) = known
            found.append(self.total(torch.zeros(shape, dtype=dtype, device=device) if mine is None else mine))
        return found

    def total(self, mine: Tensor) -> Tensor:
        """The sum over the processes, in place where there is a place, of a tensor that all of them have."""
        if self.count == 1:
            return mine
        mine = mine.contiguous()
        with _connected():
            distributed.all_reduce(mine)
        return mine

    def broadcast(self, tensor: Tensor, rank: int) -> Tensor:
        """A process's tensor in all of them, in place.

        Args:
            tensor: of that process; of the others one of the same shape and type, which is filled.
            rank: whose it is.
        """
        if self.count > 1 and tensor.numel():
            with _connected():
                distributed.broadcast(tensor, src=rank)
        return tensor

    def gather(self, mine: T, device: torch.device) -> list[T]:
        """What each process gives, by rank, in all of them; its tensors go as they are, without being pickled.

        Args:
            mine: whatever pickles but for its tensors.
            device: where these are.
        """
        if self.count == 1:
            return [mine]
        body, own = io.BytesIO(), list[Tensor]()
        _Packed(body, own).dump(mine)
        heads = self.exchange((body.getvalue(), [(tuple(t.shape), t.dtype) for t in own]))
        found = []
        for rank, (skeleton, kinds) in enumerate(heads):
            parts = own if rank == self.rank else [torch.empty(s, dtype=d, device=device) for s, d in kinds]
            for part in parts:
                if part.numel():
                    # as bytes, which every backend takes
                    self.broadcast(part.contiguous().view(-1).view(torch.uint8), rank)
            found.append(mine if rank == self.rank else _Unpacked(io.BytesIO(skeleton), parts).load())
        return found


ALONE = Processes()
"""This process, which waits for no other."""


_turns = itertools.count()
"""Numbers of the pieces of work, the same in all processes."""


class _Stopped(Exception):
    """Another process has failed at the same work; the exchange that follows tells how."""


class _Board:
    """What processes at the same work leave for one another in the group's store, without waiting."""

    def __init__(self) -> None:
        self.key, self.looked = f"fisherviz/{next(_turns)}", time.monotonic()
        self.store = distributed.distributed_c10d._get_default_store()

    def leave(self) -> None:
        """Say that this process has failed."""
        with _connected():
            self.store.set(self.key, "failed")

    def take(self) -> int:
        """The number of the next thing to do, which no other process gets."""
        with _connected():
            return self.store.add(self.key, 1) - 1

    def check(self) -> None:
        """Stop where another process has failed; looked up once a second."""
        if time.monotonic() - self.looked > 1:
            self.looked = time.monotonic()
            with _connected():
                if self.store.check([self.key]):
                    raise _Stopped


class _Packed(pickle.Pickler):
    """Pickles all but the tensors, which are set aside."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_id(self, obj: Any) -> int | None:
        """A tensor's place among those set aside."""
        if not isinstance(obj, Tensor):
            return None
        self.tensors.append(obj.detach())
        return len(self.tensors) - 1


class _Unpacked(pickle.Unpickler):
    """Puts the tensors back."""

    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        """The tensor of a place."""
        return self.tensors[pid]


def plain(error: Exception) -> Exception:
    """An error that every process can make: itself, or its sentence as the nearest builtin class."""
    if type(error) in _PLAIN and len(error.args) == 1:
        return error
    return next((kind for kind in _PLAIN if isinstance(error, kind)), RuntimeError)(str(error))


_PLAIN = (NotImplementedError, RuntimeError, MemoryError, ValueError, TypeError, OSError)


@contextmanager
def _connected() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch's class for a connection that breaks, and for one that waits too long
        raise ProcessesParted("another process has ended or does not answer; look at what it says itself.") from error
