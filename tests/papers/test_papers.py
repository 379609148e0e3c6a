"""Exhibits of the papers: claims and verdicts, the folder that keeps them, the command (at scale smoke)."""

import json
import math

import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from fisherviz.cli import app
from fisherviz.papers import registry
from fisherviz.papers.claims import Claim, Outcome, load, record
from fisherviz.papers.kfac_network import MIDDLE, SMOKE_ERROR, kfac_networks
from fisherviz.papers.registry import Run

RUN = Run("smoke", progress=False)
KFAC = ["kfac.fig2", "kfac.cumulants", "kfac.fig3", "kfac.fig5", "kfac.fig6"]


def claim(holds=True, departures=(), **more):
    return Claim("it is so", "figure 9", "0.5 | 1", "at most 1", holds, departures, **more)


def outcome(*rows, picture=None):
    return Outcome(rows, "here", "here and now", "A picture.", picture)


# Verdicts and files


@pytest.mark.parametrize(
    ("holds", "departures", "verdict"),
    [
        (True, (), "reproduced"),
        (False, (), "not reproduced"),
        (True, ("other data",), "different setting"),
        (False, ("other data",), "different setting"),
    ],
)
def test_the_verdict_follows_from_rule_and_setting(holds, departures, verdict):
    assert claim(holds, departures).verdict == verdict


def test_exhibits_do_not_touch_each_others_rows(tmp_path):
    record(tmp_path, "b.fig1", "B", outcome(claim(), claim(False)), scale="smoke")
    record(tmp_path, "a.fig1", "A", outcome(claim(departures=("other data",)), picture=b"png"), scale="smoke")
    record(tmp_path, "b.fig1", "B", outcome(claim()), scale="desk")
    known = load(tmp_path)
    assert list(known) == ["a.fig1", "b.fig1"]
    assert [len(known[name]["claims"]) for name in known] == [1, 1]
    assert known["b.fig1"]["run"] == {"scale": "desk"}
    assert (tmp_path / "a.fig1.png").read_bytes() == b"png"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.fig1.png", "claims.json", "claims.md"]


def test_the_page_has_one_row_per_claim_with_its_rule_and_verdict(tmp_path):
    odd = claim(False, ("other data",), sensitivity="elsewhere 2")
    record(tmp_path, "a.fig1", "Paper 1, figure 1", outcome(claim(), odd))
    record(tmp_path, "a.fig2", "Paper 1, figure 2", outcome(claim(False)))
    record(tmp_path, "b.fig1", "Paper 2, figure 1", outcome(claim()))
    page = (tmp_path / "claims.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| it is so")]
    assert rows[:2] == [
        "| it is so | figure 9 | 0.5 \\| 1 | at most 1 | here | **reproduced** |",
        "| it is so | figure 9 | 0.5 \\| 1 (elsewhere 2) | at most 1 | here "
        "| **different setting**: other data (the rule does not hold) |",
    ]
    summary = [line for line in page.splitlines() if line.startswith(("| Paper", "| all"))]
    assert summary == ["| Paper 1 | 3 | 1 | 1 | 1 |", "| Paper 2 | 1 | 1 | 0 | 0 |", "| all | 4 | 2 | 1 | 1 |"]


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 1}'])
def test_a_damaged_folder_is_refused(tmp_path, text):
    (tmp_path / "claims.json").write_text(text)
    with pytest.raises(ValueError, match=r"claims.json .*; delete it or choose another folder"):
        load(tmp_path)


def test_a_number_that_is_none_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        record(tmp_path, "a.fig1", "A", outcome(claim(values={"x": math.nan})))
    assert list(tmp_path.iterdir()) == []


def test_what_diverged_has_no_number_in_the_file(tmp_path):
    record(tmp_path, "a.fig1", "A", outcome(claim(values={"loss": math.inf, "accuracy": -math.inf, "other": 0.5})))
    assert load(tmp_path)["a.fig1"]["claims"][0]["values"] == {"other": 0.5}


def test_names_choose_exhibits():
    assert [one.name for one in registry.chosen(None)][: len(KFAC)] == KFAC
    assert [one.name for one in registry.chosen(["kfac.fig6", "kfac.fig2"])] == ["kfac.fig2", "kfac.fig6"]
    assert [one.name for one in registry.chosen(["kfac"])] == KFAC
    with pytest.raises(ValueError, match=r"no exhibit 'kfac\.fig4'; did you mean 'kfac\.fig"):
        registry.chosen(["kfac.fig4"])


# The K-FAC paper's network


@pytest.fixture(scope="module")
def network():
    return kfac_networks(RUN).first


def brute_force_fisher(network):
    """E over inputs and the network's own labels of the outer products of gradients, input by input."""
    rows = []
    (inputs, _), *_ = network.batches
    model = network.model
    for x in inputs:
        z = model(x)
        p = z.detach().softmax(0)
        for label in range(len(z)):
            loss = nn.functional.cross_entropy(model(x), torch.tensor(label))
            layers = [getattr(model, name) for name in MIDDLE]
            found = torch.autograd.grad(loss, [t for layer in layers for t in (layer.weight, layer.bias)])
            pairs = zip(found[::2], found[1::2], strict=True)
            gradient = torch.cat([torch.cat([w, b[:, None]], 1).T.flatten() for w, b in pairs])
            rows.append(p[label].sqrt() * gradient)
    stacked = torch.stack(rows)
    return stacked.T @ stacked / len(inputs)


def test_the_exact_matrix_is_the_fisher_in_the_papers_order(network):
    # vec(W̄) stacks columns, one per input with the bias last: the transpose flattened row by row
    torch.testing.assert_close(network.exact, brute_force_fisher(network), rtol=1e-9, atol=1e-12)


def test_damped_inverses_are_inverses(network):
    gamma = 0.1
    eye = torch.eye(len(network.exact), dtype=torch.float64)
    for name in ("kfac-full", "kfac", "kfac-tridiagonal"):
        product = network.damped(name, gamma) @ network.inverse(name, gamma)
        torch.testing.assert_close(product, eye, rtol=0, atol=1e-8)
    added = network.damped("kfac-full", gamma) - network.dense("kfac-full")
    product = (network.exact + added) @ network.exact_inverse(gamma)
    torch.testing.assert_close(product, eye, rtol=0, atol=1e-8)


def test_the_networks_are_trained_by_k_fac_to_the_error_that_was_asked_for(network):
    for net in kfac_networks(RUN).nets:
        wrong, count = 0, 0
        for inputs, targets in net.batches:
            wrong += int((net.model(inputs).argmax(1) != targets).sum())
            count += len(targets)
        assert net.error == pytest.approx(wrong / count, abs=2 / count)  # float32 then, float64 now
        assert net.error <= SMOKE_ERROR
        assert 0 < net.gamma < 1
        assert net.iterations > 1


def test_networks_of_several_seeds_differ(network):
    first, second = (nn.utils.parameters_to_vector(net.model.parameters()) for net in kfac_networks(RUN).nets)
    assert not torch.equal(first, second)


def test_networks_say_where_they_depart_from_the_papers(network):
    assert network.other_data == ("digits instead of MNIST", "a smaller network")


# The exhibits and the command


def invoke(*arguments):
    return CliRunner().invoke(app, ["papers", *arguments])


def test_every_exhibit_of_kfac_is_drawn_and_recorded(tmp_path):
    result = invoke("--only", "kfac", "--scale", "smoke", "--out", str(tmp_path), "--quiet")
    assert result.exit_code == 0, result.output
    known = json.loads((tmp_path / "claims.json").read_text())
    assert sorted(known) == sorted(KFAC)
    for name, exhibit in known.items():
        assert exhibit["run"]["scale"] == "smoke"
        assert {row["verdict"] for row in exhibit["claims"]} <= {"reproduced", "different setting"}
        if exhibit["picture"]:
            path = tmp_path / f"{name}.png"
            assert path.stat().st_size <= 300_000
            with Image.open(path) as image:
                assert image.width > 600
    exact = known["kfac.fig5"]["claims"][0]
    assert exact["verdict"] == "reproduced"
    assert exact["values"]["tridiagonal"] < 1e-8
    sums = known["kfac.cumulants"]["claims"][2]["values"]
    assert 0 < sums["error"] < sums["bound"]


def test_one_exhibit_is_run_again_without_the_others(tmp_path):
    record(tmp_path, "other.fig1", "Other", outcome(claim()))
    result = invoke("--only", "kfac.cumulants", "--scale", "smoke", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "Wrote" in result.output
    assert sorted(load(tmp_path)) == ["kfac.cumulants", "other.fig1"]


def test_the_command_names_its_exhibits():
    result = invoke("--list")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.output.splitlines()][: len(KFAC)] == KFAC


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "kfac.fig99"], "--only: there is no exhibit 'kfac.fig99'"),
        (["--scale", "huge"], "--scale: scale must be one of smoke, desk, paper, got 'huge'"),
        (["--seed", "-1"], "--seed: must be from 0"),
        (["--device", "abacus"], "--device: "),
    ],
)
def test_what_is_wrong_is_told_with_its_option(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.output
