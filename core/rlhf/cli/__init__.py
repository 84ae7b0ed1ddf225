"""The command line. Light until a command runs: no torch for help, plugins or plans."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import sys
from typing import Any

import click

from rlhf import __version__, signals
from rlhf.allocator import restart_with_tunables
from rlhf.errors import Interrupted, Problem, RequestError, RunError
from rlhf.options import nearest
from rlhf.place import here

_COMMANDS = {
    "run": ("rlhf.cli.run:run", "Train: compose a run and carry it out."),
    "plan": (
        "rlhf.cli.plan:plan",
        "Show a run's plan, its memory and its time, or why there is none. Loads no weights.",
    ),
    "matrix": ("rlhf.cli.matrix:matrix", "Tell which combinations are legal, and why the rest are not."),
    "plugins": ("rlhf.cli.plugins:plugins", "List what is installed."),
    "pipeline": ("rlhf.cli.pipeline:pipeline", "Run stages that feed each other, such as SFT, reward model, PPO."),
    "eval": ("rlhf.cli.evaluate:evaluate", "Score a finished run's model on held-out data."),
    "export": ("rlhf.cli.export:export", "Write a trained model as a plain folder: adapters merged, weights unpacked."),
    "new": ("rlhf.cli.new:new", "Write a plugin's package to begin with: it installs, passes its tests and runs."),
    "report": ("rlhf.cli.report:report", "Write a run's report: one self-contained HTML page."),
}


class _Lazy(click.Group):
    """Subcommands imported when called; their summaries are here."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            near = nearest(cmd_name, _COMMANDS)
            fix = f"did you mean rlhf {near}?" if near else f"commands: {', '.join(_COMMANDS)}"
            raise RequestError(Problem(f"there is no command {cmd_name!r}", fix))
        module, _, name = _COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in _COMMANDS.items()])


class Command(click.Command):
    """A command that refuses what is given nothing, such as of a shell variable that is not set: that would mean what
    leaving it out does, or the current folder."""

    def invoke(self, ctx: click.Context) -> Any:
        problems = []
        for parameter in self.params:
            value = ctx.params.get(parameter.name or "")
            if "" in (value if isinstance(value, tuple) else (value,)):
                flag = isinstance(parameter, click.Option)
                name = parameter.opts[0] if flag else (parameter.metavar or "").strip("[]")
                fix = f"{name} VALUE" if flag else "give it a value"
                problems.append(
                    Problem(f"{name} is given nothing", fix + ("" if parameter.required else ", or leave it out"))
                )
        if problems:
            raise RequestError(problems)
        return super().invoke(ctx)


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="rlhf")
def cli() -> None:
    """RLHF and LLM post-training composed at run time from independent plugins.

    \b
    rlhf run --algo ppo                      learn on the built-in example: no network, no GPU
    rlhf run --algo ppo --help               its options, and those of the components chosen with it
    rlhf run --algo dpo --model M --data D   on a model and data of yours
    """


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; exits with 0 done, 1 the run failed, 2 the request was wrong, 130 interrupted."""
    with signals.raised() as asked:
        if arguments is None:
            restart_with_tunables(sys.argv[1:])
        _main(list(sys.argv[1:] if arguments is None else arguments), asked)


def _main(arguments: list[str], asked: signals.Asked) -> None:
    try:
        # Not cli.main: it would turn a broken pipe into exit code 1.
        with cli.make_context("rlhf", arguments) as context:
            code = cli.invoke(context)
    except SystemExit as error:  # of something that was loaded: nothing here ends so
        fail(f"something that was loaded called sys.exit({error.code!r})")
        sys.exit(1)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.UsageError as error:
        from rlhf.cli.usage import problem_of

        fail(str(problem_of(error, arguments)))
        sys.exit(2)
    except click.ClickException as error:
        if not _echo():
            fail(error.format_message())
        sys.exit(2)
    except RequestError as error:
        if _echo() and not str(error).startswith("rank "):
            sys.exit(2)
        for problem in error.problems:
            fail(str(problem))
        if error.suggestion:
            say(f"the nearest combination that works: {error.suggestion}")
        sys.exit(2)
    except RunError as error:
        fail(str(error))
        sys.exit(1)
    except Interrupted as error:
        if not _echo():
            say(str(error))
        sys.exit(130)
    except (KeyboardInterrupt, click.Abort):
        if not _echo():
            say("interrupted")
        sys.exit(130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:  # of any kind: a library that is interrupted may make an error of its own of it
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # no file's name, wherever it was typed
            fail(f"{error.filename}: is too long for the name of a file")
            sys.exit(2)
        if asked.number is None:  # nobody interrupted: a fault
            from rlhf.rank import trace

            click.echo(trace(error), err=True)
            sys.exit(1)
        say("interrupted")
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


def _echo() -> bool:
    """This process is another rank than 0, which says the same: under torchrun all of them are given one request."""
    try:
        return here().rank > 0
    except RequestError:
        return False


def say(text: str) -> None:
    """A line for the user, on stderr, so that stdout holds results alone."""
    with contextlib.suppress(BrokenPipeError):  # nobody listens any more, and a run goes on
        click.echo(text, err=True)


def fail(text: str) -> None:
    """A problem, marked as one."""
    click.echo(click.style("error: ", fg="red", bold=True) + text, err=True)
