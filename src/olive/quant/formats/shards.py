"""Safetensors files read one tensor at a time, and written in shards of bounded size.

Files are read with ``pread`` rather than mapped: a memory map counts as resident memory in a container.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from io import BufferedWriter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olive.errors import ConfigError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"


class Shards(Mapping[str, Tensor]):
    """The tensors of a checkpoint folder's safetensors files, by name; each access reads from disk."""

    def __init__(self, files: list[Path]) -> None:
        self._where: dict[str, tuple[Path, str, tuple[int, ...], int, int]] = {}
        for path in files:
            for name, entry, start in _header(path):
                begin, end = entry["data_offsets"]
                self._where[name] = (path, entry["dtype"], tuple(entry["shape"]), start + begin, end - begin)

    def __getitem__(self, name: str) -> Tensor:
        path, dtype, shape, offset, size = self._where[name]
        tensor = torch.empty(size, dtype=torch.uint8)  # not a bytearray, whose bytes would be zeroed first
        with path.open("rb", buffering=0) as file:
            view, done = memoryview(tensor.numpy().data), 0
            while done < size:
                got = os.preadv(file.fileno(), [view[done : done + (1 << 26)]], offset + done)
                if got == 0:
                    raise ConfigError(f"{path}: truncated: tensor {name} ends past the end of the file")
                done += got
            if size > 1 << 20 and hasattr(os, "posix_fadvise"):  # weights are read once; leave the page cache to others
                os.posix_fadvise(file.fileno(), offset, size, os.POSIX_FADV_DONTNEED)
        return tensor.view(DTYPES[dtype]).view(shape)

    def __contains__(self, name: object) -> bool:
        return name in self._where  # Mapping's own way would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return self._where[name][2]

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor, from the header alone."""
        return DTYPES[self._where[name][1]]

    def nbytes(self, name: str) -> int:
        """Size of a tensor in bytes, from the header alone."""
        return self._where[name][4]


def _header(path: Path) -> Iterator[tuple[str, dict, int]]:
    """Yield name, entry and start of the data for each tensor of a file, having checked that the file is whole."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, 100_000_000):
                raise ValueError(f"header of {length} bytes")
            header = json.loads(file.read(length))
            if not isinstance(header, dict):
                raise ValueError("header is not an object")
    except FileNotFoundError:
        raise ConfigError(f"{path}: missing, though the checkpoint's index names it") from None
    except (OSError, struct.error, ValueError) as error:
        raise ConfigError(f"{path}: not a safetensors file ({error}); fetch it again") from None
    header.pop("__metadata__", None)
    start = 8 + length
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ConfigError(f"{path}: tensor {name} has type {entry['dtype']}, which is not supported")
        begin, end = entry["data_offsets"]
        if end - begin != math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize:
            raise ConfigError(f"{path}: damaged: tensor {name} is not as long as its shape says; fetch it again")
        if start + end > size:
            raise ConfigError(f"{path}: truncated: tensor {name} ends past the end of the file; fetch it again")
        yield name, entry, start


def find(folder: Path) -> list[Path]:
    """List a checkpoint's safetensors files: those that its index names, else the single file."""
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"{index}: not a safetensors index ({error!r})") from None
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


class ShardWriter:
    """Write tensors to a folder as one or several safetensors files, each tensor straight to disk.

    A file begins with a header that names all its tensors. Room for it is kept while they are written; what is left of
    it is filled with spaces, as the format allows.
    """

    ENTRY = 192
    """Bytes of header per tensor: its name, type, shape and place as JSON."""

    def __init__(self, folder: Path, tensors: int = 100, max_bytes: int = 4 << 30) -> None:
        """``tensors``: about how many will come; where more do, further files are begun."""
        self.folder, self.max_bytes = folder, max_bytes
        self._room = self.ENTRY * (tensors + 2)
        self._file: BufferedWriter | None = None
        self._header: dict[str, Any] = {}
        self._bytes = self._total = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; begin a new file where this one is full."""
        raw = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy()
        full = self._bytes + raw.nbytes > self.max_bytes or self.ENTRY * (len(self._header) + 2) > self._room
        if self._header and full:
            self._finish()
        if self._file is None:
            self._file = self._part(len(self._shards)).open("wb")
            self._file.seek(8 + self._room)
        place = [self._bytes, self._bytes + raw.nbytes]
        self._header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        if len(json.dumps(self._header[name])) + len(name) + 8 > self.ENTRY:
            raise ValueError(f"{name}: too long a name for the header")
        self._file.write(raw.data)
        self._bytes = place[1]

    def _finish(self) -> None:
        """Write the header of the file at hand and close it."""
        assert self._file is not None
        header = json.dumps({"__metadata__": {"format": "pt"}, **self._header}, separators=(",", ":")).encode()
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._room) + header.ljust(self._room))
        self._file.close()
        self._shards.append(list(self._header))
        self._total += self._bytes
        self._file, self._header, self._bytes = None, {}, 0

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.safetensors"

    def close(self) -> None:
        """Finish the last file, give the files their final names and write the index if there are several."""
        self._finish()
        count = len(self._shards)
        if count == 1:
            self._part(0).rename(self.folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            final = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        (self.folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
