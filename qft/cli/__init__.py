"""What a user types. The group knows its commands by name, so that `qft --help` imports click alone."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from typing import Any

import click

from qft import __version__

# name → (module of qft.cli, help line); a command is a function of that module named NAME_command.
COMMANDS = {
    "run": ("stages", "Do everything a recipe asks for: tune, merge, fold, export, quantize, verify, bench, report."),
    "tune": ("stages", "Train an adapter on the 4-bit base."),
    "merge": ("stages", "Merge the adapter into the base; two ways are measured."),
    "fold": ("stages", "Bring the merged model onto the grid that ships."),
    "export": ("stages", "Make the verified bundle (--float: the plain ONNX)."),
    "quantize": ("stages", "Put every target's grid into the graph."),
    "verify": ("stages", "Hold the bundle against the tuned model and the promised budget."),
    "bench": ("stages", "Measure load, first token, prefill and decode."),
    "report": ("stages", "Write report.html again."),
    "compare": ("compare", "Hold runs against each other: recipes, quality with intervals, size, speed, time."),
    "eval": ("use", "Measure a bundle's quality on held-out rows, or on rows of your own."),
    "predict": ("predict", "Ask a bundle, without torch."),
    "chat": ("use", "Talk with a bundle, without torch."),
    "serve": ("use", "Answer programs over HTTP as OpenAI does, without torch."),
    "check": ("use", "Compare a bundle's files and golden cases with what it promises."),
    "init": ("init", "Look at rows, guess what they are for, and write a recipe that runs."),
    "plan": ("start", "Look at the rows, the tokens in the loss and the stages to do, before a run."),
    "recipes": ("shelf", "List the shipped recipes with time, memory and result; `recipes copy NAME` makes one yours."),
    "models": (
        "shelf",
        "Compare known bases: licence, size, languages, tasks, and what a run takes here: memory, a guess at minutes.",
    ),
    "probe": ("probe", "Try what multiplies fastest on this processor: blocks and accuracy levels for a target."),
    "doctor": ("doctor", "Show the machine and try what a run needs: ready, or what to type."),
    "schema": ("start", "List every recipe key; --json-schema for editors."),
}


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"qft.cli.{COMMANDS[name][0]}")
        command: click.Command = getattr(module, f"{name}_command")
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        """Names and help lines, without the imports that click's own would make."""
        from click.shell_completion import CompletionItem

        options = click.Command.shell_complete(self, ctx, incomplete)
        found = [CompletionItem(name, help=line) for name, (_, line) in COMMANDS.items() if name.startswith(incomplete)]
        return [*found, *options]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        import difflib

        near = difflib.get_close_matches(args[0], COMMANDS, 1)
        if args[0] not in COMMANDS and near:
            ctx.fail(f"no command {args[0]!r}; did you mean {near[0]}?")
        return super().resolve_command(ctx, args)


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qft")
def cli() -> None:
    """From a recipe to a verified model inside an app: what you train is what you ship."""


def main() -> None:
    """Run the command line; every error is one message and an exit code (2 input, 1 a stage, 130 interrupted)."""
    from qft.errors import QftError

    debug, as_json = "--debug" in sys.argv, "--json" in sys.argv
    _set_encodings()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, _interrupt)
    if not debug:  # an interrupt that arrives inside a destructor is no news for the user
        sys.unraisablehook = lambda _: None
    try:
        cli.main(standalone_mode=False)
    except QftError as error:
        _end([str(problem) for problem in error.problems], error.exit_code, error, debug=debug, as_json=as_json)
    except click.ClickException as error:
        hint = f"\n  see `{error.ctx.command_path} --help`" if isinstance(error, click.UsageError) and error.ctx else ""
        _end([error.format_message() + hint], 2, error, debug=debug, as_json=as_json)
    except (KeyboardInterrupt, click.Abort) as error:
        _end([_stop_message()], 130, error, debug=debug, as_json=as_json)
    except BrokenPipeError:  # the reader of a pipe has gone: nobody is left to tell
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:  # a defect of ours: still one message
        _end(
            [f"qft failed unexpectedly: {type(error).__name__}: {error}\n  --debug shows where; please report it"],
            1,
            error,
            debug=debug,
            as_json=as_json,
        )


def _set_encodings() -> None:
    """Pipes and files hold UTF-8, as all that qft reads and writes does, on Windows too, where Python would take its code page.

    A terminal has letters of its own, and so has who sets PYTHONIOENCODING: what is not among them becomes `?`, and ends nothing.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if not hasattr(stream, "reconfigure"):  # none at all, or another program's
            continue
        if stream.isatty() or "PYTHONIOENCODING" in os.environ:
            stream.reconfigure(errors="strict" if stream is sys.stdin and not stream.isatty() else "replace")
        elif stream is sys.stdin:
            stream.reconfigure(encoding="utf-8-sig", errors="strict")
        else:
            stream.reconfigure(encoding="utf-8", errors="replace")  # of a file whose name is not UTF-8


_stopped: list[int] = []  # signals received: libraries turn an interrupt inside them into errors of their own


class _Stopped(KeyboardInterrupt):
    """Python ends a process by the signal, caught or not, once a KeyboardInterrupt itself has passed through exec(), by which
    dataclasses are made while libraries are imported.
    """


def _interrupt(number: int, _: Any) -> None:
    _stopped.append(number)
    raise _Stopped


def forget_interrupt() -> None:
    """Go on after a Ctrl-C that stopped no more than it was meant for. Raises KeyboardInterrupt if SIGTERM came: that ends all."""
    if signal.SIGTERM in _stopped:
        raise _Stopped
    _stopped.clear()


def _stop_message() -> str:
    """Stages go on; what else there is begins anew."""
    typed = next((word for word in sys.argv[1:] if word in COMMANDS), "")
    goes_on = typed and COMMANDS[typed][0] == "stages"
    return "stopped; the same command goes on from there" if goes_on else "stopped"


def _end(messages: list[str], exit_code: int, error: BaseException, *, debug: bool, as_json: bool) -> None:
    if _stopped and exit_code != 130:
        messages, exit_code = [_stop_message()], 130
    if debug:
        import traceback

        traceback.print_exception(error)
    if as_json:
        click.echo(json.dumps({"error": messages, "exit_code": exit_code}))
    for message in messages:
        click.echo(click.style("error: ", fg="red", bold=True) + message, err=True)
    sys.exit(exit_code)
