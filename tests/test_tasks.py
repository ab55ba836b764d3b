"""What a user does with a model: AnnData in, AnnData out, nothing observed altered, nothing lost."""

from __future__ import annotations

import errno
import html
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from conftest import TINY_FLAGS, dense, make_counts, true_rates
from scipy.stats import spearmanr

from sedd.cli import main
from sedd.errors import SeddWarning, UserError
from sedd.evaluation.evaluate import Evaluation, _write, evaluate
from sedd.inference.cells import open_cells
from sedd.inference.new_genes import add_genes
from sedd.inference.pretrained import Pretrained
from sedd.likelihood import CellBatch, nelbo
from sedd.metrics import CountBaselines
from sedd.tasks import denoise, embed, generate, impute


def test_hidden_entries_are_predicted_and_all_others_are_bit_identical(model: Pretrained) -> None:
    adata = make_counts()
    out = impute(model, adata, hide=0.2, cells="val", progress=False)
    hidden = dense(out.layers["sedd_hidden"]).astype(bool)
    true = dense(adata[out.obs_names, out.var_names].X)
    assert (hidden.sum(1) == round(0.2 * 60)).all()
    assert np.array_equal(dense(out.X)[~hidden], true[~hidden])
    assert np.array_equal(dense(out.layers["counts"]), true)
    assert (dense(out.layers["sedd_std"])[hidden] > 0).any()
    predicted = dense(out.X)[hidden]
    mean = np.broadcast_to(true.mean(0), true.shape)[hidden]
    assert np.abs(predicted - true[hidden]).mean() < np.abs(mean - true[hidden]).mean()


def test_a_prediction_does_not_depend_on_what_it_predicts(model: Pretrained) -> None:
    adata = make_counts()
    first = impute(model, adata, hide=0.2, progress=False)
    hidden = dense(first.layers["sedd_hidden"]).astype(bool)
    changed = adata.copy()
    values = dense(adata.X).copy()
    values[hidden] = np.random.default_rng(0).permutation(values[hidden])
    changed.X = values
    second = impute(model, changed, hide=0.2, progress=False)
    assert (values != dense(adata.X)).any(1).all()  # in every cell
    np.testing.assert_array_equal(dense(second.layers["sedd_hidden"]), hidden)
    np.testing.assert_array_equal(dense(first.X)[hidden], dense(second.X)[hidden])


@pytest.mark.parametrize("task", ["impute", "denoise"])
def test_the_total_of_a_cell_does_not_give_hidden_counts_away(task: str, model: Pretrained) -> None:
    assert model.model.config["condition_library"]
    adata = make_counts(20, seed=5)
    hidden = dense(impute(model, adata, hide=0.3, progress=False).layers["sedd_hidden"]).astype(bool)
    more = adata.copy()
    values = dense(adata.X)
    more.X = values + 20 * hidden  # changes what is hidden, and so the totals, and nothing else
    if task == "impute":
        first, second = (dense(impute(model, a, hide=0.3, progress=False).X) for a in (adata, more))
        np.testing.assert_array_equal(first[hidden], second[hidden])
    else:  # one entry at a time: what the other genes say of it is independent of its own count
        more = adata.copy()
        more.X = values + 20 * (np.arange(values.shape[1]) == 7)
        first, second = (denoise(model, a, own_counts="none", progress=False) for a in (adata, more))
        np.testing.assert_array_equal(dense(first.X)[:, 7], dense(second.X)[:, 7])


def test_obs_labels_and_var_survive(model: Pretrained) -> None:
    adata = make_counts()
    out = impute(model, adata, predict=["gene3"], progress=False)
    assert out.obs.equals(adata.obs)
    assert out.obs["cell_type"].isna().sum() == 1
    assert list(out.var["symbol"]) == list(adata.var["symbol"])
    assert out.uns["sedd"]["task"] == "impute"
    hidden = dense(out.layers["sedd_hidden"])
    assert hidden[:, 3].all()
    assert hidden.sum() == adata.n_obs


def test_genes_are_matched_by_name_and_missing_ones_are_predicted(model: Pretrained) -> None:
    adata = make_counts()
    shuffled = adata[:, np.random.default_rng(0).permutation(60)[:50]].copy()
    with pytest.warns(SeddWarning, match="50 of the model's 60 genes"):
        out = impute(model, shuffled, progress=False)
    assert list(out.var_names) == list(model.genes)
    hidden = dense(out.layers["sedd_hidden"]).astype(bool)
    missing = ~np.isin(model.genes.astype(str), shuffled.var_names)
    assert (hidden == (missing | (dense(adata.X) == 0))).all()  # zeros of the genes that are there are imputed as ever
    assert np.array_equal(dense(out.X)[~hidden], dense(adata.X)[~hidden])
    with pytest.raises(UserError, match="has 14 of the model's 60 genes and no others"):
        impute(model, adata[:, :14].copy(), progress=False)


def test_zeros_are_what_is_imputed_when_nothing_is_named(model: Pretrained) -> None:
    adata = make_counts()
    out = impute(model, adata, progress=False)
    true = dense(adata.X)
    assert np.array_equal(dense(out.X)[true > 0], true[true > 0])
    zero, rates = true == 0, true_rates()
    found, mean = dense(out.X)[zero], np.broadcast_to(true.mean(0), true.shape)[zero]
    assert ((found - rates[zero]) ** 2).mean() < 0.8 * ((mean - rates[zero]) ** 2).mean()
    assert spearmanr(found, rates[zero]).statistic > spearmanr(mean, rates[zero]).statistic + 0.1


def test_samples_are_counts_and_agree_with_the_mean(model: Pretrained) -> None:
    adata = make_counts(40)
    out = impute(model, adata, hide=0.3, num_samples=30, num_steps=20, progress=False)
    hidden = dense(out.layers["sedd_hidden"]).astype(bool)
    samples = np.stack([dense(out.layers[f"sedd_sample_{k}"]) for k in range(30)])
    assert (samples == np.rint(samples)).all()
    assert np.array_equal(samples[:, ~hidden], np.broadcast_to(dense(adata.X)[~hidden], samples[:, ~hidden].shape))
    np.testing.assert_allclose(dense(out.layers["sedd_mean"]), samples.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dense(out.layers["sedd_std"]), samples.std(0), rtol=1e-4, atol=1e-5)
    closed = impute(model, adata, hide=0.3, progress=False)
    assert np.array_equal(dense(closed.X), dense(out.X))
    assert abs(dense(out.X)[hidden].mean() - samples[:, hidden].mean()) < 0.1


@pytest.mark.parametrize("task", ["impute", "denoise"])
def test_draws_of_entries_that_are_hidden_in_turn_agree_with_their_posterior_means(model: Pretrained, task: str) -> None:
    adata, n = make_counts(30), 40
    run: Callable[..., ad.AnnData] = impute if task == "impute" else denoise
    others = {} if task == "impute" else {"own_counts": "none"}
    out = run(model, adata, num_samples=n, num_steps=8, progress=False, **others)
    drawn, spread = dense(out.layers["sedd_mean"]), dense(out.layers["sedd_std"])
    known = np.zeros(out.shape, bool) if task == "denoise" else dense(adata.X) > 0
    assert np.array_equal(drawn[known], dense(adata.X)[known])
    assert not spread[known].any()
    # The mean over entries of what is drawn, with the error that so many draws leave.
    error = np.sqrt((spread[~known] ** 2).sum() / n) / (~known).sum()
    assert abs(drawn[~known].mean() - dense(out.X)[~known].mean()) < 6 * error
    assert np.corrcoef(drawn[~known], dense(out.X)[~known])[0, 1] > 0.8


@pytest.mark.parametrize("batch_size", [1, 7, 30])
def test_results_do_not_depend_on_the_batch_size(model: Pretrained, batch_size: int) -> None:
    adata = make_counts(30)
    tasks: list[Callable[[int], ad.AnnData]] = [
        lambda size: impute(model, adata, batch_size=size, progress=False),
        lambda size: impute(model, adata, hide=0.2, batch_size=size, progress=False),
        lambda size: denoise(model, adata, batch_size=size, progress=False),
        lambda size: embed(model, adata, batch_size=size, progress=False),
        lambda size: generate(model, 30, num_steps=10, batch_size=size, progress=False),
    ]
    for task in tasks:
        one, other = task(batch_size), task(64)
        for a, b in ((one.X, other.X), *((one.obsm[name], other.obsm[name]) for name in other.obsm)):
            np.testing.assert_allclose(dense(a), dense(b), rtol=2e-4, atol=1e-5)


def test_generated_cells_carry_the_label_asked_for_and_look_like_it(model: Pretrained) -> None:
    real = make_counts()
    means = {}
    for label in ("B cell", "T cell"):
        made = generate(model, 60, where={"cell_type": label}, num_steps=20, guidance=1.5, progress=False)
        assert (made.obs["cell_type"] == label).all()
        assert list(made.var_names) == list(model.genes)
        assert list(made.var["symbol"]) == list(real.var["symbol"])
        means[label] = dense(made.X).mean(0)
    groups = real.obs["cell_type"].to_numpy()
    for label, mean in means.items():
        distance = {g: np.abs(dense(real.X)[groups == g].mean(0) - mean).sum() for g in means}
        assert min(distance, key=distance.__getitem__) == label


def test_unknown_labels_and_columns_are_errors_that_list_the_known(model: Pretrained) -> None:
    with pytest.raises(UserError, match="known: 'T cell', 'monocyte', 'B cell'"):
        generate(model, 1, where={"cell_type": "neuron"})
    with pytest.raises(UserError, match="its condition columns are: cell_type"):
        generate(model, 1, where={"tissue": "blood"})
    with pytest.raises(UserError, match="at least one cell"):
        generate(model, 0)


def test_guidance_by_nothing_is_an_error(tmp_path: Path, tiny_h5ad: Path) -> None:
    flags = [*TINY_FLAGS, "--num_epochs", "1", "--condition", "cell_type"]
    assert main(["train", "--data_path", str(tiny_h5ad), "--checkpoint_dir", str(tmp_path), *flags]) == 0
    with pytest.raises(UserError, match="nothing to be guided by; give --where"):
        generate(tmp_path, 2, guidance=2.0, progress=False)
    assert generate(tmp_path, 2, guidance=2.0, where={"cell_type": "B cell"}, num_steps=2, progress=False).n_obs == 2


def test_counts_above_all_that_were_seen_are_taken_as_they_are(model: Pretrained) -> None:
    adata = make_counts(40, seed=1)
    values = dense(adata.X)
    values[3, 4] = 900
    adata.X = values
    out = impute(model, adata, predict=["gene5"], progress=False)
    assert dense(out.layers["counts"])[3, 4] == dense(out.X)[3, 4] == 900
    low, high = (
        evaluate(model, adata, cells="all", n_masks=2, num_steps=2, steps=(), progress=False).metrics["likelihood"]["nats_per_cell"]
        for adata.X in (np.minimum(values, 90), values)
    )
    # Ten times the count is not ten times the surprise, as it is to a Poisson.
    assert low["sedd"] < high["sedd"] < 0.5 * high["baselines"]["gene mean (Poisson)"]


def test_large_counts_are_scored_drawn_and_held_against_laws_of_counts(tmp_path: Path) -> None:
    adata = make_counts()
    values = dense(adata.X)
    values[:, 0] *= 600  # a gene in the thousands, as hormones are, and reads of full-length protocols
    adata.X = sp.csr_matrix(values)
    adata.write_h5ad(tmp_path / "wide.h5ad")
    flags = [*TINY_FLAGS, "--log_with", "none"]
    assert main(["train", "--data_path", str(tmp_path / "wide.h5ad"), "--checkpoint_dir", str(tmp_path / "run"), *flags]) == 0
    model = Pretrained.load(tmp_path / "run")
    found = evaluate(model, adata, n_masks=4, num_steps=4, progress=False)
    held_out = open_cells(model, adata, "val", None)
    counts = held_out.counts(0, len(held_out))
    cell_batch = CellBatch(torch.from_numpy(counts).long(), cell=torch.from_numpy(held_out.indices))
    bound = nelbo(model.model, model.graph, model.noise, [cell_batch], n_masks=4).per_cell
    assert found.metrics["likelihood"]["nats_per_cell"]["sedd"] == pytest.approx(bound.mean(), rel=1e-6)
    baselines = CountBaselines.fit(sp.csr_matrix(np.delete(dense(adata.X), held_out.indices, axis=0)))
    poisson = -baselines.log_probs(np.arange(60)[None], counts.astype(int))["gene mean (Poisson)"].sum(1).mean()
    assert found.metrics["likelihood"]["nats_per_cell"]["baselines"]["gene mean (Poisson)"] == pytest.approx(poisson)
    below, upto = found.arrays["hidden_cdf_below"], found.arrays["hidden_cdf"]
    assert (below >= 0).all() and (upto <= 1).all() and (below < upto).all()
    made = dense(generate(model, 60, num_steps=4, progress=False).X)[:, 0]
    seen = dense(adata.X)[:, 0]
    assert 0.3 < made.mean() / seen.mean() < 3
    assert made.max() < 3 * seen.max()


@pytest.mark.parametrize("setting", [{"num_steps": 0}, {"temperature": 0.0}, {"sampler": "magic"}])
def test_a_bad_sampler_setting_is_one_clear_error(model: Pretrained, setting: dict) -> None:
    with pytest.raises(UserError):
        generate(model, 2, progress=False, **setting)


def test_embedding_separates_the_types_better_than_chance(model: Pretrained) -> None:
    from sedd.metrics import knn_accuracy

    adata = make_counts()
    out = embed(model, adata, progress=False)
    assert out.obsm["X_sedd"].shape == (240, 16)
    known = ~out.obs["cell_type"].isna().to_numpy()
    states, labels = out.obsm["X_sedd"][known], out.obs["cell_type"].astype(str).to_numpy()[known]
    assert knn_accuracy(states[:150], labels[:150], states[150:], labels[150:]) > 0.5


def test_a_gene_it_was_not_trained_on_is_known_by_its_vector(tmp_path: Path) -> None:
    """The new gene is a twin in vector of the gene that tells the types apart best; shown all others, its count is predicted."""
    adata = make_counts(600)
    counts = dense(adata.X)
    types = adata.obs["cell_type"].to_numpy()
    means = np.stack([counts[types == name].mean(0) for name in ("T cell", "monocyte", "B cell")])
    twin = int((np.ptp(means, axis=0) / np.sqrt(means.mean(0))).argmax())
    fresh = np.random.default_rng(5).poisson(means[[max(0, ["T cell", "monocyte", "B cell"].index(t)) if isinstance(t, str) else 0 for t in types], twin])
    names = [*adata.var_names, "novel"]
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(61, 12)).astype(np.float32)
    vectors[60] = vectors[twin]
    np.savez(tmp_path / "vectors.npz", genes=np.array(names), vectors=vectors)
    adata.write_h5ad(tmp_path / "old.h5ad")
    both = ad.AnnData(np.column_stack([counts, fresh]).astype(np.float32), obs=adata.obs)
    both.var_names = names
    both.write_h5ad(tmp_path / "new.h5ad")
    run, embeddings = str(tmp_path / "run"), ["--gene_embeddings", str(tmp_path / "vectors.npz")]
    flags = [*TINY_FLAGS, "--num_epochs", "15"]
    assert main(["train", "--data_path", str(tmp_path / "old.h5ad"), "--checkpoint_dir", run, *flags, *embeddings]) == 0
    out = str(tmp_path / "out.h5ad")
    new = ["--new_genes", "novel", "--predict", "novel", *embeddings]
    assert main(["impute", run, str(tmp_path / "new.h5ad"), "-o", out, *new]) == 0
    imputed = ad.read_h5ad(out)
    assert list(imputed.var_names) == names
    predicted = dense(imputed.X)[:, 60]
    assert np.corrcoef(predicted, fresh)[0, 1] > 0.2
    assert ((predicted - fresh) ** 2).mean() < ((fresh.mean() - fresh) ** 2).mean()
    assert np.array_equal(dense(imputed.X)[:, :60], counts)
    again = impute(run, both, new_genes="novel", predict="novel", gene_embeddings=tmp_path / "vectors.npz", output=tmp_path / "again.h5ad", progress=False)
    assert list(again.var_names) == names and np.array_equal(dense(ad.read_h5ad(tmp_path / "again.h5ad").X), dense(imputed.X))


def test_new_genes_need_vectors_and_a_model_that_takes_them(model: Pretrained, tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", genes=np.array(["novel"]), vectors=np.zeros((1, 3), np.float32))
    with pytest.raises(UserError, match="train it with --gene_embeddings"):
        add_genes(model, make_counts(), ["novel"], tmp_path / "v.npz")


def test_values_that_are_no_counts_are_refused(model: Pretrained) -> None:
    logged = make_counts()
    logged.X.data = np.log1p(logged.X.data)
    with pytest.raises(UserError, match="not a whole number"):
        impute(model, logged, hide=0.1, progress=False)
    logged.layers["counts"] = make_counts().X
    assert impute(model, logged, layer="counts", hide=0.1, progress=False).n_obs == 240
    with pytest.raises(UserError, match="there are: --layer X, --layer counts"):
        impute(model, logged, layer="spliced", progress=False)


def test_other_cells_by_the_names_of_the_training_cells_are_noticed(model: Pretrained) -> None:
    for adata, noticed in ((make_counts(), False), (make_counts(seed=5), True)):
        found = evaluate(model, adata, n_masks=1, num_steps=1, steps=(), umap=False, progress=False)
        assert any("the names of the training cells and other counts" in note for note in found.notes) == noticed


def test_a_report_that_finds_no_room_says_which_and_leaves_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    found = Evaluation(metrics={"likelihood": {}})
    monkeypatch.setattr(sys.modules[evaluate.__module__], "write_report", full)  # the function hides its module
    with pytest.raises(OSError, match=r"out: the report cannot be written \(No space left on device\). The numbers are in metrics.json and steps.json there"):
        _write(found, False, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["metrics.json", "steps.json"]
    monkeypatch.setattr(sys.modules[evaluate.__module__], "write_json", full)
    with pytest.raises(OSError, match=r"left on device\). Make room and evaluate again"):
        _write(found, False, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_evaluation_writes_its_page_and_beats_the_product_of_marginals(
    tiny_run: Path, tiny_h5ad: Path, tmp_path: Path
) -> None:
    found = evaluate(tiny_run, tiny_h5ad, output=tmp_path, n_masks=8, num_steps=8, steps=(1,), umap=False, progress=False)
    assert found.report is not None
    page = found.report.read_text()
    assert "<html" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    rows = json.loads((tmp_path / "metrics.json").read_text())["likelihood"]
    told_the_total = rows["nats_per_cell_given_total"]["sedd"]
    assert told_the_total < rows["nats_per_cell"]["baselines"]["gene marginals"]
    assert told_the_total < rows["nats_per_cell"]["sedd"]  # the total costs something
    assert {"likelihood", "imputation", "generation"} <= set(found.metrics)
    # A bound that is given something is not to be read as one that is given nothing.
    assert any("NELBO and the imputation are given each cell's cell_type" in note for note in found.notes)
    assert "given each cell's cell_type" in html.unescape(page)
    steps = json.loads((tmp_path / "steps.json").read_text())
    assert [row["steps"] for row in steps] == [0, 1, 8]  # 0: real cells
    assert steps[0]["w2"] < steps[2]["w2"] < steps[1]["w2"]
    assert "steps_w2" in page
