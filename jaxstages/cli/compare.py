"""`compare`: runs side by side, over seeds, with p-values."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from jaxstages.experiments.compare import FORMATS, compare, format_table, notes_of, plot_curves, table_of
from jaxstages.experiments.runs import find_runs, read_run
from jaxstages.runtime.console import say, table_console
from jaxstages.runtime.files import local_path, write_text

MAX_FIELDS = 4
"""Fields that differ which the table shows as columns; more are in a table of their own, a line for each."""


def compare_runs(
    patterns: Sequence[str], stage: str | None, metric: str | None, to: str | None, plot: str | None
) -> None:
    """Print the table, and write it and the curves where they are asked for.

    Raises:
        ValueError: there are fewer than two runs, they can't be compared, or a file's type is unknown.
    """
    table_file = None if to is None else local_path(to, "--to")
    plot_file = None if plot is None else local_path(plot, "--plot")
    if table_file is not None and table_file.suffix not in FORMATS:
        raise ValueError(f"--to={to}: the file's type is unknown; end its name with {', '.join(FORMATS)}")
    if plot_file is not None and plot_file.suffix not in (".svg", ".png", ".pdf"):
        raise ValueError(f"--plot={plot}: the file's type is unknown; end its name with .svg, .png or .pdf")

    folders = find_runs(list(patterns))
    if len(folders) < 2:
        raise ValueError("compare needs two runs or more: jaxstages compare DIR DIR ..., or the folder of a sweep")
    comparison = compare([read_run(folder) for folder in folders], stage, metric)
    headings, cells = table_of(comparison)

    console = table_console(200)
    fields = len(comparison.rows[0].fields)
    if fields > MAX_FIELDS:
        names, values = headings[1 : 1 + fields], [line[1 : 1 + fields] for line in cells]
        _print(console, ["field", *(line[0] for line in cells)], zip(names, *values, strict=True))
        _print(console, [headings[0], *headings[1 + fields :]], ([line[0], *line[1 + fields :]] for line in cells))
    else:
        _print(console, headings, cells)
    for note in notes_of(comparison):
        say(f"  {note}", "yellow" if "may be chance" in note else "")

    if table_file is not None:
        write_text(table_file, format_table(headings, cells, table_file.suffix))
        say(f"table: {table_file}", "cyan")
    if plot_file is not None:
        plot_curves(comparison, plot_file)
        say(f"curves: {plot_file}", "cyan")


def _print(console: Console, headings: Sequence[str], cells: Iterable[Sequence[str]]) -> None:
    table = Table()
    for heading in headings:
        left = heading in ("run", "status", "field")
        table.add_column(heading, overflow="fold", justify="left" if left else "right")
    for line in cells:
        table.add_row(*line)
    console.print(table)
