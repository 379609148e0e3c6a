"""K-FAC's factors of a table that is both an embedding's and a Linear's: the sum over uses (Eschenhagen et al. 2023).

F ≈ A ⊗ G of the weight + diag(counts) ⊗ G of the table, over the width d and the vocabulary. The weight's G would be
vocabulary × vocabulary: its diagonal is taken, and of the width's two factors what is diagonal in the eigenbasis of
their sum, each weighted by the other side's trace. So the sum has a damped inverse in closed form.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fisherviz.network.layers import Layer
from fisherviz.operators import KroneckerEigen
from fisherviz.operators.factorise import eigh
from fisherviz.statistics import InputFactor, OutputFactor, OutputSquares, Statistic


def tied_statistics(layer: Layer) -> dict[str, Statistic]:
    """A (d, d) and the diagonal of G (V,) of the weight; counts (V,) and G (d, d) of the table: positions expanded."""
    return {
        "A": InputFactor(layer.name, use="used"),
        "squares": OutputSquares(layer.name),
        "counts": InputFactor(layer.name, use="read"),
        "G": OutputFactor(layer.name, use="read"),
    }


def tied_basis(values: Mapping[str, Tensor]) -> Tensor:
    """Eigenvectors (d, d) of both uses' factors over the width, summed over the vocabulary."""
    whole = values["squares"].sum() * values["A"] + values["counts"].sum() * values["G"]
    return eigh(whole, "the factor of both uses")[1]


def tied_product(values: Mapping[str, Tensor]) -> KroneckerEigen:
    """The sum over uses, on W̄ (d, V)."""
    basis = tied_basis(values)
    inputs, outputs = (((M @ basis) * basis).sum(0).unsqueeze(1) for M in (values["A"], values["G"]))
    return KroneckerEigen(None, basis, inputs * values["squares"] + outputs * values["counts"])
