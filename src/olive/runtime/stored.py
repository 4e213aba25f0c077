"""A checkpoint's tensors under the names that the model gives them, still read one at a time.

transformers renames tensors as it loads them (vision-language models got a new order of their parts in 2025), and
computes some from others. What is only renamed, and experts that are stored fused, need no computing: they are read
where they lie.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from olive.quant.formats.shards import Shards


@dataclass(frozen=True)
class Part:
    """Where one expert's weight lies in a fused tensor: rows ``start`` to ``stop`` of its matrix ``expert``."""

    fused: str
    expert: int
    start: int
    stop: int


class Stored(Shards):
    """Tensors of other :class:`Shards`, renamed or cut out of fused ones."""

    def __init__(self, shards: Shards, places: Mapping[str, str | Part]) -> None:
        """``places``: for each name the stored tensor's name, or the part of one."""
        self._shards, self._places = shards, dict(places)

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        return self._shards[place] if isinstance(place, str) else self.rows(name, 0, place.stop - place.start)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows ``start`` to ``stop`` (of the first dimension) of a tensor alone."""
        place = self._places[name]
        if isinstance(place, str):
            return self._shards.rows(place, start, stop)
        matrix = self._shards.rows(place.fused, place.expert, place.expert + 1)[0]  # [E, N, K] -> [N, K]
        return matrix[place.start + start : place.start + stop].clone()  # a view would keep the whole matrix

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        place = self._places[name]
        if isinstance(place, str):
            return self._shards.shape(place)
        return (place.stop - place.start, self._shards.shape(place.fused)[2])

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor, from the header alone."""
        place = self._places[name]
        return self._shards.dtype(place if isinstance(place, str) else place.fused)

    def nbytes(self, name: str) -> int:
        """Size of a tensor in bytes, from the header alone."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize


def under_model_names(shards: Shards, model: Any, parts: Mapping[str, Part]) -> Shards | None:
    """Return ``shards`` under the names of ``model``'s parameters, or None if transformers has to compute some.

    ``parts``: the weights of experts by name, and where they lie if they are stored fused. Shapes are compared, so that
    a tensor that is stored transposed is not taken for one that is not.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    computed = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    inside: dict[str, list[str]] = {}
    for name, part in parts.items():
        inside.setdefault(part.fused, []).append(name)
    places: dict[str, str | Part] = {}
    for stored in shards:
        name = stored
        if name not in wanted:
            for rule in renamings:
                name, _ = rule.rename_source_key(name)
        if name not in parts and any(rule.rename_source_key(name)[1] is not None for rule in computed):
            continue
        found: dict[str, str | Part] = {name: stored}
        if name in inside:
            found = {own: replace(parts[own], fused=stored) for own in inside[name]}
        if places.keys() & found.keys():
            return None
        places |= found
    seen = Stored(shards, places)
    if any(name not in seen or seen.shape(name) != shape for name, shape in wanted.items()):
        return None
    return shards if all(name == place for name, place in places.items()) else seen
