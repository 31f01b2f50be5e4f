"""What a server is told of an error holds no paths of the site."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_ROOT = r"(?:~|\.\.?)?/"
# in quotes, names may have spaces; names of a hub, addresses of the web and tokens such as </s> are no paths
_QUOTED = re.compile(rf"(['\"`]){_ROOT}(?:[^'\"`/\n]+/+)*([^'\"`/\n]+)/?\1")
_BARE = re.compile(rf"(?<![\w/<])(?!(?<=:)//){_ROOT}(?:[^\s'\"`,;:()/]+/+)*([^\s'\"`,;:()/]+)/?")


def without_paths(text: str, folders: Iterable[Path] = ()) -> str:
    """A sentence with the last name of each path in place of the path.

    Args:
        text: the sentence.
        folders: folders whose names may have spaces.

    >>> without_paths("/home/ann/state/usage.json cannot be read, see '/my models/bert' and https://hub/x")
    "usage.json cannot be read, see 'bert' and https://hub/x"
    """
    for folder in sorted(map(str, {*folders, Path.home(), Path.cwd()}), key=len, reverse=True):
        text = text.replace(f"{folder}/", "/")
    return _BARE.sub(r"\1", _QUOTED.sub(r"\1\2\1", text))
