"""Runs of many recipes with one report. A study is a file here and a line in STUDIES."""

from .code_n_all import CODE_N_ALL
from .soft_shared import SOFT_SHARED
from .study import Member, Study, run_study

STUDIES: dict[str, Study] = {study.name: study for study in (CODE_N_ALL, SOFT_SHARED)}

__all__ = ["STUDIES", "Member", "Study", "run_study"]
