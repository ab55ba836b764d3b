"""What `import sedd` offers, and that it costs nothing until it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest


def test_every_public_name_is_there() -> None:
    import sedd

    for name in sedd.__all__:
        assert getattr(sedd, name) is not None
    assert set(sedd.__all__) <= set(dir(sedd))
    with pytest.raises(AttributeError, match="no attribute 'Frobnicator'"):
        sedd.Frobnicator  # noqa: B018


def test_the_road_has_its_three_names() -> None:
    import sedd.io
    from sedd.io import CellLoader, CellStore, convert

    assert callable(convert)
    assert convert is sedd.convert
    assert (CellLoader, CellStore) == (sedd.CellLoader, sedd.CellStore)


def test_the_help_does_not_wait_for_torch() -> None:
    code = "import sys; from sedd.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_the_version_is_the_same_wherever_it_stands_and_the_package_says_it_is_typed() -> None:
    import tomllib

    import yaml
    from conftest import ROOT

    import sedd

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert project["version"] == cited["version"] == sedd.__version__
    assert project["license"] == cited["license"]
    assert (ROOT / "sedd" / "py.typed").is_file() and "Typing :: Typed" in project["classifiers"]
