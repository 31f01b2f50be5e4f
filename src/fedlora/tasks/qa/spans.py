"""Answer spans in a context: locating them, ranking a model's candidates, and scoring them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedlora.core.errors import DataError, shown
from fedlora.tasks.base import Evaluation
from fedlora.tasks.data.columns import check_rows, check_texts, values_of

if TYPE_CHECKING:
    import datasets

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_COLLAPSED = 0.95
_ENOUGH = 10


class Reference(NamedTuple):
    """A reference answer: its text, and its character range ``[start, end)`` in the context."""

    text: str
    start: int
    end: int


class Window(NamedTuple):
    """A model's scores for the context's tokens in one window.

    Args:
        start: ``(tokens,)`` float32, the score of the answer starting at each token.
        end: ``(tokens,)`` float32, the score of it ending there.
        chars: ``(tokens, 2)`` integers, each token's character range ``[first, last)`` in the context.
        null: the score for the window containing no answer.
    """

    start: NDArray[np.float32]
    end: NDArray[np.float32]
    chars: NDArray[Any]
    null: float


class Answer(NamedTuple):
    """A model's answer.

    Args:
        text: characters of the context as they stand; empty for no answer.
        start: where they start; -1 for no answer.
        score: its share among the best spans, in [0, 1].
        place: first and last token, counted from the first token of the context in the window; None for no answer.
    """

    text: str
    start: int
    score: float
    place: tuple[int, int] | None


# ---- answers of the data


def check_questions(rows: datasets.Dataset, which: str, no_answer: bool) -> None:
    """Refuses rows that are not questions with answers in their contexts.

    Args:
        rows: with the columns ``context``, ``question`` and ``answers``.
        which: what the rows are, for messages.
        no_answer: whether a question may have none.

    Raises:
        DataError: a column is absent or of another form, a text is blank, an answer is missing or not where it is said
            to be.
    """
    check_rows(rows, ["context", "question", "answers"], which)
    check_texts(rows, ["context", "question"], which)
    for name in ("context", "question"):
        blank = [row for row, text in enumerate(values_of(rows, name)) if not text.strip()]
        if blank:
            raise DataError(
                f"column '{name}' is blank in {len(blank)} of {len(rows)} {which} rows (first: row {blank[0]}), but "
                "every row needs a text: fill or remove them"
            )
    without = [row for row, references in enumerate(references_of(rows, which)) if not references]
    if without and not no_answer:
        raise DataError(
            f"{len(without)} of {len(rows)} {which} rows have no answer (first: row {without[0]}), but every question "
            "needs one: remove them, or set task.no_answer = true"
        )


def references_of(rows: datasets.Dataset, which: str) -> list[list[Reference]]:
    """The answers of each row, none where there is no answer.

    Args:
        rows: ``answers`` as ``{"text": [...], "answer_start": [...]}`` or as a list of ``{"text", "answer_start"}``.
        which: what the rows are, for messages.

    Raises:
        DataError: an answer is of another form, or its text is not where it is said to be.
    """
    found = []
    columns = zip(values_of(rows, "context"), values_of(rows, "answers"), strict=True)
    for row, (context, answers) in enumerate(columns):
        references = []
        for text, start in _pairs(answers, row, which):
            place = locate(context, text, start)
            if place is None:
                raise DataError(
                    f"the answer {shown(text)} of {which} row {row} is not found at character {start} of its context, "
                    f"where {shown(context[max(0, start) :])} stands: correct answer_start, which counts characters "
                    "from 0"
                )
            references.append(Reference(text, *place))
        found.append(references)
    return found


def locate(context: str, text: str, start: int) -> tuple[int, int] | None:
    """The characters ``[first, last)`` of ``context`` that ``text`` is, or None where it does not stand there.

    Blanks may differ, in number and in kind, as they do in texts that were cut into words; nothing else may.

    >>> locate("It costs 5 % .", "5%", 9)
    (9, 12)
    """
    wanted = "".join(text.split())
    if not wanted or start < 0:
        return None
    first = start
    while first < len(context) and context[first].isspace():
        first += 1
    position = first
    for letter in wanted:
        while position < len(context) and context[position].isspace():
            position += 1
        if position >= len(context) or context[position] != letter:
            return None
        position += 1
    return first, position


def _pairs(answers: Any, row: int, which: str) -> list[tuple[str, int]]:
    if isinstance(answers, list) and all(isinstance(one, dict) for one in answers):
        answers = {name: [one.get(name) for one in answers] for name in ("text", "answer_start")}
    texts, starts = (answers.get("text"), answers.get("answer_start")) if isinstance(answers, dict) else (None, None)
    if (
        not isinstance(texts, list)
        or not isinstance(starts, list)
        or len(texts) != len(starts)
        or not all(isinstance(text, str) for text in texts)
        or not all(isinstance(start, int) for start in starts)
    ):
        raise DataError(
            f"column 'answers' of {which} row {row} holds {shown(answers)}, but answers are texts and the characters "
            'at which they start, {"text": [...], "answer_start": [...]}: write them so, as json or parquet'
        )
    return list(zip(texts, starts, strict=True))


# ---- answers of a model


def best_spans(
    start: NDArray[Any], end: NDArray[Any], n_best: int, max_answer_length: int
) -> list[tuple[float, int, int]]:
    """The spans ``i <= j < i + max_answer_length`` with the largest ``start[i] + end[j]``, all of them looked at.

    Args:
        start: ``(tokens,)``; minus infinity where no answer may start.
        end: ``(tokens,)``; minus infinity where none may end.
        n_best: spans to find.
        max_answer_length: tokens of the longest one.

    Returns:
        Score, ``i`` and ``j`` of each, the best first, of equal ones the earlier and then the shorter first; fewer
        where there are fewer.
    """
    width = min(max_answer_length, len(start))
    if not width:
        return []
    padded = np.concatenate([end.astype(np.float64), np.full(width - 1, -np.inf)])
    ends = np.lib.stride_tricks.sliding_window_view(padded, width)
    scores = (start.astype(np.float64)[:, None] + ends).ravel()
    chosen = np.flatnonzero(np.isfinite(scores))
    if n_best < len(chosen):
        # sorting the few that can be among them, ties included, is faster than sorting all
        chosen = chosen[scores[chosen] >= np.partition(scores[chosen], -n_best)[-n_best]]
    chosen = chosen[np.argsort(-scores[chosen], kind="stable")][:n_best]
    return [(float(scores[one]), int(one // width), int(one // width + one % width)) for one in chosen]


def decode(
    windows: Sequence[Window], context: str, n_best: int, max_answer_length: int, null_threshold: float | None
) -> Answer:
    """The answer that a model prefers over all windows of a context.

    A span that several windows see counts once, with its best score. There is no answer where
    ``min over windows of (start[0] + end[0]) - max over spans of (start[i] + end[j]) > null_threshold``: every window
    has to agree, since most windows of a long context do not contain the answer.

    Args:
        windows: what the model says of each.
        context: the characters that an answer is made of.
        n_best: spans among which the score is a share, ``softmax`` over them and no answer.
        max_answer_length: tokens of the longest answer.
        null_threshold: None where every question has an answer.

    Returns:
        The answer; none where no token of the context can be one.

    References:
        Rajpurkar et al., SQuAD (arXiv 1606.05250) and SQuAD 2.0 (arXiv 1806.03822); Devlin et al., BERT (arXiv
        1810.04805), section 4.3.
    """
    spans: dict[tuple[int, int], tuple[float, tuple[int, int]]] = {}
    for window in windows:
        # a token that is no character of the context starts and ends nothing
        hidden = np.where(window.chars[:, 0] < window.chars[:, 1], 0.0, -np.inf)
        for score, i, j in best_spans(window.start + hidden, window.end + hidden, n_best, max_answer_length):
            span = _trim(context, int(window.chars[i, 0]), int(window.chars[j, 1]))
            if span[0] < span[1] and (span not in spans or score > spans[span][0]):
                spans[span] = score, (i, j)
    ranked = sorted(spans.items(), key=lambda item: (-item[1][0], item[0]))[:n_best]
    none = [] if null_threshold is None else [min((window.null for window in windows), default=0.0)]
    if not ranked:
        return Answer("", -1, float(len(none)), None)
    (start, end), (best, place) = ranked[0]
    scores = np.array([score for _, (score, _) in ranked] + none)
    shares = np.exp(scores - scores.max())
    shares /= shares.sum()
    if null_threshold is not None and none[0] - best > null_threshold:
        return Answer("", -1, float(shares[-1]), None)
    return Answer(context[start:end], start, float(shares[0]), place)


def _trim(context: str, start: int, end: int) -> tuple[int, int]:
    part = context[start:end]
    return start + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip())


# ---- metrics


def normalise(text: str) -> str:
    """``text`` in lower case, without punctuation, articles and needless blanks, as SQuAD v1.1 compares answers.

    >>> normalise("The  Eiffel-Tower, an icon!")
    'eiffeltower icon'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer, normalised, is one of the references, else 0; no references mean no answer."""
    return float(normalise(answer) in {normalise(one) for one in references or [""]})


def f1(answer: str, references: Sequence[str]) -> float:
    """``2 c / (a + b)``, the largest over the references: ``c`` words in common, ``a`` and ``b`` words of each.

    Words are those of ``normalise``. Where one of the two has none, 1 if both have none, else 0.
    """
    words = Counter(normalise(answer).split())
    return max(_overlap(words, Counter(normalise(one).split())) for one in references or [""])


def _overlap(words: Counter[str], wanted: Counter[str]) -> float:
    total = words.total() + wanted.total()
    return 2 * (words & wanted).total() / total if total else 1.0


def score(answers: Sequence[Answer], references: Sequence[Sequence[str]], loss: float, no_answer: bool) -> Evaluation:
    """Metrics of answers, each a mean over questions in [0, 1], and warnings.

    ``f1`` and ``exact_match``; with ``no_answer`` also ``has_answer_f1`` and ``has_answer_exact_match`` over the
    questions that have an answer, and ``no_answer_accuracy`` over those that have none, where there are such.

    Args:
        answers: the model's.
        references: those of the data, any number for each question.
        loss: the mean loss.
        no_answer: whether a question may have none.
    """
    pairs = [(answer.text, texts) for answer, texts in zip(answers, references, strict=True)]
    overlaps = np.array([f1(*pair) for pair in pairs])
    exact = np.array([exact_match(*pair) for pair in pairs])
    metrics = {"f1": float(overlaps.mean()), "exact_match": float(exact.mean())}
    has = np.array([bool(texts) for texts in references])
    if no_answer and has.any():
        metrics |= {
            "has_answer_f1": float(overlaps[has].mean()),
            "has_answer_exact_match": float(exact[has].mean()),
        }
    if no_answer and not has.all():
        metrics["no_answer_accuracy"] = float(
            np.mean([one.place is None for one, given in zip(answers, has, strict=True) if not given])
        )
    return Evaluation(metrics | {"loss": loss}, _collapsed(answers, float(exact.mean())))


def _collapsed(answers: Sequence[Answer], exact: float) -> tuple[str, ...]:
    (place, count), *_ = Counter(answer.place for answer in answers).most_common(1)
    # where nearly all answers really are alike, nearly all are right
    if len(answers) < _ENOUGH or count < _COLLAPSED * len(answers) or exact >= _COLLAPSED - 0.05:
        return ()
    share = f"{count} of {len(answers)} questions"
    if place is None:
        return (f"the model predicts no answer to {share}: it has learnt nothing useful",)
    same = f"token {place[0] + 1} to {place[1] + 1} of the context"
    return (f"the model predicts the same place, {same}, as the answer to {share}: it has learnt nothing useful",)
