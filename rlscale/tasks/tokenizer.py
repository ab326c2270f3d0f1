"""A character-level tokenizer: one printable ASCII character is one token, so lengths in characters are
lengths in tokens, and a model of a few layers needs no merges to learn first.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlscale.errors import UserError

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
CHARACTERS = "".join(chr(code) for code in range(32, 127)) + "\n"
VOCABULARY_SIZE = 128


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of runs that start from random weights: <pad> 0, <bos> 1, <eos> 2, then characters.

    Ids up to 127 are filled with names that no text contains, the last of them `<unk>`; text that spells a
    special token, such as `<eos>`, is read as plain characters.
    """
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *CHARACTERS])}
    while len(vocabulary) < VOCABULARY_SIZE - 1:
        vocabulary[f"<unused{len(vocabulary)}>"] = len(vocabulary)
    vocabulary["<unk>"] = len(vocabulary)
    characters = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    characters.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a prompt, with the beginning-of-sequence token in front if the tokenizer has one.

    Raises:
        UserError: the text has a character outside the tokenizer's vocabulary.
    """
    ids = encode_text(tokenizer, text)
    return ids if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *ids]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of `text` alone, no special token added; raises as `encode_prompt` does."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        outside = next((c for c in text if _is_unknown(tokenizer, c)), text)
        raise UserError(
            f"the tokenizer has no token for {outside!r} (in {_excerpt(text, outside)!r}): "
            "choose a task whose text it covers, or a `model.checkpoint` with a tokenizer that does"
        )
    return ids


def decode_completion(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The text of a completion, a final end-of-sequence token apart.

    Special tokens in its midst stay visible: dropping them would score a wrong completion as right.
    """
    ids = list(token_ids)
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _is_unknown(tokenizer: PreTrainedTokenizerBase, character: str) -> bool:
    return tokenizer.unk_token_id in tokenizer.encode(character, add_special_tokens=False)


def _excerpt(text: str, part: str, radius: int = 16) -> str:
    at = text.index(part)
    return text[max(0, at - radius) : at + radius]
