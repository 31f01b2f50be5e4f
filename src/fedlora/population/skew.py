"""The classes used for class skew: the task's own classes, a column, or clusters of similar content."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedlora.core.component import MODEL_CONFIG, Field, dataclass
from fedlora.core.errors import DataError, shown
from fedlora.core.later import sklearn
from fedlora.core.slots import Slot
from fedlora.population.partitions import Rows

if TYPE_CHECKING:
    import torch

    from fedlora.tasks.base import Prepared

NUM_STARTS = 5
"""Number of restarts of k-means, of which the best is kept."""

NUM_TOPICS = 50
"""Number of dimensions to which TF-IDF is reduced before k-means."""


class Classes(NamedTuple):
    """The class of every training row, (rows,) int64 in ``[0, len(names))``, and the classes' names.

    Without classes, the numbers are zeros and there are no names.
    """

    numbers: Rows
    names: list[str]


class Skew(ABC):
    """Defines a row's class for assigning, plotting and summarising rows by class."""

    @abstractmethod
    def classes(self, task: Prepared, seed: int, device: torch.device) -> Classes:
        """Assigns a class to every training row.

        Args:
            task: the data.
            seed: the only source of randomness.
            device: the device on which a model runs, if one is used.

        Raises:
            DataError: the data have no such classes.
        """


def classes_by(skew: Skew, task: Prepared, seed: int, device: torch.device) -> Classes:
    """The classes that a skew assigns, which may be of a user's own making; see ``Skew.classes``.

    Raises:
        DataError: the data have no such classes, or it returned something else.
    """
    found = skew.classes(task, seed, device)
    rows = task.num_examples("train")
    if isinstance(found, Classes):
        numbers, most = np.asarray(found.numbers), max(1, len(found.names))
        if numbers.shape == (rows,) and numbers.dtype.kind in "iu" and ((numbers >= 0) & (numbers < most)).all():
            return found
    raise DataError(
        f"classes of the skew {type(skew).__name__} returned {shown(found)}, but Classes(numbers, names) was expected, "
        f"with a whole number below the number of names for each of {rows} training rows: correct it"
    )


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Label(Skew):
    """The task's own classes."""

    kind: Literal["label"] = "label"

    def classes(self, task: Prepared, seed: int, device: torch.device) -> Classes:
        numbers, names = np.asarray(task.labels), task.label_names
        if not numbers.any():  # tasks without classes give zeros; their names may be of something else, such as tags
            return Classes(np.zeros(len(numbers), dtype=np.int64), [])
        missing = [str(number) for number in range(len(names), int(numbers.max()) + 1)]
        return Classes(numbers, [*names, *missing])


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Column(Skew):
    """The distinct values of a column, sorted: a title, a language, a year.

    Args:
        name: the column; values of mixed types, and lists, are compared and sorted by their Python representation.
    """

    kind: Literal["column"] = "column"
    name: str

    def classes(self, task: Prepared, seed: int, device: torch.device) -> Classes:
        values: list[Any] = task.column(self.name, "train").tolist()
        kinds = set(map(type, values))
        plain = len(kinds) == 1 and kinds <= {str, int, bool, float} and all(value == value for value in values)
        keys = values if plain else [repr(value) for value in values]
        distinct = sorted(set(keys))
        place = {key: number for number, key in enumerate(distinct)}
        return Classes(np.array([place[key] for key in keys], dtype=np.int64), [str(key) for key in distinct])


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Clusters(Skew):
    """Clusters of similar content by k-means, for tasks without classes, as in FedNLP for questions and tags.

    - ``tfidf``: TF-IDF of words, reduced to 50 dimensions by a truncated SVD. Needs no model, but a language that
      separates words by spaces.
    - ``embeddings``: the pre-trained model's mean-pooled last hidden state. Needs a pass over all rows; rounding on
      other hardware may change the clusters.

    Rows are normalised to unit length, so that k-means compares directions.

    Args:
        num: number of clusters, k.
        features: the features to cluster.

    References:
        Lin et al., FedNLP (arXiv 2104.08815).
    """

    kind: Literal["clusters"] = "clusters"
    num: Annotated[int, Field(ge=2)] = 10
    features: Literal["tfidf", "embeddings"] = "tfidf"

    def classes(self, task: Prepared, seed: int, device: torch.device) -> Classes:
        if self.features == "embeddings":
            points = task.embeddings("train", device)
        else:
            points = _topics(task.texts("train"), seed % 2**32)
        return Classes(_k_means(points, self.num, seed % 2**32), [f"cluster {number}" for number in range(self.num)])


if TYPE_CHECKING:
    AnySkew = Skew
else:
    AnySkew = Annotated[Label | Column | Clusters, Slot("skew", Skew)]
"""Any skew, discriminated by ``kind``."""

SKEWS: dict[str, type[Skew]] = {"label": Label, "column": Column, "clusters": Clusters}
"""The skews by ``kind``."""


def _topics(texts: list[str], seed: int) -> NDArray[Any]:

    try:
        counts = sklearn.feature_extraction.text.TfidfVectorizer(sublinear_tf=True).fit_transform(texts)
    except ValueError as error:
        raise DataError(
            "the texts have no words of two letters or more to cluster them by: set clients.skew.features to embeddings"
        ) from error
    if counts.shape[1] <= NUM_TOPICS:
        return np.asarray(counts.toarray())
    # equal texts have no variance to explain
    with np.errstate(invalid="ignore"):
        points: NDArray[Any] = sklearn.decomposition.TruncatedSVD(
            min(NUM_TOPICS, counts.shape[0]), random_state=seed
        ).fit_transform(counts)
    return points


def _k_means(points: NDArray[Any], num: int, seed: int) -> Rows:
    """The cluster of each of the ``points``, (rows, size), as (rows,) int64; the first row is in cluster 0."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    found = np.zeros(0, dtype=np.int64)
    if len(points) >= num:
        # several threads would sum in a nondeterministic order
        with threadpool_limits(1), warnings.catch_warnings():
            warnings.simplefilter("ignore", sklearn.exceptions.ConvergenceWarning)
            found = sklearn.cluster.KMeans(num, n_init=NUM_STARTS, random_state=seed).fit_predict(
                sklearn.preprocessing.normalize(points)
            )
    _, first, found = np.unique(found, return_index=True, return_inverse=True)
    if len(first) < num:
        raise DataError(
            f"{num} clusters were asked for, but only {len(first) or len(points)} of the {len(points)} rows differ: "
            "set clients.skew.num to less"
        )
    # numbered by first row, so that k-means' own order does not matter
    ranks: Rows = np.argsort(np.argsort(first))[found].astype(np.int64)
    return ranks
