"""Data sources: docstrings of the standard library and questions on them, files, the Hugging Face Hub, or objects."""

from __future__ import annotations

import ast
import inspect
import os
import sysconfig
import warnings
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from fedlora.core.component import MODEL_CONFIG, Count, Field, Fraction, Positive, by_kind, dataclass
from fedlora.core.errors import ConfigError, DataError, first_line
from fedlora.core.later import datasets
from fedlora.core.slots import Slot
from fedlora.core.state import named_seed
from fedlora.tasks.data.columns import Raw, Source, capped, rename, values_of
from fedlora.tasks.data.files import quiet, read_rows, saved_splits
from fedlora.tasks.data.folders import left_out, picture_folders, read_folder
from fedlora.tasks.data.opening import Delimiter, Encoding, Format, Reading
from fedlora.tasks.data.rows import Rows

MIN_CHARACTERS = 20
"""Shorter docstrings say too little to be classified."""

SKIPPED_FOLDERS = frozenset({"__pycache__", "dist-packages", "idle_test", "lib2to3", "site-packages", "test", "tests"})
"""Folders of the standard library that are tests, grammars or not part of it."""

Paths = str | Annotated[tuple[str, ...], Field(min_length=1)]
"""A file or a pattern, or several."""


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Docstrings(Source):
    """Docstrings of the running Python's standard library, to be classified by the package they come from.

    Needs no download. Files are parsed, never imported. A text that occurs twice is kept once, and its side is decided
    by a hash of the text, so no test text is in the training rows. The further column ``file`` (path within the
    library) is a natural client. Rows differ between Python versions; compare ``fingerprint``.

    Args:
        num_classes: number of classes: the packages or modules with the most docstrings.
        test_fraction: share of test rows.
        seed: seed of the hash that splits.
    """

    kind: Literal["docstrings"] = "docstrings"
    num_classes: Annotated[int, Field(ge=2)] = 20
    test_fraction: Fraction = 0.2
    seed: int = 0

    @property
    def adds(self) -> frozenset[str]:
        return frozenset({"file"})

    def load(self) -> Raw:

        root = Path(sysconfig.get_path("stdlib"))
        rows: dict[str, tuple[str, str]] = {}
        for path in _library_files(root):
            file = path.relative_to(root).as_posix()
            name = file.split("/")[0].removesuffix(".py")
            for text in _docstrings(path.read_bytes()):
                rows.setdefault(text, (name, file))
        counts = Counter(name for name, _ in rows.values())
        names = sorted(sorted(counts, key=lambda name: (-counts[name], name))[: self.num_classes])
        if len(names) < self.num_classes:
            raise DataError(
                f"the standard library has docstrings in {len(names)} packages, but num_classes = {self.num_classes} "
                "were asked for: use fewer, or a Python that comes with its library's source files"
            )
        index = {name: position for position, name in enumerate(names)}
        kept = [(text, index[name], file) for text, (name, file) in rows.items() if name in index]
        features = datasets.Features(
            text=datasets.Value("string"), label=datasets.ClassLabel(names=names), file=datasets.Value("string")
        )
        columns = zip(("text", "label", "file"), zip(*kept, strict=True), strict=True)
        dataset = datasets.Dataset.from_dict({key: list(value) for key, value in columns}, features=features)
        return Raw(dataset, None, self.test_fraction, self.seed)


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class DocstringQuestions(Source):
    """Questions on the running Python's standard library: which package has a docstring; the answer is its name.

    Columns ``prompt``, ``answer`` and ``file``, for instruction tuning; the rows are those of ``docstrings``, shortened
    to the first words of the first paragraph.

    Args:
        num_packages: number of different answers: the packages or modules with the most docstrings.
        max_words: the most words of a docstring in a question.
        test_fraction: share of test rows.
        seed: seed of the hash that splits.
    """

    kind: Literal["docstring_questions"] = "docstring_questions"
    num_packages: Annotated[int, Field(ge=2)] = 20
    max_words: Count = 20
    test_fraction: Fraction = 0.2
    seed: int = 0

    def load(self) -> Raw:
        rows = Docstrings(num_classes=self.num_packages).load().train
        found: dict[str, tuple[str, str]] = {}
        for text, label, file in zip(*(values_of(rows, name) for name in ("text", "label", "file")), strict=True):
            words = text.partition("\n\n")[0].split()[: self.max_words]
            found.setdefault(f"Which package says: {' '.join(words)}", (rows.features["label"].names[label], file))
        answers, files = zip(*found.values(), strict=True)
        columns = {"prompt": list(found), "answer": list(answers), "file": list(files)}
        return Raw(datasets.Dataset.from_dict(columns), None, self.test_fraction, self.seed)


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Files(Source):
    """Local csv, tsv, json, jsonl, ndjson, parquet, arrow, txt or conll files, each also with ``.gz``.

    Instead of a path there may be several in a list, patterns such as ``part-*.jsonl``, whose files are read in sorted
    order, or a folder written by ``save_to_disk``; a ``DatasetDict`` in such a folder gives its ``train`` and ``test``.
    The fields of csv and tsv are text, of which the task turns into numbers what it needs as numbers; only an empty
    field is a missing value, so the text "None" stays a text. A txt file has a text on each line.

    Args:
        train: path of the training rows.
        test: path of the test rows; if None, ``test_fraction`` of the training rows, chosen by a hash of their
            content, so that rows with equal content are on the same side.
        test_fraction: used only if ``test`` is None.
        seed: seed of that hash.
        columns: name that the task uses -> name in the data, for columns with other names.
        delimiter: the character between two fields of a csv or tsv; if None, a comma, in a tsv a tab.
        encoding: of text files; if None, UTF-8. A byte order mark has precedence.
        max_unpacked_gb: the most gigabytes that a ``.gz``, parquet or arrow file may unpack to; if None, 2. The latter
            two may unpack to ten times their size, if that is more.
        format: of files whose ending names none of these formats, or which end in ``.txt``, such as ``csv``.

    Raises:
        ConfigError: there is no such encoding, or ``delimiter`` is not one character.
    """

    kind: Literal["files"] = "files"
    train: Paths
    test: Paths | None = None
    test_fraction: Fraction = 0.2
    seed: int = 0
    columns: dict[str, str] = field(default_factory=dict)
    delimiter: Delimiter | None = None
    encoding: Encoding | None = None
    max_unpacked_gb: Positive | None = None
    format: Format | None = None

    def load(self) -> Raw:
        reading, test_path = reading_of(self), self.test
        if test_path is None and isinstance(self.train, str) and "test" in saved_splits(self.train):
            test_path = self.train
        train = rename(read_rows(self.train, reading), self.columns, "training")
        test = None if test_path is None else rename(read_rows(test_path, reading, "test"), self.columns, "test")
        return Raw(train, test, self.test_fraction, self.seed)


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Hub(Source):
    """A data set of the Hugging Face Hub, or a local folder laid out like one.

    Args:
        path: ``owner/name`` on the Hub, or a folder.
        name: configuration, for data sets that have several.
        revision: branch, tag or commit; give a commit to be sure of the same rows.
        train_split: name of the training split.
        test_split: name of the test split; if empty, ``test_fraction`` of the training rows is held out, as in
            ``Files``.
        test_fraction: used only if ``test_split`` is empty.
        seed: seed of the hash that then splits.
        columns: name that the task uses -> name in the data, for columns with other names.
    """

    kind: Literal["hub"] = "hub"
    path: str
    name: str | None = None
    revision: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    test_fraction: Fraction = 0.2
    seed: int = 0
    columns: dict[str, str] = field(default_factory=dict)

    def load(self) -> Raw:
        train = rename(self._fetch(self.train_split), self.columns, "training")
        test = None if not self.test_split else rename(self._fetch(self.test_split), self.columns, "test")
        return Raw(train, test, self.test_fraction, self.seed)

    def _fetch(self, split: str) -> datasets.Dataset:

        try:
            with quiet():
                path = str(Path(self.path).expanduser())
                return datasets.load_dataset(path, self.name, revision=self.revision, split=split)
        except ConnectionError as error:
            raise DataError(
                f"'{self.path}' is neither a folder nor in the local cache, and the Hub cannot be reached: connect "
                'once to fetch it, correct the path, or use kind = "files"'
            ) from error
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(
                f"split '{split}' of '{self.path}' cannot be loaded ({first_line(error)}): correct data.path, name, "
                "revision or the split's name"
            ) from error


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class ImageFolder(Source):
    """Images in folders named after their classes: ``path/CLASS/...``, or ``path/train/CLASS/...``.

    The additional column ``file`` is an image's path within its folder.

    Args:
        path: the folder of classes; or a folder with ``train``, and optionally ``test``, as folders of classes.
        test: the folder of classes to test on; if None, ``path/test`` if it is next to ``path/train``, else
            ``test_fraction`` of the images, chosen by a hash of their content.
        test_fraction: used only if there is no test folder.
        seed: seed of that hash.
    """

    kind: Literal["image_folder"] = "image_folder"
    path: str
    test: str | None = None
    test_fraction: Fraction = 0.2
    seed: int = 0

    @property
    def adds(self) -> frozenset[str]:
        return frozenset({"file"})

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(left_out(Path(self.path).expanduser()))

    def load(self) -> Raw:
        train_folder, test_folder = picture_folders(Path(self.path).expanduser())
        if self.test is not None:
            test_folder = Path(self.test).expanduser()
        train = read_folder(train_folder)
        test = None if test_folder is None else read_folder(test_folder, train.features["label"].names)
        return Raw(train, test, self.test_fraction, self.seed)


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Sites(Source):
    """Training rows that stay on their owners' machines; the server has only test rows, which define the classes.

    Args:
        test: path of the test rows.
        columns: name that the task uses -> name in the file, for columns with other names.
        delimiter: as for ``Files``.
        encoding: as for ``Files``.
        max_unpacked_gb: as for ``Files``.
        format: as for ``Files``.

    Raises:
        ConfigError: there is no such encoding, or ``delimiter`` is not one character.
    """

    kind: Literal["sites"] = "sites"
    test: Paths
    columns: dict[str, str] = field(default_factory=dict)
    delimiter: Delimiter | None = None
    encoding: Encoding | None = None
    max_unpacked_gb: Positive | None = None
    format: Format | None = None

    def __post_init__(self) -> None:
        if self.max_train is not None:
            raise ConfigError(
                f"data.max_train = {self.max_train} has no effect on rows that stay with sites: leave it out, and "
                "shorten the files there"
            )

    def load(self) -> Raw:
        rows = rename(read_rows(self.test, reading_of(self), "test"), self.columns, "test")
        return Raw(rows, rows, 0.5, 0)


@dataclass(frozen=True, kw_only=True, config=MODEL_CONFIG)
class Validation(Source):
    """Another source with part of its training rows as the test rows, for choosing settings.

    The test rows of the other source are in neither split. Classes are those of all its training rows, as in the final
    run.

    Args:
        source: the other source.
        share: the share of the training rows, or of the training clients.
        seed: seed of the draw.
        hold_out: ``rows`` by a hash of their content, as in ``Files``; or whole ``clients``, in addition to those that
            ``clients.test_clients`` holds out.
    """

    kind: Literal["validation"] = "validation"
    source: Annotated[Docstrings | DocstringQuestions | Files | Hub | ImageFolder | Rows, Field(discriminator="kind")]
    share: Fraction = 0.1
    seed: int = 0
    hold_out: Literal["rows", "clients"] = "rows"

    @property
    def adds(self) -> frozenset[str]:
        return self.source.adds

    @property
    def notes(self) -> tuple[str, ...]:
        return self.source.notes

    def load(self) -> Raw:
        raw = self.source.raw()
        if self.hold_out == "clients":  # they are known only once the rows are dealt
            return raw
        final = (raw.test_fraction, raw.seed) if raw.test is None else None
        train = capped(raw.train, raw.max_train, raw.seed) if final is None else raw.train
        seed = named_seed(self.seed, "validation")
        return Raw(train, None, self.share, seed, final, raw.max_train, raw.max_test)


if TYPE_CHECKING:
    AnySource = Source
else:
    AnySource = Annotated[
        Docstrings | DocstringQuestions | Files | Hub | ImageFolder | Rows | Sites | Validation, Slot("data", Source)
    ]
"""Any source, discriminated by ``kind``."""


def reading_of(source: Source) -> Reading:
    """How the files of a source are read; as by default where its kind has no such settings."""
    if not isinstance(source, Files | Sites):
        return Reading()
    return Reading(
        delimiter=source.delimiter,
        encoding=source.encoding,
        max_unpacked_gb=source.max_unpacked_gb,
        format=source.format,
    )


SOURCES: dict[str, type[Source]] = by_kind(AnySource)
"""The sources by ``kind``."""


def _library_files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
        yield from (Path(folder, file) for file in sorted(files) if file.endswith(".py"))


def _docstrings(source: bytes) -> Iterator[str]:
    # most files without triple quotes are tables; skipping them halves the time
    if b'"""' not in source and b"'''" not in source:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in _statements(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "").strip()
            # a lone surrogate is no text that a file or a tokenizer can hold
            if len(text) >= MIN_CHARACTERS and text == text.encode("utf-8", "ignore").decode():
                yield text


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """``ast.walk``, in its order, without expressions, which hold no docstrings and are most of the nodes."""
    nodes = deque([tree])
    while nodes:
        node = nodes.popleft()
        for part in ("body", "handlers", "orelse", "finalbody", "cases"):
            if isinstance(inside := getattr(node, part, ()), list):
                nodes.extend(inside)
        yield node
