"""A conversation with the model: keeps what was said, and its KV cache, from turn to turn."""

import threading
from collections.abc import Iterator
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer

from semiopen.errors import SemiopenError
from semiopen.host.modeling import session_of


class Conversation:
    """One conversation. With a chat template its turns are messages; without, one growing text."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._messages: list[dict[str, str]] = []
        self._text = ""
        self._cache = DynamicCache(config=model.config)
        self._cached_ids: list[int] = []

    def say(self, line: str, max_new_tokens: int, settings: dict[str, Any]) -> Iterator[str]:
        """Answer `line`, piece by piece as it is generated.

        Args:
            line: what the person says.
            max_new_tokens: longest answer; cut where the context ends.
            settings: for `generate`.

        Raises:
            SemiopenError: the conversation fills the context, or the enclave is gone.
        """
        ids = self._ids_after(line)
        context = session_of(self._model).client.welcome.context
        if len(ids) >= context:
            raise SemiopenError(
                f"The conversation has {len(ids)} tokens and the context {context}; start a new one with /new."
            )
        self._reuse_cache(ids)
        streamer = TextIteratorStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
        outcome: dict[str, Any] = {}

        def run() -> None:
            prompt = torch.tensor([ids])
            try:
                outcome["ids"] = self._model.generate(  # type: ignore[operator]
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    past_key_values=self._cache,
                    max_new_tokens=min(max_new_tokens, context - len(ids)),
                    streamer=streamer,
                    **settings,
                )[0].tolist()
            except BaseException as error:  # handed to the thread that reads
                outcome["error"] = error
                streamer.on_finalized_text("", stream_end=True)

        worker = threading.Thread(target=run, daemon=True)
        worker.start()
        answer = ""
        for piece in streamer:
            answer += piece
            yield piece
        worker.join()
        if "error" in outcome:
            raise outcome["error"]
        self._cached_ids = outcome["ids"]
        self._messages += [
            {"role": "user", "content": line},
            {"role": "assistant", "content": answer.strip()},
        ]
        self._text += line + answer

    def _ids_after(self, line: str) -> list[int]:
        if self._tokenizer.chat_template:
            messages = [*self._messages, {"role": "user", "content": line}]
            return self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]  # type: ignore[index, return-value]
        return self._tokenizer(self._text + line)["input_ids"]  # type: ignore[return-value]

    def _reuse_cache(self, ids: list[int]) -> None:
        """Keep what the cache holds of `ids`, and forget the rest."""
        held = self._cache.get_seq_length()
        common = 0
        while common < min(held, len(ids) - 1) and self._cached_ids[common] == ids[common]:
            common += 1
        try:
            if held > common:
                self._cache.crop(common - held)
        except RuntimeError:  # a sliding window cannot bring back what it has dropped
            self._cache = DynamicCache(config=self._model.config)
