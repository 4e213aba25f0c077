"""What a pass is: its options as fields, and one method from a model on disk to a model on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from olive.config import Config
from olive.model import Model
from olive.target import Target


@dataclass(frozen=True)
class Context:
    """What a running pass may use."""

    out: Path
    """Empty folder; the pass writes nothing else."""
    input_key: str
    """Key of the model that the pass gets."""
    scratch: Path
    """Folder keyed like the step that survives a kill; removed once the step is done."""
    target: Target
    """Where the finished model will run."""
    compute_device: str
    """Where the pass computes: ``cpu`` or ``cuda``."""
    seed: int
    """Seed of everything random."""
    digest: Callable[[Path], str]
    """SHA-256 of a file; one that was read for the keys is not read again."""
    note: Callable[..., None]
    """``note(name=fact)`` records a fact for the report."""
    progress: Callable[[str, int, int], None]
    """``progress(what, done, total)`` moves the progress bar."""


class Pass(Config):
    """Base of every pass.

    ``accepts`` and ``produces`` are model kinds; ``sources`` are the modules (dotted names) whose code decides the
    result, ``libraries`` the distributions whose version does: both are part of the step's cache key.
    """

    accepts: ClassVar[tuple[str, ...]] = ()
    produces: ClassVar[str] = ""
    sources: ClassVar[tuple[str, ...]] = ()
    libraries: ClassVar[tuple[str, ...]] = ()
    targets: ClassVar[tuple[str, ...]] = ()
    """Execution providers that the pass builds for; the target is then part of the key. Empty: it does not matter."""
    changes_model: ClassVar[bool] = True
    """The base model itself changes, so that it has to be compared with its source."""

    def __init_subclass__(
        cls,
        accepts: str | tuple[str, ...] = (),
        produces: str = "",
        sources: tuple[str, ...] = (),
        libraries: tuple[str, ...] = (),
        targets: tuple[str, ...] = (),
        changes_model: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init_subclass__(**kwargs)
        cls.accepts = (accepts,) if isinstance(accepts, str) else accepts or cls.accepts
        cls.produces = produces or cls.produces
        cls.sources = (*cls.sources, *sources)
        cls.libraries = (*cls.libraries, *libraries)
        cls.targets = targets or cls.targets
        cls.changes_model = cls.changes_model if changes_model is None else changes_model

    def folders(self) -> tuple[Path, ...]:
        """Folders besides the model that the pass reads; their contents are part of the step's key."""
        return ()

    def alone(self) -> Pass:
        """Return the same work without what it writes besides its output."""
        return self

    def missing(self) -> bool:
        """Tell whether something besides the output is asked for and not there: a cached output is not enough."""
        return False

    def run(self, model: Model, ctx: Context) -> Model:
        """Turn ``model`` into a new model under ``ctx.out``."""
        raise NotImplementedError
