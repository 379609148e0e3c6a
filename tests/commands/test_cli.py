"""The command line: help with examples, errors in one sentence with the option, the job end to end."""

import json
import pickle
import sys

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from fisherviz._version import __version__
from fisherviz.approximations import approximations
from fisherviz.cli import app
from fisherviz.commands.inputs import Data, load_data
from fisherviz.commands.job import Job
from fisherviz.results.comparison import load_comparison
from fisherviz.support.errors import OptionError, one_sentence
from tests.pages import undrawn

MODULE = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, 3))

def convolution():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 4, 3))

def digits():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 4, 10))

def pair():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(40, 6, generator=generator), torch.randint(3, (40,), generator=generator)

def images():
    return torch.rand(12, 1, 4, 4), torch.randint(3, (12,))

def batches():
    inputs, targets = pair()
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, targets), batch_size=16)

def dataset():
    return torch.utils.data.TensorDataset(*pair())

def nans():
    return torch.full((4, 6), float("nan")), torch.zeros(4, dtype=torch.long)

def inputs_only():
    return pair()[0]

def once():
    return iter([pair()])

def broken():
    raise KeyError("the weights are lost")

def number():
    return 3
"""
MINE = ["--model", "mynet:build", "--data", "mynet:pair"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current directory with a module of one's own."""
    (tmp_path / "mynet.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "mynet", raising=False)
    return tmp_path


def call(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_the_version():
    assert call("--version").output == f"fisherviz {__version__}\n"


def test_help_lists_the_commands():
    result = call("--help")
    assert result.exit_code == 0
    assert "report" in result.output


def test_a_network_of_ones_own_end_to_end(here):
    result = call("report", *MINE, "--methods", "kfac,foof,kfac-full", "--out", "out", "--damping", "0.1")
    assert result.exit_code == 0, result.output
    assert "Wrote out/index.html" in result.output
    assert "is closest to the exact Fisher" in " ".join(result.output.split())
    joint, alone = load_comparison(here / "out"), load_comparison(here / "out" / "layers")
    assert joint.layers == alone.layers == ("0", "2", "4")
    assert joint.methods == ("kfac", "foof", "kfac-full")
    assert alone.methods == ("kfac", "foof")
    assert joint.meta["damping"] == 0.1
    assert joint.meta["examples"] == 40
    assert joint.meta["settings"]["model"] == "mynet:build"
    assert joint.meta["cumulants"]["error"] <= joint.meta["cumulants"]["bound"]
    facts = json.loads((here / "out" / "report.json").read_text())
    titles = [section["title"] for section in facts["sections"]]
    assert titles == ["All probed layers, jointly", "Every layer alone"]
    page = (here / "out" / "index.html").read_text()
    assert "2,894.4" not in page  # the paper's sums belong to the paper's network


def test_quiet_prints_one_line_and_no_bars(here, monkeypatch):
    undrawn(monkeypatch)
    result = call("report", *MINE, "--methods", "foof", "--layers", "2", "--quiet")
    assert result.exit_code == 0, result.output
    assert result.output == "Wrote report/index.html\n"
    assert load_comparison("report").layers == ("2",)
    assert not (here / "report" / "layers").exists()


REGISTERING = (
    MODULE
    + """
import fisherviz as fv

class Mine(fv.approximations["diagonal"]):
    "A diagonal of my own."

fv.register("mine", Mine)

class Picky(Mine):
    "Takes no normalisation."

    def statistics(self, layer):
        if layer.name == "1":
            raise NotImplementedError("picky refuses layer '1'; probe the others with layers=.")
        return super().statistics(layer)

fv.register("picky", Picky)

def normalised():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
"""
)


@pytest.fixture
def registering(here, monkeypatch):
    """The module registers an approximation when it is imported; afterwards it is gone."""
    monkeypatch.setattr(approximations, "_classes", dict(approximations._classes))
    (here / "mynet.py").write_text(REGISTERING)
    return here


def test_a_method_that_the_models_module_registers_is_reported_on(registering):
    assert "mine" not in approximations
    result = call("report", *MINE, "--methods", "mine,kfac", "--layers", "4", "--quiet", "--compare-only")
    assert result.exit_code == 0, result.output
    errors = load_comparison("report").whole("relative_frobenius")
    assert errors.keys() == {"mine", "kfac"}
    result = call("report", *MINE, "--methods", "mein", "--quiet")
    assert result.exit_code == 2
    assert "--methods: method must be one of" in result.output
    assert "did you mean 'mine'?" in result.output


def test_a_layer_that_a_method_refuses_does_not_end_the_report(registering, monkeypatch):
    undrawn(monkeypatch)
    options = ["--model", "mynet:normalised", "--data", "mynet:pair", "--quiet"]
    result = call("report", *options, "--methods", "kfac,picky")
    assert result.exit_code == 0, result.output
    joint, alone = load_comparison("report"), load_comparison("report/layers")
    assert joint.methods == ("kfac",)
    assert any(note.startswith("picky is left out") for note in joint.notes)
    blocks = alone.blocks("relative_frobenius")
    assert set(blocks[blocks["method"] == "picky"]["row"]) == {"0", "3"}
    assert set(blocks[blocks["method"] == "kfac"]["row"]) == {"0", "1", "3"}
    result = call("report", *options, "--methods", "picky", "--out", "refused")
    assert result.exit_code == 1
    assert "picky refuses layer '1'" in result.output


@pytest.mark.parametrize("kind", ["mc", "empirical"])
def test_the_kinds(here, kind):
    result = call("report", *MINE, "--methods", "kfac", "--layers", "4", "--kind", kind, "--quiet", "--compare-only")
    assert result.exit_code == 0, result.output
    assert load_comparison("report").meta["kind"] == kind


def test_the_seed_decides_the_sampled_labels(here):
    frames = []
    for seed, out in ((1, "a"), (1, "b"), (2, "c")):
        options = ["--methods", "kfac", "--layers", "4", "--kind", "mc", "--out", out, "--quiet", "--compare-only"]
        assert call("report", *MINE, *options, "--seed", seed).exit_code == 0
        frames.append(load_comparison(out).whole("relative_frobenius")["kfac"])
    assert frames[0] == frames[1] != frames[2]


def test_layers_with_weight_sharing_have_no_cumulants_and_the_page_says_so(here, monkeypatch):
    undrawn(monkeypatch)
    options = ["--model", "mynet:convolution", "--data", "mynet:images", "--methods", "kfac", "--quiet"]
    result = call("report", *options)
    assert result.exit_code == 0, result.output
    notes = load_comparison("report").meta["notes"]
    assert any(note.startswith("cumulant sums are left out") for note in notes)
    assert "cumulants" not in load_comparison("report").meta


def test_weights_are_read_from_safetensors_and_state_dicts(here):
    import mynet

    other = mynet.build()
    for parameter in other.parameters():
        parameter.data.mul_(2)
    save_file(other.state_dict(), here / "w.safetensors")
    torch.save(other.state_dict(), here / "w.pt")
    torch.save({"state_dict": other.state_dict(), "epoch": 3}, here / "checkpoint.pt")
    options = ["--methods", "foof", "--layers", "4", "--quiet", "--compare-only"]
    for file in ("w.safetensors", "w.pt", "checkpoint.pt"):
        assert call("report", *MINE, *options, "--weights", file, "--out", file.replace(".", "-")).exit_code == 0
    assert call("report", *MINE, *options, "--out", "own").exit_code == 0
    folders = ("w-safetensors", "w-pt", "checkpoint-pt", "own")
    *given, own = (load_comparison(out).meta["fingerprints"]["weights"] for out in folders)
    assert len(set(given)) == 1
    assert own not in given
    assert load_comparison("checkpoint-pt").meta["settings"]["weights"] == "checkpoint.pt (its entry 'state_dict')"


class Bomb:
    """Unpickling it would write a file."""

    def __reduce__(self):
        return (open, ("exploded", "w"))


def test_pickled_code_is_never_run(here):
    (here / "bomb.pt").write_bytes(pickle.dumps(Bomb(), protocol=2))
    torch.save({"state_dict": Bomb()}, here / "bomb2.pt")
    for file in ("bomb.pt", "bomb2.pt"):
        result = call("report", *MINE, "--weights", file)
        assert result.exit_code == 2
        assert "--weights: " in result.output
        assert "holds more than weights" in result.output
    assert not (here / "exploded").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "w.pt"], "--weights: they need their network; give --model"),
        (["--model", "mynet:build"], "--data: say what the network was trained on"),
        (["--model", "mynet", "--data", "digits"], "--model: 'mynet' names nothing; write package.module:"),
        (
            ["--model", "nowhere:build", "--data", "digits"],
            "--model: there is no module 'nowhere' on Python's path",
        ),
        (["--model", "mynet:nothing", "--data", "digits"], "--model: mynet has no 'nothing'"),
        (
            ["--model", "mynet:broken", "--data", "digits"],
            "--model: KeyError: 'the weights are lost' (mynet.py, line ",
        ),
        (["--model", "mynet:number", "--data", "digits"], "--model: mynet:number gave int; it must give"),
        ([*MINE, "--weights", "none.pt"], "--weights: there is no file none.pt"),
        ([*MINE, "--weights", "mynet.py"], "--weights: mynet.py holds more than weights"),
        ([*MINE, "--weights", "small.pt"], "--weights: small.pt does not fit the network of --model"),
        ([*MINE, "--weights", "wide.pt"], "'0.weight' has the shape (7, 6), the network's (5, 6)"),
        ([*MINE, "--weights", "list.pt"], "--weights: list.pt holds no state_dict"),
        (["--data", "digts"], "--data: there is no data set 'digts'; choose one of digits"),
        (["--data", "digits:big"], "--data: 'big' is no size of images; write for example digits:16"),
        (["--model", "mynet:build", "--data", "mynet:once"], "--data: the loader gave a one-shot iterator"),
        (
            ["--model", "mynet:build", "--data", "mynet:broken"],
            "--data: KeyError: 'the weights are lost' (mynet.py, line ",
        ),
        (["--examples", "0"], "--examples: 0 examples make no Fisher"),
        (["--kind", "exct"], "--kind: kind must be one of exact, mc, empirical, got 'exct'; did you mean 'exact'?"),
        (["--metrics", "kll"], "did you mean 'kl'?"),
        ([*MINE, "--output", "logits"], "--output: the network returns a tensor"),
        (["--methods", "kfca"], "--methods: method must be one of identity"),
        (["--damping", "0"], "--damping: 0.0 does not damp; choose a positive number"),
        ([*MINE, "--likelihood", "poisson"], "--likelihood: "),
        ([*MINE, "--layers", "seventh"], "--layers: "),
        (["--device", "abacus"], "--device: "),
        (["--out", "mynet.py"], "--out: mynet.py is a file; give the path of a directory"),
        (["--methods", ","], "at least one name"),
    ],
)
def test_what_is_wrong_with_an_option_is_one_sentence_that_names_it(here, arguments, message):
    torch.save({"0.weight": torch.zeros(5, 6)}, here / "small.pt")
    wide = __import__("mynet").build().state_dict() | {"0.weight": torch.zeros(7, 6)}
    torch.save(wide, here / "wide.pt")
    torch.save([1, 2], here / "list.pt")
    result = call("report", *arguments, "--quiet")
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (here / "report").exists()


def test_a_run_that_fails_leaves_with_1_and_writes_nothing(here):
    result = call("report", "--model", "mynet:build", "--data", "mynet:nans", "--quiet")
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert len(result.output.splitlines()) == 1
    assert not (here / "report").exists()


def test_data_comes_in_any_of_its_forms(here):
    pair, batches = load_data("mynet:pair", 20).batches, load_data("mynet:batches", 20).batches
    assert torch.equal(torch.cat([inputs for inputs, _ in batches]), pair[0])
    assert [len(inputs) for inputs, _ in batches] == [16, 4]
    dataset = load_data("mynet:dataset", None).batches
    assert sum(len(inputs) for inputs, _ in dataset) == 40
    assert load_data("mynet:inputs_only", 7).batches.shape == (7, 6)
    digits = load_data("digits:16", 30, progress=False)
    assert digits.batches[0].shape == (30, 256)
    assert digits.likelihood == "categorical"
    with pytest.raises(OptionError, match="--data"):
        load_data("mynet:missing", None)


def test_a_convolution_of_ones_own_is_reported_on_and_trained_on_the_packages_images(here, monkeypatch):
    undrawn(monkeypatch)
    options = ["--model", "mynet:digits", "--quiet"]
    reported = call("report", *options, "--data", "digits:4", "--examples", 40, "--methods", "kfac", "--layers", "2")
    assert reported.exit_code == 0, reported.output
    trained = call("train", *options, "--dataset", "digits", "--size", 4, "--limit", 60, "--epochs", 1, "--out", "run")
    assert trained.exit_code == 0, trained.output


def test_every_command_raises_what_went_wrong_where_that_is_asked_for(here, monkeypatch):
    wrong = {"report": ["--kind", "true"], "papers": ["--scale", "huge"], "train": ["--epochs", 0], "sweep": []}
    for command, arguments in wrong.items():
        monkeypatch.delenv("FISHERVIZ_TRACEBACK", raising=False)
        told = call(command, *arguments)
        assert isinstance(call(command, *arguments, "--debug").exception, OptionError)
        assert told.exit_code == 2
        assert told.output.startswith("fisherviz: ")
        assert len(told.output.splitlines()) == 1
        monkeypatch.setenv("FISHERVIZ_TRACEBACK", "1")
        assert isinstance(call(command, *arguments).exception, OptionError)


def test_every_field_of_a_report_has_a_flag_that_says_its_default():
    text = " ".join(call("report", "--help").output.split())
    for name, field in Job.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        assert field.description.split(",")[0] in text
    assert "[default: exact]" in text
    assert "[default: 2000]" in text


def test_long_messages_become_one_line():
    assert one_sentence("a\n  b\tc") == "a b c"
    assert len(one_sentence("word " * 1000)) == 600


@pytest.mark.soak  # `make report` runs it
def test_without_arguments_it_is_the_kfac_papers_example(here):
    result = call("report", "--methods", "kfac,kfac-full", "--examples", "300", "--quiet")
    assert result.exit_code == 0, result.output
    comparison = load_comparison("report")
    assert comparison.layers == ("layer2", "layer3", "layer4", "layer5")
    assert comparison.meta["parameters"] == 1680
    assert comparison.meta["settings"]["model"] == "256-20-20-20-20-20-10, tanh"
    assert load_comparison("report/layers").layers == tuple(f"layer{k}" for k in range(1, 7))
    page = (here / "report" / "index.html").read_text()
    assert "2,894.4" in page
    assert "The middle four layers, jointly" in page


def test_a_misspelt_option_is_answered_with_the_nearest_alone():
    told = CliRunner().invoke(app, ["train", "--optimizr", "kfac"])
    assert told.exit_code == 2
    assert "--optimizer" in told.output
    assert "--no-timings" not in told.output
    assert "--optimizer-option" not in told.output


def test_the_first_line_says_what_is_guessed_and_whose_the_weights_are(here):
    options = ["--methods", "foof", "--layers", "4", "--compare-only"]
    said = " ".join(call("report", *MINE, *options).output.split())
    assert said.startswith("mynet:build: weights: the factory's own, which are random unless it loads some")
    assert "categorical likelihood (a guess: the targets are whole numbers; --likelihood gives another)." in said
    import mynet

    torch.save({"state_dict": {f"model.{k}": v for k, v in mynet.build().state_dict().items()}}, here / "net.ckpt")
    given = call("report", *MINE, *options, "--weights", "net.ckpt", "--likelihood", "categorical")
    said = " ".join(given.output.split())
    part = "its entry 'state_dict', without the prefix 'model.'"
    assert said.startswith(f"mynet:build: weights: net.ckpt ({part}); categorical likelihood. ")


@pytest.mark.parametrize(
    ("targets", "guess"),
    [
        (torch.tensor([0, 1, 2]), "categorical"),
        (torch.tensor([[0.0], [1.0], [1.0]]), "bernoulli"),
        (torch.tensor([[0.3], [1.0], [-2.0]]), "gaussian"),
        (None, "categorical"),
    ],
)
def test_a_likelihood_is_guessed_from_the_targets(targets, guess):
    inputs = torch.zeros(3, 2)
    data = Data(inputs if targets is None else (inputs, targets), "mine")
    name, why = data.likelihood_for(None, None)
    assert name == guess
    assert why.startswith("a guess: ")
    assert data.likelihood_for("gaussian", None) == ("gaussian", "")


def test_only_the_comparison_is_written_where_that_is_asked_for(here, monkeypatch):
    undrawn(monkeypatch)
    options = ["--methods", "kfac,foof", "--metrics", "frobenius_cosine,kl", "--compare-only"]
    done = call("report", *MINE, *options)
    assert done.exit_code == 0, done.output
    assert done.output.endswith("Wrote report/comparison.parquet\n")
    found = load_comparison("report")
    assert found.metrics == ("frobenius_cosine", "kl")
    assert sorted(path.name for path in (here / "report").iterdir()) == sorted(found.to_files())
    assert call("report", *MINE, "--methods", "kfac", "--layers", "4", "--out", "page", "--quiet").exit_code == 0
    refused = call("report", *MINE, *options, "--out", "page")
    assert refused.exit_code == 2
    assert "--out: page holds a page" in refused.output


TEXTS = """
import dataclasses, collections, torch
from torch import nn

@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor

Named = collections.namedtuple("Named", "logits hidden")

class Net(nn.Module):
    def __init__(self, form):
        super().__init__()
        torch.manual_seed(0)
        self.form, self.table, self.head = form, nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, input_ids):
        hidden = self.table(input_ids).mean(1)
        return self.form(self.head(hidden), hidden)

def mapping(): return Net(lambda z, h: {"logits": z, "hidden": h})
def pair(): return Net(lambda z, h: (z, h))
def record(): return Net(Output)
def named(): return Net(Named)
def nested(): return Net(lambda z, h: {"heads": [h, z]})
def plain(): return Net(lambda z, h: z)

def texts():
    generator = torch.Generator().manual_seed(1)
    ids, labels = torch.randint(9, (20, 5), generator=generator), torch.randint(3, (20,), generator=generator)
    rows = [{"input_ids": i, "labels": label} for i, label in zip(ids, labels)]
    return torch.utils.data.DataLoader(rows, batch_size=8)
"""
OF_TEXTS = ["--data", "texts.py:texts", "--targets", "labels", "--methods", "kfac", "--examples", 12, "--compare-only"]


@pytest.fixture
def texts(tmp_path, monkeypatch):
    (tmp_path / "texts.py").write_text(TEXTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("texts", None)


@pytest.mark.parametrize(
    ("form", "name"),
    [("mapping", "logits"), ("pair", "0"), ("record", "logits"), ("named", "logits"), ("named", "0"),
     ("nested", "heads.1")],
)  # fmt: skip
def test_the_output_of_a_network_that_returns_several_things_is_named(texts, form, name):
    for model, more, out in (("plain", [], "plain"), (form, ["--output", name], "picked")):
        done = call("report", "--model", f"texts.py:{model}", *OF_TEXTS, *more, "--out", out)
        assert done.exit_code == 0, done.output
    plain, found = (load_comparison(out) for out in ("plain", "picked"))
    assert found.meta["examples"] == 12
    assert found.whole("relative_frobenius") == plain.whole("relative_frobenius")


@pytest.mark.parametrize(
    ("form", "more", "message"),
    [
        ("mapping", [], "--output: the network returns a dictionary of 'logits', 'hidden'; say which is the output, "
         "for example --output logits."),
        ("mapping", ["--output", "logit"], "and no 'logit'; did you mean 'logits'?"),
        ("pair", ["--output", "2"], "--output: the network returns a tuple of '0', '1', and no '2'."),
        ("record", ["--output", "hiden"], "a Output of 'logits', 'hidden', and no 'hiden'; did you mean 'hidden'?"),
        ("nested", ["--output", "heads"], "--output: 'heads' is no tensor; it holds a list of '0', '1'."),
    ],
)  # fmt: skip
def test_an_output_that_is_not_there_is_answered_with_what_is(texts, form, more, message):
    told = call("report", "--model", f"texts.py:{form}", *OF_TEXTS, *more, "--quiet")
    assert told.exit_code == 2
    assert message in told.output


def test_dictionaries_with_labels_name_the_option_for_targets(texts):
    told = call("report", "--model", "texts.py:plain", "--data", "texts.py:texts", "--quiet")
    assert told.exit_code == 2
    assert told.output.startswith("fisherviz: --targets: ")


@pytest.mark.parametrize("command", ["train", "sweep", "papers", "data list"])
def test_commands_that_share_no_work_refuse_several_processes(monkeypatch, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = call(*command.split())
    assert told.exit_code == 1
    assert f"fisherviz: torchrun has started several processes, and `fisherviz {command}` does not" in told.output


def test_an_exception_of_ones_own_network_keeps_its_type_and_place(here):
    (here / "falls.py").write_text(
        "from torch import nn\n\nclass Falls(nn.Linear):\n    def forward(self, x):\n        return self.table[3]\n\n"
        "def build():\n    return Falls(6, 3)\n"
    )
    told = call("report", "--model", "falls.py:build", "--data", "mynet:pair", "--quiet")
    assert told.exit_code == 1
    assert "AttributeError: 'Falls' object has no attribute 'table' (falls.py, line 5, in forward)" in told.output
