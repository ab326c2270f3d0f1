"""Sections, the parts of the configuration tree: closed to unknown keys, immutable, listed with their
defaults.

A field may hold a section, or a tagged union of sections that their `kind` tells apart.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator

TAG = "kind"
"""The field that tells the members of a union apart."""


class Section(BaseModel):
    """A part of the tree. Given in part, it keeps the rest of the default of the field that holds it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _parts_lie_over_defaults(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        laid = {}
        for key, value in tree.items():
            default = cls.model_fields[key].default if key in cls.model_fields else None
            if isinstance(default, Section):
                if value is None:  # a section whose lines are all commented out is null to YAML
                    continue
                value = _laid_over(default, value) if isinstance(value, dict) else value
            laid[key] = value
        return laid


def sections(annotation: Any) -> list[type[Section]]:
    """The sections that a field may hold, None apart; empty for a field that holds anything else."""
    if get_origin(annotation) in (Union, types.UnionType):
        members = [sections(member) for member in get_args(annotation) if member is not type(None)]
        return [section for member in members for section in member] if all(members) else []
    is_section = isinstance(annotation, type) and issubclass(annotation, Section)
    return [annotation] if is_section else []


def tags(section: type[Section]) -> tuple[str, ...]:
    """The values of `kind` that mean this section; none outside unions."""
    field = section.model_fields.get(TAG)
    return get_args(field.annotation) if field is not None else ()


def describe_settings(
    section: type[Section], prefix: str = "", default: Section | None = None
) -> Iterator[tuple[str, str, str]]:
    """Every setting below a section, in order: dotted key, default and explanation, as text.

    A member of a union has a row `key.kind=TAG` with its explanation, and its settings follow.

    Args:
        default: the section as the field that holds it has it, where that is not the section's own default.
    """
    for name, field in section.model_fields.items():
        key, value = f"{prefix}{name}", field.default if default is None else getattr(default, name)
        members = sections(field.annotation)
        if not members:
            yield key, str(value), " ".join((field.description or "").split())
        elif len(members) == 1:
            yield from describe_settings(members[0], f"{key}.", value)
        else:
            for member in members:
                yield from _describe_member(member, value, key)


def locate(section: type[Section], location: tuple[int | str, ...]) -> tuple[list[str], type[Section]]:
    """The keys of a validation error's location, without the tags that pydantic puts between them, and the
    innermost section on the way."""
    keys: list[str] = []
    members: list[type[Section]] = []
    for part in location:
        tagged = [member for member in members if part in tags(member)]
        if tagged:
            section, members = tagged[0], []
            continue
        keys.append(str(part))
        field = section.model_fields.get(str(part))
        members = sections(field.annotation) if field is not None else []
        if len(members) == 1:
            section, members = members[0], []
    return keys, section


def _laid_over(default: Section, given: dict[str, Any]) -> dict[str, Any]:
    """What `given` means where `default` stood: of another kind it stands alone."""
    kind = getattr(default, TAG, None)
    if given.get(TAG, kind) != kind:
        return given
    laid: dict[str, Any] = {name: getattr(default, name) for name in default.model_fields_set}
    if kind is not None:
        laid[TAG] = kind
    for key, value in given.items():
        before = laid.get(key)
        is_part = isinstance(before, Section) and isinstance(value, dict)
        laid[key] = _laid_over(before, value) if is_part else value  # type: ignore[arg-type]
    return laid


def _describe_member(member: type[Section], default: Any, key: str) -> Iterator[tuple[str, str, str]]:
    own = default if isinstance(default, member) else None
    explanation = " ".join((member.__doc__ or "").split())
    yield f"{key}.{TAG}={'|'.join(tags(member))}", "" if own is None else getattr(own, TAG), explanation
    rows = [row for row in describe_settings(member, f"{key}.", own) if row[0] != f"{key}.{TAG}"]
    yield from sorted(rows, key=lambda row: row[0].count("."))  # what is the member's own before its parts
