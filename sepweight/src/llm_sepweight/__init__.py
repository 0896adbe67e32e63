"""The weights of a large language model, part by part, at the speed of the disk.

>>> with llm_sepweight.open(model_dir, layout=family.layout) as weights:  # doctest: +SKIP
...     tensors = weights.load("mid.00017")
"""

from llm_sepweight._catalog import TensorInfo
from llm_sepweight._damage import Damage
from llm_sepweight._diff import Difference, diff
from llm_sepweight._dump import dump
from llm_sepweight._errors import WeightError
from llm_sepweight._export import export
from llm_sepweight._fetch import fetch
from llm_sepweight._filenames import filenames
from llm_sepweight._split import split
from llm_sepweight._store import WeightStore, open
from llm_sepweight._verify import verify

__version__ = "0.2.0"
__all__ = [
    "Damage", "Difference", "TensorInfo", "WeightError", "WeightStore",
    "diff", "dump", "export", "fetch", "filenames", "open", "split", "verify",
]  # fmt: skip
