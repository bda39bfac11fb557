"""Writes the repository of the kernel: the files of this package that its layers need, as they are, and metadata.

The layout is that of the package `kernels` 0.17 (docs/source/kernel-requirements.md of huggingface/kernels at
8ac69fc5): build/<variant>/ with __init__.py and metadata.json. A variant without a version of torch or CUDA in its name
is Python only.
"""

import ast
import base64
import hashlib
import json
import shutil
from pathlib import Path

from ...errors import InputError

NAME = "ling-kernels"
VERSION = 0  # of the kernel's interface; 0 promises nothing yet
VARIANTS: dict[str, dict] = {"torch-cuda": {"type": "cuda", "archs": ["9.0"]}, "torch-cpu": {"type": "cpu"}}
LAYERS = "integrations/hub/layers.py"
FUNCTIONS = {  # what the kernel offers besides layers: the file below ops/ that has it
    "dispatch": "dispatch",
    "permute": "permute",
    "quantize": "quantize",
    "quantize_weight": "quantize",
    "rms_norm": "rms_norm",
    "route": "route",
    "swiglu": "swiglu",
    "unpermute": "unpermute",
}
PACKAGE = Path(__file__).parents[2]

INIT = '''"""Kernels for Ling-2.0 mixture-of-experts models on Hopper, in Triton. On a CPU torch references run."""

from .integrations.hub import layers
{imports}

__all__ = {names}
'''

README = """---
license: apache-2.0
tags:
- kernels
---

# ling-kernels

The Triton kernels of ling_kernels, for Ling-2.0 mixture-of-experts models on Hopper: layers {layers}; functions
{functions}.

```python
from pathlib import Path
from kernels import LocalLayerRepository, Mode, kernelize, replace_kernel_forward_from_hub, use_kernel_mapping

replace_kernel_forward_from_hub(Norm, "RMSNorm")  # your class, with weight, variance_epsilon, forward(hidden_states)
here = LocalLayerRepository(Path("."), layer_name="RMSNorm")
with use_kernel_mapping({{"RMSNorm": {{"cuda": here, "cpu": here}}}}):
    kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE)
```
"""


def write(folder: Path) -> None:
    """Write the repository into a folder, whose build/ and README.md are replaced. Raises InputError."""
    build = folder / "build"
    try:
        shutil.rmtree(build, ignore_errors=True)
        for variant in VARIANTS:
            write_variant(build / variant)
        layers = [node.name for node in parse(LAYERS).body if isinstance(node, ast.ClassDef)]
        text = README.format(layers=", ".join(sorted(layers)), functions=", ".join(FUNCTIONS))
        (folder / "README.md").write_text(text)
    except OSError as error:
        raise InputError(f"cannot write the kernel into {folder}: {error.strerror or error}") from None


def write_variant(folder: Path) -> None:
    files = {name: (PACKAGE / name).read_bytes() for name in needed()}
    imports = "\n".join(f"from .ops.{file} import {name}" for name, file in FUNCTIONS.items())
    files["__init__.py"] = INIT.format(imports=imports, names=json.dumps(["layers", *FUNCTIONS])).encode()
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    metadata = json.dumps(metadata_of(folder.name, files), indent=2)
    (folder / "metadata.json").write_text(metadata + "\n")


def metadata_of(variant: str, files: dict[str, bytes]) -> dict:
    hashes = {name: base64.b64encode(hashlib.sha256(data).digest()).decode() for name, data in sorted(files.items())}
    digest = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:10]
    backend = VARIANTS[variant]
    return {
        "name": NAME,
        "id": f"_{NAME.replace('-', '_')}_{backend['type']}_{digest}",  # also the namespace of the ops
        "version": VERSION,
        "license": "apache-2.0",
        "python-depends": [],
        "backend": backend,
        "digest": {"algorithm": "sha256", "files": hashes},
    }


def needed() -> list[str]:
    """The files of the package that the layers and functions import, by whichever way."""
    found: set[str] = set()
    waiting = [LAYERS, *(f"ops/{file}.py" for file in FUNCTIONS.values())]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            folders = [str(folder / "__init__.py") for folder in Path(name).parents if folder != Path()]
            waiting += [*folders, *imported(name)]
    return sorted(found)


def imported(name: str) -> list[str]:
    """The files that a file of the package imports; what only type checkers import is left out."""
    names = []
    nodes: list[ast.AST] = list(parse(name).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom) and node.level:
            module = Path(name).parents[node.level - 1].joinpath(*(node.module or "").split("."))
            names += [f"{module}.py", *(str(module / f"{alias.name}.py") for alias in node.names)]
    return [path for path in names if (PACKAGE / path).is_file()]


def parse(name: str) -> ast.Module:
    return ast.parse((PACKAGE / name).read_text())
