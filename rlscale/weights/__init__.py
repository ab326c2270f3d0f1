"""Weight sync from learner to rollout engines: one synchronizer, transports behind one interface."""
