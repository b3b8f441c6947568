"""JAX's persistent compilation cache, in the user's cache folder."""

import os
from pathlib import Path

from jaxstages.runtime.cpu import processor_digest


def enable_compilation_cache() -> str:
    """Keep compiled functions in the user's cache folder, where the next process finds them.

    `JAX_COMPILATION_CACHE_DIR` names another folder, or, empty, none. The code in such a folder is executed, so it must
    belong to the user alone. Each kind of processor has a folder of its own, since home folders are shared.

    Returns a message if they can't be kept, else "".
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return ""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = base / "jaxstages" / f"compiled-{processor_digest()}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError) as error:
        return f"compiled functions are not kept: {error}; set JAX_COMPILATION_CACHE_DIR to a folder of yours"
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        return f"compiled functions are not kept: others may write to {folder}; remove it, or chmod 700"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # By default only what took a second is kept: a start compiles a hundred smaller functions.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return ""
