"""The command line. Text goes to standard output; progress and reports go to standard error."""

from __future__ import annotations

from typing import Annotated

import typer

from offload_triforce._version import __version__
from offload_triforce.cli import (
    chat,
    demo,
    doctor,
    generate,
    models,
    pipeline,
    plan,
    prediction,
    serve,
    sessions,
    speculation,
    throughput,
    trace,
)
from offload_triforce.cli.common import examples
from offload_triforce.cli.ending import Root

app = typer.Typer(
    cls=Root,
    help="Lossless long-context decoding: the KV cache in host memory, TriForce's hierarchical speculation.",
    epilog=examples(
        "offload-triforce demo",
        'offload-triforce plan --model qwen3-8b --context 128K --gpu "RTX 4090"',
        'offload-triforce generate --model ./model --prompt-file book.txt --ask "Who?"',
    ),
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command(epilog=generate.EXAMPLES)(generate.generate)
app.command(epilog=chat.EXAMPLES)(chat.chat)
app.command(epilog=serve.EXAMPLES)(serve.serve)
app.command(epilog=demo.EXAMPLES)(demo.demo)
app.command(epilog=trace.EXAMPLES)(trace.trace)
app.command(epilog=plan.EXAMPLES)(plan.plan)
app.command(epilog=models.EXAMPLES)(models.models)
app.command(epilog=doctor.EXAMPLES)(doctor.doctor)
bench = typer.Typer(help="Measure, and say on what.", no_args_is_help=True)
bench.command(epilog=pipeline.EXAMPLES)(pipeline.pipeline)
bench.command(epilog=speculation.EXAMPLES)(speculation.speculation)
bench.command(epilog=throughput.EXAMPLES)(throughput.throughput)
bench.command(epilog=prediction.EXAMPLES)(prediction.prediction)
app.add_typer(bench, name="bench")
kept = typer.Typer(help="What is kept on disk of texts that were read before.", no_args_is_help=True)
kept.command("list", epilog=sessions.LIST_EXAMPLES)(sessions.list_sessions)
kept.command(epilog=sessions.SHOW_EXAMPLES)(sessions.show)
kept.command(epilog=sessions.RM_EXAMPLES)(sessions.rm)
kept.command(epilog=sessions.VERIFY_EXAMPLES)(sessions.verify)
app.add_typer(kept, name="sessions")


def main() -> None:
    """Entry point."""
    app(prog_name="offload-triforce")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Nothing but options that belong to no command."""
