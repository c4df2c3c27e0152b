"""Settings: bounds, contradictions, help."""

import math

import pytest
from pydantic import ValidationError

from lora_tuner.config import STOP_RULES, SamplingParams, TrainConfig
from lora_tuner.errors import ConfigError
from lora_tuner.settings_files import resolve_settings


def refusal(given, kind=TrainConfig, file=None):
    with pytest.raises(ConfigError) as error:
        resolve_settings(kind, given, file)
    return str(error.value)


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
        == "epochs, max_steps and minutes contradict each other: give one of them"
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
