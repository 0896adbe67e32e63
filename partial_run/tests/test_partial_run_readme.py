"""The README's example is a program that runs."""

from __future__ import annotations

import re
from pathlib import Path


def test_the_example_of_the_readme_runs(capsys):
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["y"].shape == (1, 10, 64)
    assert "weights resident" in capsys.readouterr().out
