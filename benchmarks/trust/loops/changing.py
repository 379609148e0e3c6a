"""An optimizer, a schedule or a model that changes while it is trained."""

# ruff: noqa: D103 - a loop's name says what it does

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fisherviz as fv
from benchmarks.trust.loops.trial import Trial, loop


@loop("a changing optimizer or model")
def freezing_and_thawing(t: Trial) -> None:
    for frozen in (False, True, True, False):
        t.opt.zero_grad()
        t.model[0].requires_grad_(not frozen)
        t.train(*t.batch(), layers=(1, 2) if frozen else (0, 1, 2))
        t.step()


@loop("a changing optimizer or model")
def a_schedule(t: Trial) -> None:
    schedule = torch.optim.lr_scheduler.StepLR(t.opt, 1, gamma=0.5)
    scales = t.oracle
    for _ in range(3):
        t.opt.zero_grad()
        t.train(*t.batch())
        t.step()
        schedule.step()
        if scales is not None:
            scales.lr *= 0.5
        else:
            for group in t.alone.param_groups:
                group["lr"] *= 0.5


@loop("a changing optimizer or model")
def copies_and_averages(t: Trial) -> None:
    average = torch.optim.swa_utils.AveragedModel(t.model)
    for _ in range(3):
        t.opt.zero_grad()
        x, y = t.batch()
        twin = copy.deepcopy(t.model)
        F.cross_entropy(twin(5 * x), y).backward()
        t.train(x, y)
        average.update_parameters(t.model)
        average(x).sum().backward()
        t.step()


@loop("a changing optimizer or model")
def averaged_weights_swapped_in_for_evaluation(t: Trial) -> None:
    kept = [0.9 * p.detach().clone() for p in t.model.parameters()]
    for _ in range(2):
        t.opt.zero_grad()
        t.train(*t.batch())
        own = [p.detach().clone() for p in t.model.parameters()]
        for p, k in zip(t.model.parameters(), kept, strict=True):
            p.data.copy_(k)
        with torch.no_grad():
            t.model(t.batch()[0])
        for p, k in zip(t.model.parameters(), own, strict=True):
            p.data.copy_(k)
        t.step()


@loop("a changing optimizer or model")
def a_group_added_that_is_plain(t: Trial) -> None:
    other = nn.Parameter(torch.ones(3, dtype=torch.float64))
    t.train(*t.batch())
    t.step()
    t.opt.add_param_group({"params": [other], "approximation": "none", "lr": 0.1})
    t.opt.zero_grad()
    t.train(*t.batch())
    t.step()


@loop("a changing optimizer or model")
def other_optimizers_watch_too(t: Trial) -> None:
    others = [fv.optim.FOOF(t.model, "categorical"), fv.optim.TENGraD(t.model, "categorical")]
    for _ in range(2):
        t.opt.zero_grad()
        t.train(*t.batch())
        t.step()
        others.pop()


@loop("a changing optimizer or model")
def freezing_a_layer_in_the_middle(t: Trial) -> None:
    for frozen in (False, True, True, False):
        t.opt.zero_grad()
        t.model[2].requires_grad_(not frozen)
        t.train(*t.batch(), layers=(0, 2) if frozen else (0, 1, 2))
        t.step()


@loop("a changing optimizer or model")
def a_closure_evaluated_before_the_step(t: Trial) -> None:
    for _ in range(2):
        x, y = t.batch()

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            t.opt.zero_grad()
            t.forget()
            return t.train(x, y)

        closure()
        closure()
        t.step()


@loop("a changing optimizer or model")
def a_replaced_optimizer(t: Trial) -> None:
    old = fv.optim.KFAC(t.model, "categorical", rescale=False, adapt=False)
    t.loss(*t.batch()).backward()
    old.step()
    old.zero_grad()
    del old
    for _ in range(2):
        t.opt.zero_grad()
        t.train(*t.batch())
        t.step()
