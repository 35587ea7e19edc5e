"""Every error OpenAWQ raises on purpose.

    AwqError
    ├── ConfigError (ValueError)          an option has no meaning, or options contradict one another
    ├── CalibrationError (ValueError)     the calibration text is missing, empty or too short
    ├── CheckpointError                   a model folder cannot be read as one
    │   ├── MissingFileError (FileNotFoundError)
    │   ├── CorruptFileError              truncated, unreadable or contradictory files
    │   ├── AlreadyQuantizedError         asked to quantize what is quantized
    │   ├── WeightError                   NaN or infinity in a weight
    │   └── LoadError                     missing, unexpected or mismatched tensors
    ├── StructureError                    no decoder blocks found, or a block could not be run
    ├── OutputError (OSError)             the output folder cannot be written
    │   ├── DiskFullError
    │   ├── OutputExistsError             the folder holds something else
    │   └── ResumeError                   the folder holds another run's unfinished work
    ├── EvaluationError                   a model's output cannot be judged
    ├── KernelError                       no kernel serves this layer on this machine
    ├── MissingDependencyError (ImportError)
    └── RemovedError (ImportError)        AutoAWQ had this name, and OpenAWQ has something else

A message names what failed, where, and what the user can do about it.
"""

from __future__ import annotations


class AwqError(Exception):
    """The root of the tree: catch this to catch everything raised on purpose."""


class ConfigError(AwqError, ValueError):
    """An option has no meaning, or two options contradict one another."""


class CalibrationError(AwqError, ValueError):
    """The calibration data is missing, empty or too short to use."""


class CheckpointError(AwqError):
    """A folder cannot be read as a model."""


class MissingFileError(CheckpointError, FileNotFoundError):
    """A file that the model needs does not exist."""


class CorruptFileError(CheckpointError):
    """A file is truncated, unreadable, or contradicts another one."""


class AlreadyQuantizedError(CheckpointError):
    """The model to quantize is quantized already."""


class WeightError(CheckpointError):
    """A weight holds NaN or infinity."""


class LoadError(CheckpointError):
    """A checkpoint and its model disagree about tensors."""


class StructureError(AwqError):
    """The model's decoder blocks were not found, or one could not be run."""


class OutputError(AwqError, OSError):
    """The output folder cannot be written."""


class DiskFullError(OutputError):
    """The disk has no room for the result."""


class OutputExistsError(OutputError):
    """The output folder holds something that is not this run's."""


class ResumeError(OutputError):
    """The output folder holds unfinished work made with other settings."""


class EvaluationError(AwqError):
    """A model's output cannot be judged: NaN or infinite logits."""


class KernelError(AwqError):
    """No kernel serves this layer on this machine."""


class MissingDependencyError(AwqError, ImportError):
    """An optional package is needed and not installed."""


class RemovedError(AwqError, ImportError):
    """A name of AutoAWQ's that leads nowhere; the message says what to use."""


def first_line(error: Exception) -> str:
    """The first line of another library's error, for a message of ours; its type where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
