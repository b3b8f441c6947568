"""jaxstages: train a language model in three stages, as pure JAX functions."""
