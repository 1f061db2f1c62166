"""The one exception that a program answers with a single line and exit code 2."""


class UserError(Exception):
    """Something that the user can put right: the message names the field, its value and the remedy.

    Programs print the message on one line and exit with code 2 (see `flux_func.cli`). Anything else that
    reaches the top of a program is a defect of ours and keeps its traceback.
    """
