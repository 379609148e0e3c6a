"""What counts as free memory."""

import torch

from fisherviz.support import memory


def test_processes_that_torchrun_started_on_a_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(memory, "_physical", lambda: 800)
    assert memory.available(torch.device("cpu")) == 800
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.available(torch.device("cpu")) == 200
