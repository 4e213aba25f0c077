"""Train the codes and scales of all layers of a quantized model together, so that it predicts what the float one does.

Source: Liu et al., "LLM-QAT: Data-Free Quantization Aware Training for Large Language Models", arXiv 2305.17888 (2023):
the float model is the teacher, and most of the text is its own. Each code becomes a real number that is rounded in the
forward pass; gradients pass the rounding unchanged (Bengio et al., arXiv 1308.3432, 2013). Scales are trained too. The
start is good already (:mod:`olive.quant.tune`), so the steps are small.

Shape letters: B rows, T tokens, V vocabulary, N out channels, K in channels, S group size, G = K / S groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from olive.quant.affine import QuantizedWeight
from olive.quant.linear import QuantLinear

PROMPT = 4
"""Tokens of a real text that the model goes on from."""
CACHE = {"cpu": 1 << 30, "cuda": 1 << 33}
"""Bytes of keys and values of the rows that are written at a time, at most."""
ROWS = 8
"""Rows of a step."""
LOGITS = 1 << 27
"""Values of the logits that are in memory at a time, of each model; a step's rows are split if need be."""
INSIDE = 0.45
"""How far from its code a number may start: at 0.5 it would round to the next one."""
WARMUP = 50
"""Steps in which the rate rises: Adam's first ones are as large as they can be."""

Tick = Callable[[int], None]


class TrainedLinear(nn.Module):
    """A linear layer that computes with rounded codes and passes gradients to codes and scales.

    Unlike :class:`olive.quant.tune.TunedLinear`, whose codes follow their scale so that the weight stays: over the many
    steps here that came out behind.
    """

    def __init__(self, start: QuantizedWeight, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.start, self.bias = start, bias
        self.scale = start.scale.float().unsqueeze(-1)  # [N, G, 1]
        self.zero_point = start.zero_point.float().unsqueeze(-1)
        codes = start.codes.view(len(weight), start.scale.shape[1], -1).float()  # [N, K] -> [N, G, S]
        exact = weight.view_as(codes) / self.scale + self.zero_point
        # The weight itself where it rounds to the start's code, else the nearest value that safely does.
        self.codes = nn.Parameter(codes + (exact - codes).clamp_(-INSIDE, INSIDE))
        self.factor = nn.Parameter(torch.ones_like(self.scale))

    def rounded(self) -> Tensor:
        """Return codes [N, G, S]."""
        return self.codes.round().clamp(0, 2**self.start.bits - 1)

    def forward(self, x: Tensor) -> Tensor:
        inside = self.codes.clamp(0, 2**self.start.bits - 1)  # where it clamps there is no gradient
        codes = inside + (self.rounded() - inside).detach()
        weight = ((codes - self.zero_point) * (self.scale * self.factor)).flatten(1)  # [N, G, S] -> [N, K]
        return functional.linear(x, weight, self.bias)

    @torch.no_grad()
    def result(self) -> QuantizedWeight:
        """Return what is to be stored."""
        codes = self.rounded().to(torch.uint8).flatten(1)
        scale = (self.scale * self.factor).squeeze(-1).to(self.start.scale.dtype)
        return replace(self.start, codes=codes, scale=scale)


def write_rows(model: Any, prompts: Tensor, length: int, tick: Tick = lambda _: None) -> Tensor:
    """Return rows [B, length] that ``model`` writes itself, going on from ``prompts`` int64 [B, P]: each token is drawn
    from its distribution, but no row ends early."""
    rows, shape = [], model.config.get_text_config()
    row_bytes = 2 * 4 * length * shape.num_hidden_layers * shape.hidden_size
    for part in prompts.split(max(1, CACHE[prompts.device.type] // row_bytes)):
        # A cache that grows would take several times its size from the allocator.
        ends = {"eos_token_id": model.generation_config.eos_token_id, "pad_token_id": 0}
        cache = {"cache_implementation": "static", "disable_compile": True}
        plain = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
        new = length - part.shape[1]
        made = model.generate(
            part, attention_mask=torch.ones_like(part), max_new_tokens=new, min_new_tokens=new, **plain, **ends, **cache
        )
        rows.append(made)
        tick(sum(map(len, rows)))
    return torch.cat(rows)


def divergence(teacher: Any, student: Any, rows: Tensor) -> Tensor:
    """Return the KL divergence of the student's next tokens from the teacher's, in nats, mean over ``rows`` [B, T]."""
    with torch.no_grad():
        expected = torch.log_softmax(teacher(input_ids=rows, use_cache=False).logits.float(), -1)  # [B, T, V]
    found = torch.log_softmax(student(input_ids=rows, use_cache=False).logits.float(), -1)
    return (expected.exp() * (expected - found)).sum(-1).mean()


def distill(
    teacher: Any,
    student: nn.Module,
    start: Mapping[str, QuantizedWeight],
    floats: Callable[[str], Tensor],
    rows: Tensor,
    *,
    steps: int,
    rate: float,
    seed: int,
    tick: Tick = lambda _: None,
) -> dict[str, QuantizedWeight]:
    """Train the linears of ``student`` that have integers in ``start``, on ``rows`` int64 [B, T]; put what comes of
    them into it, and return that.

    ``floats`` gives the weights [N, K] that were quantized. ``rate`` is the largest step of Adam, in units of a code,
    and of a scale as a share of it.
    """
    student.requires_grad_(False)
    trained = {}
    for name, weight in start.items():
        linear: Any = student.get_submodule(name)
        trained[name] = TrainedLinear(weight, floats(name), linear.bias)
        student.set_submodule(name, trained[name])
    optimizer = torch.optim.Adam([p for linear in trained.values() for p in linear.parameters()], betas=(0.9, 0.99))
    at_once = max(1, min(ROWS, LOGITS // (rows.shape[1] * len(teacher.get_output_embeddings().weight))))
    order = _endless(len(rows), seed)
    for step in range(steps):
        chosen = rows[[next(order) for _ in range(ROWS)]]
        for part in chosen.split(at_once):
            (divergence(teacher, student, part) * (len(part) / len(chosen))).backward()
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.step()
        optimizer.zero_grad()
        tick(step + 1)
    found = {name: linear.result() for name, linear in trained.items()}
    put(student, found)
    return found


def put(model: nn.Module, weights: Mapping[str, QuantizedWeight]) -> None:
    """Let linears of a model compute with these integers."""
    for name, weight in weights.items():
        linear: Any = model.get_submodule(name)
        model.set_submodule(name, QuantLinear(weight, linear.bias))


def _endless(count: int, seed: int) -> Iterator[int]:
    """Yield the numbers below ``count`` in a random order, then in another, and so on."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
