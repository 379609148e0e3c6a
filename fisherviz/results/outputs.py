"""What results can be turned into by rooms that stand below them: pages, plots. The package wires them when imported.

Results and monitors know the outputs by name alone, so that nothing here imports what draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_OUTPUTS: dict[str, Callable[..., Any]] = {}


def set_output(name: str, function: Callable[..., Any]) -> None:
    """Say what makes an output.

    Args:
        name: of the output, such as "page".
        function: makes it.
    """
    _OUTPUTS[name] = function


def output(name: str) -> Callable[..., Any]:
    """What makes an output.

    Args:
        name: as `set_output` was told.

    Returns:
        The function.

    Raises:
        RuntimeError: nothing makes it.
    """
    if name not in _OUTPUTS:
        raise RuntimeError(f"nothing makes a {name} here; import fisherviz, or call results.outputs.set_output first.")
    return _OUTPUTS[name]
