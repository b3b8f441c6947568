"""Everything but this is in pyproject.toml: the recipes of `configs/` are installed as `jaxstages/recipes/`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["jaxstages", "jaxstages.*"]), "jaxstages.recipes"],
    package_dir={"jaxstages.recipes": "configs"},
    package_data={
        "jaxstages": ["py.typed"],
        "jaxstages.experiments": ["report.css"],
        "jaxstages.generation.serving": ["page/*"],
    },
)
