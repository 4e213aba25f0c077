"""A tiny checkpoint that the searches start from, and locks of the tests' own."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tiny import checkpoint


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    checkpoint(folder, "llama")
    return folder


@pytest.fixture(autouse=True)
def _own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's locks lie in the temporary folder: other searches on this machine should not be waited for."""
    (tmp_path / "locks").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "locks"))
    monkeypatch.setenv("RAY_TMPDIR", "/" + "tmp")  # the names of its sockets must be short
    monkeypatch.setattr(tempfile, "tempdir", None)
