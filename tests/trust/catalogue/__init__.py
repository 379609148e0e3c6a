"""The catalogue: what a user may come with, each row with the right answer or a refusal in one sentence."""

from tests.trust.catalogue import data, layers, losses, machinery, modules, outputs, types
from tests.trust.catalogue.row import Row

KINDS: dict[str, list[Row]] = {
    "losses and likelihoods": losses.rows(),
    "layers and their options": layers.rows(),
    "how modules are put together": modules.rows(),
    "data and inputs": data.rows(),
    "outputs": outputs.rows(),
    "types, layouts, contexts": types.rows(),
    "state, hooks, chance, coupling": machinery.rows(),
}
"""Kind -> its rows."""
