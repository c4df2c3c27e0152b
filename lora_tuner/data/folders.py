"""Find the data files of a dataset: a file, or those of a folder or of one of its splits.

Files and folders named after splits, as in `data/train-00000-of-00001.parquet` or `dev.jsonl`, are
splits, as for the `datasets` library: of a folder of such files one split is read.
"""

import os
import re
from collections import Counter
from pathlib import Path

from ..config import TrainConfig
from ..errors import DataError, EventHandler, Notice, os_error_message
from ..text import (
    CODE_EXTENSIONS,
    DATA_EXTENSIONS,
    DOCUMENT_EXTENSIONS,
    MAIL_EXTENSIONS,
    MARKDOWN_EXTENSIONS,
    TABLE_EXTENSIONS,
    data_extension,
    format_count,
    format_names,
)
from .delimited import find_txt_delimiter

_SPLIT_WORDS = {  # the words of `datasets`, which counts eval as test
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "eval": ("eval", "evaluation"),
    "test": ("test", "testing"),
}
# Files beside data that have an extension of data files: descriptions, settings, tokenizers.
_METADATA = re.compile(
    r"(readme|licen[sc]e|copying|notice|changelog|citation|requirements)([-_. ].*)?\.txt|metadata\..*|thumbs\.db"
    r"|(vocab|merges)\.txt|~\$.*|(dataset_infos?|dataset_dict|state|(.*_)?config|package(-lock)?|tsconfig|.*\.index|tokenizer|vocab"
    r"|special_tokens_map|added_tokens|croissant)\.json"
)

_ABOUT = re.compile(  # of Markdown, beside data
    r"(readme|licen[sc]e|copying|notice|changelog|citation|contributing|security|code[-_]of[-_]conduct)([-_. ].*)?\.(md|markdown)"
)
_NOT_READ = {  # extension of a file that is no data -> advice
    **dict.fromkeys((".doc", ".rtf", ".odt", ".pages"), "save it as .docx"),
    **dict.fromkeys((".xls", ".xlsb", ".ods", ".numbers"), "save it as .csv"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar", ".gz", ".zst", ".xz", ".bz2"), "unpack it first"),
    **dict.fromkeys((".mobi", ".azw", ".azw3"), "convert it to .epub"),
    **dict.fromkeys((".msg", ".pst"), "export it as .eml or .mbox"),
    ".pdf": "extract its text, as with `pdftotext FILE.pdf FILE.txt`",
    ".arrow": "they are a cache of `datasets`: save that with to_parquet or to_json",
}
_ENCODED = {".csv", ".tsv", ".json", ".jsonl", ".txt", *MARKDOWN_EXTENSIONS, ".html", ".htm", *CODE_EXTENSIONS}
_PLAIN_TEXT = {".txt", *CODE_EXTENSIONS, *DOCUMENT_EXTENSIONS} - {*MAIL_EXTENSIONS}

# Files that tell an adapter or a run, which may lie in the folder of its data.
_OUTPUTS = ({"adapter_config.json", "adapter_model.safetensors"}, {"run.yaml", "manifest.json"})


def choose_files(path: Path, split: str | None, notify: EventHandler) -> list[Path]:
    """Return the data files to read: a file itself; of a folder those of the split, if it has splits."""
    files, others = _find_data_files(path) if path.is_dir() else ([path], list[Path]())
    if not path.is_dir() and data_extension(path) not in DATA_EXTENSIONS + CODE_EXTENSIONS:
        advice = _NOT_READ.get(data_extension(path))
        raise DataError(
            f"{path} has an unsupported file type: {advice}."
            if advice
            else f"{path} has an unsupported file type: use {' '.join(DATA_EXTENSIONS)}, program code (.py and the like), or a "
            "folder of such files."
        )
    if not files:
        advised = {
            data_extension(file): _NOT_READ[data_extension(file)]
            for file in others
            if data_extension(file) in _NOT_READ
        }
        hint = "".join(f" Of {extension} files: {advice}." for extension, advice in sorted(advised.items()))
        raise DataError(f"The folder {path} has no {' '.join(DATA_EXTENSIONS)} file, nor program code.{hint}")
    read = Counter(map(data_extension, files))
    if len(read) > 1 and not {*DOCUMENT_EXTENSIONS}.isdisjoint(read):
        counts = [f"{count} {extension}" for extension, count in read.most_common()]
        notify(Notice(f"Reading documents and other files of {path}: {format_names(counts)}."))
    if others:
        kinds = Counter(_describe_kind(file) for file in others)
        counts = [f"{count} {kind}" for kind, count in kinds.most_common()]
        notify(
            Notice(
                f"Skipped {format_count(len(others), 'other file')} in {path}, such as "
                f"{others[0].relative_to(path)}: {format_names(counts, 8)}."
            )
        )
    splits = _group_by_split(path, files) if path.is_dir() else {}
    if not splits:
        if split is not None:
            raise DataError(f"{path} has no files that are named after a split '{split}', so leave --split out.")
        return files
    chosen = split or "train"
    if chosen not in splits:
        raise DataError(
            f"{path} has no files that are named after a split '{chosen}': choose one with "
            f"--split: {format_names(splits)}."
        )
    if rest := sorted(set(files).difference(*splits.values())):
        notify(
            Notice(
                f"Skipped {format_count(len(rest), 'data file')} in {path} not named after a split, such "
                f"as {rest[0].relative_to(path)}."
            )
        )
    return splits[chosen]


def _describe_kind(path: Path) -> str:
    if path.is_dir():
        return "linked" if path.is_symlink() else "of adapters or runs"
    is_about = _METADATA.fullmatch(path.name.lower()) or _ABOUT.fullmatch(path.name.lower())
    return "about the data" if is_about else data_extension(path) or "without an extension"


def has_tables(name: str) -> bool:
    """Return whether a local dataset has files of several tables: Excel workbooks, SQLite databases."""
    return not {*TABLE_EXTENSIONS}.isdisjoint(_data_extensions(name))


def has_txt_files(name: str) -> bool:
    return ".txt" in _data_extensions(name)


def has_delimited_files(name: str, txt_rows: str) -> bool:
    """Return whether a dataset has files that --delimiter is for: csv, tsv, and txt that may be tables."""
    kinds = {".csv", ".tsv", *([".txt"] if txt_rows == "auto" else [])}
    return not kinds.isdisjoint(_data_extensions(name))


def has_encoded_files(name: str) -> bool:
    """Return whether a dataset has files that --encoding is for: of text whose bytes do not name it."""
    return not _ENCODED.isdisjoint(_data_extensions(name))


def has_columns(name: str, config: TrainConfig) -> bool:
    """Return whether the rows of a dataset have columns: not if all its files are plain text."""
    if not os.path.lexists(os.path.expanduser(name)):
        return True
    files = _data_files(name)
    if not _PLAIN_TEXT.issuperset(map(data_extension, files)):
        return True
    return config.txt_rows == "auto" and any(
        find_txt_delimiter(file, config.delimiter, config.encoding) is not None
        for file in files
        if data_extension(file) == ".txt"
    )


def _data_files(name: str) -> list[Path]:
    path = Path(os.path.expanduser(name))
    return _find_data_files(path)[0] if path.is_dir() else [path]


def _data_extensions(name: str) -> list[str]:
    return [data_extension(file) for file in _data_files(name)]


def local_splits(name: str) -> dict[str, list[Path]]:
    """Return the data files of each split in a local folder, if its files or folders are named so."""
    path = Path(os.path.expanduser(name))
    return _group_by_split(path, _find_data_files(path)[0]) if name != "imdb" and path.is_dir() else {}


def _group_by_split(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Group data files by split; empty if none is named after one, and for program code and Markdown.

    Folders count before names of files, as in `datasets`; of documents they alone count, as their
    names tell their subjects. If no file is named after train, those without a split are.
    """
    if all(data_extension(file) in MARKDOWN_EXTENSIONS + CODE_EXTENSIONS for file in files):
        return {}
    splits: dict[str, list[Path]] = {}
    rest = []
    for file in files:
        *folders, name = file.relative_to(folder).parts
        if data_extension(file) in DOCUMENT_EXTENSIONS:
            name = ""
        named = [split for part in (*reversed(folders), name) if (split := split_of(part))]
        if named:
            splits.setdefault(named[0], []).append(file)
        else:
            rest.append(file)
    if splits and rest:
        splits.setdefault("train", rest)
    return splits


def split_of(name: str) -> str | None:
    """Return the split that a file or folder is named after; None for none, or for several."""
    words = set(re.split(r"[-._ 0-9]+", name.lower()))
    splits = [split for split, names in _SPLIT_WORDS.items() if words.intersection(names)]
    return splits[0] if len(splits) == 1 else None


def _find_data_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Find files at any depth, except hidden ones and those of adapters and runs.

    Returns:
        The data files. If these are at most Markdown and HTML pages, and no more pages than code
        files: the code files and Markdown. And the others: of other types, about the data
        (`_METADATA`, `_ABOUT`), links to folders, and folders of adapters, runs and sweeps.
    """

    def refuse(error: OSError) -> None:
        raise DataError(os_error_message(error)) from error

    skipped: list[Path] = []
    files: list[Path] = []
    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if root.endswith(".sweep") or any(output <= {*names} for output in _OUTPUTS):
            folders.clear()
            skipped.append(Path(root))
            continue
        skipped += [Path(root, name) for name in folders if os.path.islink(os.path.join(root, name))]
        files += [Path(root, name) for name in names if not name.startswith(".")]
    by_extension: dict[str, list[Path]] = {}
    for file in files:
        if not _METADATA.fullmatch(file.name.lower()):
            by_extension.setdefault(data_extension(file), []).append(file)
    data_files, code_files = (
        [file for extension, found in by_extension.items() if extension in kinds for file in found]
        for kinds in (DATA_EXTENSIONS, MARKDOWN_EXTENSIONS + CODE_EXTENSIONS)
    )
    pages = [file for file in data_files if data_extension(file) in (".html", ".htm")]
    about_data = [file for file in data_files if _ABOUT.fullmatch(file.name.lower())]
    has_only_pages = {*map(data_extension, data_files)} <= {*MARKDOWN_EXTENSIONS, ".html", ".htm"}
    is_code = has_only_pages and len(pages) <= sum(data_extension(file) in CODE_EXTENSIONS for file in code_files)
    data_files = sorted(code_files if is_code else {*data_files}.difference(about_data))
    return data_files, sorted({*files, *skipped}.difference(data_files))
