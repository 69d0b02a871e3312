"""Text to token ids: a sentencepiece model with T5's special ids, and the training of a small one."""

import io
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from starflow_jax.config import UserError
from starflow_jax.io.checksums import check_file

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2

SPACE = "\u2581"  # how sentencepiece writes a space; each word of a text begins with it
# Fixed runs of the formatted prompt (text/prompt.py) that take one id each.
METADATA = tuple(
    SPACE + words.replace(" ", SPACE)
    for words in ("noise level", "a video with", "fps:", "an image:", "(extend)", "aspect ratio.")
)
# Single pieces in every vocabulary, so that a word never seen is spelled; case is folded before.
ALPHABET = "".join(chr(code) for code in range(33, 127) if not chr(code).isupper())
MAX_PIECE_LENGTH = 32


class Tokenizer:
    """A sentencepiece model whose pad, eos and unk ids are T5's: 0, 1, 2."""

    def __init__(self, model: bytes):
        """Takes the serialized model; raises UserError if it is none, or has other special ids."""
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise UserError("not a sentencepiece model; give the tokenizer file of the checkpoint") from error
        special = self._processor.pad_id(), self._processor.eos_id(), self._processor.unk_id()
        if special != (PAD_ID, EOS_ID, UNK_ID):
            raise UserError(f"the tokenizer has pad, eos, unk ids {special}, not T5's (0, 1, 2)")

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes]]:
        return Tokenizer, (self.model,)

    @classmethod
    def load(cls, source: str | Path | bytes) -> "Tokenizer":
        """From a file or from the bytes of one; raises UserError if it can't be read."""
        if isinstance(source, bytes):
            return cls(source)
        check_file(Path(source))
        try:
            return cls(Path(source).read_bytes())
        except OSError as error:
            raise UserError(f"can't read tokenizer {source}: {error.strerror}") from error

    @property
    def vocab_size(self) -> int:
        """Number of ids; the encoder's table needs at least as many rows."""
        return self._processor.GetPieceSize()

    def encode(self, texts: Sequence[str], length: int) -> np.ndarray:
        """Token ids, int32 [batch, length]: cut to length - 1, then eos, then padding."""
        if length < 1:
            raise UserError(f"text length {length} leaves no room for the end-of-text id; make it at least 1")
        ids_BS = np.full((len(texts), length), PAD_ID, np.int32)
        for row_S, text in zip(ids_BS, texts, strict=True):
            ids = [*self._processor.EncodeAsIds(text)[: length - 1], EOS_ID]
            row_S[: len(ids)] = ids
        return ids_BS

    def decode(self, ids_BS: np.ndarray) -> list[str]:
        """The texts up to their eos, as the normalizer left them (spaces for newlines)."""
        return [self._processor.DecodeIds(_until_eos(ids_S.tolist())) for ids_S in ids_BS]

    def pieces(self, text: str) -> list[str]:
        """How a text is cut, for people to look at; without eos."""
        return self._processor.EncodeAsPieces(text)


def _until_eos(ids: list[int]) -> list[int]:
    return ids[: ids.index(EOS_ID)] if EOS_ID in ids else ids


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Trains a unigram model on formatted prompts and returns it serialized.

    The vocabulary holds the special ids, the prompts' fixed fragments, the printable ASCII
    characters and then whole words, at most `vocab_size` in all: less where the texts have
    fewer words. A word outside it is spelled; a character outside it becomes UNK_ID. The
    normalizer folds case, and, like T5's, applies NFKC and turns newlines into spaces. The same
    texts give the same bytes. Raises UserError for no text or too small a vocabulary.
    """
    lines = [" ".join(text.split()) for text in texts]
    words = Counter(SPACE + word for line in lines for word in _normalize(line).split())
    if not words:
        raise UserError("no text to train a tokenizer on; give it captions")
    smallest = UNK_ID + 1 + len(METADATA) + len({*ALPHABET, *"".join(words)})
    if vocab_size < smallest:
        raise UserError(f"vocabulary of {vocab_size} can't hold its characters; make it {smallest} or more")
    return _without_paths(_train_unigram(lines, _seed_table(words), vocab_size))


def _normalize(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _seed_table(words: Counter[str]) -> str:
    """Candidate pieces, "piece<tab>count" a line.

    Sentencepiece on its own takes its candidates from substrings that occur in several *different*
    words, so in a language of a hundred words it would cut "seven" into "s-e-ve-n".
    """
    counts = Counter({word: count for word, count in words.items() if len(word) <= MAX_PIECE_LENGTH})
    for word, count in words.items():
        for character in word:
            counts[character] += count
    counts.update(ALPHABET)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return "".join(f"{piece}\t{count}\n" for piece, count in ordered)


def _train_unigram(lines: list[str], seed_table: str, vocab_size: int) -> bytes:
    model = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".tsv") as seeds:
        seeds.write(seed_table)
        seeds.flush()
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            seed_sentencepieces_file=seeds.name,
            user_defined_symbols=list(METADATA),
            required_chars=ALPHABET,
            character_coverage=1.0,
            max_sentencepiece_length=MAX_PIECE_LENGTH,
            normalization_rule_name="nmt_nfkc_cf",
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            bos_id=-1,
            num_threads=1,  # sums over threads would depend on their order
            minloglevel=2,
        )
    return model.getvalue()


def _without_paths(model: bytes) -> bytes:
    """Drops the seed file's temporary name, which would differ from run to run."""
    # Here, not above: it needs a newer protobuf (7.36) than Apache Beam allows, and only training needs it.
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
    proto.trainer_spec.ClearField("seed_sentencepieces_file")
    return proto.SerializeToString(deterministic=True)
