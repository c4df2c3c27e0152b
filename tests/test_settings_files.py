"""Settings in YAML: how values are read and written, and files of before."""

import json
import os
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from lora_tuner import Generator, Library, ModelOptions, hub, push, resume, train
from lora_tuner.adapters.adapter import MANIFEST_FILE, RUN_FILE, WEIGHTS_FILE, verify_adapter
from lora_tuner.cli.app import app
from lora_tuner.config import STOP_RULES, SamplingParams, TrainConfig
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base
from lora_tuner.settings_files import RENAMED_SETTINGS, config_to_yaml, resolve_settings
from lora_tuner.training.checkpoints import HASHES_FILE, finalize, list_checkpoints

from .test_config import refusal


@pytest.fixture
def run_yaml(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_yaml_1e_3_is_a_number(run_yaml):
    assert yaml.safe_load("1e-3") == "1e-3"  # PyYAML reads it as text
    assert resolve_settings(TrainConfig, {}, run_yaml("learning_rate: 1e-3")).learning_rate == 0.001


def test_yaml_boolean_is_refused(run_yaml):
    path = run_yaml("rank: true\nname: False\npacking: off")
    assert refusal({}, file=path) == (
        f"{path}: rank: true and false are not valid here (got True); name: true and false are not valid here (got False)"
    )


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("learning_rate: 1e-3", 0.001),
        ("minutes: 1.5e+1", 15),
        ("max_rows: 1_000", 1000),
        ("max_rows: 0x10", 16),
        ("max_rows: 08", 8),
        ("packing: no", False),
        ("packing: Off", False),
        ("streaming: yes", True),
        ("gradient_checkpointing: on", "on"),
        ("name: no", "no"),
        ("revision: 2024-01-02", "2024-01-02"),
        ("split_salt: 1:30", "1:30"),
        ("split_salt: 1e5", "1e5"),
        ("split_salt: <<", "<<"),
        ("text_column: ~", None),
    ],
)
def test_yaml_value_is_read_as_meant(run_yaml, line, value):
    read = getattr(resolve_settings(TrainConfig, {}, run_yaml(line)), line.partition(":")[0])
    assert (read, type(read)) == (value, type(value)) or read == pytest.approx(value)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("rank: 010", "cannot be read as YAML: line 1: 010 is 8 for some programs and 10 for others"),
        ("seed: -0_17", "cannot be read as YAML: line 1: -0_17 is -15 for some programs and -17"),
        (
            "minutes: 1:30",
            "minutes: input should be a valid number (got '1:30')",
        ),
        ("minutes: 1:30.5", "minutes: input should be a valid number"),
        ("max_steps: 0b11", "max_steps: input should be a valid integer"),
        ("max_steps: 0o17", "max_steps: input should be a valid integer"),
        ("max_steps: 2024-01-02", "max_steps: input should be a valid integer"),
        ("rank: yes", "rank: input should be a valid integer"),
        ("packing: 2024-01-02", "packing: input should be a valid boolean"),
        ("<<: {rank: 4}", "<<: unknown setting"),
    ],
)
def test_ambiguous_yaml_value_is_refused(run_yaml, line, why):
    assert why in refusal({}, file=run_yaml(line))


def test_problems_name_the_file(run_yaml):
    path = run_yaml("rang: 8\nrank: eight")
    assert refusal({}, file=path) == (
        f"{path}: rank: input should be a valid integer (got 'eight'); rang: unknown setting"
    )


def test_many_problems_are_counted(run_yaml):
    path = run_yaml("\n".join(f"setting{number}: 1" for number in range(20_000)))
    message = refusal({}, file=path)
    assert message.startswith(f"{path}: setting0: unknown setting; setting1: unknown setting; ")
    assert message.endswith("; and 19,990 more problems")


def test_given_settings_override_file(run_yaml):
    path = run_yaml("rank: 4\nseed: 3\nwhere: [label=1]")
    config = resolve_settings(TrainConfig, {"rank": 16, "where": ["label=0"]}, path)
    assert (config.rank, config.seed, config.where) == (16, 3, ["label=0"])


@pytest.mark.parametrize("in_file", STOP_RULES)
@pytest.mark.parametrize("given", STOP_RULES)
def test_given_stop_rule_replaces_files(run_yaml, in_file, given):
    config = resolve_settings(TrainConfig, {given: 7}, run_yaml(f"{in_file}: 5"))
    assert {name: getattr(config, name) for name in STOP_RULES} == dict.fromkeys(STOP_RULES) | {given: 7}


def test_file_stop_rule_stays(run_yaml):
    assert resolve_settings(TrainConfig, {"rank": 2}, run_yaml("max_steps: 5")).max_steps == 5


def test_file_with_two_stop_rules(run_yaml):
    path = run_yaml("max_steps: 5\nminutes: 1")
    assert refusal({}, file=path) == f"{path}: max_steps and minutes contradict each other: give one of them"
    assert resolve_settings(TrainConfig, {"epochs": 1}, path).epochs == 1


@pytest.mark.parametrize("text", ["", "- rank\n- 8\n", "rank", "# nothing\n"])
def test_file_without_settings_is_refused(run_yaml, text):
    path = run_yaml(text)
    assert refusal({}, file=path) == f"{path} holds no settings: expected one `name: value` per line."


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("rank: [", "while parsing a flow node"),
        ("rank: 8\nseed: 1\nrank: 16", "rank is given twice"),
        ("rank: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("where: " + "[" * 5000, "recursion"),
        ("a: 1\n---\nb: 2", "but found another document"),
    ],
)
def test_broken_file_is_named(run_yaml, text, why):
    path = run_yaml(text)
    message = refusal({}, file=path)
    assert message.startswith(f"{path} cannot be read as YAML: ")
    assert why in message
    assert "\n" not in message


def test_missing_or_non_utf8_file_refused(tmp_path):
    assert refusal({}, file=tmp_path / "none.yaml") == f"There is no file {tmp_path / 'none.yaml'}."
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    assert refusal({}, file=tmp_path / "latin.yaml").startswith(
        f"{tmp_path / 'latin.yaml'} cannot be read as YAML: "
    )


def test_pipe_in_place_is_refused(tmp_path):
    os.mkfifo(tmp_path / "run.yaml")
    assert refusal({}, file=tmp_path / "run.yaml") == f"{tmp_path}/run.yaml is a pipe, not a file."
    reader, writer = os.pipe()  # `--config <(command)`
    os.write(writer, b"rank: 3")
    os.close(writer)
    assert resolve_settings(TrainConfig, {}, Path(f"/dev/fd/{reader}")).rank == 3
    os.close(reader)


def test_non_text_key_is_refused(run_yaml):
    path = run_yaml("1: 2")
    assert refusal({}, file=path) == f"{path}: 1: keys should be strings (got 1)"


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"max_steps": 7, "where": ["label=1", "source=a: b"], "learning_rate": 1e-7, "packing": False},
        {"dataset": "кино.csv", "name": "n", "adapters_dir": Path("a b") / "c", "max_rows": 5, "minutes": 0.1},
        {
            "dataset": "a\n b: #c",
            "split_salt": "1e-3",
            "text_column": "null",
            "base": "~",
            "revision": "2024-01-01",
        },
        {"label_column": "x", "labels": ["a, b", "c"]},
        {"split_salt": "yes", "text_column": " padded ", "where": ["x='\"\t", "y=[]"], "seed": 2**32 - 1},
    ],
)
def test_yaml_round_trip(run_yaml, given):
    config = resolve_settings(TrainConfig, given)
    assert resolve_settings(TrainConfig, {}, run_yaml(config_to_yaml(config))) == config


@pytest.mark.parametrize(
    "text",
    [
        "1e-3",
        "1e5",
        "1.0e3",
        "08",
        "0o17",
        "0b1",
        "010",
        "1:30",
        "no",
        "2024-01-02",
        "1_000",
        ".5",
        "<<",
        "=",
        "-",
    ],
)
def test_yaml_of_before_means_the_same(run_yaml, text):
    path = run_yaml(yaml.safe_dump({"split_salt": text, "learning_rate": 1e-7, "seed": 10**9, "packing": False}))
    config = resolve_settings(TrainConfig, {}, path)
    assert (config.split_salt, config.learning_rate, config.seed, config.packing) == (text, 1e-7, 10**9, False)


def test_yaml_is_not_escaped():
    assert config_to_yaml(TrainConfig(dataset="кино.csv")).startswith("dataset: кино.csv\n")


def test_yaml_omits_none():
    settings = yaml.safe_load(config_to_yaml(TrainConfig(max_steps=3)))
    assert settings["max_steps"] == 3
    assert settings["adapters_dir"] == "adapters"
    assert {"alpha", "batch_size", "minutes", "epochs", "name"} & settings.keys() == set()


# Files of earlier versions

OLD_KEYS = (
    "rows: 50\nbuffer: 7\nstreaming: false\ntargets: c_attn\naccumulation: 3\nclip: 0.5\ncheckpointing: 'on'\n"
)


def test_old_run_yaml_resolves_to_new_settings(run_yaml):
    always = "split: train\nadapters_dir: adapters\nruns_dir: runs\nsplit_salt: lora_tuner\n"
    path = run_yaml(always + OLD_KEYS.replace("buffer: 7\nstreaming: false", "buffer: 10000"))
    new = {"max_rows": 50, "target_modules": "c_attn", "gradient_accumulation": 3, "max_grad_norm": 0.5}
    new |= {"gradient_checkpointing": "on", "near_duplicates": "keep"}  # as they stayed before the rule
    new |= {"delimiter": "ending", "txt_rows": "blank"}
    assert resolve_settings(TrainConfig, {}, path) == TrainConfig(**new)
    streamed = run_yaml("buffer: 7\nstreaming: true")
    assert resolve_settings(TrainConfig, {}, streamed) == TrainConfig(streaming=True, shuffle_buffer=7)
    assert resolve_settings(TrainConfig, {"max_rows": 9}, run_yaml("rows: 50")).max_rows == 9
    for value, clean in (("true", "lines"), ("false", "full")):
        assert resolve_settings(TrainConfig, {}, run_yaml(f"keep_lines: {value}")).clean == clean


def test_default_in_settings_file_counts_as_given(run_yaml, tmp_path):
    (tmp_path / "a.csv").write_text("text\none\n")
    written = resolve_settings(TrainConfig, {}, run_yaml("split: train\ndataset: a.csv"))
    assert "split" in written.model_fields_set
    repeated = resolve_settings(TrainConfig, {}, run_yaml(config_to_yaml(TrainConfig(dataset="a.csv"))))
    assert (repeated.split, "shuffle_buffer" in repeated.model_fields_set) == (None, False)
    assert refusal({"shuffle_buffer": 10_000}) == "shuffle_buffer needs streaming: give both or none"


@pytest.mark.parametrize(("old", "new"), RENAMED_SETTINGS.items())
def test_old_and_new_key_together_are_refused(run_yaml, old, new):
    path = run_yaml(f"{old}: 4\n{new}: 4\n")
    assert refusal({}, file=path) == f"{path}: {old} is the old name of {new}: give one of them."


@pytest.mark.parametrize("old", RENAMED_SETTINGS)
def test_old_command_line_option_is_unknown(old):
    result = CliRunner().invoke(app, ["train", f"--{old}", "4"])
    assert result.exit_code == 2
    assert f"No such option: --{old}" in result.stderr
    assert refusal({old: 4}) == f"{old}: unknown setting"


def write_old_keys(file):
    settings = yaml.safe_load(file.read_text())
    to_old = {new: old for old, new in RENAMED_SETTINGS.items()}
    file.write_text(yaml.safe_dump({to_old.get(key, key): value for key, value in settings.items()}))
    assert settings.keys() & to_old.keys()


def test_stopped_run_with_old_keys_resumes_bitwise(settings, stop_at):
    changes = {"max_rows": 60, "gradient_accumulation": 2, "max_grad_norm": 0.5, "dropout": 0.1, "save_every": 2}
    expected = train(settings(**changes, name="whole"))
    with stop_at(4):
        train(settings(**changes, name="stopped"))
    folder = Path("runs/stopped")
    write_old_keys(folder / RUN_FILE)
    for checkpoint in list_checkpoints(folder):
        write_old_keys(checkpoint / RUN_FILE)
        (checkpoint / HASHES_FILE).unlink()
        finalize(checkpoint)
    resumed = resume("stopped")
    assert (resumed.path / WEIGHTS_FILE).read_bytes() == (expected.path / WEIGHTS_FILE).read_bytes()
    assert resumed.manifest.result == expected.manifest.result
    assert not RENAMED_SETTINGS.keys() & yaml.safe_load((resumed.path / RUN_FILE).read_text()).keys()
    write_old_keys(resumed.path / RUN_FILE)
    repeated = train(resolve_settings(TrainConfig, {"name": "repeated"}, resumed.path / RUN_FILE))
    assert repeated.sha256 == expected.sha256


def test_old_run_yaml_is_pushed_with_new_keys(adapter, monkeypatch):
    write_old_keys(adapter.path / RUN_FILE)
    pushed = {}

    def upload(folder, repo, names, **_):
        pushed.update(yaml.safe_load((folder / RUN_FILE).read_text()))
        return "url"

    monkeypatch.setattr(hub, "upload_files", upload)
    push(adapter, "owner/reviews")
    assert pushed["max_grad_norm"] == 1.0
    assert not RENAMED_SETTINGS.keys() & pushed.keys()


MANIFEST_SCHEMA_1 = """{
  "schema_version": 1,
  "created": "2025-01-02T03:04:05+00:00",
  "base": {"name": "gpt2", "repo": "gpt2", "revision": null, "weights": "gpt2", "fingerprint": "", "tokenizer": ""},
  "data": {
    "name": "reviews", "source": "reviews.csv", "hash": "", "where": [], "split_salt": "lora_tuner",
    "counts": {"read": 120, "train": 108, "held_out": 12}, "format": "text", "eval_dataset": null,
    "held_out_hash": "", "held_out_rows": 8
  },
  "run": {
    "method": "lora", "steps": 6, "kept_step": 6, "tokens": 700, "seconds": 0.5, "sequences": 12,
    "truncated_rows": 3, "device": "cpu", "dtype": "float32", "load_in": "full", "threads": 1, "processes": 1
  },
  "made_by": null,
  "parents": [],
  "result": {
    "base_loss": 7.5, "loss": 5.25, "gain": 2.25, "standard_error": 0.125, "rows": 8, "tokens": 400
  },
  "weights": {"sha256": "", "bytes": 0, "parameters": 0, "config": ""},
  "versions": {"torch": "2.13.0"}
}"""


def test_manifest_schema_1_stays_readable(adapter):
    manifest, path = json.loads(MANIFEST_SCHEMA_1), adapter.path / MANIFEST_FILE
    today = json.loads(path.read_text())
    assert manifest.keys() <= today.keys()  # newer ones have defaults
    for part in ("base", "data", "run", "result", "weights"):
        assert manifest[part].keys() <= today[part].keys()  # newer fields have defaults
    base = load_base(find_base(adapter.base), ModelOptions(device="cpu")).info(
        with_template=False, schema_version=1
    )
    manifest |= {"weights": today["weights"], "base": base.model_dump(exclude={"chat_template"})}
    manifest["data"] |= {"hash": today["data"]["hash"], "held_out_hash": today["data"]["held_out_hash"]}
    sampling, options = SamplingParams(greedy=True, max_new_tokens=5), ModelOptions(device="cpu")
    expected = Generator(adapter.path, options=options).generate("the actor", sampling)
    path.write_text(json.dumps(manifest))
    ((name, listed),) = Library(Path("adapters")).entries()
    assert (name, listed.manifest.result.gain) == ("reviews", 2.25)
    assert verify_adapter(listed) == []
    assert Generator(listed.path, options=options).generate("the actor", sampling) == expected
