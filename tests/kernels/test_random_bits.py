"""The counter-based uniform draws."""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import chisquare, kstest

from sedd.kernels.random_bits import GOLDEN64, cell_key, cell_keys, mix64_int, random_subsets, sequence, uniforms


def test_draws_of_a_cell_do_not_depend_on_the_cells_beside_it() -> None:
    u = uniforms(3, 1, torch.arange(100), 20)
    some = torch.tensor([97, 4, 4, 31])
    assert torch.equal(uniforms(3, 1, some, 20), u[some])
    assert torch.equal(uniforms(3, 1, torch.arange(100), 50)[:, :20], u)


def test_draws_are_uniform_and_streams_independent() -> None:
    cells = torch.arange(2_000)
    a, b, c = uniforms(0, 1, cells, 100), uniforms(0, 2, cells, 100), uniforms(1, 1, cells, 100)
    for u in (a, b, c):
        assert u.min() >= 0
        assert u.max() < 1
        assert kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3
    for other in (b, c, a.roll(1, 0), a.roll(1, 1)):
        correlation = float(torch.corrcoef(torch.stack([a.flatten(), other.flatten()]))[0, 1])
        assert abs(correlation) < 4 / a.numel() ** 0.5


def test_draws_have_53_bits() -> None:
    u = uniforms(0, 0, torch.arange(1_000), 100)
    assert torch.equal(torch.frac(u * 2.0**53), torch.zeros_like(u))
    assert (torch.frac(u * 2.0**52) != 0).double().mean() > 0.49


def test_subsets_have_their_size_and_are_equally_likely() -> None:
    cells = torch.arange(30_000)
    sizes = torch.full((30_000,), 2)
    chosen = random_subsets(5, 0, cells, 4, sizes)
    assert torch.equal(chosen.sum(1), sizes)
    code = (chosen * torch.tensor([1, 2, 4, 8])).sum(1)
    counts = torch.bincount(code)[torch.tensor([3, 5, 6, 9, 10, 12])]
    assert chisquare(counts.numpy()).pvalue > 1e-3
    ends = random_subsets(5, 0, torch.arange(2), 4, torch.tensor([0, 4]))
    assert torch.equal(ends, torch.tensor([[False] * 4, [True] * 4]))


SPLITMIX64 = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B)
"""The first five outputs of Vigna's reference program for the state 0."""


def test_the_mixer_is_splitmix64_in_python_numba_and_torch() -> None:
    assert [int(word) for word in sequence(0, 5)] == list(SPLITMIX64)
    assert [mix64_int((i + 1) * GOLDEN64) for i in range(5)] == list(SPLITMIX64)
    rng = np.random.default_rng(0)
    stream, cells = int(rng.integers(1 << 63)), rng.integers(0, 1 << 62, 1000)
    found = cell_keys(stream, torch.from_numpy(cells)).numpy().view(np.uint64)
    for cell, key in zip(cells.tolist(), found.tolist(), strict=True):
        assert key == mix64_int(stream + cell * GOLDEN64) == int(cell_key(stream, cell))
