"""What the page says of mutants is counted as it is said: samples, survivors and their explanations, planted faults."""

import pytest

from benchmarks.trust import mutants, mutants_named, mutants_planted, mutants_sampled

SHOWN = """# fisherviz.operators.damping.x__shifted__mutmut_4: survived
--- fisherviz/operators/damping.py
+++ fisherviz/operators/damping.py
@@ -1,2 +1,2 @@
 def _shifted(M: Tensor, value: float) -> Tensor:
-    return M + value if M.ndim == 1 else plus_identity(M, value)
+    return M + value if M.ndim == 2 else plus_identity(M, value)
"""
NAME = "fisherviz.operators.damping.x__shifted__mutmut_4"
TABLE = """| where | was | becomes | why nothing fails |
|---|---|---|---|
| `operators/damping.py _shifted` | `return M + value if M.ndim == 1 else plus_identity(M, value)` | `{}` | because |
"""


def test_every_planted_fault_is_one_edit_of_the_code_as_it_is():
    for planted in mutants_planted.PLANTED:
        source = (mutants_named.ROOT / "fisherviz" / planted.file).read_text(encoding="utf-8")
        assert mutants_named.edited(source, planted) != source


def test_a_planted_fault_that_the_code_has_left_behind_is_told():
    with pytest.raises(RuntimeError, match="bring the planted fault up to date"):
        mutants_named.edited("nothing of it", mutants_planted.PLANTED[0])


def test_words_of_planted_faults_are_told_apart():
    said = [planted.words for planted in mutants_planted.PLANTED]
    assert len(set(said)) == len(said)


@pytest.mark.parametrize(
    ("becomes", "explained"),
    [("return M + value if M.ndim == 2 else plus_identity(M, value)", 1), ("return M", 0)],
)
def test_a_survivor_is_explained_by_its_place_and_its_very_change(becomes, explained):
    changes = {NAME: mutants_sampled.change(SHOWN)}
    outcomes = {NAME: "survived", "another": "killed", "a third": "timeout"}
    found = mutants_sampled.tallied(outcomes, changes, mutants_sampled.explained(TABLE.format(becomes)))
    assert (found["tried"], found["killed"], found["explained"], len(found["open"])) == (3, 2, explained, 1 - explained)


def test_what_later_tests_kill_is_told_apart_from_what_was_killed_at_first():
    changes = {NAME: mutants_sampled.change(SHOWN)}
    found = mutants_sampled.tallied({NAME: "survived", "another": "killed"}, changes, set(), since={NAME})
    assert (found["tried"], found["killed"], found["since"], found["explained"], found["open"]) == (2, 1, 1, 0, [])
    assert mutants.share(found) == 0.5


def test_samples_are_the_same_each_time_and_none_is_taken_twice():
    names = {"operators": [f"m{i}" for i in range(50)], "exact": ["a", "b"]}
    found = mutants_sampled.sampled(names, {"operators": 10, "exact": 5})
    assert found == mutants_sampled.sampled(
        {room: own[::-1] for room, own in names.items()}, {"operators": 10, "exact": 5}
    )
    assert len(set(found["operators"])) == 10
    assert sorted(found["exact"]) == ["a", "b"]


def test_what_no_test_notices_and_what_is_taken_too_rarely_is_broken():
    room = {"mutants": 100, "tried": 10, "killed": 8, "since": 0, "explained": 1, "open": [("a.py f", "x", "y")]}
    few = {"branches": [94, 100], "lines": [100, 100]}
    found = {
        "planted": {"a is b": False, "c is d": True}, "mutants": {"exact": room}, "branches": {"exact": few},
        "deaf": {"tests": 3, "pass": ["tests/a.py::test_b"]},
    }  # fmt: skip
    said = " ".join(mutants.broken(found))
    for part in ("a is b", "`x` → `y` survives", "94 of 100 branches", "test_b passes though"):
        assert part in said
    assert "c is d" not in said
    assert "are killed, less" not in said, "8 of the 9 that can be killed"
    assert len(mutants.words(found)) == 5


def test_a_measurement_in_which_everything_is_noticed_is_not_broken():
    room = {"mutants": 100, "tried": 10, "killed": 10, "since": 0, "explained": 0, "open": []}
    all_taken = {"branches": [99, 100], "lines": [100, 100]}
    found = {"planted": {"a is b": True}, "mutants": {"exact": room}, "branches": {"exact": all_taken}}
    assert mutants.broken(found) == []
