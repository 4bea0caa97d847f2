"""The commands, thin: read the words, call the verb, print what came of it, and exit with the documented code."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

import metier
from metier import errors, progress
from metier.errors import MetierError

if TYPE_CHECKING:
    from metier.acts import Outcome

EXIT = {"ship": errors.DONE, "do-not-ship": errors.DO_NOT_SHIP, "cannot-tell": errors.CANNOT_TELL}
_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(
    context_settings=_CONTEXT,
    epilog="Exit codes: 0 done or ship, 1 failed, 2 wrong input, 3 do not ship, 4 cannot tell.",
)
@click.version_option(metier.__version__, prog_name="metier")
def commands() -> None:
    """Turn a general language model into a specialist, and prove that it is better.

    \b
    Start:  metier new licence-clerk my-clerk
            metier run my-clerk
            metier ask runs/my-clerk "Released under the MIT license."
    """


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that every act has, and its outcome printed."""

    @functools.wraps(command)
    def wrapped(as_json: bool, **words: Any) -> None:
        progress.quiet = as_json
        outcome = command(**words)
        _print(outcome if isinstance(outcome, list) else [outcome], as_json, words["dry"])

    for option in (
        click.option("--dry-run", "dry", is_flag=True, help="Say what would be done and what it would cost."),
        click.option("--runs", default="runs", show_default=True, metavar="DIR", help="Where run folders lie."),
        click.option(
            "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a setting, as train.rank=8."
        ),
        click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else."),
        click.argument("spec", metavar="SPEC"),
    ):
        wrapped = option(wrapped)
    return wrapped


@commands.command()
@_options
def run(**words: Any) -> list[Outcome]:
    """Do every act of SPEC that is out of date: build, train, prove, ship."""
    return metier.run(**words)


@commands.command()
@_options
def build(**words: Any) -> Outcome:
    """Make the data set: read, deduplicate, split, check, seal."""
    return metier.build(**words)


@commands.command()
@_options
def train(**words: Any) -> Outcome:
    """Train an adapter, or every weight; goes on where it was interrupted."""
    return metier.train(**words)


@commands.command()
@_options
def prove(**words: Any) -> Outcome:
    """Compare all arms on the sealed test set and give the verdict."""
    return metier.prove(**words)


@commands.command()
@_options
def ship(**words: Any) -> Outcome:
    """Release what was trained with its model card and certificate."""
    return metier.ship(**words)


@commands.command()
@click.argument("run", metavar="RUN")
@click.argument("text")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else.")
def ask(run: str, text: str, as_json: bool) -> None:
    """Ask the base model and the specialist of RUN the same thing, side by side."""
    progress.quiet = as_json
    said = metier.ask(run, text)
    if as_json:
        _out(said)
        return
    for name, answer in said.items():
        cut = "" if answer["finish"] == "stop" else "  (cut at the token limit)"
        click.echo(f"{name + ':':<7}{_printable(answer['text'])}{cut}")


@commands.command()
@click.argument("spec", metavar="SPEC")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a setting, as train.rank=8.")
@click.option("--runs", default="runs", show_default=True, metavar="DIR", help="Where run folders lie.")
def lr(spec: str, as_json: bool, settings: tuple[str, ...], runs: str) -> None:
    """Suggest a learning rate, from 60 trial steps on training rows; what they train is thrown away."""
    progress.quiet = as_json
    found = metier.lr(spec, runs=runs, settings=settings)
    if as_json:
        _out(found)
    else:
        click.echo(f"suggested: --set train.learning_rate={found['suggestion']:g}")


@commands.command()
@click.argument("runs", metavar="RUN RUN...", nargs=-1, required=True)
@click.option("--html", "page", metavar="FILE", type=click.Path(dir_okay=False), help="Also as a page with the curves.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else.")
def compare(runs: tuple[str, ...], page: str | None, as_json: bool) -> None:
    """Show runs side by side: settings, data, curves, results, cost. The first is what the others are held against."""
    progress.quiet = as_json
    found = metier.compare(*runs)
    if page:
        from metier.comparison.page import comparison_page
        from metier.runs import write

        write(Path(page), comparison_page(found))
    if as_json:
        _out(found)
    else:
        from metier.comparison.words import show

        show(found)


@commands.command()
@click.argument("recipe")
@click.argument("folder", metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else.")
def new(recipe: str, folder: str, as_json: bool) -> None:
    """Copy RECIPE into DIR, as a start for your own specialist."""
    made = metier.new(recipe, folder)
    if as_json:
        _out({"recipe": recipe, "folder": str(made), "outputs": sorted(str(p) for p in made.iterdir())})
    else:
        click.echo(f"{made} holds {recipe}; edit {made}/specialist.yaml, then: metier run {made}")


@commands.command()
@click.argument("spec", metavar="SPEC")
@click.option("--on", type=click.Choice(["kubernetes", "skypilot"]), required=True, help="What the file is for.")
@click.option("--machines", default=2, show_default=True, type=click.IntRange(1, 1024), help="How many machines.")
@click.option("--cpus", default=8, show_default=True, type=click.IntRange(1, 1024), help="Cores of each machine.")
@click.option("--memory-gb", default=32, show_default=True, type=click.IntRange(1), help="Memory of each machine.")
@click.option("--accelerators", default="", metavar="KIND:NUMBER", help="GPUs of each machine, as H100:8.")
@click.option("--image", default=f"metier:{metier.__version__}", show_default=True, help="Container image.")
@click.option("--claim", default="metier", show_default=True, help="PersistentVolumeClaim that all pods may write.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a setting, as train.rank=8.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else.")
def cluster(on: str, as_json: bool, **words: Any) -> None:
    """Print the file that trains SPEC on several machines; nothing is started."""
    text = metier.cluster(on=on, **words)
    if as_json:
        _out({"on": on, "yaml": text})
    else:
        click.echo(text, nl=False)


@commands.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else.")
def doctor(as_json: bool) -> None:
    """Say what this machine can do: cores, memory, speeds, caches, extras."""
    from metier.health import words

    found = metier.doctor()
    if as_json:
        _out(found)
    else:
        click.echo("\n".join(words(found)))


def main() -> NoReturn:
    """Runs a command; every failure is one clear error, on stdout as JSON where that was asked for."""
    as_json = "--json" in sys.argv
    signal.signal(signal.SIGTERM, _terminate)
    try:
        commands.main(standalone_mode=False)
        code = errors.DONE
    except MetierError as error:
        code = _fail(error, as_json)
    except click.exceptions.Exit as error:
        code = error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else str(error))
        code = errors.WRONG
    except click.ClickException as error:
        code = _fail(_usage(error), as_json)
    except (KeyboardInterrupt, click.Abort):
        code = _stopped(as_json, errors.INTERRUPTED)
    except errors.Terminated:
        code = _stopped(as_json, errors.TERMINATED)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else errors.FAILED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = errors.FAILED
    except Exception as error:  # a bug of Metier's own: said as one, with the traceback for whoever mends it
        code = _fail(_bug(error), as_json)
    sys.exit(code)


def _fail(error: MetierError, as_json: bool) -> int:
    from metier.training import world

    if as_json and not world.follows():
        _out({"error": error.record()})
    else:
        click.echo(f"metier: {_printable(str(error))}", err=True)
    return error.exit_code


def _terminate(*_: object) -> NoReturn:
    raise errors.Terminated


def _stopped(as_json: bool, code: int) -> int:
    stopped = MetierError("stopped; everything done so far is kept", fix="run the same command again to go on")
    _fail(stopped, as_json)
    return code


def _usage(error: click.ClickException) -> MetierError:
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "metier"
    return errors.ConfigError(error.format_message(), fix=f"see {path} --help")


def _bug(error: Exception) -> MetierError:
    if os.environ.get("METIER_DEBUG"):
        traceback.print_exc()
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error)):
        return errors.ResourceError("out of memory", fix="set machine.tokens lower, or use a smaller base")
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return MetierError(
        f"a bug in Metier: {type(error).__name__}: {error}",
        where=f"{Path(frame.filename).name}:{frame.lineno}",
        fix="please report it with the output of METIER_DEBUG=1 and the same command",
    )


def _print(outcomes: list[Outcome], as_json: bool, dry: bool) -> None:
    from metier import acts

    if outcomes[0].status == acts.FOLLOWED:
        return
    if as_json:
        records = [o.record() for o in outcomes]
        last = outcomes[-1]
        whole: dict[str, Any] = {
            "act": "run",
            "run": str(last.run),
            "status": last.status,
            "seconds": sum(o.seconds for o in outcomes),
        }
        whole["outputs"] = [path for o in outcomes for path in o.outputs]
        whole |= {k: v for o in outcomes for k, v in o.figures.items() if k in ("verdict", "claims", "arms")}
        _out(records[0] if len(records) == 1 else whole | {"acts": records})
    else:
        _tell(outcomes, dry)
    verdict = next((o.figures["verdict"] for o in outcomes if "verdict" in o.figures), "ship")
    if not dry and verdict != "ship":
        raise SystemExit(EXIT[verdict])


def _tell(outcomes: list[Outcome], dry: bool) -> None:
    from metier import acts, summary

    for outcome in outcomes:
        took = f" in {progress.clock(outcome.seconds)}" if outcome.status == acts.DONE else ""
        why = f": {outcome.why}" if dry and outcome.why else ""
        click.echo(f"{outcome.act:<7}{outcome.status}{took}{why}")
        for line in summary.lines(outcome):
            click.echo(f"       {line}")
    if not dry and all(o.status == acts.FRESH for o in outcomes):
        click.echo("nothing to do")
    if not dry and len(outcomes) > 1:
        click.echo("\n".join(["", *summary.closing(outcomes)]))


def _out(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2) + "\n")
    sys.stdout.flush()


def _printable(text: str) -> str:
    """Text for a terminal: control characters, which could steer it, shown as escapes."""
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)
