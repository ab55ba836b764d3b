"""Each metric against an oracle that shares no code with it: closed forms, scipy, scikit-learn, or sums by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import linalg, optimize, sparse, stats

from sedd import metrics as m
from sedd.errors import UserError
from sedd.metrics.baselines import MAX_DISPERSION


@pytest.fixture(scope="module")
def counts() -> sparse.csr_array:
    rng = np.random.default_rng(0)
    mean = rng.gamma(0.6, 2.0, 30) + 0.05
    depth = rng.lognormal(0, 0.4, (400, 1))
    return sparse.csr_array(rng.negative_binomial(1.5, 1.5 / (1.5 + mean * depth)))


# --- baselines -------------------------------------------------------------------------------------------------------


def test_histogram_equals_counting_by_hand(counts: sparse.csr_array) -> None:
    dense = counts.toarray()
    expected = np.array([np.bincount(dense[:, j], minlength=dense.max() + 1) for j in range(dense.shape[1])])
    np.testing.assert_array_equal(m.count_histogram(counts), expected)
    clipped = m.count_histogram(counts, 4)
    np.testing.assert_array_equal(clipped[:, :3], expected[:, :3])
    np.testing.assert_array_equal(clipped[:, 3], expected[:, 3:].sum(axis=1))


def test_marginals_are_shares_of_the_cells_and_two_more_that_fall_off_with_the_count() -> None:
    log_p = m.CountBaselines.fit(np.array([[0], [0], [1], [0]])).log_p
    prior = np.array([1, 1 / 2, 1 / 3])  # also of the first count that no cell has
    np.testing.assert_allclose(np.exp(log_p), [(np.array([3, 1, 0]) + 2 * prior / prior.sum()) / 6])


def test_nb_log_prob_is_scipys_and_its_tail_completes_the_sum_to_one() -> None:
    mean, theta = np.array([0.3, 4.0, 50.0]), np.array([0.2, 1.0, 30.0])
    x = np.arange(60)[:, None]
    np.testing.assert_allclose(m.nb_log_prob(x, mean, theta), stats.nbinom.logpmf(x, theta, theta / (theta + mean)))
    total = np.exp(m.nb_log_prob(np.arange(11)[:, None], mean, theta, top=10)).sum(axis=0)
    np.testing.assert_allclose(total, 1)
    np.testing.assert_allclose(m.nb_log_prob(x, mean, MAX_DISPERSION), stats.poisson.logpmf(x, mean))


@pytest.mark.parametrize("scaled", [False, True])
def test_dispersion_maximises_the_likelihood(counts: sparse.csr_array, scaled: bool) -> None:
    dense = counts.toarray()
    library = dense.sum(axis=1) if scaled else np.ones(len(dense))
    fitted = m.fit_nb_dispersion(counts, library if scaled else None)
    for j in range(0, 30, 7):
        mean = library * dense[:, j].sum() / library.sum()

        def loss(log_theta: float, j: int = j, mean: np.ndarray = mean) -> float:
            theta = np.exp(log_theta)
            return -float(stats.nbinom.logpmf(dense[:, j], theta, theta / (theta + mean)).sum())

        best = optimize.minimize_scalar(loss, bounds=(-5, 8), method="bounded", options={"xatol": 1e-6})
        assert np.log(fitted[j]) == pytest.approx(best.x, abs=1e-3)


def test_underdispersed_and_silent_genes_are_poisson() -> None:
    cells = np.stack([np.full(50, 3), np.zeros(50, int)], axis=1)
    np.testing.assert_array_equal(m.fit_nb_dispersion(cells), MAX_DISPERSION)


def test_baseline_distributions_are_normalised_and_agree_with_their_cdfs(counts: sparse.csr_array) -> None:
    base = m.CountBaselines.fit(counts)
    gene, x = np.arange(30)[None, :], np.arange(400)[:, None]
    library = np.array([[120.0]])
    log_probs, cdfs = base.log_probs(gene, x, library), base.cdfs(gene, x, library)
    assert set(log_probs) == {"gene mean (Poisson)", "NB per gene", "NB, library-scaled", "gene marginals"}
    for name, log_p in log_probs.items():
        rows = slice(0, base.log_p.shape[1]) if name == "gene marginals" else slice(None)
        np.testing.assert_allclose(np.exp(log_p[rows]).sum(axis=0), 1, atol=2e-3, err_msg=name)
        below, upto = cdfs[name]
        np.testing.assert_allclose((upto - below)[rows], np.exp(log_p[rows]), atol=1e-6, err_msg=name)


def test_sampled_marginals_have_the_training_means_and_no_correlation(counts: sparse.csr_array) -> None:
    cells = m.CountBaselines.fit(counts).sample(4000, seed=1)
    dense = counts.toarray()
    error = 5 * dense.std(axis=0) / np.sqrt(4000)
    assert (np.abs(cells.mean(axis=0) - dense.mean(axis=0)) <= error).all()
    assert (cells.max(axis=0) <= dense.max(axis=0)).all()
    off = np.corrcoef(cells, rowvar=False)[np.triu_indices(30, 1)]
    assert np.abs(off).max() < 0.1


# --- recovery --------------------------------------------------------------------------------------------------------


def test_recovery_of_four_entries_by_hand() -> None:
    true, predicted = np.array([0, 2, 0, 4]), np.array([1.0, 1.0, 0.0, 7.0])
    got = m.recovery_metrics(true, predicted, log_prob=np.log([0.5, 0.25, 0.5, 0.25]))
    assert got["nll"] == pytest.approx(1.5 * np.log(2))
    assert got["mae"] == pytest.approx(5 / 4)
    assert got["mae_nonzero"] == pytest.approx(2.0)
    logs = np.log([1 / 2, 3 / 2, 1, 5 / 8])
    assert got["rmse_log1p"] == pytest.approx(np.sqrt((logs**2).mean()))
    assert got["spearman"] == pytest.approx(stats.spearmanr(true, predicted).statistic)


def test_constant_predictions_have_no_rank_correlation() -> None:
    assert np.isnan(m.spearman(np.array([0, 1, 2]), np.zeros(3)))
    assert np.isnan(m.nonzero_mean_absolute_error(np.zeros(3), np.ones(3)))


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_the_true_distribution_covers_exactly_its_level(level: float) -> None:
    x = np.arange(60)  # the expectation over the true distribution, by enumeration
    for mean in (0.05, 0.7, 6.0):
        weight = stats.poisson.pmf(x, mean)
        inside = [m.interval_coverage(stats.poisson.cdf([k - 1], mean), stats.poisson.cdf([k], mean), level) for k in x]
        assert weight @ np.array(inside) == pytest.approx(level, abs=1e-9)


def test_too_sure_a_forecast_covers_less_and_its_calibration_is_a_bowl() -> None:
    x = stats.poisson.rvs(20, size=4000, random_state=0)
    wide = stats.norm(20, np.sqrt(20) / 3)  # a third of the true spread
    assert m.interval_coverage(wide.cdf(x - 0.5), wide.cdf(x + 0.5), 0.9) < 0.5
    bowl = m.calibration_histogram(wide.cdf(x - 0.5), wide.cdf(x + 0.5))
    assert bowl[0] > 2
    assert bowl[-1] > 2
    assert bowl.mean() == pytest.approx(1)
    flat = m.calibration_histogram(stats.poisson.cdf(x - 1, 20), stats.poisson.cdf(x, 20))
    assert np.abs(flat - 1).max() < 0.35


def test_recovery_table_scores_each_baseline_on_the_same_entries(counts: sparse.csr_array) -> None:
    train, test = counts[:300], counts[300:].toarray()
    base = m.CountBaselines.fit(train)
    hidden = np.random.default_rng(1).random(test.shape) < 0.3
    cell, gene = np.nonzero(hidden)
    true = test[cell, gene]
    library = m.visible_library(test, hidden, base.share)[cell]
    mean = base.mean[gene]
    log_prob = base.log_probs(gene, true)["NB per gene"]
    table = m.recovery_table(
        base, gene=gene, true=true, predicted=mean, log_prob=log_prob, library=library, cdf_below=log_prob * 0, cdf=log_prob * 0 + 1
    )  # fmt: skip
    assert table["nll"]["sedd"] == pytest.approx(table["nll"]["baselines"]["NB per gene"])
    assert table["mae"]["baselines"]["all zeros"] == pytest.approx(true.mean())
    assert table["nll"]["baselines"]["NB, library-scaled"] < table["nll"]["baselines"]["gene mean (Poisson)"]
    assert "all zeros" not in table["nll"]["baselines"]
    assert table["coverage_50"]["sedd"] == pytest.approx(0.5)


def test_visible_library_recovers_the_total_of_a_cell_with_average_shares() -> None:
    share = np.array([0.5, 0.3, 0.2])
    hidden = np.array([[True, False, False], [False, False, True]])
    np.testing.assert_allclose(m.visible_library(np.array([[50, 30, 20], [100, 60, 40]]), hidden, share), [100, 200])


def test_likelihood_table_sums_log_probabilities_over_genes(counts: sparse.csr_array) -> None:
    base = m.CountBaselines.fit(counts)
    nelbo = np.array([1.0, 2.0, 3.0])
    table = m.likelihood_table(base, nelbo, counts[:3], chunk=2)
    dense, theta = counts[:3].toarray(), base.dispersion
    expected = -stats.nbinom.logpmf(dense, theta, theta / (theta + base.mean)).sum(axis=1).mean()
    row = table["nats_per_cell"]
    assert row["baselines"]["NB per gene"] == pytest.approx(expected)
    assert row["sedd"] == pytest.approx(2.0)
    assert row["ci"] == pytest.approx(stats.t.interval(0.95, 2, loc=2.0, scale=1 / np.sqrt(3)))
    assert table["nats_per_gene"]["sedd"] == pytest.approx(2 / 30)


# --- denoising -------------------------------------------------------------------------------------------------------


def test_molecules_are_dealt_without_loss_in_the_right_share(counts: sparse.csr_array) -> None:
    kept, held = m.split_molecules(counts, 0.9, np.random.default_rng(0))
    np.testing.assert_array_equal((kept + held).toarray(), counts.toarray())
    n = int(counts.sum())
    assert stats.binomtest(int(kept.sum()), n, 0.9).pvalue > 1e-4
    with pytest.raises(UserError, match="raw counts"):
        m.split_molecules(counts * 0.5, 0.9, np.random.default_rng(0))
    with pytest.raises(UserError, match="between 0 and 1"):
        m.split_molecules(counts, 1.0, np.random.default_rng(0))


def test_mse_and_poisson_of_one_cell_by_hand() -> None:
    kept, held, guess = np.array([[8, 2, 0]]), np.array([[1, 1, 0]]), np.array([[3.0, 1.0, 1.0]])
    logs = np.log1p(1e4 * np.array([3, 1, 1]) / 5) - np.log1p(1e4 * np.array([1, 1, 0]) / 2)
    assert m.mse_log_cp10k(guess, held) == pytest.approx((logs**2).mean())
    rate = np.array([3, 1, 1]) / 5 * 10 * (2 / 10)
    expected = (rate - np.array([1, 1, 0]) * np.log(rate + 1e-6)).mean()
    assert m.poisson_nll(guess, held, kept) == pytest.approx(expected)
    assert m.poisson_nll(guess * 7, held, kept) == pytest.approx(expected)
    with pytest.raises(UserError, match="negative"):
        m.poisson_nll(-guess, held, kept)


def test_poisson_prefers_the_truth_to_all_zeros_and_to_the_gene_mean() -> None:
    rng = np.random.default_rng(0)
    rate = rng.gamma(0.5, 2.0, (100, 40))
    kept, held = m.split_molecules(rng.poisson(rate), 0.9, rng)
    mean = np.broadcast_to(rate.mean(axis=0), rate.shape)
    truth = m.poisson_nll(rate, held, kept)
    assert truth < m.poisson_nll(mean, held, kept) < m.poisson_nll(np.zeros_like(rate), held, kept)
    rows = m.denoising_table(rate, held, kept, rate.mean(axis=0))
    assert rows["poisson"]["sedd"] == pytest.approx(truth)
    assert rows["poisson"]["baselines"]["gene mean"] == pytest.approx(m.poisson_nll(mean, held, kept))


def test_expected_log_is_the_poisson_expectation_and_the_best_prediction() -> None:
    rate, depth = np.array([[0.02, 0.5, 9.0]]), np.array([100.0])
    x = np.arange(80)
    by_sum = [(stats.poisson.pmf(x, r) * np.log1p(1e4 * x / 100)).sum() for r in rate[0]]
    np.testing.assert_allclose(m.expected_log_cp10k(rate, depth)[0], by_sum, rtol=1e-9)
    rng = np.random.default_rng(0)
    rates = rng.gamma(0.4, 0.5, (300, 30))
    held = rng.poisson(rates)
    best = m.expected_log_cp10k(rates, held.sum(axis=1).clip(1))
    assert m.mse_log_cp10k(best, held, predicted_is_log=True) < m.mse_log_cp10k(rates, held)


# --- generation ------------------------------------------------------------------------------------------------------


def test_gaussian_w2_has_its_closed_form() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(300, 4)) @ rng.normal(size=(4, 4)), rng.normal(1, 2, (200, 4))
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = np.real(linalg.sqrtm(cov_a @ cov_b))
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a + cov_b - 2 * cross)
    assert m.gaussian_w2(a, b) == pytest.approx(np.sqrt(expected))
    assert m.gaussian_w2(a, a + 3) == pytest.approx(6)  # a shift by (3, 3, 3, 3)
    assert m.gaussian_w2(a, a) == pytest.approx(0, abs=1e-6)


def test_exact_w2_finds_the_best_pairing() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(40, 3))
    assert m.exact_w2(a, rng.permutation(a)) == 0
    b = rng.normal(size=(40, 1))
    line = np.sqrt(np.mean((np.sort(a[:, 0]) - np.sort(b[:, 0])) ** 2))  # on a line, sorting is optimal
    assert m.exact_w2(a[:, :1], b) == pytest.approx(line)
    with pytest.raises(UserError, match="one to one"):
        m.exact_w2(a, a[:5])


def test_mmd_is_the_mean_over_pairs_and_is_unbiased() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 2)), rng.normal(size=(5, 2))

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.exp(-np.sum((x - y) ** 2) / (2 * 1.5**2)))

    within_a = np.mean([k(a[i], a[j]) for i in range(7) for j in range(7) if i != j])
    within_b = np.mean([k(b[i], b[j]) for i in range(5) for j in range(5) if i != j])
    between = np.mean([k(x, y) for x in a for y in b])
    assert m.mmd2_unbiased(a, b, 1.5) == pytest.approx(within_a + within_b - 2 * between)
    median = np.median([np.linalg.norm(a[i] - a[j]) for i in range(7) for j in range(i)])
    assert m.mmd2_unbiased(a, b) == m.mmd2_unbiased(a, b, float(median))
    null = [m.mmd2_unbiased(*rng.normal(size=(2, 40, 3))) for _ in range(200)]
    assert abs(np.mean(null)) < 3 * np.std(null) / np.sqrt(200)
    assert m.mmd2_unbiased(rng.normal(size=(100, 3)), rng.normal(2, 1, (100, 3))) > 0.2


def test_forest_separates_what_differs_and_not_what_does_not() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 80, 5))
    assert abs(m.real_or_fake_auc(a, b, trees=30) - 0.5) < 0.17
    assert m.real_or_fake_auc(a, b + 3, trees=30) > 0.97


def test_correlation_error_is_the_rms_difference_of_corrcoef(counts: sparse.csr_array) -> None:
    a, b = counts[:200], counts[200:]
    pairs = np.triu_indices(30, 1)
    ca, cb = (np.corrcoef(m.log_cp10k(x), rowvar=False)[pairs] for x in (a, b))
    assert m.gene_correlation_error(a, b) == pytest.approx(np.sqrt(np.mean((ca - cb) ** 2)))
    silent = b.toarray() * np.r_[0, np.ones(29, int)]
    assert np.isfinite(m.gene_correlation_error(a, silent))


def test_gene_moments_are_numpys(counts: sparse.csr_array) -> None:
    dense, got = counts.toarray(), m.gene_moments(counts)
    np.testing.assert_allclose(got["mean"], dense.mean(axis=0))
    np.testing.assert_allclose(got["variance"], dense.var(axis=0))
    np.testing.assert_allclose(got["zero_fraction"], (dense == 0).mean(axis=0))
    errors = m.gene_moment_errors(counts, sparse.csr_array(dense * 2))
    expected = np.abs(np.log2((dense.mean(0) + 0.01) / (2 * dense.mean(0) + 0.01))).mean()
    assert errors["gene_mean"] == pytest.approx(expected)
    assert errors["zero_fraction"] == 0


def test_library_ks_is_scipys(counts: sparse.csr_array) -> None:
    a, b = counts[:150], counts[150:]
    expected = stats.ks_2samp(a.sum(axis=1), b.sum(axis=1)).statistic
    assert m.library_ks(a, b) == pytest.approx(expected)


def test_generation_table_exposes_independent_genes_and_copied_cells() -> None:
    rng = np.random.default_rng(0)
    kind = rng.integers(2, size=600)
    rate = rng.gamma(0.5, 3.0, (2, 40))[kind] * rng.lognormal(0, 0.3, (600, 1))
    cells = sparse.csr_array(rng.poisson(rate))
    train, real, good = cells[:360], cells[360:480], cells[480:]
    table = m.generation_table(good, real, train, seed=1, trees=20)
    for metric in ("w2", "mmd2", "auc", "correlation"):
        assert table[metric]["sedd"] < table[metric]["baselines"]["gene marginals"], metric
    assert table["w2"]["sedd"] < 2 * table["w2"]["anchors"]["real cells"]
    assert table["nearest_ratio"]["anchors"]["training cells copied"] == pytest.approx(0, abs=1e-6)
    assert table["nearest_ratio"]["sedd"] == pytest.approx(1, abs=0.3)
    with pytest.raises(UserError, match="at least 4 cells"):
        m.generation_table(good[:2], real, train)


def test_anchor_and_component_cells_are_disjoint_and_complete() -> None:
    anchor, outside = m.generation_split(100, 80, seed=3)
    np.testing.assert_array_equal(np.sort(np.r_[anchor, outside]), np.arange(100))
    assert len(anchor) == 50


# --- embedding and table ---------------------------------------------------------------------------------------------


def test_separate_clusters_are_named_right_and_noise_is_not() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(["a", "b"], 50)
    apart = rng.normal(size=(100, 2)) + np.where(labels == "a", 0, 12)[:, None]
    assert m.knn_accuracy(apart[::2], labels[::2], apart[1::2], labels[1::2]) == 1
    assert m.cluster_ari(apart, labels) == 1
    assert abs(m.cluster_ari(rng.normal(size=(100, 2)), labels)) < 0.15


def test_table_marks_the_winner_of_each_kind_of_metric() -> None:
    rows = {
        "likelihood": {"nats_per_cell": {"sedd": 640.0, "baselines": {"NB per gene": 705.0}}},
        "generation": {
            "auc": {"sedd": 0.62, "baselines": {"gene marginals": 0.99}, "anchors": {"real cells": 0.47}},
            "spearman": {"sedd": 0.2, "baselines": {"gene marginals": 0.3}},
            "mystery": {"sedd": float("nan"), "baselines": {}},
        },
        "empty": {},
    }
    lines = m.metrics_table(rows).splitlines()
    assert lines[0].split() == ["Likelihood", "of", "held-out", "cells", "sedd", "NB", "per", "gene", "better"]
    assert "640.0*" in lines[2]
    assert "0.6200*" in next(line for line in lines if line.startswith("Real-or-fake"))
    assert "0.3000*" in next(line for line in lines if line.startswith("Spearman"))
    assert next(line for line in lines if line.startswith("mystery")).split() == ["mystery", "-", "-", "-"]
    assert "[real cells]" in m.metrics_table(rows)
    assert max(map(len, lines)) < 120


def test_a_table_ends_with_its_sentence_and_steps_with_theirs() -> None:
    anchors = {"real cells": 2.7}
    rows = {
        "w2": {"sedd": 3.1, "baselines": {"gene marginals": 10.2}, "anchors": anchors},
        "library_ks": {"sedd": 0.2, "baselines": {"gene marginals": 0.1}},
        "auc": {"sedd": 0.6, "baselines": {"gene marginals": 0.9}},
    }
    sentence = (
        "sedd is best on 2 of 3 rows; Gaussian W2, the row to read first: sedd is better than the best baseline "
        "(gene marginals, 10.20); real cells get 2.700."
    )
    assert m.section_reading("generation", rows) == sentence
    assert " ".join(m.metrics_table({"generation": rows}).rpartition("---\n")[2].split()) == sentence
    assert m.section_reading("generation", {}) == m.section_reading("mine", rows) == ""
    points = [{"steps": 0, "w2": 2.7, "auc": 0.5}, {"steps": 1, "w2": 10.0, "auc": 1.0}, {"steps": 64, "w2": 3.1, "auc": 0.6}]
    lines = m.steps_table(points).splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["[real", "1", "64"]
    assert lines[-1] == "Gaussian W2 is 10.00 in 1 step, 3.100 in 64 steps, 2.700 for real cells: more steps pay while it falls."


def test_reading_says_who_wins_and_what_real_cells_get() -> None:
    row = {"sedd": 0.62, "baselines": {"gene marginals": 0.99}, "anchors": {"real cells": 0.47}}
    text = m.reading("auc", row)
    assert text == "sedd is better than the best baseline (gene marginals, 0.9900); real cells get 0.4700."
    assert "not better than" in m.reading("mae", {"sedd": 0.4, "baselines": {"all zeros": 0.3}})
    assert m.reading("mae", {"sedd": None, "baselines": {}}) == ""
    assert m.winner("unheard of", row) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(646.21, "646.2"), (0.0, "0.000"), (0.00031, "0.000310"), (3e-6, "3.00e-06"), (None, "-"), (float("nan"), "-")],
)
def test_values_have_four_digits(value: float | None, text: str) -> None:
    assert m.format_value(value) == text
