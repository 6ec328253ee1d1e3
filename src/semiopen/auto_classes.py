"""The classes that transformers' auto classes find for a bundle.

They are registered in the middle of transformers' own imports, so nothing of it may be imported here that is not
there already; the host is imported on use.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SemiopenConfig(PreTrainedConfig):
    """config.json of a bundle: the config of the host's model, and that of the sealed prefix."""

    model_type = "semiopen"
    sub_configs = {"text_config": AutoConfig, "prefix_config": AutoConfig}  # type: ignore[assignment]  # noqa: RUF012

    def __init__(
        self,
        text_config: dict | PreTrainedConfig | None = None,
        prefix_config: dict | PreTrainedConfig | None = None,
        **kwargs: Any,
    ) -> None:
        self.text_config = _config(text_config)
        self.prefix_config = _config(prefix_config)
        super().__init__(**kwargs)


def _config(data: dict | PreTrainedConfig | None) -> PreTrainedConfig | None:
    from semiopen.model.split import config_from_dict

    return config_from_dict(data) if isinstance(data, dict) else data


class SemiopenForCausalLM:
    """Entry for `AutoModelForCausalLM.from_pretrained(BUNDLE)`; what comes back is a model of the family."""

    config_class = SemiopenConfig

    @classmethod
    def from_pretrained(cls, bundle: str | Path, *args: Any, **kwargs: Any) -> "PreTrainedModel":
        """Open a bundle; arguments as for `semiopen.load`."""
        from semiopen.host.load import load

        kwargs.pop("config", None)  # read again from the bundle, after it was verified
        return load(bundle, *args, **kwargs)
