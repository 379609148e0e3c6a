"""Memory at the peak, as torch's profiler sees it."""

import torch

from fisherviz.support.peaks import peak_bytes


def test_the_peak_counts_what_is_held_together_and_not_what_was_freed_before():
    one = 4 * 1000 * 1000

    def together():
        x = torch.zeros(1000, 1000)
        return x, torch.zeros(1000, 1000)

    def in_turn():
        for _ in range(3):
            torch.zeros(1000, 1000)

    assert 2 * one <= peak_bytes(together) < 2.1 * one
    assert one <= peak_bytes(in_turn) < 1.1 * one
