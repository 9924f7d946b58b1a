"""What measures: native loops, the same through the Python API, and the worker that runs them at either end."""
