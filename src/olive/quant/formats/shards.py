"""Safetensors files read one tensor at a time, and written in shards of bounded size.

Files are read with ``pread`` rather than mapped: a memory map counts as resident memory in a container.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from io import BufferedIOBase
from pathlib import Path
from typing import Any, TypeVar

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
MAX_BYTES = 4 << 30
"""Bytes of tensors in one file."""
T = TypeVar("T")


class Shards(Mapping[str, Tensor]):
    """The tensors of a checkpoint folder's safetensors files, by name; each access reads from disk."""

    def __init__(self, files: list[Path]) -> None:
        self._where: dict[str, tuple[Path, str, tuple[int, ...], int, int]] = {}
        for path in files:
            for name, entry, start in _header(path):
                begin, end = entry["data_offsets"]
                self._where[name] = (path, entry["dtype"], tuple(entry["shape"]), start + begin, end - begin)

    def __getitem__(self, name: str) -> Tensor:
        _, dtype, shape, _, size = self._where[name]
        return self._read(name, 0, size).view(DTYPES[dtype]).view(shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows ``start`` to ``stop`` (of the first dimension) of a tensor alone."""
        _, dtype, shape, _, size = self._where[name]
        row = size // shape[0]
        return self._read(name, start * row, (stop - start) * row).view(DTYPES[dtype]).view(stop - start, *shape[1:])

    def _read(self, name: str, skip: int, size: int) -> Tensor:
        path, _, _, offset, _ = self._where[name]
        offset += skip
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
        return tensor

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


def ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield ``items``, the next of which is made on a thread while the caller works on the last."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = reader.submit(next, items, None)
            yield item


class ShardWriter:
    """Write tensors to a folder as one or several safetensors files, each tensor straight to disk, on a thread.

    A file begins with a header that names all its tensors. Room for it is kept while they are written; what is left of
    it is filled with spaces, as the format allows. With a ``scratch`` folder the files grow there beside a journal of
    what is finished: a writer that is killed goes on from its last :meth:`mark`.
    """

    ENTRY = 192
    """Bytes of header per tensor: its name, type, shape and place as JSON."""
    WAITING = 256 << 20
    """Bytes that may wait to be written."""

    def __init__(
        self, folder: Path, tensors: int = 100, max_bytes: int = MAX_BYTES, *, scratch: Path | None = None
    ) -> None:
        """``tensors``: about how many will come; where more do, further files are begun."""
        self.folder, self.place, self.max_bytes = folder, scratch or folder, max_bytes
        self.marks: dict[str, Any] = {}
        """What is marked as finished, by a killed writer before this one too, with the facts given then."""
        self._journal = scratch / "journal" if scratch else None
        self._room = self.ENTRY * (tensors + 2)
        self._file: BufferedIOBase | None = None
        self._parts: list[dict[str, Any]] = []
        self._sizes: list[int] = []
        self._checksums: list[int] = []
        self._marked = (0, 0)
        self._thread = ThreadPoolExecutor(1)
        self._jobs: deque[tuple[Future[None], int]] = deque()
        if self._journal is not None:
            self._go_on(self._journal)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor."""
        self.begin(name, tensor.dtype, tuple(tensor.shape))
        self.rows(tensor)

    def begin(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Announce a tensor whose rows follow by :meth:`rows`; begin a new file where this one is full."""
        size = math.prod(shape) * dtype.itemsize
        if self._file is not None:
            too_big = self._sizes[-1] + size > self.max_bytes
            if self._parts[-1] and (too_big or self.ENTRY * (len(self._parts[-1]) + 2) > self._room):
                self._finish()
        if self._file is None:
            self._file = self._part(len(self._parts)).open("wb")
            self._file.seek(8 + self._room)
            self._parts.append({})
            self._sizes.append(0)
            self._checksums.append(0)
        place = [self._sizes[-1], self._sizes[-1] + size]
        self._parts[-1][name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": place}
        if len(json.dumps(self._parts[-1][name])) + len(name) + 8 > self.ENTRY:
            raise ValueError(f"{name}: too long a name for the header")
        self._sizes[-1] = place[1]

    def rows(self, rows: Tensor) -> None:
        """Write the next rows of the tensor at hand."""
        raw = rows.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy()
        file, part = self._file, len(self._parts) - 1
        assert file is not None

        def write() -> None:
            file.write(raw.data)
            if self._journal is not None:
                self._checksums[part] = zlib.crc32(raw.data, self._checksums[part])

        self._jobs.append((self._thread.submit(write), raw.nbytes))
        while self._jobs and sum(size for _, size in self._jobs) > self.WAITING:
            self._jobs.popleft()[0].result()

    def mark(self, name: str, facts: Any) -> None:
        """Note in the journal that all tensors so far are written; ``facts`` are kept with it."""
        self.marks[name] = facts
        if self._journal is None or self._file is None:
            return
        self._wait()
        self._file.flush()
        first, known = self._marked
        news = [list(self._parts[first].items())[known:], *(list(part.items()) for part in self._parts[first + 1 :])]
        line = {
            "mark": name, "facts": facts, "first": first, "news": news,
            "sizes": self._sizes, "checksums": self._checksums,
        }  # fmt: skip
        with self._journal.open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(line) + "\n")
        self._marked = (len(self._parts) - 1, len(self._parts[-1]))

    def _go_on(self, journal: Path) -> None:
        """Take over what a killed writer had marked, if it is all there; else begin anew."""
        sizes: list[int] = []
        checksums: list[int] = []
        whole = 0
        for text in journal.read_bytes().splitlines(keepends=True) if journal.is_file() else []:
            if not text.endswith(b"\n"):
                break  # the kill came while this line was written
            whole, line = whole + len(text), json.loads(text)
            for number, entries in enumerate(line["news"], line["first"]):
                self._parts += [{}] if number == len(self._parts) else []
                self._parts[number] |= dict(entries)
            self.marks[line["mark"]], sizes, checksums = line["facts"], line["sizes"], line["checksums"]
        found = [self._checksum(number, size) for number, size in enumerate(sizes)]
        if not sizes or found != checksums:
            self.marks, self._parts = {}, []
            journal.unlink(missing_ok=True)
            return
        os.truncate(journal, whole)
        self._sizes, self._checksums = sizes, checksums
        self._marked = (len(self._parts) - 1, len(self._parts[-1]))
        last = self._part(len(self._parts) - 1)
        os.truncate(last, 8 + self._room + sizes[-1])
        self._file = last.open("r+b")
        self._file.seek(0, os.SEEK_END)

    def _checksum(self, number: int, size: int) -> int:
        found, path = 0, self._part(number)
        if not path.is_file() or path.stat().st_size < 8 + self._room + size:
            return -1
        with path.open("rb") as file:
            file.seek(8 + self._room)
            while size and (chunk := file.read(min(size, 1 << 24))):
                found, size = zlib.crc32(chunk, found), size - len(chunk)
        return found

    def read(self, name: str) -> Tensor:
        """Read back a tensor that was marked as written."""
        number, entry = next((i, part[name]) for i, part in enumerate(self._parts) if name in part)
        begin, end = entry["data_offsets"]
        with self._part(number).open("rb") as file:
            file.seek(8 + self._room + begin)
            raw = torch.frombuffer(bytearray(file.read(end - begin)), dtype=torch.uint8)
        return raw.view(DTYPES[entry["dtype"]]).view(entry["shape"])

    def names(self) -> list[str]:
        """Return the tensors so far."""
        return [name for part in self._parts for name in part]

    def _wait(self) -> None:
        while self._jobs:
            self._jobs.popleft()[0].result()

    def _finish(self) -> None:
        """Write the header of the file at hand and close it."""
        self._wait()
        assert self._file is not None
        header = json.dumps({"__metadata__": {"format": "pt"}, **self._parts[-1]}, separators=(",", ":")).encode()
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._room) + header.ljust(self._room))
        self._file.close()
        self._file = None

    def _part(self, number: int) -> Path:
        return self.place / f"part-{number:05d}.safetensors"

    def close(self) -> None:
        """Finish the last file, give the files their final names and write the index if there are several."""
        self._finish()
        self._thread.shutdown()
        count = len(self._parts)
        if count == 1:
            self._part(0).rename(self.folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._parts):
            final = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": sum(self._sizes)}, "weight_map": weight_map}
        (self.folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
