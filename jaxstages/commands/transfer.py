"""`import` and `export`: weights of others in, ours out, as folders of Hugging Face's form."""

from pathlib import Path

from jaxstages import config as recipes
from jaxstages.commands.recipe import keep_recipe, resolve_recipe
from jaxstages.config import ModelConfig, Recipe
from jaxstages.interop.hf_export import DTYPES, export
from jaxstages.interop.hf_import import adopt, bring, describe, find_folder, source_of, tokenizer_of
from jaxstages.interop.peft import export_adapter
from jaxstages.parent import finished, last_finished
from jaxstages.workdir import checkpoints_folder, lock, result_file


def import_model(given: Recipe | None, workdir: Path, source: str | None) -> None:
    """Make `workdir/import` of a folder, and `workdir/recipe.json`: the given recipe with the folder's model, or one
    without stages."""
    if not source:
        raise ValueError("import needs --from=DIR, a folder with config.json and safetensors")
    folder = find_folder(source)
    found = describe(folder)
    if given is not None and source_of(given) not in (None, source):
        raise ValueError(f'the recipe has init_from="hf:{source_of(given)}", and --from={source}; name one of them')
    begun = [name for name in recipes.STAGES if checkpoints_folder(workdir / name).exists()]
    if begun and not result_file(workdir / recipes.IMPORT).exists():
        raise ValueError(f"{workdir} has trained {begun[0]} already; import into another --workdir")
    if given is None and not (workdir / "recipe.json").is_file():
        given = Recipe(name=Path(source).resolve().name, model=ModelConfig(context=found.model.context))
    if given is not None:
        given = adopt(given, found, tokenizer_of(folder))
    with lock(workdir):
        recipe = resolve_recipe(given, workdir, importing=True)
        keep_recipe(recipe, workdir)
        bring(recipe, workdir, source)


def export_model(recipe: Recipe, workdir: Path, stage: str | None, to: str | None, dtype: str, adapter: bool) -> None:
    """Write the best checkpoint of a stage, by default the last that is finished, into the folder `to`; adapters
    merged, or by themselves."""
    if not to:
        raise ValueError("export needs --to=DIR, the folder to write")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype={dtype}: known: {', '.join(DTYPES)}")
    name = stage or last_finished(recipe, workdir)
    finished(workdir / name)
    if not adapter:
        export(recipe, workdir, name, Path(to), dtype)
    elif dtype == "float32":
        export_adapter(recipe, workdir, name, Path(to))
    else:
        raise ValueError(f"--dtype={dtype} does not apply to --adapter: adapters are float32")
