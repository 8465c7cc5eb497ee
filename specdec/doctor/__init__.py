"""What a model is like to serve, before it is served; see ``examine``."""

from specdec.doctor.examine import examine, refused_report
from specdec.doctor.report import DoctorReport, Problem

__all__ = ["DoctorReport", "Problem", "examine", "refused_report"]
