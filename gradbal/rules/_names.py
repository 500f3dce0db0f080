"""The names of all rules, so that editors complete them; a test holds them to the registry."""

from typing import Literal

# fmt: off
RuleName = Literal[
    "aligned_mtl", "auto_lambda", "cagrad", "config", "conflict_free", "constant", "cosmos",
    "cr_mogm", "db_mtl", "dualproj", "dwa", "edm", "epo", "ew", "excess_mtl", "fairgrad", "famo",
    "ferero", "forum", "gls", "go4align", "graddrop", "gradnorm", "gradvac", "group_dro", "igb",
    "imtl", "imtl_g", "imtl_l", "krum", "ldc_mtl", "m_config", "mgda", "moco", "modo", "moml",
    "nash_mtl", "pbi", "pcd", "pcgrad", "pivrg", "pmtl", "rlw", "sdmgrad", "si", "stch",
    "stch_plain", "trimmed_mean", "upgrad", "uw",
]
# fmt: on
