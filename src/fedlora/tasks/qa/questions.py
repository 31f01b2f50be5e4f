"""Extractive question answering: the answer is a span of a context given with the question."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedlora.core.component import MODEL_CONFIG, Count, Field, Whole, dataclass
from fedlora.core.errors import ConfigError, DataError, shown
from fedlora.core.later import transformers
from fedlora.tasks.base import Batch, Compute, Data, Evaluation, Model, Positions, Prepared, Split
from fedlora.tasks.data.columns import check_rows, check_texts, fingerprint, values_of
from fedlora.tasks.data.tokenized import PreparedTokenized, TokenizedTask
from fedlora.tasks.models.encoded import Ragged, by_length, cached, chunks
from fedlora.tasks.models.loading import config_of, load_pretrained
from fedlora.tasks.models.shares import Shares, shares_of
from fedlora.tasks.qa import spans
from fedlora.tasks.qa.passages import Passages, check_stride, encode

POSITIONS = ("start_positions", "end_positions")


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class QuestionAnswering(TokenizedTask):
    """Predicts the answer to a question as a span of a context, as in SQuAD.

    Columns: ``context``, ``question``, and ``answers``: ``{"text": [...], "answer_start": [...]}``, or a list of
    ``{"text", "answer_start"}``. Training uses a question's first answer, the metrics all of them.

    A question and its context are one sequence of up to ``max_length`` tokens. A longer context is read in windows that
    share ``stride`` tokens. A question of more than half of ``max_length`` is cut to its first ``max_length // 2``
    tokens. In a window without the whole answer, the target is its first token, which is CLS if the model has one. In
    decoders the first token attends only to itself: its score is a constant to compare spans with, which is all that a
    threshold needs.

    Args:
        max_length: number of tokens in a window, including the question.
        stride: number of context tokens that adjacent windows share; a longer answer may not fit in any window.
        n_best: number of candidate spans.
        max_answer_length: maximum number of tokens in a predicted answer.
        no_answer: whether questions may be unanswerable, as in SQuAD 2.0.
        null_threshold: no answer is predicted if its score exceeds that of the best span by more than this.
        eval_batch_size: windows per evaluation batch; they are sorted by length.

    Raises:
        ConfigError: ``null_threshold`` is given without ``no_answer``.
    """

    kind: Literal["question_answering"] = "question_answering"
    max_length: Annotated[int, Field(ge=8)] = 384
    stride: Whole = 128
    n_best: Count = 20
    max_answer_length: Count = 30
    no_answer: bool = False
    null_threshold: float = 0.0
    eval_batch_size: Count = 64

    def __post_init__(self) -> None:
        if self.null_threshold and not self.no_answer:
            raise ConfigError(
                f"task.null_threshold = {self.null_threshold:g} decides whether there is an answer, but every "
                "question has one by task.no_answer = false: set task.no_answer = true, or leave null_threshold "
                "out"
            )

    def content(self, rows: Any) -> str:
        return "context"

    def known(self, rows: Any, names: list[str], which: str) -> Any:
        spans.check_questions(rows, which, self.no_answer)
        return rows

    def over(self, model: Model, tokenizer: Any, names: list[str], data: Data) -> Prepared:
        return PreparedQuestions(self, model, tokenizer, names, data)


class PreparedQuestions(PreparedTokenized):
    """Encoded questions, their answers, and the model they are for.

    Args:
        names: none; a question has no class.
        data: a data set per split, with the columns ``context``, ``question``, ``answers``, and any others.

    Raises:
        ConfigError: the tokenizer does not say where tokens lie, or ``stride`` leaves no step between windows.
    """

    settings: QuestionAnswering
    main_metric = "f1"
    higher_is_better = True
    auto_class = "AutoModelForQuestionAnswering"

    def __init__(self, settings: QuestionAnswering, model: Model, tokenizer: Any, names: list[str], data: Data) -> None:
        check_stride(tokenizer, settings.max_length, settings.stride)
        super().__init__(settings, model, tokenizer, names, data)
        # the class that `peft` has for the task drops the types of tokens, its plain one passes them on
        self.peft_task = None if "token_type_ids" in tokenizer.model_input_names else "QUESTION_ANS"
        self._passages = {name: _passages(part, tokenizer, settings) for name, part in data.items()}
        self._references = {name: spans.references_of(part, name) for name, part in data.items()}
        self._targets = {name: passages.targets(self._references[name]) for name, passages in self._passages.items()}

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"context", "question", "answers"})

    def texts(self, split: Split) -> list[str]:
        columns = (values_of(self._data[split], name) for name in ("question", "context"))
        return [" ".join(row) for row in zip(*columns, strict=True)]

    @property
    def load_arguments(self) -> str:
        renamed = _renamed_backbone(self._model)
        return f", key_mapping={renamed!r}" if renamed else ""

    @property
    def sequences(self) -> list[Ragged]:
        return [passages.tokens for passages in self._passages.values()]

    def load_model(self, seed: int, compute: Compute, device: torch.device) -> tuple[nn.Module, frozenset[str]]:
        renamed = _renamed_backbone(self._model)
        # the two outputs, for start and end, are called labels in a configuration
        settings = {"num_labels": 2, "key_mapping": renamed} if renamed else {"num_labels": 2}
        model, head = load_pretrained(
            self.auto_class, self._model, seed, device, settings, longest=self.longest(), compute=compute
        )
        if renamed:
            # else `transformers` would save the model under the old names, and not find them when it loads it
            used: Any = getattr(model, "_weight_conversions", None) or []
            kept: Any = [one for one in used if one.source_patterns != list(renamed)]
            model._weight_conversions = kept
        return model, head

    def host_batch(self, rows: Positions, split: Split) -> Batch:
        """See ``PreparedTokenized.host_batch``: all windows of the examples, one after the other."""
        chosen = self._passages[split].rows(rows)
        batch = self._inputs(self._passages[split], chosen)
        return batch | {
            name: torch.from_numpy(self._targets[split][chosen, side]) for side, name in enumerate(POSITIONS)
        }

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See ``Prepared.loss``: the mean of ``span_losses`` over windows.

        On a CPU the windows go through the model in groups of like length.
        """
        losses = []
        for part in by_length(batch):
            start, end = _outputs(model, part)
            losses.append(span_losses(start, end, part.get("attention_mask"), *(part[name] for name in POSITIONS)))
        return torch.cat(losses).mean()

    def shares(self, rows: Positions, device: torch.device) -> Shares:
        passages = self._passages["train"]
        chosen = passages.rows(rows)
        return shares_of(passages.counts(rows), np.ones(len(chosen), np.int64), passages.tokens.lengths(chosen), device)

    def evaluate(self, model: nn.Module, rows: Positions, split: Split, device: torch.device) -> Evaluation:
        """See ``Prepared.evaluate``: the metrics of ``spans.score``; the loss is a mean over windows."""
        passages = self._passages[split]
        chosen = passages.rows(rows)
        said, loss = self._read(model, passages, chosen, device, self._targets[split])
        answers = self._decode(said, passages.counts(rows), values_of(self._data[split].select(rows), "context"))
        references = [[one.text for one in self._references[split][row]] for row in rows]
        return spans.score(answers, references, loss, self.settings.no_answer)

    def predict(self, model: nn.Module, inputs: list[str], device: torch.device) -> list[dict[str, Any]]:
        """See ``Prepared.predict``: ``{"answer", "score", "start"}`` for each line ``{"context", "question"}``.

        ``answer`` is characters of the context and ``start`` where they start; no answer is empty and starts at -1.
        ``score`` is its share among the best spans.
        """
        asked = [_read_question(line, number) for number, line in enumerate(inputs, start=1)]
        if not asked:
            return []
        contexts, questions = map(list, zip(*asked, strict=True))
        sizes = self.settings.max_length, self.settings.stride
        passages = Passages.of(encode(questions, contexts, self.tokenizer, *sizes))
        said, _ = self._read(model, passages, np.arange(len(passages.contexts)), device, None)
        answers = self._decode(said, np.diff(passages.examples), contexts)
        return [{"answer": one.text, "score": one.score, "start": one.start} for one in answers]

    def inputs_of(self, rows: Any, which: str) -> list[str]:
        """See ``Prepared.inputs_of``: questions with their contexts."""
        names = ["context", "question"]
        check_rows(rows, names, which)
        check_texts(rows, names, which)
        asked = zip(*(values_of(rows, name) for name in names), strict=True)
        return [json.dumps(dict(zip(names, one, strict=True)), ensure_ascii=False) for one in asked]

    def _inputs(self, passages: Passages, chosen: Positions) -> Batch:
        return self.inputs(passages.tokens, chosen, self.settings.max_length, passages.types)

    def _read(
        self, model: nn.Module, passages: Passages, chosen: Positions, device: torch.device, targets: Positions | None
    ) -> tuple[list[spans.Window], float]:
        """The model's scores for each of the windows ``chosen``, and the mean loss if there are targets."""
        order = np.argsort(passages.tokens.lengths(chosen), kind="stable")
        said: dict[int, spans.Window] = {}
        losses = [torch.zeros(0)]
        for part in chunks(order, self.settings.eval_batch_size):
            batch = {name: value.to(device) for name, value in self._inputs(passages, chosen[part]).items()}
            start, end = _outputs(model, batch)
            if targets is not None:
                wanted = torch.from_numpy(targets[chosen[part]]).to(device)
                losses.append(span_losses(start, end, batch["attention_mask"], wanted[:, 0], wanted[:, 1]).cpu())
            starts, ends = start.cpu().numpy(), end.cpu().numpy()
            for row, place in enumerate(part):
                span = slice(*passages.contexts[chosen[place]])
                null = float(starts[row, 0] + ends[row, 0])
                places = passages.places(int(chosen[place]))
                # copies, or whole batches would stay in memory
                said[int(place)] = spans.Window(starts[row, span].copy(), ends[row, span].copy(), places, null)
        loss = float(torch.cat(losses).mean()) if targets is not None else 0.0
        return [said[place] for place in range(len(chosen))], loss

    def _decode(
        self, said: Sequence[spans.Window], counts: NDArray[np.int64], contexts: Sequence[str]
    ) -> list[spans.Answer]:
        """The answer to each question; ``counts`` are its windows."""
        settings = self.settings
        threshold = settings.null_threshold if settings.no_answer else None
        last = np.cumsum(counts)
        return [
            spans.decode(said[end - count : end], context, settings.n_best, settings.max_answer_length, threshold)
            for count, end, context in zip(counts, last, contexts, strict=True)
        ]


def span_losses(start: Tensor, end: Tensor, mask: Tensor | None, first: Tensor, last: Tensor) -> Tensor:
    """The mean of the cross entropies of start and end, for each window.

    ``(-log softmax(start)[first] - log softmax(end)[last]) / 2`` (Devlin et al., BERT, arXiv 1810.04805, section 4.2),
    the softmax being over the window's tokens, so that padding plays no part.

    Args:
        start: ``(windows, width)`` outputs.
        end: ``(windows, width)`` outputs.
        mask: ``(windows, width)``; zero for padding. None if there is none.
        first: ``(windows,)`` int64, the token at which the answer starts.
        last: ``(windows,)`` int64, the token at which it ends.

    Returns:
        ``(windows,)`` float32.
    """
    at_start, at_end = (
        functional.cross_entropy(
            logits.float() if mask is None else logits.float().masked_fill(mask == 0, -torch.inf),
            wanted,
            reduction="none",
        )
        for logits, wanted in ((start, first), (end, last))
    )
    return (at_start + at_end) / 2


def _outputs(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    found = model(**{name: value for name, value in batch.items() if name not in POSITIONS})
    return found.start_logits.float(), found.end_logits.float()


def _renamed_backbone(model: Model) -> dict[str, str]:
    """A renaming that ``transformers`` lacks (its issue 30381): it lets Llama, Qwen and others find their backbone.

    Their question answering models name it differently from their checkpoints, so it would be initialised randomly.

    Returns:
        A pattern for the checkpoint's names and its replacement; empty for most families.
    """
    settings = config_of(model)
    tables: tuple[Any, ...] = (
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    )
    saved, used = (getattr(table.get(type(settings), None), "base_model_prefix", None) for table in tables)
    return {} if None in (saved, used) or saved == used else {rf"^{saved}\.": f"{used}."}


def _passages(rows: Any, tokenizer: Any, settings: QuestionAnswering) -> Passages:
    content = fingerprint(rows, ["context", "question"])
    texts = values_of(rows, "question"), values_of(rows, "context")
    sizes = {"max_length": settings.max_length, "stride": settings.stride}
    key = {"task": "questions", **sizes}
    return Passages.of(cached(tokenizer, content, key, lambda: encode(*texts, tokenizer, *sizes.values())))


def _read_question(line: str, number: int) -> tuple[str, str]:
    try:
        found = json.loads(line)
        texts = tuple(found[name] for name in ("context", "question")) if isinstance(found, dict) else ()
        # half of a surrogate pair is no text
        if texts and all(isinstance(text, str) and text.encode() and text.strip() for text in texts):
            return texts
    except (ValueError, KeyError, RecursionError):
        pass
    raise DataError(
        f'input {number} is {shown(line)}, but a question is asked as {{"context": "...", "question": "..."}} with '
        "neither of them blank: write each as a JSON object on a line of its own"
    )
