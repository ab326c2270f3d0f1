"""Measures the parts of a run apart: rollout, weight sync, learner, and how two of them agree."""
