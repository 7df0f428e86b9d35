"""Findings as JUnit's XML, which every build machine shows as tests: a suite a checkpoint, a case a finding."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree

from converter.examine.diagnoses.case import SEVERITIES
from converter.recipe.verbs.watch import Examined

_NOT_XML = re.compile(r"[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(found: Sequence[Examined], fail_on: str) -> str:
    """A failure for each finding as bad as `fail_on` or worse; a checkpoint without one passes, unless its tensors were
    compared with nothing: that is a test that was skipped.
    """
    limit = SEVERITIES.index(fail_on)
    suites = ElementTree.Element("testsuites", name="rlhf-convert")
    for each in found:
        suite = ElementTree.SubElement(suites, "testsuite", name=_xml(each.path))
        bad = [f for f in each.findings if SEVERITIES.index(f["severity"]) <= limit]
        for finding in bad:
            case = _case(suite, each.path, str(finding["code"]))
            text = f"{finding['message']}\n{finding['next'] or ''}".rstrip()
            failure = ElementTree.SubElement(
                case, "failure", type=finding["severity"], message=_xml(finding["message"])
            )
            failure.text = _xml(text)
        if each.failed is not None:
            case = _case(suite, each.path, "examined")
            ElementTree.SubElement(case, "error", message=_xml(each.failed))
        elif each.not_compared is not None:
            case = _case(suite, each.path, "compared")
            ElementTree.SubElement(case, "skipped", message=_xml(each.not_compared))
        elif not bad:
            _case(suite, each.path, "doctor")
        suite.set("tests", str(len(suite)))
        suite.set("failures", str(len(bad)))
        suite.set("skipped", str(len(suite.findall("testcase/skipped"))))
        suite.set("errors", str(int(each.failed is not None)))
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True)


def _case(suite: ElementTree.Element, path: str, name: str) -> ElementTree.Element:
    return ElementTree.SubElement(suite, "testcase", classname=_xml(path), name=name)


def _xml(text: str) -> str:
    """Without what XML can't hold, however it is written."""
    return _NOT_XML.sub("\ufffd", text)
