"""`prepare`: tokenizer and packed rows of every stage, made ahead of training, and what is in them."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from jaxstages import config as recipes
from jaxstages.commands.recipe import keep_recipe
from jaxstages.config import Recipe
from jaxstages.workbench import prepare_stages
from jaxstages.workdir import lock


def prepare_all(recipe: Recipe, workdir: Path) -> None:
    with lock(workdir):
        keep_recipe(recipe, workdir)
        table = Table(title=f"prepared rows of {recipe.model.context} slots", title_justify="left")
        for heading in ("stage", "source", "part", "records", "bad", "rows", "tokens", "filled", "trained on", "cut"):
            words = heading in ("stage", "source", "part")
            table.add_column(heading, justify="left" if words else "right", no_wrap=not words, overflow="fold")
        for name, parts in prepare_stages(recipe, workdir, recipes.stages(recipe)).items():
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
