"""A small algebra of structured operators on flat layer vectors in unit order.

One short file per family; `inner` and the damping rules dispatch on the classes, so that a third party's
class can join without changes here. Nothing in this package knows of networks or data.
"""

from fisherviz.operators.base import Operator
from fisherviz.operators.block_matrix import BlockMatrix
from fisherviz.operators.dense import Dense, UnitBlocks
from fisherviz.operators.diagonal_kronecker import DiagonalKronecker
from fisherviz.operators.direct_sum import DirectSum
from fisherviz.operators.factorise import SingularMatrixError
from fisherviz.operators.inner import inner
from fisherviz.operators.inverse import Inverse
from fisherviz.operators.kronecker import Kronecker, KroneckerEigen
from fisherviz.operators.kronecker_sum import KroneckerDifferenceInverse, KroneckerSum
from fisherviz.operators.lanczos import cg, extreme_eigenvalues, spectral_norm
from fisherviz.operators.permuted import Permuted
from fisherviz.operators.simple import Diagonal, Identity, Zero
from fisherviz.operators.tridiagonal import BlockTridiagonal

__all__ = [
    "BlockMatrix",
    "BlockTridiagonal",
    "Dense",
    "Diagonal",
    "DiagonalKronecker",
    "DirectSum",
    "Identity",
    "Inverse",
    "Kronecker",
    "KroneckerDifferenceInverse",
    "KroneckerEigen",
    "KroneckerSum",
    "Operator",
    "Permuted",
    "SingularMatrixError",
    "UnitBlocks",
    "Zero",
    "cg",
    "extreme_eigenvalues",
    "inner",
    "spectral_norm",
]
