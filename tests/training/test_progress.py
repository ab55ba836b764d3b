"""The bar: the figures it shows are those of the steps it was told of."""

from __future__ import annotations

import pytest

from sedd.training.logs import Progress


def test_the_bar_shows_loss_bound_speed_waiting_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1, 4, 100, 300, nelbo=612.34) as bar:
        bar.step(700.0, 50, 2.0, 0.5)
        assert bar.status(650.04) == "loss=650.0, nelbo=612.3, 25 cells/s, wait=25.0%, left=00:30"  # 150 + 2 * 300 cells
        bar.step(640.0, 150, 2.0, 0.0)
        assert bar.status(640.0) == "loss=640.0, nelbo=612.3, 50 cells/s, wait=12.5%, left=00:12"
    assert (bar.cells, bar.seconds, bar.wait) == (200, 4.0, 0.5)
    shown = capsys.readouterr().err
    assert "epoch 2/4: 100%" in shown
    assert "300/300 cells, loss=640.0, nelbo=612.3, 50 cells/s, wait=12.5%, left=00:12" in shown


def test_a_step_that_is_filled_up_does_not_pass_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(0, 1, 0, 10) as bar:
        bar.step(1.0, 8, 1.0, 0.0)
        bar.step(1.0, 8, 1.0, 0.0)
        assert bar.status(1.0) == "loss=1.0, 8 cells/s, wait=0.0%, left=00:00"
    assert "10/10 cells" in capsys.readouterr().err


def test_other_processes_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(0, 1, 0, 10, shown=False) as bar:
        bar.step(1.0, 5, 2.0, 1.0)
    assert (bar.cells_per_s, bar.wait_share) == (2.5, 0.5)
    assert capsys.readouterr().err == ""
