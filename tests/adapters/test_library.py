"""The library: adapters appear complete or not at all, and nothing outside it is changed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lora_tuner import atomic_io
from lora_tuner.adapters.adapter import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE, load_adapter_folder
from lora_tuner.adapters.library import Ancestor, Library, read_consistently
from lora_tuner.errors import AdapterError

from .. import adapter_files

INVALID_NAME = (
    "is not a valid adapter name: use a letter, then up to 63 letters, digits, '-' or '_'; names of Windows devices "
    "are reserved."
)
INVALID_NAMES = [
    *("CON", "nul", "com1", "LPT9", "Aux"),
    *(
        "",
        ".",
        "..",
        "../out",
        "../adapters",
        "/abs",
        "a/b",
        "imdb/",
        "./imdb",
        "a\\b",
        "..\\out",
        "C:imdb",
        "~",
        "~root",
    ),
    *(
        "-rf",
        "_a",
        ".imdb",
        "imdb.",
        "imdb ",
        "nul.txt",
        "a\n",
        "a\0b",
        "\u202ea",
        "\ud800",
        "é",
        "2x",
        "*",
        "a" * 65,
        "a" * 300,
    ),
]


@pytest.fixture
def library(tmp_path):
    return Library(tmp_path / "adapters")


def tree(folder):
    """All files of a folder: relative path -> bytes, None for folders."""
    paths = sorted(folder.rglob("*")) if folder.exists() else []
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in paths}


def refusal(call, *arguments, kind=AdapterError, **options):
    """The message of the error that a call raises."""
    with pytest.raises(kind) as error:
        call(*arguments, **options)
    return str(error.value)


# Reading


def test_get_by_name_and_path(library, tmp_path):
    adapter_files.write(library.path / "here")
    elsewhere = adapter_files.write(tmp_path / "deep" / "there")
    assert library.get("here").path == library.path / "here"
    assert library.get(str(elsewhere)).path == elsewhere
    assert library.get(elsewhere).path == elsewhere
    assert library.get("deep/there").name == "there"  # the working folder is tmp_path
    assert library.get("adapters/here").name == "here"


def test_get_prefers_name_over_path(library, tmp_path):
    adapter_files.write(library.path / "same")
    adapter_files.write(tmp_path / "same", {"r": 2}, adapter_files.tensors(2))
    assert library.get("same").rank == 4
    assert library.get("./same").rank == 2


def test_get_missing_adapter_fails(library):
    assert refusal(library.get, "imdb") == (
        f"There is no adapter 'imdb', neither in {library.path} (none yet) nor as a path."
    )
    adapter_files.write(library.path / "b")
    adapter_files.write(library.path / "a")
    assert refusal(library.get, "imdb") == (
        f"There is no adapter 'imdb', neither in {library.path} (a, b) nor as a path."
    )
    adapter_files.write(library.path / "poems")
    for function in (library.get, library.remove):
        assert refusal(function, "peom").endswith(" Did you mean 'poems'?")


def test_get_all_rejects_equal_names(library, tmp_path):
    for name in ("a", "b"):
        adapter_files.write(library.path / name)
    adapter_files.write(tmp_path / "elsewhere" / "a")
    assert [adapter.path for adapter in library.get_all(["b", "elsewhere/a"])] == [
        library.path / "b",
        Path("elsewhere/a"),
    ]
    assert library.get_all([]) == []
    for names in (["a", "b", "a"], ["a", "elsewhere/a"], ["a", str(library.path / "a")]):
        assert refusal(library.get_all, names) == (
            "Two of these adapters have the name a: list each once, or rename one."
        )


def test_file_is_not_an_adapter(library):
    library.path.mkdir()
    (library.path / "file").write_text("a file")
    assert library.names() == []
    assert refusal(library.get, "file") == (
        f"There is no adapter 'file', neither in {library.path} (none yet) nor as a path."
    )
    for change in (library.remove, lambda name: library.rename(name, "new")):
        assert refusal(change, "file") == f"There is no adapter 'file' in {library.path} (none yet)."
    assert tree(library.path) == {"file": b"a file"}


def test_library_that_is_file_fails(tmp_path):
    (tmp_path / "adapters").write_text("a file")
    library = Library(tmp_path / "adapters")
    for call in (library.names, lambda: library.get("a"), lambda: library.remove("a")):
        with pytest.raises(AdapterError) as raised:
            call()
        assert str(raised.value) == (f"{library.path} is not a folder: choose another --adapters-dir.")


def test_entries_include_broken_adapters(library):
    assert list(library.entries()) == []
    adapter_files.write(library.path / "good")
    adapter_files.write(library.path / "evil", {"r": 0})
    (library.path / "bare").mkdir()
    (library.path / "no.name").mkdir()
    (library.path / ".x.abc.tmp").mkdir()
    (library.path / "README").write_text("a file")
    found = dict(library.entries())
    assert list(found) == ["bare", "evil", "good"]
    assert found["good"].rank == 4
    assert (
        str(found["evil"])
        == f"{library.path / 'evil' / CONFIG_FILE}: r is 0, and a rank is a whole number from 1 to 4096."
    )
    assert (
        str(found["bare"]) == f"{library.path / 'bare'} has no {CONFIG_FILE}: it is incomplete or not an adapter."
    )


# Writing


def put(library, name, then=lambda work: None, overwrite=False, **parts):
    """Create an adapter; `then` is called on its temporary folder."""
    with library.create(name, overwrite=overwrite) as work:
        adapter_files.write(work, **parts)
        then(work)


OTHER = {"config": {"r": 2}, "weights": adapter_files.tensors(2)}


@pytest.fixture
def taken(library):
    """Files of a library with one adapter."""
    adapter_files.write(library.path / "imdb", facts=adapter_files.manifest())
    return tree(library.path)


def test_create_adds_adapter(library):
    with library.create("imdb") as work:
        adapter_files.write(work, facts=adapter_files.manifest())
        assert library.names() == []
    assert library.names() == ["imdb"]
    assert library.get("imdb").rank == 4
    assert sorted(path.name for path in library.path.iterdir()) == ["imdb"]


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_create_error_leaves_nothing(library, kind):
    def fail(work):
        raise kind

    with pytest.raises(kind):
        put(library, "imdb", fail)
    assert tree(library.path) == {}


def test_overwrite_error_changes_nothing(library, taken):
    def fail(work):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        put(library, "imdb", fail, overwrite=True, **OTHER)
    assert tree(library.path) == taken


def test_create_needs_overwrite_for_existing(library, taken):
    with pytest.raises(AdapterError) as error, library.create("imdb"):
        pytest.fail("it should not get here")
    assert str(error.value) == (
        f"{library.path / 'imdb'} exists: choose another --name, or replace it with --overwrite."
    )
    assert tree(library.path) == taken
    put(library, "imdb", overwrite=True, **OTHER)
    assert library.get("imdb").rank == 2
    assert library.get("imdb").manifest is None
    assert sorted(path.name for path in library.path.iterdir()) == ["imdb"]


def test_create_name_taken_meanwhile_fails(library):
    assert refusal(put, library, "imdb", lambda _: adapter_files.write(library.path / "imdb"), **OTHER) == (
        f"{library.path / 'imdb'} exists: choose another --name, or replace it with --overwrite."
    )
    assert library.get("imdb").rank == 4
    assert sorted(path.name for path in library.path.iterdir()) == ["imdb"]


def test_create_never_replaces_other_folders(library):
    (library.path / "photos").mkdir(parents=True)
    (library.path / "photos" / "cat.jpg").write_text("cat")
    (library.path / "file").write_text("file")
    before = tree(library.path)
    for name in ("photos", "file"):
        with pytest.raises(AdapterError) as error, library.create(name, overwrite=True):
            pytest.fail("it should not get here")
        assert str(error.value) == (
            f"{library.path / name} is not an adapter, so it is not replaced: choose another --name."
        )
    assert tree(library.path) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda work: (work / CONFIG_FILE).unlink(), "has no adapter_config.json"),
        (lambda work: (work / CONFIG_FILE).write_text("{"), "is not readable as JSON"),
        (
            lambda work: (work / WEIGHTS_FILE).write_bytes((work / WEIGHTS_FILE).read_bytes()[:-1]),
            "it is cut off",
        ),
    ],
)
def test_create_unreadable_adapter_fails(library, taken, overwrite, spoil, why):
    with pytest.raises(AdapterError, match=why):
        put(library, "imdb" if overwrite else "new", spoil, overwrite)
    assert tree(library.path) == taken


def test_create_wrong_weights_fails(library, taken):
    def flip_a_bit(work):
        weights = bytearray((work / WEIGHTS_FILE).read_bytes())
        weights[-1] ^= 1
        (work / WEIGHTS_FILE).write_bytes(weights)

    with pytest.raises(AdapterError) as error:
        put(library, "imdb", flip_a_bit, overwrite=True, facts=adapter_files.manifest())
    assert str(error.value) == (
        f"{library.path / 'imdb'} was not saved: the disk returned other weights than were written."
    )
    assert tree(library.path) == taken


@pytest.fixture
def cut_off(library, taken):
    """A replacement of `imdb` was interrupted: the old folder has a temporary name."""
    (library.path / "imdb").rename(library.path / f".imdb{atomic_io._OLD_SUFFIX}")
    return taken


def test_interrupted_replacement_get(library, cut_off):
    assert library.get("imdb").rank == 4
    assert tree(library.path) == cut_off


def test_interrupted_replacement_names(library, cut_off):
    assert library.names() == ["imdb"]
    assert tree(library.path) == cut_off


def test_interrupted_replacement_keeps_name(library, cut_off):
    assert refusal(put, library, "imdb") == (
        f"{library.path / 'imdb'} exists: choose another --name, or replace it with --overwrite."
    )
    assert tree(library.path) == cut_off


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", INVALID_NAMES)
def test_create_invalid_name_fails(library, taken, tmp_path, name, overwrite):
    before = tree(tmp_path)
    assert refusal(put, library, name, overwrite=overwrite) == (f"'{name}' {INVALID_NAME}")
    assert tree(tmp_path) == before


def test_overwrite_symlink_keeps_target(library, tmp_path):
    elsewhere = adapter_files.write(tmp_path / "elsewhere" / "imdb")
    before = tree(elsewhere)
    library.path.mkdir()
    (library.path / "imdb").symlink_to(elsewhere)
    put(library, "imdb", overwrite=True, **OTHER)
    assert library.get("imdb").rank == 2
    assert not (library.path / "imdb").is_symlink()
    assert tree(elsewhere) == before


# Renaming and removing


def test_rename_moves_all_files(library, taken):
    assert library.rename("imdb", "reviews").path == library.path / "reviews"
    assert tree(library.path) == {path.replace("imdb", "reviews"): data for path, data in taken.items()}


def test_rename_to_existing_name_fails(library, taken):
    adapter_files.write(library.path / "other", **OTHER)
    (library.path / "notes").mkdir()
    (library.path / "file").write_text("file")
    before = tree(library.path)
    for name in ("other", "notes", "file", "imdb"):
        assert refusal(library.rename, "imdb", name) == (f"{library.path / name} exists: choose another name.")
    assert tree(library.path) == before


def test_rename_remove_missing_adapter_fails(library, taken):
    for change in (library.remove, lambda name: library.rename(name, "new")):
        assert refusal(change, "other") == f"There is no adapter 'other' in {library.path} (imdb)."
    assert tree(library.path) == taken


def test_remove_only_adapters(library, taken):
    (library.path / "notes").mkdir()
    (library.path / "notes" / "a.txt").write_text("a")
    before = tree(library.path)
    assert (
        refusal(library.remove, "notes") == f"{library.path / 'notes'} is not an adapter, so it is not removed."
    )
    assert tree(library.path) == before
    library.remove("imdb")
    assert tree(library.path) == {"notes": None, "notes/a.txt": b"a"}


@pytest.mark.parametrize("left", [CONFIG_FILE, WEIGHTS_FILE])
def test_remove_incomplete_adapter(library, taken, left):
    for path in (library.path / "imdb").iterdir():
        if path.name != left:
            path.unlink()
    library.remove("imdb")
    assert tree(library.path) == {}


@pytest.mark.parametrize("name", INVALID_NAMES)
def test_rename_remove_invalid_name_fails(library, taken, tmp_path, name):
    adapter_files.write(tmp_path / "out")
    before = tree(tmp_path)
    for change in (library.remove, lambda name: library.rename(name, "new")):
        refused = f"There is no adapter '{name}' in {library.path} (imdb)."
        assert refusal(change, name).removesuffix(" Did you mean 'imdb'?") == refused
    assert refusal(library.rename, "imdb", name) == (f"'{name}' {INVALID_NAME}")
    assert tree(tmp_path) == before


def test_adapter_elsewhere_is_read_only(library, taken, tmp_path):
    elsewhere = adapter_files.write(tmp_path / "elsewhere")
    before = tree(tmp_path)
    for path in (str(elsewhere), "elsewhere", "adapters/imdb", "adapters/../elsewhere"):
        if path != "elsewhere":
            assert library.get(path).rank == 4
        for change in (library.remove, lambda name: library.rename(name, "new")):
            similar = " Did you mean 'imdb'?" * path.endswith("/imdb")
            assert refusal(change, path) == f"There is no adapter '{path}' in {library.path} (imdb).{similar}"
    assert tree(tmp_path) == before


def test_remove_symlink_to_other_folder(library, taken, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    (library.path / "linked").symlink_to(tmp_path / "photos")
    library.remove("linked")
    assert tree(library.path) == taken
    assert tree(tmp_path / "photos") == {"cat.jpg": b"cat"}


@pytest.mark.parametrize("change", ["remove", "rename"])
def test_symlink_target_is_never_changed(library, taken, tmp_path, change):
    elsewhere = adapter_files.write(tmp_path / "elsewhere" / "far")
    before = tree(elsewhere)
    (library.path / "linked").symlink_to(elsewhere)
    if change == "remove":
        library.remove("linked")
        assert library.names() == ["imdb"]
    else:
        library.rename("linked", "new")
        assert library.names() == ["imdb", "new"]
        assert (library.path / "new").readlink() == elsewhere
    assert tree(elsewhere) == before
    assert {name: data for name, data in tree(library.path).items() if name.startswith("imdb")} == taken


def test_remove_keeps_symlink_targets_inside(library, taken, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    (library.path / "imdb" / "checkpoints").symlink_to(tmp_path / "precious")
    library.remove("imdb")
    assert tree(library.path) == {}
    assert tree(tmp_path / "precious") == {"file": b"mine"}


# Concurrent writers


@pytest.mark.parametrize("error", [AdapterError("torn"), FileNotFoundError("gone"), ValueError("half of each")])
def test_adapter_replaced_while_read_retries(library, taken, tmp_path, error):
    """A mix of two folders may fail in any way."""
    folder, seen = library.path / "imdb", []

    def look(adapter):
        seen.append(adapter.rank)
        if len(seen) == 1:
            folder.rename(tmp_path / "gone")
            adapter_files.write(folder, config={"r": 2}, weights=adapter_files.tensors(2))
            raise error
        return adapter.rank

    assert read_consistently(folder, look) == 2
    assert seen == [4, 2]


def test_read_error_without_replacement_is_raised(library, taken):
    def look(adapter):
        raise ValueError("as it is")

    with pytest.raises(ValueError, match="as it is"):
        read_consistently(library.path / "imdb", look)


# Lineage


def made(library, name, value, *parents):
    """Write an adapter with the given weights and parents."""
    facts = adapter_files.manifest(parents=[parent.parent_info().model_dump() for parent in parents])
    return load_adapter_folder(
        adapter_files.write(library.path / name, weights=adapter_files.tensors(value=value), facts=facts)
    )


def lineage(library, adapter):
    return [(ancestor.name, ancestor.generation, ancestor.here) for ancestor in library.ancestors(adapter)]


def test_ancestors_without_parents_is_empty(library):
    assert library.ancestors(made(library, "a", 1)) == []
    assert library.ancestors(load_adapter_folder(adapter_files.write(library.path / "foreign"))) == []


def test_ancestors_of_chain(library):
    a = made(library, "a", 1)
    b = made(library, "b", 2, a)
    c = made(library, "c", 3, b)
    assert library.ancestors(c) == [
        Ancestor("b", b.sha256, generation=1, here="b"),
        Ancestor("a", a.sha256, generation=2, here="a"),
    ]


def test_ancestors_of_several_parents(library):
    a, b = made(library, "a", 1), made(library, "b", 2)
    c = made(library, "c", 3, a, b)
    d = made(library, "d", 4, c, a)
    assert lineage(library, d) == [("c", 1, "c"), ("a", 2, "a"), ("b", 2, "b"), ("a", 1, "a")]


def test_ancestors_after_rename_and_remove(library):
    a = made(library, "a", 1)
    b = made(library, "b", 2, a)
    c = made(library, "c", 3, b)
    library.rename("a", "first")
    assert lineage(library, c) == [("b", 1, "b"), ("a", 2, "first")]
    made(library, "a", 5)  # another takes the name that is free
    assert lineage(library, c) == [("b", 1, "b"), ("a", 2, "first")]
    made(library, "b", 6)  # other weights
    assert lineage(library, c) == [("b", 1, None), ("a", 2, "first")]
    library.remove("first")
    assert lineage(library, c) == [("b", 1, None), ("a", 2, None)]
    library.rename("a", "b2")
    library.rename("b", "a")
    assert lineage(library, c) == [("b", 1, None), ("a", 2, None)]


def test_ancestor_without_manifest_found_by_hash(library):
    foreign = load_adapter_folder(
        adapter_files.write(library.path / "foreign", weights=adapter_files.tensors(value=9))
    )
    child = made(library, "child", 1, foreign)
    assert lineage(library, child) == [("foreign", 1, "foreign")]
    library.rename("foreign", "known")
    assert lineage(library, child) == [("foreign", 1, "known")]
    adapter_files.write(library.path / "known", weights=adapter_files.tensors(value=10))
    assert lineage(library, child) == [("foreign", 1, None)]


def test_ancestor_outside_library(library, tmp_path):
    parent = made(Library(tmp_path / "other"), "a", 1)
    assert lineage(library, made(library, "child", 2, parent)) == [("a", 1, None)]


def test_ancestors_ignore_broken_adapters(library):
    a = made(library, "a", 1)
    adapter_files.write(library.path / "evil", {"r": 0})
    assert lineage(library, made(library, "child", 2, a)) == [("a", 1, "a")]


def nested(folder, generations):
    """An adapter with this many generations of parents, written as text: json.dumps would fail."""
    adapter_files.write(folder, facts=adapter_files.manifest())
    text = (folder / MANIFEST_FILE).read_text()
    assert '"parents": []' in text
    before = "".join(
        f'[{{"name": "p{number}", "sha256": "{"ab" * 32}", "parents": ' for number in range(generations)
    )
    (folder / MANIFEST_FILE).write_text(
        text.replace('"parents": []', f'"parents": {before}[]{"}]" * generations}')
    )
    return folder


def test_ancestors_of_200_generations(library):
    adapter = load_adapter_folder(nested(library.path / "a", 200))
    assert lineage(library, adapter) == [(f"p{number}", number + 1, None) for number in range(200)]
    assert adapter.parent_info().parents == adapter.manifest.parents
    assert len(json.dumps(adapter.to_dict())) > 200 * len('{"name": "p0", "sha256": "x"}')


@pytest.mark.parametrize("generations", [*range(240, 262), 500, 100_000])
def test_deep_parents_load_or_fail_cleanly(library, generations):
    nested(library.path / "a", generations)
    ((_, found),) = library.entries()
    if isinstance(found, AdapterError):
        assert str(found).startswith(f"{library.path / 'a' / MANIFEST_FILE}")
    else:
        assert len(library.ancestors(found)) == generations
        found.manifest.to_json()
        json.dumps(found.to_dict())


# Start-up


def loaded_by(program, *arguments, cwd=None):
    """Names of the packages that a program has imported at its end."""
    code = f"{program}\nimport sys\nprint(*sorted({{module.partition('.')[0] for module in sys.modules}}))"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r})\n{code}", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


HEAVY = {"torch", "transformers", "peft", "datasets", "safetensors", "accelerate"}


def test_library_never_imports_torch(library):
    adapter_files.write(library.path / "imdb", facts=adapter_files.manifest())
    program = """
from pathlib import Path
from lora_tuner.adapters.library import Library
library = Library(Path(sys.argv[1]))
(name, adapter), = library.entries()
adapter.to_dict(), library.get("imdb").modules, library.ancestors(adapter)
with library.create("copy") as work:
    for file in adapter.path.iterdir():
        (work / file.name).write_bytes(file.read_bytes())
library.rename("copy", "new"), library.remove("new")
assert library.names() == ["imdb"]
"""
    loaded = loaded_by(program, library.path)
    assert "pydantic" in loaded
    assert not loaded & (HEAVY | {"numpy"})


@pytest.mark.parametrize("what", ["photos", "broken"])
def test_rename_unreadable_folder_fails(library, taken, what):
    (library.path / what).mkdir()
    if what == "broken":
        (library.path / what / CONFIG_FILE).write_text("{")
    before = tree(library.path)
    with pytest.raises(AdapterError):
        library.rename(what, "new")
    assert tree(library.path) == before


def test_rename_onto_dangling_symlink_fails(library, taken):
    (library.path / "dangling").symlink_to("/nowhere")
    assert refusal(library.rename, "imdb", "dangling") == f"{library.path}/dangling exists: choose another name."


def test_ancestor_with_equal_weights_by_name(library):
    parent = made(library, "a", 1)
    made(library, "b", 1)  # the same run under another name gives the same weights
    assert lineage(library, made(library, "child", 2, parent)) == [("a", 1, "a")]
