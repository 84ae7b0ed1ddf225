"""`rlhf report`."""

from __future__ import annotations

from pathlib import Path

import click

from rlhf.cli import Command


@click.command(cls=Command)
@click.argument("run_dir", metavar="RUN_DIR")
def report(run_dir: str) -> None:
    """Write RUN_DIR/report.html: one self-contained page with charts, samples, the plan and how to repeat the run."""
    from rlhf.report import write

    click.echo(write(Path(run_dir)))
