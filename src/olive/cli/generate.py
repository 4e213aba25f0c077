"""``olive generate``: one answer, or a chat, with an ONNX model and its adapters."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from olive.cli.options import Parser
from olive.cli.run import add_log_level
from olive.errors import ConfigError
from olive.model import open_model

if TYPE_CHECKING:
    from olive.runtime.genai import Generator


def parser(prog: str) -> Parser:
    """Return the command's parser."""
    own = Parser(prog, "Generate text with a folder that auto-opt wrote.")
    own.add_argument("-m", "--model_name_or_path", metavar="FOLDER", help="The ONNX model's folder.")
    own.add_argument("-p", "--prompt", metavar="TEXT", help="What to answer; else standard input is read.")
    own.add_argument(
        "--raw", action="store_true", help="Give the prompt to the model as text to go on from, without chat template."
    )
    own.add_argument("--interactive", action="store_true", help="Chat: answer each line until an empty one.")
    own.add_argument(
        "--adapter",
        action="append",
        metavar="NAME=FILE",
        help="An .onnx_adapter file (repeatable); without it the folder's own adapter is used.",
    )
    own.add_argument("--no_adapter", action="store_true", help="Use the base model alone.")
    own.add_argument("--use", metavar="NAME", help="The adapter that answers first; by default the first one.")
    own.add_argument("--max_new_tokens", type=int, default=256, metavar="N", help="Longest answer. Default: 256.")
    add_log_level(own)
    return own


def main(args: argparse.Namespace) -> int:
    """Generate."""
    if not hasattr(args, "model_name_or_path"):
        raise ConfigError("olive generate: --model_name_or_path (-m) is required")
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max_new_tokens {args.max_new_tokens}: give at least 1")
    for way, without in (("interactive", "prompt"), ("interactive", "raw"), ("no_adapter", "adapter")):
        if hasattr(args, way) and hasattr(args, without):
            raise ConfigError(f"--{without}: would not count beside --{way}; drop one of the two")
    model = open_model(Path(args.model_name_or_path))
    if model.kind != "onnx":
        raise ConfigError(f"{model.path}: is not an ONNX model; turn it into one with olive auto-opt first")
    adapters = _adapters(args, dict(model.adapters))
    active = getattr(args, "use", None) or next(iter(adapters), None)
    if active is not None and active not in adapters:
        raise ConfigError(f"--use {active}: no such adapter; given: {', '.join(adapters) or 'none'}")
    from olive.runtime.genai import Generator

    with Generator(model.path, adapters) as generator:
        if hasattr(args, "interactive"):
            return _chat(generator, args, active)
        prompt = args.prompt if hasattr(args, "prompt") else sys.stdin.read()
        _answer(generator, prompt, args, active)
    return 0


def _adapters(args: argparse.Namespace, own: dict[str, Path]) -> dict[str, Path]:
    if hasattr(args, "no_adapter"):
        return {}
    if not hasattr(args, "adapter"):
        return own
    found = {}
    for text in args.adapter:
        name, eq, file = text.partition("=")
        if not eq or not name:
            raise ConfigError(f"--adapter {text}: write NAME=FILE, for example travel=adapter_weights.onnx_adapter")
        if name in found:
            raise ConfigError(f"--adapter {text}: {name} is given twice; give each adapter a name of its own")
        if not Path(file).is_file():
            raise ConfigError(f"--adapter {text}: {file}: no such file")
        found[name] = Path(file)
    return found


def _answer(generator: Generator, prompt: str | list[int], args: argparse.Namespace, adapter: str | None) -> str:
    answer = generator.generate(
        prompt,
        adapter=adapter,
        max_new_tokens=args.max_new_tokens,
        chat=not hasattr(args, "raw"),
        on_token=lambda piece: print(piece, end="", flush=True),
    )
    print()
    print(
        f"{len(answer.tokens)} tokens, {answer.tokens_per_second:.1f} tokens per second "
        f"({answer.prompt_tokens} prompt tokens, {answer.prefill_tokens_per_second:.1f} per second)",
        file=sys.stderr,
    )
    return answer.text


def _chat(generator: Generator, args: argparse.Namespace, adapter: str | None) -> int:
    messages: list[dict[str, str]] = []
    print("An empty line ends the chat; /adapter NAME switches, /adapter alone uses the base.", file=sys.stderr)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return 0
        if not line:
            return 0
        if line.split()[0] == "/adapter":
            name = line.removeprefix("/adapter").strip() or None
            if name is not None and name not in generator.names:
                print(f"no adapter {name}; loaded: {', '.join(generator.names) or 'none'}", file=sys.stderr)
                continue
            adapter = name
            continue
        messages.append({"role": "user", "content": line})
        try:
            text = _answer(generator, generator.encode_chat(messages), args, adapter)
        except ConfigError as error:  # too long, as a rule: the chat so far is worth keeping
            print(f"error: {error}", file=sys.stderr)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": text})
