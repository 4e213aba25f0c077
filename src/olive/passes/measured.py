"""The sensitivities that an allocation goes by, measured or read from an earlier run, and the rows they are about."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olive.data.spec import DataSpec
from olive.errors import ConfigError
from olive.model import Model
from olive.passes.base import Context
from olive.passes.calibrated import Calibrated, calibration_windows, gather
from olive.passes.held_back import ROWS, hold_back
from olive.passes.quantizer import BUDGET, Quantizer

if TYPE_CHECKING:
    from torch import Tensor

    from olive.quant.sensitivity import Unit
    from olive.quant.statistics import SavedStatistics


class Measured:
    """``units``, with the rows that were ``held`` back and the folder of the ``statistics`` of the others, for a
    quantizer that looks at some."""

    held: Tensor

    def __init__(self, quantizer: Quantizer, model: Model, ctx: Context) -> None:
        self.quantizer, self.model, self.ctx = quantizer, model, ctx
        self.statistics: Path | None = None
        self.units = self._units()

    def _units(self) -> list[Unit]:
        from olive.passes.sensitivity import Sensitivities
        from olive.quant.sensitivity import Unit
        from olive.quant.statistics import StatisticsWriter

        work = Sensitivities(self.quantizer, self.model, self.ctx)
        known = self._known(work.identity)
        ids = self._rows(known)
        file = self.ctx.scratch / "sensitivities.json"
        if self.quantizer.sensitivities is not None:
            file = Path(self.quantizer.sensitivities)
        folder = self._folder()
        found = _read(file, self._identity(ids))
        if found is None:
            units = work.measure(ids, known, folder if folder and not folder.exists() else None)
            _write(file, self._identity(ids), units)
            return units
        if folder and not folder.exists():
            if isinstance(self.quantizer, Calibrated) and self.quantizer.sequential:  # it needs the rows alone
                with StatisticsWriter(folder, work.identity, ids):
                    pass
            else:
                gather(self.model, self.ctx, ids, folder)
        return [Unit(u["name"], tuple(u["linears"]), u["divergence"]) for u in found]

    def _known(self, identity: Mapping[str, str]) -> SavedStatistics | None:
        from olive.quant.statistics import SavedStatistics

        given = getattr(self.quantizer, "statistics", None)
        return SavedStatistics(Path(given), identity) if given is not None else None

    def _rows(self, known: SavedStatistics | None) -> Tensor:
        """Return the calibration rows; others are held back. Saved statistics are of all their rows, so that those
        that are held back are of another text."""
        if known is None:
            data = self.quantizer.data or DataSpec()
            why = "target_size" if self.quantizer.target_size else "kl_budget"
            ids, self.held = hold_back(self.model, calibration_windows(data, self.model), why)
            return ids
        from olive.data.rows import heldout_text
        from olive.data.samples import text_windows
        from olive.runtime.torch_model import load_tokenizer

        tokenizer = load_tokenizer(self.model.path, self.model.trust_remote_code)
        self.held = text_windows(heldout_text(), tokenizer, known.ids.shape[1], ROWS)
        return known.ids

    def _folder(self) -> Path | None:
        """Return where statistics go for the quantizer that follows, if it looks at some and none are given."""
        looks = isinstance(self.quantizer, Calibrated) and self.quantizer.looks
        if not looks or getattr(self.quantizer, "statistics", None) is not None:
            return None
        kept = getattr(self.quantizer, "save_statistics", None)
        self.statistics = Path(kept) if kept is not None else self.ctx.scratch / "statistics"
        return self.statistics

    def _identity(self, ids: Tensor) -> dict[str, Any]:
        """Return what sensitivities depend on."""
        irrelevant = {*BUDGET, "bits", "data", "statistics", "save_statistics"}
        return {
            "model": self.ctx.input_key,
            "quantizer": type(self.quantizer).__name__.lower(),
            "options": self.quantizer.model_dump(mode="json", exclude=irrelevant),
            "rows": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
        }


def _read(file: Path, identity: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Read sensitivities; None if there are none yet."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or found.get("format") != "olive-sensitivities":
        raise ConfigError(f"sensitivities {file}: not a file of sensitivities; give another name, or remove it")
    differing = sorted(name for name, value in identity.items() if found["identity"].get(name) != value)
    if differing:
        raise ConfigError(
            f"sensitivities {file}: measured with another {' and '.join(differing)}; give another file, or remove it"
        )
    return list(found["units"])


def _write(file: Path, identity: Mapping[str, Any], units: Sequence[Unit]) -> None:
    text = json.dumps({"format": "olive-sensitivities", "identity": identity, "units": [asdict(u) for u in units]})
    file.parent.mkdir(parents=True, exist_ok=True)
    staged = file.with_name(f".{file.name}.new")
    staged.write_text(text + "\n", encoding="utf-8")
    staged.replace(file)
