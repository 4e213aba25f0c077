"""The experts of a mixture-of-experts layer as linear layers of their own.

transformers 5 computes all experts of a layer in one module with fused parameters, ``gate_up_proj`` [E, 2 I, H] and
``down_proj`` [E, H, I] (E experts, I inner and H outer channels). Here such a module is replaced by one that holds
three linear layers per expert, under the names that checkpoints use for them, so that experts are streamed, watched,
quantized and written like any other linear layer. No class names are involved: fused modules are found by their
parameters, and replaced only where a small copy of the module computes the same as the replacement.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from olive.runtime.stored import Part

CONVENTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""What checkpoints call an expert's gate, up and down: Llama's MLP names, and those of Mixtral."""


class Expert(nn.Module):
    """``down(act(gate x) * up x)``, a gated linear unit (Shazeer, arXiv 2002.05202, 2020)."""

    def __init__(self, names: tuple[str, str, str], gate_up: Tensor, down: Tensor) -> None:
        """``gate_up`` [2 I, H] and ``down`` [H, I] are looked into, not copied."""
        super().__init__()
        self.names = names
        for name, weight in zip(names, (*gate_up.chunk(2), down), strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            self.add_module(name, linear)

    def forward(self, x: Tensor, act: Any) -> Tensor:
        """Map ``x`` [T, H] to [T, H]."""
        gate, up, down = (self.get_submodule(name) for name in self.names)
        out: Tensor = down(act(gate(x)) * up(x))
        return out


class Experts(nn.Module):
    """The experts of one layer, called like the fused module that they come from."""

    def __init__(self, fused: nn.Module, origin: str, names: tuple[str, str, str]) -> None:
        """``origin``: the fused module's own name; ``names``: what an expert's gate, up and down are called."""
        super().__init__()
        module: Any = fused
        self.origin, self.names = origin, names
        self.num_experts, self.hidden_dim, self.intermediate_dim = module.down_proj.shape
        self.act_fn = module.act_fn
        for i in range(self.num_experts):
            self.add_module(str(i), Expert(names, module.gate_up_proj.detach()[i], module.down_proj.detach()[i]))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum the chosen experts' outputs for tokens [T, H], with ``top_k_index`` int64 and ``top_k_weights`` [T, k].

        An expert that no token chose does not run.
        """
        out = torch.zeros_like(hidden_states)
        for i in top_k_index.unique().tolist():
            token, place = torch.where(top_k_index == i)
            chosen = self.get_submodule(str(i))(hidden_states[token], self.act_fn)
            out.index_add_(0, token, (chosen * top_k_weights[token, place, None]).to(out.dtype))
        return out

    def parts(self, path: str) -> Iterator[tuple[str, Part]]:
        """Yield each weight's name, given the name ``path`` of this module, and its place in the fused tensors."""
        gate, up, down = self.names
        inner = self.intermediate_dim
        for i in range(self.num_experts):
            yield f"{path}.{i}.{gate}.weight", Part(f"{self.origin}.gate_up_proj", i, 0, inner)
            yield f"{path}.{i}.{up}.weight", Part(f"{self.origin}.gate_up_proj", i, inner, 2 * inner)
            yield f"{path}.{i}.{down}.weight", Part(f"{self.origin}.down_proj", i, 0, self.hidden_dim)


def fused_experts(model: nn.Module) -> list[str]:
    """Return the modules that hold fused experts of any kind, whether or not they can be replaced."""
    return [name for name, module in model.named_modules() if any(p.dim() == 3 for p in _projections(module).values())]


def _projections(module: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in module.named_parameters(recurse=False) if n in ("gate_up_proj", "up_proj", "down_proj")}


def unfuse(model: nn.Module, stored: Iterable[str]) -> None:
    """Replace the fused experts of ``model`` where that changes nothing; the others stay as they are.

    ``stored``: the names of the checkpoint's tensors. Where it holds experts one by one, theirs are taken, and so is
    its name for the module around them; else the names that transformers would read.
    """
    modules = {name.rpartition(".")[0] for name in stored}
    for name in fused_experts(model):
        module = model.get_submodule(name)
        if not equivalent(module):  # asked for each: layers may clamp differently
            continue
        path, names = _stored_as(name, modules) or (name, _convention(model, name))
        model.set_submodule(name, Experts(module, name, names))
        around, _, own = name.rpartition(".")[0].rpartition(".")
        wanted = path.rpartition(".")[0].rpartition(".")[2]
        if own != wanted:
            _rename(model.get_submodule(around), own, wanted)


def equivalent(fused: nn.Module) -> bool:
    """Whether :class:`Experts` computes the same as ``fused``: run both with few and small random experts.

    Large inputs are tried too, since some families clamp (gpt-oss, DeepSeek-V4).
    """
    own = dict(fused.named_parameters(recurse=False))
    if own.keys() != {"gate_up_proj", "down_proj"} or own["down_proj"].dim() != 3:
        return False
    count, hidden, inner = own["down_proj"].shape
    if own["gate_up_proj"].shape != (count, 2 * inner, hidden):
        return False
    random = torch.Generator().manual_seed(0)
    small = {
        "gate_up_proj": nn.Parameter(torch.randn(3, 2 * 24, 16, generator=random) / 4, requires_grad=False),
        "down_proj": nn.Parameter(torch.randn(3, 16, 24, generator=random) / 5, requires_grad=False),
    }
    index = torch.tensor([[0, 2], [2, 0], [0, 2], [2, 0], [2, 0]])  # expert 1 is left out
    weights = torch.rand(index.shape, generator=random)
    x = torch.randn(len(index), 16, generator=random)
    try:
        # The copy gets the small tensors in place of the fused ones, which may be large.
        module: Any = copy.deepcopy(fused, {id(own[name]): small[name] for name in own})
        for attribute, value in {"num_experts": 3, "hidden_dim": 16, "intermediate_dim": 24}.items():
            if hasattr(module, attribute):
                setattr(module, attribute, value)
        replacement = Experts(module, "", CONVENTIONS[0])
        with torch.no_grad():
            for scale in (1.0, 1000.0):
                wanted, found = (m(x * scale, index, weights) for m in (module, replacement))
                if not torch.allclose(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())):
                    return False
    except Exception:  # whatever a foreign module raises on other sizes or arguments: it is not known to be the same
        return False
    return True


def _stored_as(name: str, modules: set[str]) -> tuple[str, tuple[str, str, str]] | None:
    """Find out what the checkpoint calls the experts at ``name`` and each expert's linears, if it holds them singly."""
    holder, _, own = name.rpartition(".")
    around = holder.rpartition(".")[0]
    for names in CONVENTIONS:
        if f"{name}.0.{names[0]}" in modules:
            return name, names
        ending = f".{own}.0.{names[0]}"
        for module in modules:
            path = module.removesuffix(ending)
            if path != module and path.rpartition(".")[0] == around:
                return f"{path}.{own}", names
    return None


def _convention(model: Any, name: str) -> tuple[str, str, str]:
    """Choose the names of an expert's linears that transformers merges into the fused module ``name``, if it does."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    rules = get_model_conversion_mapping(model)
    for names in CONVENTIONS:
        single, fused = f"{name}.0.{names[0]}.weight", f"{name}.gate_up_proj"
        if any(rule.rename_source_key(single)[0] == fused for rule in rules):
            return names
    return CONVENTIONS[0]


def _rename(module: nn.Module, old: str, new: str) -> None:
    """Register a child under another name. Its parent's code goes on using the old one, now a plain attribute, which
    no list of modules or parameters sees."""
    child = getattr(module, old)
    delattr(module, old)
    setattr(module, new, child)
    vars(module)[old] = child


def routers(model: nn.Module) -> set[str]:
    """Return the linears that choose experts or weigh a shared one; rounding them would send tokens elsewhere.

    They lie in a neighbour of the experts that gives E or 1 channels and never H.
    """
    found: set[str] = set()
    for name, experts in model.named_modules():
        if not isinstance(experts, Experts):
            continue
        holder = name.rpartition(".")[0]
        for child, neighbour in model.get_submodule(holder).named_children():
            linears = {n: m.out_features for n, m in neighbour.named_modules() if isinstance(m, nn.Linear)}
            sizes = set(linears.values())
            if neighbour is not experts and experts.hidden_dim not in sizes and sizes & {experts.num_experts, 1}:
                found |= {".".join(filter(None, (holder, child, n))) for n in linears}
    return found
