"""Texts that a model writes for prompts, by beam search or greedily."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from memsave.data.text.collate import in_batches, prompts
from memsave.models.encoder_decoder import is_encoder_decoder
from memsave.models.virtual_tokens import generate
from memsave.processes import map_shares

BATCH = 32


def write_texts(
    model: Any,
    tokenizer: Any,
    tokens: Sequence[list[int]],
    *,
    max_length: int = 0,
    new_tokens: int | None = None,
    ends: Sequence[int] = (),
    beams: int = 1,
    batch_size: int = BATCH,
    device: torch.device,
) -> Iterator[str]:
    """Yield the text that the model writes after each prompt, until an end token.

    Args:
        model: a causal language model or an encoder-decoder of transformers in eval mode.
        tokenizer: its tokenizer.
        tokens: the tokens of each prompt.
        max_length: tokens of prompt and text together, and of the text of an encoder-decoder; each gets at least one.
        new_tokens: tokens of each text at most; replaces max_length.
        ends: the tokens that end a text, if not only the end token of the tokenizer.
        beams: width of the beam search; 1 is greedy.
        batch_size: prompts that are processed together.
        device: of the model.
    """
    is_pair = is_encoder_decoder(model)
    for part in in_batches(tokens, batch_size):
        batch = prompts(part, pad=tokenizer.pad_token_id, right=is_pair)
        length = 0 if is_pair else batch["input_ids"].shape[1]
        out = generate(
            model,
            **{key: value.to(device) for key, value in batch.items()},
            num_beams=beams,
            do_sample=False,
            max_new_tokens=new_tokens or max(1, max_length - length),
            eos_token_id=list(ends) or tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            synced_gpus=False,  # each process writes its own texts; a sharded model is whole meanwhile
        )
        texts = tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
        yield from (text.strip() for text in texts)


def write_texts_together(model: Any, tokenizer: Any, tokens: Sequence[list[int]], **options: Any) -> list[str]:
    """The texts of `write_texts` on every process; the processes share its batches, which stay the same."""

    def write(batch: Sequence[list[int]]) -> list[str]:
        return list(write_texts(model, tokenizer, batch, **options, batch_size=BATCH))

    return [text for texts in map_shares(write, in_batches(tokens, BATCH)) for text in texts]
