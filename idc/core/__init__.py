"""The C11 core of idc: rings, doorbells, waiting and copying. Built by `idc/core/build.py` as `idc._core`."""
