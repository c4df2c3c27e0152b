"""Many adapters in one folder: what is written appears whole or not at all, and nothing outside is touched."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lora_tuner import files, store
from lora_tuner.base_model import Source, find_base, load_base
from lora_tuner.errors import AdapterError, BaseModelError, HubError, Notice, WrongBaseError
from lora_tuner.library import Library
from lora_tuner.store import CARD, CONFIG, MANIFEST, WEIGHTS

from . import stored, tiny

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
    stored.write(library.path / "here")
    elsewhere = stored.write(tmp_path / "deep" / "there")
    assert library.get("here").path == library.path / "here"
    assert library.get(str(elsewhere)).path == elsewhere
    assert library.get(elsewhere).path == elsewhere
    assert library.get("deep/there").name == "there"  # the working folder is tmp_path
    assert library.get("adapters/here").name == "here"


def test_a_name_in_the_library_comes_before_a_path(library, tmp_path):
    stored.write(library.path / "same")
    stored.write(tmp_path / "same", {"r": 2}, stored.tensors(2))
    assert library.get("same").rank == 4
    assert library.get("./same").rank == 2


def test_get_what_is_not_there(library):
    assert refusal(library.get, "imdb") == (
        f"There is no adapter 'imdb', neither in {library.path} (none yet) nor as a path."
    )
    stored.write(library.path / "b")
    stored.write(library.path / "a")
    assert refusal(library.get, "imdb") == (
        f"There is no adapter 'imdb', neither in {library.path} (a, b) nor as a path."
    )


def test_several_at_once(library, tmp_path):
    for name in ("a", "b"):
        stored.write(library.path / name)
    stored.write(tmp_path / "elsewhere" / "a")
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
    stored.write(library.path / "good")
    stored.write(library.path / "evil", {"r": 0})
    (library.path / "bare").mkdir()
    (library.path / "no.name").mkdir()
    (library.path / ".x.abc.tmp").mkdir()
    (library.path / "README").write_text("a file")
    found = dict(library.entries())
    assert list(found) == ["bare", "evil", "good"]
    assert found["good"].rank == 4
    assert str(found["evil"]) == f"{library.path / 'evil' / CONFIG}: r is 0, not a rank from 1 to 4096."
    assert str(found["bare"]) == f"{library.path / 'bare'} has no {CONFIG}: it is incomplete, or no adapter."


# Writing


def put(library, name, then=lambda work: None, overwrite=False, **parts):
    """Write an adapter into a library; `then` spoils it before it appears."""
    with library.writing(name, overwrite=overwrite) as work:
        stored.write(work, **parts)
        then(work)


OTHER = {"config": {"r": 2}, "weights": stored.tensors(2)}


@pytest.fixture
def taken(library):
    """A library with an adapter in it, and what is on disk."""
    stored.write(library.path / "imdb", facts=stored.manifest())
    return tree(library.path)


def test_writing_makes_the_adapter_appear(library):
    with library.writing("imdb") as work:
        stored.write(work, facts=stored.manifest())
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
    assert refusal(put, library, "imdb", lambda _: stored.write(library.path / "imdb"), **OTHER) == (
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
        (lambda work: (work / CONFIG).unlink(), "has no adapter_config.json"),
        (lambda work: (work / CONFIG).write_text("{"), "is not readable as JSON"),
        (lambda work: (work / WEIGHTS).write_bytes((work / WEIGHTS).read_bytes()[:-1]), "it is cut off"),
    ],
)
def test_what_cannot_be_read_back_does_not_appear(library, taken, overwrite, spoil, why):
    with pytest.raises(AdapterError, match=why):
        put(library, "imdb" if overwrite else "new", spoil, overwrite)
    assert tree(library.path) == taken


def test_weights_that_do_not_match_the_manifest_do_not_appear(library, taken):
    def flip_a_bit(work):
        weights = bytearray((work / WEIGHTS).read_bytes())
        weights[-1] ^= 1
        (work / WEIGHTS).write_bytes(weights)

    with pytest.raises(AdapterError) as error:
        put(library, "imdb", flip_a_bit, overwrite=True, facts=stored.manifest())
    assert str(error.value) == (
        f"{library.path / 'imdb'} was not written as it should be: the disk gave back other weights."
    )
    assert tree(library.path) == taken


@pytest.fixture
def cut_off(library, taken):
    """A replacement of `imdb` was cut off: the old folder waits under another name."""
    (library.path / "imdb").rename(library.path / f".imdb{files._OLD}")
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
    elsewhere = stored.write(tmp_path / "elsewhere" / "imdb")
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
    stored.write(library.path / "other", **OTHER)
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


@pytest.mark.parametrize("left", [CONFIG, WEIGHTS])
def test_what_is_left_of_an_adapter_can_be_removed(library, taken, left):
    for path in (library.path / "imdb").iterdir():
        if path.name != left:
            path.unlink()
    library.remove("imdb")
    assert tree(library.path) == {}


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_is_no_name_is_neither_renamed_nor_removed(library, taken, tmp_path, name):
    stored.write(tmp_path / "out")
    before = tree(tmp_path)
    for change in (library.remove, lambda name: library.rename(name, "new")):
        assert refusal(change, name) == f"There is no adapter '{name}' in {library.path} (imdb)."
    assert refusal(library.rename, "imdb", name) == (f"'{name}' {NO_NAME}")
    assert tree(tmp_path) == before


def test_an_adapter_elsewhere_is_read_by_its_path_and_never_changed(library, taken, tmp_path):
    elsewhere = stored.write(tmp_path / "elsewhere")
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
    elsewhere = stored.write(tmp_path / "elsewhere" / "far")
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


# Adopting


def peft_adapter(base, folder):
    """What plain PEFT writes of an update with numbers of its own."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    gpt2 = model.config.model_type == "gpt2"
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=["c_attn", "mlp.c_proj"] if gpt2 else ["q_proj", "v_proj", "down_proj"],
        fan_in_fan_out=gpt2,
        init_lora_weights=False,
    )
    get_peft_model(model, settings).save_pretrained(folder)
    return folder


@pytest.fixture
def theirs(model_folder, tmp_path):
    return peft_adapter(model_folder, tmp_path / "elsewhere" / "theirs")


@pytest.fixture
def shelf(tmp_path):
    """Hand-made files, quick to make: a base, and an adapter for it that names it."""
    stored.write_base(tmp_path / "base", {f"{module}.weight": (6, 18) for module in stored.MODULES})
    stored.write(tmp_path / "theirs", {"base_model_name_or_path": "base"})
    return tmp_path


def test_an_adapter_of_plain_peft_is_copied_whole_and_gets_a_manifest(theirs, model_folder, library):
    before = tree(theirs)
    notices = []
    adapter = library.adopt(theirs, notify=notices.append)
    assert adapter.path == library.path / "theirs"
    assert tree(theirs) == before
    assert set(before) == {CONFIG, WEIGHTS, CARD}
    assert tree(library.path) == {"theirs": None} | {
        f"theirs/{name}": data for name, data in (before | {MANIFEST: (adapter.path / MANIFEST).read_bytes()}).items()
    }
    manifest = json.loads((adapter.path / MANIFEST).read_text())
    assert len(manifest.pop("created")) == len("2025-01-02T03:04:05+00:00")
    source = find_base(str(model_folder))
    assert manifest == {
        "schema_version": 1,
        "base": {
            "name": str(model_folder),
            "repo": str(model_folder),
            "revision": None,
            "weights": "a local folder",
            "fingerprint": source.fingerprint,
            "tokenizer": None,
        },
        "data": None,
        "run": None,
        "made_by": None,
        "parents": [],
        "result": None,
        "weights": {
            "sha256": files.sha256_file(theirs / WEIGHTS),
            "bytes": (theirs / WEIGHTS).stat().st_size,
            "parameters": adapter.parameters,
            "config": files.sha256_file(theirs / CONFIG),
        },
        "versions": {},
    }
    assert store.verify(adapter) == []
    assert notices == [
        Notice("theirs fits " + str(model_folder) + " in its sizes; that it was trained on it cannot be proven.")
    ]


def test_an_adopted_adapter_is_held_to_its_base(theirs, model_folder, library, tmp_path):
    from lora_tuner import lora

    right = load_base(find_base(str(model_folder)), "cpu")
    kind = "gpt2" if "gpt2" in str(model_folder) else "llama"
    other = load_base(find_base(str(tiny.save_model(tmp_path / "other", kind, seed=7))), "cpu")
    notices = []
    lora.check_base(store.read(theirs), other, notify=notices.append)
    assert notices == [Notice(f"theirs has no manifest, so only its shapes can be compared with {tmp_path / 'other'}.")]
    adapter = library.adopt(theirs)
    lora.check_base(adapter, right, notify=pytest.fail)
    assert refusal(lora.check_base, adapter, other, kind=WrongBaseError) == (
        f"theirs was trained on {model_folder} (fingerprint {right.source.fingerprint[:12]}, a local folder), not on "
        f"{tmp_path / 'other'} (fingerprint {other.source.fingerprint[:12]}, a local folder). "
        "Give the right one with --base, or try all the same with --force."
    )


def test_an_adapter_of_the_library_is_adopted_where_it_is(shelf, library):
    for number, folder in enumerate(("one", library.path / "two", "adapters/three")):
        name = ("one", "two", "three")[number]
        shutil.copytree(shelf / "theirs", library.path / name)
        before = tree(library.path)
        adapter = library.adopt(folder)
        assert adapter.path == library.path / name
        assert adapter.manifest.base.name == "base"
        after = tree(library.path)
        assert json.loads(after.pop(f"{name}/{MANIFEST}"))["weights"]["sha256"] == adapter.sha256
        assert after == before


def test_an_adopted_adapter_gets_the_name_that_is_asked_for(shelf, library):
    assert library.adopt("theirs", "mine").name == "mine"
    assert library.adopt(shelf / "theirs").name == "theirs"
    assert library.names() == ["mine", "theirs"]
    (shelf / "theirs").rename(shelf / "their.adapter")
    assert library.adopt("their.adapter", "ours").name == "ours"


def test_the_base_that_is_given_comes_before_the_one_that_is_named(shelf, library):
    stored.write(shelf / "theirs", {"base_model_name_or_path": "nobody/nothing"})
    assert library.adopt("theirs", "other", base="base").manifest.base.name == "base"
    stored.write(shelf / "theirs", {"base_model_name_or_path": None})
    assert library.adopt("theirs", "silent", base=str(shelf / "base")).manifest.base.name == str(shelf / "base")


def test_the_card_comes_along_and_nothing_else(shelf, library):
    library.adopt("theirs", "bare")
    assert {path.name for path in (library.path / "bare").iterdir()} == {CONFIG, WEIGHTS, MANIFEST}
    (shelf / "theirs" / CARD).write_text("# Theirs")
    for name in ("optimizer.pt", "training_args.bin", "tokenizer.json"):
        (shelf / "theirs" / name).write_text(name)
    (shelf / "theirs" / "checkpoint-1").mkdir()
    library.adopt("theirs", "carded")
    assert {path.name for path in (library.path / "carded").iterdir()} == {CONFIG, WEIGHTS, MANIFEST, CARD}
    assert (library.path / "carded" / CARD).read_text() == "# Theirs"


def test_the_links_of_the_hubs_cache_become_files(shelf, library):
    snapshot = shelf / "snapshots" / "theirs"
    snapshot.mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        (snapshot / name).symlink_to(shelf / "theirs" / name)
    adapter = library.adopt(snapshot)
    assert not any(path.is_symlink() for path in adapter.path.iterdir())
    shutil.rmtree(shelf / "theirs")
    assert store.verify(library.get("theirs")) == []


@pytest.mark.parametrize("shape", [(6, 18), (18, 6)])
@pytest.mark.parametrize("first", ["transformer.", ""])
def test_the_files_of_a_base_may_shorten_its_names_and_hold_a_layer_either_way(tmp_path, library, first, shape):
    """The files of the Hub's GPT-2 call transformer.h.0.attn.c_attn h.0.attn.c_attn."""
    names = [module.replace("transformer.", first) for module in stored.MODULES]
    others = {f"{first}wte.weight": (50, 6), f"{first}h.0.attn.c_attn.bias": (18,), f"{first}h.0.ln_1.weight": (6,)}
    stored.write_base(tmp_path / "base", {f"{names[0]}.weight": shape} | others, {f"{names[1]}.weight": shape})
    stored.write(tmp_path / "theirs", {"base_model_name_or_path": "base"})
    adapter = library.adopt("theirs")
    assert adapter.manifest.base.fingerprint == Source("", "", tmp_path / "base", None, "").fingerprint


def test_a_base_whose_files_shorten_its_names_takes_what_it_is_adopted_on(tmp_path, gpt2, library):
    from safetensors.numpy import load_file, save_file

    from lora_tuner import lora

    headless = Path(shutil.copytree(gpt2, tmp_path / "headless"))
    tensors = load_file(headless / "model.safetensors")
    save_file(
        {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()},
        headless / "model.safetensors",
        metadata={"format": "pt"},
    )
    adapter = library.adopt(peft_adapter(headless, tmp_path / "theirs"))
    base = load_base(find_base(str(headless)), "cpu")
    lora.check_base(adapter, base, notify=pytest.fail)
    assert lora.attach(base.model, adapter, "slot0").active_adapters == ["slot0"]


# What is not adopted


def has_a_manifest(shelf):
    stored.write(shelf / "theirs", facts=stored.manifest())
    return {}, "theirs has a manifest: there is nothing to adopt."


def is_in_the_library_and_a_name_is_given(shelf):
    (shelf / "adapters").mkdir()
    (shelf / "theirs").rename(shelf / "adapters" / "theirs")
    return {"folder": "theirs", "name": "mine"}, (
        f"{shelf}/adapters/theirs is in the library: it keeps its name; `adapters rename` gives another."
    )


def is_damaged(shelf):
    weights = stored.tensors()
    for tensor in weights.values():
        tensor[0, 0] = np.nan
    stored.write(shelf / "theirs", {"base_model_name_or_path": "base"}, weights)
    said = "; ".join(f"{name} holds numbers that are not finite" for name in sorted(weights)[:3])
    return {}, f"theirs is damaged: {said}."


def names_no_base(shelf):
    stored.write(shelf / "theirs", {"base_model_name_or_path": None})
    return {}, "theirs names no base: give it with --base."


def has_a_name_that_is_taken(shelf):
    """Which is said before a base is looked for."""
    stored.write(shelf / "adapters" / "theirs")
    stored.write(shelf / "theirs", {"base_model_name_or_path": "nobody/nothing"})
    return {}, f"{shelf}/adapters/theirs exists: choose another --name."


def is_given_a_name_that_is_taken(shelf):
    (shelf / "adapters" / "photos").mkdir(parents=True)
    return {"name": "photos"}, f"{shelf}/adapters/photos exists: choose another --name."


def is_given_what_is_no_name(shelf):
    return {"name": "../mine"}, f"'../mine' {NO_NAME}"


def has_other_sizes(shelf):
    modules = [f"transformer.h.{number}.attn.c_attn" for number in range(5)]
    stored.write_base(shelf / "wider", {f"{module}.weight": (8, 24) for module in modules})
    stored.write(shelf / "theirs", weights=stored.tensors(4, modules))
    said = "; ".join(f"{module} is 24 -> 8 in the base, 6 -> 18 in the adapter" for module in modules[:3])
    return {"base": "wider"}, f"theirs does not fit the base: {said}, and 2 more."


def has_a_layer_that_the_base_lacks(shelf):
    stored.write(shelf / "theirs", weights=stored.tensors(4, [*stored.MODULES, "transformer.h.2.attn.c_attn"]))
    return {"base": "base"}, (
        "theirs does not fit the base: transformer.h.2.attn.c_attn is no linear layer of the base."
    )


def changes_what_is_no_matrix(shelf):
    stored.write_base(shelf / "odd", {f"{module}.weight": (18,) for module in stored.MODULES})
    said = "; ".join(f"{module} is no linear layer of the base" for module in stored.MODULES)
    return {"base": "odd"}, f"theirs does not fit the base: {said}."


@pytest.mark.parametrize(
    "spoil",
    [
        has_a_manifest,
        is_in_the_library_and_a_name_is_given,
        is_damaged,
        names_no_base,
        has_a_name_that_is_taken,
        is_given_a_name_that_is_taken,
        is_given_what_is_no_name,
        has_other_sizes,
        has_a_layer_that_the_base_lacks,
        changes_what_is_no_matrix,
    ],
)
def test_what_is_not_adopted_leaves_nothing(shelf, library, spoil):
    options, message = spoil(shelf)
    before = tree(shelf)
    options = {"folder": "./theirs"} | options  # a name alone would mean the one of the library
    assert refusal(library.adopt, **options, notify=pytest.fail) == message
    assert tree(shelf) == before


@pytest.mark.parametrize(
    ("base", "kind", "message"),
    [
        (
            "nobody/nothing",
            HubError,
            "nobody/nothing is not cached, and the Hub is out of reach: HF_HUB_OFFLINE is set. `doctor` lists the bases that "
            "need no Hub; a local folder needs none.",
        ),
        (
            "distilgpt2",  # named, so no other takes its place
            HubError,
            "distilbert/distilgpt2 is not cached, and the Hub is out of reach: HF_HUB_OFFLINE is set. `doctor` lists the bases "
            "that need no Hub; a local folder needs none.",
        ),
        ("/nowhere/base", HubError, "'/nowhere/base' is neither a local folder nor a Hub id (owner/name)."),
        ("theirs", BaseModelError, "The folder theirs is no model: it has no config.json."),
    ],
)
@pytest.mark.parametrize("how", ["named", "given"])
def test_a_base_that_is_not_found_leaves_nothing(shelf, library, base, kind, message, how):
    stored.write(shelf / "theirs", {"base_model_name_or_path": base if how == "named" else "base"})
    before = tree(shelf)
    assert refusal(library.adopt, "theirs", base=base if how == "given" else None, kind=kind) == message
    assert tree(shelf) == before


def test_a_revision_is_for_the_hub(shelf, library):
    before = tree(shelf)
    assert refusal(library.adopt, "theirs", revision="main", kind=BaseModelError) == (
        "base is not on the Hub, so it has no revision 'main': leave --revision out."
    )
    assert tree(shelf) == before


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("file", [WEIGHTS, CONFIG, CARD])
def test_a_copy_that_breaks_off_leaves_nothing(shelf, library, monkeypatch, file, kind):
    (shelf / "theirs" / CARD).write_text("# Theirs")
    library.path.mkdir()
    copy = shutil.copyfile

    def fail(source, target):
        if Path(source).name == file:
            raise kind
        return copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", fail)
    before = tree(shelf)
    with pytest.raises(kind):
        library.adopt("theirs")
    assert tree(shelf) == before


def test_a_copy_that_is_not_the_original_does_not_appear(shelf, library, monkeypatch):
    library.path.mkdir()
    before = tree(shelf)

    def flip_a_bit(source, target):
        data = bytearray(source.read_bytes())
        data[-1] ^= source.name == WEIGHTS
        target.write_bytes(data)

    monkeypatch.setattr(shutil, "copyfile", flip_a_bit)
    assert refusal(library.adopt, "theirs") == (
        f"{library.path / 'theirs'} was not written as it should be: the disk gave back other weights."
    )
    assert tree(shelf) == before


# Who descends from whom


def made(library, name, value, *parents):
    """An adapter with weights of its own, made from these."""
    facts = stored.manifest(parents=[parent.as_parent().model_dump() for parent in parents])
    return store.read(stored.write(library.path / name, weights=stored.tensors(value=value), facts=facts))


def lineage(library, adapter):
    return [(it["name"], it["generation"], it["here"]) for it in library.ancestors(adapter)]


def test_an_adapter_without_parents_has_no_ancestors(library):
    assert library.ancestors(made(library, "a", 1)) == []
    assert library.ancestors(store.read(stored.write(library.path / "foreign"))) == []


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
    foreign = store.read(stored.write(library.path / "foreign", weights=stored.tensors(value=9)))
    child = made(library, "child", 1, foreign)
    assert lineage(library, child) == [("foreign", 1, "foreign")]
    library.rename("foreign", "known")
    assert lineage(library, child) == [("foreign", 1, "known")]
    stored.write(library.path / "known", weights=stored.tensors(value=10))
    assert lineage(library, child) == [("foreign", 1, None)]


def test_a_parent_elsewhere_is_not_here(library, tmp_path):
    parent = made(Library(tmp_path / "other"), "a", 1)
    assert lineage(library, made(library, "child", 2, parent)) == [("a", 1, None)]


def test_broken_neighbours_do_not_hide_ancestors(library):
    a = made(library, "a", 1)
    stored.write(library.path / "evil", {"r": 0})
    assert lineage(library, made(library, "child", 2, a)) == [("a", 1, "a")]


def nested(folder, generations):
    """An adapter whose manifest nests its parents this deep, by text: what writes JSON would give up."""
    stored.write(folder, facts=stored.manifest())
    text = (folder / MANIFEST).read_text()
    assert '"parents": []' in text
    before = "".join(f'[{{"name": "p{number}", "sha256": "{"ab" * 32}", "parents": ' for number in range(generations))
    (folder / MANIFEST).write_text(text.replace('"parents": []', f'"parents": {before}[]{"}]" * generations}'))
    return folder


def test_two_hundred_generations(library):
    adapter = store.read(nested(library.path / "a", 200))
    assert lineage(library, adapter) == [(f"p{number}", number + 1, None) for number in range(200)]
    assert adapter.as_parent().parents == adapter.manifest.parents
    assert len(json.dumps(adapter.facts())) > 200 * len('{"name": "p0", "sha256": "x"}')


@pytest.mark.parametrize("generations", [*range(240, 262), 500, 100_000])
def test_parents_nested_too_deep_are_read_or_refused(library, generations):
    nested(library.path / "a", generations)
    ((_, found),) = library.entries()
    if isinstance(found, AdapterError):
        assert str(found).startswith(f"{library.path / 'a' / MANIFEST}")
    else:
        assert len(library.ancestors(found)) == generations
        found.manifest.to_json()
        json.dumps(found.facts())


# Start-up


def loaded_by(program, *arguments, cwd=None):
    """The packages that a process has loaded after a program."""
    code = f"{program}\nimport sys\nprint(*sorted({{module.partition('.')[0] for module in sys.modules}}))"
    root = Path(__file__).parents[1]
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
    stored.write(library.path / "imdb", facts=stored.manifest())
    program = """
from pathlib import Path
from lora_tuner.library import Library
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


def test_adopting_never_imports_torch(theirs, library):
    program = """
from pathlib import Path
from lora_tuner import store
from lora_tuner.library import Library
adapter = Library(Path(sys.argv[1])).adopt(sys.argv[2])
assert store.verify(adapter) == []
assert Library(Path(sys.argv[1])).ancestors(adapter) == []
"""
    loaded = loaded_by(program, library.path, theirs)
    assert "numpy" in loaded
    assert not loaded & HEAVY - {"safetensors"}
    assert library.names() == ["theirs"]


def test_a_link_in_the_library_is_not_adopted_in_place(shelf, library):
    library.path.mkdir()
    (library.path / "linked").symlink_to(shelf / "theirs")
    before = tree(shelf)
    assert refusal(library.adopt, "linked") == (
        f"{library.path}/linked is a link: adopt {shelf}/theirs under another --name."
    )
    assert tree(shelf) == before


def test_a_folder_of_the_library_that_has_no_valid_name_is_left_alone(shelf, library):
    shutil.copytree(shelf / "theirs", library.path / "no.name")
    before = tree(shelf)
    assert refusal(library.adopt, library.path / "no.name") == f"'no.name' {NO_NAME}"
    assert tree(shelf) == before


def test_the_revision_in_the_config_is_that_of_the_base_in_the_config(shelf, library):
    stored.write(shelf / "theirs", {"base_model_name_or_path": "someone/base", "revision": "main"})
    assert library.adopt("theirs", base="base").manifest.base.revision is None


@pytest.mark.parametrize("what", ["photos", "broken"])
def test_what_cannot_be_read_is_not_renamed(library, taken, what):
    (library.path / what).mkdir()
    if what == "broken":
        (library.path / what / CONFIG).write_text("{")
    before = tree(library.path)
    with pytest.raises(AdapterError):
        library.rename(what, "new")
    assert tree(library.path) == before


def test_nothing_is_renamed_onto_a_dangling_link(library, taken):
    (library.path / "dangling").symlink_to("/nowhere")
    assert refusal(library.rename, "imdb", "dangling") == f"{library.path}/dangling exists: choose another name."


def test_others_can_read_the_manifest_of_what_was_adopted_in_place(shelf, library):
    shutil.copytree(shelf / "theirs", library.path / "a")
    assert (library.adopt("a").path / MANIFEST).stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("file", "text"), [("model-1.safetensors", "x"), ("config.json", "{"), ("model.safetensors.index.json", "{")]
)
def test_a_broken_base_is_an_error_of_ours(shelf, library, file, text):
    (shelf / "base" / file).write_text(text)
    with pytest.raises(BaseModelError):
        library.adopt("theirs")


def test_a_home_that_does_not_exist(shelf, library):
    stored.write(shelf / "theirs", {"base_model_name_or_path": "~nosuchuser/base"})
    with pytest.raises(HubError):
        library.adopt("theirs")


def test_of_twins_the_one_with_its_own_name_is_the_parent(library):
    parent = made(library, "a", 1)
    made(library, "b", 1)  # the same run under another name gives the same weights
    assert lineage(library, made(library, "child", 2, parent)) == [("a", 1, "a")]


def test_the_sizes_of_a_base_are_told_the_way_the_layers_lie(gpt2, library, theirs, tmp_path):
    kind = "gpt2" if "transformer" in store.read(theirs).modules[0] else "llama"
    wider = tiny.save_model(tmp_path / "wider", kind, width=48)
    module = {"gpt2": "c_attn is 48 -> 144", "llama": "down_proj is 96 -> 48"}[kind]
    assert f"{module} in the base" in refusal(library.adopt, theirs, base=str(wider))


def test_a_card_that_is_a_link_is_not_copied(shelf, library):
    (shelf / "secret").write_text("SECRET")
    (shelf / "theirs" / CARD).unlink(missing_ok=True)
    (shelf / "theirs" / CARD).symlink_to(shelf / "secret")
    assert not (library.adopt("theirs").path / CARD).exists()


def test_an_adapter_on_the_output_head_is_not_adopted(gpt2, library, tmp_path):
    weights = stored.tensors(4, ["lm_head"])
    stored.write(tmp_path / "head", weights=weights)
    width = next(iter(weights.values())).shape[1]
    stored.write_base(tmp_path / "untied", {"lm_head.weight": (18, width)})
    config = json.loads((tmp_path / "untied" / "config.json").read_text())
    (tmp_path / "untied" / "config.json").write_text(json.dumps(config | {"vocab_size": 18}))
    assert refusal(library.adopt, tmp_path / "head", base=str(tmp_path / "untied")) == (
        f"{tmp_path}/head does not fit the base: lm_head is no linear layer of the base."
    )
