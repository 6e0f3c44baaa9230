"""Textual inversion (https://arxiv.org/abs/2208.01618): a word in a prompt stands for learned vectors.

The vectors stand behind the rows of ChatGLM's embedding table, at ids beyond the vocabulary; the tokenizer
is told which ids a word has. `add_words` puts them there; after `remove_words` the encoder is what it was.
Saved pipelines do not contain them. `learn_words` lets them be trained.
Source: `TextualInversionLoaderMixin` in diffusers' loaders/textual_inversion.py.
Shapes: n vectors of a word, C ChatGLM's hidden width.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kolors_core.chatglm import ChatGLM
from kolors_core.devices import plain
from kolors_core.hub import find_file, reject_unused
from kolors_core.module import ReplacedModule
from kolors_core.validation import as_new_path
from weights_convert.safetensors_files import Source, Tensors, save_tensors

WEIGHT_NAME = "learned_embeds.safetensors"
NAMELESS = "emb_params"  # what a file of one word that does not name it calls its tensor


class LearnedVectors(nn.ParameterList):
    """Vectors [n, C], which belong to words and not to the model."""

    is_adapter = True


class WordEmbedding(ReplacedModule, nn.Embedding):
    """An embedding table and learned vectors behind it: those of `words`, one word after another.

    The table keeps its name; the vectors add keys, `learned.<i>` [n, C].
    """

    def __init__(self, base: nn.Embedding) -> None:
        super().__init__(base)
        self.words: list[str] = []
        self.learned = LearnedVectors()

    def forward(self, input: Tensor) -> Tensor:
        """input: ids [...], from 0 to the table's and all vectors' end. Returns [..., C]."""
        beyond = input - self.num_embeddings
        learned = F.embedding(beyond.clamp(min=0), torch.cat(list(self.learned)).to(self.weight.dtype))
        own = F.embedding(input.clamp(max=self.num_embeddings - 1), self.weight)
        return torch.where((beyond >= 0)[..., None], learned, own)

    def vectors(self) -> dict[str, nn.Parameter]:
        """Return the learned vectors [n, C] of each word."""
        return dict(zip(self.words, self.learned, strict=True))


def words_of(encoder: ChatGLM) -> dict[str, list[int]]:
    """The ids of each word that the encoder has learned vectors for."""
    ids, first = dict[str, list[int]](), encoder.embedding.num_embeddings
    for word, vectors in vectors_of(encoder).items():
        ids[word] = list(range(first, first + len(vectors)))
        first += len(vectors)
    return ids


def vectors_of(encoder: ChatGLM) -> dict[str, nn.Parameter]:
    """The learned vectors [n, C] of each word."""
    embedding = encoder.embedding
    return embedding.vectors() if isinstance(embedding, WordEmbedding) else {}


def add_words(encoder: ChatGLM, vectors: Mapping[str, Tensor]) -> None:
    """Let words stand for vectors [n, C], or [C] for one.

    Raises ValueError for a word that is there already, is empty or has space around it, and for vectors of
    another kind, width or without any; nothing is added then.
    """
    table, have = encoder.embedding.weight, vectors_of(encoder)
    checked = {}
    for word, given in vectors.items():
        if not isinstance(word, str) or not word or word.strip() != word:
            raise ValueError(f"a learned word must be some text without space around it, got {word!r}")
        if word in have:
            raise ValueError(f"{word} is a learned word already: unload_textual_inversion({word!r}) first")
        if not isinstance(given, Tensor):
            raise TypeError(f"{word}: expected vectors as a tensor, got {type(given).__name__}")
        found = given[None] if given.ndim == 1 else given
        if found.ndim != 2 or not len(found) or found.shape[1] != table.shape[1]:
            raise ValueError(f"{word}: expected vectors [n, {table.shape[1]}], got {list(given.shape)}")
        if not found.is_floating_point() or not torch.isfinite(found).all():
            raise ValueError(f"{word}: expected finite floating-point vectors, got {found.dtype}")
        checked[word] = nn.Parameter(found.detach().to(table, copy=True))
    if checked:
        embedding = encoder.embedding
        if not isinstance(embedding, WordEmbedding):
            embedding = encoder.embedding = WordEmbedding(embedding)
        embedding.words += checked
        embedding.learned.extend(checked.values())


def learn_words(model: nn.Module, *words: str) -> None:
    """Let only the vectors of these words be trained, of all parameters of a model with a text encoder.

    The paper (eq. 2) starts from the embedding of a word that says roughly what it is: give that to
    `add_words`. ValueError for a word that is not there.
    """
    tables = (module for module in model.modules() if isinstance(module, WordEmbedding))
    have = {word: vectors for table in tables for word, vectors in table.vectors().items()}
    if not words:
        raise ValueError("no word to be learned")
    if unknown := [word for word in words if word not in have]:
        raise ValueError(f"{unknown[0]} is no learned word; there are: {', '.join(have) or 'none'}")
    model.requires_grad_(False)
    for word in words:
        have[word].requires_grad_(True)


def remove_words(encoder: ChatGLM, words: Iterable[str] | None = None) -> None:
    """Forget these words, or all; with the last one the encoder's own embedding is back.

    Raises ValueError for a word that is not there; none is forgotten then.
    """
    have = vectors_of(encoder)
    gone = list(have) if words is None else list(words)
    if unknown := [word for word in gone if word not in have]:
        raise ValueError(f"{unknown[0]} is no learned word; there are: {', '.join(have) or 'none'}")
    embedding = encoder.embedding
    if isinstance(embedding, WordEmbedding):
        embedding.words = [word for word in have if word not in gone]
        embedding.learned = LearnedVectors([have[word] for word in embedding.words])
        if not embedding.words:
            encoder.embedding = cast(nn.Embedding, embedding.plain())


def save_words(encoder: ChatGLM, file: str | Path, *, overwrite: bool = False) -> None:
    """Write all learned words to a safetensors file, whole or not at all.

    Raises ValueError if there are none, FileExistsError for a file that is there, unless `overwrite`.
    """
    if not (vectors := vectors_of(encoder)):
        raise ValueError(f"{file}: the text encoder has no learned words to be written")
    save_tensors(vectors, as_new_path("file", file, overwrite))


class TextualInversion:
    """Methods for a pipeline whose `text_encoder` may learn words."""

    text_encoder: ChatGLM | None

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: Any,
        token: str | Sequence[str | None] | None = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        hf_token: str | bool | None = None,
    ) -> None:
        """Let words in prompts stand for the vectors of a file, wherever they stand, inside other words too.

        pretrained_model_name_or_path: a safetensors file of name -> vectors [n, C], a folder or hub
        repository with one, its tensors as a dict, or one tensor; or a list of these. token: the word, if it
        is not to be the tensor's name; for a list, a list. Raises FileNotFoundError or ValueError naming the
        file and what does not fit; nothing is changed then.
        """
        encoder = self._word_encoder()
        sources = pretrained_model_name_or_path
        sources = list(sources) if isinstance(sources, list | tuple) else [sources]
        if not sources or not isinstance(token, str | Sequence | None):
            got = "no file" if not sources else f"the token {token!r}"
            raise ValueError(f"expected files of learned words, and for each a word or None, got {got}")
        tokens = [token] if isinstance(token, str) else token
        tokens = [None] * len(sources) if tokens is None else list(tokens)
        if len(tokens) != len(sources):
            raise ValueError(f"expected a token for each of {len(sources)} files, got {len(tokens)}")
        vectors = dict[str, Tensor]()
        for source, word in zip(sources, tokens, strict=True):
            if isinstance(source, Tensor):
                source = {NAMELESS: source}
            if isinstance(source, Mapping):
                unused = {"weight_name": weight_name, "subfolder": subfolder, "revision": revision}
                reject_unused("given vectors", **unused)
                found = Tensors(source, "the given vectors")
            else:
                file = find_file(
                    source, weight_name, subfolder, preferred=(WEIGHT_NAME,), revision=revision,
                    cache_dir=cache_dir, local_files_only=local_files_only, token=hf_token,
                )  # fmt: skip
                found = Source([file])
            for name, tensor in _named(found, word).items():
                if name in vectors:
                    raise ValueError(f"{found.where}: the word {name} comes twice")
                vectors[name] = tensor
        add_words(encoder, vectors)

    def unload_textual_inversion(self, tokens: str | Sequence[str] | None = None) -> None:
        """Forget these words, or all: the text encoder is what it was, bit for bit. ValueError for others."""
        if not isinstance(tokens, str | Sequence | None):
            raise TypeError(f"tokens must be a word, several or None for all, got {tokens!r}")
        remove_words(self._word_encoder(), [tokens] if isinstance(tokens, str) else tokens)

    def _word_encoder(self) -> ChatGLM:
        if self.text_encoder is None:
            raise ValueError("this pipeline has no text encoder, and learned words are read by it")
        return plain(self.text_encoder)


def _named(source: Source | Tensors, word: str | None) -> dict[str, Tensor]:
    """A file's vectors by the words that they stand for."""
    names = list(source)
    if not names:
        raise ValueError(f"{source.where}: has no vectors")
    if word is None:
        if NAMELESS in names:
            raise ValueError(f"{source.where}: {NAMELESS} names no word: say which (token)")
        return {name: source[name] for name in names}
    if len(names) > 1:
        raise ValueError(f"{source.where}: has {len(names)} words, and token gives one name, {word}")
    return {word: source[names[0]]}
