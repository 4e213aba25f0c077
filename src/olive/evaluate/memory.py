"""The memory that a model needs to answer, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from olive.errors import OliveError
from olive.evaluate.evaluators import Evaluator, Measuring
from olive.model import Model


@dataclass(frozen=True)
class Job:
    """What the process does: see :func:`answer`."""

    model: Model
    adapter: Path | None
    prompt_tokens: int
    new_tokens: int
    dims: dict[str, int]


class Memory(Evaluator):
    """Peak of the resident memory of a fresh process that loads the model and answers once.

    Language models in ONNX answer in GenAI, checkpoints in transformers (float32, on the CPU); of other graphs one run
    is done. The interpreter and the libraries count: they have to be there too.
    """

    names = ("peak_memory",)

    prompt_tokens: int = Field(128, ge=1)
    """Length of the prompt."""
    new_tokens: int = Field(16, ge=1)
    """Length of the answer."""
    dims: dict[str, int] = Field(default_factory=dict)
    """Sizes of symbolic dimensions, for graphs that are no language models."""

    def measure(self, model: Model, ctx: Measuring) -> dict[str, float]:
        job = {
            "kind": model.kind,
            "path": str(model.path),
            "trust_remote_code": model.trust_remote_code,
            "adapter": None if ctx.adapter is None else str(ctx.adapter),
            "options": self.model_dump(),
        }
        ended = subprocess.run(
            [sys.executable, "-m", "olive.evaluate.memory", json.dumps(job)], capture_output=True, text=True
        )
        lines = ended.stdout.splitlines()
        if ended.returncode or not lines or not lines[-1].isdigit():
            reason = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
            raise OliveError(f"{model.path}: the process that measures memory failed: {reason}")
        return {"peak_memory": float(lines[-1])}


def answer(job: Job) -> None:
    """Load the model and use it once."""
    if job.model.kind == "hf":
        _transformers(job)
    elif (job.model.path / "genai_config.json").is_file():
        _genai(job)
    else:
        from olive.evaluate.latency import dummy_inputs, graph_file, open_graph

        session = open_graph(graph_file(job.model.path))
        session.run(None, dummy_inputs(session, job.dims, 0, str(job.model.path)))


def _genai(job: Job) -> None:
    from olive.data.rows import heldout_text
    from olive.runtime.genai import Generator

    adapters = {"adapter": job.adapter} if job.adapter is not None else {}
    with Generator(job.model.path, adapters) as generator:
        prompt = generator.encode(heldout_text())[: job.prompt_tokens]
        name = next(iter(adapters), None)
        for _ in generator.stream(prompt, adapter=name, max_new_tokens=job.new_tokens, to_the_end=True):
            pass


def _transformers(job: Job) -> None:
    import torch

    from olive.data.rows import heldout_text
    from olive.runtime.torch_model import load, load_adapted, load_tokenizer

    path, trust = job.model.path, job.model.trust_remote_code
    model: Any = (
        load(path, trust_remote_code=trust)
        if job.adapter is None
        else load_adapted(path, job.adapter, trust_remote_code=trust)
    )
    ids = load_tokenizer(path, trust)(heldout_text(), return_tensors="pt", verbose=False).input_ids
    prompt = ids[:, : job.prompt_tokens]
    with torch.no_grad():
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=job.new_tokens,
            min_new_tokens=job.new_tokens,
            do_sample=False,
        )


def peak() -> int:
    """Return the largest resident memory that this process has had, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count what the parent had when it started this process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def _main(text: str) -> None:
    said = json.loads(text)
    adapter = None if said["adapter"] is None else Path(said["adapter"])
    model = Model(said["kind"], Path(said["path"]), {}, said["trust_remote_code"])
    try:
        answer(Job(model, adapter, **said["options"]))
    except OliveError as error:
        sys.exit(str(error).replace("\n", " "))
    sys.stdout.write(f"{peak()}\n")


if __name__ == "__main__":
    _main(sys.argv[1])
