"""Files that want to run code, take memory or time, or leave their folder: made here, by kind, never kept.

A case writes what it is about into an empty folder; `entries` says which doors of the package it knocks at. What would
be run creates the file CANARY beside it.
"""

from __future__ import annotations

from benchmarks.trust.hostile_files.case import CANARY, Case
from benchmarks.trust.hostile_files.checkpoints import checkpoints, states
from benchmarks.trust.hostile_files.data import data_files, storages
from benchmarks.trust.hostile_files.safetensors import safetensors_files
from benchmarks.trust.hostile_files.tables import array_files, parquet_files
from benchmarks.trust.hostile_files.texts import json_texts, yaml_texts

__all__ = ["CANARY", "Case", "cases"]


def cases() -> list[Case]:
    """All of them."""
    parts = (
        checkpoints(), states(), safetensors_files(), yaml_texts(), json_texts(), array_files(), parquet_files(),
        data_files(), storages(),
    )  # fmt: skip
    return [case for part in parts for case in part]
