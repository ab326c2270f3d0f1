"""Settings that all tests share."""

from hypothesis import settings

# Two busy cores make single examples slow now and then, which says nothing about the code.
settings.register_profile("rlscale", deadline=None)
settings.load_profile("rlscale")
