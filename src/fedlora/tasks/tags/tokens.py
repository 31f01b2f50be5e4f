"""Token classification: a tag for each word of a sentence, such as the names of people and places in it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedlora.core.component import MODEL_CONFIG, Count, Field, Whole, dataclass
from fedlora.core.errors import ConfigError, DataError, TrainingError, shown
from fedlora.core.later import datasets, seqeval
from fedlora.tasks.base import Batch, Compute, Data, Evaluation, Model, Positions, Prepared, Split
from fedlora.tasks.data.columns import Source, Splits, check_rows, class_names, fingerprint, split, values_of
from fedlora.tasks.data.tokenized import PreparedTokenized, TokenizedTask
from fedlora.tasks.models.encoded import Arrays, Ragged, by_length, cached, chunks, ranges
from fedlora.tasks.models.loading import class_settings, load_pretrained
from fedlora.tasks.models.shares import Shares, shares_of
from fedlora.tasks.models.staged import LEARNT, learnt_places
from fedlora.tasks.scores import ONE_CLASS
from fedlora.tasks.tags.schemes import FORM, OUTSIDE, entity_tag, is_tag, mixed, scheme_of
from fedlora.tasks.tags.words import Windows, cut, words_of

MASKED = -100
"""The label of a piece that is not scored."""

_PLAIN = re.compile(r".+")
_UNLABELLED = "no word of these examples gets a token, so nothing can be learnt or scored: "
_UNLABELLED += "check the column 'tokens', or use larger batches"


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class TokenClassification(TokenizedTask):
    """Assigns a tag to each word; evaluated by the F1 of whole entities with ``seqeval``.

    Columns: ``tokens``, a list of words, and ``tags``, a list as long of tags or of their numbers. Numbers need names:
    those that the data declare (``ClassLabel``), or ``tag_names``. Sentences longer than ``max_length`` are cut into
    windows; each word is trained and scored in the window with the most context around it.

    Args:
        scheme: ``iob2``: ``B-type`` begins an entity, ``I-type`` continues it, ``O`` is outside. Tags of IOB1, IOE,
            BIOES, BMES and BILOU are recognised by their prefixes and scored as whole entities too. ``plain``: each
            word with a tag other than ``O`` is an entity of its own.
        tag_names: all tags; if the data have numbers, in the order of these.
        max_length: number of tokens in a window, including special ones.
        stride: number of tokens that a window shares with the previous one.
        eval_batch_size: windows per evaluation batch; they are sorted by length.

    Raises:
        ConfigError: a tag is named twice, or does not fit the scheme.
    """

    kind: Literal["token_classification"] = "token_classification"
    scheme: Literal["iob2", "plain"] = "iob2"
    tag_names: tuple[str, ...] = ()
    max_length: Annotated[int, Field(ge=3)] = 128
    stride: Whole = 16
    eval_batch_size: Count = 64

    def __post_init__(self) -> None:
        if len(set(self.tag_names)) < len(self.tag_names):
            twice = next(name for name in self.tag_names if self.tag_names.count(name) > 1)
            raise ConfigError(f"task.tag_names has {twice!r} twice, but each tag has one name: remove one of them")
        wrong = self._invalid_tag(self.tag_names, "task.tag_names has")
        if wrong:
            raise ConfigError(wrong)

    def read(self, source: Source) -> tuple[Splits, list[str]]:
        """See ``TokenizedTask.read``: the tags' names are ``O``, then the others sorted."""
        raw = source.raw()
        train = self._tags(raw.train, "training")
        declared = class_names(raw.train, "tags")
        if declared and self.tag_names and set(declared) != set(self.tag_names):
            raise DataError("the training rows declare other tags than task.tag_names: remove task.tag_names")
        known = self.tag_names or declared or {tag for tags in train for tag in tags}
        wrong = self._invalid_tag(known, "the training rows declare")
        if wrong:
            raise DataError(wrong)
        names = [OUTSIDE, *sorted(set(known) - {OUTSIDE})]
        if len(names) < 2:
            raise DataError(f"all words of the training rows have the tag {OUTSIDE!r}, but one more is needed to learn")
        raw = raw._replace(train=_numbered(raw.train, train, names, "training"))
        if raw.test is not None:
            raw = raw._replace(test=self.known(raw.test, names, "test"))
        return split(raw, "tokens"), names

    def known(self, rows: Any, names: list[str], which: str) -> Any:
        return _numbered(rows, self._tags(rows, which), names, which)

    def over(self, model: Model, tokenizer: Any, names: list[str], data: Data) -> Prepared:
        return PreparedTokens(self, model, tokenizer, names, data)

    def entity_tag(self, name: str) -> str:
        """A tag as ``seqeval`` reads it: a plain one begins an entity."""
        if self.scheme == "plain":
            return name if name == OUTSIDE else f"B-{name}"
        return entity_tag(name)

    def _invalid_tag(self, names: Iterable[str], whose: str) -> str | None:
        names = list(names)
        if self.scheme == "plain":
            return next(
                (
                    f"{whose} the tag {shown(name)}, but a tag is a word on one line: correct the tag"
                    for name in names
                    if not _PLAIN.fullmatch(name)
                ),
                None,
            )
        if (wrong := next((name for name in names if not is_tag(name)), None)) is not None:
            return f"{whose} the tag {shown(wrong)}, but {FORM}"
        if pair := mixed(names):
            return f"{whose} the tags {pair[0]!r} and {pair[1]!r}, but no scheme has both: write all tags in one scheme"
        return None

    def _tags(self, rows: Any, which: str) -> list[list[str]]:
        """The tags of each row by name, after a look at every row."""
        check_rows(rows, ["tokens", "tags"], which)
        names = class_names(rows, "tags") or self.tag_names
        found = []
        for row, (words, tags) in enumerate(zip(values_of(rows, "tokens"), values_of(rows, "tags"), strict=True)):
            where = f"row {row} of the {which} rows"
            if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
                raise DataError(
                    f"{where} has {shown(words)} for 'tokens', but it must be a list of one or more words: "
                    "correct or remove the row, and use json or parquet, which have lists"
                )
            if not isinstance(tags, list) or len(tags) != len(words):
                has = f"{len(tags)} tags" if isinstance(tags, list) else f"{shown(tags)} for 'tags'"
                raise DataError(f"{where} has {len(words)} words and {has}, but each word needs a tag: correct the row")
            found.append([self._name(tag, names, where) for tag in tags])
        return found

    def _name(self, tag: Any, names: Sequence[str], where: str) -> str:
        if isinstance(tag, str):
            wrong = self._invalid_tag([tag], f"{where} has")
            if wrong:
                raise DataError(wrong)
            return tag
        if not isinstance(tag, int) or isinstance(tag, bool) or (names and not 0 <= tag < len(names)):
            known = f"a number from 0 to {len(names) - 1}" if names else "a word"
            raise DataError(f"{where} has the tag {shown(tag, 40)}, but a tag is {known}: correct the row")
        if not names:
            raise DataError(
                f"{where} has the tag {tag}, but the numbers have no names: name the tags in their order in "
                "task.tag_names"
            )
        return names[tag]


class PreparedTokens(PreparedTokenized):
    """Encoded sentences, their tags, and the model they are for.

    The class of an example, for partitions by label, is the number of the first tag of the entity type that occurs in
    it most often (of equals, that with the smaller number), and 0, ``O``, where it has no entity.

    Args:
        names: the tags' names, ``O`` first.
        data: a data set per split, with the columns ``tokens``, ``tags`` (class numbers), and any others.
    """

    settings: TokenClassification
    main_metric = "f1"
    higher_is_better = True
    auto_class = "AutoModelForTokenClassification"
    peft_task = "TOKEN_CLS"

    def __init__(
        self, settings: TokenClassification, model: Model, tokenizer: Any, names: list[str], data: Data
    ) -> None:
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise ConfigError(
                f"the tokenizer of {model.path!r} does not map tokens to words, which tags need: choose a model "
                "whose folder has tokenizer.json"
            )
        super().__init__(settings, model, tokenizer, names, data)
        self._entity_tags = [settings.entity_tag(name) for name in names]
        self._windows = {name: self._encode(part) for name, part in data.items()}
        self._labels = self._frequent(self._windows["train"].tags) if "train" in data else np.zeros(0, np.int64)

    @property
    def labels(self) -> Positions:
        """See ``Prepared.labels``: the most frequent type of entity in each example."""
        return self._labels

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"tokens", "tags"})

    @property
    def notes(self) -> tuple[str, ...]:
        """See ``Prepared.notes``: the scheme of the tags, if it is another than IOB2."""
        if self.settings.scheme == "plain" or "train" not in self.data:
            return super().notes
        names = self._names
        tags = ([names[tag] for tag in row] for row in values_of(self.data["train"], "tags"))
        found = scheme_of(names, tags)
        said = () if found == "IOB2" else (f"the tags are in the scheme {found}, and scored as whole entities",)
        return (*super().notes, *said)

    def texts(self, split: Split) -> list[str]:
        return [" ".join(words) for words in values_of(self._data[split], "tokens")]

    @property
    def sequences(self) -> list[Ragged]:
        return [windows.tokens for windows in self._windows.values()]

    def load_model(self, seed: int, compute: Compute, device: torch.device) -> tuple[nn.Module, frozenset[str]]:
        settings = class_settings(self._names)
        longest = self.longest()
        return load_pretrained(self.auto_class, self._model, seed, device, settings, longest=longest, compute=compute)

    def host_batch(self, rows: Positions, split: Split) -> Batch:
        """See ``PreparedTokenized.host_batch``: all windows of the examples.

        ``labels`` are ``(windows, width)``; -100 is masked.
        """
        windows = self._windows[split]
        batch, places = self._inputs(windows, windows.of(rows))
        batch["labels"] = torch.from_numpy(np.where(places >= 0, windows.tags.values[places], MASKED))
        return batch

    def for_device(self, batch: Batch) -> Batch:
        scored = (batch["labels"] != MASKED).flatten().nonzero().flatten()
        return super().for_device(batch) | {LEARNT: scored}

    def num_terms(self, batch: Batch) -> int:
        """See ``Prepared.num_terms``: the labelled words."""
        return len(batch[LEARNT]) if LEARNT in batch else int((batch["labels"] != MASKED).sum())

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See ``Prepared.loss``: the mean cross entropy over all words of the batch.

        On a CPU the windows go through the model in groups of like length.
        """
        if not self.num_terms(batch):
            raise TrainingError(_UNLABELLED)
        logits, labels = [], []
        for part in by_length(batch):
            places = learnt_places(part, part["labels"].shape[1])
            kept: Any = part["labels"] != MASKED if places is None else places
            found = model(input_ids=part["input_ids"], attention_mask=part.get("attention_mask")).logits
            logits.append(found[kept].float())
            labels.append(part["labels"][kept])
        return functional.cross_entropy(torch.cat(logits), torch.cat(labels))

    def shares(self, rows: Positions, device: torch.device) -> Shares:
        windows = self._windows["train"]
        chosen = windows.of(rows)
        counts = np.diff(windows.examples)[rows]
        return shares_of(counts, windows.num_scored(chosen), windows.tokens.lengths(chosen), device)

    def evaluate(self, model: nn.Module, rows: Positions, split: Split, device: torch.device) -> Evaluation:
        """See ``Prepared.evaluate``: F1, precision and recall over entities, accuracy over words, and the loss.

        An entity counts as found if its type, first and last word are right. Tags that break their scheme are read as
        ``conlleval`` does: an ``I-`` that follows nothing of its type begins an entity. A word that makes no piece of
        the tokenizer counts as predicted ``O``.

        Raises:
            TrainingError: no word of the examples makes a piece.
        """
        windows = self._windows[split]
        logits, places = self._logits(model, windows, windows.of(rows), device)
        if not len(places):
            raise TrainingError(_UNLABELLED)
        wanted, found = windows.tags.values, np.zeros(len(windows.tags.values), np.int64)
        found[places] = logits.argmax(1).numpy()
        loss = float(functional.cross_entropy(logits, torch.from_numpy(wanted[places])))
        words = ranges(windows.tags.offsets, rows)
        tagged = [
            [
                [self._entity_tags[tag] for tag in tags[slice(*windows.tags.offsets[row : row + 2])]]
                for row in rows.tolist()
            ]
            for tags in (wanted.tolist(), found.tolist())
        ]
        precision, recall, f1, _ = seqeval.metrics.sequence_labeling.precision_recall_fscore_support(
            *tagged, average="micro", zero_division=0
        )
        metrics = {
            "f1": float(f1),
            "precision": float(precision),
            "recall": float(recall),
            "accuracy": float((wanted[words] == found[words]).mean()),
            "loss": loss,
        }
        return Evaluation(metrics, tuple(self._warnings(wanted, found, words, places)))

    def predict(self, model: nn.Module, inputs: list[str], device: torch.device) -> list[dict[str, Any]]:
        """See ``Prepared.predict``: ``{"entities": [...]}``, each with ``type``, ``text``, and where in the input.

        Words are runs of letters and digits, and every other character that is no space; or those of a JSON list, whose
        text is the words with blanks between them. ``start`` and ``end`` count characters from 0, ``end`` exclusive.
        """
        if not inputs:
            return []
        inputs, spans = map(list, zip(*(words_of(given) for given in inputs), strict=True))
        words = [[text[slice(*span)] for span in found] for text, found in zip(inputs, spans, strict=True)]
        windows = Windows.over(self._cut(words), Ragged.of([[0] * len(one) for one in words], np.int64))
        logits, places = self._logits(model, windows, windows.of(np.arange(len(inputs))), device)
        found = np.zeros(len(windows.tags.values), np.int64)
        found[places] = logits.argmax(1).numpy()
        results = []
        for number, text in enumerate(inputs):
            tags = found[slice(*windows.tags.offsets[number : number + 2])]
            entities = []
            for kind, first, last in seqeval.metrics.sequence_labeling.get_entities(
                [self._entity_tags[tag] for tag in tags]
            ):
                start, end = spans[number][first][0], spans[number][last][1]
                entities.append({"type": kind, "text": text[start:end], "start": start, "end": end})
            results.append({"entities": entities})
        return results

    def inputs_of(self, rows: Any, which: str) -> list[str]:
        """See ``Prepared.inputs_of``: the column ``text``, or the words of ``tokens`` as JSON lists."""
        if "text" in rows.column_names:
            return super().inputs_of(rows, which)
        check_rows(rows, ["tokens"], which)
        return [json.dumps([str(word) for word in words], ensure_ascii=False) for words in values_of(rows, "tokens")]

    def _inputs(self, windows: Windows, sequences: Positions) -> tuple[Batch, NDArray[np.int64]]:
        """Sequences padded to the longest, and the places of their pieces."""
        inputs = self.inputs(windows.tokens, sequences, self.settings.max_length)
        return inputs, windows.places.padded(sequences, inputs["input_ids"].shape[1], -1).numpy()

    def _logits(
        self, model: nn.Module, windows: Windows, sequences: Positions, device: torch.device
    ) -> tuple[Tensor, NDArray[np.int64]]:
        """The outputs for all words that make a piece, ``(words, tags)`` float32, and the words' numbers."""
        order = sequences[np.argsort(windows.tokens.lengths(sequences), kind="stable")]
        logits, numbers = [], []
        for chosen in chunks(order, self.settings.eval_batch_size):
            inputs, places = self._inputs(windows, chosen)
            found = model(**{name: value.to(device) for name, value in inputs.items()}).logits
            logits.append(found[torch.from_numpy(places >= 0).to(device)].detach().float().cpu())
            numbers.append(places[places >= 0])
        return torch.cat(logits), np.concatenate(numbers)

    def _warnings(self, wanted: Positions, found: Positions, words: Positions, places: Positions) -> list[str]:
        sentences = []
        if len(np.unique(found[places])) == 1 and (wanted[places] != found[places]).any():
            sentences.append(
                f"{ONE_CLASS}, {self._names[int(found[places[0]])]!r}, for all {len(places)} "
                f"words, but {int((wanted[words] > 0).sum())} are of entities: it has learnt nothing useful"
            )
        lost = int((wanted[np.setdiff1d(words, places)] > 0).sum())
        if lost:
            sentences.append(f"{lost} words of entities get no token: they count as predicted {OUTSIDE!r}")
        return sentences

    def _frequent(self, tags: Ragged) -> Positions:
        first: dict[str, int] = {}
        for number, tag in enumerate(self._entity_tags[1:], 1):
            first.setdefault(tag[2:], number)
        labels = np.zeros(len(tags.offsets) - 1, np.int64)
        for row in range(len(labels)):
            found = tags.values[tags.offsets[row] : tags.offsets[row + 1]]
            if found.any():
                counts = Counter(
                    first[kind]
                    for kind, _, _ in seqeval.metrics.sequence_labeling.get_entities(
                        [self._entity_tags[tag] for tag in found]
                    )
                )
                labels[row] = min(counts, key=lambda number: (-counts[number], number))
        return labels

    def _encode(self, rows: Any) -> Windows:
        settings = {"task": "tokens", "max_length": self.settings.max_length, "stride": self.settings.stride}
        content = fingerprint(rows.select_columns(["tokens"]))
        arrays = cached(self.tokenizer, content, settings, lambda: self._cut(values_of(rows, "tokens")))
        return Windows.over(arrays, Ragged.of(values_of(rows, "tags"), np.int64))

    def _cut(self, words: list[list[str]]) -> Arrays:
        return cut(words, self.tokenizer, self.settings.max_length, self.settings.stride)


def _numbered(rows: Any, tags: list[list[str]], names: Sequence[str], which: str) -> Any:

    known = {name: number for number, name in enumerate(names)}
    for row, found in enumerate(tags):
        for tag in found:
            if tag not in known:
                raise DataError(
                    f"row {row} of the {which} rows has the tag {tag!r}, but the model has only "
                    f"{', '.join(names[:20])}: correct the row, add training rows with the tag, or name every "
                    "tag in task.tag_names"
                )
    numbers = [[known[tag] for tag in found] for found in tags]
    feature = datasets.List(datasets.ClassLabel(names=list(names)))
    return rows.remove_columns("tags").add_column("tags", numbers, feature=feature)
