"""What a model is like to serve, before it is served; see ``examine``."""

from specdec.doctor.drafting import examine_drafter
from specdec.doctor.examine import examine, refused_report
from specdec.doctor.report import DoctorReport, DrafterReport, Problem

__all__ = ["DoctorReport", "DrafterReport", "Problem", "examine", "examine_drafter", "refused_report"]
