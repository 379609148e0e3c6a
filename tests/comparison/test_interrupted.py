"""`fv.compare(out=)` after an interruption: methods that are measured are taken, in one process and in several."""

import os
import signal
import warnings

import numpy as np
import pytest
import torch

import fisherviz as fv
from fisherviz.comparison.dense import DenseComparison
from fisherviz.support.pieces import PLACE, Pieces
from tests import together
from tests.oracles import nets

METHODS = ["kfac", "foof", "diagonal"]
REDUCED = fv.approximations["kfac"](setting="reduce")
METRICS = ["relative_frobenius", "direction_cosine", "passes"]


def fisher_of(shift=0.0, batches=1, **options):
    torch.manual_seed(0)
    net = nets.mlp(3, 4, 4)
    with torch.no_grad():
        net[0].bias += shift
    data = torch.randn(7 * batches, 3).double(), torch.randint(4, (7 * batches,))
    parts = data if batches == 1 else list(zip(*(each.chunk(batches) for each in data), strict=True))
    return fv.Probe(net, "categorical").fisher(parts, **options)


def compared(folder, after=None, die=lambda: None, **options):
    """Compare, and what is measured; some process ends once so many methods are kept."""
    measured, kept = [], []
    rows, keep = DenseComparison.rows, Pieces.keep

    def counted(self, label, *rest):
        measured.append(label)
        return rows(self, label, *rest)

    def counting(self, name, state):
        keep(self, name, state)
        kept.append(name)
        if len(kept) == after:
            die()

    given = {"metrics": METRICS, **options.pop("compare", {})}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DenseComparison, "rows", counted)
        patch.setattr(Pieces, "keep", counting)
        found = fv.compare(fisher_of(**options), given.pop("methods", METHODS), out=folder, progress=False, **given)
    return found, measured


def interrupt():
    raise KeyboardInterrupt


def interrupted(folder, after, **options):
    with pytest.raises(KeyboardInterrupt):
        compared(folder, after, interrupt, **options)


def facts_of(comparison):
    clock = ("created", "forward_backward_seconds", "fits_timed")
    return {key: value for key, value in comparison.meta.items() if key not in clock}


def equal(one, other):
    arrays = one.arrays.keys() == other.arrays.keys() and all(
        np.array_equal(array, other.arrays[name], equal_nan=True) for name, array in one.arrays.items()
    )
    return arrays and one.frame.equals(other.frame) and facts_of(one) == facts_of(other)


@pytest.mark.parametrize("after", [1, 3])
def test_an_interrupted_comparison_goes_on_and_is_saved(tmp_path, after):
    whole, measured = compared(tmp_path / "whole")
    assert measured == METHODS
    interrupted(tmp_path / "out", after)
    with pytest.warns(UserWarning, match=f"{after} of 3 methods taken from the interrupted comparison"):
        found, measured = compared(tmp_path / "out")
    assert measured == METHODS[after:]
    assert equal(found, whole)
    assert equal(fv.load_comparison(tmp_path / "out"), whole)
    assert not (tmp_path / "out" / PLACE).exists()


def test_a_method_that_is_finished_still_decides_how_the_others_are_summed(tmp_path):
    """It reads all batches as one: what the others would be without it differs in the last digits."""
    finished, options = "nearest-kronecker", {"metrics": ["relative_frobenius", "inverse_frobenius"], "damping": 0.1}
    given = {"batches": 4, "compare": {"methods": [finished, "kfac", "ekfac"], **options}}
    whole, _ = compared(tmp_path / "whole", **given)
    interrupted(tmp_path / "out", 1, **given)
    with pytest.warns(UserWarning, match="1 of 3 methods taken"):
        found, measured = compared(tmp_path / "out", **given)
    assert finished not in measured
    assert equal(found, whole)


def test_what_was_kept_of_another_network_is_not_used(tmp_path):
    interrupted(tmp_path, 2)
    with pytest.warns(UserWarning, match=r"is another now: weights \(\w+ before and \w+ now\)") as told:
        found, measured = compared(tmp_path, shift=0.5)
    assert told[0].filename == __file__
    assert measured == METHODS
    assert equal(found, compared(tmp_path / "other", shift=0.5)[0])


@pytest.mark.parametrize(
    "other",
    [
        {"compare": {"damping": 0.1}}, {"compare": {"metrics": ["kl"]}}, {"kind": "empirical"}, {"reduction": "sum"},
        {"compare": {"gradient": torch.ones(3 * 4 + 4 + 4 * 4 + 4).double()}},
        {"compare": {"methods": {"kfac": REDUCED, "foof": "foof", "diagonal": "diagonal"}}},
    ],
)  # fmt: skip
def test_what_was_kept_with_other_options_is_not_used(tmp_path, other):
    interrupted(tmp_path, 2)
    with pytest.warns(UserWarning, match=r"is another now: configuration \("):
        interrupted(tmp_path, 1, **other)


def test_a_fitted_approximation_is_known_by_its_matrix(tmp_path):
    mine = fv.approximate(fisher_of(), "kfac")
    others = fv.approximate(fisher_of(shift=0.1), "kfac")
    given = {"methods": {"mine": mine, "foof": "foof"}}
    interrupted(tmp_path, 1, compare=given)
    with pytest.warns(UserWarning, match="1 of 2 methods taken"):
        _, measured = compared(tmp_path, compare=given)
    assert measured == ["foof"]
    interrupted(tmp_path, 1, compare=given)
    with pytest.warns(UserWarning, match="configuration .method mine"):
        _, measured = compared(tmp_path, compare={"methods": {"mine": others, "foof": "foof"}})
    assert measured == ["mine", "foof"]


def test_a_method_that_failed_is_tried_again(tmp_path, monkeypatch):
    def fails(self, layer, values):
        raise ValueError("it is too much.")

    with monkeypatch.context() as patch:
        patch.setattr(fv.approximations["kfac"], "operator_for", fails)
        interrupted(tmp_path, 2)
    with pytest.warns(UserWarning, match="2 of 3 methods taken"):
        found, measured = compared(tmp_path)
    assert measured == ["kfac"]
    assert found.methods == tuple(METHODS)


# ---- several processes


def shared(folder, own_folders, after, dies):
    """In each process of a group; one dies by itself once it has kept so many."""
    rank = torch.distributed.get_rank()
    out = folder / (f"out{rank}" if own_folders else "out")
    end = (lambda: os.kill(os.getpid(), signal.SIGKILL)) if rank == dies else (lambda: None)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            found, measured = compared(out, after, end, processes=True)
        except OSError as error:
            return str(error)
    frame = found.frame.to_csv(float_format="%.17g")
    return frame, facts_of(found), measured, [str(each.message) for each in told]


def shared_thrice(folder):
    """Whole; interrupted before the files are written, one method lost; and once more."""
    whole = shared(folder / "whole", False, None, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pieces, "commit", lambda *rest: (_ for _ in ()).throw(OSError("interrupted")))
        said = shared(folder, False, None, None)
    if torch.distributed.get_rank() == 0:
        next((folder / "out" / PLACE).glob("method-foof-*.pt")).unlink()
    torch.distributed.barrier()
    return whole, said, shared(folder, False, None, None)


@pytest.mark.slow
def test_two_processes_go_on_together(tmp_path):
    first, second = together.run(shared_thrice, 2, tmp_path / "group", tmp_path)
    assert sorted([*first[0][2], *second[0][2]]) == sorted(METHODS)
    assert "interrupted" in first[1]
    assert "interrupted" in second[1]
    assert [one[2][:2] for one in (first, second)] == [one[0][:2] for one in (first, second)]
    assert [*first[2][2], *second[2][2]] == ["foof"]
    assert (first[2][3], second[2][3]) == (["2 of 3 methods taken from the interrupted comparison."], [])
    assert not (tmp_path / "out" / PLACE).exists()


@pytest.mark.soak
def test_two_processes_go_on_by_what_the_first_of_them_finds(tmp_path):
    whole = together.run(shared, 2, tmp_path / "g0", tmp_path / "whole", False, None, None)
    assert sorted([*whole[0][2], *whole[1][2]]) == sorted(METHODS)
    died = together.run(shared, 2, tmp_path / "g1", tmp_path, False, 1, 1)
    assert died[1] is None
    assert "another process has ended" in died[0]
    kept = len(list((tmp_path / "out" / PLACE).glob("method-*.pt")))
    assert 1 <= kept <= 3
    found = together.run(shared, 2, tmp_path / "g2", tmp_path, False, None, None)
    assert [one[:2] for one in found] == [one[:2] for one in whole]
    assert len(found[0][2]) + len(found[1][2]) == 3 - kept
    assert found[0][3] == [f"{kept} of 3 methods taken from the interrupted comparison."]
    assert found[1][3] == []
    assert not (tmp_path / "out" / PLACE).exists()


@pytest.mark.soak
def test_processes_that_see_other_folders_follow_the_first(tmp_path):
    whole = together.run(shared, 3, tmp_path / "g0", tmp_path / "whole", True, None, None)
    together.run(shared, 3, tmp_path / "g1", tmp_path, True, 1, 0)
    kept = [len(list((tmp_path / f"out{rank}").rglob("method-*.pt"))) for rank in range(3)]
    assert kept == [1, 0, 0]  # what others finish is kept where the first finds it, or nowhere
    interrupted(tmp_path / "out1", 1)  # another's, of one process
    found = together.run(shared, 3, tmp_path / "g2", tmp_path, True, None, None)
    assert [one[:2] for one in found] == [one[:2] for one in whole]
    assert sum(len(one[2]) for one in found) == 2
    assert (tmp_path / "out1" / PLACE).exists()  # it is not theirs
