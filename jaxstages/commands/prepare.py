"""`prepare`: tokenizer and packed rows of every stage, made ahead of training, and what is in them."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from jaxstages import config as recipes
from jaxstages.commands.recipe import keep_recipe
from jaxstages.config import Recipe
from jaxstages.workbench import cache_folder, open_tokenizer, prepare_stage
from jaxstages.workdir import lock


def prepare_all(recipe: Recipe, workdir: Path) -> None:
    with lock(workdir):
        keep_recipe(recipe, workdir)
        tokenizer = open_tokenizer(recipe, workdir)
        table = Table(title=f"prepared rows of {recipe.model.context} slots", title_justify="left")
        for heading in ("stage", "source", "part", "records", "bad", "rows", "tokens", "filled", "trained on", "cut"):
            words = heading in ("stage", "source", "part")
            table.add_column(heading, justify="left" if words else "right", no_wrap=not words, overflow="fold")
        for name, stage in recipes.stages(recipe).items():
            for prepared in (
                part
                for side in prepare_stage(stage, tokenizer, recipe.model.context, cache_folder(recipe, workdir))
                for part in side
            ):
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
