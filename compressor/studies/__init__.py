"""Many models or attentions beside each other with one report. A study is a file here and a line in STUDIES: runs of
recipes (Study), counts of structures (CountStudy), or measurements with settings (MeasuredStudy)."""

from .attention import ATTENTION
from .code_n_all import CODE_N_ALL
from .counts import CountStudy, run_counts
from .extrapolation import EXTRAPOLATION
from .matryoshka import MATRYOSHKA
from .measured import MeasuredStudy, run_measured
from .soft_shared import SOFT_SHARED
from .study import Member, Study, run_study
from .tversky_scaling import TVERSKY_SCALING

STUDIES: dict[str, Study | CountStudy | MeasuredStudy] = {
    CODE_N_ALL.name: CODE_N_ALL,
    SOFT_SHARED.name: SOFT_SHARED,
    TVERSKY_SCALING.name: TVERSKY_SCALING,
    ATTENTION.name: ATTENTION,
    EXTRAPOLATION.name: EXTRAPOLATION,
    MATRYOSHKA.name: MATRYOSHKA,
}

__all__ = ["STUDIES", "CountStudy", "MeasuredStudy", "Member", "Study", "run_counts", "run_measured", "run_study"]
