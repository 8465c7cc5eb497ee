"""What ``specdec traind`` and ``specdec drafters`` need, imported only when one of them runs: torch and pyarrow."""

from __future__ import annotations

from specdec.online_training.daemon import DaemonOptions, TrainDaemon
from specdec.online_training.day_zero import OnlinePlan, build_learner
from specdec.online_training.fingerprint import fingerprint
from specdec.online_training.gate import TrainGate
from specdec.online_training.module_learner import LearnerOptions
from specdec.online_training.privacy import KeyedHash
from specdec.online_training.registry import Manifest, Registry
from specdec.online_training.replay_pool import ReplayMix
from specdec.online_training.spool import Spool
from specdec.online_training.transports import open_transport

__all__ = [
    "DaemonOptions",
    "KeyedHash",
    "LearnerOptions",
    "Manifest",
    "OnlinePlan",
    "Registry",
    "ReplayMix",
    "Spool",
    "TrainDaemon",
    "TrainGate",
    "build_learner",
    "fingerprint",
    "open_transport",
]
