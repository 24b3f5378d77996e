"""Many models beside each other with one report. A study is a file here and a line in STUDIES: runs of recipes (Study),
or counts of structures (CountStudy)."""

from .code_n_all import CODE_N_ALL
from .counts import CountStudy, run_counts
from .soft_shared import SOFT_SHARED
from .study import Member, Study, run_study
from .tversky_scaling import TVERSKY_SCALING

STUDIES: dict[str, Study | CountStudy] = {study.name: study for study in (CODE_N_ALL, SOFT_SHARED, TVERSKY_SCALING)}

__all__ = ["STUDIES", "CountStudy", "Member", "Study", "run_counts", "run_study"]
