"""The tokens of the embedded CLIP: whole words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

WORDS = re.compile(r"[^\W\d_]+|\d|[^\w\s]|_")


class WordTokenizer:
    """Texts to token ids.

    Args:
        words: word in lower case → its tokens. Other words and signs become the token ``unknown``.
        unknown: the token of other words. The next two tokens are those of the start and the end of a text.
        context_length: number of tokens of a text, including start and end; shorter texts are filled up with zeros.
    """

    def __init__(self, words: Mapping[str, Sequence[int]], unknown: int, context_length: int) -> None:
        self.words = {word: tuple(tokens) for word, tokens in words.items()}
        self.unknown, self.start, self.end = unknown, unknown + 1, unknown + 2
        self.context_length = context_length

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Texts → [P, context_length] int64, truncated to that length, the last token being that of the end."""
        out = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        for row, text in zip(out, texts, strict=True):
            tokens = [self.start, *self.encode(text)[: self.context_length - 2], self.end]
            row[: len(tokens)] = torch.tensor(tokens)
        return out

    def encode(self, text: str) -> list[int]:
        """The tokens of a text without start and end."""
        return [token for word in WORDS.findall(text.lower()) for token in self.words.get(word, (self.unknown,))]

    def decode(self, tokens: Sequence[int]) -> str:
        """A text that has these tokens; '?' for words that the file does not know."""
        spelled = {tokens: word for word, tokens in sorted(self.words.items(), reverse=True)}
        longest = max(map(len, spelled), default=1)
        words, at = [], 0
        while at < len(tokens):
            length = next((n for n in range(longest, 0, -1) if tuple(tokens[at : at + n]) in spelled), 1)
            words.append(spelled.get(tuple(tokens[at : at + length]), "?"))
            at += length
        return " ".join(words)
