"""`report`: write the report of a run, or of several."""

from collections.abc import Sequence
from pathlib import Path

from jaxstages.cli.resolve import resolve_recipe
from jaxstages.config import Recipe
from jaxstages.experiments.report import REPORT, write_report
from jaxstages.experiments.report_runs import compared_page
from jaxstages.experiments.runs import find_runs, read_run
from jaxstages.runtime.console import say
from jaxstages.runtime.files import parse_path, write_text


def report(config_recipe: Recipe | None, workdir: Path) -> None:
    """Write `workdir/report.html`.

    Args:
        config_recipe: the recipe of --config, for the code of its own parts. A run can be reported without it.
    """
    recipe = None if config_recipe is None else resolve_recipe(config_recipe, workdir)
    say(f"report: {write_report(workdir, recipe)}")


def report_runs(patterns: Sequence[str], stage: str | None, metric: str | None, to: str | None) -> None:
    """Write one report of several runs.

    Args:
        to: its file; None means `report.html` in the current folder.

    Raises:
        ValueError: there are fewer than two runs, they can't be compared, or `to` is no .html file.
    """
    file = parse_path(to or REPORT, "--to")
    if file.suffix != ".html":
        raise ValueError(f"--to={to}: a report is an HTML file; end its name with .html")
    folders = find_runs(list(patterns))
    if len(folders) < 2:
        raise ValueError(f"{folders[0]} is a single run; use jaxstages report --workdir={folders[0]}")
    write_text(file, compared_page([read_run(folder) for folder in folders], stage, metric))
    say(f"report: {file}")
