"""The command table, and what surrounds every command: help, errors, exit codes.

A command is a module with ``parser()`` and ``main(args)``; it is imported only when it is called.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import shlex
import signal
import sys
import tempfile
import warnings
from typing import Any

from olive import __version__
from olive.errors import ConfigError, OliveError, did_you_mean

COMMANDS = {
    "quantize": ("olive.cli.quantize", "quantize the weights of a checkpoint to 2 to 8 bits"),
    "finetune": ("olive.cli.finetune", "train a LoRA adapter on a float or quantized checkpoint"),
    "auto-opt": ("olive.cli.auto_opt", "turn a checkpoint, with adapters, into an optimized ONNX model"),
    "optimize": ("olive.cli.auto_opt", "the same as auto-opt"),
    "evaluate": ("olive.cli.evaluate", "measure a model: quality, tasks, speed, memory; beside another"),
    "generate": ("olive.cli.generate", "answer a prompt, or chat, with an ONNX model and its adapters"),
    "run": ("olive.cli.run", "run a workflow file (YAML or JSON)"),
    "report": ("olive.cli.report", "make the HTML page of a report again"),
    "reproduce": ("olive.cli.reproduce", "do the run of a lock file again and compare every byte"),
    "init": ("olive.cli.init", "ask what you want; write a workflow file and the command for it"),
    "plan": ("olive.cli.plan", "print what a workflow file would do, and what it needs"),
    "passes": ("olive.cli.passes", "list the passes, or explain one"),
    "cache": ("olive.cli.cache", "list, explain, shrink and check the cache of finished steps"),
    "schema": ("olive.cli.schema", "print the JSON schema of workflow files"),
    "dequantize": ("olive.cli.dequantize", "write a float checkpoint from a quantized one"),
    "convert-adapters": ("olive.cli.convert_adapters", "convert a PEFT adapter for an ONNX model built before"),
    "adapters": ("olive.cli.adapters", "list what an ONNX model takes of an adapter, or check adapters against it"),
}
INTERRUPTED = 130


def usage() -> str:
    """Return the text of ``olive --help``."""
    rows = "\n".join(f"  {name:<18}{text}" for name, (_, text) in COMMANDS.items())
    return (
        f"olive {__version__}: from a checkpoint to the best model for ONNX Runtime on your device.\n\n"
        f"usage: olive COMMAND [options]\n\ncommands:\n{rows}\n\n"
        "olive COMMAND --help lists a command's options.\n"
        "Exit codes: 0 done, 1 the run failed, 2 the input was at fault, 3 verification failed or a reproduced file\n"
        "differs, 130 interrupted."
    )


def main(argv: list[str]) -> int:
    """Run one command; every error ends here, as a message and an exit code."""
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True
        raise KeyboardInterrupt

    try:
        for number in (signal.SIGINT, signal.SIGTERM):  # clean up on termination as on Ctrl-C
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, stop)
        try:
            return _dispatch(argv)
        except Exception as error:
            if stopped:  # libraries that are being imported make errors of their own of it
                raise KeyboardInterrupt from error
            raise
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where it is handled that nobody reads any more
    except OliveError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; nothing half-written is left, finished steps are in the cache", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        logging.getLogger("olive").debug("traceback", exc_info=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f"{error.filename}: " if error.filename else ""
            print(f"error: {where}no space left while writing; free some, or set OLIVE_CACHE_DIR", file=sys.stderr)
            return 1
        kind = type(error).__name__
        print(f"error: {kind}: {error}\nThis is a defect of olive; --log_level 0 shows the traceback.", file=sys.stderr)
        return 1


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    name = argv[0].replace("_", "-")
    if name not in COMMANDS:
        raise ConfigError(f"olive: unknown command {argv[0]!r}{did_you_mean(name, COMMANDS)}")
    _refuse_namesake()
    return _run(name, argv[1:])


def _run(name: str, argv: list[str]) -> int:
    from olive.cli.options import normalize, parse_arguments

    command: Any = importlib.import_module(COMMANDS[name][0])
    args = parse_arguments(command.parser(f"olive {name}"), normalize(argv))
    args.command_line = shlex.join(["olive", name, *argv])
    _configure_logging(getattr(args, "log_level", 2))
    os.environ["PYTHONSAFEPATH"] = "1"  # what we start must not import a types.py of the folder that we run in

    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        raise ConfigError("no folder for temporary files can be written; set TMPDIR to one that can") from None
    return command.main(args)


def _configure_logging(level: int) -> None:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("olive").setLevel((logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, 50)[level])
    if level > 0:  # other libraries' chatter and bars are for debugging
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
        warnings.simplefilter("ignore", FutureWarning)


def _refuse_namesake() -> None:
    """The distribution olive-ai installs a package of the same import name; files of both would mix."""
    from importlib import metadata

    try:
        metadata.distribution("olive-ai")
    except metadata.PackageNotFoundError:
        return
    raise OliveError(
        "olive-ai is installed beside olive-onnx, and both are imported as 'olive'; run: "
        "pip uninstall olive-ai && pip install --force-reinstall --no-deps olive-onnx"
    )
