"""semiopen: ship a proprietary LLM to a customer's machine, a few layers sealed, the rest at full speed.

    semiopen.seal(model, out, keys)          at the vendor
    model = semiopen.load(bundle, keys=...)  at the customer; a transformers model with `generate`

After `import semiopen`, transformers' `AutoModelForCausalLM.from_pretrained(bundle)` opens bundles too.
"""

from typing import TYPE_CHECKING, Any

from semiopen.auto import register as _register
from semiopen.errors import SemiopenError
from semiopen.version import VERSION

if TYPE_CHECKING:
    from semiopen.host.load import load
    from semiopen.vendor.seal import seal

__all__ = ["SemiopenError", "load", "seal"]
__version__ = VERSION

_register()


def __getattr__(name: str) -> Any:
    # Loaded on use: torch and transformers take seconds to import.
    if name == "load":
        from semiopen.host.load import load

        return load
    if name == "seal":
        from semiopen.vendor.seal import seal

        return seal
    raise AttributeError(f"module 'semiopen' has no attribute {name!r}")
