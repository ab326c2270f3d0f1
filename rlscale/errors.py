"""The exception that the command line turns into one line and exit code 2."""


class UserError(Exception):
    """Something the user can mend: the message is one line that names the value and the remedy."""


class LearnerDied(UserError):
    """A process of the learner is gone; what it had learnt since the last checkpoint went with it."""
