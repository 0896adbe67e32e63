"""The package needs torch and nothing else."""

from __future__ import annotations

import subprocess
import sys

OTHERS = ["transformers", "numpy", "safetensors", "tokenizers", "uvicorn", "urllib3", "requests", "httpx"]


def test_importing_it_imports_no_other_library() -> None:
    # a finder in front of all others: whatever is tried is caught, installed or not
    program = f"""
import sys
import torch
before = set(sys.modules)
class Caught:
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] not in {OTHERS!r}, f"llm_sampler imports {{name}}"
sys.meta_path.insert(0, Caught())
import llm_sampler
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
foreign = sorted(name for name in new - sys.stdlib_module_names if name not in ("llm_sampler", "torch"))
assert not foreign, foreign
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
