"""What the paragraph on letting nobody in is measured with: it sees code that ran, memory, time, unclear words."""

import pytest

from benchmarks.trust import doors, hostile_names, security
from benchmarks.trust.doors import Outcome, harmless, tried
from benchmarks.trust.hostile_files import CANARY, Case, cases


def case(text, name="x", kind="YAML"):
    def write(folder):
        path = folder / "config.yaml"
        path.write_text(text)
        return path

    return Case(kind, name, ("config",), write)


def test_the_cases_are_many_and_each_knocks_at_doors_that_are_there():
    found = cases()
    assert len(found) > 400
    assert len({(each.kind, each.name) for each in found}) == len(found)
    assert {door for each in found for door in each.entries} <= doors.DOORS.keys()


@pytest.mark.soak
@pytest.mark.parametrize(
    ("text", "ended"),
    [
        ("seed: !!python/object/apply:os.system [x]", "refused"),
        ("epochs: 1", "taken"),
        (f"open({CANARY!r}, 'w').close()", "ran"),
        ("raise KeyError('x')", "raw"),
        ("raise ValueError('something is wrong')", "unclear"),
        ("raise ValueError('config.yaml is \\x1b[31m')", "unclear"),
        ("while True: pass", "slow"),
        ("import os; os.abort()", "killed"),
    ],
)
def test_a_process_that_does_wrong_is_seen(tmp_path, monkeypatch, text, ended):
    (tmp_path / "good").mkdir()
    (tmp_path / "case").mkdir()
    monkeypatch.setattr(doors, "SECONDS", 2)
    door = "config" if "seed" in text else "planted"
    assert tried(case(text), door, tmp_path / "good", tmp_path / "case").ended == ended


def browser(**changes):
    return {"pages": 1, "heard": [], "attempts": 15, "reached": 0, "reached without a policy": 9} | changes


def found(**changes):
    files = {"kinds": {"YAML": {"refused": 3}}, "wrong": [], "mib": 1, "seconds": 0.1}
    names = {"names": 3, "on pages": 3, "commands": 3, "objects": 3, "wrong": [],
             "browser": browser()}  # fmt: skip
    whole = {
        "files": files, "names": names, "mutated": {"refused": 3, "taken": 1, "raw": 0, "killed": 0},
        "imports": {"tried": 2, "wrong": []},
        "dependencies": {"pinned": 3, "hashes": 9, "without": [], "addresses": 0},
    }  # fmt: skip
    for path, value in changes.items():
        part, _, key = path.partition("__")
        whole[part][key] = value
    return whole


def test_what_holds_is_not_broken_and_is_told():
    assert security.broken(found()) == []
    assert any("| YAML | 3 | 3 | 0 | 0 | 0 |" in part for part in security.words(found()))


@pytest.mark.parametrize(
    "change",
    [
        {"files__wrong": ["x"]}, {"files__seconds": 99.0}, {"names__wrong": ["x"]}, {"mutated__raw": 1},
        {"mutated__killed": 1}, {"imports__wrong": ["x"]}, {"dependencies__without": ["x"]},
        {"dependencies__addresses": 1}, {"names__browser": browser(heard=["x"])},
        {"names__browser": browser(reached=1)},
        {"names__browser": browser(**{"reached without a policy": 0})},
    ],
)  # fmt: skip
def test_each_fault_is_told(change):
    assert len(security.broken(found(**change))) == 1


def test_a_file_may_be_taken_only_where_that_harms_nobody():
    assert not harmless(case("x"), "config")
    assert harmless(case("x"), "run")
    assert Outcome("taken", "", 0.0, 0).ended == "taken"


@pytest.mark.parametrize("name", hostile_names.NAMES[::9])
def test_a_command_that_fails_by_a_name_steers_no_terminal(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for command in hostile_names.COMMANDS[2:5]:
        assert hostile_names.told(name, command) == []


def test_names_are_text_in_objects_and_tables():
    assert hostile_names.shown(hostile_names.NAMES[17:34:6])[1] == []


def test_the_lock_pins_what_the_constraints_pin_and_all_that_the_package_needs():
    import re
    import tomllib

    root = security.ROOT
    lock = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (root / "requirements.lock").read_text(), flags=re.M))
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", (root / "constraints.txt").read_text(), flags=re.M))
    plain = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    known = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in lock.items()}
    assert {name: version for name, version in known.items() if name in plain} == {
        name: plain[name] for name in known if name in plain
    }
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(each for extra in ("dev", "notebook", "sweep", "docs")
              for each in project["optional-dependencies"][extra])]  # fmt: skip
    names = {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", each)[0]).lower() for each in wanted} - {"torch"}
    assert names <= known.keys()
    assert security.broken({**found(), "dependencies": security._dependencies()}) == []
