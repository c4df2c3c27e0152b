"""Adopting an adapter of another tool copies it and ties it to its base, or changes nothing."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lora_tuner import ModelOptions, atomic_io
from lora_tuner.adapters.adapter import (
    CARD_FILE,
    CONFIG_FILE,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    load_adapter_folder,
    verify_adapter,
)
from lora_tuner.adapters.library import Library
from lora_tuner.convert.adopt import adopt
from lora_tuner.convert.merge import merge
from lora_tuner.errors import BaseModelError, HubError, Notice, WrongBaseError
from lora_tuner.inference.multi_lora import MultiLora
from lora_tuner.models import lora
from lora_tuner.models.base_files import BaseModelFiles
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base

from .. import adapter_files, tiny_models
from ..adapters.test_library import HEAVY, INVALID_NAME, loaded_by, refusal, tree
from ..parameters import sampled

IDS = torch.arange(7, 107).reshape(5, 20)


@pytest.fixture
def library(tmp_path):
    return Library(tmp_path / "adapters")


def peft_adapter(base, folder, **changes):
    """An adapter with random weights, as PEFT writes it."""
    model = AutoModelForCausalLM.from_pretrained(base)
    gpt2 = model.config.model_type == "gpt2"
    settings = {
        "task_type": "CAUSAL_LM",
        "r": 4,
        "target_modules": ["c_attn", "mlp.c_proj"] if gpt2 else ["q_proj", "v_proj", "down_proj"],
        "fan_in_fan_out": gpt2,
        "init_lora_weights": False,
    }
    get_peft_model(model, LoraConfig(**settings | changes)).save_pretrained(folder)
    return folder


PATTERNS = {r"(?:self_attn|attn)\.\w+": 6, r".*\.0\..*": 2}  # in the order in which PEFT saves them
PEFT_SETTINGS = {  # with the names of the settings that are ignored
    "no task type": ({"task_type": None}, "auto_mapping"),
    "layers_to_transform": ({"layers_to_transform": [1]}, "layers_to_transform"),
    "layers_pattern": (
        {"layers_to_transform": 0, "layers_pattern": "{list}"},
        "layers_pattern, layers_to_transform",
    ),
    "exclude_modules": ({"exclude_modules": r".*\.1\.mlp\..*"}, "exclude_modules"),
    "targets by a pattern": ({"target_modules": r".*\.[01]\.mlp\.\w+_proj"}, None),
    "all-linear": ({"target_modules": "all-linear"}, None),
    "patterns of ranks": (
        {"rank_pattern": PATTERNS, "alpha_pattern": {r".*attn\.\w+": 3, "[a-z_.0-9]+": 5}},
        None,
    ),
    "patterns, rsLoRA": ({"rank_pattern": PATTERNS, "use_rslora": True}, None),
    "DoRA, patterns": ({"rank_pattern": PATTERNS, "use_dora": True}, None),
    "loftq_config": ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
}


@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA", "ignore:`loftq_config` specified")
@pytest.mark.parametrize("way", sampled(PEFT_SETTINGS, 2))
def test_peft_settings_keep_peft_logits(way, model_folder, library, tmp_path):
    settings, ignored = PEFT_SETTINGS[way]
    layer_list = "h" if model_folder.name == "gpt2" else "layers"
    if "layers_pattern" in settings:
        settings = settings | {"layers_pattern": layer_list}
    folder = peft_adapter(model_folder, tmp_path / "elsewhere" / "theirs", **settings)
    if "loftq_config" in settings:  # PEFT leaves it out with plain initialization
        config = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps(config | settings))
    plain = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        before = plain(IDS).logits
        expected = PeftModel.from_pretrained(plain, folder).eval()(IDS).logits
    assert (expected - before).abs().max() > 0.01
    notices = []
    adopted = adopt(library, folder, notify=notices.append)
    note = f" Ignored, as its tensors say it all: {ignored}." if ignored else ""
    assert notices[-1].text.endswith(f"it cannot be verified that it was trained on it.{note}")
    base = load_base(find_base(str(model_folder)))
    multi_lora = MultiLora(base)
    with torch.no_grad(), multi_lora.apply_hooks(multi_lora.hooks([multi_lora.load(adopted)])):
        torch.testing.assert_close(base.model(IDS).logits, expected)
    with torch.no_grad():
        wrapped = lora.load_lora(base.model, adopted, "mine")
        torch.testing.assert_close(wrapped(IDS).logits, expected)
    merge(adopted, tmp_path / "merged", sets=[])
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(IDS).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture
def theirs(model_folder, tmp_path):
    return peft_adapter(model_folder, tmp_path / "elsewhere" / "theirs")


@pytest.fixture
def workspace(tmp_path):
    """A folder with a minimal base and an adapter that names it."""
    adapter_files.write_base(tmp_path / "base", {f"{module}.weight": (6, 18) for module in adapter_files.MODULES})
    adapter_files.write(tmp_path / "theirs", {"base_model_name_or_path": "base"})
    return tmp_path


def test_adopt_copies_and_writes_manifest(theirs, model_folder, library):
    before = tree(theirs)
    notices = []
    adapter = adopt(library, theirs, notify=notices.append)
    assert adapter.path == library.path / "theirs"
    assert tree(theirs) == before
    assert set(before) == {CONFIG_FILE, WEIGHTS_FILE, CARD_FILE}
    assert tree(library.path) == {"theirs": None} | {
        f"theirs/{name}": data
        for name, data in (before | {MANIFEST_FILE: (adapter.path / MANIFEST_FILE).read_bytes()}).items()
    }
    manifest = json.loads((adapter.path / MANIFEST_FILE).read_text())
    assert len(manifest.pop("created")) == len("2025-01-02T03:04:05+00:00")
    source = find_base(str(model_folder))
    assert manifest == {
        "schema_version": 2,
        "base": {
            "name": str(model_folder),
            "repo": str(model_folder),
            "revision": None,
            "weights": "a local folder",
            "fingerprint": source.fingerprint,
            "tokenizer": None,
            "chat_template": None,
        },
        "data": None,
        "run": None,
        "made_by": None,
        "parents": [],
        "result": None,
        "general": None,
        "probes": None,
        "routing": None,
        "preference": None,
        "labels": None,
        "weights": {
            "sha256": atomic_io.sha256_file(theirs / WEIGHTS_FILE),
            "bytes": (theirs / WEIGHTS_FILE).stat().st_size,
            "parameters": adapter.parameters,
            "config": atomic_io.sha256_file(theirs / CONFIG_FILE),
        },
        "versions": {},
    }
    assert verify_adapter(adapter) == []
    assert notices == [
        Notice(
            "theirs fits "
            + str(model_folder)
            + " by its layer sizes; it cannot be verified that it was trained on it."
        )
    ]


def test_adopted_adapter_rejects_other_base(theirs, model_folder, library, tmp_path):
    from lora_tuner.models import lora

    right = load_base(find_base(str(model_folder)), ModelOptions(device="cpu"))
    kind = "gpt2" if "gpt2" in str(model_folder) else "llama"
    other = load_base(
        find_base(str(tiny_models.save_model(tmp_path / "other", kind, seed=7))), ModelOptions(device="cpu")
    )
    notices = []
    lora.check_base(load_adapter_folder(theirs), other, options=ModelOptions(notify=notices.append))
    assert notices == [
        Notice(f"theirs has no manifest, so only its shapes can be compared with {tmp_path / 'other'}.")
    ]
    adapter = adopt(library, theirs)
    lora.check_base(adapter, right, options=ModelOptions(notify=pytest.fail))
    assert refusal(lora.check_base, adapter, other, kind=WrongBaseError) == (
        f"theirs was trained on {model_folder} (fingerprint {right.files.fingerprint[:12]}, a local folder), not on "
        f"{tmp_path / 'other'} (fingerprint {other.files.fingerprint[:12]}, a local folder). "
        "Name the right base with --base, or use --force to try it anyway."
    )


def test_adopt_in_place(workspace, library):
    for number, source in enumerate(("one", library.path / "two", "adapters/three")):
        name = ("one", "two", "three")[number]
        shutil.copytree(workspace / "theirs", library.path / name)
        before = tree(library.path)
        adapter = adopt(library, source)
        assert adapter.path == library.path / name
        assert adapter.manifest.base.name == "base"
        after = tree(library.path)
        assert json.loads(after.pop(f"{name}/{MANIFEST_FILE}"))["weights"]["sha256"] == adapter.sha256
        assert after == before


def test_adopt_with_name(workspace, library):
    assert adopt(library, "theirs", "mine").name == "mine"
    assert adopt(library, workspace / "theirs").name == "theirs"
    assert library.names() == ["mine", "theirs"]
    (workspace / "theirs").rename(workspace / "their.adapter")
    assert adopt(library, "their.adapter", "ours").name == "ours"


def test_adopt_base_option_wins(workspace, library):
    adapter_files.write(workspace / "theirs", {"base_model_name_or_path": "nobody/nothing"})
    assert adopt(library, "theirs", "other", base="base").manifest.base.name == "base"
    adapter_files.write(workspace / "theirs", {"base_model_name_or_path": None})
    assert adopt(library, "theirs", "silent", base=str(workspace / "base")).manifest.base.name == str(
        workspace / "base"
    )


def test_adopt_copies_only_adapter_files(workspace, library):
    adopt(library, "theirs", "bare")
    assert {path.name for path in (library.path / "bare").iterdir()} == {CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE}
    (workspace / "theirs" / CARD_FILE).write_text("# Theirs")
    for name in ("optimizer.pt", "training_args.bin", "tokenizer.json", "chat_template.jinja"):
        (workspace / "theirs" / name).write_text(name)
    (workspace / "theirs" / "checkpoint-1").mkdir()
    adopt(library, "theirs", "carded")
    assert {path.name for path in (library.path / "carded").iterdir()} == {
        CONFIG_FILE,
        WEIGHTS_FILE,
        MANIFEST_FILE,
        CARD_FILE,
        "tokenizer.json",
        "chat_template.jinja",
    }
    assert (library.path / "carded" / CARD_FILE).read_text() == "# Theirs"


def test_adopt_follows_links_into_hub_cache_only(workspace, library):
    repo = workspace / "models--theirs"
    (repo / "blobs").mkdir(parents=True)
    (repo / "snapshots").mkdir()
    folder = shutil.copytree(workspace / "theirs", repo / "snapshots" / "abc")
    (repo / "blobs" / "1").write_text("{{ messages }}")
    (workspace / "secret").write_text("secret")
    (folder / "chat_template.jinja").symlink_to("../../blobs/1")
    (folder / "vocab.json").symlink_to(workspace / "secret")
    adopted = adopt(library, folder, "cached")
    assert (adopted.path / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not (adopted.path / "vocab.json").exists()


def test_adopt_resolves_symlinks(workspace, library):
    snapshot = workspace / "snapshots" / "theirs"
    snapshot.mkdir(parents=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (snapshot / name).symlink_to(workspace / "theirs" / name)
    adapter = adopt(library, snapshot)
    assert not any(path.is_symlink() for path in adapter.path.iterdir())
    shutil.rmtree(workspace / "theirs")
    assert verify_adapter(library.get("theirs")) == []


@pytest.mark.parametrize("shape", [(6, 18), (18, 6)])
@pytest.mark.parametrize("first", ["transformer.", ""])
def test_adopt_with_shortened_tensor_names(tmp_path, library, first, shape):
    """GPT-2 on the Hub names transformer.h.0.attn.c_attn h.0.attn.c_attn."""
    names = [module.replace("transformer.", first) for module in adapter_files.MODULES]
    others = {
        f"{first}wte.weight": (50, 6),
        f"{first}h.0.attn.c_attn.bias": (18,),
        f"{first}h.0.ln_1.weight": (6,),
    }
    adapter_files.write_base(
        tmp_path / "base", {f"{names[0]}.weight": shape} | others, {f"{names[1]}.weight": shape}
    )
    adapter_files.write(tmp_path / "theirs", {"base_model_name_or_path": "base"})
    adapter = adopt(library, "theirs")
    assert adapter.manifest.base.fingerprint == BaseModelFiles("", "", tmp_path / "base", None, "").fingerprint


def test_adopted_adapter_loads_on_headless_base(tmp_path, gpt2, library):
    from safetensors.numpy import load_file, save_file

    from lora_tuner.models import lora

    headless = Path(shutil.copytree(gpt2, tmp_path / "headless"))
    tensors = load_file(headless / "model.safetensors")
    save_file(
        {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()},
        headless / "model.safetensors",
        metadata={"format": "pt"},
    )
    adapter = adopt(library, peft_adapter(headless, tmp_path / "theirs"))
    base = load_base(find_base(str(headless)), ModelOptions(device="cpu"))
    lora.check_base(adapter, base, options=ModelOptions(notify=pytest.fail))
    assert lora.load_lora(base.model, adapter, "slot0").active_adapters == ["slot0"]


# Rejected adapters


def with_manifest(workspace):
    adapter_files.write(workspace / "theirs", facts=adapter_files.manifest())
    return {}, "theirs has a manifest: there is nothing to adopt."


def in_library_with_name(workspace):
    (workspace / "adapters").mkdir()
    (workspace / "theirs").rename(workspace / "adapters" / "theirs")
    return {"folder": "theirs", "name": "mine"}, (
        f"{workspace}/adapters/theirs is in the library already: leave out --name, or use `adapters rename`."
    )


def damaged(workspace):
    weights = adapter_files.tensors()
    for tensor in weights.values():
        tensor[0, 0] = np.nan
    adapter_files.write(workspace / "theirs", {"base_model_name_or_path": "base"}, weights)
    problems = "; ".join(f"{name} has values that are not finite" for name in sorted(weights)[:3])
    return {}, f"theirs is damaged: {problems}."


def without_base(workspace):
    adapter_files.write(workspace / "theirs", {"base_model_name_or_path": None})
    return {}, "theirs does not name its base: give it with --base."


def with_taken_name(workspace):
    """Checked before the base is looked up."""
    adapter_files.write(workspace / "adapters" / "theirs")
    adapter_files.write(workspace / "theirs", {"base_model_name_or_path": "nobody/nothing"})
    return {}, f"{workspace}/adapters/theirs exists: choose another --name."


def renamed_to_taken_name(workspace):
    (workspace / "adapters" / "photos").mkdir(parents=True)
    return {"name": "photos"}, f"{workspace}/adapters/photos exists: choose another --name."


def renamed_to_invalid_name(workspace):
    return {"name": "../mine"}, f"'../mine' {INVALID_NAME}"


def with_other_sizes(workspace):
    modules = [f"transformer.h.{number}.attn.c_attn" for number in range(5)]
    adapter_files.write_base(workspace / "wider", {f"{module}.weight": (8, 24) for module in modules})
    adapter_files.write(workspace / "theirs", weights=adapter_files.tensors(4, modules))
    problems = "; ".join(f"{module} is 24 -> 8 in the base, 6 -> 18 in the adapter" for module in modules[:3])
    return {"base": "wider"}, f"theirs does not fit the base: {problems}, and 2 more."


def with_unknown_layer(workspace):
    adapter_files.write(
        workspace / "theirs",
        weights=adapter_files.tensors(4, [*adapter_files.MODULES, "transformer.h.2.attn.c_attn"]),
    )
    return {"base": "base"}, (
        "theirs does not fit the base: the base has no linear layer transformer.h.2.attn.c_attn."
    )


def on_vector_weights(workspace):
    adapter_files.write_base(workspace / "odd", {f"{module}.weight": (18,) for module in adapter_files.MODULES})
    problems = "; ".join(f"the base has no linear layer {module}" for module in adapter_files.MODULES)
    return {"base": "odd"}, f"theirs does not fit the base: {problems}."


@pytest.mark.parametrize(
    "spoil",
    [
        with_manifest,
        in_library_with_name,
        damaged,
        without_base,
        with_taken_name,
        renamed_to_taken_name,
        renamed_to_invalid_name,
        with_other_sizes,
        with_unknown_layer,
        on_vector_weights,
    ],
)
def test_failed_adopt_changes_nothing(workspace, library, spoil):
    options, message = spoil(workspace)
    before = tree(workspace)
    options = {"folder": "./theirs"} | options  # a name alone would mean the one of the library
    assert refusal(adopt, library, **options, notify=pytest.fail) == message
    assert tree(workspace) == before


@pytest.mark.parametrize(
    ("base", "kind", "message"),
    [
        (
            "nobody/nothing",
            HubError,
            "nobody/nothing is not cached, and the Hub is out of reach: HF_HUB_OFFLINE is set. `doctor` lists the bases "
            "available without the Hub; a local folder works too.",
        ),
        (
            "distilgpt2",  # named, so no other takes its place
            HubError,
            "distilbert/distilgpt2 is not cached, and the Hub is out of reach: HF_HUB_OFFLINE is set. `doctor` lists the bases "
            "available without the Hub; a local folder works too.",
        ),
        ("/nowhere/base", BaseModelError, "There is no folder /nowhere/base."),
        (
            "theirs",
            BaseModelError,
            "The folder theirs is not a model: it has no config.json, it holds an adapter. Name that with --adapter or "
            "--from, and its base with --base.",
        ),
    ],
)
@pytest.mark.parametrize("source", ["config", "option"])
def test_adopt_missing_base_changes_nothing(workspace, library, base, kind, message, source):
    adapter_files.write(workspace / "theirs", {"base_model_name_or_path": base if source == "config" else "base"})
    before = tree(workspace)
    if source == "config":
        message = (
            f"theirs was trained on the base {base} (named in its adapter_config.json), which cannot be used here: "
            f"{message} Name a copy of it with --base."
        )
    assert refusal(adopt, library, "theirs", base=base if source == "option" else None, kind=kind) == message
    assert tree(workspace) == before


def test_adopt_revision_of_local_base_fails(workspace, library):
    before = tree(workspace)
    assert refusal(adopt, library, "theirs", revision="main", kind=BaseModelError) == (
        "base is not on the Hub, so it has no revision 'main': leave --revision out."
    )
    assert tree(workspace) == before


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("file", [WEIGHTS_FILE, CONFIG_FILE, CARD_FILE])
def test_adopt_interrupted_copy_leaves_nothing(workspace, library, monkeypatch, file, kind):
    (workspace / "theirs" / CARD_FILE).write_text("# Theirs")
    library.path.mkdir()
    copy = shutil.copyfile

    def fail(source, target):
        if Path(source).name == file:
            raise kind
        return copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", fail)
    before = tree(workspace)
    with pytest.raises(kind):
        adopt(library, "theirs")
    assert tree(workspace) == before


def test_adopt_corrupt_copy_fails(workspace, library, monkeypatch):
    library.path.mkdir()
    before = tree(workspace)

    def flip_a_bit(source, target):
        data = bytearray(source.read_bytes())
        data[-1] ^= source.name == WEIGHTS_FILE
        target.write_bytes(data)

    monkeypatch.setattr(shutil, "copyfile", flip_a_bit)
    assert refusal(adopt, library, "theirs") == (
        f"{library.path / 'theirs'} was not saved: the disk returned other weights than were written."
    )
    assert tree(workspace) == before


def test_adopt_never_imports_torch(theirs, library):
    program = """
from pathlib import Path
from lora_tuner.adapters.adapter import verify_adapter
from lora_tuner.adapters.library import Library
from lora_tuner.convert.adopt import adopt
adapter = adopt(Library(Path(sys.argv[1])), sys.argv[2])
assert verify_adapter(adapter) == []
assert Library(Path(sys.argv[1])).ancestors(adapter) == []
"""
    loaded = loaded_by(program, library.path, theirs)
    assert "numpy" in loaded
    assert not loaded & HEAVY - {"safetensors"}
    assert library.names() == ["theirs"]


def test_adopt_symlink_in_place_fails(workspace, library):
    library.path.mkdir()
    (library.path / "linked").symlink_to(workspace / "theirs")
    before = tree(workspace)
    assert refusal(adopt, library, "linked") == (
        f"{library.path}/linked is a symlink: adopt {workspace}/theirs under another --name."
    )
    assert tree(workspace) == before


def test_adopt_invalid_folder_name_fails(workspace, library):
    shutil.copytree(workspace / "theirs", library.path / "no.name")
    before = tree(workspace)
    assert refusal(adopt, library, library.path / "no.name") == f"'no.name' {INVALID_NAME}"
    assert tree(workspace) == before


def test_adopt_revision_belongs_to_base(workspace, library):
    adapter_files.write(workspace / "theirs", {"base_model_name_or_path": "someone/base", "revision": "main"})
    assert adopt(library, "theirs", base="base").manifest.base.revision is None


def test_adopted_manifest_is_world_readable(workspace, library):
    shutil.copytree(workspace / "theirs", library.path / "a")
    assert (adopt(library, "a").path / MANIFEST_FILE).stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("file", "text"), [("model-1.safetensors", "x"), ("config.json", "{"), ("model.safetensors.index.json", "{")]
)
def test_adopt_broken_base_fails_cleanly(workspace, library, file, text):
    (workspace / "base" / file).write_text(text)
    with pytest.raises(BaseModelError):
        adopt(library, "theirs")


def test_adopt_base_in_missing_home(workspace, library):
    adapter_files.write(workspace / "theirs", {"base_model_name_or_path": "~nosuchuser/base"})
    with pytest.raises(BaseModelError):
        adopt(library, "theirs")


def test_adopt_error_shows_layer_sizes(gpt2, library, theirs, tmp_path):
    kind = "gpt2" if "transformer" in load_adapter_folder(theirs).modules[0] else "llama"
    wider = tiny_models.save_model(tmp_path / "wider", kind, width=48)
    module = {"gpt2": "c_attn is 48 -> 144", "llama": "down_proj is 96 -> 48"}[kind]
    assert f"{module} in the base" in refusal(adopt, library, theirs, base=str(wider))


def test_adopt_ignores_symlinked_card(workspace, library):
    (workspace / "secret").write_text("SECRET")
    (workspace / "theirs" / CARD_FILE).unlink(missing_ok=True)
    (workspace / "theirs" / CARD_FILE).symlink_to(workspace / "secret")
    assert not (adopt(library, "theirs").path / CARD_FILE).exists()


def test_adopt_lm_head_adapter_fails(gpt2, library, tmp_path):
    weights = adapter_files.tensors(4, ["lm_head"])
    adapter_files.write(tmp_path / "head", weights=weights)
    width = next(iter(weights.values())).shape[1]
    adapter_files.write_base(tmp_path / "untied", {"lm_head.weight": (18, width)})
    config = json.loads((tmp_path / "untied" / "config.json").read_text())
    (tmp_path / "untied" / "config.json").write_text(json.dumps(config | {"vocab_size": 18}))
    assert refusal(adopt, library, tmp_path / "head", base=str(tmp_path / "untied")) == (
        f"{tmp_path}/head does not fit the base: the base has no linear layer lm_head (the output head, which is not "
        "adapted here: merge it with PEFT's merge_and_unload, and give the result as --base)."
    )
