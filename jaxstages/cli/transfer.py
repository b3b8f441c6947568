"""`import` and `export`: Hugging Face checkpoint folders in and out, and GGUF files out."""

from pathlib import Path

from jaxstages import config as recipes
from jaxstages.cli.resolve import keep_recipe, kept_recipe, resolve_recipe
from jaxstages.cli.select_checkpoint import choose, last_finished
from jaxstages.config import ModelConfig, Recipe
from jaxstages.interop import gguf_export, hf_export
from jaxstages.interop.gguf_export import export_gguf
from jaxstages.interop.hf_export import export
from jaxstages.interop.hf_import import describe, find_folder, import_folder, source_of, tokenizer_of, with_model_of
from jaxstages.interop.peft import export_adapter
from jaxstages.runtime.files import local_path
from jaxstages.runtime.workdir import begun_stages, lock, result_file


def import_model(config_recipe: Recipe | None, workdir: Path, source: str | None) -> None:
    """Import a folder into `workdir/import`, and write `workdir/recipe.json`: the given recipe with the folder's model,
    or one without stages.

    Raises:
        ValueError: the folder cannot be imported, or does not fit the recipe or the workdir.
    """
    if not source:
        raise ValueError("import needs --from=DIR, a folder with config.json and safetensors")
    folder = find_folder(source)
    description = describe(folder)
    if config_recipe is not None and source_of(config_recipe) not in (None, source):
        raise ValueError(
            f'the recipe has init_from="hf:{source_of(config_recipe)}", and --from={source}; name one of them'
        )

    trained = [name for name in begun_stages(workdir) if name != recipes.IMPORT]
    if trained and not result_file(workdir / recipes.IMPORT).exists():
        raise ValueError(f"{workdir} has trained {trained[0]} already; import into another --workdir")

    if config_recipe is None and not result_file(workdir / recipes.IMPORT).exists():
        kept = kept_recipe(workdir)  # a recipe without stages is that of an import that failed
        is_own = kept is not None and recipes.stages(kept)
        name = folder.name if Path(source).expanduser().is_dir() else source.rpartition("/")[2]
        config_recipe = kept if is_own else Recipe(name=name, model=ModelConfig(context=description.model.context))
    if config_recipe is not None:
        config_recipe = with_model_of(config_recipe, description, tokenizer_of(folder))
    with lock(workdir):
        recipe = resolve_recipe(config_recipe, workdir, importing=True)
        keep_recipe(recipe, workdir)
        import_folder(recipe, workdir, source)


def export_model(
    recipe: Recipe,
    workdir: Path,
    stage: str | None,
    to: str | None,
    dtype: str,
    adapter: bool,
    step: int | None = None,
) -> None:
    """Export a checkpoint into the folder `to`, with adapters merged, or only its adapters; or to the file `to`, if its
    name ends in `.gguf`.

    Args:
        stage: by default the last finished one.
        step: by default the best one.

    Raises:
        ValueError: a flag has a wrong value, or there is no such checkpoint.
    """
    if not to:
        raise ValueError("export needs --to=DIR, the folder to write, or --to=FILE.gguf")
    is_gguf = to.endswith(gguf_export.SUFFIX)
    dtypes = gguf_export.DTYPES if is_gguf else hf_export.DTYPES
    if dtype not in dtypes:
        raise ValueError(f"--dtype={dtype}: known for {'GGUF files' if is_gguf else 'folders'}: {', '.join(dtypes)}")
    if adapter and is_gguf:
        raise ValueError(f"--adapter does not apply to --to={to}: a GGUF file has the whole model, adapters merged")
    if adapter and dtype != "float32":
        raise ValueError(f"--dtype={dtype} does not apply to --adapter: adapters are float32")

    name = stage or last_finished(recipe, workdir)
    chosen, path = choose(recipe, workdir / name, step), local_path(to, "--to")
    if adapter:
        export_adapter(recipe, workdir, name, path, chosen)
    elif is_gguf:
        export_gguf(recipe, workdir, name, path, dtype, chosen)
    else:
        export(recipe, workdir, name, path, dtype, chosen=chosen)
