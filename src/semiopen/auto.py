"""Makes transformers know bundles: `AutoConfig`, `AutoModelForCausalLM`, once both packages are imported."""

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_TARGET = "transformers.models.auto.modeling_auto"


def register() -> None:
    """Register with transformers now, or as soon as its auto classes are imported.

    Importing transformers takes seconds, which `semiopen --help` must not, so a bare import of semiopen waits.
    """
    if _TARGET in sys.modules:
        _register_classes()
    else:
        sys.meta_path.insert(0, _AfterImport())


def _register_classes() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from semiopen.auto_classes import SemiopenConfig, SemiopenForCausalLM

    AutoConfig.register("semiopen", SemiopenConfig, exist_ok=True)
    AutoModelForCausalLM.register(SemiopenConfig, SemiopenForCausalLM, exist_ok=True)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Lets the import of transformers' auto classes run as usual, then registers."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        run: Any = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register_classes()

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
