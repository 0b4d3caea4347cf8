"""Records from a data set on the Hugging Face Hub, streamed through `datasets`."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import BadFile, KtError
from .files import Located


def hub_records(source: str) -> Iterator[Located]:
    """The records of the first split of hf:repo[:file].

    Raises:
        BadFile: no `datasets` package, no name, or whatever the Hub, the network and the file formats raise.
    """
    repo, _, file = source.removeprefix("hf:").partition(":")
    try:
        import datasets
    except ImportError as error:
        raise BadFile(f"{source} needs the datasets package; install it with: pip install 'kt[data]'") from error
    if not repo:
        raise BadFile(f"{source!r} names no dataset; write hf:owner/name or hf:owner/name:file.json")
    number = 0
    try:
        splits = datasets.load_dataset(repo, data_files=file or None, streaming=True)
        for number, record in enumerate(next(iter(splits.values())), 1):
            yield Located(record, f"{source}, record {number}")
    except KtError:
        raise
    except Exception as error:  # the hub, the network and every file format raise their own kinds
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadFile(f"{source} cannot be read after record {number}: {said}") from error
