"""What every test gets: no network, no cache in the home folder, one thread, the shared models if they are there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from places import SHARED

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TQDM_DISABLE"] = "1"
os.environ["OLIVE_CACHE_DIR"] = os.devnull + "/a-test-must-ask-for-the-cache-fixture"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the commands of a test a cache of their own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("OLIVE_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def shared_model(request: pytest.FixtureRequest) -> Path:
    """Return the folder of one of the shared trained models (parametrize indirectly); skip where they are absent."""
    folder = SHARED / "models" / request.param
    if not folder.is_dir():
        pytest.skip(f"needs the shared model {request.param}, which is not beside this checkout")
    return folder
