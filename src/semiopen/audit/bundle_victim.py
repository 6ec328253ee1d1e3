"""A real bundle and its enclave as the attacked model: every query goes through the enclave, which counts it."""

import copy
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedModel

from semiopen.audit.growing import lacking
from semiopen.audit.victim import SealedSet, Spent, Victim
from semiopen.auto_classes import SemiopenConfig
from semiopen.bundle.manifest import Manifest
from semiopen.host.client import EnclaveClient
from semiopen.host.modeling import SemiopenModel, agree_on_score_cap
from semiopen.host.sequences import Rows
from semiopen.model.families import FAMILIES, attention_size
from semiopen.model.kv_symmetries import OUTPUTS
from semiopen.model.parts import rename
from semiopen.model.split import join_layers

_AT_ONCE = 32  # candidates for a next token


class BundleVictim:
    """See `audit.victim.Victim`. Everything it knows, anyone on the host knows."""

    on_states = False

    def __init__(self, model: PreTrainedModel, bundle: Path, manifest: Manifest) -> None:
        """Take a model that `semiopen.load` returned for this bundle, and the bundle's manifest."""
        config = cast(SemiopenConfig, SemiopenConfig.from_pretrained(bundle))
        below, above = config.prefix_config, config.text_config
        assert below is not None and above is not None, "a verified bundle has both"
        family, prefix = FAMILIES[above.model_type], below.num_hidden_layers
        decoder = model.base_model_prefix
        self.config, self.spent = join_layers(below, above), Spent()
        self.config.tie_word_embeddings = False
        self.open_tensors = {
            rename(name, f"{decoder}.{family.layers}", prefix): tensor.detach().float()
            for name, tensor in model.state_dict().items()
        }
        # Behind a shuffled head, nobody can name the rows of an embedding that is tied to it.
        if manifest.open_embedding and manifest.plan.head == "open":
            self.open_tensors[f"{decoder}.{family.embedding}.weight"] = self.open_tensors["lm_head.weight"]
        self.sealed = SealedSet.prefix(prefix)
        self._model = model
        self._rows: Rows | None = None  # a text that grows, in the enclave
        self._known = torch.empty(0, dtype=torch.int64)

    def query(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Victim.query`."""
        self.spent.queries += len(ids)
        self.spent.tokens += ids.numel()
        enclave = cast(SemiopenModel, self._model).enclave
        agree_on_score_cap(enclave.session, self._model)
        return enclave(ids).float()

    def next_states(self, known: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """See `Growable.next_states`."""
        session = cast(SemiopenModel, self._model).enclave.session
        agree_on_score_cap(session, self._model)
        new = lacking(self._known, known)[None]
        if self._rows is None or new.shape[1] + len(self._known) != len(known):
            self._rows = session.rows(1)
        self.spent.queries += len(candidates)
        self.spent.tokens += new.numel() + len(candidates)
        if new.numel():
            session.run(new, torch.ones_like(new, dtype=torch.bool), self._rows)
        self._known = known.clone()
        found = []
        for part in candidates[:, None].split(_AT_ONCE):
            fork = copy.deepcopy(self._rows)
            fork.select([0] * len(part))
            found.append(session.run(part, torch.ones_like(part, dtype=torch.bool), fork)[:, -1])
        return torch.cat(found).float()

    def model_input(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Victim.model_input`."""
        return ids


def attention_in_order(victim: Victim, client: EnclaveClient) -> dict[str, torch.Tensor]:
    """Output projections of the open blocks that read attention as it lies in the cache, where the enclave orders it.

    Two rows of numbers, sent through each block's order, tell it. No lease counts that.

    Raises:
        EnclaveError: the enclave refuses, or is gone.
    """
    size = attention_size(victim.config)
    numbers = torch.arange(size)
    rows = torch.stack([numbers % 256, numbers // 256]).float()  # exact in every dtype
    found = {}
    for block in range(client.welcome.mixed_blocks):
        low, high = client.unmix(block, rows).long()
        places = low + 256 * high
        number = victim.sealed.stop + block
        name = next(name for name in victim.open_tensors for stem in OUTPUTS if f".{number}.{stem}.weight" in name)
        weight = victim.open_tensors[name]
        ordered = torch.empty_like(weight)
        if victim.config.model_type == "gpt2":  # stored the other way round
            ordered[places] = weight
        else:
            ordered[:, places] = weight
        found[name] = ordered
    return found
