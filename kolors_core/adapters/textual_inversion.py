"""Textual inversion (https://arxiv.org/abs/2208.01618): a word in a prompt stands for learned vectors.

`add_words` appends the vectors to ChatGLM's embedding table, at ids beyond the vocabulary, for the tokenizer;
`learn_words` prepares their training, `remove_words` restores the encoder. Saved pipelines lack them.
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
from kolors_core.devices import all_finite, unwrap_compiled
from kolors_core.hub import find_file, named_source, reject_unused
from kolors_core.module import ReplacedModule
from kolors_core.validation import as_new_path
from weights_convert.safetensors_files import Source, Tensors, save_tensors

WEIGHT_NAME = "learned_embeds.safetensors"
UNNAMED = "emb_params"  # the tensor's name in a file of one word that does not name the word


class LearnedVectors(nn.ParameterList):
    """Vectors [n, C] of learned words; no part of the model's own checkpoint."""

    is_adapter = True


class WordEmbedding(ReplacedModule, nn.Embedding):
    """Embedding table followed by the learned vectors of `words`, at the added keys `learned.<i>` [n, C]."""

    def __init__(
        self, base: nn.Embedding, vectors: Mapping[str, nn.Parameter],
        sources: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """sources: the file or repository of words that were loaded."""
        super().__init__(base)
        self.words, self.learned = list(vectors), LearnedVectors(vectors.values())
        self.sources = {word: origin for word, origin in (sources or {}).items() if word in vectors}

    def forward(self, input: Tensor) -> Tensor:
        """Embed ids [...], from 0 to the end of the table and all vectors: [..., C]."""
        learned_ids = input - self.num_embeddings  # negative for the table's own ids
        learned = F.embedding(learned_ids.clamp(min=0), torch.cat(list(self.learned)).to(self.weight.dtype))
        base = F.embedding(input.clamp(max=self.num_embeddings - 1), self.weight)
        return torch.where((learned_ids >= 0)[..., None], learned, base)


def words_of(encoder: ChatGLM) -> dict[str, list[int]]:
    """Return the ids of each learned word of the encoder."""
    ids, found = dict[str, list[int]](), vectors_of(encoder)
    first = encoder.embedding.num_embeddings if found else 0
    for word, vectors in found.items():
        ids[word] = list(range(first, first + len(vectors)))
        first += len(vectors)
    return ids


def vectors_of(encoder: ChatGLM) -> dict[str, nn.Parameter]:
    """Return the learned vectors [n, C] of each word of the encoder."""
    table = getattr(encoder, "embedding", None)  # which encoders of one's own may lack
    return dict(zip(table.words, table.learned, strict=True)) if isinstance(table, WordEmbedding) else {}


def add_words(
    encoder: ChatGLM, vectors: Mapping[str, Tensor], sources: Mapping[str, str] | None = None
) -> None:  # fmt: skip
    """Add words with their vectors [n, C], or [C] for one vector, to the encoder.

    sources: the file or repository of words that were loaded. Raises ValueError for a word that exists
    already, is empty or has space around it, and for vectors that are not finite floating-point numbers, of
    another width, or none; nothing is added then.
    """
    table, checked = encoder.embedding.weight, dict[str, nn.Parameter]()
    for word, given in vectors.items():
        rows = _check_vectors(encoder, word, given)
        checked[word] = nn.Parameter(rows.detach().to(table, copy=True))
    if checked:
        _set_vectors(encoder, vectors_of(encoder) | checked, sources)


def _check_vectors(encoder: ChatGLM, word: str, given: Tensor) -> Tensor:
    """Check a word and its vectors for `add_words`; return them as [n, C]."""
    width = encoder.embedding.weight.shape[1]
    if not isinstance(word, str) or not word or word.strip() != word:
        raise ValueError(f"a learned word must be some text without space around it, got {word!r}")
    if word in vectors_of(encoder):
        raise ValueError(f"{word} is a learned word already: unload_textual_inversion({word!r}) first")
    if not isinstance(given, Tensor):
        raise TypeError(f"{word}: expected vectors as a tensor, got {type(given).__name__}")
    rows = given[None] if given.ndim == 1 else given
    if rows.ndim != 2 or not len(rows) or rows.shape[1] != width:
        raise ValueError(f"{word}: expected vectors [n, {width}], got {list(given.shape)}")
    if not rows.is_floating_point() or not all_finite(rows):
        raise ValueError(f"{word}: expected finite floating-point vectors, got {rows.dtype}")
    return rows


def learn_words(model: nn.Module, *words: str) -> None:
    """Make these words' vectors the only trainable parameters of a model with a text encoder.

    The paper (eq. 2) initializes with the embedding of a word that roughly describes the concept: give that
    to `add_words`. ValueError for an unknown word.
    """
    existing = {w: v for m in model.modules() if isinstance(m, ChatGLM) for w, v in vectors_of(m).items()}
    if not words:
        raise ValueError("no word to be learned")
    _check_known(words, existing)
    model.requires_grad_(False)
    for word in words:
        existing[word].requires_grad_(True)


def remove_words(encoder: ChatGLM, words: Iterable[str] | None = None) -> None:
    """Remove these words, or all; removing the last one restores the encoder's own embedding.

    Raises ValueError for an unknown word; none is removed then.
    """
    existing = vectors_of(encoder)
    removed = list(existing) if words is None else list(words)
    _check_known(removed, existing)
    if removed:
        _set_vectors(encoder, {word: vectors for word, vectors in existing.items() if word not in removed})


def _set_vectors(
    encoder: ChatGLM, vectors: Mapping[str, nn.Parameter], sources: Mapping[str, str] | None = None
) -> None:  # fmt: skip
    """Replace all learned words of the encoder, in one assignment: an interrupted change is none."""
    table = encoder.embedding
    known, plain = dict(sources or {}), table
    if isinstance(table, WordEmbedding):
        known, plain = table.sources | known, cast(nn.Embedding, table.plain())
    encoder.embedding = WordEmbedding(plain, vectors, known) if vectors else plain


def _check_known(words: Iterable[str], existing: Mapping[str, Tensor]) -> None:
    if unknown := [word for word in words if word not in existing]:
        raise ValueError(f"{unknown[0]} is no learned word; there are: {', '.join(existing) or 'none'}")


def save_words(encoder: ChatGLM, file: str | Path, *, overwrite: bool = False) -> None:
    """Write all learned words to a safetensors file, whole or not at all.

    Raises ValueError if there are none, FileExistsError for an existing file, unless `overwrite`.
    """
    if not (vectors := vectors_of(encoder)):
        raise ValueError(f"{file}: the text encoder has no learned words to be written")
    save_tensors(vectors, as_new_path("file", file, overwrite))


class TextualInversionMethods:
    """Textual inversion methods for a pipeline that has a `text_encoder`."""

    text_encoder: ChatGLM | None

    def load_textual_inversion(
        self, pretrained_model_name_or_path: Any, token: str | Sequence[str | None] | None = None, *,
        weight_name: str | None = None, subfolder: str | None = None, revision: str | None = None,
        cache_dir: str | Path | None = None, local_files_only: bool = False,
        hf_token: str | bool | None = None,
    ) -> None:  # fmt: skip
        """Load words and their vectors; prompts may use a word anywhere, inside other words too.

        pretrained_model_name_or_path: a safetensors file of name -> vectors [n, C], a folder or repository
        with one, its tensors as a dict, or one tensor; or a list of these. token: the word, by default the
        tensor's name; or a list. Raises FileNotFoundError or ValueError; nothing is changed then.
        """
        encoder, sources = self._word_encoder(), pretrained_model_name_or_path
        sources = list(sources) if isinstance(sources, list | tuple) else [sources]
        if not sources or not isinstance(token, str | Sequence | None):
            got = "no file" if not sources else f"the token {token!r}"
            raise ValueError(f"expected files of learned words, and for each a word or None, got {got}")
        tokens = [None] * len(sources) if token is None else token
        tokens = [tokens] if isinstance(tokens, str) else list(tokens)
        if len(tokens) != len(sources):
            raise ValueError(f"expected a token for each of {len(sources)} files, got {len(tokens)}")
        vectors, origins = dict[str, Tensor](), dict[str, str]()
        for source, word in zip(sources, tokens, strict=True):
            if isinstance(source, Mapping | Tensor):
                unused = {"weight_name": weight_name, "subfolder": subfolder, "revision": revision}
                reject_unused("given vectors", **unused)
                named = {UNNAMED: source} if isinstance(source, Tensor) else source
                tensors = Tensors(named, "the given vectors")
            else:
                file = find_file(
                    source, weight_name, subfolder, preferred=(WEIGHT_NAME,), revision=revision,
                    cache_dir=cache_dir, local_files_only=local_files_only, token=hf_token,
                )  # fmt: skip
                tensors = Source([file])
                origin = named_source(source, file, weight_name=weight_name, subfolder=subfolder)
                origins |= dict.fromkeys(_vectors_by_word(tensors, word), origin)
            for name, tensor in _vectors_by_word(tensors, word).items():
                if name in vectors:
                    raise ValueError(f"{tensors.where}: the word {name} comes twice")
                try:
                    vectors[name] = _check_vectors(encoder, name, tensor)
                except ValueError as error:
                    raise ValueError(f"{tensors.where}: {error}") from None
        add_words(encoder, vectors, origins)

    def unload_textual_inversion(self, tokens: str | Sequence[str] | None = None) -> None:
        """Remove these words, or all: the text encoder is what it was, bit for bit. ValueError if unknown."""
        if not isinstance(tokens, str | Sequence | None):
            raise TypeError(f"tokens must be a word, several or None for all, got {tokens!r}")
        remove_words(self._word_encoder(), [tokens] if isinstance(tokens, str) else tokens)

    def _word_encoder(self) -> ChatGLM:
        if self.text_encoder is None:
            raise ValueError("this pipeline has no text encoder, and learned words are read by it")
        if not isinstance(encoder := unwrap_compiled(self.text_encoder), ChatGLM):
            got = type(encoder).__name__
            raise TypeError(f"learned words need kolors_core's ChatGLM, and the text encoder is a {got}")
        return encoder


def _vectors_by_word(source: Source | Tensors, word: str | None) -> dict[str, Tensor]:
    """Read a file's vectors by word; `word` replaces the name of its only tensor."""
    if not (names := list(source)):
        raise ValueError(f"{source.where}: has no vectors")
    if word is None:
        if UNNAMED in names:
            raise ValueError(f"{source.where}: {UNNAMED} names no word: say which (token)")
        return {name: source[name] for name in names}
    if len(names) > 1:
        raise ValueError(f"{source.where}: has {len(names)} words, and token gives one name, {word}")
    return {word: source[names[0]]}
