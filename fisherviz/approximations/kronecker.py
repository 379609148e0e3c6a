"""Kronecker-factored approximations of single layers: KFAC, EKFAC and FOOF.

KFAC: A ⊗ G (Martens & Grosse 2015, eq. 1; Grosse & Martens 2016 for convolutions). EKFAC: the exact second moment in
KFAC's eigenbasis (George et al. 2018). FOOF: A ⊗ I (Benzing 2021). Grouped convolutions have one pair per group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor

from fisherviz.approximations.base import Approximation, PerFeature, Values, check_per_feature
from fisherviz.approximations.tied import tied_basis, tied_product, tied_statistics
from fisherviz.network.layers import Layer
from fisherviz.operators import Diagonal, DiagonalKronecker, DirectSum, Kronecker, KroneckerEigen, Operator, UnitBlocks
from fisherviz.operators.factorise import eigh
from fisherviz.statistics import EigenMoment, InputFactor, OutputFactor, Setting, Statistic
from fisherviz.support.choices import one_of

SUM_OF_USES = "the sum over both uses, in an eigenbasis that they share,"


def product(A: Tensor, G: Tensor) -> Operator:
    """A ⊗ G: of one pair of factors, of one for each group, or with the diagonal (d,) of A alone."""
    return DiagonalKronecker(A, G) if A.dim() == 1 else per_group(Kronecker, A, G)


def per_group(build: Callable[..., Operator], *factors: Tensor) -> Operator:
    """One operator from factors (d, d), or a direct sum over groups from factors (groups, d, d)."""
    if factors[0].dim() == 2:
        return build(*factors)
    return DirectSum([build(*parts) for parts in zip(*(f.unbind(0) for f in factors), strict=True)])


def check_kfac_setting(setting: str) -> Setting:
    """Refuse settings that KFAC does not have."""
    return cast(Setting, one_of("setting", setting, ("expand", "reduce")))


class KFAC(Approximation):
    """Block-diagonal Kronecker factors A ⊗ G, one pair per layer; the sum over both uses of a table that is a head.

    Args:
        setting: "expand" (weight-sharing positions as examples) or "reduce" (averaged first); embeddings are always
            expanded, so that their A is diagonal.
        per_feature: what stands for layers that scale single features (normalisation, PReLU), which have no factors:
            their exact 2 x 2 "units", the exact "block" of the whole layer, or its "diagonal".
    """

    takes_factors = True
    of_both_uses = SUM_OF_USES

    def __init__(self, setting: Setting = "expand", per_feature: PerFeature = "units") -> None:
        super().__init__()
        self.setting = check_kfac_setting(setting)
        self.per_feature = check_per_feature(per_feature)

    def statistics(self, layer: Layer) -> dict[str, Statistic]:
        """A and G; of each use, where a table is a head too."""
        if layer.both_ways:
            return tied_statistics(layer)
        return {"A": InputFactor(layer.name, self.setting), "G": OutputFactor(layer.name, self.setting)}

    def operator_for(self, layer: Layer, values: Values) -> Operator:
        """A ⊗ G, summed over both uses of a table that is a head."""
        return tied_product(values) if layer.both_ways else product(values["A"], values["G"])


class EKFAC(KFAC):
    """KFAC's eigenbasis with the exact second moment of the gradient in it as eigenvalues.

    Args:
        setting: as for KFAC; it sets the basis.
        per_feature: as for KFAC.
    """

    of_both_uses = "the exact second moment in an eigenbasis of both uses"

    def __init__(self, setting: Setting = "expand", per_feature: PerFeature = "units") -> None:
        super().__init__(setting, per_feature)
        self.bases: dict[str, tuple[Tensor | None, Tensor]] = {}
        """Eigenvectors (Q_A, Q_G) of each layer's factors, set by `refine`."""

    def refine(self, layer: Layer, values: Values) -> dict[str, Statistic]:
        """The second moment in the eigenbasis: a second pass."""
        qg = tied_basis(values) if layer.both_ways else eigh(values["G"], "the G factor")[1]
        qa = None if layer.one_hot else eigh(values["A"], "the A factor")[1]
        self.bases[layer.name] = (qa, qg)
        return {"S": EigenMoment(layer.name, qa, qg)}

    def operator_for(self, layer: Layer, values: Values) -> Operator:
        """Q diag(S) Qᵀ with Q = Q_G ⊗ Q_A."""
        qa, qg = self.bases[layer.name]
        return KroneckerEigen(None, qg, values["S"]) if qa is None else per_group(KroneckerEigen, qa, qg, values["S"])


class FOOF(Approximation):
    """A ⊗ I per layer: inputs alone, no labels; its scale is not the Fisher's."""

    follows_scale = False
    of_both_uses = "the sum over both uses"

    def statistics(self, layer: Layer) -> dict[str, Statistic]:
        """A, summed over weight-sharing positions; of each use, where there are two."""
        if layer.both_ways:
            return {use: InputFactor(layer.name, "sum", use) for use in ("read", "used")}
        return {"A": InputFactor(layer.name, "sum")}

    def operator_for(self, layer: Layer, values: Values) -> Operator:
        """A ⊗ I; of a layer that scales single features, one A for each; of a table that is a head, the sum of both."""
        if layer.both_ways:
            inputs, basis = eigh(values["used"], "the A factor")
            return KroneckerEigen(None, basis, inputs.unsqueeze(1) + values["read"])
        A = values["A"]
        if layer.own_inputs and A.dim() == 3:
            return UnitBlocks(A)
        if layer.one_hot:
            return Diagonal(A.repeat(layer.d_out))
        dg = layer.d_out // layer.groups
        return per_group(lambda factor: Kronecker.over_units(factor, dg), A)
