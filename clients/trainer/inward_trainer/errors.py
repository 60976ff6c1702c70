"""Everything that can go wrong, drawn as a tree.

TrainerError
├── OptionsError    options that contradict each other, lack something, or do not fit what is there
├── DataError       rows that can't be used: says which and why
├── DivergedError   the policy's gradient is not finite any more
├── Stopped         somebody asked for it, by Ctrl-C or SIGTERM; ``signal`` says which
└── ServiceError    the service refused; ``status`` is its HTTP status
    └── ServiceGone it did not answer within our patience
"""

from __future__ import annotations


class TrainerError(Exception):
    """Base of the tree; its message is for the user."""


class OptionsError(TrainerError):
    pass


class DataError(TrainerError):
    pass


class DivergedError(TrainerError):
    pass


class Stopped(TrainerError):
    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal


class ServiceError(TrainerError):
    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class ServiceGone(ServiceError):
    pass
