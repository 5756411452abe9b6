"""Base of all API models: names in camelCase, no unknown fields, CEL rules beside the fields.

Nothing here may import a Kubernetes client, torch, or anything of the operator or the trainer.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer, StringConstraints
from pydantic.alias_generators import to_camel


@dataclass(frozen=True)
class Rule:
    """A cross-field rule, written once as CEL and evaluated by both the API server and `finetune validate`.

    `rule` sees the object as `self` (and, for a transition rule, its last state as `oldSelf`);
    `field` is the path, relative to the object, that the error points at.
    """

    rule: str
    message: str
    field: str = ""
    reason: Literal["FieldValueInvalid", "FieldValueForbidden", "FieldValueRequired"] = "FieldValueInvalid"
    """What the API server calls it: `Invalid value`, `Forbidden` or `Required value`."""


class ApiModel(BaseModel):
    """Base of every model: camelCase on the wire, snake_case in Python, unknown fields refused."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        ser_json_inf_nan="null",
    )

    cel_rules: ClassVar[tuple[Rule, ...]] = ()

    def to_wire(self) -> dict[str, object]:
        """The JSON object of the wire: camelCase names, absent instead of null."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class Stage(StrEnum):
    """The four stages of a job, in order."""

    PREPARE = "prepare"
    TRAIN = "train"
    EVALUATE = "evaluate"
    PUBLISH = "publish"


STAGES: tuple[Stage, ...] = tuple(Stage)

GROUP = "finetune.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "FineTuneJob"
PLURAL = "finetunejobs"

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
"""A DNS label."""

RepoId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?$", max_length=200)]
"""`owner/name` on the Hub."""

Duration = Annotated[str, StringConstraints(pattern=r"^([0-9]+(h|m|s))+$", max_length=32)]
"""A duration such as `90s`, `15m`, `1h30m`."""

Quantity = Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?(Ki|Mi|Gi|Ti|Pi|k|M|G|T|P)?$", max_length=32)]
"""A Kubernetes quantity of bytes such as `200Gi`."""

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


Count = Annotated[int, Field(ge=0, le=2**53 - 1)]
"""A number of things; at most what every reader of JSON holds exactly."""


def _as_utc(value: datetime) -> datetime:
    """The time in UTC. Raises ValueError where it has no zone or is not of this age: arithmetic with it would fail."""
    if value.tzinfo is None:
        raise ValueError("the time has no zone: write it in UTC, with a Z at its end")
    if not 2000 <= value.year < 2200:
        raise ValueError("the year is not between 2000 and 2199")
    return value.astimezone(UTC)


def _rfc3339(value: datetime) -> str:
    # Called some twenty times per status; strftime takes ten times as long.
    return f"{value.isoformat()[:19]}Z"


Time = Annotated[datetime, AfterValidator(_as_utc), PlainSerializer(_rfc3339, when_used="json")]
"""UTC, to the second, as Kubernetes writes it."""


def duration_seconds(text: str) -> int:
    """Seconds in a `Duration`: `1h30m` is 5400. The text must match `Duration`'s pattern."""
    seconds_per_unit = {"h": 3600, "m": 60, "s": 1}
    total, digits = 0, ""
    for char in text:
        if char.isdigit():
            digits += char
        else:
            total += int(digits) * seconds_per_unit[char]
            digits = ""
    return total
