"""The licence of a source: its name, as far as its text shows it, and whether it forbids commercial use."""

import re

_CREATIVE = re.compile(
    r"(?:creative commons )?attribution(?P<nc>[- ]non-?commercial)?(?P<end>[- ]share-?alike|[- ]no-?deriv\w*)?"
    r"(?: (?P<version>\d\.\d))?",
    re.IGNORECASE,
)
_KNOWN = (
    (r"creativecommons\.org/publicdomain/zero|\bCC0\b", "CC0-1.0"),
    (r"Apache License,?\s+Version 2\.0", "Apache-2.0"),
    (r"Permission is hereby granted, free of charge, to any person obtaining a copy", "MIT"),
    (r"Redistribution and use in source and binary forms", "BSD"),
)
_FORBIDS = re.compile(
    r"\bnon-?\s?commercial\b|\bnot\s+(?:be\s+)?used?\b[^.]{0,80}\bcommercial|\bresearch\s+(?:use|purposes)\s+only\b",
    re.IGNORECASE,
)


def from_text(text: str, file: str) -> tuple[str, bool]:
    """(name, non-commercial) of a licence text; an unknown licence gets the name `see FILE`."""
    creative = _CREATIVE.search(text) if re.search(r"creative ?commons", text, re.IGNORECASE) else None
    if creative:
        end = (creative["end"] or "").lower()
        parts = [
            "CC-BY",
            "NC" if creative["nc"] else "",
            "SA" if "share" in end else "ND" if end else "",
            creative["version"],
        ]
        name = "-".join(part for part in parts if part)
        return name, non_commercial(name)
    for pattern, name in _KNOWN:
        if re.search(pattern, text):
            return name, False
    return f"see {file}", bool(_FORBIDS.search(text))


def non_commercial(name: str | None) -> bool:
    """Whether a licence's name forbids commercial use (CC-BY-NC-4.0, cc-by-nc-sa-3.0, research only)."""
    return bool(name) and bool(
        re.search(r"(?:^|[- ])nc(?:[- ]|$)|research[- ]only", name or "", re.I) or _FORBIDS.search(name or "")
    )
