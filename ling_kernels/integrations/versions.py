"""Imports the library of an integration, or says in one line what is missing or which version is wanted."""

import importlib
import importlib.metadata
import operator
import re
from types import ModuleType

from ..errors import InputError

COMPARE = {">=": operator.ge, "<": operator.lt, "==": operator.eq, "!=": operator.ne}


class MissingPackage(InputError, ImportError):
    """The library of an integration is not installed, has another version, or cannot be imported."""


def require(module: str, package: str, versions: str = "") -> ModuleType:
    """Import `module` ("megatron.core") of the distribution `package` ("megatron-core") and return it.

    versions: "", or comparisons of release numbers as in ">=0.16,<1". A source tree that is on the path without being
    installed has no version, and is taken as it is. Raises MissingPackage.
    """
    wanted = f"{module} ({package}{versions})"
    remedy = f'pip install "{package}{versions}"'
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        version = ""
    if version and not fits(version, versions):
        raise MissingPackage(f"this integration needs {wanted}, but {version} is installed: {remedy}")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if f"{module}.".startswith(f"{error.name}."):
            raise MissingPackage(f"this integration needs {wanted}, which is not installed: {remedy}") from None
        raise MissingPackage(f"this integration needs {wanted}, which cannot be imported: {error}") from error


def fits(version: str, versions: str) -> bool:
    """Whether a version meets all of the comparisons. Only its numbers count: 5.0.0rc1 is as 5.0."""
    for comparison in filter(None, versions.split(",")):
        name, wanted = re.fullmatch(r"\s*(>=|<|==|!=)\s*([\d.]+)\s*", comparison).groups()
        if not COMPARE[name](release(version), release(wanted)):
            return False
    return True


def release(version: str) -> tuple[int, ...]:
    """(5, 0, 1) of "5.0.1+cpu"; zeros at the end do not count."""
    numbers = [int(n) for n in re.match(r"[\d.]*\d", version)[0].split(".")]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)
