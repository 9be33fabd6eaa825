"""Text for calibration and evaluation: datasets by name, local files, or the English text that every Python ships."""

import contextlib
import hashlib
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from decdec.errors import UserError
from decdec.files import atomic, config_hash

BUILT_IN = "pydoc"
NAMES = ("wikitext", "c4", "pileval", BUILT_IN)
# Of a text longer than this many characters, calibration tokenizes documents drawn by the seed up to this length: the first
# shard of C4 is fifty times longer, and takes minutes and many gigabytes.
CALIBRATION_CHARACTERS = 16_000_000


@dataclass(frozen=True)
class Text:
    """A list of documents with the name and the hash that every result records."""

    name: str
    documents: tuple[str, ...]

    @property
    def joined(self) -> str:
        return "\n\n".join(self.documents)

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.joined.encode()).hexdigest()[:16]


def load_text(source: str, part: str) -> Text:
    """Text for ``part`` ``"calibration"`` or ``"evaluation"`` (disjoint for all named sources).

    ``source``: ``wikitext`` (WikiText-2 raw; train / test), ``c4`` (first shard; train / validation), ``pileval`` (validation
    split of the Pile, AWQ's calibration text; even / odd documents), ``pydoc`` (the topics of Python's own documentation), or a
    path: ``.jsonl`` (field ``text``), ``.raw`` (WikiText's raw format, rows joined as the paper's harness joins the hub's rows), or
    any other text file as it is.
    """
    if part not in ("calibration", "evaluation"):
        raise ValueError(f"part: expected 'calibration' or 'evaluation', got {part!r}")
    if source == BUILT_IN:
        return _pydoc(part)
    if source in NAMES:
        return _hub(source, part)
    path = Path(source)
    if not path.is_file():
        raise UserError(f"text: expected one of {', '.join(NAMES)} or a file, got {source!r}")
    return _file(path)


def _pydoc(part: str) -> Text:
    from pydoc_data.topics import topics

    keys = sorted(topics)
    chosen = [key for i, key in enumerate(keys) if (i % 4 == 3) == (part == "evaluation")]
    return Text(f"pydoc-{platform.python_version()}-{part}", tuple(topics[key] for key in chosen))


def _hub(source: str, part: str) -> Text:
    import datasets

    train = part == "calibration"
    repository, options, name = {
        "wikitext": ("Salesforce/wikitext", {"name": "wikitext-2-raw-v1", "split": "train" if train else "test"},
                     f"wikitext2-{'train' if train else 'test'}"),
        "c4": ("allenai/c4", {"data_files": "en/c4-train.00000-of-01024.json.gz" if train else
                              "en/c4-validation.00000-of-00008.json.gz", "split": "train"},
               f"c4-{'train' if train else 'validation'}-0"),
        "pileval": ("mit-han-lab/pile-val-backup", {"split": "validation"}, f"pileval-{part}"),
    }[source]
    try:
        revision = _revision(repository)
        rows = datasets.load_dataset(repository, revision=revision, **options)["text"]
    except Exception as error:  # the hub client raises many kinds; whichever, the user can only choose another text
        raise UserError(f"text: {source} could not be loaded from the hub ({type(error).__name__}); "
                        f"give a local file or '{BUILT_IN}', which needs no network") from error
    documents = tuple(rows)
    if source == "pileval":
        documents = documents[0 if train else 1::2]
    return Text(f"{name}@{revision[:12]}" if revision else name, documents)


def _revision(repository: str) -> str | None:
    """The commit that a dataset's main branch stands at; None without a network, where only the cache can answer."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(repository, timeout=20).sha
    except Exception:  # of many kinds; loading says what is wrong if the cache has nothing
        return None


def _file(path: Path) -> Text:
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"text: {path}: expected UTF-8 text") from None
    if path.suffix == ".jsonl":
        try:
            # Not splitlines(), which breaks lines at characters that a JSON string may hold.
            documents = tuple(json.loads(line)["text"] for line in content.split("\n") if line.strip())
        except (json.JSONDecodeError, KeyError, TypeError):
            documents = (None,)
        if not all(isinstance(document, str) for document in documents):
            raise UserError(f"text: {path}: expected JSON lines with a field 'text'")
    elif path.suffix == ".raw":
        documents = tuple(line + "\n" if line.strip() else "" for line in content.removesuffix("\n").split("\n"))
    else:
        documents = (content,)
    if not any(document.strip() for document in documents):
        raise UserError(f"text: {path}: expected text, got an empty file")
    return Text(path.name, documents)


def calibration_identity(calibration: dict) -> dict:
    """What tells one calibration from another: not the text's name, which says without a network less than with one."""
    return {key: value for key, value in calibration.items() if key != "text"}


def tokenize(text: Text, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Token ids of the joined text, int64 ``(tokens,)``, without special tokens inside (a model's own BOS first, if it has one)."""
    return tokenizer(text.joined, return_tensors="pt", verbose=False).input_ids[0]


def windows(text: Text, tokenizer: PreTrainedTokenizerBase, length: int, count: int | None = None) -> Tensor:
    """The first ``count`` (default all) non-overlapping windows of ``length`` tokens, tail dropped: ``(windows, length)``."""
    _at_least(2, "length", length)  # a single token predicts none
    if count is not None:
        _at_least(1, "windows", count)
    tokens = tokenize(text, tokenizer)
    available = len(tokens) // length
    if available < (count or 1):
        raise UserError(f"text: {text.name} has {len(tokens)} tokens; {count or 1} windows of {length} need {(count or 1) * length}")
    count = count or available
    return tokens[: count * length].view(count, length)


def _at_least(least: int, name: str, value: int) -> None:
    if value < least:
        raise UserError(f"{name}: expected {least} or more, got {value}")


def calibration_samples(text: Text, tokenizer: PreTrainedTokenizerBase, samples: int, length: int, seed: int) -> Tensor:
    """``samples`` windows of ``length`` tokens drawn without overlap by ``seed``: int64 ``(samples, length)``.

    Of a text beyond CALIBRATION_CHARACTERS, documents are drawn first, by the same seed. What was drawn is kept in
    :func:`cache_folder`, by tokenizer, text and settings.
    """
    _at_least(1, "samples", samples)
    _at_least(2, "length", length)
    if not -2**63 <= seed < 2**63:
        raise UserError(f"seed: expected an integer of at most 64 bits, got {seed}")
    # The whole of a fast tokenizer, its vocabulary and special tokens included, is this one string.
    content = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest() if tokenizer.is_fast else None
    key = config_hash({"tokenizer": content, "text": text.hash, "samples": samples, "length": length, "seed": seed,
                       "characters": CALIBRATION_CHARACTERS})
    path = cache_folder() / "calibration" / f"{key}.safetensors"
    with contextlib.suppress(OSError, SafetensorError, KeyError):  # not there, or damaged: drawn again
        if content:
            return load_file(path)["tokens"]
    generator = torch.Generator().manual_seed(seed)
    every = windows(_drawn(text, max(CALIBRATION_CHARACTERS, 32 * samples * length), generator), tokenizer, length)
    if len(every) < samples:
        raise UserError(f"text: {text.name} has {len(every)} windows of {length} tokens, {samples} samples were asked for")
    tokens = every[torch.randperm(len(every), generator=generator)[:samples]]
    with contextlib.suppress(OSError, SafetensorError):  # a cache that cannot be written saves no time, and does no harm
        if content:
            with atomic(path) as temporary:
                save_file({"tokens": tokens}, temporary)
    return tokens


def cache_folder() -> Path:
    """Where what can be made again is kept between runs: ``DECDEC_CACHE``, or ``decdec`` among the user's caches."""
    chosen = os.environ.get("DECDEC_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "decdec"


def _drawn(text: Text, characters: int, generator: torch.Generator) -> Text:
    """``text`` itself if it is no longer than ``characters``, else documents of it in random order up to that length."""
    if sum(map(len, text.documents)) <= characters:
        return text
    chosen, length = [], 0
    for index in torch.randperm(len(text.documents), generator=generator).tolist():
        chosen.append(text.documents[index])
        length += len(chosen[-1])
        if length >= characters:
            break
    return Text(text.name, tuple(chosen))
