"""What counts as free memory: the machine's, within the limits of container and process, told by files and `ulimit`."""

import os

import pytest
import torch
from torch import nn

import fisherviz as fv
from benchmarks.trust.injection import forked
from fisherviz.support import limits, memory

GIB = 2**30
CPU = torch.device("cpu")


def machine(tmp_path, monkeypatch, available=8 * GIB, **files):
    """A machine of 16 GiB whose files are these, by path from the root with __ for /."""
    monkeypatch.setattr(limits, "PROC", tmp_path / "proc")
    monkeypatch.setattr(limits, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(limits, "_installed", lambda: 16 * GIB)
    files = {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {available // 1024} kB\n"} | {
        name.replace("__", "/"): text for name, text in files.items()
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(str(text))


def test_without_limits_it_is_what_the_machine_has_available(tmp_path, monkeypatch):
    machine(tmp_path, monkeypatch, proc__self__cgroup="0::/a/b\n")
    assert limits.free() == 8 * GIB
    assert limits.whole() == 16 * GIB


def test_a_container_may_take_its_limit_less_what_it_cannot_give_back(tmp_path, monkeypatch):
    machine(tmp_path, monkeypatch, **{
        "proc/self/cgroup": "0::/\n", "cgroup/memory.max": 2 * GIB, "cgroup/memory.current": GIB,
        "cgroup/memory.stat": f"anon 77\ninactive_file {GIB // 4}\nactive_file {GIB // 8}\nfile {GIB // 2}\n",
    })  # fmt: skip
    assert limits.free() == GIB + GIB // 4 + GIB // 8
    assert limits.whole() == 2 * GIB


def test_the_tightest_of_the_groups_that_it_lies_in_counts(tmp_path, monkeypatch):
    machine(tmp_path, monkeypatch, **{
        "proc/self/cgroup": "0::/job/step/task\n",
        "cgroup/job/memory.max": 3 * GIB, "cgroup/job/memory.current": 2 * GIB,
        "cgroup/job/step/memory.max": 2 * GIB, "cgroup/job/step/memory.current": 0,
        "cgroup/job/step/task/memory.max": "max\n", "cgroup/job/step/task/memory.current": 0,
    })  # fmt: skip
    assert limits.free() == GIB
    assert limits.whole() == 2 * GIB


def test_a_group_that_is_slowed_down_above_a_mark_stays_below_it(tmp_path, monkeypatch):
    machine(tmp_path, monkeypatch, **{
        "proc/self/cgroup": "0::/\n", "cgroup/memory.max": "max", "cgroup/memory.high": GIB, "cgroup/memory.current": 0,
    })  # fmt: skip
    assert limits.free() == GIB


@pytest.mark.parametrize("path", ["/", "/docker/abc"])
def test_version_one_of_control_groups_is_read_where_a_container_sees_only_its_own(tmp_path, monkeypatch, path):
    machine(tmp_path, monkeypatch, **{
        "proc/self/cgroup": f"9:name=systemd:/\n4:cpu,memory:{path}\n0::/\n",
        "cgroup/memory/memory.limit_in_bytes": 2 * GIB, "cgroup/memory/memory.usage_in_bytes": GIB,
        "cgroup/memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 2}\ntotal_active_file 0\n",
    })  # fmt: skip
    assert limits.free() == GIB + GIB // 2


def test_version_one_states_the_largest_number_where_there_is_no_limit(tmp_path, monkeypatch):
    machine(tmp_path, monkeypatch, **{
        "proc/self/cgroup": "4:memory:/\n", "cgroup/memory/memory.limit_in_bytes": 9223372036854771712,
        "cgroup/memory/memory.usage_in_bytes": GIB,
    })  # fmt: skip
    assert limits.free() == 8 * GIB
    assert limits.whole() == 16 * GIB


def test_what_is_used_beyond_a_limit_leaves_nothing(tmp_path, monkeypatch):
    machine(tmp_path, monkeypatch, **{
        "proc/self/cgroup": "0::/\n", "cgroup/memory.max": GIB, "cgroup/memory.current": 2 * GIB,
    })  # fmt: skip
    assert limits.free() == 0


def test_processes_that_torchrun_started_on_a_machine_share_its_memory(tmp_path, monkeypatch):
    machine(tmp_path, monkeypatch)
    assert memory.available(CPU) == 8 * GIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.available(CPU) == 2 * GIB


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a fork is limited")
@pytest.mark.parametrize(
    ("what", "has"), [("RLIMIT_AS", "VmSize"), pytest.param("RLIMIT_DATA", "VmData", marks=pytest.mark.soak)]
)
def test_a_limit_on_the_process_is_kept(what, has):
    """A dense 6,000 × 6,000 takes 412 MiB while it is made, in a process that may take 300 MiB more than it has."""
    import resource

    fisher = fv.Probe(nn.Linear(2999, 2), "gaussian").fisher(torch.randn(2, 2999))
    fisher.units(0), fisher.norm()  # what is imported and mapped on the way is there

    def limited():
        taken = limits._table(limits.PROC / "self/status", has)[has]
        limit = getattr(resource, what)
        resource.setrlimit(limit, (taken + 300 * 2**20, resource.getrlimit(limit)[1]))
        with pytest.raises(MemoryError) as told:
            fisher.to_dense()
        return [limits.free(), str(told.value)]

    free, said = forked(limited).found
    assert 100 * 2**20 < free <= 300 * 2**20
    assert "the dense 6,000 x 6,000 Fisher takes 412 MiB, but" in said
    assert "are free on cpu" in said


def test_pieces_are_cut_by_the_budget_and_by_the_machine_not_by_what_is_free(monkeypatch):
    monkeypatch.setattr(memory, "_whole", lambda device: 64 * GIB)
    monkeypatch.setattr(limits, "free", lambda: 1)
    assert memory.at_once(2**20, torch.zeros(0)) == 2**20
    monkeypatch.setattr(fv.config, "_memory_budget", 2**20)
    assert memory.at_once(2**20, torch.zeros(0)) == 2**20 // 16 // 4
    monkeypatch.setattr(fv.config, "_memory_budget", 3)
    assert memory.at_once(2**20, torch.zeros(0)) == 1
