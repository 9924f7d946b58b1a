"""What all tests share."""

from hypothesis import settings

# How long one example takes says nothing on a machine that others use too.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
