"""What went wrong, where, and what to do: the only exceptions a user sees as one line with exit code 2.

And how many, in words: `counted`, for these and for every other text.
"""


class AutosegError(Exception):
    """An expected failure; `str()` reads `where: what: remedy`."""

    def __init__(self, where: object, what: str, remedy: str) -> None:
        super().__init__(f"{where}: {what}: {remedy}")
        self.where = str(where)
        self.what = what
        self.remedy = remedy

    def __reduce__(self) -> tuple[type["AutosegError"], tuple[str, str, str]]:
        """Pickle by parts, so that a loader process can return the error to its parent."""
        return type(self), (self.where, self.what, self.remedy)


class DataError(AutosegError):
    """A volume, a crop, a label or a file that cannot be used as it is."""


class DamageError(AutosegError):
    """Stored bytes that are not what they were when the data was fingerprinted."""


class PlanError(AutosegError):
    """A plan, a setting or an artifact that contradicts itself or the data."""


class CheckpointError(AutosegError):
    """A run folder or a checkpoint that does not fit, or is damaged."""


class LostProcess(AutosegError):  # noqa: N818 - what happened
    """One of several processes of a training that is gone."""


def counted(number: int, noun: str, verb: str = "") -> str:
    """Return the number with its noun, and a verb, in the plural where it is not 1: 1 class has, 1,234 classes have."""
    if number == 1:
        return f"1 {noun} {({'': '', 'have': 'has', 'are': 'is'}).get(verb, f'{verb}s')}".rstrip()
    return f"{number:,} {noun}{'es' if noun.endswith(('s', 'x', 'ch')) else 's'}" + (f" {verb}" if verb else "")
