"""What a comparison without matrices may take for each approximation, before it begins and while it runs alike."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from fisherviz.comparison.damped import FACTORISED
from fisherviz.exact.planning import Sizes
from fisherviz.results.metrics import needing

MULTIPLY_ADDS = 2e10
"""With F that a metric may take for one approximation, unless it was asked for by name."""
_PRODUCTS = 1000
"""Of Lanczos, at most; fewer than a hundredth of them are not worth a start."""
_ITERATIONS = 10_000
"""Of conjugate gradients, at most; all approximations share what they give."""
_PROBES = 32
"""Of inverses and divergences, at most; a quarter of them still has a standard error."""
_EIGENVECTORS = {False: 128, True: 1024}
"""Up to so many gradients inverses and divergences are exact; more where they were asked for by name."""


@dataclass(frozen=True)
class Budget:
    """How far metrics without matrices are taken.

    Args:
        wanted: names of the metrics.
        explicit: whether they were asked for by name, whatever they cost.
    """

    wanted: Collection[str]
    explicit: bool

    def products(self, sizes: Sizes) -> int:
        """Products with F for one approximation."""
        return int(MULTIPLY_ADDS / max(sizes.product, 1))

    def lanczos(self, sizes: Sizes) -> int:
        """Products that a spectral norm may take; 0: it is left out."""
        if "relative_spectral" not in self.wanted:
            return 0
        if self.explicit:
            return _PRODUCTS
        most = min(_PRODUCTS, self.products(sizes))
        return most if most >= _PRODUCTS // 100 else 0

    def iterations(self, sizes: Sizes) -> int:
        """Of conjugate gradients with F."""
        return _ITERATIONS if self.explicit else min(_ITERATIONS, 10 * self.products(sizes))

    def why_no_probes(self, sizes: Sizes) -> str:
        """Why inverses and divergences are left out, where they are wanted; "" where they are not."""
        if not self.explicit and min(sizes.size, sizes.columns) > FACTORISED:
            return f"each probe takes conjugate gradients with {sizes.columns:,} gradients"
        least = _PROBES // 4
        if not self.explicit and self.products(sizes) < least:
            return f"{least} probes take more products with F than the budget has"
        return ""

    def probes(self, sizes: Sizes) -> int:
        """Random vectors of inverses and divergences; 0: they are left out."""
        if not needing("damping") & set(self.wanted) or self.why_no_probes(sizes):
            return 0
        return _PROBES if self.explicit else min(_PROBES, self.products(sizes))

    @property
    def eigenvectors(self) -> int:
        """Up to so many gradients these come from F's eigenvectors instead."""
        return _EIGENVECTORS[self.explicit]
