"""The one exception for the user's mistakes.

A message names the value, the rule it breaks and what to do next, in one line. `cli.run` prints it and exits with
code 2; every other exception is a bug and keeps its traceback.
"""


class InputError(ValueError):
    """Input that cannot be used: a path, a file's content, a flag, a combination of them."""
