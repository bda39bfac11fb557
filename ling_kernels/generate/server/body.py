"""What all models of request bodies share, and how a body is read.

A body of a megabyte may hold 300,000 wrong values. Each would become an error of pydantic, which takes seconds and
gigabytes. Therefore a list stops at its first error (fail_fast), and one unknown field of an object is looked at.
"""

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from ...errors import InputError, one_line

NO_OBJECT = "the body must be a JSON object, sent as Content-Type: application/json"


class StrictModel(BaseModel):
    """Refuses unknown fields; null fields take their default."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, body):
        if not isinstance(body, dict):
            return body
        body = {k: v for k, v in body.items() if v is not None}
        if cls.model_config["extra"] == "forbid":
            known = {field.alias or name for name, field in cls.model_fields.items()}
            unknown = [k for k in body if k not in known]
            for name in unknown[1:]:
                del body[name]
        return body


class BodyError(InputError):
    """A body that cannot be used; `field` is the path of what is wrong in it."""

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field


Parsed = TypeVar("Parsed", bound=StrictModel)


def parse_body(kind: type[Parsed], content: bytes, content_type: str) -> Parsed:
    """The body that JSON text holds. Raises BodyError that names its first error."""
    media = content_type.partition(";")[0].strip().lower()
    if not (media == "application/json" or media.startswith("application/") and media.endswith("+json")):
        raise BodyError(NO_OBJECT)
    try:
        body = json.loads(content)
    except RecursionError:
        raise BodyError("the body nests too deeply") from None
    except ValueError as error:
        raise BodyError(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise BodyError(NO_OBJECT)
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise first_error(error) from None
    except RecursionError:  # by a quoted value
        raise BodyError("the body nests too deeply") from None


def first_error(error: ValidationError) -> BodyError:
    """The first error, with the path of its field."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = []
    for part in first["loc"]:
        if isinstance(part, str) and (part == "str" or not part.isidentifier()):  # the name of a union's type
            break
        path.append(str(part))
    message = first["msg"].removeprefix("Value error, ")
    if not path:
        return BodyError(message)
    field = one_line(".".join(path))
    return BodyError(f"{field}: {message}", field)


def shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
