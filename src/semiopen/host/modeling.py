"""The host's model: an ordinary transformers model of the family, whose embedding is the enclave.

One hook on the decoder turns token ids into states from the enclave and keeps the enclave's sequences in step
with the transformers cache. What cannot be answered exactly is refused here, in a sentence.
"""

import copy
import functools
import inspect
from typing import Any, cast

import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, PreTrainedConfig, PreTrainedModel

from semiopen.errors import UnsupportedCallError
from semiopen.host import sealed_generation
from semiopen.host.cache import FollowsEnclave, follow
from semiopen.host.embedding import EnclaveEmbedding, EnclaveSession
from semiopen.host.enclave_head import EnclaveHead, Generating, ShuffledHead
from semiopen.host.sequences import Rows
from semiopen.host.unmixing import Unmixer
from semiopen.model.families import FAMILIES
from semiopen.model.parts import NoPositions
from semiopen.model.split import HEAD_SETTING, KV_SETTING


class SemiopenModel:
    """What the host's model class has beside its family's class."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg] - the family's class comes next
        family = FAMILIES[config.model_type]
        decoder: nn.Module = self.base_model  # type: ignore[attr-defined]
        setattr(decoder, family.embedding, EnclaveEmbedding())
        if family.positions:
            setattr(decoder, family.positions, NoPositions())
        if family.dropout:
            setattr(decoder, family.dropout, nn.Identity())
        head = getattr(config, HEAD_SETTING, "open")
        if head == "sealed":
            setattr(decoder, family.norm, nn.Identity())
            self.set_output_embeddings(EnclaveHead(self.enclave, config.vocab_size))  # type: ignore[attr-defined]
        elif head == "shuffled":
            projection = cast(nn.Module, self.get_output_embeddings())  # type: ignore[attr-defined]
            cap = getattr(config, "final_logit_softcapping", None)
            self.set_output_embeddings(  # type: ignore[attr-defined]
                ShuffledHead(self.enclave, config.vocab_size, projection, cap)
            )
        self.unmixer = None  # where attention passes through the enclave
        if getattr(config, KV_SETTING, "plain") == "enclave":
            self.unmixer = Unmixer(self.enclave, cast(nn.ModuleList, getattr(decoder, family.layers)))
        signature = inspect.signature(decoder.forward)
        decoder.register_forward_pre_hook(functools.partial(_run_prefix, signature), with_kwargs=True)

    @property
    def dtype(self) -> torch.dtype:
        """Of the open blocks; where all is sealed, of what the model was opened in."""
        found = (value.dtype for value in self.parameters() if value.is_floating_point())  # type: ignore[attr-defined]
        return next(found, self.config.dtype)  # type: ignore[attr-defined]

    @property
    def device(self) -> torch.device:
        """Of the open blocks; where all is sealed, the CPU."""
        found = (value.device for value in self.parameters())  # type: ignore[attr-defined]
        return next(found, torch.device("cpu"))

    @property
    def enclave(self) -> EnclaveEmbedding:
        """The embedding that is the enclave."""
        return cast(EnclaveEmbedding, self.get_input_embeddings())  # type: ignore[attr-defined]

    @property
    def enclave_head(self) -> EnclaveHead | None:
        """The head, where it is sealed or shuffled."""
        head = self.get_output_embeddings()  # type: ignore[attr-defined]
        return head if isinstance(head, EnclaveHead) else None

    def generate(
        self, inputs: torch.Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> Any:
        """Transformers' `generate`; with a head that gives no logits, the enclave chooses the tokens.

        Raises:
            UnsupportedCallError: a setting that needs logits, which the lease does not allow.
            EnclaveError: the enclave refuses (`lease`), or is gone.
        """
        head = self.enclave_head
        if head is None or head.gives_logits:
            return super().generate(inputs, generation_config, **kwargs)  # type: ignore[misc]
        prepare = cast(Any, self)._prepare_generation_config
        settings: GenerationConfig = prepare(generation_config, **kwargs)[0]
        sealed_generation.check(settings, kwargs, penalties=not isinstance(head, ShuffledHead))
        prompts = inputs if inputs is not None else kwargs.pop("input_ids", None)
        if prompts is None:
            raise UnsupportedCallError("Give generate the prompt's input_ids.")
        copies = settings.num_return_sequences or 1
        if copies > 1:
            prompts = prompts.repeat_interleave(copies, dim=0)
            if kwargs.get("attention_mask") is not None:
                kwargs["attention_mask"] = kwargs["attention_mask"].repeat_interleave(copies, dim=0)
        if generation_config is None:
            kwargs.update(sealed_generation.NO_CHOICE)
        else:
            generation_config = copy.deepcopy(generation_config)
            generation_config.update(**sealed_generation.NO_CHOICE)
            kwargs = {name: value for name, value in kwargs.items() if name not in sealed_generation.NO_CHOICE}
        if head.generating is not None:
            raise UnsupportedCallError("This model generates already; a sealed head takes one generate at a time.")
        head.generating = Generating(sealed_generation.rows_of(settings, prompts))
        try:
            return super().generate(prompts, generation_config, **kwargs)  # type: ignore[misc]
        finally:
            head.generating = None

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: without its sealed prefix the folder would not be a model."""
        raise UnsupportedCallError(
            "A bundle's open blocks alone are not a model, so they cannot be saved as one; save an adapter instead."
        )

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: the embedding is sealed."""
        raise UnsupportedCallError("The token embedding is sealed and cannot be resized; keep the bundle's tokenizer.")


@functools.cache
def host_class(family_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The host's version of a transformers causal language model class.

    It keeps the class's name and module, by which transformers finds the conversions of checkpoint names, and
    other tools what they know of the family. Nothing is tied: the embedding is in the enclave, and the bundle
    stores the head by itself.
    """
    body = {"__module__": family_class.__module__, "_tied_weights_keys": {}}
    return type(family_class.__name__, (SemiopenModel, family_class), body)


def session_of(model: nn.Module) -> EnclaveSession:
    """The session behind a model that `semiopen.load` returned.

    Raises:
        EnclaveError: it was closed.
    """
    return cast(SemiopenModel, model).enclave.session


def agree_on_score_cap(session: EnclaveSession, model: PreTrainedModel) -> None:
    """Have the sealed blocks cap attention scores as the open ones do.

    Transformers' SDPA leaves out Gemma 2's cap; its eager attention does not.
    """
    session.score_cap = model.config._attn_implementation != "sdpa"


def _run_prefix(
    signature: inspect.Signature, decoder: PreTrainedModel, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook: replace `input_ids` by states from the enclave."""
    call = signature.bind(*args, **kwargs).arguments
    call.update(call.pop("kwargs", {}))
    states = call.pop("enclave_states", None)
    if states is not None:  # from an engine that has its own session and cache, and has run the prefix itself
        call["inputs_embeds"] = states
        return (), call
    input_ids = call.pop("input_ids", None)
    if input_ids is None or call.get("inputs_embeds") is not None:
        raise UnsupportedCallError("The embedding is sealed: pass input_ids, not inputs_embeds.")
    if call.get("token_type_ids") is not None:
        raise UnsupportedCallError("token_type_ids are not supported with a sealed embedding; leave them out.")
    use_cache = call.get("use_cache")
    if use_cache is None:
        use_cache = decoder.config.use_cache
    cache = call.get("past_key_values")
    if decoder.training and decoder.is_gradient_checkpointing:
        use_cache, cache = False, None
    if cache is None and use_cache:
        cache = DynamicCache(config=decoder.config)
    embedding = cast(EnclaveEmbedding, decoder.get_input_embeddings())
    rows = None
    if cache is not None:
        if not isinstance(cache, FollowsEnclave):
            follow(cache, embedding.session.rows(len(input_ids)), alone=decoder.config.num_hidden_layers == 0)
        rows = cast(FollowsEnclave, cache).enclave_rows
        _check_in_step(cache, rows, input_ids, embedding.session)
    tokens = _tokens(call.get("attention_mask"), input_ids, rows)
    _check_positions(call.get("position_ids"), tokens, rows, bool(FAMILIES[decoder.config.model_type].positions))
    agree_on_score_cap(embedding.session, decoder)
    states = embedding(input_ids, tokens, rows)
    if next(decoder.parameters(), None) is not None:  # else all is sealed
        states = states.to(decoder.dtype)
    call["inputs_embeds"] = states
    call["past_key_values"] = cache
    call["use_cache"] = use_cache
    return (), call


def _check_in_step(cache: Any, rows: Rows, input_ids: torch.Tensor, session: EnclaveSession) -> None:
    if rows.pool is not session.pool:
        raise UnsupportedCallError("This cache belongs to another model or enclave; start with an empty one.")
    if len(rows.tables) != len(input_ids) or int(cache.get_seq_length()) != rows.columns:
        raise UnsupportedCallError(
            "The cache was changed in a way that the enclave did not see; change it only through crop, reset, "
            "reorder_cache and the batch_ methods, or start with an empty one."
        )


def _tokens(mask: Any, input_ids: torch.Tensor, rows: Rows | None) -> torch.Tensor:
    """Which of the new columns are tokens, [B, S] bool on the CPU."""
    past = rows.columns if rows is not None else 0
    batch, new = input_ids.shape
    if mask is None:
        full = torch.ones(batch, past + new, dtype=torch.bool)
    elif not isinstance(mask, torch.Tensor) or mask.shape != (batch, past + new):
        raise UnsupportedCallError(
            f"The attention mask must have one entry per token, here ({batch}, {past + new}); prepared or "
            "four-dimensional masks do not reach the sealed blocks."
        )
    else:
        full = mask.cpu() != 0
    if rows is not None and not torch.equal(full[:, :past], rows.mask):
        raise UnsupportedCallError(
            "The attention mask hides or shows other past tokens than when they were run; pass the same mask, extended."
        )
    return full[:, past:]


def _check_positions(position_ids: Any, tokens: torch.Tensor, rows: Rows | None, absolute: bool) -> None:
    """Refuse position ids that the enclave, which counts each row's tokens itself, would not reproduce.

    Rotary models see only differences of positions, so a row may be shifted as a whole; with learned positions it
    may not.
    """
    past = rows.columns if rows is not None else 0
    batch, new = tokens.shape
    if position_ids is None:
        position_ids = torch.arange(past, past + new)[None]
    if position_ids.ndim != 2 or position_ids.shape[1] != new:
        raise UnsupportedCallError("position_ids must have one entry per token.")
    given = position_ids.cpu().expand(batch, new)
    for row in range(batch):
        real = given[row][tokens[row]]
        if not len(real):
            continue
        held = rows.lengths[row] if rows is not None else 0
        ahead = real - torch.arange(held, held + len(real))
        expected = rows.offsets[row] if rows is not None else None
        first = int(ahead[0]) if expected is None else expected
        if (ahead != first).any() or (absolute and first != 0):
            raise UnsupportedCallError(
                "position_ids must count each row's tokens one by one, from 0 where padding is not counted "
                "(attention_mask.cumsum(-1) - 1, as generate does)."
            )
        if rows is not None:
            rows.offsets[row] = first
