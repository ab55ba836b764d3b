"""How fast each kind of weight learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import TINY_FLAGS

from sedd import checkpoint
from sedd.cli import main
from sedd.errors import UserError
from sedd.model import SEDDTransformer
from sedd.training.learner import LABEL_RATE, NETWORK_RATE, _parameter_groups
from sedd.training.resuming import check_same_groups


@pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning")
def test_the_network_learns_five_times_as_fast_as_the_laws_of_genes_and_their_vectors_ten_times(tiny_h5ad: Path, tmp_path: Path) -> None:
    weights = {}
    for rate in ("1e-3", "1e-9"):  # the second stays where it starts
        flags = ["--num_epochs", "2", "--batch_size", "1000", "--warmup_steps", "0", "--weight_decay", "0", "--learning_rate", rate]
        paths = ["--data_path", str(tiny_h5ad), "--checkpoint_dir", str(tmp_path / rate)]
        assert main(["train", *paths, *TINY_FLAGS, *flags]) == 0
        weights[rate] = checkpoint.load(tmp_path / rate / "final.pt")["model"]
    # The first step of Adam is the rate for each weight that has a gradient. Vectors of genes have none until `write` has left zero, so of
    # their two steps the first is nothing and the second (.1 / (1 - .9^2)) / sqrt(.01 / (1 - .99^2)) of the rate.
    moved = {name: (weights["1e-3"][name] - start).abs().max().item() for name, start in weights["1e-9"].items()}
    assert moved["backbone.genes.weight"] == pytest.approx(1e-2 * (0.1 / 0.19) / (0.01 / 0.0199) ** 0.5, rel=1e-2)
    assert 1e-3 < moved["head.start"] < 2.01e-3
    assert 5e-3 < moved["backbone.write.weight"] < 1.005e-2
    assert torch.equal(weights["1e-3"]["backbone.usual"], weights["1e-9"]["backbone.usual"])


def test_a_run_takes_the_batch_and_rate_of_its_device_says_so_and_keeps_them_on_another(
    tiny_h5ad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = ["--data_path", str(tiny_h5ad), "--checkpoint_dir", str(tmp_path)]
    flags = [*paths, *TINY_FLAGS, "--val_fraction", "0.4"]  # 144 cells are trained on
    for name in ("--batch_size", "--learning_rate"):
        del flags[(at := flags.index(name)) : at + 2]
    monkeypatch.setattr("sedd.config.GPU_STEPS", 2)
    with monkeypatch.context() as patch:
        patch.setattr("sedd.trainer.on_gpu", lambda _: True)
        assert main(["train", *flags, "--num_epochs", "1"]) == 0
    assert "--batch_size 64 --learning_rate 0.00014: what --model small trains with on a GPU and 144 cells" in capsys.readouterr().err
    state = checkpoint.load(tmp_path / "final.pt")
    assert (state["args"]["batch_size"], state["args"]["learning_rate"], state["step"]) == (64, 1.4e-4, 3)
    assert main(["train", *flags, "--num_epochs", "2", "--resume", "auto"]) == 0
    said = capsys.readouterr().err
    assert "from here on" not in said and "a CPU" not in said
    state = checkpoint.load(tmp_path / "final.pt")
    assert (state["args"]["batch_size"], state["args"]["learning_rate"], state["step"]) == (64, 1.4e-4, 6)


def test_the_laws_of_labels_learn_faster_than_the_network_that_they_follow() -> None:
    for width in (16, 256):
        model = SEDDTransformer(3, 4, hidden_dim=width, num_layers=1, num_heads=1, condition_sizes=(2, 3), answer_labels=True)
        groups = _parameter_groups(model, 0.01)
        faster = {id(p): group["faster"] for group in groups for p in group["params"]}
        decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        assert model.labels is not None
        for head in model.labels.columns:
            assert faster[id(head.weight)] == faster[id(head.bias)] == LABEL_RATE * (1 if width == 16 else 0.5)
            assert (decay[id(head.weight)], decay[id(head.bias)]) == (0.01, 0)
        assert faster[id(model.backbone.read.weight)] == NETWORK_RATE * (1 if width == 16 else 0.5)
        assert len(faster) == len(list(model.parameters()))


def test_a_run_whose_weights_shared_other_rates_is_not_resumed() -> None:
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    now = torch.optim.AdamW([{"params": weights[:1]}, {"params": weights[1:]}])
    check_same_groups(now.state_dict(), now)
    with pytest.raises(UserError, match="written by a version of sedd that fits some weights at other rates"):
        check_same_groups(torch.optim.AdamW([{"params": weights}]).state_dict(), now)
