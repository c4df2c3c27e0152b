"""Identity of a base, its tokenizer and its template: all that is loaded counts, and nothing else."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_tuner import ModelOptions, TrainConfig, atomic_io, resume, train
from lora_tuner.adapters.adapter import MANIFEST_FILE, Adapter, load_adapter_folder
from lora_tuner.errors import Notice, TrainingError, WrongBaseError
from lora_tuner.evaluation import gain_matrix
from lora_tuner.models import identity, lora
from lora_tuner.models.base_files import BaseModelFiles
from lora_tuner.models.loading import LoadedBase, load_base
from lora_tuner.models.resolve import find_base

from .. import adapter_files, model_families, tiny_models

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


@pytest.fixture
def base(tmp_path: Path, gpt2: Path) -> Path:
    """A copy of the base, to be changed."""
    return Path(shutil.copytree(gpt2, tmp_path / "base"))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    change(content)
    path.write_text(json.dumps(content))


def fingerprint(folder: Path) -> str:
    return find_base(str(folder)).fingerprint


def load(folder: Path) -> LoadedBase:
    return load_base(find_base(str(folder)), ModelOptions(device="cpu"))


# The config


@pytest.mark.parametrize(
    "change",
    [
        {"num_experts_per_tok": 1},
        {"final_logit_softcapping": 30.0},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"alibi": True},
        {"text_config": {"inner": {"experts_per_token": 1}}},
        {"made_up_next_year": [{"deep": None}]},
    ],
)
def test_any_config_setting_changes_fingerprint(base, gpt2, change):
    before = fingerprint(base)
    edit(base / "config.json", lambda config: config.update(change))
    assert fingerprint(base) != before
    if "text_config" in change:  # also what is changed inside
        before = fingerprint(base)
        edit(base / "config.json", lambda config: config["text_config"]["inner"].update(experts_per_token=2))
        assert fingerprint(base) != before


def test_neutral_config_settings_keep_fingerprint(base):
    edit(base / "config.json", lambda config: config.update(text_config={"n": 1}))
    before = fingerprint(base)
    neutral = {
        "transformers_version": "9",
        "_name_or_path": "elsewhere",
        "torch_dtype": "float16",
        "use_cache": False,
    }
    edit(base / "config.json", lambda config: config.update(neutral, text_config={"dtype": "float16", "n": 1}))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=3))
    assert fingerprint(base) == before


# The weights


def double(path: Path, target: Path) -> None:
    save_file({name: 2 * values for name, values in load_file(path).items()}, target, metadata={"format": "pt"})


def test_backup_beside_weights_is_not_hashed(base, gpt2):
    before = fingerprint(base)
    double(base / WEIGHTS, base / "original.safetensors")
    assert fingerprint(base) == before
    edit(base / "config.json", lambda config: config.update(transformers_weights="original.safetensors"))
    loaded, own = load(base).model.state_dict(), load(gpt2).model.state_dict()
    assert all(values.equal(own[name]) for name, values in loaded.items())
    edit(base / "config.json", lambda config: config.pop("transformers_weights"))
    (base / "original.safetensors").rename(base / WEIGHTS)
    assert fingerprint(base) != before


def test_index_decides_which_shards_are_hashed(base):
    before = fingerprint(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    (base / WEIGHTS).unlink()
    model.save_pretrained(base, max_shard_size="40KB")
    assert fingerprint(base) == before
    shard = sorted(base.glob("model-*.safetensors"))[0]
    double(shard, base / "original.safetensors")
    assert fingerprint(base) == before
    names = {shard.name: "original.safetensors"}
    edit(
        base / INDEX,
        lambda index: index.update(
            weight_map={key: names.get(file, file) for key, file in index["weight_map"].items()}
        ),
    )
    assert fingerprint(base) != before


# The tokenizer


def in_json(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "tokenizer.json", change)


def in_settings(**settings: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "tokenizer_config.json", lambda content: content.update(settings))


@pytest.mark.parametrize(
    "change",
    [
        in_json(lambda content: content["model"]["merges"].reverse()),
        in_json(lambda content: content.update(normalizer={"type": "Lowercase"})),
        in_json(lambda content: content["pre_tokenizer"].update(add_prefix_space=True)),
        in_json(lambda content: content.update(post_processor={"type": "ByteLevel", "add_prefix_space": True,
                                                                "trim_offsets": True, "use_regex": True})),
        in_json(lambda content: content["added_tokens"][0].update(lstrip=True)),
        in_settings(add_prefix_space=True),
        in_settings(add_bos_token=True),
        in_settings(made_up_next_year=1),
    ],
)  # fmt: skip
def test_any_part_of_tokenizer_changes_hash(base, gpt2, change):
    change(base)
    assert load(base).tokenizer_hash != load(gpt2).tokenizer_hash


def test_neutral_tokenizer_settings_keep_hash(base, gpt2):
    in_settings(model_max_length=7, padding_side="left", chat_template=TEMPLATE, name_or_path="elsewhere")(base)
    in_json(lambda content: content.update(padding=None, truncation={"max_length": 5, "stride": 0,
            "strategy": "LongestFirst", "direction": "Right"}))(base)  # fmt: skip
    for name in ("tokenizer.model", "tokenizer.orig.json"):
        (base / name).write_text("not read beside tokenizer.json")
    assert load(base).tokenizer_hash == load(gpt2).tokenizer_hash


def test_files_of_slow_tokenizer_count(tmp_path):
    names = ("vocab.json", "merges.txt")
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    before = identity.tokenizer_hash(tmp_path, names, is_fast=True)
    for name in ("merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"):
        (tmp_path / name).write_text('{"b": 1}')
        after = identity.tokenizer_hash(tmp_path, names, is_fast=True)
        assert after != before
        before = after
    (tmp_path / "notes.txt").write_text("no part of it")
    assert identity.tokenizer_hash(tmp_path, names, is_fast=True) == before


def test_vocabulary_that_class_does_not_name_counts(tmp_path):
    """Gemma's class names tokenizer.json alone, and is made from tokenizer.model without one."""
    hashes = set()
    for content in ("one", "other"):
        (tmp_path / "tokenizer.model").write_text(content)
        hashes.add(identity.tokenizer_hash(tmp_path, ["tokenizer.json"], is_fast=True))
    assert len(hashes) == 2


# Adapters and runs


@pytest.fixture
def mixture(tmp_path: Path, settings: Callable[..., TrainConfig]) -> Callable[..., TrainConfig]:
    """Settings of a run on a mixture with two experts per token, in the folder `mixture`."""
    model_families.save_family(tmp_path / "mixture", "qwen3_moe")
    return lambda **changes: settings(**{"base": "mixture", "max_length": 32, "max_steps": 2} | changes)


def use_one_expert(folder: Path = Path("mixture")) -> None:
    edit(folder / "config.json", lambda config: config.update(num_experts_per_tok=1))


def test_other_experts_per_token_are_refused(mixture):
    adapter = train(mixture())
    options = ModelOptions(device="cpu")
    before = gain_matrix.evaluate([adapter], options=options).cells[0][0]
    use_one_expert()
    with pytest.raises(WrongBaseError, match=r"^reviews was trained on mixture \(fingerprint "):
        gain_matrix.evaluate([adapter], options=options)
    forced = gain_matrix.evaluate([adapter], options=ModelOptions(device="cpu", force=True)).cells[0][0]
    assert forced.base_loss != before.base_loss
    assert forced.loss != before.loss


def test_other_experts_per_token_stop_resume(mixture, stop_at):
    with stop_at(1):
        train(mixture())
    use_one_expert()
    with pytest.raises(
        TrainingError, match=r"changed since it stopped: base \(was \w{12}, is \w{12}\)\. Restore it"
    ):
        resume("reviews")


@pytest.mark.parametrize("change", [in_settings(add_prefix_space=True), in_json(
    lambda content: content["pre_tokenizer"].update(add_prefix_space=True))])  # fmt: skip
def test_other_tokenizer_stops_resume(base, settings, stop_at, change):
    with stop_at(1):
        train(settings(base="base", max_steps=2))
    change(base)
    with pytest.raises(TrainingError, match=r"^runs/reviews cannot be resumed exactly: .*: tokenizer \(was "):
        resume("reviews")


def test_other_encoded_rows_stop_resume(settings, stop_at, monkeypatch):
    """Such as those of a chat template that writes the day."""
    with stop_at(1):
        train(settings(max_steps=2))
    monkeypatch.setattr("lora_tuner.data.tokenization.encoded_hash", lambda rows: "0" * 64)
    with pytest.raises(
        TrainingError, match=r"changed since it stopped: rows as tokens \(was \w{12}, is 0{12}\)\."
    ):
        resume("reviews")


def test_chat_template_counts_for_conversations(base, settings, tmp_path):
    in_settings(chat_template=TEMPLATE)(base)
    rows = [
        {"messages": [{"role": "user", "content": text[:9]}, {"role": "assistant", "content": text}]}
        for text in tiny_models.reviews(40)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = train(settings(base="base", max_steps=1))
    talks = train(settings(base="base", max_steps=1, dataset="chats.jsonl", name="talks"))
    lora.check_base(talks, load(base))
    in_settings(chat_template=TEMPLATE.replace(": ", "> "))(base)
    lora.check_base(text, load(base))
    with pytest.raises(WrongBaseError, match=r"^talks was trained with another chat template than that of "):
        lora.check_base(talks, load(base))


# Manifests of schema 1


def as_schema_1(folder: Path, base: LoadedBase) -> None:
    """Rewrite the manifest of a folder as an older version wrote it."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["schema_version"] = 1
        manifest["base"] = base.info(with_template=False, schema_version=1).model_dump(exclude={"chat_template"})
        del manifest["data"]["encoded_hash"]

    edit(folder / MANIFEST_FILE, change)


def check(adapter: Adapter, base: LoadedBase) -> list[str]:
    notices: list[Any] = []
    lora.check_base(load_adapter_folder(adapter.path), base, ModelOptions(notify=notices.append))
    return [notice.text for notice in notices]


def test_schema_1_is_compared_by_its_rule(adapter, base, gpt2):
    assert adapter.manifest.schema_version == 2
    as_schema_1(adapter.path, load(base))
    said = (
        "reviews is of an older version, whose manifest says less about the base: of {} the weights, some settings and "
        "the vocabulary were compared."
    )
    assert check(adapter, load(gpt2)) == [said.format(gpt2)]
    edit(base / "config.json", lambda config: config.update(note="unseen"))
    in_settings(add_prefix_space=True)(base)
    assert check(adapter, load(base)) == [said.format(base)]
    edit(base / "config.json", lambda config: config.update(layer_norm_epsilon=0.5))
    with pytest.raises(WrongBaseError, match=r"^reviews was trained on "):
        check(adapter, load(base))


def test_schema_1_hashes_are_as_before(tmp_path, gpt2):
    folder = adapter_files.write_base(tmp_path / "old", {"a": (2, 3)}, {"b": (4,)})
    (folder / "config.json").write_text('{"n_head": 2, "rope_theta": 1e4, "note": {"x": 1}}')
    files = BaseModelFiles("old", "old", folder, None, "")
    assert files.schema_1_fingerprint == "1416761f28101d24306cce5900b69d562cec9262e6a53b8cfa45a7a28ecdb663"
    vocabulary = sorted(tiny_models.tokenizer().get_vocab().items())
    expected = hashlib.sha256(json.dumps([vocabulary, [0, 0]]).encode()).hexdigest()
    assert load(gpt2).info(with_template=False, schema_version=1).tokenizer == expected


def test_run_of_schema_1_is_resumed(settings, stop_at, gpt2):
    whole = load_file(train(settings(name="whole")).path / "adapter_model.safetensors")
    with stop_at(2):
        train(settings())
    for folder in (Path("runs/reviews"), Path("runs/reviews/checkpoint-2")):
        as_schema_1(folder, load(gpt2))
    hashes = Path("runs/reviews/checkpoint-2/whole.json")
    hashes.unlink()
    atomic_io.write_hashes(hashes.parent)
    notices: list[Any] = []
    adapter = resume("reviews", notify=notices.append)
    assert adapter.manifest.schema_version == 2
    resumed = load_file(adapter.path / "adapter_model.safetensors")
    assert all(resumed[name].equal(values) for name, values in whole.items())
    assert any(
        isinstance(notice, Notice) and notice.text.startswith("runs/reviews was begun by an older version")
        for notice in notices
    )
