import json
import math
import os
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from typer.testing import CliRunner

from lora_tuner import Generator, Library, ModelOptions, hub, push, resume, train
from lora_tuner.adapters.adapter import MANIFEST_FILE, RUN_FILE, WEIGHTS_FILE, verify_adapter
from lora_tuner.cli.app import app
from lora_tuner.config import STOP_RULES, SamplingParams, TrainConfig
from lora_tuner.errors import ConfigError
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base
from lora_tuner.settings_files import RENAMED_SETTINGS, config_to_yaml, resolve_settings
from lora_tuner.training.checkpoints import HASHES_FILE, finalize, list_checkpoints


def refusal(given, kind=TrainConfig, file=None):
    with pytest.raises(ConfigError) as error:
        resolve_settings(kind, given, file)
    return str(error.value)


@pytest.fixture
def run_yaml(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize(
    ("kind", "name", "allowed", "refused"),
    [
        (TrainConfig, "rank", [1, 4096], [0, -1, 4097, 1.5]),
        (TrainConfig, "alpha", [1], [0, 2.5]),
        (TrainConfig, "max_rows", [2], [1, 0, -5]),
        (TrainConfig, "eval_rows", [2], [1]),
        (TrainConfig, "max_length", [8], [7]),
        (TrainConfig, "dropout", [0, 0.99], [1, -0.1, math.nan]),
        (TrainConfig, "warmup", [0, 0.99], [1, -0.1, math.nan]),
        (TrainConfig, "epochs", [0.01], [0, -1, math.inf, math.nan]),
        (TrainConfig, "minutes", [0.01], [0, -1, math.inf, math.nan]),
        (TrainConfig, "max_steps", [1], [0, 1.5]),
        (TrainConfig, "batch_size", [1], [0]),
        (TrainConfig, "gradient_accumulation", [1], [0]),
        (TrainConfig, "learning_rate", [1e-9, "probe"], [0, -1, math.inf, math.nan, "probes", [1e-3], 10**400]),
        (TrainConfig, "weight_decay", [0], [-0.1, math.inf]),
        (TrainConfig, "max_grad_norm", [0.1], [0, math.inf]),
        (TrainConfig, "eval_every", [1], [0]),
        (TrainConfig, "save_every", [1], [0]),
        (TrainConfig, "seed", [0, 2**32 - 1], [-1, 2**32]),
        (TrainConfig, "schedule", ["linear", "cosine", "constant"], ["Linear", ""]),
        (TrainConfig, "long_rows", ["truncate", "chunk"], ["drop"]),
        (TrainConfig, "dtype", ["auto", "float32", "bfloat16", "float16"], ["float64"]),
        (TrainConfig, "split_salt", ["x"], [""]),
        (TrainConfig, "target_modules", ["auto"], [""]),
        (TrainConfig, "where", [["a=b", "a=", "a=b=c"]], [["a"], ["=b"], "a=b"]),
        (SamplingParams, "max_new_tokens", [1], [0]),
        (SamplingParams, "temperature", [0, 10], [-0.1, 10.1, math.nan]),
        (SamplingParams, "top_p", [1e-9, 1], [0, 1.1]),
        (SamplingParams, "top_k", [0], [-1]),
        (SamplingParams, "repetition_penalty", [1e-9, 10], [0, 10.1]),
        (SamplingParams, "min_p", [0, 1], [-0.1, 1.1]),
        (SamplingParams, "presence_penalty", [-2, 2], [-2.1, 2.1]),
        (SamplingParams, "frequency_penalty", [-2, 2], [-2.1, 2.1]),
        (SamplingParams, "n", [1, 256], [0, 257]),
        (SamplingParams, "seed", [0, 2**63 - 1], [-1, 2**63]),
    ],
)
def test_setting_bounds(kind, name, allowed, refused):
    for value in allowed:
        assert getattr(resolve_settings(kind, {name: value}), name) == value
    for value in refused:
        assert refusal({name: value}, kind).startswith(f"{name}: "), value


def test_all_problems_reported_together():
    given = {"rank": 0, "lr": 1, "epochs": 1, "minutes": 2, "patience": 3, "where": ["label"], "dtype": "int8"}
    assert refusal(given).split("; ") == [
        "where: 'label' is not of the form COLUMN=VALUE (got ['label'])",
        "rank: input should be greater than or equal to 1 (got 0)",
        "epochs and minutes contradict each other: give one of them",
        "patience needs eval_every: it counts evaluations",
        "dtype: input should be 'auto', 'float32', 'bfloat16' or 'float16' (got 'int8')",
        "lr: unknown setting",
    ]


def test_all_sampling_problems_reported_together():
    assert refusal({"top_p": 2, "greedy": True, "n": 2, "stop": [""]}, SamplingParams).split("; ") == [
        "top_p: input should be less than or equal to 1 (got 2)",
        "n above 1 needs sampling: greedy outputs are all the same",
        "stop is empty: it would end every output at once",
    ]


def test_temperature_0_refuses_several_outputs():
    assert "n above 1 needs sampling" in refusal({"temperature": 0, "n": 2}, SamplingParams)
    assert resolve_settings(SamplingParams, {"temperature": 0.1, "n": 2}).n == 2


@pytest.mark.parametrize(
    ("given", "penalty"),
    [
        ({}, 1.1),
        ({"temperature": 0.1}, 1.1),
        ({"greedy": True}, 1.0),
        ({"temperature": 0}, 1.0),
        ({"temperature": 1e-9}, 1.0),
        ({"greedy": True, "repetition_penalty": 1.1}, 1.1),
        ({"temperature": 0, "repetition_penalty": 1.3}, 1.3),
    ],
)
def test_greedy_has_no_penalty_unless_given(given, penalty):
    assert SamplingParams(**given).repetition_penalty == penalty
    assert resolve_settings(SamplingParams, given).model_copy(update={"n": 1}).repetition_penalty == penalty


@pytest.mark.parametrize("given", [{a: 1, b: 1} for a in STOP_RULES for b in STOP_RULES if a < b])
def test_two_stop_rules_are_refused(given):
    expected = " and ".join(name for name in STOP_RULES if name in given)
    assert refusal(given) == f"{expected} contradict each other: give one of them"


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"beta": 0.1}, "beta needs objective dpo, orpo or kto: sft has no preferences"),
        ({"objective": "dpo", "streaming": True}, "objective dpo is not possible with streaming: its rows are"),
        (
            {"objective": "kto", "text_column": "x"},
            "objective kto learns from preferences: leave text_column out",
        ),
        (
            {"objective": "kto", "label_column": "x"},
            "objective kto learns from preferences: leave label_column out",
        ),
        ({"objective": "dpo", "template": "{x}"}, "objective dpo learns from preferences: leave template out"),
        (
            {"objective": "dpo", "format": "messages"},
            "objective dpo learns from preferences: leave format messages out",
        ),
        (
            {"objective": "orpo", "long_rows": "chunk"},
            "objective orpo compares whole answers: long_rows chunk would",
        ),
        ({"labels": "a,b"}, "labels needs label_column, the column of the labels"),
        ({"label_names": "0=a"}, "label_names needs label_column, the column of the labels"),
        ({"balance": True}, "balance needs label_column, the column of the labels"),
        ({"label_column": "x", "labels": "a,,b"}, "labels: a label is empty: separate labels by single commas"),
        (
            {"label_column": "x", "labels": '"a,b'},
            "labels: it is not a list separated by commas, with entries that ",
        ),
        ({"label_column": "x", "labels": ""}, "labels: a label is empty: separate labels by single commas"),
        ({"label_column": "x", "labels": "a,b,a"}, "labels: a is given twice"),
        ({"label_column": "x", "labels": ["a"]}, "labels: a is the only label: give two or more"),
        ({"label_column": "x", "label_names": "0=a,1"}, "label_names: '1' is not of the form VALUE=NAME"),
        ({"label_column": "x", "label_names": "0=a,1=a"}, "label_names: a is given twice"),
        ({"label_column": "x", "text_column": "x"}, "label_column and text_column are the same column: name two"),
        (
            {"label_column": "x", "format": "messages"},
            "label_column reads texts and format messages conversations",
        ),
        (
            {"label_column": "x", "template": "{x} {y}", "answer_column": "x"},
            "label_column and answer_column both name what is learned: give one of them",
        ),
        (
            {"label_column": "x", "balance": True, "streaming": True},
            "streaming cannot count labels before it reads them: leave balance out",
        ),
        (
            {"label_column": "x", "balance": True, "dataset": ["a=1", "b=2"]},
            "balance and weights of datasets contradict each other: give one of them",
        ),
    ],
)
def test_objectives_and_labels_refuse_others(given, text):
    assert refusal(given).startswith(text)


def test_labels_are_separated_by_commas():
    config = resolve_settings(
        TrainConfig, {"label_column": "x", "labels": 'a, "b, c",d', "label_names": "0=a,1 = b b"}
    )
    assert (config.labels, config.label_name_of) == (["a", "b, c", "d"], {"0": "a", "1": "b b"})


def test_three_stop_rules_are_one_problem():
    assert (
        refusal(dict.fromkeys(STOP_RULES, 1))
        == "epochs and max_steps and minutes contradict each other: give one of them"
    )


def test_one_or_no_stop_rule_allowed():
    assert [getattr(TrainConfig(), name) for name in STOP_RULES] == [None] * 3
    for name in STOP_RULES:
        assert getattr(resolve_settings(TrainConfig, {name: 3}), name) == 3


def test_patience_needs_eval_every():
    assert refusal({"patience": 2}) == "patience needs eval_every: it counts evaluations"
    assert resolve_settings(TrainConfig, {"patience": 2, "eval_every": 5}).patience == 2
    assert (
        refusal({"patience": 2, "eval_every": 0})
        == "eval_every: input should be greater than or equal to 1 (got 0)"
    )


def test_default_alpha_is_twice_rank():
    assert TrainConfig(rank=4).scaling_alpha == 8
    assert TrainConfig(rank=4, alpha=5).scaling_alpha == 5


@pytest.mark.parametrize("name", sorted(TrainConfig.model_fields))
def test_booleans_only_for_switches(name):
    if TrainConfig.model_fields[name].annotation is bool:
        needs = {"force": {"parent": "imdb"}, "balance": {"label_column": "label"}}.get(name, {})
        assert getattr(resolve_settings(TrainConfig, {name: True} | needs), name) is True
    else:
        assert refusal({name: True}) == f"{name}: true and false are not valid here (got True)"


def test_config_is_frozen():
    with pytest.raises(ValidationError):
        TrainConfig().rank = 9


API_ONLY = {
    "eval_max_rows",
    "logit_bias",
    "min_new_tokens",
    "stop_token_ids",
    "ignore_eos",
    "include_stop_str_in_output",
}


def test_fields_have_help_and_panel():
    for kind in (TrainConfig, SamplingParams):
        for name, field in kind.model_fields.items():
            assert field.description, name
            if name not in API_ONLY:
                assert field.json_schema_extra["panel"], name


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
            "minutes: input should be a valid number, unable to parse string as a number (got '1:30')",
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
        f"{path}: rank: input should be a valid integer, unable to parse string as an integer (got 'eight'); "
        "rang: unknown setting"
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


def test_errors_name_their_settings():
    with pytest.raises(ConfigError) as raised:
        resolve_settings(TrainConfig, {"rank": 0, "epochs": 1, "minutes": 2, "rnak": 8})
    assert raised.value.problems == {
        "rank": "input should be greater than or equal to 1 (got 0)",
        "minutes": "epochs and minutes contradict each other: give one of them",
        "rnak": "unknown setting",
    }
    assert str(raised.value) == (
        "rank: input should be greater than or equal to 1 (got 0); epochs and minutes contradict each other: give one of "
        "them; rnak: unknown setting"
    )
