"""The exception that the command line turns into one line and exit code 2, and its kinds that are caught."""


class UserError(Exception):
    """Something the user can mend: the message is one line that names the value and the remedy."""


class WorkerDied(UserError):
    """A process of a run, or the machine that it was on, is gone: on new workers the run may do well."""


class LearnerDied(WorkerDied):
    """A process of the learner is gone; what it had learnt since the last checkpoint went with it."""
