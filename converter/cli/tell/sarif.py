"""Findings in SARIF 2.1.0, which GitHub, GitLab and editors show beside the files.

Source: https://docs.oasis-open.org/sarif/sarif/v2.1.0/os/sarif-v2.1.0-os.html
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from converter.core.files.names import ADAPTER_CONFIG, MODEL_CONFIG
from converter.recipe.verbs.watch import Examined
from converter.version import __version__

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/os/schemas/sarif-schema-2.1.0.json"
_LEVELS = {"error": "error", "changes-numbers": "warning", "cosmetic": "note"}
_NOT_EXAMINED, _NOT_COMPARED = "not-examined", "not-compared"
_SHOWN_AT = (ADAPTER_CONFIG, MODEL_CONFIG)
"""Files at which a finding of a folder is shown: it needs one that is text."""


def sarif(found: Sequence[Examined]) -> dict[str, Any]:
    """One run with a result for each finding, and for each checkpoint that could not be examined or compared."""
    results = [_result(each.path, finding) for each in found for finding in each.findings]
    results += [
        _result(each.path, {"code": _NOT_EXAMINED, "severity": "error", "message": each.failed})
        for each in found
        if each.failed is not None
    ]
    results += [
        _result(each.path, {"code": _NOT_COMPARED, "severity": "cosmetic", "message": each.not_compared})
        for each in found
        if each.not_compared is not None
    ]
    codes = sorted({str(r["ruleId"]) for r in results})
    for result in results:
        result["ruleIndex"] = codes.index(result["ruleId"])
    driver = {
        "name": "rlhf-convert",
        "version": __version__,
        "semanticVersion": __version__,
        "rules": [_rule(code) for code in codes],
    }
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": results}]}


def _result(folder: str, finding: Mapping[str, Any]) -> dict[str, Any]:
    following = f"\nNext: {finding['next']}" if finding.get("next") else ""
    uri = quote(_shown_at(folder), safe="/")
    return {
        "ruleId": finding["code"],
        "level": _LEVELS[finding["severity"]],
        "message": {"text": f"{finding['message']}{following}"},
        "locations": [{"physicalLocation": {"artifactLocation": {"uri": uri}, "region": {"startLine": 1}}}],
        "partialFingerprints": {"rlhfConvert/v1": f"{finding['code']}:{_relative(folder)}"},
    }


def _shown_at(folder: str) -> str:
    name = next((n for n in _SHOWN_AT if (Path(folder) / n).is_file()), None)
    return _relative(folder if name is None else os.path.join(folder, name))


def _relative(path: str) -> str:
    """From the working folder, which is the repository's root in a pipeline."""
    return Path(os.path.relpath(path)).as_posix()


def _rule(code: str) -> dict[str, Any]:
    from converter.errors import UsageError
    from converter.recipe.verbs.explain import Explanation, explain

    rule: dict[str, Any] = {"id": code, "name": "".join(word.capitalize() for word in code.split("-"))}
    try:
        told = explain(code)
    except UsageError:
        return rule
    if isinstance(told, Explanation):
        rule["fullDescription"] = {"text": told.text}
    return rule
