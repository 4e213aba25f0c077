"""Bit allocation: against uniform int4 at equal size, against all choices there are, and its predictions.

    python benchmarks/allocate.py uniform MODEL... --calibration books.txt --text other.txt --algorithm gptq
    python benchmarks/allocate.py exhaustive MODEL --calibration books.txt --text other.txt
    python benchmarks/allocate.py predictors MODEL... --calibration books.txt --rounding gptq
    python benchmarks/allocate.py sizes MODEL --calibration books.txt --text other.txt --setting tune,size_of=runtime \\
        --target 4.3bpw --target 4.4bpw [--keep FOLDER]

``uniform``: 4 bits in groups of 32 and of 128, then an allocation of the same algorithm that takes no more bytes.
``exhaustive``: the first 8 units of the model have three settings each, the others 4 bits in groups of 128; all 6,561
models are measured, and the solver's choice is compared with the best of those that are no larger, for several sizes.
``predictors``: random mixes of settings, their true divergence on rows that nothing was measured on, and how well sums
over units predict it: of the output error alone, of the output error weighted by the Fisher information of each
layer's output (K-FAC: Martens and Grosse, arXiv 1503.05671, 2015), and as Olive does it, of divergences measured for
some settings of each unit and read off the error for the others. ``sizes``: some targets of one setting.

Windows of 512 tokens, no special tokens, float32, all positions. One markdown row each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from olive.cache import Cache
from olive.engine import run as execute
from olive.plan import plan
from olive.quant.allocate import Choice, least_loss
from olive.quant.sensitivity import corners, parts, scale, stored_bytes
from olive.report import Report
from olive.runtime.torch_model import load, load_tokenizer
from olive.workflow import read_workflow

WINDOW = 512
SIZES = (32, 128)
EXHAUSTIVE = ("2:64", "3:64", "4:64")
MIXED = ["2:32", "2:64", "2:128", "3:32", "3:64", "3:128", "4:32", "4:64", "4:128", "4:256", "8:128"]


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["uniform", "exhaustive", "predictors", "sizes"])
    parser.add_argument("model", nargs="+")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--algorithm", nargs="+", default=["gptq"])
    parser.add_argument("--setting", nargs="+", default=["gptq"])
    parser.add_argument("--target", nargs="+", default=[])
    parser.add_argument("--rounding", choices=["rtn", "gptq"], default="gptq")
    parser.add_argument("--mixes", type=int, default=45)
    parser.add_argument("--keep")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    {"uniform": uniform, "exhaustive": exhaustive, "predictors": predictors, "sizes": sizes}[args.what](args)


def uniform(args: Any) -> None:
    """Compare allocations with one setting for all layers."""
    print("| model | algorithm | setting | bytes | bits per weight | KL divergence | perplexity | top-1 | seconds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for path, algorithm in itertools.product(args.model, args.algorithm):
        measured = Text(args, path)
        with tempfile.TemporaryDirectory() as folder:
            for size in SIZES:
                report = quantize(args, path, Path(folder), {"type": algorithm, "bits": 4, "group_size": size})
                row = measured.compare(Path(folder, "out"))
                _print(path, algorithm, f"4:{size}", report, row)
                step = {"target_size": f"{report.output_bytes}B", "sensitivities": str(Path(folder, "sensitivities"))}
                report = quantize(args, path, Path(folder), {"type": algorithm} | step)
                _print(path, algorithm, f"allocated within {size}", report, measured.compare(Path(folder, "out")))


def sizes(args: Any) -> None:
    """Measure allocations for some targets."""
    print("| model | algorithm | setting | bytes | bits per weight | KL divergence | perplexity | top-1 | seconds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for path, setting in itertools.product(args.model, args.setting):
        measured, step = Text(args, path), read_setting(setting)
        with tempfile.TemporaryDirectory() as folder:
            for target in args.target or [None]:
                budget = {"target_size": target, "sensitivities": str(Path(folder, "sensitivities"))} if target else {}
                report = quantize(args, path, Path(folder), step | budget)
                _print(path, setting, target or "as given", report, measured.compare(Path(folder, "out")))
                if args.keep and target == args.target[-1]:
                    Path(folder, "out").rename(args.keep)


def _print(path: str, algorithm: str, setting: str, report: Report, row: dict[str, float]) -> None:
    found = report.steps[0].facts.get("allocation", {})
    told = f"{found['bits_per_weight']:.3f} ({found['size_of']})" if found else "-"
    cells = [Path(path).name, algorithm, setting, f"{report.output_bytes:,}", told, f"{row['kl']:.4f}"]
    cells += [f"{row['perplexity']:.2f}", f"{row['top1']:.3f}", f"{report.seconds:.0f}"]
    print(f"| {' | '.join(cells)} |", flush=True)
    if found:
        settings = {name.removeprefix("model.layers."): unit["setting"] for name, unit in found["units"].items()}
        print(f"<!-- predicted {found['predicted_kl']:.4f}, held back {found['kl_divergence']:.4f}: {settings} -->")


def read_setting(text: str) -> dict[str, Any]:
    """Read an algorithm with options of its pass: gptq,symmetric=true."""
    name, *options = text.split(",")
    step: dict[str, Any] = {"type": name}
    for option in options:
        key, _, value = option.partition("=")
        try:
            step[key] = json.loads(value)
        except ValueError:
            step[key] = value
    return step


def quantize(args: Any, path: str, folder: Path, step: dict[str, Any]) -> Report:
    """Run one pass into ``folder``/out, without a cache."""
    if step["type"] not in ("rtn", "hqq") or "target_size" in step:
        held_back = 8 if "target_size" in step else 0  # so that all quantizers see as many
        data = {"files": [args.calibration], "max_samples": args.windows + held_back, "max_seq_len": WINDOW}
        step = step | {"data": data}
    made = {"input_model": {"path": path}, "passes": [step], "output_dir": str(folder / "out")}
    workflow = read_workflow(made | {"compute_device": args.device, "verify": {"level": "files"}})
    with tempfile.TemporaryDirectory() as cache:
        return execute(plan(workflow, Cache(Path(cache))), Cache(Path(cache)))


class Text:
    """A text, and the float model's distributions on it."""

    def __init__(self, args: Any, path: str) -> None:
        self.device = args.device
        tokenizer = load_tokenizer(Path(path))
        self.ids = windows(tokenizer, args.text, args.tokens).to(args.device)
        self.model = load(Path(path), device=args.device).requires_grad_(False)
        self.expected = list(self.logits(self.model))

    @torch.no_grad()
    def logits(self, model: Any) -> Iterator[torch.Tensor]:
        """Yield the log-probabilities of some windows at a time."""
        torch.set_float32_matmul_precision("highest")  # on a GPU the quantizers lower it
        for rows in self.ids.split(16):
            yield torch.log_softmax(model(input_ids=rows, use_cache=False).logits.float(), -1)

    def divergence(self, model: Any) -> float:
        """Return the KL divergence of a model from the float one."""
        pairs = zip(self.expected, self.logits(model), strict=True)
        total = sum((p.exp() * (p - q)).sum(-1).clamp_min(0).double().sum() for p, q in pairs)
        return float(total) / self.ids.numel()

    def compare(self, folder: Path) -> dict[str, float]:
        """Return the KL divergence, the perplexity and the top-1 agreement of a checkpoint."""
        model, loss, same = load(folder, device=self.device), 0.0, 0
        for ids, p, q in zip(self.ids.split(16), self.expected, self.logits(model), strict=True):
            loss -= float(q[:, :-1].gather(-1, ids[:, 1:, None]).double().sum())
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
        count = len(self.ids) * (WINDOW - 1)
        figures = {"perplexity": math.exp(loss / count), "top1": same / self.ids.numel()}
        return {"kl": self.divergence(model)} | figures


def windows(tokenizer: Any, path: str, limit: int) -> torch.Tensor:
    """Return the first tokens of a text in windows [rows, T]."""
    text = Path(path).read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
    count = len(ids[:limit]) // WINDOW
    return ids[: count * WINDOW].view(count, WINDOW)


def exhaustive(args: Any) -> None:
    """Measure all choices of three settings for 8 units, and the solver's."""
    (path,) = args.model
    text = Text(args, path)
    with tempfile.TemporaryDirectory() as folder:
        report = quantize(args, path, Path(folder), {"type": "rtn", "target_size": "4bpw"})
    units = report.steps[0].facts["allocation"]["units"]
    modules = linears_of(text.model, list(units))
    names = list(units)[:8]
    from olive.quant.affine import round_to_nearest
    from olive.quant.formats.layout import Grouping

    weights = {name: text.model.get_submodule(name).weight.data.clone() for unit in units for name in modules[unit]}

    def put(unit: str, setting: str) -> None:
        for name in modules[unit]:
            rounded = round_to_nearest(weights[name], *parts(setting), symmetric=False)
            text.model.get_submodule(name).weight.data = rounded.dequantize()

    def stored(unit: str, setting: str) -> int:
        group = Grouping(*parts(setting))
        return sum(stored_bytes("gptq", *weights[name].shape, group, False) for name in modules[unit])

    for unit in units:
        put(unit, "4:128")
    table = [[Choice(stored(u, s), units[u]["sensitivity"][s]) for s in EXHAUSTIVE] for u in names]
    true: dict[tuple[int, ...], float] = {}
    previous = (-1,) * len(names)
    for chosen in itertools.product(range(len(EXHAUSTIVE)), repeat=len(names)):
        for i, unit in enumerate(names):
            if previous[i] != chosen[i]:
                put(unit, EXHAUSTIVE[chosen[i]])
        previous = chosen
        true[chosen] = text.divergence(text.model)
    size = {chosen: sum(t[i].size for t, i in zip(table, chosen, strict=True)) for chosen in true}
    weight = sum(weights[name].numel() for unit in names for name in modules[unit])
    print("| bits per weight | KL, best of all | KL, solver | solver / best | settings, best | settings, solver |")
    print("|---|---|---|---|---|---|")
    for bits in (2.8, 3.0, 3.25, 3.5, 3.75, 4.0, 4.25):
        capacity = int(bits * weight / 8)
        best = min((c for c in true if size[c] <= capacity), key=lambda c: true[c])
        found = tuple(least_loss(table, capacity) or ())
        told = [" ".join(EXHAUSTIVE[i].split(":")[0] for i in c) for c in (best, found)]
        ratio = true[found] / true[best]
        print(f"| {bits} | {true[best]:.5f} | {true[found]:.5f} | {ratio:.4f} | {told[0]} | {told[1]} |", flush=True)


def linears_of(model: Any, units: list[str]) -> dict[str, list[str]]:
    """Return the linears of each unit of a dense model: q, k, v go together, and so do gate and up."""
    together = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    found: dict[str, list[str]] = {unit: [] for unit in units}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            around, _, own = name.rpartition(".")
            found[f"{around}.{together.get(own, own)}"].append(name)
    return found


def predictors(args: Any) -> None:
    """Compare what predicts the divergence of mixed models."""
    print("| model | rounding | mixes | predictor | rank correlation | spread of the ratio | predicted / true |")
    print("|---|---|---|---|---|---|---|")
    for path in args.model:
        _predictors(args, path)


def _predictors(args: Any, path: str) -> None:
    model = load(Path(path), device=args.device).requires_grad_(False)
    torch.set_float32_matmul_precision("highest")
    ids = windows(load_tokenizer(Path(path)), args.calibration, 1 << 30)
    ids = ids[:: len(ids) // 36][:36].to(args.device)
    held = torch.zeros(36, dtype=torch.bool)
    held[4::9] = True
    held, ids = ids[held], ids[~held]
    units: dict[str, list[str]] = {}
    together = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            around, _, own = name.rpartition(".")
            units.setdefault(f"{around}.{together.get(own, own)}", []).append(name)
    gram = _second_moments(model, ids, [name for names in units.values() for name in names])
    fisher = _fisher(model, ids[:8], [name for names in units.values() for name in names])
    weights = {name: model.get_submodule(name).weight.data.clone() for names in units.values() for name in names}
    rounded: dict[tuple[str, str], torch.Tensor] = {}
    error: dict[str, dict[tuple[str, str], float]] = {"output error": {}, "output error, Fisher": {}}
    for unit, names in units.items():
        for setting in MIXED:
            plain = weighted = 0.0
            for name in names:
                rounded[name, setting] = _round(weights[name], gram[name], setting, args.rounding)
                change = rounded[name, setting] - weights[name]
                seen = change @ gram[name]
                plain += float((seen * change).sum())
                weighted += float(((fisher[name] @ seen) * change).sum()) / 2
            error["output error"][unit, setting] = plain
            error["output error, Fisher"][unit, setting] = weighted

    def put(unit: str, setting: str | None) -> None:
        for name in units[unit]:
            model.get_submodule(name).weight.data = rounded[name, setting] if setting else weights[name]

    judge = _Divergence(model, ids[[3, 10, 19, 27]])
    read_off: dict[tuple[str, str], float] = {}
    for unit in units:
        measured = {}
        for probe in corners(MIXED):
            put(unit, probe)
            measured[probe] = judge.of(model)
        put(unit, None)
        found = scale({s: error["output error"][unit, s] for s in MIXED}, measured)
        read_off |= {(unit, setting): value for setting, value in found.items()}
    judge = _Divergence(model, held)
    rng = random.Random(0)
    pools = {"2 to 4 bits": MIXED[:10], "3 and 4 bits": MIXED[3:10], "4 and 8 bits": MIXED[6:]}
    for told, pool in pools.items():
        mixes = [{unit: rng.choice(pool) for unit in units} for _ in range(args.mixes // 3)]
        true = []
        for mix in mixes:
            for unit, setting in mix.items():
                put(unit, setting)
            true.append(judge.of(model))
        for name, losses in (error | {"measured and read off": read_off}).items():
            guess = [sum(losses[item] for item in mix.items()) for mix in mixes]
            ratio = [math.log(g / t) for g, t in zip(guess, true, strict=True)]
            cells = [
                Path(path).name,
                args.rounding,
                told,
                name,
                f"{statistics.correlation(_ranks(guess), _ranks(true)):.3f}",
            ]
            cells += [f"{statistics.pstdev(ratio):.3f}", f"{math.exp(statistics.mean(ratio)):.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)
        for unit in units:
            put(unit, None)


def _ranks(values: list[float]) -> list[float]:
    order = sorted(values)
    return [float(order.index(value)) for value in values]


class _Divergence:
    """The float model's distributions on some rows."""

    def __init__(self, model: Any, rows: torch.Tensor) -> None:
        self.rows = rows
        self.expected = list(self._run(model))

    @torch.no_grad()
    def _run(self, model: Any) -> Iterator[torch.Tensor]:
        for row in self.rows.split(1):
            yield torch.log_softmax(model(input_ids=row, use_cache=False).logits, -1)

    def of(self, model: Any) -> float:
        """Return the KL divergence of a model."""
        pairs = zip(self.expected, self._run(model), strict=True)
        return sum(float((p.exp() * (p - q)).sum()) for p, q in pairs) / self.rows.numel()


def _round(weight: torch.Tensor, gram: torch.Tensor, setting: str, rounding: str) -> torch.Tensor:
    from olive.quant.affine import fitting_group, round_to_nearest
    from olive.quant.gptq import with_ranges
    from olive.quant.refine import refine

    bits, size = parts(setting)
    size = fitting_group(weight.shape[1], size) or size
    if rounding == "rtn":
        return round_to_nearest(weight, bits, size, symmetric=False).dequantize()
    found = with_ranges(weight, gram, bits, size, symmetric=False, damping=0.01)
    return refine(weight, gram, found, 1).dequantize()


def _second_moments(model: Any, ids: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    """Return the Gram matrix of each linear's input."""
    return _gather(model, names, lambda: [_forward(model, rows) for rows in ids.split(4)], ids.numel(), inputs=True)


@torch.no_grad()
def _forward(model: Any, rows: torch.Tensor) -> None:
    model(input_ids=rows, use_cache=False)


def _fisher(model: Any, ids: torch.Tensor, names: list[str], samples: int = 2) -> dict[str, torch.Tensor]:
    """Return the second moments of the gradient of each linear's output, for labels drawn from the model."""
    torch.manual_seed(0)

    def run() -> None:
        for rows in [*ids.split(2)] * samples:
            embedded = model.get_input_embeddings()(rows).detach().requires_grad_()
            logits = model(inputs_embeds=embedded, use_cache=False).logits.flatten(0, 1)
            labels = torch.distributions.Categorical(logits=logits.detach()).sample()
            torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()

    return _gather(model, names, run, ids.numel() * samples, inputs=False)


def _gather(
    model: Any, names: list[str], run: Callable[[], Any], tokens: int, *, inputs: bool
) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    def add(name: str, x: torch.Tensor) -> None:
        x = x.detach().flatten(0, -2).float()
        found[name] = found.get(name, 0) + x.T @ x / tokens

    def hook(name: str) -> Any:
        if inputs:
            return lambda _, args: add(name, args[0])
        return lambda _, __, out: out.register_hook(lambda gradient: add(name, gradient)) and None

    modules = [(name, model.get_submodule(name)) for name in names]
    kind = "register_forward_pre_hook" if inputs else "register_forward_hook"
    handles = [getattr(module, kind)(hook(name)) for name, module in modules]
    run()
    for handle in handles:
        handle.remove()
    return found


if __name__ == "__main__":
    main()
