"""Recipe files: `--config` takes the path of one, or the name of one that is shipped with the package."""

import difflib
from pathlib import Path


def shipped_recipes() -> dict[str, Path]:
    """Return the shipped recipes by name: those in the installed package, or in a clone the folder `configs/`."""
    package = Path(__file__).parents[1]
    installed, clone = package / "recipes", package.parent / "configs"
    folder = installed if installed.is_dir() else clone
    return {file.stem: file for file in sorted(folder.glob("*.py"))}


def recipe_path(value: str) -> str:
    """Replace the name of a shipped recipe by its path, in a value of --config such as "demo:control".

    Raises:
        ValueError: there is neither such a file nor such a recipe.
    """
    name, colon, variant = value.partition(":")
    if _is_file(name):
        return value

    recipes = shipped_recipes()
    if name in recipes:
        return f"{recipes[name]}{colon}{variant}"

    near = difflib.get_close_matches(Path(name).stem, recipes, n=1)
    hint = f"did you mean --config={near[0]}? " if near else ""
    raise ValueError(f"--config={value}: no such file; {hint}shipped recipes: {', '.join(recipes)}")


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # too long for a path
        return False
