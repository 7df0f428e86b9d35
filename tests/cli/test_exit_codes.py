"""Exit codes are promises: 2 for usage, 3 for a refusal, 4 for what was written and is wrong, 70 for a bug of ours."""

from __future__ import annotations

import signal

from converter import errors


def test_each_error_has_its_exit_code() -> None:
    found = {
        kind.__name__: kind("code", "what").exit_code
        for kind in (errors.ConvertError, errors.UsageError, errors.Refused, errors.VerificationFailed)
    }
    assert found == {"ConvertError": 3, "UsageError": 2, "Refused": 3, "VerificationFailed": 4}
    assert errors.EXIT_BUG == 70


def test_an_interrupted_run_has_the_exit_code_that_a_shell_gives() -> None:
    codes = [errors.Interrupted(number, "stopped").exit_code for number in (signal.SIGINT, signal.SIGTERM)]
    assert codes == [130, 143]
