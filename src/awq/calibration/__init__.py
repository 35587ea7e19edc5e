"""From text to token batches: sources, samples, batches.

`sources` opens files, data sets and lists as documents, `samples` tokenizes and cuts them, `batches` puts
samples of like length side by side. Nothing here knows what the tokens are for.
"""

from awq.calibration.batches import Batch, make_batches
from awq.calibration.samples import CalibrationSet, load_calibration
from awq.calibration.sources import bundled_text, read_documents, read_text

__all__ = [
    "Batch",
    "CalibrationSet",
    "bundled_text",
    "load_calibration",
    "make_batches",
    "read_documents",
    "read_text",
]
