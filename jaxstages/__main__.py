"""`jaxstages`, and `python -m jaxstages`: ready for signals before the slow imports."""

import faulthandler
import os
import signal
import sys

from jaxstages.runtime.compilation_cache import enable_compilation_cache
from jaxstages.runtime.cpu import disable_malloc_trim
from jaxstages.runtime.signals import end_with_parent, stop_signals


def _enable_compilation_cache() -> None:
    if message := enable_compilation_cache():
        print(f"jaxstages: {message}", file=sys.stderr)


def cli() -> None:
    """The console script."""
    faulthandler.enable()
    disable_malloc_trim()
    end_with_parent()
    with stop_signals(owns_process=True):
        from jaxstages.cli.main import main

        try:
            code = main(sys.argv, before_jax=_enable_compilation_cache)
        except BrokenPipeError:  # the reader has gone, as in `| head`
            os._exit(128 + signal.SIGPIPE)
        try:
            sys.stdout.flush()
        except OSError:  # the disk of the log is full
            code = code or 74
        # Everything is on disk. A signal during the libraries' slow clean-up must not turn success into failure.
        os._exit(code)


if __name__ == "__main__":
    cli()
