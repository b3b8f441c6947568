"""`import` and `export`: Hugging Face checkpoint folders in and out."""

from pathlib import Path

from jaxstages import config as recipes
from jaxstages.cli.resolve import keep_recipe, resolve_recipe
from jaxstages.cli.select_checkpoint import choose, last_finished
from jaxstages.config import ModelConfig, Recipe
from jaxstages.interop.hf_export import DTYPES, export
from jaxstages.interop.hf_import import adopt, bring, describe, find_folder, source_of, tokenizer_of
from jaxstages.interop.peft import export_adapter
from jaxstages.runtime.files import local_path
from jaxstages.runtime.workdir import begun_stages, lock, result_file


def import_model(given: Recipe | None, workdir: Path, source: str | None) -> None:
    """Import a folder into `workdir/import`, and write `workdir/recipe.json`: the given recipe with the folder's model,
    or one without stages.

    Raises:
        ValueError: the folder cannot be imported, or does not fit the recipe or the workdir.
    """
    if not source:
        raise ValueError("import needs --from=DIR, a folder with config.json and safetensors")
    folder = find_folder(str(Path(source).expanduser()) if source.startswith("~") else source)
    description = describe(folder)
    if given is not None and source_of(given) not in (None, source):
        raise ValueError(f'the recipe has init_from="hf:{source_of(given)}", and --from={source}; name one of them')

    trained = [name for name in begun_stages(workdir) if name != recipes.IMPORT]
    if trained and not result_file(workdir / recipes.IMPORT).exists():
        raise ValueError(f"{workdir} has trained {trained[0]} already; import into another --workdir")

    if given is None and not (workdir / "recipe.json").is_file():
        given = Recipe(name=Path(source).resolve().name, model=ModelConfig(context=description.model.context))
    if given is not None:
        given = adopt(given, description, tokenizer_of(folder))
    with lock(workdir):
        recipe = resolve_recipe(given, workdir, importing=True)
        keep_recipe(recipe, workdir)
        bring(recipe, workdir, source)


def export_model(
    recipe: Recipe,
    workdir: Path,
    stage: str | None,
    to: str | None,
    dtype: str,
    adapter: bool,
    step: int | None = None,
) -> None:
    """Export a checkpoint into the folder `to`, with adapters merged, or only its adapters.

    Args:
        stage: by default the last finished one.
        step: by default the best one.

    Raises:
        ValueError: a flag has a wrong value, or there is no such checkpoint.
    """
    if not to:
        raise ValueError("export needs --to=DIR, the folder to write")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype={dtype}: known: {', '.join(DTYPES)}")
    if adapter and dtype != "float32":
        raise ValueError(f"--dtype={dtype} does not apply to --adapter: adapters are float32")

    name = stage or last_finished(recipe, workdir)
    chosen, folder = choose(recipe, workdir / name, step), local_path(to, "--to")
    if adapter:
        export_adapter(recipe, workdir, name, folder, chosen)
    else:
        export(recipe, workdir, name, folder, dtype, chosen=chosen)
