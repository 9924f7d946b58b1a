"""The one thing that pyproject.toml cannot say: cffi builds the C core as `idc._core`."""

from setuptools import setup

setup(cffi_modules=["idc/core/build.py:ffibuilder"])
