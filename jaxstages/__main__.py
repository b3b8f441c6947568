"""`jaxstages`, and `python -m jaxstages`: ready for signals before the slow imports, then through the door."""

import faulthandler
import os
import signal
import sys

from jaxstages.process import keep_compiled, keep_freed_memory
from jaxstages.signals import stop_signals


def _keep_compiled() -> None:
    if told := keep_compiled():
        print(f"jaxstages: {told}", file=sys.stderr)


def cli() -> None:
    """The console script."""
    faulthandler.enable()
    keep_freed_memory()
    with stop_signals():
        from jaxstages.main import main

        try:
            code = main(sys.argv, before_jax=_keep_compiled)
        except BrokenPipeError:  # nobody reads any more, as behind `| head`
            os._exit(128 + signal.SIGPIPE)
        try:
            sys.stdout.flush()
        except OSError:  # the disk of the log is full
            code = code or 74
        # Everything is on disk. A signal during a slow farewell of the libraries must not turn success into failure.
        os._exit(code)


if __name__ == "__main__":
    cli()
