"""What versions of the package have saved, a folder each, with the numbers that it must load with.

A new version adds its own before it is released: `python -m tests.results.saved` writes the folder of
`fisherviz.__version__`, which is committed and never written again. What loads is `NUMBERS`; whoever adds a format
adds it there and to `write`.
"""

from pathlib import Path

import pandas as pd
import torch
from torch import nn

import fisherviz as fv
from fisherviz.papers.ledger.claims import Claim, Outcome
from fisherviz.papers.ledger.records import load, record
from fisherviz.papers.trials.work import Run, kept
from fisherviz.report.against import comparisons_of
from fisherviz.report.page import write_report
from fisherviz.results.comparison import Comparison, load_comparison
from fisherviz.results.run import load_run
from fisherviz.training import sweep, train

HERE = Path(__file__).parent
EXPECTED = "expected.json"
FIELDS = {
    "dataset": "digits", "limit": 40, "model_options": {"hidden": [2]}, "optimizer": "adam", "batch_size": 20,
    "tensorboard": False,
}  # fmt: skip


def of_comparison(comparison):
    """Numbers of a comparison: every row of its table, and the sums of its arrays."""
    rows = comparison.frame.itertuples(index=False)
    table = {f"{r.method} {r.row} {r.col} {r.metric}": [r.value, r.stderr] for r in rows}
    arrays = {name: [float(abs(array).sum()), *array.shape] for name, array in comparison.arrays.items()}
    return table | arrays | {"weights": comparison.meta["fingerprints"]["weights"]}


def of_run(folder):
    """Losses of a run, and those of the same run made longer from its checkpoint."""
    losses = [r["train_loss"] for r in load_run(folder / "run").records if r["kind"] == "epoch"]
    longer = train(FIELDS, out=folder / "run", epochs=3, quiet=True)
    return {"losses": losses, "longer": [r["train_loss"] for r in longer.records if r["kind"] == "epoch"]}


def of_matrix(folder):
    """A saved approximation, entry by entry, and a solve."""
    matrix = fv.load_approximation(folder / "kfac.safetensors")
    ones = torch.ones(matrix.shape[0], dtype=torch.float64)
    return {"dense": matrix.to_dense().tolist(), "solve": matrix.solve(ones, damping=0.1).tolist()}


def of_sweep(folder):
    """The points of a sweep, from its table, and from its runs, which a sweep without its study finds again."""
    table = pd.read_csv(folder / "sweep" / "runs.csv")
    again = sweep(FIELDS | {"epochs": 1}, {"lr": [0.01, 0.1]}, out=folder / "sweep").table
    columns = ["value", "optimizer_options.lr"]
    return {"table": table[columns].to_numpy().tolist(), "runs": again[columns].to_numpy().tolist()}


def of_papers(folder):
    """A recorded claim, and a kept measurement."""
    claim = load(folder / "figures")["kfac.saved"]["claims"][0]
    found = kept({"saved": 1}, lambda: {"loss": 0.0}, Run("smoke", work=folder / "figures" / ".runs"))
    return {"verdict": claim["verdict"], "loss": claim["values"]["loss"], "kept": found["loss"]}


NUMBERS = {
    "comparison": lambda folder: of_comparison(load_comparison(folder / "comparison")),
    "report": lambda folder: {
        f"{title} {key}": value
        for title, one in comparisons_of(folder / "report").items()
        for key, value in of_comparison(one).items()
    },
    "run": of_run,
    "approximation": of_matrix,
    "sweep": of_sweep,
    "papers": of_papers,
}


def write(folder):
    """Save one of everything."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    fisher = fv.Probe(net, "categorical").fisher(torch.randn(9, 3, generator=generator, dtype=torch.float64))
    comparison = fv.compare(fisher, ["kfac", "diagonal"], progress=False)
    comparison.save(folder / "comparison")
    # the pictures of a report are no format, and large
    small = Comparison(comparison.frame[comparison.frame["metric"] == "relative_frobenius"], comparison.meta)
    write_report(folder / "report", small)
    for path in [folder / "report" / "index.html", *(folder / "report" / "pictures").iterdir()]:
        path.unlink()
    fv.approximate(fisher, "kfac").save(folder / "kfac.safetensors")
    train(FIELDS, out=folder / "run", epochs=2, quiet=True)
    sweep(FIELDS | {"epochs": 1}, {"lr": [0.01, 0.1]}, out=folder / "sweep")
    (folder / "sweep" / "study.db").unlink()  # Optuna's own format: without it a sweep goes on from the runs
    (folder / "sweep" / "sweep.png").unlink(missing_ok=True)
    run = Run("smoke", work=folder / "figures" / ".runs")
    loss = kept({"saved": 1}, lambda: {"loss": 0.25}, run)["loss"]
    claim = Claim("It is saved.", "none", "0.25", "below 1", loss < 1, values={"loss": loss})
    record(folder / "figures", "kfac.saved", "Nobody, nothing", "nothing", Outcome((claim,), "a", "b", "c"), run)
