"""What clients write, as token ids: prompts, and conversations through the model's chat template."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jinja2.exceptions import TemplateError

from semiopen.host.serving.errors import bad
from semiopen.host.serving.schemas import Message

INLINE_CHARACTERS = 4096  # longer texts are tokenized in a thread, or the other streams would wait for it

_TEMPLATE_ARGUMENTS = frozenset(
    {
        "conversation",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "messages",
    }
)


class Prompts:
    """A tokenizer, as the API uses it."""

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        """`chat_template` replaces the tokenizer's own."""
        self._tokenizer = tokenizer
        self._template = chat_template or tokenizer.chat_template
        # One thread: a tokenizer uses all cores within a text, and texts need not overtake each other.
        self._thread = ThreadPoolExecutor(1, "tokenizer")

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        if len(text) <= INLINE_CHARACTERS:
            return self._encode(text, add_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._encode, text, add_special_tokens)

    async def encode_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        template_kwargs: dict[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation.

        Raises:
            ApiError: the model has no chat template, or the template refuses the conversation.
        """
        if not self._template:
            raise bad(
                "This model has no chat template; use /v1/completions, or start the server with --chat-template FILE.",
                "messages",
                "no_chat_template",
            )
        if taken := _TEMPLATE_ARGUMENTS & set(template_kwargs or ()):
            raise bad(f"chat_template_kwargs: {sorted(taken)[0]} cannot be set here.", "chat_template_kwargs")
        conversation = [{"role": self._role(message.role), "content": message.text} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                conversation,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                continue_final_message=continue_final_message,
                **(template_kwargs or {}),
            )
        except (TemplateError, TypeError, ValueError):
            raise bad(
                "The model's chat template refuses this conversation; many want user and assistant in turn, and a "
                "system message only at the beginning.",
                "messages",
            ) from None
        return await self.encode(text, add_special_tokens)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return self._tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False)

    def names(self, token_ids: Sequence[int]) -> list[str]:
        """The tokens as the tokenizer writes them."""
        return self._tokenizer.convert_ids_to_tokens(list(token_ids))

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        tokens = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        # Who writes the beginning of a text out, as evaluations and templates do, does not mean two.
        begin = self._tokenizer.bos_token_id
        return tokens[1:] if add_special_tokens and begin is not None and tokens[:2] == [begin, begin] else tokens

    def _role(self, role: str) -> str:
        """OpenAI's newer name of the system's role is one that most templates do not know."""
        return "system" if role == "developer" and "developer" not in str(self._template) else role
