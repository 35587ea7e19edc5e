"""From text to token batches: sources, samples, batches.

`sources` opens files, data sets and lists as documents, `samples` tokenizes and cuts them, `batches` puts
samples of like length side by side. Nothing here knows what the tokens are for.
"""

from awq.calibration.batches import Batch, make_batches
from awq.calibration.inputs import ModelInputs
from awq.calibration.samples import CalibrationSet, Sample, load_calibration, rows_of
from awq.calibration.sources import bundled_text, read_documents, read_text

__all__ = [
    "Batch",
    "CalibrationSet",
    "ModelInputs",
    "Sample",
    "bundled_text",
    "load_calibration",
    "make_batches",
    "read_documents",
    "read_text",
    "rows_of",
]
