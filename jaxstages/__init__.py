"""jaxstages: train a language model in three stages, as pure JAX functions."""

import importlib.metadata
import os

# On CPU, jaxlib 0.10 and 0.11 can return wrong values from fused reductions (jax#39103). XLA reads the cure once, when
# the backend starts, so it is set here, before any of our code can start it. The user's own flags are kept.
_CURE = "--xla_cpu_experimental_ynn_fusion_type=-reduce"
if importlib.metadata.version("jaxlib").startswith(("0.10.", "0.11.")):
    _flags = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_experimental_ynn_fusion_type" not in _flags:
        os.environ["XLA_FLAGS"] = f"{_flags} {_CURE}".strip()
