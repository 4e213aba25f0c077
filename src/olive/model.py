"""A model on disk: its folder, its adapters, the manifest ``olive.json`` and the digests of its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from olive.errors import ConfigError

MANIFEST = "olive.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Model:
    """A model that a pass reads or has written; the files under ``path`` are never changed in place."""

    kind: str
    """``hf`` (config.json and weights) or ``onnx`` (model.onnx, genai_config.json)."""
    path: Path
    """Folder that holds the model's files."""
    adapters: Mapping[str, Path] = field(default_factory=dict)
    """Adapters by name: PEFT folders beside an ``hf`` model, ``.onnx_adapter`` files of an ``onnx`` one."""
    trust_remote_code: bool = False
    """The user trusts Python code that comes with the checkpoint."""
    title: str = ""
    """How messages call a model whose folder the user has not named."""

    @property
    def name(self) -> str:
        """How messages call it."""
        return self.title or self.path.name


def open_model(folder: Path, adapter: Path | None = None, *, trust_remote_code: bool = False) -> Model:
    """Open a local folder: one of our outputs (``olive.json``), a Hugging Face checkpoint or an ONNX folder."""
    if not folder.exists():
        raise ConfigError(f"{folder}: no such model folder")
    if not folder.is_dir():
        raise ConfigError(f"{folder}: is a file; give the model's folder")
    manifest = read_manifest(folder) or {}
    above = read_manifest(folder.parent) or {}
    if not manifest and above.get("kind") == "onnx" and above.get("model") == folder.name:
        folder, manifest = folder.parent, above  # the model/ folder of an output stands for the output
    adapters = {name: folder / entry["path"] for name, entry in manifest.get("adapters", {}).items()}
    path = folder / manifest.get("model", ".")
    if adapter is not None:
        if not (adapter / "adapter_config.json").is_file():
            raise ConfigError(f"{adapter}: not a PEFT adapter folder (no adapter_config.json)")
        nameless = adapter.name in ("", "..")  # the current folder, or one above it
        adapters = {(adapter.resolve() if nameless else adapter).name: adapter}
    if (path / "genai_config.json").is_file() or any(path.glob("*.onnx")):
        return Model("onnx", path, adapters, trust_remote_code)
    if (path / "config.json").is_file():
        return Model("hf", path, adapters, trust_remote_code)
    if (path / "model" / "config.json").is_file():
        raise ConfigError(f"{folder}: no config.json here; did you mean {folder / 'model'}?")
    raise ConfigError(f"{folder}: not a model folder: it has neither config.json (Hugging Face) nor an .onnx file")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the folder's manifest, or None where there is none of ours."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("format") == "olive" else None


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write ``olive.json``; ``files`` maps every other file to its SHA-256."""
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def files(folder: Path) -> Iterator[str]:
    """Yield the relative names of a folder's files in order, without hidden ones and the root's manifest."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST and not any(part.startswith(".") for part in name.split("/")):
            yield name


def sha256(path: Path) -> str:
    """Digest one file, as hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digests(folder: Path, digest: Callable[[Path], str] = sha256) -> dict[str, str]:
    """Digest every file of a folder, by relative name; ``digest`` may remember what it has seen."""
    names = list(files(folder))
    with ThreadPoolExecutor() as threads:
        return dict(zip(names, threads.map(lambda name: digest(folder / name), names), strict=True))


def fingerprint(folder: Path, digest: Callable[[Path], str] = sha256) -> str:
    """Digest a folder's contents; its place and its manifest do not count."""
    listing = "".join(f"{name} {value}\n" for name, value in digests(folder, digest).items())
    return hashlib.sha256(listing.encode()).hexdigest()


def weights_digest(folder: Path, digest: Callable[[Path], str] = sha256) -> str:
    """Digest what an adapter is trained on: the configuration and the weights of a checkpoint."""
    names = [n for n in files(folder) if n == "config.json" or n.endswith((".safetensors", ".bin"))]
    return hashlib.sha256("".join(f"{n} {digest(folder / n)}\n" for n in names).encode()).hexdigest()
