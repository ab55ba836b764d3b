"""The command line: `sedd quick | convert | info | verify | train | impute | denoise | generate | embed | annotate | score | evaluate | runs | export`.

Each command is a dataclass (its fields are the flags) with a `run` method. The modules that do the work are imported by
the command that needs them, so `sedd --help` answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import os
import re
import select
import shlex
import sys
import typing
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from sedd import __version__
from sedd.commands import COMMANDS
from sedd.config import TrainConfig
from sedd.config_files import config_file_arguments, environment_arguments
from sedd.errors import SeddWarning, UserError, counted, without_secrets
from sedd.options import fields_to_show, meanings_of
from sedd.shipped import Quick
from sedd.training.stopping import EXIT_INTERRUPTED, TrainingInterrupted, follow_launcher, report_status

_TYRO = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.DisallowNone)
_RULES = ConstructorRegistry()
_SAYS_IF_NOT_GIVEN = re.compile(r"if not given|by default|without it|without a number")

CLASSES: dict[str, Any] = {"quick": Quick, "train": TrainConfig, **COMMANDS}
"""The dataclass of each command; the first two are run by this file, the others run themselves."""

PURPOSES = {
    "See what it does": ("quick",),
    "Prepare data": ("convert", "verify"),
    "Train a model": ("train", "runs"),
    "Use a model": ("impute", "denoise", "generate", "embed", "annotate", "score"),
    "Judge it and hand it on": ("evaluate", "export"),
    "Look at any of these": ("info",),
}
"""What commands are for; the overview lists them so."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv
        The words after the program's name; `sys.argv[1:]` if not given.

    Returns
    -------
    status
        0 done; 1 failed while running; 2 bad input, with one line on standard error; 75 stopped by SIGTERM or SIGUSR1
        with the state saved; 130 stopped by Ctrl-C. An output that is read no more ends it by a BrokenPipeError.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"sedd {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    status = _run(name, rest)
    if name == "train":
        report_status(status)
    return status


def _run(name: str, rest: list[str]) -> int:
    with warnings.catch_warnings():
        warnings.showwarning = partial(_show_warning, set())
        warnings.simplefilter("always", SeddWarning)
        try:
            if name == "train":
                return _train(rest)
            if name == "quick":
                return _quick(rest)
            if name not in COMMANDS:
                raise UserError(f"unknown command {name!r}; expected one of {', '.join(CLASSES)}.")
            return int(_parse(COMMANDS[name], name, rest).run() or 0)
        except UserError as error:
            print(f"sedd {name}: error: {error}", file=sys.stderr)
            return 2
        except TrainingInterrupted as stopped:
            print(f"sedd {name}: {stopped}", file=sys.stderr)
            return stopped.exit_code
        except KeyboardInterrupt as stopped:  # a command that can be continued says how
            print(f"sedd {name}: {str(stopped) or 'interrupted'}", file=sys.stderr)
            return EXIT_INTERRUPTED
        except (OSError, FloatingPointError, MemoryError) as error:
            if isinstance(error, BrokenPipeError) and _reader_left():
                raise
            said, notes = without_secrets(str(error)) or type(error).__name__, getattr(error, "__notes__", ())  # such as what is kept for --resume
            print(f"sedd {name}: error: {' '.join([f'{said}.' if notes else said, *notes])}", file=sys.stderr)
            return 1


def _reader_left() -> bool:
    """Whether nobody reads what this process prints any more."""
    streams = select.poll()
    for number in (1, 2):
        streams.register(number, 0)  # of an error it tells anyway
    return any(event & select.POLLERR for _, event in streams.poll(0))


def _train(arguments: list[str]) -> int:
    if arguments == ["--flags_from_environment"]:  # for bash/train.sh
        sys.stdout.write("".join(f"{word}\0" for word in environment_arguments(os.environ)))
        return 0
    config: TrainConfig = _parse(TrainConfig, "train", _expand_config_files(arguments))
    follow_launcher()
    from sedd.processes import is_main
    from sedd.trainer import SEDDTrainer

    trainer = SEDDTrainer(config)
    history = trainer.fit()
    if history and is_main() and not config.run.dry_run:
        best, directory = min(history, key=lambda entry: entry["val_nelbo"]), shlex.quote(config.run.checkpoint_dir)
        data = shlex.quote(without_secrets(trainer.data_path))
        print(
            f"sedd train: {counted(len(history), 'epoch')} done; the best is {best['epoch']}, {best['val_nelbo']:.1f} nats per held-out cell. "
            f"Next: sedd evaluate {directory} {data} -o {directory}",
            file=sys.stderr,
        )
    return 0


def _quick(arguments: list[str]) -> int:
    """Run the commands of a quick run until one fails; what `quick` does not know are flags of the training."""
    quick, training = _parse(Quick, "quick", arguments, others_too=True)
    return next((status for name, *words in quick.commands(training) if (status := _run(name, words))), 0)


def _expand_config_files(arguments: list[str]) -> list[str]:
    """Replace `--config FILE` by the settings of the file, in front, so that the rest of the command line wins."""
    from_files: list[str] = []
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--config":
            path = next(words, None)
            if path is None:
                raise UserError("--config needs a file; expected --config FILE.yaml.")
            from_files += config_file_arguments(path)
        elif word.startswith("--config="):
            from_files += config_file_arguments(word.removeprefix("--config="))
        else:
            rest.append(word)
    return from_files + rest


def _parse(cls: Any, name: str, arguments: list[str], *, others_too: bool = False) -> Any:
    epilogue = {"train": "\n\n--config FILE.yaml sets any of these; the command line wins."}
    description = inspect.cleandoc(cls.__doc__ or "") + epilogue.get(name, "")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(  # type: ignore[call-overload]
                cls, args=arguments, prog=f"sedd {name}", description=description, config=_TYRO, registry=_RULES, use_underscores=True, return_unknown_args=others_too
            )  # fmt: skip
    except SystemExit as stopped:
        if stopped.code in (0, None):
            raise
        raise UserError(_one_line(said.getvalue()) + f" (`sedd {name} --help` lists the options.)") from None


@_RULES.struct_rule
def _as_listed(asked: StructTypeInfo) -> StructConstructorSpec | None:
    """Return how a dataclass of settings is shown: in the order of `fields_to_show`, with the default in words, its meaning in one paragraph."""
    if not dataclasses.is_dataclass(asked.type):
        return None
    hints, fields = typing.get_type_hints(asked.type, include_extras=True), []
    for field in fields_to_show(asked.type):
        meaning, hint = partial(_meaning, asked.type, field.name), hints[field.name]
        metavar = "STR [STR ...]" if hint == str | tuple[str, ...] else None  # which tyro writes as STR|{[STR [STR ...]]}
        shown = tyro.conf.arg(help_behavior_hint=partial(_default, field, meaning), metavar=metavar)
        default = tyro.MISSING if field.default is dataclasses.MISSING else field.default  # a nested dataclass is asked for on its own
        fields.append(StructFieldSpec(field.name, typing.Annotated[hint, shown], default, meaning))  # type: ignore[arg-type]
    return StructConstructorSpec(asked.type, tuple(fields))


def _meaning(group: type, name: str) -> str:
    return meanings_of(group).get(name, "")


def _default(field: dataclasses.Field[Any], meaning: Callable[[], str], written: str) -> str:
    if field.default is dataclasses.MISSING:  # of a tuple, which tyro takes empty too
        return "(required)"
    if field.default not in (None, ()):
        return f"(default: {written})"
    return "" if _SAYS_IF_NOT_GIVEN.search(meaning()) else "(default: none)"


def _one_line(box: str) -> str:
    """Return the text inside tyro's box of an error, without its title and its pointer to the help."""
    lines = [line.strip("│╭╰╮╯─ \t") for line in box.splitlines()]
    words = " ".join(line for line in lines[1:] if line.strip("-"))  # rules are dashes where there are no box characters
    words = re.split(r"For full helptext", words)[0]
    if found := re.match(r"Unrecognized options: ([^-].*)", words.strip()):
        return f"unexpected words: {found[1].strip()}. Files stand together, before the options; where a command takes one, `sedd convert` makes one store of several."
    return re.sub(r"^Error parsing [\w.]+: ", "", words).strip()


def _show_warning(said: set[str], message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """Print a warning that this command has not `said` yet: data that are read several times warn each time."""
    if issubclass(category, SeddWarning):
        if str(message) not in said:
            print(f"warning: {message}", file=sys.stderr)
        said.add(str(message))
    elif os.environ.get("PYTHONWARNINGS"):
        print(warnings.formatwarning(message, category, *where[:2]), file=sys.stderr)


def _overview() -> str:
    lines = ["usage: sedd COMMAND ...", "", "Score-entropy discrete diffusion for single-cell RNA-seq."]
    for purpose, names in PURPOSES.items():
        lines += ["", f"{purpose}:"]
        lines += [f"  {name:<10} {(CLASSES[name].__doc__ or '').strip().splitlines()[0]}" for name in names]
    return "\n".join([*lines, "", "`sedd COMMAND --help` lists a command's options."])
