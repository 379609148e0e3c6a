"""Every exhibit at scale smoke, and the command."""

import pytest
from PIL import Image
from typer.testing import CliRunner

from fisherviz.cli import app
from fisherviz.commands.names import EXHIBITS
from fisherviz.papers.ledger import registry
from fisherviz.papers.ledger.records import load, record
from fisherviz.papers.pictures import LARGEST
from fisherviz.papers.trials.work import Run
from tests.papers.test_ledger import claim, outcome

FIRST = ["kfac.fig2", "kfac.cumulants", "kfac.fig3", "kfac.fig5", "kfac.fig6"]
# An identity, or an invariance, holds whatever the network and the data are.
EVERYWHERE = {"kfac.fig5", "kfac.invariance", "sang.fig2", "sang.complexity", "benzing.a1"}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Exhibits of one paper share measurements, as they do in one command."""
    return tmp_path_factory.mktemp("work")


# one of a network that is trained and one of matrices; all of them in `make exhibits`, which belongs to what lands
QUICK = {"kfac.fig2", "sang.fig2"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.soak) for n in EXHIBITS])
def test_each_exhibit_at_smoke_says_that_its_setting_is_another(name, tmp_path, work):
    (one,) = registry.chosen([name])
    outcome = registry.measure(one, Run("smoke", progress=False, work=work), tmp_path)
    assert outcome.claims
    verdicts = {claim.verdict for claim in outcome.claims}
    assert verdicts == {"different setting"} or (name in EVERYWHERE and verdicts <= {"different setting", "reproduced"})
    recorded = load(tmp_path)[name]
    assert recorded["run"].keys() == {"scale", "seed", "device", "fisherviz", "commit", "core_hours"}
    assert recorded["shows"] == one.shows
    assert not one.shows.endswith(".")
    if outcome.picture is not None:
        path = tmp_path / f"{name}.png"
        assert path.stat().st_size <= LARGEST
        assert Image.open(path).width >= 600


def test_names_choose_exhibits():
    assert [one.name for one in registry.chosen(None)][: len(FIRST)] == FIRST
    assert [one.name for one in registry.chosen(["kfac.fig6", "kfac.fig2"])] == ["kfac.fig2", "kfac.fig6"]
    assert [one.name for one in registry.chosen(["kfac"])][: len(FIRST)] == FIRST
    with pytest.raises(ValueError, match=r"there is no exhibit 'kfac\.fig4'; did you mean 'kfac\.fig\d'"):
        registry.chosen(["kfac.fig4"])


def invoke(*arguments):
    return CliRunner().invoke(app, ["papers", *arguments])


def test_one_exhibit_is_run_again_without_the_others(tmp_path):
    record(tmp_path, "other.fig1", "Other", "a thing", outcome(claim()), Run("smoke"))
    result = invoke("--only", "kfac.cumulants", "--scale", "smoke", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "Wrote" in result.output
    assert sorted(load(tmp_path)) == ["kfac.cumulants", "other.fig1"]


def test_the_command_names_its_exhibits():
    result = invoke("--list")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.output.splitlines()][: len(FIRST)] == FIRST


def test_the_command_says_first_how_long_it_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "measure", lambda one, run, out: outcome(claim()))
    result = invoke("--only", "kfac.fig2", "--only", "sang.table1", "--out", str(tmp_path), "--jobs", "2")
    assert result.exit_code == 0, result.output
    assert "2 exhibits at scale desk: about" in result.output
    assert "hours in 2 processes" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "kfac.fig99"], "--only: there is no exhibit 'kfac.fig99'"),
        (["--scale", "huge"], "--scale: scale must be one of smoke, desk, paper, got 'huge'"),
        (["--seed", "-1"], "--seed: must be from 0"),
        (["--device", "abacus"], "--device: "),
        (["--jobs", "0"], "--jobs: must be at least 1, not 0"),
    ],
)
def test_what_is_wrong_is_told_with_its_option(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.output
