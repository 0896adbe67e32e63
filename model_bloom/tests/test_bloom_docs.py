from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.parametrize("module", ["_config", "_layout", "_parts"])
def test_the_examples_in_the_docstrings_hold(module):
    result = doctest.testmod(importlib.import_module(f"llm_bloom_model.{module}"))
    assert result.attempted
    assert not result.failed


def test_the_example_in_the_readme_prints_what_it_says(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    exec(compile(example, str(README), "exec"), {})
    expected = re.findall(r"^print\(.*\)  # (.+)$", example, re.M)
    assert len(expected) == 3
    assert capsys.readouterr().out.splitlines() == expected
