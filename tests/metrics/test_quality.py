"""What the quality benchmark does by itself: its neighbours, ALRA, the update by an entry's own count, its records."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from quality import score_denoising, update
from quality_methods import alra, knn_denoise, knn_impute
from quality_sedd import ForwardRateSampler
from quality_tables import table

from sedd import metrics as m
from sedd.graph import AbsorbingGraph
from sedd.noise import LogLinearNoise


def two_kinds(n: int = 160, n_vars: int = 120, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    kind = np.arange(n) % 2
    rate = rng.gamma(0.5, 2.0, (2, n_vars))[kind]
    return rng.poisson(rate), rate


def test_hidden_values_are_not_looked_at() -> None:
    counts, _ = two_kinds()
    hidden = np.random.default_rng(1).random((60, 120)) < 0.3
    train, test = sparse.csr_array(counts[:100]), counts[100:]
    first = knn_impute(train, test, hidden, k=10)
    np.testing.assert_array_equal(first, knn_impute(train, np.where(hidden, 99, test), hidden, k=10))


def test_neighbours_find_the_kind_of_a_cell() -> None:
    counts, rate = two_kinds()
    hidden = np.random.default_rng(1).random((60, 120)) < 0.3
    guess = knn_impute(sparse.csr_array(counts[:100]), counts[100:], hidden, k=10)
    mean = np.broadcast_to(counts[:100].mean(axis=0), guess.shape)
    truth = rate[100:][hidden]
    assert np.abs(guess[hidden] - truth).mean() < 0.6 * np.abs(mean[hidden] - truth).mean()


@pytest.mark.parametrize("root", [False, True])
def test_smoothing_comes_closer_to_the_rates_than_the_counts_are(root: bool) -> None:
    counts, rate = two_kinds()
    out = knn_denoise(sparse.csr_array(counts), root=root)
    assert out.shape == counts.shape
    assert out.min() >= 0
    assert np.abs(out - rate).mean() < 0.8 * np.abs(counts - rate).mean()


def test_alra_keeps_what_was_seen_and_thresholds_what_was_not() -> None:
    counts, rate = two_kinds(200, 150)
    out, rank = alra(sparse.csr_array(counts))
    assert 2 <= rank < 20
    assert (out[counts > 0] > 0).all()
    unseen = counts == 0
    assert out[unseen & (rate > 1.5)].mean() > 5 * out[unseen & (rate < 0.02)].mean()


def test_the_forward_rate_unmasks_all_but_a_twenty_thousandth_in_the_first_of_100_steps() -> None:
    curve = ForwardRateSampler(None, AbsorbingGraph(4), LogLinearNoise(), num_steps=100).survival()
    assert curve[0] == pytest.approx(np.exp(-9.99), rel=1e-6)  # dsigma(1) = 999 for eps = 1e-3
    assert 1 - curve[0] == pytest.approx(0.99995, abs=1e-5)
    assert curve[-1] == 0
    assert (curve.diff() <= 0).all()


def test_records_replace_their_like_and_leave_the_others(tmp_path: Path) -> None:
    path = tmp_path / "quality.json"
    a, b = ({"protocol": "embedding", "method": name, "seed": 0, "ari": 0.1} for name in "ab")
    update(path, {"data": "x"}, [a, b])
    update(path, {"data": "x"}, [{**a, "ari": 0.9}])
    assert [r["ari"] for r in json.loads(path.read_text())["records"]] == [0.9, 0.1]
    assert [p.name for p in tmp_path.iterdir()] == ["quality.json"]


def test_table_puts_the_best_on_top_and_keeps_anchors_out_of_the_contest() -> None:
    records = [
        {"method": name, "seed": seed, "w2": w2 + seed / 10}
        for name, w2 in (("real (anchor)", 2.7), ("sedd", 3.5), ("peer", 3.1))
        for seed in (0, 1)
    ]
    lines = table("generation", records)
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["*real (anchor)*", "peer", "sedd"]
    assert "**3.150 ± 0.07071**" in lines[3]
    assert "**" not in lines[2]


def test_denoising_is_scored_on_the_test_cells() -> None:
    counts, rate = two_kinds()
    kept, held_out = m.split_molecules(counts, 0.9, np.random.default_rng(0))

    class Given:
        seed = 0
        test_rows = np.arange(100, 160)

    Given.kept, Given.held_out = kept, held_out
    record = score_denoising(Given, "truth", rate)
    rows = Given.test_rows
    assert record["poisson"] == pytest.approx(m.poisson_nll(rate[rows], held_out[rows], kept[rows]))
    assert record["poisson_all_cells"] == pytest.approx(m.poisson_nll(rate, held_out, kept))
    assert record["mse_expected_log"] < record["mse"]
    assert "poisson_all_cells" not in score_denoising(Given, "truth", rate[rows])
