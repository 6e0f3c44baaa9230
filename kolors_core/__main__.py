"""The command `kolors`, or `python -m kolors_core`: subcommands, each imported when it is called."""

# PYTHON_ARGCOMPLETE_OK
import os
import signal
import sys
import threading
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any, NamedTuple

from kolors_core.config import VERSION
from kolors_core.validation import did_you_mean


class Command(NamedTuple):
    """Command: the function that builds its parser, the module of its `main`, and that one's first flag."""

    parser: str
    main: str
    flags: tuple[str, ...] = ()


COMMANDS = {
    "draw": Command("kolors_core.cli.parsers:draw_parser", "kolors_core.cli.generate"),
    "explain": Command("kolors_core.cli.parsers:explain_parser", "kolors_core.cli.explain"),
    "info": Command("kolors_core.cli.parsers:info_parser", "kolors_core.cli.generate", ("--info",)),
    "plan": Command("kolors_core.cli.parsers:plan_parser", "kolors_core.cli.generate", ("--plan",)),
    "ui": Command("kolors_core.ui.__main__:parser", "kolors_core.ui.__main__"),
    "batch": Command("kolors_core.batch.__main__:parser", "kolors_core.batch.__main__"),
    "train-lora": Command("kolors_core.cli.train_lora:parser", "kolors_core.cli.train_lora"),
    "export": Command("kolors_core.cli.parsers:export_parser", "kolors_core.cli.export"),
    "convert": Command("weights_convert.__main__:parser", "weights_convert.__main__"),
    "env": Command("kolors_core.cli.parsers:env_parser", "kolors_core.cli.env"),
}
HELP = f"""\
usage: kolors PROMPT [flags]
       kolors COMMAND ... [flags]

Kolors {VERSION}: images from Chinese or English prompts. Flags of a command: kolors COMMAND --help.
an image
  draw         generate an image of a prompt; the command where none is named
                 kolors "一张瓢虫的照片" -o ladybug.png
                 kolors "a red hat" --image cat.png --mask mask.png -o hat.webp
                 kolors "a cat" -w Kwai-Kolors/Kolors-diffusers --variant fp16 --seed 7
  explain      show where in an image each token of its prompt acted
                 kolors explain "a red car" -o car
  info         print what an image says of itself; kolors --from FILE draws it again
                 kolors info ladybug.png
  plan         print the memory that images need, before anything is loaded
                 kolors plan -w Kwai-Kolors/Kolors-diffusers --height 1024 --device cuda

  ui           open a page to draw, compare and look inside, on this machine
                 kolors ui --port 8000

many images
  batch        generate an image for each line of a file, on any number of processes; resumes
                 kolors batch prompts.txt OUT --steps 25

models
  train-lora   learn a thing or a style from a few images
                 kolors train-lora photos zorp -o zorp.safetensors
  export       write the models as programs of torch.export, ONNX or AOTInductor
                 kolors export tiny OUT --to onnx
  convert      rename a checkpoint's tensors to those of this library, or back
                 kolors convert Kolors-diffusers Kolors.safetensors --to single

other
  env          print versions, devices and kernels, for a report of a fault
                 kolors env > machine.txt
  --concepts   list what the embedded model, the default, can draw
  --version    print the version
  -h, --help   print this

Paths of what was written are printed on standard output, all else on standard error.
Exit status: 0; 1 if a line of a batch failed; 2 after an error, with one line; 130 after Ctrl-C.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return _run(arguments)
    except KeyboardInterrupt:  # commands catch theirs
        print("interrupted", file=sys.stderr)
        return 130


def _run(arguments: list[str]) -> int:
    if "_ARGCOMPLETE" in os.environ:
        _complete(os.environ["COMP_LINE"].split()[1:])
    if arguments[:1] in (["-h"], ["--help"]):
        print(HELP, end="")
        return 0
    if arguments[:1] == ["--version"]:
        print(f"kolors_core {VERSION}")
        return 0
    name = _command_of(arguments)
    command, rest = COMMANDS[name], arguments[arguments[:1] == [name] :]
    if name == "draw" and not rest:
        print("error: no prompt: say what to draw, or kolors --help", file=sys.stderr)
        return 2
    with _ended_by_interrupt():
        _load(command.parser)().parse_args(rest)  # help and wrong flags, before torch is imported
        module = import_module(command.main)
    return module.main([*command.flags, *rest])


@contextmanager
def _ended_by_interrupt() -> Iterator[None]:
    """End the process at Ctrl-C: an exception while torch is imported may be lost, or abort it."""

    def end(*_: object) -> None:
        os.write(2, b"interrupted\n")
        os._exit(130)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield  # somebody else's handler, or none that can be set
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _command_of(arguments: Sequence[str]) -> str:
    """Return the name of the command; SystemExit where two words are no command and its argument."""
    first, *others = [*arguments, ""]
    if first in COMMANDS:
        return first
    if first and not first.startswith("-") and others[0] and not others[0].startswith("-"):
        got = f"expected one prompt or a command, got {first[:100]!r} and {others[0][:100]!r}"
        hint = did_you_mean(first, COMMANDS) or ": put a prompt of several words in quotes"
        print(f"error: {got}{hint}", file=sys.stderr)
        raise SystemExit(2)
    return "draw"


def _load(place: str) -> Callable[[], "ArgumentParser"]:
    """Import a function that builds a parser."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def _complete(words: Sequence[str]) -> None:
    """Print the completions of a line for the shell, and end the process, if argcomplete is installed."""
    with suppress(ImportError):
        from argcomplete import autocomplete
        from argcomplete.completers import ChoicesCompleter

        name = next((word for word in words[:1] if word in COMMANDS), None)
        parser = _load(COMMANDS[name or "draw"].parser)()
        if name is None:
            prompt: Any = next(action for action in parser._actions if action.dest == "prompt")
            prompt.completer = ChoicesCompleter(dict.fromkeys(COMMANDS, ""))
        else:
            own, parser = parser, ArgumentParser()
            parser.add_subparsers().add_parser(name, parents=[own], add_help=False)
        autocomplete(parser)


if __name__ == "__main__":
    raise SystemExit(main())
