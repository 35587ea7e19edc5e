"""From text to token batches: sources, samples, batches."""

from awq.calibration.batches import Batch, make_batches
from awq.calibration.samples import CalibrationSet, load_calibration

__all__ = ["Batch", "CalibrationSet", "load_calibration", "make_batches"]
