"""Operators that were written down are themselves again: structure, numbers, precision and trust."""

import importlib
import json
from inspect import getsource, isabstract, signature
from pathlib import Path
from re import findall

import pytest
import torch

import fisherviz
from fisherviz.operators import BlockMatrix, Dense, Diagonal, DirectSum, Identity, Kronecker, Operator, Zero
from fisherviz.operators.kronecker_sum import KroneckerDifferenceInverse
from fisherviz.operators.recording import Reader, Recorder
from tests.operators.test_operators import ALL, chain, normal, spd


def read_again(operator, segments=()):
    recorder = Recorder(segments=segments)
    plain = json.loads(json.dumps(recorder.plain(operator, "")))
    return Reader(recorder.tensors, (), torch.device("cpu")).value(plain), recorder.tensors


@pytest.mark.parametrize("name", ALL)
def test_every_operator_comes_back_with_its_class_and_its_numbers(name):
    operator, dense = ALL[name]
    found, tensors = read_again(operator)
    assert type(found) is type(operator)
    assert found.shape == operator.shape
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.to_dense(), dense)
    assert not found._trusted
    if not isinstance(operator, Identity | Zero | KroneckerDifferenceInverse):  # these make their tensors themselves
        held = {id(t): t for t in operator.tensors if t.numel()}.values()
        assert sorted(t.numel() for t in tensors.values()) == sorted(t.numel() for t in held)
        assert operator.bytes == found.bytes == sum(8 * t.numel() for t in tensors.values())


def test_a_zero_block_keeps_its_two_sides_and_its_precision():
    for dtype in (torch.float32, torch.float64):
        found, tensors = read_again(Zero(3, 5, dtype))
        assert (found.shape, found.dtype, tensors) == ((3, 5), dtype, {})


def test_an_identity_that_is_not_written_down_is_not_written_down_in_a_file_either():
    A = spd(3)
    found, tensors = read_again(Kronecker.over_units(A, 1000))
    assert [t.shape for t in tensors.values()] == [(3, 3)]
    assert found.first_alone
    assert found.shape == (3000, 3000)
    assert found.damped(0.1).first_alone
    v = normal(3000)
    torch.testing.assert_close(found @ v, (v.view(1000, 3) @ A).reshape(-1))


def test_trust_is_kept():
    assert read_again(Dense(spd(3)).trust())[0]._trusted
    parts = read_again(DirectSum([Dense(spd(3)), Dense(spd(2, 1))]).trust())[0].operators
    assert all(part._trusted for part in parts)


def test_a_chain_with_what_is_near_its_inverse_comes_back():
    operator, blocks = chain()
    dense = torch.cat([torch.cat(row, 1) for row in blocks])
    found, _ = read_again(operator.damped(0.3))
    torch.testing.assert_close(found.to_dense(), dense + 0.3 * torch.eye(10, dtype=torch.float64))
    v = normal(10, 2)
    torch.testing.assert_close(found._near(0.3)(v), operator.damped(0.3)._near(0.3)(v))


def test_tensors_are_named_by_segments_and_those_that_are_shared_stand_once():
    shared = spd(3)
    operator = DirectSum([Kronecker(shared, spd(2, 1)), Kronecker(shared, spd(2, 2))])
    found, tensors = read_again(operator, ("first", "second"))
    assert set(tensors) == {"operators.first.A", "operators.first.G", "operators.second.G"}
    torch.testing.assert_close(found.to_dense(), operator.to_dense())
    coupled = BlockMatrix({(0, 0): Dense(spd(3)), (0, 1): Dense(normal(3, 2)), (1, 1): Dense(spd(2))})
    assert set(read_again(coupled, ("first", "second"))[1]) == {
        "blocks.first-first.M", "blocks.first-second.M", "blocks.second-second.M"
    }  # fmt: skip


def operators(cls=Operator):
    for each in cls.__subclasses__():
        yield each
        yield from operators(each)


def test_every_operator_of_the_package_keeps_what_its_constructor_takes():
    for path in Path(fisherviz.__file__).parent.glob("*/*.py"):
        importlib.import_module(f"fisherviz.{path.parent.name}.{path.stem}")
    concrete = [cls for cls in operators() if cls.__module__.startswith("fisherviz.") and not isabstract(cls)]
    assert len(concrete) > 15
    for cls in concrete:
        taken = set(signature(cls).parameters)
        kept = {name for each in cls.__mro__[:-1] for name in findall(r"self\.(\w+)", getsource(each))}
        assert hasattr(cls, "arguments") or taken <= kept | set(dir(cls)), (cls, taken - kept)


class Lossy(Diagonal):
    """Keeps nothing of what its constructor takes."""

    def __init__(self, entries):
        super().__init__(entries)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Lossy(torch.ones(2)), "a Lossy cannot be saved: it keeps no attribute 'entries'"),
        ([Dense(spd(2)), len], "holds a builtin_function_or_method, which cannot be saved"),
    ],
)
def test_what_cannot_be_written_down_is_told(value, message):
    with pytest.raises(NotImplementedError, match=message):
        Recorder().plain(value, "")


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"class": "Nothing", "name": "", "arguments": {}}, "holds a Nothing, which is not there"),
        ({"class": "Zero", "name": "", "arguments": {"rows": 2}}, "a Zero that takes other arguments"),
    ],
)
def test_what_cannot_be_read_is_told(plain, message):
    with pytest.raises(ValueError, match=message):
        Reader({}, (), torch.device("cpu")).value(plain)
