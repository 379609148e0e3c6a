"""Nothing silently wrong: every row of the catalogue, asked in several ways, is right or refused in a sentence."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.markdown import table
from benchmarks.trust import catalogue_peers
from tests.trust.catalogue import KINDS
from tests.trust.catalogue.row import REQUESTS, Row, outcome

TITLE = "Nothing silently wrong"
ROOT = Path(__file__).parents[2]
BRIEF = ("dense", "quadratic")
"""Requests of the short half: on captures, and on the network itself by forward mode."""
TESTS = {
    "fingerprints of content, random states": "tests/network/test_batches_content.py",
    "mappings, labels among the inputs": "tests/network/test_mappings.py",
    "likelihoods and losses": "tests/network/test_likelihoods.py",
    "models and data that changed since": "tests/network/test_stale_input.py",
    "forms of batches and inputs": "tests/network/test_batches_forms.py",
    "layers that run for some batches or examples alone": "tests/capture/test_rare_networks.py",
}
"""Rows that tests of their own hold, by file; the long half runs them."""
MENDED = (
    "examples that a model couples in larger batches than two, after a first batch of one, by a branch on the whole "
    "batch, or by less than 0.5 % in float32",
    "models that draw at random now and then",
    "modules, modes, hooks and attributes that were changed between two requests",
    "layers that see the examples in another order, which the first two did not show",
    "parameters used from a plain list, and rules of vmap that are wrong, for later examples alone",
    "hooks of the user's on gradients, which entered the Fisher",
    "hooks that change a layer's output by less than float32's tolerance of evidence",
    "forwards that rewrite their weights, keep activations, count, or draw from generators of their own: the model "
    "came out changed",
    "spectral norm in training mode: each forward moved its vectors",
    "products of models that change a parameter in place: the caller's vector was overwritten, quadratic forms were "
    "wrong",
    "autocast around a request: sums over examples in bfloat16; autocast inside: a raw error",
    "targets that belong to another likelihood, targets transposed against the outputs",
    "raw errors: torch.func.grad inside a model, models compiled with AOT autograd, scripted, lazy, sparse, quantised "
    "and meta parts, masks and offsets as long as a batch",
)
"""Kinds of faults that the rows found when they were written, each mended since."""


def measure(long: bool) -> dict[str, Any]:
    """Every row in every precision and request; the short half in its first precision, by two requests."""
    return {
        "requests": list(REQUESTS) if long else list(BRIEF),
        "kinds": {kind: asked(rows, long) for kind, rows in KINDS.items()},
        "tests": {words: _ran(path) for words, path in TESTS.items()} if long else {},
        "peers": catalogue_peers.measured() if long else [],
    }


def asked(rows: Sequence[Row], long: bool) -> dict[str, Any]:
    """What came out of the rows of one kind."""
    found: dict[str, Any] = {"rows": len(rows), "asked": 0, "exact": 0, "refused": 0, "worst": {}, "wrong": []}
    for row in rows:
        verdicts = []
        for dtype in row.dtypes if long else row.dtypes[:1]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                came = outcome(row, dtype, tuple(REQUESTS) if long else BRIEF)
            verdicts.append(came.verdict)
            found["asked"] += len(REQUESTS) if long else len(BRIEF)
            if came.verdict != ("refused" if row.refused else "exact"):
                found["wrong"].append(f"{row.name} ({dtype}): {came.verdict}; {came.said}")
            elif came.verdict == "exact" and row.tolerance is None:
                name = str(dtype or torch.float64).removeprefix("torch.")
                found["worst"][name] = max(came.error, found["worst"].get(name, 0.0))
        for verdict in ("exact", "refused"):
            found[verdict] += all(v == verdict for v in verdicts)
    return found


def _ran(path: str) -> dict[str, Any]:
    """A file of tests: how many passed and failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not soak", path]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error)", said.splitlines()[-1])}
    return {"path": path, "passed": counts.get("passed", 0), "failed": counts.get("failed", 0) + counts.get("error", 0)}


def broken(found: dict[str, Any]) -> list[str]:
    """Rows that are neither right nor refused, tests that fail, and a peer's case that ours gets wrong."""
    wrong = [f"{kind}: {said}" for kind, each in found["kinds"].items() for said in each["wrong"]]
    wrong += [f"{each['path']}: {each['failed']} failed, {each['passed']} passed"
              for each in found["tests"].values() if each["failed"] or not each["passed"]]  # fmt: skip
    for case in found["peers"]:
        if case["libraries"]["fisherviz"].get("error", 0.0) > 1e-9:
            wrong.append(f"{case['case']}: ours is off by {case['libraries']['fisherviz']['error']:.1e}")
    return wrong


def words(found: dict[str, Any]) -> list[str]:
    """What was tried and what came out, by kind; what tests of their own hold; what others do."""
    kinds = found["kinds"]
    rows, asked = (sum(each[key] for each in kinds.values()) for key in ("rows", "asked"))
    body = []
    for kind, each in kinds.items():
        counts = [each["rows"], each["exact"], each["refused"], len(each["wrong"])]
        body.append([kind, *map(str, counts), _worst(each["worst"])])
    requests = ", ".join(f"`{name}`" for name in found["requests"])
    parts = [
        f"{rows} networks, data sets and likelihoods that a user may come with, asked {asked} times ({requests}), each "
        "time on a network, a Probe and a Fisher of its own. The answer must be that of autograd in float64, one "
        "example and one label at a time, on a fresh network for each; or a refusal of one sentence that names what is "
        "wrong. Weights, gradients, buffers, modes, hooks, attributes and the states of torch's, numpy's and Python's "
        "generators must be afterwards what they were.",
        table(["kind", "rows", "exact", "refused", "neither", "worst relative error"], body),
        "Errors are relative to the largest entry, those of solves over their condition number, 100; rows that round "
        "inside, to half precision for example, are left out of them.",
        "Kinds of rows that were wrong when they were written, or raised an error of torch's own; all are mended:",
        "\n".join(f"* {kind}" for kind in MENDED),
    ]
    if found["tests"]:
        passed = sum(each["passed"] for each in found["tests"].values())
        named = "; ".join(f"{what} ({each['passed']})" for what, each in found["tests"].items())
        parts.append(f"Held by tests of their own, {passed} of which passed: {named}.")
    if found["peers"]:
        parts += ["The diagonal of the same Fisher by other public libraries:", peers_table(found["peers"])]
    return parts


def peers_table(cases: list[dict[str, Any]]) -> str:
    """A row for each case, a column for each library."""
    libraries = list(dict.fromkeys(name for case in cases for name in case["libraries"]))
    versions = {name: cell["version"] for case in cases for name, cell in case["libraries"].items()}
    head = ["network", *(f"{name} {versions[name]}" for name in libraries)]
    return table(head, [[case["case"], *(_cell(case["libraries"].get(name)) for name in libraries)] for case in cases])


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    if "said" in cell:
        return "other parameters" if cell["said"].startswith("gives") else "refused"
    return "right" if cell["error"] < 1e-9 else f"{100 * cell['error']:.0f} % off"


def _worst(worst: dict[str, float]) -> str:
    return ", ".join(f"{error:.0e} ({name})" for name, error in worst.items()) or "-"
