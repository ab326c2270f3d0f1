"""The learner: advantages, packing, policy losses and optimizer steps."""
