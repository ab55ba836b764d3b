"""What fuzzing found does not come back, and bytes changed at random end in a `UserError` or well; `tools/fuzz.py` looks for more."""

from __future__ import annotations

import importlib.util
import tarfile
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

FOUND = ROOT / "tests" / "fuzzed"


def _fuzz() -> Any:
    spec = importlib.util.spec_from_file_location("tools_fuzz", ROOT / "tools" / "fuzz.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FUZZ = _fuzz()


@pytest.fixture(scope="module", params=FUZZ.TARGETS)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = FUZZ.TARGETS[request.param](tmp_path_factory.mktemp(request.param))
    made.name = request.param
    return made


def test_a_good_file_is_read(target: Any) -> None:
    for seed in target.seeds:
        target.read(seed)


def test_what_was_found_once_ends_in_an_error_for_users(target: Any) -> None:
    for path in sorted((FOUND / target.name).glob("*")):
        FUZZ.quiet(target.read)(path.read_bytes())


def test_what_an_hour_of_fuzzing_kept_ends_in_an_error_for_users(target: Any) -> None:
    read, n_read = FUZZ.quiet(target.read), 0
    with tarfile.open(FOUND / "corpus.tar.xz") as corpus:
        for member in corpus:
            if member.isfile() and member.name.startswith(f"{target.name}/"):
                file = corpus.extractfile(member)
                assert file is not None
                read(file.read())
                n_read += 1
    assert n_read > 10


def test_bytes_changed_at_random_end_in_an_error_for_users(target: Any) -> None:
    random, read = np.random.default_rng(0), FUZZ.quiet(target.read)
    for seed in target.seeds:
        for _ in range(20):
            changed = bytearray(seed or bytes(17))
            for place in random.integers(0, len(changed), random.integers(1, 17)):
                changed[place] = random.integers(256)
            read(bytes(changed[: random.integers(1, 2 * len(changed))]))
        read(b"")


def test_what_is_no_error_for_users_is_a_finding() -> None:
    def fails(_: bytes) -> None:
        raise KeyError("X")

    with pytest.raises(KeyError):
        FUZZ.quiet(fails)(b"")
