"""Help: whole sentences at 80 columns, an example for each command, no waiting for torch; completion of names."""

import itertools
import re
import subprocess
import sys

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from fisherviz import approximations, datasets, models
from fisherviz.cli import app
from fisherviz.commands import names
from fisherviz.network import likelihoods
from fisherviz.network.vectors import KINDS
from fisherviz.papers.ledger import registry
from fisherviz.papers.trials.work import SCALES
from fisherviz.results.metrics import METRICS
from fisherviz.training.config import Config
from fisherviz.training.optimizers import OPTIMIZERS
from fisherviz.training.space import presets
from fisherviz.training.sweep import SAMPLERS


def commands(command=None, path=()):
    """Every command below the program, as what is typed."""
    command = command or get_command(app)
    inner = getattr(command, "commands", {})
    return [found for name, each in inner.items() for found in commands(each, (*path, name))] if inner else [path]


COMMANDS = commands()


def help_of(*path):
    done = CliRunner().invoke(app, [*path, "--help"], terminal_width=80, env={"COLUMNS": "80"})
    assert done.exit_code == 0
    return done.output


def test_all_commands_are_there():
    assert {path[0] for path in COMMANDS} == {"report", "papers", "train", "sweep", "data"}
    assert {path[1] for path in COMMANDS if path[0] == "data"} == {"list", "fetch", "check"}


@pytest.mark.parametrize("path", [(), ("data",), *COMMANDS], ids=" ".join)
def test_help_fits_80_columns_and_cuts_nothing(path):
    text = help_of(*path)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    command = get_command(app)
    for name in path:
        command = command.commands[name]
    whole = " ".join(text.split())
    told = [each.help for each in (command, *getattr(command, "commands", {}).values())]
    told += [parameter.help for parameter in command.params if parameter.name != "help"]
    for sentences in told:
        assert " ".join(sentences.split("\n\n")[0].split()) in whole.replace("- ", "-")


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_has_an_example_and_debug(path):
    text = " ".join(help_of(*path).split())
    assert re.search(rf"Example: (FISHERVIZ_DATA=\S+ )?fisherviz {' '.join(path)}", text)
    assert "--debug" in text


@pytest.mark.parametrize("path", [path for path in COMMANDS if path[0] != "data"], ids=" ".join)
def test_every_command_that_computes_has_its_common_options(path):
    text = help_of(*path)
    assert all(f"--{name}" in text for name in ("seed", "device", "out", "quiet"))


def test_help_imports_nothing_that_takes_time():
    asked = [["--help"], *([*path, "--help"] for path in COMMANDS), ["--version"]]
    heavy = ("torch", "numpy", "pandas", "matplotlib", "optuna", "sklearn", "asyncio")
    code = f"""
import sys
from fisherviz.cli import main

for arguments in {asked}:
    sys.argv = ["fisherviz", *arguments]
    try:
        main()
    except SystemExit as end:
        print("ended", arguments, end.code, [name for name in {heavy} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ended = [line for line in done.stdout.splitlines() if line.startswith("ended")]
    assert ended == [f"ended {arguments} 0 []" for arguments in asked]


def test_the_names_that_shells_complete_are_those_that_there_are():
    likelihood = tuple(likelihoods._BY_NAME)
    assert set(names.METHODS) <= set(approximations)
    assert all(name in names.METHODS for name, cls in approximations.items() if cls.__module__.startswith("fisherviz."))
    assert datasets.names() == names.DATASETS
    assert models.names() == names.MODELS
    assert tuple(OPTIMIZERS) == names.OPTIMIZERS
    assert tuple(KINDS) == names.KINDS
    assert likelihood == names.LIKELIHOODS
    assert names.TASKS == datasets.TASKS
    assert names.SCALES == SCALES
    assert tuple(registry.exhibits()) == names.EXHIBITS
    assert tuple(presets()) == names.PRESETS
    assert tuple(SAMPLERS) == names.SAMPLERS
    assert names.COMPLETED["metrics"] == tuple(METRICS)
    for field in ("dtype", "defaults"):
        assert names.COMPLETED[field] == Config.model_fields[field].annotation.__args__


TYPED = {
    "rep": ["report"],
    "report --methods kfac,n": ["kfac,nearest-kronecker"],
    "report --data f": ["fashion-mnist", "faces", "faces-cut"],
    "report --metrics k": ["kl"],
    "report --kind e": ["exact", "empirical"],
    "train --model foof": ["foof-mlp"],
    "train --optimizer kb": ["kbfgs"],
    "papers --only sang": [
        f"sang.{name}" for name in ("table1", "fig5", "tuned", "fig1", "fig2", "fig3", "complexity")
    ],
    "data fetch mn": ["mnist"],
}


def test_a_shell_completes_names_without_torch():
    code = f"""
import os, sys
from fisherviz.cli import app

os.environ["_FISHERVIZ_COMPLETE"] = "complete_bash"
for typed in {list(TYPED)}:
    os.environ |= {{"COMP_WORDS": f"fisherviz {{typed}}", "COMP_CWORD": str(len(typed.split()))}}
    try:
        app(prog_name="fisherviz")
    except SystemExit:
        print("ended", typed, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = iter(done.stdout.splitlines())
    for completed in TYPED.values():
        assert list(itertools.takewhile(lambda line: not line.startswith("ended"), lines)) == completed
    assert [line for line in done.stdout.splitlines() if line.startswith("ended")] == [
        f"ended {typed} False" for typed in TYPED
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reprot"], "there is no command 'reprot'; did you mean 'report'?"),
        (["data", "chek"], "there is no command 'chek'; did you mean 'check'?"),
        (["report", "--metods", "kfac"], "--methods"),
        (["data", "list", "--quite"], "No such option: --quite"),
    ],
)
def test_what_is_misspelt_is_answered_with_the_nearest(arguments, message):
    told = CliRunner().invoke(app, arguments)
    assert told.exit_code == 2
    assert message in told.output
