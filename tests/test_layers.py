"""The map of the code: nothing imports upward, listing costs nothing, files stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src" / "olive"
LAYERS = [
    {"errors", "machine"},
    {"config", "model", "resources", "rates"},
    {"target", "quant", "shared"},
    {"data", "cache", "remote", "recipes"},
    {"runtime", "inventory", "compat"},
    {"evaluate", "lineage"},
    {"train", "decoder"},
    {"passes"},
    {"goals"},
    {"workflow", "estimate"},
    {"plan", "report", "verify", "assign", "schema"},
    {"measure"},
    {"lock"},
    {"engine", "fits"},
    {"search"},
    {"html"},
    {"cli"},
    {"__main__"},
]
"""Low to high; a module imports from lower layers and from its own part only."""


def part(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{a.name}" for a in node.names] if node.module == "olive" else [node.module]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("olive.") and name != "olive.__version__"}
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_nothing_imports_upward(path: Path) -> None:
    height = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    own = part(path)
    if own == "__init__":
        return
    for name in imported(path) - {own}:
        assert height[name] < height[own], f"{path.name} ({own}) imports {name}"


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize(
    "code",
    [
        "import olive",
        "import olive.cli",
        "from olive.cli import main; main(['--help'])",
        "from olive.passes import PASSES, pass_class; [pass_class(name) for name in PASSES]",
        "from olive.evaluate.evaluators import EVALUATORS, evaluator_class; [evaluator_class(n) for n in EVALUATORS]",
        "from importlib import import_module as load\nfrom olive.cli import COMMANDS\n"
        "[load(module).parser('x') for module, _ in COMMANDS.values()]",
    ],
)
def test_listing_loads_no_tensor_library(code: str) -> None:
    heavy = {"torch", "numpy", "transformers", "onnx", "datasets"}
    probe = f"{code}\nimport sys\nprint(sorted(set(sys.modules) & {heavy}))"
    ended = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"
