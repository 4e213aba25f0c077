"""Fetch a model that is named rather than given: a Hugging Face id, an Azure ML registry address."""

from __future__ import annotations

import re
from pathlib import Path

from olive.errors import ConfigError

FILES = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja", "*.py"]


def fetch(path: str, revision: str | None = None) -> tuple[Path, str | None]:
    """Return the local folder of a model and, for a hub id, the commit. Offline, what the hub's cache holds is used."""
    if path.startswith("azureml:"):
        raise ConfigError(
            f"{path}: Azure ML addresses are recognised but not built yet; download the model and give its folder"
        )
    folder = Path(path).expanduser()
    if folder.exists():
        return folder, None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or Path(path.split("/")[0]).exists() or path.startswith("."):
        raise ConfigError(f"{path}: no such model folder (and not a Hugging Face id of the form owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = Path(snapshot_download(path, revision=revision, allow_patterns=FILES))
    except LocalEntryNotFoundError:
        raise ConfigError(
            f"{path}: neither a folder here nor in the Hugging Face cache, and the hub cannot be reached; "
            "give a folder, or download it on a machine with network"
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ConfigError(f"{path}: the Hugging Face hub refused: {str(error).splitlines()[0]}") from None
    return found, found.name
