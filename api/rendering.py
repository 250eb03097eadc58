"""The Jinja environment of the pages and how values are written in them: numbers, times, badges. It knows no store and no route."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from api.principal import current_principal
from nas.shape import Shape

MISSING = "–"
"""Written where there is no value (yet)."""

_MAGNITUDES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))


def format_count(value: float | None) -> str:
    """A count in three digits: 8.03B, 260K, 96."""
    if value is None:
        return MISSING
    for magnitude, letter in _MAGNITUDES:
        # 999.5 and more of one magnitude would round to 1000 of it.
        if abs(value) >= magnitude * 0.9995:
            scaled = value / magnitude
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{letter}"
    return f"{value:,.0f}"


def format_number(value: float | None, digits: int = 3) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"


def format_percent(share: float | None, digits: int = 1) -> str:
    return MISSING if share is None else f"{100 * share:.{digits}f}%"


def format_signed(value: float | None, digits: int = 3) -> str:
    """A difference, with its sign: +0.012, −0.300, 0.000."""
    if value is None:
        return MISSING
    text = f"{abs(value):.{digits}f}"
    return text if float(text) == 0 else f"{'−' if value < 0 else '+'}{text}"


def format_bytes(value: float | None) -> str:
    if value is None:
        return MISSING
    for magnitude, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= magnitude:
            return f"{value / magnitude:.1f} {unit}"
    return f"{value:.0f} B"


def format_seconds(seconds: float | None) -> str:
    """A duration in its two largest units: 2 h 05 min, 41 s, 0.3 s."""
    if seconds is None:
        return MISSING
    if seconds < 10:
        return f"{seconds:.1f} s"
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    if total < 48 * 3600:
        return f"{total // 3600} h {total % 3600 // 60:02d} min"
    return f"{total // 86400} d {total % 86400 // 3600:02d} h"


def format_time(moment: datetime | None) -> str:
    return MISSING if moment is None else moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def format_age(moment: datetime, *, now: datetime) -> str:
    seconds = max((now - moment).total_seconds(), 0)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} ago"
    return "just now"


def shape_key(shape: dict[str, int]) -> str:
    return Shape.from_dict(shape).key


def origin_badge(origin: str) -> tuple[str, str] | None:
    """Class and text of the badge of a trial's origin; None for what the sampler proposed."""
    kind, _, name = origin.partition(":")
    match kind:
        case "anchor":
            return "anchor", name.replace("_", " ") or "anchor"
        case "user":
            return "user", "yours"
        case "control":
            return "control", "random control"
        case "repeat":
            return "control", f"repeat {name}"
    return None


def ticks(text: str) -> Markup:
    """Text in which `this` is code; everything in it is escaped."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def pretty_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("api", "templates"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": format_count,
        "number": format_number,
        "percent": format_percent,
        "signed": format_signed,
        "bytes": format_bytes,
        "seconds": format_seconds,
        "time": format_time,
        "age": format_age,
        "origin_badge": origin_badge,
        "shape_key": shape_key,
        "pretty_json": pretty_json,
        "ticks": ticks,
    }
    environment.globals["missing"] = MISSING
    environment.globals["principal"] = current_principal.get
    return environment


TEMPLATES = _environment()
