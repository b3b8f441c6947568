"""`jaxstages`, and `python -m jaxstages`: ready for signals before the slow imports, then through the door."""

import faulthandler
import os
import signal
import sys

from jaxstages.runtime.cpu_tuning import disable_malloc_trim, enable_compilation_cache
from jaxstages.runtime.signals import stop_signals


def _keep_compiled() -> None:
    if told := enable_compilation_cache():
        print(f"jaxstages: {told}", file=sys.stderr)


def cli() -> None:
    """The console script."""
    faulthandler.enable()
    disable_malloc_trim()
    with stop_signals():
        from jaxstages.cli.main import main

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
