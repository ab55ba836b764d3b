"""The page: complete, self-contained, and sensible when most of its inputs are missing."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import sparse, stats

from sedd import metrics as m
from sedd.errors import UserError
from sedd.report.figures import coordinates
from sedd.report.page import summary, write_report
from sedd.report.plots import ReportData, plots

VOID = {"meta", "img", "br", "hr", "link"}


class Balanced(HTMLParser):
    """Collects attributes and fails on a tag that is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def data() -> ReportData:
    rng = np.random.default_rng(0)
    cells = sparse.csr_array(rng.poisson(rng.gamma(0.5, 2.0, (1, 25)) * rng.lognormal(0, 0.3, (200, 1))))
    true = rng.poisson(1.0, 500)
    metrics = {
        "likelihood": {"nats_per_cell": {"sedd": 90.0, "ci": (88.0, 92.0), "baselines": {"NB per gene": 100.0, "far": 1e4}}},
        "imputation": {"nll": {"sedd": 1.2, "baselines": {"NB per gene": 1.1}}},
        "generation": {
            "auc": {"sedd": 0.6, "baselines": {"gene marginals": 0.9}, "anchors": {"real cells": 0.5}},
            "w2": {"sedd": float("nan"), "baselines": {"gene marginals": 3.0}},
        },
        "of my own": {"mine": {"sedd": 1.0, "baselines": {}}},
    }  # fmt: skip
    return ReportData(
        title="A <test> & more",
        history=[{"epoch": i, "train_loss": 1 / i, "val_nelbo": 90 + 9 / i, "cells_per_s": 200, "wait_share": 0.02} for i in (1, 2)],
        metrics=metrics,
        settings={"epochs": 2, "genes": None, "Model": {"hidden_dim": 16, "steps": [1, 2]}},
        hidden_true=true,
        hidden_mean=rng.gamma(1, 1, 500),
        hidden_cdf_below=stats.poisson.cdf(true - 1, 1.0),
        hidden_cdf=stats.poisson.cdf(true, 1.0),
        real=cells[:80],
        generated=cells[80:140],
        reference=cells[140:],
        real_labels=np.array([f"type {i % 10}" for i in range(80)]),
        generated_labels=np.array(["type 1", "nan"] * 30),
        steps=[{"steps": 8, "w2": 3.0}, {"steps": 1, "w2": 9.0}],
        notes=["Mind the gap."],
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(data: ReportData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(tmp_path_factory.mktemp("report"), data, umap=False)


def test_page_is_well_formed_and_needs_no_other_file(page: Path) -> None:
    parser = Balanced()
    text = page.read_text(encoding="utf-8")
    parser.feed(text)
    assert parser.open == []
    assert not {tag for tag, _ in parser.found} & {"script", "link", "iframe", "object"}
    sources = [attrs["src"] or "" for tag, attrs in parser.found if tag == "img"]
    assert sources
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert "url(" not in text
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    ids = [attrs["id"] for _, attrs in parser.found if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = [(attrs.get("href") or "#")[1:] for tag, attrs in parser.found if tag == "a"]
    assert set(targets) <= set(ids)


def test_every_figure_is_inline_and_beside_the_page(page: Path) -> None:
    names = {path.stem for path in (page.parent / "figures").iterdir()}
    assert names == {
        *("training_loss", "validation_nelbo", "predicted_against_true", "calibration", "coverage", "library_sizes"),
        *("gene_mean", "gene_variance", "gene_zero_fraction", "cells", "cells_real_labels", "cells_generated_labels"),
        "steps_w2",
    }
    text = page.read_text(encoding="utf-8")
    for name in names:
        file = (page.parent / "figures" / f"{name}.svg").read_bytes()
        assert base64.b64encode(file).decode() in text
        assert f'<figure id="{name}">' in text


def test_page_shows_the_numbers_with_the_winner_marked_and_text_escaped(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "A &lt;test&gt; &amp; more" in text
    assert '<td data-label="sedd" class="best"><span>90.00<span class="ci">88.00 to 92.00</span></span></td>' in text
    assert '<td data-label="NB per gene" class="best"><span>1.100</span></td>' in text
    assert '<td data-label="real cells" class="anchor">0.5000</td>' in text
    assert "Mind the gap." in text
    assert "hidden_dim" in text


def test_whatever_a_user_names_is_shown_as_text_and_never_read_as_markup(tmp_path: Path) -> None:
    names = [f'<i class="{k}">{k} & \'co\'</i>' for k in ("title", "note", "section", "metric", "baseline", "anchor", "file", "key", "group")]
    title, note, section, metric, baseline, anchor, file, key, group = names
    row = {"sedd": 1.0, "baselines": {baseline: 2.0}, "anchors": {anchor: 0.5}}
    given = ReportData(
        title=title,
        notes=[note],
        metrics={section: {metric: row}, "imputation": {"nll": row}},  # the winner of the second is named in sentences too
        settings={"data_path": f"/data/{file}.h5ad", group: {key: [file]}},
    )
    parser = Balanced()
    parser.feed(write_report(tmp_path, given).read_text(encoding="utf-8"))
    assert "i" not in {tag for tag, _ in parser.found}
    assert all(name in parser.text for name in names)
    labels = {attrs.get("data-label") for _, attrs in parser.found}
    assert {"sedd", baseline, anchor} <= labels
    assert section in {attrs.get("id") for _, attrs in parser.found}


def test_summary_says_plainly_who_wins(data: ReportData) -> None:
    text = summary(data)
    assert text.startswith(
        "The model was trained for 2 epochs at 200 cells per second, 2 % of the time waiting for data."
    )
    assert "costs it 90 nats, 10 fewer than the best baseline" in text
    assert "On genes hidden from it, sedd is not better than the best baseline (NB per gene, 1.100)" in text
    assert "AUC of 0.60 (for real cells it is 0.50)" in text


def test_same_input_gives_the_same_figures(data: ReportData, page: Path, tmp_path: Path) -> None:
    part = ReportData(history=data.history, metrics=data.metrics, real=data.real, generated=data.generated)
    again = write_report(tmp_path / "named.html", part, umap=False)
    assert again == tmp_path / "named.html"
    for name in ("training_loss", "validation_nelbo", "gene_mean", "library_sizes"):
        first, second = (folder / "figures" / f"{name}.svg" for folder in (page.parent, tmp_path))
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (ReportData(), set()),
        (ReportData(history=[{"epoch": 1, "train_loss": 0.4}]), {"training_loss"}),
        (ReportData(history=[{"epoch": 1, "train_loss": float("nan"), "val_nelbo": 3.0}]), {"validation_nelbo"}),
        (ReportData(hidden_true=np.zeros(3), hidden_mean=np.zeros(3)), {"predicted_against_true"}),
    ],
)
def test_page_does_with_what_it_gets(given: ReportData, expected: set[str], tmp_path: Path) -> None:
    page = write_report(tmp_path, given)
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == expected
    parser = Balanced()
    parser.feed(page.read_text(encoding="utf-8"))
    assert parser.open == []


def test_cells_without_counts_and_silent_genes_are_drawn(tmp_path: Path) -> None:
    cells = np.zeros((12, 6), int)
    cells[1:, 0] = 3
    cells[::2, 1] = 1
    write_report(tmp_path, ReportData(real=cells, generated=cells[:8]), umap=False)
    assert (tmp_path / "figures" / "cells.svg").exists()


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(tmp_path, ReportData(title="first"))
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path, ReportData(title="second"))
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["report.html"]
    assert "first" in (tmp_path / "report.html").read_text()


def test_inputs_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(UserError, match="belong together"):
        ReportData(hidden_true=np.zeros(3))
    with pytest.raises(UserError, match="belong together"):
        ReportData(hidden_true=np.zeros(3), hidden_mean=np.zeros(2))
    with pytest.raises(UserError, match="3 and 2 genes"):
        ReportData(real=np.ones((5, 3)), generated=np.ones((5, 2)))


def two_kinds(n: int, seed: int) -> sparse.csr_array:
    rng = np.random.default_rng(seed)
    rate = np.where(rng.integers(2, size=(n, 1)) == 0, [8.0] * 15 + [0.2] * 15, [0.2] * 15 + [8.0] * 15)
    return sparse.csr_array(rng.poisson(rate))


def test_without_the_package_of_the_umap_the_components_say_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    given = ReportData(real=two_kinds(30, 0), generated=two_kinds(20, 1))
    page = write_report(tmp_path, given)
    assert "For a UMAP beside it: pip install umap-learn." in page.read_text()
    assert not (tmp_path / "figures" / "cells_umap.svg").exists()
    assert "umap-learn" not in write_report(tmp_path, given, umap=False).read_text()


@pytest.mark.slow  # the package compiles for ten seconds
@pytest.mark.filterwarnings("default")  # its warnings are its own
def test_a_umap_of_both_sets_shows_cells_that_do_not_exist_as_an_island(tmp_path: Path) -> None:
    real, good = two_kinds(120, 0), two_kinds(60, 1)
    odd = sparse.csr_array(np.random.default_rng(2).poisson([[0.2, 8.0, 4.0] * 10] * 60))
    kind, real_xy, made_xy = coordinates(real, sparse.vstack([good, odd]), real, True)
    assert kind == "UMAP"
    nearest = np.sqrt(((made_xy[:, None] - real_xy[None]) ** 2).sum(-1)).min(1)
    assert np.median(nearest[60:]) > 5 * np.median(nearest[:60])
    write_report(tmp_path, ReportData(real=real, generated=good))
    assert (tmp_path / "figures" / "cells_umap.svg").exists()


def test_each_section_has_its_sentence_and_the_steps_their_line(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    said = "Negative log score, the row to read first: sedd is not better than the best baseline (NB per gene, 1.100)."
    assert f'<p class="how">{said}</p>' in text
    [steps] = plots(ReportData(steps=[{"steps": 0, "w2": 2.0}, {"steps": 4, "w2": 5.0}, {"steps": 1, "w2": 9.0}]), umap=False)
    axes = Figure().add_subplot()
    steps.draw(axes)
    real, curve = axes.get_lines()
    assert list(real.get_ydata()) == [2.0, 2.0]
    assert (list(curve.get_xdata()), list(curve.get_ydata())) == ([1.0, 4.0], [9.0, 5.0])
    assert not list(plots(ReportData(steps=[{"steps": 0, "w2": 2.0}]), umap=False))


def test_every_metric_of_the_tables_is_explained() -> None:
    cells = sparse.csr_array(np.random.default_rng(0).poisson(1.0, (60, 12)))
    base = m.CountBaselines.fit(cells)
    hidden = np.ones(5, int)
    sections = [
        m.likelihood_table(base, np.ones(3), cells[:3]),
        m.recovery_table(base, gene=hidden, true=hidden, predicted=hidden, log_prob=-hidden, cdf_below=0 * hidden, cdf=hidden),
        m.denoising_table(cells, cells, cells, base.mean),
        m.generation_table(cells[:20], cells[20:40], cells, trees=5),
    ]  # fmt: skip
    assert {metric for rows in sections for metric in rows} <= set(m.METRICS)
