"""A tiny checkpoint that the searches start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny import checkpoint


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    checkpoint(folder, "llama")
    return folder
