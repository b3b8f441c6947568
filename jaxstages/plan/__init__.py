"""Estimates for a recipe before it runs: memory, communication between devices, and time."""
