"""How fast fastxent is: one table of cases, the providers that answer them, and what is made of the times."""


class UsageError(ValueError):
    """What was asked for makes no sense; told in one line, without a traceback."""
