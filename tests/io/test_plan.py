from __future__ import annotations

import itertools
import subprocess
import sys
import time

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sedd.io.plan import (
    BLOCK,
    LANE_WINDOW,
    LANES,
    CellList,
    EpochOrder,
    RankSteps,
    Split,
    noise_times,
    permute,
    split_cells,
    weighted_ranks,
)
from sedd.kernels.mask import random_mask

WINDOW = LANES * LANE_WINDOW


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(n: int, key: int) -> None:
    assert sorted(permute(np.arange(n), n, key)) == list(range(n))


def test_permutations_of_few_items_are_equally_frequent() -> None:
    seen = dict.fromkeys(itertools.permutations(range(4)), 0)
    for key in range(24_000):
        seen[tuple(permute(np.arange(4), 4, key).tolist())] += 1
    assert sum((count - 1000) ** 2 / 1000 for count in seen.values()) < 60  # chi-square, 23 degrees: p of 4e-5


@settings(deadline=None, max_examples=60)
@given(n_obs=st.integers(1, 900), fraction=st.floats(0, 0.99), seed=st.integers(0, 2**40))
def test_a_split_is_exact_and_loses_no_cell(n_obs: int, fraction: float, seed: int) -> None:
    train, val = split_cells(n_obs, fraction, seed)
    assert val.n_cells == int(np.floor(fraction * n_obs + 0.5))
    a, b = train.cells(), val.cells()
    assert sorted([*a, *b]) == list(range(n_obs))
    assert (np.diff(a) > 0).all()
    assert train.contains(a).all()
    assert not train.contains(b).any()
    assert val.contains(b).all()
    some = np.random.default_rng(0).permutation(train.n_cells)
    np.testing.assert_array_equal(train.cells(some), a[some])


def test_a_split_is_even_along_the_store_and_differs_by_seed() -> None:
    val = Split(64_000, 0.1, 3, "val").cells()
    per_run = np.bincount(val // 64, minlength=1000)
    assert set(per_run) == {6, 7}
    position = np.bincount(val % 64, minlength=64)
    assert np.sum((position - 100) ** 2 / 100) < 120  # chi-square, 63 degrees
    other = Split(64_000, 0.1, 4, "val").cells()
    assert 400 < np.intersect1d(val, other).size < 900


@settings(deadline=None, max_examples=60)
@given(n_obs=st.integers(1, 900), fraction=st.floats(0, 0.99), seed=st.integers(0, 2**40), most=st.integers(1, 300), block=st.integers(1, 70))
def test_a_split_by_blocks_or_of_so_many_cells_loses_no_cell(n_obs: int, fraction: float, seed: int, most: int, block: int) -> None:
    block = min(block, n_obs)
    train, val = (Split(n_obs, fraction, seed, part, None, most, block) for part in ("train", "val"))
    wanted = min(most, int(np.floor(fraction * n_obs + 0.5)))
    assert val.n_cells == wanted if block == 1 else val.n_cells % block == 0
    a, b = train.cells(), val.cells()
    assert sorted([*a, *b]) == list(range(n_obs))
    assert (np.diff(a) > 0).all()
    assert (np.bincount(b // block, minlength=1)[: n_obs // block] % block == 0).all()  # whole blocks only
    assert train.contains(a).all()
    assert not train.contains(b).any()
    some = np.random.default_rng(0).permutation(train.n_cells)
    np.testing.assert_array_equal(train.cells(some), a[some])


def test_a_limit_keeps_cells_that_are_evenly_spaced() -> None:
    whole, some = Split(10_000, 0.1, 0, "train"), Split(10_000, 0.1, 0, "train", limit=100)
    assert some.n_cells == 100
    np.testing.assert_array_equal(some.cells(), whole.cells(np.arange(100) * 90))


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 5000), seed=st.integers(0, 2**40), epoch=st.integers(0, 99))
def test_an_epoch_sees_every_cell_once(n: int, seed: int, epoch: int) -> None:
    for mode in ("full", "window", "none"):
        ranks = EpochOrder(n, seed, epoch, mode).ranks(np.arange(n))
        np.testing.assert_array_equal(np.sort(ranks), np.arange(n))


def test_large_epochs_see_every_cell_once_in_new_orders() -> None:
    n = 3 * WINDOW + 1234
    first = EpochOrder(n, 1, 0, "window").ranks(np.arange(n))
    np.testing.assert_array_equal(np.sort(first), np.arange(n))
    second = EpochOrder(n, 1, 1, "window").ranks(np.arange(n))
    assert (first == second).mean() < 0.001


def test_a_window_reads_whole_blocks() -> None:
    n = 8 * WINDOW
    ranks = EpochOrder(n, 5, 0, "window").ranks(np.arange(WINDOW, 2 * WINDOW))
    runs = np.flatnonzero(np.diff(np.sort(ranks)) != 1).size + 1
    assert runs <= LANES * (LANE_WINDOW // BLOCK + 1)


def test_a_rank_that_fits_the_lanes_reads_only_its_own_part() -> None:
    n = 8 * WINDOW
    order = EpochOrder(n, 5, 0, "window")
    for world in (8, 64):
        mine = order.ranks(RankSteps(n, 32, 3, world).positions(0, n))
        runs = np.flatnonzero(np.diff(np.sort(mine)) != 1).size + 1
        assert mine.size / runs > BLOCK / 2


def test_every_aligned_run_of_positions_has_one_time_per_stratum_on_every_rank() -> None:
    for epoch, size, world in itertools.product((0, 3), (1, 4, 64, 512), (1, 2, 8)):
        for rank, block in itertools.product(range(world), (0, 5)):
            t = noise_times(9, epoch, rank + world * np.arange(block * size, (block + 1) * size))
            assert sorted(np.ceil(t * size).astype(int)) == list(range(1, size + 1))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 1000),
    positions=st.lists(st.integers(0, 2**62), min_size=1, max_size=40),
)
def test_times_are_those_of_the_plain_definition(seed: int, epoch: int, positions: list[int]) -> None:
    expected = [naive.noise_time(seed, epoch, position) for position in positions]
    assert noise_times(seed, epoch, np.array(positions)).tolist() == expected


def test_times_are_uniform_and_new_in_every_epoch() -> None:
    t = np.stack([noise_times(0, epoch, np.arange(10_000)) for epoch in range(50)])
    assert t.min() > 0
    assert t.max() <= 1
    assert np.abs(t.mean(axis=0) - 0.5).max() < 0.25
    pairs = np.corrcoef(t[:, :512])[np.triu_indices(50, 1)]
    assert abs(pairs.mean()) < 0.1  # one flip of the leading bit correlates two epochs by +-3/4, either way alike
    one_position = np.sort([noise_times(0, epoch, np.array([17]))[0] for epoch in range(2000)])
    assert np.abs(one_position - (np.arange(2000) + 0.5) / 2000).max() < 0.045  # Kolmogorov-Smirnov, p of 6e-4


def test_weighted_ranks_follow_the_weights() -> None:
    weights = np.array([0.0, 1, 2, 0, 7])
    ranks = weighted_ranks(0, 1, np.arange(50_000), np.cumsum(weights))
    share = np.bincount(ranks, minlength=5) / 50_000
    np.testing.assert_allclose(share, weights / 10, atol=0.01)
    assert share[0] == share[3] == 0


@settings(deadline=None, max_examples=80)
@given(
    n=st.integers(0, 300),
    batch=st.integers(1, 40),
    world=st.integers(1, 7),
    start=st.integers(0, 320),
    drop=st.booleans(),
    pad=st.booleans(),
)
def test_ranks_share_the_positions_that_are_left(
    n: int, batch: int, world: int, start: int, drop: bool, pad: bool
) -> None:
    all_steps = [RankSteps(n, batch, rank, world, start, drop, pad) for rank in range(world)]
    mine = [steps.positions(0, steps.n_mine) for steps in all_steps]
    taken = np.sort(np.concatenate(mine))
    left = max(n - start, 0)
    if drop:
        np.testing.assert_array_equal(taken, start + np.arange(left // (batch * world) * batch * world))
    elif pad:
        assert len({len(part) for part in mine}) == 1
        np.testing.assert_array_equal(taken[:left], np.arange(start, start + left))
        assert taken.size - left < world
    else:
        np.testing.assert_array_equal(taken, np.arange(start, start + left))
    for rank, part in enumerate(mine):
        assert (part % world == rank).all()


@settings(deadline=None, max_examples=80)
@given(
    n=st.integers(0, 300), batch=st.integers(1, 40), world=st.integers(1, 4), parts=st.integers(1, 5), start=st.integers(0, 320),
    drop=st.booleans(), pad=st.booleans(), window=st.integers(1, 50),
)  # fmt: skip
def test_parts_of_a_rank_share_its_cells_in_as_many_batches_as_one(
    n: int, batch: int, world: int, parts: int, start: int, drop: bool, pad: bool, window: int
) -> None:
    for rank in range(world):
        alone = RankSteps(n, batch, rank, world, start, drop, pad)
        shares = [RankSteps(n, batch, rank, world, start, drop, pad, part, parts) for part in range(parts)]
        mine = [steps.positions(0, steps.n_mine) for steps in shares]
        np.testing.assert_array_equal(np.sort(np.concatenate(mine)), alone.positions(0, alone.n_mine))
        assert sum(-(-own.size // batch) for own in mine) == -(-alone.n_mine // batch)
        for steps, own in zip(shares, mine, strict=True):
            assert (np.diff(own) > 0).all()
            some = own[3 : steps.n_mine // 2]
            np.testing.assert_array_equal(steps.positions(3, steps.n_mine // 2), some)
            for edge in range(0, n + window, window):
                assert steps.before(edge) == (own < edge).sum()


def test_the_steps_of_a_billion_cells_for_one_of_512_ranks_is_quick_and_small() -> None:
    code = """
import time, numpy as np
from sedd.io.plan import EpochOrder, RankSteps, Split, noise_times
split = Split(10**9)
order = EpochOrder(split.n_cells, 0, 0, "window")
steps = RankSteps(split.n_cells, 512, 77, 512)
EpochOrder(100, 0, 0, "window").ranks(np.arange(100)); Split(100).cells(); noise_times(0, 0, np.arange(5))
began = time.process_time()
seen = 0
for low in range(0, steps.n_mine, 1 << 18):
    positions = steps.positions(low, low + (1 << 18))
    cells = split.cells(np.sort(order.ranks(positions)))
    seen += cells.size
    noise_times(0, 0, positions)
assert seen == steps.n_mine
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(time.process_time() - began, peak.split()[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, kibibytes = map(float, done.stdout.split())  # ru_maxrss would count the memory of the tests' process
    assert seconds < 10 and kibibytes < 1 << 20


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "window"])
def test_ten_plans_of_eight_ranks_and_their_restarts_are_the_order_of_one(mode: str) -> None:
    """Of ten million cells: every step of eight ranks, before and after a restart on three, has the cells, times and masks of one rank's step."""
    rng, batch, split = np.random.default_rng(0), 512, Split(10**7)
    for plan in range(10):
        order = EpochOrder(split.n_cells, plan, plan + 1, mode)
        alone = RankSteps(split.n_cells, 8 * batch)
        whole = order.ranks(alone.positions(0, alone.n_mine))
        assert np.array_equal(np.bincount(whole, minlength=split.n_cells), np.ones(split.n_cells))
        stop = int(rng.integers(1, alone.n_steps))
        before = [RankSteps(split.n_cells, batch, rank, 8).positions(0, stop * batch) for rank in range(8)]
        again = [RankSteps(split.n_cells, batch, rank, 8, stop * batch * 8) for rank in range(8)]
        fewer = [RankSteps(split.n_cells, batch, rank, 3, stop * batch * 8) for rank in range(3)]
        assert np.array_equal(np.sort(np.concatenate([steps.positions(0, steps.n_mine) for steps in fewer])), np.arange(stop * batch * 8, split.n_cells))
        for step in (0, stop - 1):
            mine = np.concatenate([own[step * batch : (step + 1) * batch] for own in before])
            check_step(mine, whole, order, split, step * batch * 8, plan)
        for step in (0, 1, again[0].n_steps - 2):
            mine = np.concatenate([steps.positions(step * batch, (step + 1) * batch) for steps in again])
            check_step(mine, whole, order, split, (stop + step) * batch * 8, plan)


def check_step(positions: np.ndarray, whole: np.ndarray, order: EpochOrder, split: Split, first: int, seed: int) -> None:
    """The positions of one step of all ranks are those of one rank, with its cells, times and masks."""
    mine, expected = np.sort(positions), np.arange(first, min(first + positions.size, whole.size))
    np.testing.assert_array_equal(mine, expected)
    np.testing.assert_array_equal(order.ranks(positions), whole[positions])
    back = np.argsort(positions)
    np.testing.assert_array_equal(noise_times(seed, 0, positions)[back], noise_times(seed, 0, expected))
    few = back[:16]
    masks = [random_mask(seed, 0, order.ranks(own), 50, np.full(16, 0.3)) for own in (positions[few], expected[:16])]
    np.testing.assert_array_equal(*masks)


@pytest.mark.parametrize("mode", ["full", "window"])
def test_a_hundred_million_cells_are_resumed_in_under_a_second(mode: str) -> None:
    split = Split(10**8)
    order = EpochOrder(split.n_cells, 0, 7, mode)

    def next_cells(start: int, skip: int) -> np.ndarray:
        steps = RankSteps(split.n_cells, 512, 3, 8, start)
        ranks = order.ranks(steps.positions(skip, skip + 8192))
        return split.cells(np.sort(ranks))

    next_cells(0, 0)  # compiles
    began = time.process_time()
    resumed = next_cells(512 * 8 * 15_000, 0)
    assert time.process_time() - began < 1
    np.testing.assert_array_equal(resumed, next_cells(0, 512 * 15_000))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Split(10, part="test"), "unknown split"),
        (lambda: Split(10, 1.0), "val_fraction"),
        (lambda: Split(10, limit=0), "limit_cells"),
        (lambda: Split(10).cells(np.array([9])), "the split has 9 cells"),
        (lambda: EpochOrder(5, 0, 0, "shuffled"), "unknown shuffle"),
        (lambda: EpochOrder(5, 0, 0, "full").ranks(np.array([5])), "the epoch has 5 cells"),
        (lambda: permute(np.array([3]), 3, 0), "expected 0 to 2"),
    ],
)
def test_bad_orders_are_refused_in_one_line(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message):
        call()


def test_a_list_of_cells_is_a_split() -> None:
    cells = CellList(np.array([2, 5, 9]))
    assert cells.n_cells == 3
    np.testing.assert_array_equal(cells.cells(np.array([2, 0])), [9, 2])


def label_entropy(codes: np.ndarray) -> float:
    """Mean entropy, in bits, of the labels of batches of 64."""
    shares = np.stack(
        [np.bincount(batch, minlength=30) / 64 for batch in codes[: codes.size // 64 * 64].reshape(-1, 64)]
    )
    return float(-(shares * np.log2(np.where(shares > 0, shares, 1))).sum(axis=1).mean())


def test_batches_of_a_sorted_store_are_as_mixed_as_random_ones() -> None:
    n = 300_000
    codes = np.arange(n) * 30 // n
    want = label_entropy(codes[np.random.default_rng(0).permutation(n)])
    for mode in ("full", "window"):
        got = label_entropy(codes[EpochOrder(n, 0, 0, mode).ranks(np.arange(n))])
        assert abs(got / want - 1) < 0.01
    assert label_entropy(codes) < 0.1
