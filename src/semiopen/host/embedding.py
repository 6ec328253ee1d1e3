"""To the host's model, the enclave is the embedding layer: token ids in, states after the sealed prefix out."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from semiopen.errors import EnclaveError
from semiopen.host.client import EnclaveClient, StepInput
from semiopen.host.sequences import BLOCK_SIZE, BlockPool, Rows


class EnclaveSession:
    """One client's session with its pool of KV blocks; runs batches of any size in steps that fit."""

    def __init__(self, client: EnclaveClient, kv_tokens: int, step_tokens: int = 2048, sequences: int = 256) -> None:
        """Open a session.

        Args:
            client: a connected client.
            kv_tokens: tokens that all running sequences together may hold.
            step_tokens: tokens of one step; longer inputs are run in several.
            sequences: sequences of one step.

        Raises:
            EnclaveError: the enclave has less to give.
        """
        self.client = client
        welcome = client.welcome
        self.step_tokens = min(step_tokens, welcome.max_step_tokens)
        self.sequences = min(sequences, welcome.max_sequences)
        blocks = max(1, min(-(-kv_tokens // BLOCK_SIZE), welcome.max_kv_tokens // BLOCK_SIZE))
        client.open(blocks, BLOCK_SIZE, self.step_tokens, self.sequences)
        self.pool = BlockPool(blocks, BLOCK_SIZE)
        self.score_cap = True

    def rows(self, count: int) -> Rows:
        """Fresh, empty rows for a batch."""
        return Rows(self.pool, count)

    def run(self, input_ids: torch.Tensor, tokens: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Run a batch's next columns through the prefix.

        Args:
            input_ids: [B, S] token ids.
            tokens: [B, S] bool, false for padding, which never enters the enclave.
            rows: where the batch's sequences live; extended by S columns.

        Returns:
            States [B, S, H] in the enclave's dtype, zero at padding.

        Raises:
            ValueError: a token id outside the vocabulary.
            EnclaveError: a sequence longer than the context, no KV blocks left, or the enclave is gone.
        """
        self._check(input_ids, tokens, rows)
        self._wipe()
        welcome = self.client.welcome
        states = torch.zeros(*input_ids.shape, welcome.hidden_size, dtype=getattr(torch, welcome.dtype))
        packed = torch.empty(int(tokens.sum()), welcome.hidden_size, dtype=states.dtype)
        done = 0
        pieces: list[tuple[int, list[int]]] = []
        waiting = 0
        for row, (ids, real) in enumerate(zip(input_ids, tokens, strict=True)):
            todo = ids[real].tolist()
            while todo:
                if waiting == self.step_tokens or len(pieces) == self.sequences:
                    done = self._step(pieces, rows, packed, done)
                    pieces, waiting = [], 0
                piece, todo = todo[: self.step_tokens - waiting], todo[self.step_tokens - waiting :]
                pieces.append((row, piece))
                waiting += len(piece)
        if pieces:
            self._step(pieces, rows, packed, done)
        states[tokens] = packed
        rows.mask = torch.cat([rows.mask, tokens], dim=1)
        return states

    def run_once(self, input_ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Run a batch whose sequences are not continued; their KV blocks are free again afterwards.

        Arguments, result and errors as for `run`; a batch larger than the KV cache is run in parts.
        """
        parts: list[torch.Tensor] = []
        begin = 0
        while begin < len(input_ids):
            end, blocks = begin, 0
            while end < len(input_ids):
                blocks += -(-int(tokens[end].sum()) // BLOCK_SIZE)
                if end > begin and blocks > self.pool.free:
                    break
                end += 1
            parts.append(self.run(input_ids[begin:end], tokens[begin:end], self.rows(end - begin)))
            begin = end
        self._wipe()
        return torch.cat(parts)

    def _wipe(self) -> None:
        """Have the enclave overwrite the blocks of texts that have ended.

        Not when they end: that is when Python drops their cache, at any moment, in the middle of a request even.
        """

        def wipe(blocks: list[int]) -> None:
            self.client.wipe(blocks)
            self.client.wipe_arrays()

        self.pool.wipe(wipe)

    def _check(self, input_ids: torch.Tensor, tokens: torch.Tensor, rows: Rows) -> None:
        welcome = self.client.welcome
        ids = input_ids[tokens]
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= welcome.vocab_size):
            raise ValueError(
                f"A token id is outside the vocabulary of {welcome.vocab_size}; use the tokenizer of this bundle."
            )
        longest = int((tokens.sum(dim=1) + torch.tensor(rows.lengths)).max())
        if longest > welcome.context:
            raise EnclaveError(
                f"A sequence of {longest} tokens is longer than this model's context of {welcome.context}; "
                "shorten the prompt.",
                "context",
            )

    def _step(self, pieces: list[tuple[int, list[int]]], rows: Rows, packed: torch.Tensor, done: int) -> int:
        copies: list[tuple[int, int]] = []
        for row, ids in pieces:
            copies += rows.grow(row, len(ids))
        tables = np.zeros((1, len(pieces), max(len(rows.tables[row]) for row, _ in pieces)), dtype=np.int32)
        for table, (row, _) in zip(tables[0], pieces, strict=True):
            table[: len(rows.tables[row])] = rows.tables[row]
        token_ids = [token for _, ids in pieces for token in ids]
        step = StepInput(
            token_ids=token_ids,
            query_start=np.cumsum([0, *(len(ids) for _, ids in pieces)]),
            seq_lens=[rows.lengths[row] + len(ids) for row, ids in pieces],
            block_tables=tables,
            copies=copies,
            score_cap=self.score_cap,
        )
        end = done + len(token_ids)
        self.client.step(step, packed[done:end])
        for row, ids in pieces:
            rows.added(row, len(ids))
        return end


class EnclaveEmbedding(nn.Module):
    """Stands where the model's token embedding stood. Holds no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self._session: EnclaveSession | None = None
        self._closer: Callable[[], object] = lambda: None

    @property
    def session(self) -> EnclaveSession:
        """The session in use.

        Raises:
            EnclaveError: there is none, or it was closed.
        """
        if self._session is None:
            raise EnclaveError("This model has no enclave now; load it again with semiopen.load.", "gone")
        return self._session

    def attach(self, session: EnclaveSession, closer: Callable[[], object]) -> None:
        """Use `session` from now on; `closer` ends it and whatever was started for it."""
        self._session, self._closer = session, closer

    def close(self) -> None:
        """End the session, and the dev enclave if it was started for this model. Also done when the model goes."""
        self._session = None
        self._closer()

    def forward(
        self, input_ids: torch.Tensor, tokens: torch.Tensor | None = None, rows: Rows | None = None
    ) -> torch.Tensor:
        """Return states after the sealed prefix.

        Args:
            input_ids: [B, S] token ids, on any device.
            tokens: [B, S] bool, false for padding; all tokens when None.
            rows: sequences to continue; without, each row is a sequence of its own that ends here.

        Returns:
            States [B, S, H] on the device of `input_ids`.
        """
        session = self.session
        ids = input_ids.cpu()
        real = torch.ones_like(ids, dtype=torch.bool) if tokens is None else tokens.cpu()
        states = session.run_once(ids, real) if rows is None else session.run(ids, real, rows)
        return states.to(input_ids.device)
