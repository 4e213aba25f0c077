"""Where the tests find what the repository ships, and the shared models beside it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
LAB_MODEL = ROOT / "examples" / "lab" / "model"
TRAVEL = ROOT / "examples" / "lab" / "data" / "data_sample_travel.jsonl"
TEMPLATE = r"<|user|>\n{prompt}<|end|>\n<|assistant|>\n{response}<|end|>"
