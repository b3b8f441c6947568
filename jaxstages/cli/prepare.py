"""`prepare`: tokenizer and packed rows of every stage, made ahead of training, and what is in them: by this process, or
by an Apache Beam pipeline."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from jaxstages import config as recipes
from jaxstages.cli.resolve import keep_recipe
from jaxstages.config import Recipe
from jaxstages.data.prepare import Engine
from jaxstages.data.stage_data import prepare_stages
from jaxstages.runtime.workdir import lock


def _engine(beam_options: str | None) -> Engine | None:
    if beam_options is None:
        return None
    try:
        from jaxstages.data.beam import make_engine
    except ModuleNotFoundError as error:
        raise ValueError(f"--beam_options: {error}; pip install jaxstages[beam]") from error
    return make_engine(beam_options)


def prepare_all(recipe: Recipe, workdir: Path, beam_options: str | None) -> None:
    """Make what is not there yet, and print a table of it.

    Args:
        beam_options: of the Beam pipeline that makes it, such as "--runner=FlinkRunner"; None takes this process.
    """
    engine = _engine(beam_options)
    with lock(workdir):
        keep_recipe(recipe, workdir)
        table = Table(title=f"prepared rows of {recipe.model.context} slots", title_justify="left")
        for heading in ("stage", "source", "part", "records", "bad", "rows", "tokens", "filled", "trained on", "cut"):
            words = heading in ("stage", "source", "part")
            table.add_column(heading, justify="left" if words else "right", no_wrap=not words, overflow="fold")
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
        console = Console(width=None if Console().is_terminal else 140)
        console.print(table)
