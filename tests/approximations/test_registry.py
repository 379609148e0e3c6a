"""What takes methods takes names, classes and instances, under labels of their own, and says what it cannot take."""

import pytest
import torch

import fisherviz as fv
from fisherviz.approximations.registry import make, resolve
from fisherviz.statistics import Diagonal as DiagonalStatistic
from tests.oracles import nets


class Halved(fv.Approximation):
    """Half the diagonal."""

    def statistics(self, layer):
        return {"d": DiagonalStatistic(layer.name)}

    def operator_for(self, layer, means):
        return fv.operators.Diagonal(means["d"] / 2)


def fisher():
    return fv.Probe(nets.mlp(3, 4, 2), "categorical").fisher(nets.vectors(5, 3))


def test_names_classes_and_instances_are_methods_by_their_labels():
    mine = Halved()
    found = resolve({"a": "kfac", "b": fv.approximations["kfac"], "c": mine})
    assert list(found) == ["a", "b", "c"]
    assert type(found["a"]) is type(found["b"]) is fv.approximations["kfac"]
    assert found["c"] is mine
    assert list(resolve("kfac")) == list(resolve(fv.approximations["kfac"])) == ["kfac"]
    assert list(resolve(None)) == list(fv.approximations) == list(fv.approximations())
    assert list(resolve(iter(["kfac", "ekfac"]))) == ["kfac", "ekfac"]


def test_an_unfitted_approximation_says_so():
    assert repr(Halved()) == "Halved(not fitted)"
    exact = fisher()
    fitted = fv.approximate(exact, Halved)
    torch.testing.assert_close(fitted.to_dense(), torch.diag(exact.diagonal() / 2))
    assert "not fitted" not in repr(fitted)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: fv.approximations["exact"], ValueError, "'exact' is no approximation: use the Fisher itself"),
        (lambda: fv.register("", Halved), TypeError, "a non-empty string, got ''"),
        (lambda: fv.register(3, Halved), TypeError, "a non-empty string, got 3"),
        (lambda: fv.register("mine", Halved()), TypeError, "must be a subclass of fv.Approximation"),
        (lambda: fv.register("mine", int), TypeError, "must be a subclass of fv.Approximation"),
        (lambda: fv.register("exact", Halved), ValueError, "'exact' means the exact Fisher itself"),
        (lambda: fv.register("kfac", Halved), ValueError, "'kfac' is one of fisherviz's own"),
        (lambda: make(int), TypeError, "method must be a name or a subclass of fv.Approximation, got type"),
        (lambda: make(3), TypeError, "got int"),
        (lambda: make(Halved(), rank=2), TypeError, r"options \(rank\) go with a name or a class"),
        (lambda: make("nearest-kronecker", rnk=2), TypeError, r"nearest-kronecker does not take .*rank"),
        (lambda: resolve(3), TypeError, "methods= takes names, Approximation classes or instances, got int"),
        (lambda: resolve(["kfac", "kfac"]), ValueError, "'kfac' is given twice"),
        (lambda: resolve({"exact": "kfac"}), ValueError, "the label 'exact' means the Fisher itself"),
        (lambda: resolve([]), ValueError, "methods= names no method"),
        (lambda: Halved().fit(nets.mlp(3, 2)), TypeError, "is built from a Fisher, got"),
    ],
)
def test_what_is_no_method_is_refused_in_a_sentence(call, kind, message):
    names = fv.approximations()
    with pytest.raises(kind, match=message):
        call()
    assert fv.approximations() == names


def test_the_registry_shows_a_line_for_each_method_and_what_it_is():
    head, *lines = [line for line in repr(fv.approximations).splitlines() if line.strip("- ")]
    assert head.split() == ["method", "what", "it", "is"]
    assert [line.split()[0] for line in lines] == list(fv.approximations)
    assert "Block-diagonal Kronecker factors" in next(line for line in lines if line.startswith("kfac "))
