"""Boots virtual machines, plugs shared memory into them, runs and measures transfers."""
