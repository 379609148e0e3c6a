"""The state that a run ended in, which other measurements start from."""

import torch
from torch import nn

from fisherviz.papers.trials.problems import Method, Problem, build
from fisherviz.papers.trials.running import reached, trained
from fisherviz.papers.trials.work import Run

PROBLEM = Problem("digits", "shrestha-mlp", (("hidden", (4,)),), batch=40, limit=100)
SGD = Method("SGD", "sgd", {}, {"lr": (0.1,)}, {"lr": 0.1})


def test_from_the_state_a_run_goes_on_as_it_would_have(tmp_path):
    """Plain torch: one step of gradient descent on the batch that comes next, over the end of an epoch."""
    run = Run("smoke", progress=False, work=tmp_path)
    here, there = (reached(PROBLEM, SGD, {"lr": 0.1}, steps, 0, run) for steps in (2, 3))
    model = build(PROBLEM, PROBLEM.data(), 0)
    model.load_state_dict(here.model)
    x, y = here.batch
    assert len(x) == 20
    nn.functional.cross_entropy(model(x), y).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p - 0.1 * p.grad, there.model[name])
    again = reached(PROBLEM, SGD, {"lr": 0.1}, 2, 0, run)
    assert again.found == here.found
    assert len(run.used) == 2


def test_it_is_the_run_that_training_alone_gives(tmp_path):
    run = Run("smoke", progress=False, work=tmp_path)
    alone, here = trained(PROBLEM, SGD, {"lr": 0.1}, 3, 3, 0, run), reached(PROBLEM, SGD, {"lr": 0.1}, 3, 0, run).found
    losses = [[line["train_loss"] for line in found["curve"]] for found in (alone, here)]
    assert losses[0] == losses[1]
