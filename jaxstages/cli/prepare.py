"""`prepare`: train the tokenizer and pack the rows of every stage ahead of training, and report what they contain."""

from pathlib import Path

from rich.table import Table

from jaxstages import config as recipes
from jaxstages.cli.resolve import keep_recipe
from jaxstages.config import Recipe
from jaxstages.data.prepare import Engine
from jaxstages.data.stage_data import prepare_stages
from jaxstages.runtime.console import table_console
from jaxstages.runtime.workdir import lock


def _engine(beam_options: str | None) -> Engine | None:
    if beam_options is None:
        return None
    try:
        from jaxstages.data.beam import make_engine
    except ModuleNotFoundError as error:
        raise ValueError(f"--beam_options: {error}; pip install '.[beam]'") from error
    return make_engine(beam_options)


def prepare_all(recipe: Recipe, workdir: Path, beam_options: str | None) -> None:
    """Prepare what is missing, and print a table of all prepared rows.

    Args:
        beam_options: run an Apache Beam pipeline with these options, such as "--runner=FlinkRunner"; None prepares in
            this process.
    """
    engine = _engine(beam_options)
    with lock(workdir):
        keep_recipe(recipe, workdir)
        table = Table(title=f"prepared rows of {recipe.model.context} slots", title_justify="left")
        for heading in ("stage", "source", "part"):
            table.add_column(heading, overflow="fold")
        for heading in ("records", "bad", "rows", "tokens", "filled", "trained on", "cut"):
            table.add_column(heading, justify="right", no_wrap=True, overflow="fold")
        for name, parts in prepare_stages(recipe, workdir, recipes.stages(recipe), engine).items():
            for prepared in parts:
                index = prepared.index
                table.add_row(
                    name,
                    index["source"],
                    index["part"],
                    f"{index['records']:,}",
                    f"{index['bad']:,}",
                    f"{index['rows']:,}",
                    f"{index['tokens']:,}",
                    f"{100 * index['tokens'] / (index['rows'] * index['context']):.1f} %",
                    f"{100 * index['scored'] / index['tokens']:.1f} %",
                    f"{index['cut_examples']:,}",
                )
        table_console(140).print(table)
