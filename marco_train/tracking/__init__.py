"""What is written of a run while it goes on, by the main rank."""

from marco_train.tracking.tracker import Tracker, format_eta, format_seconds, log_line

__all__ = ["Tracker", "format_eta", "format_seconds", "log_line"]
