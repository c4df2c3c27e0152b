"""Many adapters in one folder: what is written appears whole or not at all, and nothing outside is touched."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lora_tuner import atomic_io
from lora_tuner.adapters.adapter import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE, load_adapter_folder
from lora_tuner.adapters.library import Library, read_consistently
from lora_tuner.errors import AdapterError

from .. import adapter_files

NO_NAME = "is no adapter name: a letter, then up to 63 letters, digits, '-' or '_', and no device of Windows."
NO_NAMES = [
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
    """Everything under a folder: relative path -> bytes, None for folders."""
    paths = sorted(folder.rglob("*")) if folder.exists() else []
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in paths}


def refusal(call, *arguments, kind=AdapterError, **options):
    """The message of the error."""
    with pytest.raises(kind) as error:
        call(*arguments, **options)
    return str(error.value)


# Finding


def test_get_by_name_and_by_path(library, tmp_path):
    adapter_files.write(library.path / "here")
    elsewhere = adapter_files.write(tmp_path / "deep" / "there")
    assert library.get("here").path == library.path / "here"
    assert library.get(str(elsewhere)).path == elsewhere
    assert library.get(elsewhere).path == elsewhere
    assert library.get("deep/there").name == "there"  # the working folder is tmp_path
    assert library.get("adapters/here").name == "here"


def test_a_name_in_the_library_comes_before_a_path(library, tmp_path):
    adapter_files.write(library.path / "same")
    adapter_files.write(tmp_path / "same", {"r": 2}, adapter_files.tensors(2))
    assert library.get("same").rank == 4
    assert library.get("./same").rank == 2


def test_get_what_is_not_there(library):
    assert refusal(library.get, "imdb") == (
        f"There is no adapter 'imdb', neither in {library.path} (none yet) nor as a path."
    )
    adapter_files.write(library.path / "b")
    adapter_files.write(library.path / "a")
    assert refusal(library.get, "imdb") == (
        f"There is no adapter 'imdb', neither in {library.path} (a, b) nor as a path."
    )


def test_several_at_once(library, tmp_path):
    for name in ("a", "b"):
        adapter_files.write(library.path / name)
    adapter_files.write(tmp_path / "elsewhere" / "a")
    assert [adapter.path for adapter in library.several(["b", "elsewhere/a"])] == [
        library.path / "b",
        Path("elsewhere/a"),
    ]
    assert library.several([]) == []
    for names in (["a", "b", "a"], ["a", "elsewhere/a"], ["a", str(library.path / "a")]):
        assert refusal(library.several, names) == ("Two of these adapters are called a: name each once, or rename one.")


def test_a_file_is_no_adapter(library):
    library.path.mkdir()
    (library.path / "file").write_text("a file")
    assert library.names() == []
    assert refusal(library.get, "file") == (
        f"There is no adapter 'file', neither in {library.path} (none yet) nor as a path."
    )
    for change in (library.remove, lambda name: library.rename(name, "new")):
        assert refusal(change, "file") == f"There is no adapter 'file' in {library.path} (none yet)."
    assert tree(library.path) == {"file": b"a file"}


def test_a_library_that_is_a_file_is_none(tmp_path):
    (tmp_path / "adapters").write_text("a file")
    library = Library(tmp_path / "adapters")
    for ask in (library.names, lambda: library.get("a"), lambda: library.remove("a")):
        with pytest.raises(AdapterError) as raised:
            ask()
        assert str(raised.value) == (
            f"{library.path} is no folder, so no adapters are in it: choose another --adapters-dir."
        )


def test_listing_with_broken_entries(library):
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
    assert str(found["evil"]) == f"{library.path / 'evil' / CONFIG_FILE}: r is 0, not a rank from 1 to 4096."
    assert str(found["bare"]) == f"{library.path / 'bare'} has no {CONFIG_FILE}: it is incomplete, or no adapter."


# Writing


def put(library, name, then=lambda work: None, overwrite=False, **parts):
    """Write an adapter into a library; `then` spoils it before it appears."""
    with library.writing(name, overwrite=overwrite) as work:
        adapter_files.write(work, **parts)
        then(work)


OTHER = {"config": {"r": 2}, "weights": adapter_files.tensors(2)}


@pytest.fixture
def taken(library):
    """A library with an adapter in it, and what is on disk."""
    adapter_files.write(library.path / "imdb", facts=adapter_files.manifest())
    return tree(library.path)


def test_writing_makes_the_adapter_appear(library):
    with library.writing("imdb") as work:
        adapter_files.write(work, facts=adapter_files.manifest())
        assert library.names() == []
    assert library.names() == ["imdb"]
    assert library.get("imdb").rank == 4
    assert sorted(path.name for path in library.path.iterdir()) == ["imdb"]


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_writing_that_raises_leaves_nothing(library, kind):
    def fail(work):
        raise kind

    with pytest.raises(kind):
        put(library, "imdb", fail)
    assert tree(library.path) == {}


def test_overwriting_that_raises_changes_nothing(library, taken):
    def fail(work):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        put(library, "imdb", fail, overwrite=True, **OTHER)
    assert tree(library.path) == taken


def test_an_existing_name_is_not_overwritten_unless_asked(library, taken):
    with pytest.raises(AdapterError) as error, library.writing("imdb"):
        pytest.fail("it should not get here")
    assert str(error.value) == (
        f"{library.path / 'imdb'} exists: choose another --name, or replace it with --overwrite."
    )
    assert tree(library.path) == taken
    put(library, "imdb", overwrite=True, **OTHER)
    assert library.get("imdb").rank == 2
    assert library.get("imdb").manifest is None
    assert sorted(path.name for path in library.path.iterdir()) == ["imdb"]


def test_a_name_taken_in_the_meantime_is_not_overwritten(library):
    assert refusal(put, library, "imdb", lambda _: adapter_files.write(library.path / "imdb"), **OTHER) == (
        f"{library.path / 'imdb'} exists: choose another --name, or replace it with --overwrite."
    )
    assert library.get("imdb").rank == 4
    assert sorted(path.name for path in library.path.iterdir()) == ["imdb"]


def test_a_folder_that_is_no_adapter_is_never_replaced(library):
    (library.path / "photos").mkdir(parents=True)
    (library.path / "photos" / "cat.jpg").write_text("cat")
    (library.path / "file").write_text("file")
    before = tree(library.path)
    for name in ("photos", "file"):
        with pytest.raises(AdapterError) as error, library.writing(name, overwrite=True):
            pytest.fail("it should not get here")
        assert str(error.value) == (
            f"{library.path / name} is no adapter, so it is not replaced: choose another --name."
        )
    assert tree(library.path) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda work: (work / CONFIG_FILE).unlink(), "has no adapter_config.json"),
        (lambda work: (work / CONFIG_FILE).write_text("{"), "is not readable as JSON"),
        (lambda work: (work / WEIGHTS_FILE).write_bytes((work / WEIGHTS_FILE).read_bytes()[:-1]), "it is cut off"),
    ],
)
def test_what_cannot_be_read_back_does_not_appear(library, taken, overwrite, spoil, why):
    with pytest.raises(AdapterError, match=why):
        put(library, "imdb" if overwrite else "new", spoil, overwrite)
    assert tree(library.path) == taken


def test_weights_that_do_not_match_the_manifest_do_not_appear(library, taken):
    def flip_a_bit(work):
        weights = bytearray((work / WEIGHTS_FILE).read_bytes())
        weights[-1] ^= 1
        (work / WEIGHTS_FILE).write_bytes(weights)

    with pytest.raises(AdapterError) as error:
        put(library, "imdb", flip_a_bit, overwrite=True, facts=adapter_files.manifest())
    assert str(error.value) == (
        f"{library.path / 'imdb'} was not written as it should be: the disk gave back other weights."
    )
    assert tree(library.path) == taken


@pytest.fixture
def cut_off(library, taken):
    """A replacement of `imdb` was cut off: the old folder waits under another name."""
    (library.path / "imdb").rename(library.path / f".imdb{atomic_io._OLD_SUFFIX}")
    return taken


def test_after_a_replacement_that_was_cut_off_the_adapter_is_found(library, cut_off):
    assert library.get("imdb").rank == 4
    assert tree(library.path) == cut_off


def test_after_a_replacement_that_was_cut_off_the_adapter_is_listed(library, cut_off):
    assert library.names() == ["imdb"]
    assert tree(library.path) == cut_off


def test_after_a_replacement_that_was_cut_off_the_name_is_still_taken(library, cut_off):
    assert refusal(put, library, "imdb") == (
        f"{library.path / 'imdb'} exists: choose another --name, or replace it with --overwrite."
    )
    assert tree(library.path) == cut_off


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", NO_NAMES)
def test_nothing_is_written_under_what_is_no_name(library, taken, tmp_path, name, overwrite):
    before = tree(tmp_path)
    assert refusal(put, library, name, overwrite=overwrite) == (f"'{name}' {NO_NAME}")
    assert tree(tmp_path) == before


def test_replacing_a_link_leaves_what_it_points_to(library, tmp_path):
    elsewhere = adapter_files.write(tmp_path / "elsewhere" / "imdb")
    before = tree(elsewhere)
    library.path.mkdir()
    (library.path / "imdb").symlink_to(elsewhere)
    put(library, "imdb", overwrite=True, **OTHER)
    assert library.get("imdb").rank == 2
    assert not (library.path / "imdb").is_symlink()
    assert tree(elsewhere) == before


# Renaming and removing


def test_renaming_moves_all_of_it(library, taken):
    assert library.rename("imdb", "reviews").path == library.path / "reviews"
    assert tree(library.path) == {path.replace("imdb", "reviews"): data for path, data in taken.items()}


def test_a_name_that_is_taken_is_not_renamed_to(library, taken):
    adapter_files.write(library.path / "other", **OTHER)
    (library.path / "notes").mkdir()
    (library.path / "file").write_text("file")
    before = tree(library.path)
    for name in ("other", "notes", "file", "imdb"):
        assert refusal(library.rename, "imdb", name) == (f"{library.path / name} exists: choose another name.")
    assert tree(library.path) == before


def test_what_is_not_there_is_neither_renamed_nor_removed(library, taken):
    for change in (library.remove, lambda name: library.rename(name, "new")):
        assert refusal(change, "other") == f"There is no adapter 'other' in {library.path} (imdb)."
    assert tree(library.path) == taken


def test_only_adapters_are_removed(library, taken):
    (library.path / "notes").mkdir()
    (library.path / "notes" / "a.txt").write_text("a")
    before = tree(library.path)
    assert refusal(library.remove, "notes") == f"{library.path / 'notes'} is no adapter, so it is not removed."
    assert tree(library.path) == before
    library.remove("imdb")
    assert tree(library.path) == {"notes": None, "notes/a.txt": b"a"}


@pytest.mark.parametrize("left", [CONFIG_FILE, WEIGHTS_FILE])
def test_what_is_left_of_an_adapter_can_be_removed(library, taken, left):
    for path in (library.path / "imdb").iterdir():
        if path.name != left:
            path.unlink()
    library.remove("imdb")
    assert tree(library.path) == {}


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_is_no_name_is_neither_renamed_nor_removed(library, taken, tmp_path, name):
    adapter_files.write(tmp_path / "out")
    before = tree(tmp_path)
    for change in (library.remove, lambda name: library.rename(name, "new")):
        assert refusal(change, name) == f"There is no adapter '{name}' in {library.path} (imdb)."
    assert refusal(library.rename, "imdb", name) == (f"'{name}' {NO_NAME}")
    assert tree(tmp_path) == before


def test_an_adapter_elsewhere_is_read_by_its_path_and_never_changed(library, taken, tmp_path):
    elsewhere = adapter_files.write(tmp_path / "elsewhere")
    before = tree(tmp_path)
    for path in (str(elsewhere), "elsewhere", "adapters/imdb", "adapters/../elsewhere"):
        if path != "elsewhere":
            assert library.get(path).rank == 4
        for change in (library.remove, lambda name: library.rename(name, "new")):
            assert refusal(change, path) == f"There is no adapter '{path}' in {library.path} (imdb)."
    assert tree(tmp_path) == before


def test_a_link_to_what_is_no_adapter_can_be_removed(library, taken, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    (library.path / "linked").symlink_to(tmp_path / "photos")
    library.remove("linked")
    assert tree(library.path) == taken
    assert tree(tmp_path / "photos") == {"cat.jpg": b"cat"}


@pytest.mark.parametrize("change", ["remove", "rename"])
def test_of_a_link_the_link_alone_is_changed(library, taken, tmp_path, change):
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


def test_removing_a_folder_with_a_link_in_it_leaves_what_it_points_to(library, taken, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    (library.path / "imdb" / "checkpoints").symlink_to(tmp_path / "precious")
    library.remove("imdb")
    assert tree(library.path) == {}
    assert tree(tmp_path / "precious") == {"file": b"mine"}


# While others write


@pytest.mark.parametrize("error", [AdapterError("torn"), FileNotFoundError("gone"), ValueError("half of each")])
def test_an_adapter_that_is_replaced_while_it_is_read_is_read_again(library, taken, tmp_path, error):
    """Two folders read as one may fail in any way."""
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


def test_what_fails_with_the_folder_as_it_was_fails(library, taken):
    def look(adapter):
        raise ValueError("as it is")

    with pytest.raises(ValueError, match="as it is"):
        read_consistently(library.path / "imdb", look)


# Who descends from whom


def made(library, name, value, *parents):
    """An adapter with weights of its own, made from these."""
    facts = adapter_files.manifest(parents=[parent.as_parent().model_dump() for parent in parents])
    return load_adapter_folder(
        adapter_files.write(library.path / name, weights=adapter_files.tensors(value=value), facts=facts)
    )


def lineage(library, adapter):
    return [(it["name"], it["generation"], it["here"]) for it in library.ancestors(adapter)]


def test_an_adapter_without_parents_has_no_ancestors(library):
    assert library.ancestors(made(library, "a", 1)) == []
    assert library.ancestors(load_adapter_folder(adapter_files.write(library.path / "foreign"))) == []


def test_the_chain_of_a_child(library):
    a = made(library, "a", 1)
    b = made(library, "b", 2, a)
    c = made(library, "c", 3, b)
    assert library.ancestors(c) == [
        {"name": "b", "sha256": b.sha256, "generation": 1, "here": "b"},
        {"name": "a", "sha256": a.sha256, "generation": 2, "here": "a"},
    ]
    assert json.loads(json.dumps(library.ancestors(c))) == library.ancestors(c)


def test_several_parents_come_each_with_its_own(library):
    a, b = made(library, "a", 1), made(library, "b", 2)
    c = made(library, "c", 3, a, b)
    d = made(library, "d", 4, c, a)
    assert lineage(library, d) == [("c", 1, "c"), ("a", 2, "a"), ("b", 2, "b"), ("a", 1, "a")]


def test_parents_that_have_been_renamed_replaced_and_removed(library):
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


def test_a_parent_without_a_manifest_is_known_by_its_file(library):
    foreign = load_adapter_folder(adapter_files.write(library.path / "foreign", weights=adapter_files.tensors(value=9)))
    child = made(library, "child", 1, foreign)
    assert lineage(library, child) == [("foreign", 1, "foreign")]
    library.rename("foreign", "known")
    assert lineage(library, child) == [("foreign", 1, "known")]
    adapter_files.write(library.path / "known", weights=adapter_files.tensors(value=10))
    assert lineage(library, child) == [("foreign", 1, None)]


def test_a_parent_elsewhere_is_not_here(library, tmp_path):
    parent = made(Library(tmp_path / "other"), "a", 1)
    assert lineage(library, made(library, "child", 2, parent)) == [("a", 1, None)]


def test_broken_neighbours_do_not_hide_ancestors(library):
    a = made(library, "a", 1)
    adapter_files.write(library.path / "evil", {"r": 0})
    assert lineage(library, made(library, "child", 2, a)) == [("a", 1, "a")]


def nested(folder, generations):
    """An adapter whose manifest nests its parents this deep, by text: what writes JSON would give up."""
    adapter_files.write(folder, facts=adapter_files.manifest())
    text = (folder / MANIFEST_FILE).read_text()
    assert '"parents": []' in text
    before = "".join(f'[{{"name": "p{number}", "sha256": "{"ab" * 32}", "parents": ' for number in range(generations))
    (folder / MANIFEST_FILE).write_text(text.replace('"parents": []', f'"parents": {before}[]{"}]" * generations}'))
    return folder


def test_two_hundred_generations(library):
    adapter = load_adapter_folder(nested(library.path / "a", 200))
    assert lineage(library, adapter) == [(f"p{number}", number + 1, None) for number in range(200)]
    assert adapter.parent_info().parents == adapter.manifest.parents
    assert len(json.dumps(adapter.to_dict())) > 200 * len('{"name": "p0", "sha256": "x"}')


@pytest.mark.parametrize("generations", [*range(240, 262), 500, 100_000])
def test_parents_nested_too_deep_are_read_or_refused(library, generations):
    nested(library.path / "a", generations)
    ((_, found),) = library.entries()
    if isinstance(found, AdapterError):
        assert str(found).startswith(f"{library.path / 'a' / MANIFEST_FILE}")
    else:
        assert len(library.ancestors(found)) == generations
        found.manifest.to_json()
        json.dumps(found.facts())


# Start-up


def loaded_by(program, *arguments, cwd=None):
    """The packages that a process has loaded after a program."""
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


def test_the_library_never_imports_torch(library):
    adapter_files.write(library.path / "imdb", facts=adapter_files.manifest())
    program = """
from pathlib import Path
from lora_tuner.adapters.library import Library
library = Library(Path(sys.argv[1]))
(name, adapter), = library.entries()
adapter.facts(), library.get("imdb").modules, library.ancestors(adapter)
with library.writing("copy") as work:
    for file in adapter.path.iterdir():
        (work / file.name).write_bytes(file.read_bytes())
library.rename("copy", "new"), library.remove("new")
assert library.names() == ["imdb"]
"""
    loaded = loaded_by(program, library.path)
    assert "pydantic" in loaded
    assert not loaded & (HEAVY | {"numpy"})


@pytest.mark.parametrize("what", ["photos", "broken"])
def test_what_cannot_be_read_is_not_renamed(library, taken, what):
    (library.path / what).mkdir()
    if what == "broken":
        (library.path / what / CONFIG_FILE).write_text("{")
    before = tree(library.path)
    with pytest.raises(AdapterError):
        library.rename(what, "new")
    assert tree(library.path) == before


def test_nothing_is_renamed_onto_a_dangling_link(library, taken):
    (library.path / "dangling").symlink_to("/nowhere")
    assert refusal(library.rename, "imdb", "dangling") == f"{library.path}/dangling exists: choose another name."


def test_of_twins_the_one_with_its_own_name_is_the_parent(library):
    parent = made(library, "a", 1)
    made(library, "b", 1)  # the same run under another name gives the same weights
    assert lineage(library, made(library, "child", 2, parent)) == [("a", 1, "a")]
