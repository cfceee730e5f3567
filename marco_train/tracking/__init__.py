"""What is written of a run while it goes on, by the main rank."""

from marco_train.tracking.console import format_eta, format_seconds, log_line
from marco_train.tracking.samples import Sample
from marco_train.tracking.tracker import Tracker

__all__ = ["Sample", "Tracker", "format_eta", "format_seconds", "log_line"]
