"""What `fisherviz report` can be told: a field for each option."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field


class Job(BaseModel):
    """What to report on.

    Raises:
        ValueError: a field is unknown or of another type.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(
        None, description="pkg.mod:factory that builds the network; without it the K-FAC paper's is trained."
    )
    weights: Path | None = Field(None, description="The network's weights, .safetensors or a saved state_dict.")
    data: str | None = Field(
        None,
        description="A data set (digits, mnist, ...; mnist:16 scales to 16 x 16) or pkg.mod:loader. "
        "[default: digits:16]",
    )
    likelihood: str | None = Field(
        None, description="categorical, bernoulli or gaussian. [default: the data set's own]"
    )
    kind: str = Field(
        "exact", description="exact (expectation over labels), mc (sampled) or empirical (the data's labels)."
    )
    methods: tuple[str, ...] | None = Field(None, description="Approximations, all unless given.")
    layers: tuple[str, ...] | None = Field(None, description="Names of layers, all unless given.")
    damping: float | None = Field(
        None,
        description="Damping of inverses. [default: a hundredth of the mean eigenvalue; at least 2e-6 tr F]",
    )
    seed: int = Field(0, description="Of initial weights and sampled labels.")
    device: str = Field("cpu", description="Where to compute: cpu, cuda, cuda:1, ...")
    out: Path = Field(Path("report"), description="Folder for page, data and pictures.")
    # an exact Fisher of a small network over so many takes seconds
    examples: int = Field(2000, description="How many of the first training examples to take, at most.")
    plan: bool = Field(
        False, description="Only say what it will take: passes, multiply-adds, memory and time, step by step."
    )
    quiet: bool = Field(False, description="No progress bars, no table.")
