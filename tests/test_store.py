import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lora_tuner import files, store
from lora_tuner.errors import AdapterError
from lora_tuner.library import Library
from lora_tuner.manifest import Manifest, Weights, now
from lora_tuner.store import CONFIG, MANIFEST, WEIGHTS

from . import stored

MODULE = stored.MODULES[0]
A, B = (f"base_model.model.{MODULE}.lora_{part}.weight" for part in "AB")


@pytest.fixture
def library(tmp_path):
    return Library(tmp_path / "adapters")


def tree(folder):
    """Everything under a folder: relative path -> bytes, None for folders."""
    paths = sorted(folder.rglob("*")) if folder.exists() else []
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in paths}


def refusal(folder):
    """The message of the error, without the folder of the test."""
    with pytest.raises(AdapterError) as error:
        store.read(folder)
    return str(error.value).replace(f"{folder.parent}/", "")


# Reading


def test_an_adapter_with_its_facts(tmp_path):
    adapter = store.read(stored.write(tmp_path / "imdb", facts=stored.manifest()))
    assert (adapter.name, adapter.base, adapter.rank) == ("imdb", "distilgpt2", 4)
    assert adapter.modules == list(stored.MODULES)
    assert adapter.targets == ["c_attn"]
    assert adapter.parameters == 2 * (4 * 6 + 18 * 4)
    assert adapter.bytes == sum((tmp_path / "imdb" / name).stat().st_size for name in (WEIGHTS, CONFIG))
    assert adapter.tensors[A] == ("F32", (4, 6))
    facts = json.loads(json.dumps(adapter.facts()))
    assert {key: facts[key] for key in ("name", "path", "rank", "alpha", "targets", "parameters", "bytes")} == {
        "name": "imdb",
        "path": str(tmp_path / "imdb"),
        "rank": 4,
        "alpha": 8,
        "targets": ["c_attn"],
        "parameters": 192,
        "bytes": adapter.bytes,
    }
    assert facts["result"]["gain"] == 0.25
    assert facts["weights"]["sha256"] == files.sha256_file(tmp_path / "imdb" / WEIGHTS)


def test_the_name_of_the_folder_one_is_in(tmp_path, monkeypatch):
    monkeypatch.chdir(stored.write(tmp_path / "imdb"))
    assert store.read(Path(".")).name == "imdb"


def test_an_adapter_of_another_tool_has_no_manifest(tmp_path):
    adapter = store.read(stored.write(tmp_path / "theirs"))
    assert adapter.manifest is None
    assert adapter.base == "distilbert/distilgpt2"
    assert adapter.facts()["base"] == {"name": "distilbert/distilgpt2"}


def test_a_manifest_and_back(tmp_path):
    manifest = stored.manifest()
    assert Manifest.model_validate_json(manifest.to_json()) == manifest
    assert store.read(stored.write(tmp_path / "a", facts=manifest)).manifest == manifest.model_copy(
        update={
            "weights": Weights(
                sha256=files.sha256_file(tmp_path / "a" / WEIGHTS),
                bytes=(tmp_path / "a" / WEIGHTS).stat().st_size,
                parameters=192,
            )
        }
    )


def test_the_time_in_manifests():
    assert len(now()) == len("2025-01-02T03:04:05+00:00")
    assert now().endswith("+00:00")


def test_a_folder_that_is_missing_or_incomplete(tmp_path):
    assert refusal(tmp_path / "none") == "There is no adapter folder none."
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty") == "empty has no adapter_config.json: it is incomplete, or no adapter."
    folder = stored.write(tmp_path / "pickled")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert refusal(folder) == (
        "pickled has no adapter_model.safetensors: it is incomplete, or no adapter (pickled weights are not read)."
    )


# The config of a stranger


@pytest.mark.parametrize(
    "config",
    [
        {"init_lora_weights": "gaussian", "use_rslora": True, "use_dora": False, "lora_dropout": 0.1},
        {"rank_pattern": {"h.1.attn.c_attn": 4, r"^transformer\.h\.0": 4}, "alpha_pattern": {"c_attn": 16.5}},
        {"target_modules": "all-linear", "task_type": None, "revision": None, "inference_mode": True},
        {"layers_to_transform": None, "loftq_config": {}, "trainable_token_indices": None, "lora_bias": False},
        {"megatron_core": "megatron.core", "qalora_group_size": 16, "peft_version": "0.21.2", "fan_in_fan_out": True},
        {"r": 4, "lora_alpha": 0.5},
    ],
)
def test_harmless_settings_are_taken(tmp_path, config):
    assert store.read(stored.write(tmp_path / "a", config)).rank == 4


def test_the_config_that_peft_writes_is_taken(tmp_path):
    from peft import LoraConfig

    LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["c_attn"]).save_pretrained(tmp_path / "own")
    assert store.read(stored.write(tmp_path / "a", json.loads((tmp_path / "own" / CONFIG).read_text()))).rank == 4


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights is 'pissa', and only True or False or 'gaussian' or 'orthogonal' or 'eva' is accepted",
        ),
        (
            {"init_lora_weights": "pissa_niter_16"},
            "init_lora_weights is 'pissa_niter_16', and only True or False or 'gaussian' or 'orthogonal' or 'eva' is "
            "accepted",
        ),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set, which is not supported"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is set, which is not supported"),
        ({"lora_bias": True}, "lora_bias is set, which is not supported"),
        ({"auto_mapping": {"parent_library": "os"}}, "auto_mapping is set, which is not supported"),
        ({"some_day": 1}, "some_day is set, which is not supported"),
        ({"bias": "all"}, "bias is 'all', and only 'none' is accepted"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', and only 'LORA' is accepted"),
        ({"peft_type": None}, "peft_type is missing"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS', and only 'CAUSAL_LM' is accepted"),
        ({"r": 0}, "r is 0, not a rank from 1 to 4096"),
        ({"r": 4_000_000}, "r is 4000000, not a rank from 1 to 4096"),
        ({"r": True}, "r is True, a bool; r is True, not a rank from 1 to 4096"),
        ({"r": 4.0}, "r is 4.0, a float; r is 4.0, not a rank from 1 to 4096"),
        ({"r": None}, "r is missing; r is None, not a rank from 1 to 4096"),
        ({"lora_alpha": None}, "lora_alpha is missing; lora_alpha is None, which is no scale"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, which is no scale"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf, which is no scale"),
        ({"lora_alpha": 10**400}, f"lora_alpha is {10**400}, which is no scale"),
        ({"lora_alpha": True}, "lora_alpha is True, a bool; lora_alpha is True, which is no scale"),
        ({"use_rslora": 1}, "use_rslora is 1, a int"),
        ({"target_modules": {"c_attn": 1}}, "target_modules is {'c_attn': 1}, a dict"),
        ({"rank_pattern": [4]}, "rank_pattern is [4], a list"),
        ({"rank_pattern": {"h.0": 0}}, "rank_pattern.h.0 is 0, not a rank from 1 to 4096"),
        ({"rank_pattern": {"h.0": 9_999_999}}, "rank_pattern.h.0 is 9999999, not a rank from 1 to 4096"),
        ({"alpha_pattern": {"h.0": "8"}}, "alpha_pattern.h.0 is '8', which is no scale"),
        ({"rank_pattern": {"(a+)+$": 4}}, "rank_pattern has the key '(a+)+$', which is no layer name"),
        ({"alpha_pattern": {".*": 4}}, "alpha_pattern has the key '.*', which is no layer name"),
        ({"alpha_pattern": {"": 4}}, "alpha_pattern has the key '', which is no layer name"),
        ({"rank_pattern": {"h[0]|x": 4}}, "rank_pattern has the key 'h[0]|x', which is no layer name"),
        (
            {"peft_type": "ADALORA", "r": 0, "x": 1},
            "peft_type is 'ADALORA', and only 'LORA' is accepted; x is set, which is not supported; "
            "r is 0, not a rank from 1 to 4096",
        ),
    ],
)
def test_settings_that_could_do_harm_are_refused(tmp_path, config, why):
    assert refusal(stored.write(tmp_path / "a", config)) == f"a/{CONFIG}: {why}."


@pytest.mark.parametrize("key", ["peft_type", "r", "lora_alpha"])
def test_settings_that_must_be_there(tmp_path, key):
    folder = stored.write(tmp_path / "a")
    (folder / CONFIG).write_text(json.dumps({name: value for name, value in stored.CONFIG.items() if name != key}))
    assert refusal(folder).startswith(f"a/{CONFIG}: {key} is missing")


@pytest.mark.parametrize("text", ["", "{", "nonsense", "[" * 100_000, '{"r": \ud83d}', "9" * 5000])
def test_a_config_that_is_no_json(tmp_path, text):
    folder = stored.write(tmp_path / "a")
    (folder / CONFIG).write_bytes(text.encode("utf-8", "surrogatepass"))
    assert refusal(folder).startswith(f"a/{CONFIG} is not readable as JSON: ")


def test_a_config_that_holds_no_settings_or_far_too_many(tmp_path):
    folder = stored.write(tmp_path / "a")
    (folder / CONFIG).write_text("[]")
    assert refusal(folder) == f"a/{CONFIG}: it holds no settings."
    (folder / CONFIG).write_text(" " * 10_000_001)
    assert refusal(folder) == f"a/{CONFIG} is too large to be what it is called."


# Weights


def test_weights_that_are_empty_or_cut_off(tmp_path):
    folder = stored.write(tmp_path / "a")
    whole = (folder / WEIGHTS).read_bytes()
    for data in (b"", whole[:5], whole[:300], b"\x80\x04pickle" * 10):
        (folder / WEIGHTS).write_bytes(data)
        assert refusal(folder) == (
            f"a/{WEIGHTS}: it is cut off, or no safetensors file. Restore it from where it came from."
        )
    (folder / WEIGHTS).write_bytes(whole[:-1])
    assert refusal(folder) == (
        f"a/{WEIGHTS}: it is cut off: base_model.model.{stored.MODULES[1]}.lora_B.weight ends beyond the file. "
        "Restore it from where it came from."
    )


def test_a_header_that_claims_gigabytes(tmp_path):
    folder = stored.write(tmp_path / "a")
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 8_000_000_000) + whole[8:])
    assert "it is cut off, or no safetensors file" in refusal(folder)
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    header[A]["shape"] = [4, 6_000_000_000]
    head = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(head)) + head + whole[8 + size :])
    assert refusal(folder) == (f"a/{WEIGHTS}: its header is wrong about {A}. Restore it from where it came from.")


def test_tensors_without_a_partner(tmp_path):
    for missing, letter in ((A, "A"), (B, "B")):
        weights = {name: tensor for name, tensor in stored.tensors().items() if name != missing}
        assert refusal(stored.write(tmp_path / "a", weights=weights)) == f"a/{WEIGHTS}: {MODULE} lacks lora_{letter}."


def test_tensors_that_share_no_rank(tmp_path):
    weights = stored.tensors() | {B: np.ones((18, 5), np.float32)}
    assert refusal(stored.write(tmp_path / "a", weights=weights)) == (
        f"a/{WEIGHTS}: {MODULE} has shapes (4, 6) and (18, 5), which share no rank."
    )
    weights = stored.tensors() | {B: np.ones(18, np.float32)}
    assert "(4, 6) and (18,), which share no rank" in refusal(stored.write(tmp_path / "a", weights=weights))


def test_tensors_of_another_rank_than_the_config_says(tmp_path):
    assert refusal(stored.write(tmp_path / "a", {"r": 8})) == (
        f"a/{WEIGHTS}: {MODULE} has rank 4, and {CONFIG} says 8; {stored.MODULES[1]} has rank 4, and {CONFIG} says 8."
    )
    assert store.read(stored.write(tmp_path / "a", {"r": 8, "rank_pattern": {"c_attn": 4}})).rank == 8


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "base_model.model.lm_head.weight",
        f"base_model.model.{MODULE}.weight",
        f"base_model.model.{MODULE}.lora_embedding_A",
        f"base_model.model.{MODULE}.lora_A.default.weight",
        f"base_model.model.{MODULE}.lora_A.bias",
        "base_model.model.a/b.lora_A.weight",
        f"base_model.model.{MODULE}.lora_A.weight\n",
    ],
)
def test_foreign_tensors(tmp_path, name):
    weights = stored.tensors() | {name: np.ones((4, 6), np.float32)}
    assert refusal(stored.write(tmp_path / "a", weights=weights)) == f"a/{WEIGHTS}: {name} is no part of a LoRA update."


def test_tensors_that_hold_no_fractions(tmp_path):
    weights = stored.tensors() | {A: np.ones((4, 6), np.int64)}
    assert refusal(stored.write(tmp_path / "a", weights=weights)) == f"a/{WEIGHTS}: {A} holds I64."


def test_no_tensors_at_all(tmp_path):
    assert refusal(stored.write(tmp_path / "a", weights={})) == f"a/{WEIGHTS}: it holds no LoRA update."


# Manifests


def test_a_manifest_with_several_problems_names_them_all(tmp_path):
    folder = stored.write(tmp_path / "a", facts=stored.manifest())
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["base"]["fingerprint"]
    manifest |= {"schema_version": 2, "extra": 1}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert refusal(folder) == (
        f"a/{MANIFEST}: schema_version: Input should be less than or equal to 1; base.fingerprint: Field required; "
        "extra: Extra inputs are not permitted."
    )
    (folder / MANIFEST).write_text("[]")
    assert refusal(folder).startswith(f"a/{MANIFEST}: it: Input should be a valid dictionary")
    (folder / MANIFEST).write_text("{")
    assert refusal(folder).startswith(f"a/{MANIFEST} is not readable as JSON: ")


# The library


@pytest.mark.parametrize("name", ["a", "Imdb-2_x", "a" * 64])
def test_names(name):
    assert store.valid_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "2x", "-a", "_a", ".a", "a.b", "a/b", "../a", "/tmp/a", "a b", "a\n", "é", "a" * 65]
)
def test_what_is_no_name(library, name):
    with pytest.raises(AdapterError) as error:
        store.valid_name(name)
    assert str(error.value) == f"'{name}' is no adapter name: a letter, then up to 63 letters, digits, '-' or '_'."
    with pytest.raises(AdapterError, match="is no adapter name"), library.writing(name):
        pytest.fail("it should not get here")
    assert not library.path.exists()


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
    with pytest.raises(AdapterError) as error:
        library.get("imdb")
    assert str(error.value) == f"There is no adapter 'imdb', neither in {library.path} (none yet) nor as a path."
    stored.write(library.path / "b")
    stored.write(library.path / "a")
    with pytest.raises(AdapterError, match=r"\(a, b\) nor as a path"):
        library.get("imdb")


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
    assert isinstance(found["bare"], AdapterError)


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
    with pytest.raises(AdapterError, match="exists: choose another --name"):
        put(library, "imdb", lambda _: stored.write(library.path / "imdb"), **OTHER)
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
    with pytest.raises(AdapterError, match="exists: choose another --name"):
        put(library, "imdb")
    assert tree(library.path) == cut_off


# Start-up


def test_the_store_never_imports_torch(library):
    stored.write(library.path / "imdb", facts=stored.manifest())
    program = """
import sys
from pathlib import Path
from lora_tuner.library import Library
library = Library(Path(sys.argv[1]))
(name, adapter), = library.entries()
adapter.facts(), library.get("imdb").modules
with library.writing("copy") as work:
    for file in adapter.path.iterdir():
        (work / file.name).write_bytes(file.read_bytes())
assert library.names() == ["copy", "imdb"]
print(*sorted({module.partition(".")[0] for module in sys.modules}))
"""
    command = [sys.executable, "-c", program, library.path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "pydantic" in loaded
    assert not loaded & {"torch", "transformers", "peft", "datasets", "numpy", "safetensors", "accelerate"}


# What is in an adapter, and its name


@pytest.fixture
def kept(tmp_path):
    stored.write(tmp_path / "adapters" / "imdb", facts=stored.manifest())
    for name in (store.RUN, store.METRICS, store.PLOT, store.CARD):
        (tmp_path / "adapters" / "imdb" / name).write_text("")
    return Library(tmp_path / "adapters")


def test_a_whole_adapter_has_no_problems(kept):
    assert store.verify(kept.get("imdb")) == []


def test_other_weights_than_the_manifest_knows(kept):
    weights = kept.path / "imdb" / WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert store.verify(kept.get("imdb")) == [f"{WEIGHTS} is not the file that {MANIFEST} was written for"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_numbers_that_are_not_finite(tmp_path, value, kind):
    weights = {name: tensor.astype(kind) for name, tensor in stored.tensors().items()}
    name = sorted(weights)[1]
    weights[name][0, 0] = value
    adapter = store.read(stored.write(tmp_path / "a", weights=weights))
    assert store.verify(adapter) == [f"{name} holds numbers that are not finite"]


@pytest.mark.parametrize(
    ("bits", "finite"), [(0x7F80, False), (0xFF80, False), (0x7FC0, False), (0x7F7F, True), (0, True)]
)
def test_bfloat16_is_looked_at_too(bits, finite):
    assert store._finite(np.array([0, bits], np.uint16).tobytes(), "BF16") is finite


def test_missing_pieces_are_named(kept):
    (kept.path / "imdb" / store.RUN).unlink()
    assert store.verify(kept.get("imdb")) == ["run.yaml is missing"]


@pytest.mark.parametrize("key", ["\\", "\\8", "a*", "(a+)+b", "["])
def test_pattern_keys_that_are_no_layer_names(tmp_path, key):
    stored.write(tmp_path / "a", config={"rank_pattern": {key: 4}})
    with pytest.raises(AdapterError, match="rank_pattern has the key"):
        store.read(tmp_path / "a")


def test_renaming(kept):
    assert kept.rename("imdb", "reviews").name == "reviews"
    assert kept.names() == ["reviews"]
    stored.write(kept.path / "other")
    with pytest.raises(AdapterError, match="other exists: choose another --name"):
        kept.rename("reviews", "other")
    with pytest.raises(AdapterError, match=r"There is no adapter 'imdb' in .*adapters \(other, reviews\)\."):
        kept.rename("imdb", "new")
    with pytest.raises(AdapterError, match="is no adapter name"):
        kept.rename("reviews", "../out")


def test_removing(kept):
    (kept.path / "notes").mkdir()
    with pytest.raises(AdapterError, match="notes is no adapter, so it is not removed"):
        kept.remove("notes")
    for name in ("../adapters", "nothing", ""):
        with pytest.raises(AdapterError, match=f"There is no adapter '{name}'"):
            kept.remove(name)
    kept.remove("imdb")
    assert [path.name for path in kept.path.iterdir()] == ["notes"]


def test_removing_a_link_leaves_what_it_points_to(kept, tmp_path):
    elsewhere = stored.write(tmp_path / "elsewhere")
    (kept.path / "linked").symlink_to(elsewhere)
    kept.remove("linked")
    assert (elsewhere / WEIGHTS).is_file()
    assert kept.names() == ["imdb"]
