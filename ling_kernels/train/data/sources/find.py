"""Which files are data."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from ....errors import InputError
from ....files import read_json, user_path

TEXT = (
    ".txt",
    ".md",
    ".rst",
    ".py",
    ".c",
    ".cc",
    ".cpp",
    ".cu",
    ".cuh",
    ".h",
    ".hpp",
    ".java",
    ".js",
    ".rs",
    ".sh",
    ".ts",
)
TABLES = (".parquet", ".arrow")
COMPRESSED = (".gz", ".zst")  # of text, .json and .jsonl
SUFFIXES = (*TEXT, ".json", ".jsonl", *TABLES, ".bin")
# What a search in a folder finds. The second row counts only where there is nothing of the first, as a data set may
# have a README.md and a script beside it; .json files, which rarely are data, must be named.
SEARCHED = ((".txt", ".jsonl", *TABLES, ".bin"), TEXT)


def kind_of(path: Path) -> str:
    """The suffix that says how a file is read: .txt for x.txt.gz; the last one where nothing is known about it."""
    inner = Path(path.stem).suffix
    return inner if path.suffix in COMPRESSED and inner in (*TEXT, ".json", ".jsonl") else path.suffix


def find_files(sources: Sequence[str | Path], texts_may_be_gone: bool = False) -> list[Path]:
    """The data files that `sources` name, in a fixed order; folders are searched recursively.

    Raises InputError for a source that is not there or has no data, unless it may be a text that is gone.
    """
    found = []
    for path in map(user_path, sources):
        if path.is_dir():
            inside = search(path)
            if not inside and not texts_may_be_gone:
                raise InputError(f"the folder {path} holds no {', '.join(dict.fromkeys(sum(SEARCHED, ())))} file")
            found += inside
        elif not path.exists() and texts_may_be_gone and path.suffix != ".bin":
            continue
        elif not path.exists():
            raise InputError(f"there is no data at {path}")
        elif kind_of(path) not in SUFFIXES:
            known = f"{', '.join(SUFFIXES)}, and {' and '.join(COMPRESSED)} of text and JSON"
            raise InputError(f"{path} has an unknown suffix; known are {known}")
        else:
            found.append(path)
    return found


def search(folder: Path) -> list[Path]:
    everything = sorted(folder.rglob("*"))
    splits = dict(train_splits(everything))
    for kinds in SEARCHED:
        inside = [p for p in everything if kind_of(p) in kinds and is_data(p, folder, splits) and p.is_file()]
        if inside:
            return inside
    return []


def is_data(path: Path, folder: Path, splits: dict[Path, Path]) -> bool:
    """Whether a file found in `folder` is one to train on, by what lies around it."""
    kind = kind_of(path)
    if kind == ".bin":
        return path.with_suffix(".json").is_file() or path.with_suffix(".idx").is_file()
    if kind not in SEARCHED[0] and any(part.startswith(".") for part in path.relative_to(folder).parts):
        return False  # sources in .git, .venv
    around = [folder / parent for parent in path.relative_to(folder).parents]
    if any(parent in splits and splits[parent] not in around for parent in around):
        return False
    return kind != ".arrow" or path.name in saved_files(path.parent, path.name)


def train_splits(paths: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
    """(folder, its split to train on) of every DatasetDict that Hugging Face datasets have saved."""
    for path in paths:
        if path.name == "dataset_dict.json":
            train = path.parent / "train"
            if not train.is_dir():
                splits = read_json(path).get("splits")
                raise InputError(f"{path.parent} is a dataset without the split train: name a folder of {splits}")
            yield path.parent, train


def saved_files(folder: Path, name: str) -> list[str]:
    """Names of a saved dataset's files, beside which others may hold the results of `map`; elsewhere [name]."""
    state = folder / "state.json"
    if not state.is_file():
        return [name]
    files = read_json(state).get("_data_files")
    files = [file.get("filename") for file in files if isinstance(file, dict)] if isinstance(files, list) else []
    return files or [name]
