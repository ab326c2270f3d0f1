"""Measures the parts of a run apart: rollout, weight sync and learner. `rlscale bench` is its command line."""
