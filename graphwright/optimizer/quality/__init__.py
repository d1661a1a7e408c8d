"""Quality: text to measure on, what a program loses on it, and what each lossy option adds to that."""

from graphwright.optimizer.quality.metrics import Quality, Reference, measure_quality
from graphwright.optimizer.quality.sensitivity import Option, combine, measure_sensitivities, site_options
from graphwright.optimizer.quality.store import Sensitivity, SensitivityStore, store_key
from graphwright.optimizer.quality.text import Calibration, calibration_text
from graphwright.optimizer.quality.verdict import Verdict, check_combined

__all__ = [
    "Calibration",
    "Option",
    "Quality",
    "Reference",
    "Sensitivity",
    "SensitivityStore",
    "Verdict",
    "calibration_text",
    "check_combined",
    "combine",
    "measure_quality",
    "measure_sensitivities",
    "site_options",
    "store_key",
]
