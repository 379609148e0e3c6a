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
        None,
        description="pkg.mod:factory or file.py:factory that builds the network; without it the K-FAC paper's is "
        "trained.",
    )
    weights: Path | None = Field(
        None, description="The network's weights: .safetensors, a saved state_dict or a checkpoint with one in it."
    )
    output: str | None = Field(
        None, description="Key, attribute or number of the output, where the network returns several (logits, 0)."
    )
    data: str | None = Field(
        None,
        description="A data set (digits, mnist, ...; mnist:16 scales to 16 x 16), pkg.mod:loader or file.py:loader. "
        "[default: digits:16]",
    )
    targets: str | None = Field(
        None, description="Entry of the batches' dictionaries that holds the targets, such as labels."
    )
    likelihood: str | None = Field(
        None, description="categorical, bernoulli or gaussian. [default: the data set's own, else guessed]"
    )
    kind: str = Field(
        "exact", description="exact (expectation over labels), mc (sampled) or empirical (the data's labels)."
    )
    methods: tuple[str, ...] | None = Field(None, description="Approximations, all unless given.")
    metrics: tuple[str, ...] | None = Field(None, description="What is measured, all that is affordable unless given.")
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
    compare_only: bool = Field(
        False, description="No page and no pictures: all layers jointly, the table, and the numbers in --out."
    )
    quiet: bool = Field(False, description="No progress bars, no table.")
