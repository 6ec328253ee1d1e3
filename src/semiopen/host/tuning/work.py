"""The folder of an unfinished run, by which a killed run goes on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from semiopen.errors import SemiopenError
from semiopen.host.tuning.kept_rows import write_private

RUN_NAME, CHECKPOINTS_FOLDER = "run.json", "checkpoints"


class WorkFolder:
    """The folder of an unfinished run: its settings, checkpoints and what was computed once. For this user alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: dict[str, Any] = {}

    def check(self, resume: bool) -> None:
        """Refuse to mix two runs; what can be said before anything is loaded."""
        if (self.folder / RUN_NAME).exists() and not resume:
            raise SemiopenError(
                f"An interrupted run is kept in {self.folder}; give --resume to go on with it, or remove that folder."
            )

    def begin(self, identity: dict[str, Any]) -> None:
        """Note what this run is, or check that the interrupted one is the same."""
        path = self.folder / RUN_NAME
        if path.exists():
            self.facts = json.loads(path.read_text())
            there = self.facts["identity"]
            changed = [name for name in identity if json.loads(json.dumps(identity[name])) != there.get(name)]
            if changed:
                raise SemiopenError(
                    f"The run in {self.folder} had other values of: {', '.join(changed)}. Give the same again, or "
                    "remove that folder to begin anew."
                )
            return
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.rmtree(self.folder / CHECKPOINTS_FOLDER, ignore_errors=True)
        self.facts = {"identity": identity}
        self._write()

    def remembered(self, name: str, compute: Callable[[], Any]) -> Any:
        """A value that is computed once, and known again after a kill."""
        if name not in self.facts:
            self.facts[name] = compute()
            self._write()
        return self.facts[name]

    def end(self, keep: bool = False) -> None:
        """Remove the folder, or with `keep` all but what belongs to this run alone."""
        if keep:
            (self.folder / RUN_NAME).unlink()
            shutil.rmtree(self.folder / CHECKPOINTS_FOLDER, ignore_errors=True)
        else:
            shutil.rmtree(self.folder)

    def _write(self) -> None:
        write_private(self.folder / RUN_NAME, json.dumps(self.facts))
