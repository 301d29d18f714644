"""The errors that a user sees: one or two sentences that name the thing and the way out."""


class InputError(Exception):
    """What was asked for cannot be read, understood or had here: exit code 2."""


class Unsupported(Exception):
    """A backend cannot take an export; the message becomes the status of the row."""
