"""Runs one task of `worker` in a process of its own, so that a TensorRT that ends the process ends that one alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sa_export.tensorrt.runtime import environment

__all__ = ["Answer", "run_task"]


_TRACE = re.compile(r"ModelImporter\.cpp:\d+: ")


@dataclass(frozen=True)
class Answer:
    """What a task said.

    Attributes:
        result: plain values, empty when it failed.
        error: one sentence, empty when it did not fail.
        log: what TensorRT logged, all of it.
    """

    result: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    log: str = ""

    def complaints(self, count: int = 3) -> list[str]:
        """The first errors of the log, without the parser's trace of where in its own source it was."""
        records: list[str] = []
        for line in self.log.splitlines():
            if line.startswith("["):
                records.append(line)
            elif records:  # polygraphy indents what belongs to the line before
                records[-1] += " " + line.strip()
        errors = [record[4:] for record in records if record.startswith("[E] ") and not _TRACE.match(record[4:])]
        return list(dict.fromkeys(errors))[:count]


def run_task(
    runtime: str, task: str, request: dict[str, Any], progress: Callable[[str, float | None], None] = lambda _what, _share: None
) -> Answer:
    """Runs a task of `sa_export.tensorrt.worker` with the named TensorRT.

    Args:
        task: a key of `worker.TASKS`; request: its arguments, plain values.
        progress: told what the builder does, and how far it is (0 to 1).
    """
    with environment(runtime) as variables, TemporaryDirectory(prefix="sa-export-") as folder:
        log = Path(folder) / "log"
        reading, writing = os.pipe()
        command = [sys.executable, "-m", "sa_export.tensorrt.worker", task, str(writing), runtime, json.dumps(request)]
        # The child must find the package that is running, however that was found.
        root = str(Path(__file__).resolve().parents[2])
        variables["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [variables.get("PYTHONPATH")])])
        with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file, pass_fds=(writing,), env=variables) as child:
            os.close(writing)
            result: dict[str, Any] = {}
            error = ""
            try:
                with os.fdopen(reading, encoding="utf-8") as events:
                    for line in events:
                        event = json.loads(line)
                        if "progress" in event:
                            progress(*event["progress"])
                        result = event.get("result", result)
                        error = event.get("error", error)
                code = child.wait()
            except BaseException:
                child.kill()
                raise
        text = log.read_text(encoding="utf-8", errors="replace")
    if not result and not error:
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
        error = f"{runtime} ended its process with status {code}" + (f": {last.strip()[:200]}" if last else "")
    return Answer({} if error else result, error, text)
