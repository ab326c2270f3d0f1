"""The reinforcement-learning harness that compares KDA/MLA hybrids with full MLA as outputs grow."""
