"""`python -m jaxstages`."""

from jaxstages.main import cli

cli()
