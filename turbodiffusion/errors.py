"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A wrong input: the message says in one sentence what was got, what was wanted and what to do."""
