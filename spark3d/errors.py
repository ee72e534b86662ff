"""Errors a user can cause, each with the exit code that the command line returns for it."""


class ConfigError(ValueError):
    """A recipe, option or checkpoint does not fit what was asked for (exit code 2)."""

    exit_code = 2


class DataError(ValueError):
    """A file or folder of data cannot be used as it is (exit code 3)."""

    exit_code = 3


class EnvironmentProblem(RuntimeError):
    """The machine cannot do what was asked: no space, no rights, a lock held (exit code 4)."""

    exit_code = 4


class Interrupted(RuntimeError):
    """Work was stopped on request and resumes with the same command (exit code 75)."""

    exit_code = 75
