"""Two watches of one run share a file of what was examined, and neither loses or stops the other."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

from converter.recipe.verbs.watch import Memory


def test_both_answers_are_in_the_file_whoever_writes_last(tmp_path: Path) -> None:
    file = tmp_path / "state" / "watch.json"
    one, other = Memory(file, "for openrlhf"), Memory(file, "for trl")
    one.save()
    other.save()
    one.save()
    assert set(json.loads(file.read_text("utf-8"))) == {"for openrlhf", "for trl"}


def test_two_that_write_at_once_do_not_meet(tmp_path: Path) -> None:
    file, failed = tmp_path / "watch.json", list[BaseException]()

    def write(question: str) -> None:
        memory = Memory(file, question)
        try:
            for _ in range(300):
                memory.save()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(question,)) for question in ("a", "b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert os.listdir(tmp_path) == ["watch.json"]
