from __future__ import annotations

import itertools
import json
import pickle
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from sedd.binning import Binning
from sedd.io.loader import CellLoader
from sedd.io.loading.batch import Batch
from sedd.io.plan import Split, noise_times
from sedd.kernels.mask import exact_mask, random_mask, random_mask_torch
from sedd.noise import LogLinearNoise
from tests.io.stores import N_OBS, N_VARS, counts, small_store

N_TRAIN = 2700


def cells_of(batches: list[Batch]) -> np.ndarray:
    return np.concatenate([batch.cell.numpy() for batch in batches])


def loader(**options: object) -> CellLoader:
    return CellLoader(small_store(), **{"n_bins": 50, **options})


def epoch(**options: object) -> list[Batch]:
    with loader(**options) as made:
        return list(made)


def test_batches_hold_the_cells_of_the_store() -> None:
    batches = epoch(labels=["cell_type", "donor"], batch_size=64, binning="counts")
    cells = cells_of(batches)
    np.testing.assert_array_equal(np.sort(cells), Split(N_OBS, 0.1, 0, "train").cells())
    assert [len(batch) for batch in batches] == [64] * 42 + [12]
    for batch in batches:
        own = batch.cell.numpy()
        assert batch.tokens.dtype == torch.uint16  # the largest count of the store is above 255
        assert batch.t.dtype == torch.float32
        assert batch.valid is None
        np.testing.assert_array_equal(batch.tokens.numpy(), counts()[own])
        np.testing.assert_array_equal(batch.library.numpy(), counts()[own].sum(axis=1))
        np.testing.assert_array_equal(batch.labels["cell_type"].numpy(), own * 20 // N_OBS)
        np.testing.assert_array_equal(
            batch.labels["donor"].numpy(), np.where(own % 10 == 0, -1, np.where(own % 3, 1, 0))
        )


@pytest.mark.parametrize("mode", ["full", "window", False])
def test_the_sequence_depends_on_nothing_but_seed_and_epoch(mode: object) -> None:
    want = cells_of(epoch(shuffle=mode))
    for options in (
        {"batch_size": 7},
        {"threads": 1},
        {"threads": 4, "batch_size": 1000},
        {"memory_budget": "40MB", "batch_size": 5},
        {"mask": None},
        {"genes": ["gene3", "gene1"]},
    ):
        np.testing.assert_array_equal(cells_of(epoch(shuffle=mode, **options)), want)
    if mode:
        with loader(shuffle=mode) as other:
            other.set_epoch(1)
            assert (cells_of(list(other)) != want).any()
        assert (cells_of(epoch(shuffle=mode, seed=1)) != want).any()


@pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning")
def test_a_budget_below_the_store_changes_the_reads_and_not_the_cells() -> None:
    want = cells_of(epoch(shuffle="full"))
    np.testing.assert_array_equal(
        cells_of(epoch(shuffle="full", memory_budget=600_000, batch_size=20, threads=1)), want
    )


@pytest.mark.parametrize("world", [2, 3, 5, 8])
@pytest.mark.parametrize("mode", ["full", "window"])
def test_ranks_take_interleaved_positions_and_lose_no_cell(world: int, mode: str) -> None:
    want = cells_of(epoch(shuffle=mode))
    ranks = [cells_of(epoch(shuffle=mode, rank=r, world_size=world, pad=False)) for r in range(world)]
    for rank, cells in enumerate(ranks):
        np.testing.assert_array_equal(cells, want[rank::world])


def test_training_ranks_have_the_same_steps_and_say_which_cells_only_fill_up() -> None:
    ranks = [epoch(rank=r, world_size=7, batch_size=10) for r in range(7)]
    assert {len(batches) for batches in ranks} == {39}
    assert len({tuple(len(batch) for batch in batches) for batches in ranks}) == 1
    valid = [np.concatenate([batch.valid.numpy() for batch in batches if batch.valid is not None]) for batches in ranks]
    assert sum(v.sum() for v in valid) == N_TRAIN
    seen = np.concatenate([cells_of(batches)[v] for batches, v in zip(ranks, valid, strict=True)])
    assert np.unique(seen).size == N_TRAIN


@pytest.mark.parametrize(
    "options", [{}, {"drop_last": True}, {"split": "val"}, {"batch_size": 5000}, {"world_size": 4}]
)
def test_len_is_the_number_of_batches(options: dict) -> None:
    with loader(**{"batch_size": 64, **options}) as made:
        assert len(list(made)) == len(made)


def test_drop_last_drops_the_same_cells_on_any_number_of_threads() -> None:
    assert all(len(batch) == 64 for batch in epoch(drop_last=True, batch_size=64))
    one, four = (cells_of(epoch(drop_last=True, batch_size=64, threads=n)) for n in (1, 4))
    np.testing.assert_array_equal(one, four)


def test_masks_and_times_are_pure_functions_of_seed_epoch_and_cell() -> None:
    noise = LogLinearNoise()
    with loader(batch_size=100, seed=5, noise=noise.mask_probability) as made:
        made.set_epoch(2)
        position = 0
        for batch in made:
            positions = np.arange(position, position + len(batch))
            position += len(batch)
            t = noise_times(5, 2, positions).astype(np.float32)
            np.testing.assert_array_equal(batch.t.numpy(), t)
            assert batch.masked is not None
            p = noise.mask_probability(batch.t.double())
            want = random_mask(5, 2, batch.cell.numpy(), N_VARS, p.numpy())
            np.testing.assert_array_equal(batch.masked.numpy(), want)
            twin = random_mask_torch(5, 2, batch.cell, N_VARS, p)
            np.testing.assert_array_equal(batch.masked.numpy(), twin.numpy())


def test_masked_objective_hides_exactly_its_share() -> None:
    for batch in epoch(mask="masked", mask_ratio=0.15, batch_size=500, seed=3):
        assert batch.masked is not None
        assert (batch.masked.sum(1) == round(0.15 * N_VARS)).all()
        np.testing.assert_array_equal(batch.masked.numpy(), exact_mask(3, 0, batch.cell.numpy(), N_VARS, 60))


# -- stopping and resuming ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["full", "window"])
@pytest.mark.parametrize("worlds", [(1, 1), (1, 2), (2, 1), (4, 3), (3, 8)])
def test_a_state_continues_the_sequence_on_another_world_size(mode: str, worlds: tuple[int, int]) -> None:
    before, after = worlds
    want = cells_of(epoch(shuffle=mode))
    seen = []
    states = []
    for rank in range(before):
        with loader(shuffle=mode, rank=rank, world_size=before, batch_size=30, pad=False) as made:
            seen.append(cells_of(list(itertools.islice(made, 5))))
            states.append(made.state_dict())
    assert all(state == states[0] for state in states)
    taken = 5 * 30 * before
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.sort(want[:taken]))
    state = json.loads(json.dumps(states[0]))
    assert len(json.dumps(state)) < 1000
    rest = np.empty(N_TRAIN - taken, np.int64)
    for rank in range(after):
        with loader(shuffle=mode, rank=rank, world_size=after, batch_size=17, pad=False) as made:
            made.load_state_dict(state)
            rest[(rank - taken) % after :: after] = cells_of(list(made))
    np.testing.assert_array_equal(rest, want[taken:])


def test_a_resumed_run_is_byte_for_byte_the_undisturbed_one() -> None:
    with loader(batch_size=50, labels=["cell_type"]) as made:
        made.set_epoch(3)
        whole = list(made)
    with loader(batch_size=50, labels=["cell_type"]) as made:
        made.set_epoch(3)
        list(itertools.islice(made, 20))
        state = made.state_dict()
    with loader(batch_size=50, labels=["cell_type"], threads=1) as made:
        made.load_state_dict(state)
        for one, other in zip(whole[20:], made, strict=True):
            for name in ("tokens", "masked", "t", "cell", "library"):
                assert torch.equal(getattr(one, name), getattr(other, name))


def test_the_end_of_an_epoch_is_a_state_too_and_iterating_again_starts_again() -> None:
    with loader(batch_size=900) as made:
        first = list(made)
        state = made.state_dict()
        again = list(made)
        np.testing.assert_array_equal(cells_of(first), cells_of(again))
        made.load_state_dict(state)
        assert list(made) == []
        made.set_epoch(1)
        assert len(list(made)) == 3


@pytest.mark.parametrize("change", [{"seed": 1}, {"split": "all"}, {"shuffle": "window"}, {"weights": np.ones(N_OBS)}])
def test_a_state_of_another_sequence_is_refused(change: dict) -> None:
    state = loader(shuffle="full").state_dict()
    with pytest.raises(ValueError, match="the loader's state has"):
        loader(**{"shuffle": "full", **change}).load_state_dict(state)


# -- what is delivered ---------------------------------------------------------------------------------------------


def test_a_panel_comes_in_its_own_order() -> None:
    panel = np.random.default_rng(0).permutation(N_VARS)[:30]
    for batch in epoch(genes=[f"gene{i}" for i in panel], batch_size=300):
        np.testing.assert_array_equal(batch.tokens.numpy(), counts()[batch.cell.numpy()][:, panel])


def test_float32_gives_counts_and_normalises_on_request() -> None:
    for batch in epoch(dtype="float32", mask=None, batch_size=300):
        assert batch.tokens.dtype == torch.float32
        np.testing.assert_array_equal(batch.tokens.numpy(), counts()[batch.cell.numpy()])
    for batch in epoch(dtype="float32", mask=None, batch_size=300, target_sum=1e4, log1p=True):
        own = counts()[batch.cell.numpy()]
        want = np.log1p(own / np.maximum(own.sum(axis=1, keepdims=True), 1) * 1e4)
        np.testing.assert_allclose(batch.tokens.numpy(), want, rtol=1e-5)


def test_csr_matrices_come_in_the_same_order() -> None:
    want = cells_of(epoch(batch_size=40))
    with loader(batch_size=40, labels=["cell_type"], genes=[f"gene{i}" for i in range(99, -1, -1)]) as made:
        batches = list(made.as_csr())
    np.testing.assert_array_equal(np.concatenate([batch.cell for batch in batches]), want)
    for batch in batches:
        np.testing.assert_array_equal(batch.x.toarray(), counts()[batch.cell][:, 99::-1])
        np.testing.assert_array_equal(batch.labels["cell_type"], batch.cell * 20 // N_OBS)


def test_a_classifier_learns_from_normalised_csr_batches() -> None:
    from sklearn.linear_model import SGDClassifier

    model = SGDClassifier(random_state=0)
    options = {"dtype": "float32", "target_sum": 1e3, "log1p": True, "batch_size": 256, "labels": ["donor"]}
    with loader(**options) as made:
        for batch in made.as_csr():
            known = batch.labels["donor"] >= 0
            model.partial_fit(batch.x[known], batch.labels["donor"][known], classes=[0, 1])
    assert model.coef_.shape == (1, N_VARS)


@pytest.mark.parametrize(
    ("workers", "context"), [(0, None), (2, "fork"), pytest.param(2, "spawn", marks=pytest.mark.slow)]
)
def test_a_torch_dataloader_sees_every_cell_once(workers: int, context: str | None) -> None:
    dataset = loader(batch_size=300, labels=["cell_type"]).as_torch_dataset()
    batches = list(torch.utils.data.DataLoader(dataset, None, num_workers=workers, multiprocessing_context=context))
    cells = np.sort(cells_of(batches))
    np.testing.assert_array_equal(cells, Split(N_OBS, 0.1, 0, "train").cells())
    assert len(batches) == len(dataset)
    dataset.loader.close()


@pytest.mark.parametrize("mode", ["full", "window"])
@pytest.mark.parametrize("parts", [2, 3, 7])
def test_parts_of_a_loader_have_its_cells_in_as_many_batches(mode: str, parts: int) -> None:
    with loader(batch_size=32, shuffle=mode) as whole:
        whole.set_epoch(1)
        shares = []
        for index in range(parts):
            with whole.part(index, parts) as mine:
                shares.append(list(mine))
        in_turn = [batch for group in itertools.zip_longest(*shares) for batch in group if batch is not None]
        assert [len(batch) for batch in in_turn] == [32] * (N_TRAIN // 32) + [N_TRAIN % 32]
        np.testing.assert_array_equal(np.sort(cells_of(in_turn)), np.sort(cells_of(list(whole))))


@pytest.mark.parametrize("set_epoch", ["dataset", "loader"])
def test_workers_that_persist_follow_the_epochs(set_epoch: str) -> None:
    dataset = loader(batch_size=270, mask="score_entropy").as_torch_dataset()
    persisting = torch.utils.data.DataLoader(dataset, None, num_workers=2, persistent_workers=True, multiprocessing_context="fork")
    seen = []
    for number in (0, 1, 1, 4):
        (dataset if set_epoch == "dataset" else dataset.loader).set_epoch(number)
        batches = list(persisting)
        fresh = list(torch.utils.data.DataLoader(dataset, None, num_workers=2, multiprocessing_context="fork"))
        for mine, other in zip(batches, fresh, strict=True):
            assert torch.equal(mine.cell, other.cell) and torch.equal(mine.tokens, other.tokens)
            assert torch.equal(mine.masked, other.masked) and torch.equal(mine.t, other.t)
        np.testing.assert_array_equal(np.sort(cells_of(batches)), Split(N_OBS, 0.1, 0, "train").cells())
        masks = torch.cat([batch.masked for batch in batches])[np.argsort(cells_of(batches))]
        seen.append((cells_of(batches).tolist(), masks))
    assert seen[1][0] == seen[2][0] and torch.equal(seen[1][1], seen[2][1])  # an epoch is what it is
    for a, b in ((0, 1), (1, 3), (0, 3)):
        assert seen[a][0] != seen[b][0]
        assert not torch.equal(seen[a][1], seen[b][1])
    state = {**dataset.loader.state_dict(), "epoch": 2, "position": 540}
    dataset.loader.load_state_dict(state)
    rest = cells_of(list(persisting))
    dataset.set_epoch(2)
    assert len(rest) == len(cells_of(list(persisting))) - 540
    dataset.loader.close()


def test_weights_draw_cells_with_replacement_on_any_number_of_ranks() -> None:
    weights = {"cell_type": {"type03": 1.0, "type15": 3.0}}
    whole = cells_of(epoch(weights=weights))
    kinds = whole * 20 // N_OBS
    assert set(kinds) == {3, 15}
    assert 0.7 < (kinds == 15).mean() < 0.8
    parts = [cells_of(epoch(weights=weights, rank=r, world_size=3, pad=False, threads=3)) for r in range(3)]
    for rank, part in enumerate(parts):
        np.testing.assert_array_equal(part, whole[rank::3])
    per_cell = np.zeros(N_OBS)
    per_cell[[5, 6, 8]] = 1
    assert set(cells_of(epoch(weights=per_cell, split="all"))) == {5, 6, 8}


def test_a_limit_spreads_over_the_store() -> None:
    cells = cells_of(epoch(limit_cells=90))
    assert cells.size == 90
    assert np.unique(cells * 20 // N_OBS).size == 20


def test_counts_are_their_own_tokens_and_bins_are_fitted_on_training_cells() -> None:
    with loader() as made:
        assert made.binning == Binning.of_counts()
        batch = next(iter(made))
        np.testing.assert_array_equal(batch.tokens, counts()[batch.cell.numpy()])
    batch = epoch(binning="linear", n_bins=20, batch_size=5000)[0]
    top = counts()[Split(N_OBS, 0.1, 0, "train").cells()].max()
    np.testing.assert_array_equal(batch.tokens, np.digitize(counts()[batch.cell.numpy()], np.linspace(0, top, 20)))


# -- memory ----------------------------------------------------------------------------------------------------------


def test_a_batch_that_is_held_is_never_overwritten() -> None:
    held: list[tuple[Batch, torch.Tensor, torch.Tensor]] = []
    with loader(batch_size=32) as made:
        for number in range(4):
            made.set_epoch(number)
            for i, batch in enumerate(made):
                assert batch.masked is not None
                if i % 9 == 0:
                    held.append((batch, batch.tokens.clone(), batch.masked.clone()))
    for batch, tokens, masked in held:
        assert torch.equal(batch.tokens, tokens)
        assert torch.equal(batch.masked, masked)


def test_memory_that_is_let_go_is_used_again() -> None:
    with loader(batch_size=1024, mask=None, threads=1) as made:
        addresses = set()
        for number in range(8):
            made.set_epoch(number)
            addresses.update(batch.tokens.data_ptr() for batch in made)
    assert len(addresses) < 8 * 3


def test_restoring_takes_no_time() -> None:
    with loader() as made:
        state = made.state_dict()
        began = time.perf_counter()
        made.load_state_dict({**state, "position": N_TRAIN - 40, "epoch": 70})
        assert len(cells_of(list(made))) == 40
        assert time.perf_counter() - began < 1


def test_a_pickled_loader_gives_the_same_batches() -> None:
    with loader(batch_size=100) as made:
        iterator: Iterator[Batch] = iter(made)
        next(iterator)
        copy = pickle.loads(pickle.dumps(made))
        np.testing.assert_array_equal(cells_of(list(copy)), cells_of(epoch(batch_size=100)))
        copy.close()
