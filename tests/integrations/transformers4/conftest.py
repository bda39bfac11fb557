"""--model-code FOLDER: where the official modeling_bailing_moe_v2.py is; by default the stand-in beside this file."""

import os
import tempfile
from pathlib import Path

# transformers copies a checkpoint's code there before it imports it.
FOLDER = tempfile.TemporaryDirectory(prefix="ling_kernels_modules")
os.environ["HF_MODULES_CACHE"] = FOLDER.name


def pytest_addoption(parser):
    parser.addoption("--model-code", type=Path, default=Path(__file__).parent / "code")
