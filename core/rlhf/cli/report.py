"""`rlhf report`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run_dir", metavar="RUN_DIR", type=click.Path(path_type=Path))
def report(run_dir: Path) -> None:
    """Write RUN_DIR/report.html: one self-contained page with charts, samples, the plan and how to repeat the run."""
    from rlhf.report import write

    click.echo(write(run_dir))
