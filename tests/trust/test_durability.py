"""The paragraph on what is not lost finds faults that are planted."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from benchmarks.trust import damage, durability
from benchmarks.trust.injection import ERRORS, KILL, Faults, forked
from benchmarks.trust.keeping import Kept

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="work is tried in forks")


def careless(folder):
    """Writes in place, without a word."""
    with open(folder / "result.json", "w") as stream:
        stream.write('{"numbers": [1, 2')
        stream.flush()
        stream.write(", 3]}")


CARELESS = Kept("careless", careless, lambda folder: [json.loads((folder / "result.json").read_text()), []], True)


def replacing(folder):
    (folder / "result.json").write_text('{"numbers": [0]}')


@pytest.mark.parametrize("error", ERRORS.values())
def test_a_result_that_is_written_in_place_is_found_to_be_lost(tmp_path, error):
    work = Kept("careless", careless, CARELESS.state, True, replacing)
    counts = durability.failing(work, error, 1, tmp_path)
    assert counts["unreadable"] > 0
    assert durability._lost("careless", counts, ("unreadable",))
    assert durability.killed_at_writes(work, 1, tmp_path)["unreadable"] > 0


def test_every_write_is_counted_and_the_one_that_is_chosen_kills(tmp_path):
    def work(at=0, error=KILL):
        faults = Faults(tmp_path, at, error).install()
        careless(tmp_path)
        (tmp_path / "folder").mkdir(exist_ok=True)
        os.replace(tmp_path / "result.json", tmp_path / "folder" / "moved.json")
        return faults.count

    assert forked(work).found == 5  # open, twice write, mkdir, move
    assert [forked(lambda at=at: work(at)).how for at in range(1, 7)] == ["killed"] * 5 + ["done"]
    assert forked(lambda: work(2, ERRORS["broken disk"])).told.endswith("result.json'")


def test_damage_that_reads_as_something_else_is_called_silent(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "number.txt").write_text("1" * 40)
    found = damage._tried(
        tmp_path / "b", tmp_path / "a", Path("number.txt"), lambda place: (place / "number.txt").read_bytes(),
        random.Random(0), 12,
    )  # fmt: skip
    assert (found["silent"], found["flips"]) == (12 + found["cuts"], 12)
    assert durability._lost("number", found, ("silent",))


def test_a_fork_that_fails_says_how():
    def fails():
        raise KeyError("raw")

    assert (forked(fails).how, forked(fails).raw) == ("refused", True)
    assert forked(lambda: [1]).found == [1]
    assert forked(lambda: os.kill(os.getpid(), signal.SIGKILL)).how == "killed"
    assert forked(lambda: time.sleep(60), kill_after=0.1).how == "killed"
    assert forked(lambda: time.sleep(60), interrupt_after=0.1).how == "interrupted"
