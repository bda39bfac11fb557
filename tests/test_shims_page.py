"""docs/integrations/shims.md: its lines run as pasted, and its tables name what there is."""

import importlib
import re
from pathlib import Path

PAGE = (Path(__file__).parents[1] / "docs/integrations/shims.md").read_text()


def test_its_lines_run():
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(code, {})


def test_its_tables_name_what_there_is():
    """A section's heading begins with the library's name; its module has every name of the first column."""
    sections = {
        "DeepGEMM": "deep_gemm",
        "Transformer Engine": "transformer_engine",
        "Liger": "liger",
        "linghe": "linghe",
    }
    for title, module in sections.items():
        tables = PAGE.split(f"\n## {title} ")[1].split("\n## ")[0].split("|---|---|---|---|\n")[1:]
        for table, file in zip(tables, (module, f"{module}_block"), strict=False):
            rows = table.split("\n\n")[0].splitlines()
            names = [name for row in rows for name in re.findall(r"`([\w.]+)`", row.split("|")[1])]
            value = importlib.import_module(f"ling_kernels.integrations.{file}")
            assert names and all(hasattr(value, name.split(".")[0]) for name in names)
