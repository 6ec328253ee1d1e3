"""Makes transformers know bundles: `AutoConfig`, `AutoModelForCausalLM`, once both packages are imported."""

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def register() -> None:
    """Register with transformers now, or as soon as its auto classes are imported.

    Importing transformers takes seconds, which `semiopen --help` must not, so a bare import of semiopen waits.
    """
    for module, register_class in _REGISTER_AFTER.items():
        if module in sys.modules:
            register_class()
        else:
            sys.meta_path.insert(0, _AfterImport(module))


def _register_config() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from semiopen.auto_classes import SemiopenConfig

    AutoConfig.register("semiopen", SemiopenConfig, exist_ok=True)


def _register_model() -> None:
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    from semiopen.auto_classes import SemiopenConfig, SemiopenForCausalLM

    AutoModelForCausalLM.register(SemiopenConfig, SemiopenForCausalLM, exist_ok=True)


_REGISTER_AFTER = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_model,
}


class _AfterImport(importlib.abc.MetaPathFinder):
    """Lets the import of one module run as usual, then registers."""

    def __init__(self, module: str) -> None:
        self._module = module

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        run: Any = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _REGISTER_AFTER[fullname]()

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
