"""The user's code by module or by file: the same object, its neighbours in reach, other processes find it too."""

import importlib
import multiprocessing
import pickle
import sys

import pytest

from fisherviz.support.importing import imported

MINE = """
from {helper} import WORD

class Thing:
    word = WORD

def build():
    return Thing()
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current directory; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(
            getattr(sys.modules[name], "__file__", None) or getattr(sys.modules[name], "__path__", "")
        ):
            del sys.modules[name]


def write(folder, helper="helper", package=False, name="mine"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(MINE.format(helper=helper))
    (folder / "helper.py").write_text(f"WORD = {str(folder)!r}")
    if package:
        (folder / "__init__.py").write_text("")


@pytest.mark.parametrize("package", [False, True])
@pytest.mark.parametrize("helper", ["helper", ".helper", "nets.helper"])
def test_a_file_is_the_module_of_its_name(here, helper, package):
    write(here / "nets", helper, package)
    by_file = imported("nets/mine.py:build")
    assert by_file().word == str(here / "nets")
    assert by_file is imported("nets.mine:build")
    assert by_file is imported(f"{here}/nets/mine.py:build")
    assert by_file is imported("./nets/../nets/mine.py:build")
    assert imported("nets/mine.py:Thing.word") == str(here / "nets")


@pytest.mark.parametrize("package", [False, True])
def test_a_file_elsewhere_finds_its_neighbours(here, tmp_path_factory, package):
    other = tmp_path_factory.mktemp("elsewhere") / "far"
    write(other, "far.helper" if package else "helper", package)
    assert imported(f"{other}/mine.py:build")().word == str(other)
    for name in ("mine", "helper", "far", "far.mine", "far.helper"):
        sys.modules.pop(name, None)


def test_two_files_of_one_name_are_two_modules(here):
    write(here / "a", ".helper")
    write(here / "b", ".helper")
    assert imported("a/mine.py:build")().word == str(here / "a")
    assert imported("b/mine.py:build")().word == str(here / "b")


def test_a_file_called_like_a_module_of_python_is_not_mistaken(here):
    write(here / "nets", ".helper", name="types")
    assert imported("nets/types.py:build")().word == str(here / "nets")
    (here / "json.py").write_text("def build(): pass")
    with pytest.raises(ValueError, match=r"json\.py cannot be imported as 'json', .*; rename it"):
        imported("json.py:build")


def test_what_a_file_defines_reaches_other_processes(here):
    write(here / "nets")
    thing = imported("nets/mine.py:build")()
    assert pickle.loads(pickle.dumps(thing)).word == thing.word
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(thing.__class__.__repr__, (thing,)).startswith("<nets.mine.Thing")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nets/mine.py", "'nets/mine.py' names nothing; write package.module:attribute or folder/file.py:attribute"),
        ("nets/mnie.py:build", "there is no file nets/mnie.py; did you mean 'mine.py'?"),
        ("nets/mine:build", "nets/mine is no Python file; write folder/file.py:attribute"),
        ("nets/mine.py:biuld", "nets/mine.py has no 'biuld'; did you mean 'build'?"),
        ("nets.mien:build", "did you mean 'nets.mine'?"),
        (":build", "names nothing"),
    ],
)
def test_what_is_not_there_is_answered_with_the_nearest(here, name, message):
    write(here / "nets")
    with pytest.raises((ValueError, ImportError)) as caught:
        imported(name)
    assert message in str(caught.value)


def test_a_module_that_lacks_another_is_told_by_its_own_error(here):
    (here / "lacking.py").write_text("import a_module_that_nobody_has\n")
    with pytest.raises(ModuleNotFoundError, match="No module named 'a_module_that_nobody_has'"):
        imported("lacking.py:build")


@pytest.mark.parametrize("name", ["net.py:build", "net:build", "nets/net.py:build"])
def test_a_neighbour_takes_no_place_of_a_module_of_python_or_of_a_library(here, monkeypatch, name):
    folder = here / name.rpartition("/")[0]
    folder.mkdir(exist_ok=True)
    for module in ("mailbox", "zipapp", "cycler"):
        monkeypatch.delitem(sys.modules, module, raising=False)
        (folder / f"{module}.py").write_text("raise AssertionError('hijacked')\n")
    (folder / "net.py").write_text(
        "import mine_alone, mailbox\ndef build(): return mailbox.__file__, mine_alone.WORD\n"
    )
    (folder / "mine_alone.py").write_text("WORD = 1\n")
    file, word = imported(name)()
    assert str(here) not in file
    assert word == 1
    for module in ("zipapp", "cycler"):
        assert str(here) not in importlib.import_module(module).__file__
    for module in ("net", "nets", "nets.net", "mine_alone"):
        sys.modules.pop(module, None)


def test_a_module_of_the_current_folder_that_has_another_ones_name_is_no_guess(here):
    (here / "colorsys.py").write_text("def build(): pass\n")
    with pytest.raises(ValueError, match=r"'colorsys' is the name of .*colorsys\.py and of another module; rename"):
        imported("colorsys:rgb_to_hsv")


@pytest.mark.parametrize(
    "name", ["os:system", "subprocess:Popen", "builtins:exec", "torch.hub:os.system", "torch:sys.exit"]
)
def test_python_s_own_functions_are_no_networks(name):
    with pytest.raises(ValueError, match="is Python's own"):
        imported(name)
