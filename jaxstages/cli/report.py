"""`report`: write the report of a run."""

from pathlib import Path

from jaxstages.cli.resolve import resolve_recipe
from jaxstages.config import Recipe
from jaxstages.experiments.report import write_report
from jaxstages.runtime.console import say


def report(given: Recipe | None, workdir: Path) -> None:
    """Write `workdir/report.html`.

    Args:
        given: the recipe of --config, for the code of its own parts. A run can be reported without it.
    """
    recipe = None if given is None else resolve_recipe(given, workdir)
    say(f"report: {write_report(workdir, recipe)}")
