"""The errors that a user can cause; each names what is wrong, where, and what to type next.

FinetuneError
├── ParamsError     params.yaml is not valid; lists every fault by key
├── DataError       an input file is missing, damaged or leaves nothing to work on
├── DeviceError     the hardware cannot do what params.yaml asks for
├── NotFiniteError  training came to NaN or infinity
├── StoppedError    a signal ended the work; it can go on from where it was
├── ExportError     merge, quantisation or template failed its check
└── TrackingError   MLflow cannot be reached or refuses
"""

from __future__ import annotations


class FinetuneError(Exception):
    """A fault with its place and its remedy: `what` happened, `where` (file or key), `remedy` to type.

    `exit_code`: with which a stage ends on it.
    """

    exit_code = 1

    def __init__(self, what: str, where: object, remedy: str) -> None:
        self.what, self.where, self.remedy = what, str(where), remedy
        super().__init__(f"{what}\n  where:  {where}\n  remedy: {remedy}")


class ParamsError(FinetuneError):
    """params.yaml breaks its schema."""


class DataError(FinetuneError):
    """An input file or its content cannot be used."""


class DeviceError(FinetuneError):
    """The machine lacks what params.yaml asks for."""


class NotFiniteError(FinetuneError):
    """Losses, gradients or weights are not finite."""


class StoppedError(FinetuneError):
    """The run was asked to stop and has saved its state; 75 is EX_TEMPFAIL of sysexits.h: try again."""

    exit_code = 75


class ExportError(FinetuneError):
    """A produced artefact fails its own check."""


class TrackingError(FinetuneError):
    """MLflow cannot do what is asked."""
