"""Tables in the ARFF format of Weka."""

from functools import lru_cache
from pathlib import Path

import numpy as np

from gradbal.lab.problems import files


@lru_cache
def read_columns(path: Path) -> np.ndarray:
    """Read a table without gaps; a column of words becomes one column of 0 and 1 for each word.

    Args:
        path: The file.

    Returns:
        Shape ``[rows, columns]``, in the order of the file.

    Raises:
        ValueError: If there is no such file, if it is no ARFF file, or if a value is missing.
    """
    arff = files.package(path.name, "scipy.io", "scipy").arff
    if not path.is_file():
        raise ValueError(f"{path.name}: there is no such file.")
    try:
        table, meta = arff.loadarff(path)
    except Exception as error:  # whatever the parser stumbled over
        raise ValueError(f"{path.name}: not an ARFF file of plain columns.") from error
    columns = []
    for name in meta.names():
        kind, words = meta[name]
        values = table[name]
        gap = values == b"?" if kind == "nominal" else ~np.isfinite(values)
        if gap.any():
            raise ValueError(f"{path.name}: column {name} has missing values; fill them in first.")
        if kind == "nominal":
            columns += [(values == word.encode()).astype(float) for word in words]
        else:
            columns.append(values)
    return np.stack(columns, axis=1)
