"""Saved approximations: every method over the zoo comes back with the same numbers, without network and data."""

import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import fisherviz as fv
from fisherviz.approximations import exact, make, units
from fisherviz.matrices import stored
from fisherviz.operators import Kronecker, Operator
from fisherviz.operators.base import Symmetric
from fisherviz.statistics import InputFactor, OutputFactor
from tests.covering import some
from tests.oracles import nets
from tests.oracles.checks import assert_matches
from tests.oracles.zoo import CASES, EACH

pytestmark = pytest.mark.filterwarnings("ignore")
LAMBDA = 0.3


def small(reduction="mean", kind="exact"):
    net = nets.randomised(nets.mlp(3, 4, 2))
    x = nets.vectors(5, 3)
    return net, fv.Probe(net, "gaussian").fisher(x, reduction=reduction, kind=kind)


def equal(found, made):
    """The same numbers; the layout in memory is another one, and with it the order of a product's sums."""
    assert found.dtype == made.dtype
    assert_matches(found, made, 1e-12)


@pytest.mark.covering
@pytest.mark.parametrize("name", some(CASES, *EACH))
@pytest.mark.parametrize("methods", [list(fv.approximations)[k::4] for k in range(4)], ids=",".join)
def test_every_method_on_every_kind_of_layer_comes_back_with_the_same_numbers(name, methods, tmp_path):
    build, data = CASES[name]
    torch.manual_seed(0)
    net = nets.randomised(build())
    fisher = fv.Probe(net, "gaussian").fisher(data())
    v = torch.randn(fisher.shape[0], 2).double()
    for method in methods:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                made = fv.approximate(fisher, method)
            except (ValueError, TypeError, RuntimeError, MemoryError):
                continue  # a method may refuse a network: test_zoo
        found = fv.load_approximation(made.save(tmp_path / f"{method}.safetensors"))
        for order in ("torch", "unit", "input"):
            equal(found.to_dense(order), made.to_dense(order))
        equal(found @ v, made @ v)
        equal(found.diagonal(), made.diagonal())
        equal(found.solve(v, LAMBDA), made.solve(v, LAMBDA))
        equal(found.block(0, -1), made.block(0, -1))
        probed = {name for layer in made.layers for name in layer.parameters}
        weights = {name: p.detach() for name, p in net.named_parameters() if name in probed}
        for name, value in (found @ weights).items():
            equal(value, (made @ weights)[name])
        assert found.layers == made.layers
        assert (found.name, found.kind, found.reduction) == (method, "exact", "mean")


@pytest.mark.parametrize("name", some(CASES, *EACH))
def test_what_large_layers_keep_in_place_of_their_blocks_comes_back_too(name, tmp_path, monkeypatch):
    """Captures of examples, with whatever their layer is: exact blocks and unit blocks that are never formed."""
    monkeypatch.setattr(units, "FORMED_ENTRIES", 0)
    monkeypatch.setattr(exact, "MOST_DENSE_PARAMETERS", 0)
    build, data = CASES[name]
    torch.manual_seed(0)
    fisher = fv.Probe(nets.randomised(build()), "gaussian").fisher(data())
    v = torch.randn(fisher.shape[0], 2).double()
    for method in (make("layer", dense_parameters=0), make("cw-ngd")):
        made = method.fit(fisher)
        for i, matrix in enumerate((made, made.scale(2.0), made.damped(LAMBDA))):
            found = fv.load_approximation(matrix.save(tmp_path / f"{method.name}-{i}.safetensors"))
            equal(found.to_dense(), matrix.to_dense())
            equal(found @ v, matrix @ v)
            equal(found.solve(v, LAMBDA), matrix.solve(v, LAMBDA))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("method", fv.approximations)
def test_damped_and_scaled_matrices_are_saved_too(method, reduction, tmp_path):
    _, fisher = small(reduction)
    made = fv.approximate(fisher, method)
    v = torch.randn(fisher.shape[0], dtype=torch.float64)
    for i, matrix in enumerate((made, made.scale(2.0), made.damped(LAMBDA), made.damped(LAMBDA).scale(0.5))):
        found = fv.load_approximation(matrix.save(tmp_path / f"{i}"))
        equal(found.to_dense(), matrix.to_dense())
        equal(found.solve(v, LAMBDA), matrix.solve(v, LAMBDA))


def test_another_process_reads_it_without_network_and_data(tmp_path):
    _, fisher = small()
    made = fv.approximate(fisher, "kfac")
    made.save(tmp_path / "kfac.safetensors")
    code = (
        "import sys, torch, fisherviz as fv; m = fv.load_approximation(sys.argv[1]); print(m); "
        "torch.save(m.inverse(0.1).to_dense(), sys.argv[2])"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "kfac.safetensors", tmp_path / "inverse.pt"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert said.stdout.startswith("kfac approximation, 26 x 26 (exact, mean, 2 layers")
    equal(torch.load(tmp_path / "inverse.pt"), made.inverse(0.1).to_dense())


def test_factors_are_read_by_their_layers_names(tmp_path):
    net, fisher = small()
    made = fv.approximate(fisher, "kfac")
    made.save(tmp_path / "kfac.safetensors")
    with safe_open(tmp_path / "kfac.safetensors", "pt") as file:
        names = set(file.keys())
        for name, module in net.named_modules():
            if isinstance(module, nn.Linear):
                A, G = (file.get_tensor(f"operators.{name}.{factor}") for factor in "AG")
                unit = torch.arange(module.weight.numel()).view(module.weight.shape)
                kept = torch.kron(G, A[:-1, :-1])  # the weights' part of the block: the bias is A's last row
                assert_matches(kept, made.block(name)[unit.flatten()][:, unit.flatten()])
    assert len(names) == 4


def test_what_is_read_is_written_again_bit_for_bit(tmp_path):
    made = fv.approximate(small()[1], "kfac-full")
    once = made.save(tmp_path / "once")
    twice = fv.load_approximation(once).save(tmp_path / "twice")
    with safe_open(once, "pt") as one, safe_open(twice, "pt") as other:
        assert all(torch.equal(one.get_tensor(name), other.get_tensor(name)) for name in one.keys())  # noqa: SIM118


def test_half_precision_comes_back_in_its_own(tmp_path):
    net = nets.randomised(nets.mlp(3, 4, 2)).bfloat16()
    made = fv.approximate(fv.Probe(net, "gaussian").fisher(nets.vectors(5, 3).bfloat16()), "kfac")
    found = fv.load_approximation(made.save(tmp_path / "kfac"))
    v = torch.randn(26).bfloat16()
    assert torch.equal(found @ v, made @ v)
    assert (found @ v).dtype == torch.bfloat16


def _whole():
    with tempfile.TemporaryDirectory() as folder:
        return fv.approximate(small()[1], "kfac").save(Path(folder) / "kfac").read_bytes()


WHOLE = _whole()


class Halved(Symmetric):
    """A user's own operator, half of another one."""

    def __init__(self, other: Operator) -> None:
        self.other = other
        self.shape, self.tensors = other.shape, other.tensors

    def _matmul(self, v):
        return self.other @ v / 2

    def to_dense(self):
        return self.other.to_dense() / 2

    def diagonal(self):
        return self.other.diagonal() / 2

    def scale(self, factor):
        return Halved(self.other.scale(factor))

    def shifted(self, value):
        return Halved(self.other.shifted(2 * value))

    def inverse(self):
        return self.other.inverse().scale(2)

    def _solve(self, v):
        return self.other.solve(v) * 2

    def _norm(self, order):
        return self.other.norm(order) / 2


class Mine(fv.Approximation):
    """Half of K-FAC."""

    def statistics(self, layer):
        return {"A": InputFactor(layer.name), "G": OutputFactor(layer.name)}

    def operator_for(self, layer, values):
        return Halved(Kronecker(values["A"], values["G"]))


def test_a_users_own_operator_is_saved_by_what_its_constructor_takes(tmp_path):
    _, fisher = small()
    made = fv.approximate(fisher, Mine)
    found = fv.load_approximation(made.save(tmp_path / "mine"))
    equal(found.to_dense(), made.to_dense())
    assert isinstance(found.operators[0], Halved)


def test_an_operator_that_keeps_nothing_of_its_constructor_says_what_to_do(tmp_path):
    class Forgetful(Halved):
        def __init__(self, given):
            super().__init__(given)

    class Theirs(Mine):
        def operator_for(self, layer, values):
            return Forgetful(Kronecker(values["A"], values["G"]))

    made = fv.approximate(small()[1], Theirs)
    with pytest.raises(NotImplementedError, match=r"keeps no attribute 'given'.* define a method arguments\(\)"):
        made.save(tmp_path / "theirs")
    assert not list(tmp_path.iterdir())


def test_an_inverse_is_refused_with_the_way_out(tmp_path):
    made = fv.approximate(small()[1], "kfac-tridiagonal").inverse(fv.FactoredTikhonov(0.1))
    with pytest.raises(NotImplementedError, match="save the approximation itself, and damp or invert it after loading"):
        made.save(tmp_path / "inverse")


def test_what_is_no_saved_matrix_is_refused(tmp_path):
    (tmp_path / "text").write_text("no tensors")
    save_file({"x": torch.ones(1)}, tmp_path / "others")
    made = fv.approximate(small()[1], "kfac")
    whole = made.save(tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-8])
    for name in ("text", "others", "cut", "nowhere"):
        with pytest.raises(ValueError, match=r"holds no saved approximation .*; give the file that .* save\(\) wrote"):
            fv.load_approximation(tmp_path / name)
    with pytest.raises(TypeError, match="a path is a string or a Path"):
        fv.load_approximation(3)


def rewritten(path, change):
    """A saved file with other facts, and the checksum of those: what somebody forges."""
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["fisherviz"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    text = change(json.dumps(facts))
    save_file(tensors, path, {"fisherviz": text, "sha256": stored._digest(text, tensors)})
    return path


def test_a_newer_format_and_a_strangers_class_are_refused(tmp_path):
    made = fv.approximate(small()[1], "kfac")
    newer = rewritten(made.save(tmp_path / "newer"), lambda text: text.replace('"format": 1', '"format": 99'))
    with pytest.raises(ValueError, match="is in format 99, this release reads up to 1; upgrade fisherviz"):
        fv.load_approximation(newer)
    stranger = rewritten(made.save(tmp_path / "stranger"), lambda text: text.replace('"Kronecker"', '"os.system"'))
    with pytest.raises(ValueError, match=r"holds a os\.system, which is not there"):
        fv.load_approximation(stranger)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_flipped_bit_anywhere_is_noticed(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kfac"
        path.write_bytes(WHOLE)
        content = bytearray(WHOLE)
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"holds no saved approximation|is damaged|is in format"):
            fv.load_approximation(path)


def places(value, way=()):
    """Every place in nested plain values."""
    yield way
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*way, key))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_forged_facts_are_refused_in_a_sentence_or_read_as_a_matrix(data):
    def forged(text):
        facts = json.loads(text)
        *way, last = data.draw(st.sampled_from([way for way in places(facts) if way]))
        inside = facts
        for key in way:
            inside = inside[key]
        inside[last] = data.draw(st.sampled_from([None, -1, 10**30, "", "x", [], {}, [[[]]], {"class": "Kronecker"}]))
        return json.dumps(facts)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kfac"
        path.write_bytes(WHOLE)
        rewritten(path, forged)
        said = ""
        try:
            shape = fv.load_approximation(path).shape
        except ValueError as error:
            shape, said = None, str(error)
        assert shape == (26, 26) or str(path) in said


OTHERS = {
    "weights": lambda net, x: (nets.randomised(nets.mlp(3, 4, 2)), x, {}),
    "data": lambda net, x: (net, x + 1, {}),
    "kind": lambda net, x: (net, x, {"kind": "mc"}),
    "reduction": lambda net, x: (net, x, {"reduction": "sum"}),
    "layers": lambda net, x: (nets.randomised(nets.mlp(3, 5, 2)), x, {}),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_matrix_that_was_made_from_something_else_is_refused_by_its_name(what, tmp_path):
    net, given = nets.randomised(nets.mlp(3, 4, 2)), nets.vectors(5, 3)
    path = fv.approximate(fv.Probe(net, "gaussian").fisher(given), "kfac").save(tmp_path / "kfac.safetensors")
    again = fv.Probe(net, "gaussian").fisher(given.clone())
    assert fv.load_approximation(path, fisher=again).differs_from(again) == []
    other, x, options = OTHERS[what](net, given)
    found = fv.Probe(other, "gaussian").fisher(x, **options)
    differing = fv.load_approximation(path).differs_from(found)
    assert differing == ([what] if what != "layers" else ["layers", "weights"])
    with pytest.raises(ValueError, match=f"was made with other {' and other '.join(differing)} than this Fisher's"):
        fv.load_approximation(path, fisher=found)


def test_a_file_that_does_not_say_what_it_was_made_from_is_read(tmp_path):
    """As those of release 0.1.0; a damped matrix does not say it either."""
    _, fisher = small()
    damped = fv.approximate(fisher, "kfac").damped(0.1)
    found = fv.load_approximation(damped.save(tmp_path / "damped.safetensors"), fisher=fisher)
    assert found.fingerprints == {"data": "", "weights": ""}


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    """safetensors opens a file twice: facts of the old one and entries of the new one looked like damage."""
    net, x = nets.mlp(3, 4, 2), nets.vectors(5, 3)
    found = {scale: fv.approximate(fv.Probe(net, "gaussian").fisher(scale * x), "kfac") for scale in (1, 2)}
    for scale, matrix in found.items():
        matrix.save(tmp_path / f"{scale}.safetensors")
    left = [tmp_path / "2.safetensors"]

    def replaced(path, *given):
        opened = safe_open(path, *given)
        if left:
            os.replace(left.pop(), path)
        return opened

    monkeypatch.setattr("fisherviz.matrices.stored.safe_open", replaced)
    assert torch.equal(fv.load_approximation(tmp_path / "1.safetensors").to_dense(), found[2].to_dense())
