"""From text to token batches: sources, samples, batches.

`sources` opens files, data sets and lists as documents, `samples` tokenizes and cuts them, `batches` puts
samples of like length side by side. Nothing here knows what the tokens are for.
"""

from awq.calibration.batches import Batch, make_batches
from awq.calibration.held_out import WINDOWS, HeldOut, held_out
from awq.calibration.inputs import ModelInputs
from awq.calibration.samples import CalibrationSet, Sample, load_calibration, rows_of
from awq.calibration.sources import bundled_text, read_documents, read_text

__all__ = [
    "WINDOWS",
    "Batch",
    "CalibrationSet",
    "HeldOut",
    "ModelInputs",
    "Sample",
    "bundled_text",
    "held_out",
    "load_calibration",
    "make_batches",
    "read_documents",
    "read_text",
    "rows_of",
]
