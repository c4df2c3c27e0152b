"""Outputs that follow a grammar: each mask, the end, errors, and many random schemas."""

import copy
import json

import jsonschema_rs
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lora_tuner import ModelOptions, SamplingParams
from lora_tuner.errors import GenerationError, RequestError
from lora_tuner.inference import constraints
from lora_tuner.inference.batch import GenerationEngine
from lora_tuner.inference.constraints import Grammar, GrammarCompiler
from lora_tuner.inference.sequence import Sequence
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base

from .. import tiny_models
from ..json_schemas import SCHEMAS

LIMIT = 400


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def base(request, tmp_path_factory):
    folder = tiny_models.save_model(tmp_path_factory.mktemp("long") / request.param, request.param, context=512)
    return load_base(find_base(str(folder)), ModelOptions(device="cpu"))


@pytest.fixture(scope="module")
def compiler(base):
    return GrammarCompiler(base)


def constraint(compiler, kind, text):
    return compiler.compile(Grammar(kind, text, "field"), compiler.base.tokenizer).copy()


def sequence(compiler, kind, text, seed=None, **sampling):
    settings = {"max_new_tokens": LIMIT, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    prompt = compiler.base.tokenizer("the actor")["input_ids"]
    form = None if kind is None else constraint(compiler, kind, text)
    sampling = SamplingParams(**settings | sampling)
    return Sequence(compiler.base, prompt, sampling, seed, constraint=form)


def run(base, sequences):
    engine = GenerationEngine(base)
    engine.add(sequences)
    while engine.sequences:
        engine.step()
    for done in sequences:
        if done.error:
            raise done.error
    return [done.detokenizer.text for done in sequences]


def test_mask_is_that_of_the_grammar(compiler):
    form, logits = constraint(compiler, "regex", "(so|no)!?"), torch.zeros(320)

    def following():
        masked = form.mask(logits)
        assert bool((masked[masked.isfinite()] == 0).all())
        return {compiler.base.tokenizer.decode([token]) for token in masked.isfinite().nonzero().flatten()}

    vocabulary = compiler.base.tokenizer.get_vocab()
    assert following() <= {"s", "n", "so", "no"}
    assert not form.advance(vocabulary["s"])
    assert following() == {"o"}
    assert not form.advance(vocabulary["o"])
    assert following() == {"!", tiny_models.END}
    assert form.advance(vocabulary["!"])


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("choice", '["so", "so what", "\u2615 \\"x\\"\\n"]', {"so", "so what", '\u2615 "x"\n'}),
        ("regex", "a{3}b", {"aaab"}),
        ("grammar", 'root ::= "x" [0] ("y" | "y")', {"x0y"}),
        ("grammar", 'start: "x" DIGIT\nDIGIT: /0/', {"x0"}),
        ("json", '{"const": {"a": [1, null]}}', {'{"a":[1,null]}', '{"a": [1,null]}', '{"a":[1, null]}'}),
    ],
)
def test_output_has_form_of_each_kind(compiler, kind, text, expected, seed):
    one = sequence(compiler, kind, text, seed)
    (output,) = run(compiler.base, [one])
    assert output in expected | {'{"a": [1, null]}'}
    assert one.finish_reason == "stop"


def test_logprobs_stay_those_of_model(compiler):
    one = sequence(compiler, "regex", "zq")
    one.top_logprobs = 2
    logits = torch.randn(320, generator=torch.Generator().manual_seed(1))
    token = one.append_token(logits)
    assert one.logprobs[0].logprob == pytest.approx(float(logits.log_softmax(-1)[token]))
    assert one.logprobs[0].top[0][0] == int(logits.argmax())


def test_other_rows_stay_bitwise_equal(compiler):
    """Beside rows with grammars, greedy and sampled, tokens and log-probabilities are the same."""

    def plain():
        rows = [sequence(compiler, None, None, seed, max_new_tokens=40) for seed in (None, 1, 2)]
        for row in rows:
            row.top_logprobs = 3
        return rows

    alone, beside = plain(), plain()
    others = [sequence(compiler, "json", '{"type": "array"}', seed, max_new_tokens=40) for seed in (None, 5)]
    free = [sequence(compiler, None, None, seed, max_new_tokens=40) for seed in (None, 5)]
    run(compiler.base, alone + free)
    run(compiler.base, beside + others)
    assert [row.output_ids for row in beside] == [row.output_ids for row in alone]
    assert [row.logprobs[0] for row in beside] == [row.logprobs[0] for row in alone]


def test_grammar_that_cannot_go_on_fails_alone(compiler, monkeypatch):
    monkeypatch.setattr(constraints, "MAX_STEP_ITEMS", 1)
    compiler = GrammarCompiler(compiler.base)
    text = '{"type": "object", "properties": {"a": {"type": "array"}}, "required": ["a"]}'
    stuck, free = sequence(compiler, "json", text), sequence(compiler, None, None, max_new_tokens=5)
    engine = GenerationEngine(compiler.base)
    engine.add([stuck, free])
    while engine.sequences:
        engine.step()
    assert isinstance(stuck.error, GenerationError)
    assert "cannot be followed any further" in str(stuck.error)
    assert (free.error, len(free.output_ids)) == (None, 5)


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("json", '{"type": "strin"}', "strin"),
        ("json", '{"not": {}}', 'Unimplemented keys: ["not"]'),
        ("json", '{"type": "integer", "minimum": 2, "maximum": 1}', "Unsatisfiable schema"),
        ("json", '{"$ref": "#/$defs/none"}', "none"),
        ("json", "[" * 40_000 + "]" * 40_000, "it is nested too deeply."),
        ("json", '{"anyOf": [{"type": "object", "minProperties": 2}]}', "minProperties is 2, but only 0 keys"),
        ("json", '"x"', "object"),
        ("regex", "(a", "unclosed group"),
        ("regex", "(?=a)", "look-around"),
        ("grammar", "root ::= (", ""),
        ("grammar", "start: other", "other"),
        ("choice", json.dumps(["x" * 50_000] * 3), "it has 150,"),
    ],
)
def test_bad_grammar_is_named_with_reason(compiler, kind, text, reason):
    with pytest.raises(RequestError) as caught:
        constraint(compiler, kind, text)
    assert (caught.value.param, str(caught.value).partition(":")[0]) == ("field", "field")
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 400


def test_added_token_of_adapter_counts(compiler):
    tokenizer = copy.deepcopy(compiler.base.tokenizer)
    tokenizer.add_tokens(["zq works"])
    form = compiler.compile(Grammar("regex", "zq works", "x"), tokenizer).copy()
    assert bool(form.mask(torch.zeros(321))[320].isfinite())
    assert form.advance(320)


def test_last_grammars_are_kept(compiler):
    first = compiler.compile(Grammar("regex", "a0", "x"), compiler.base.tokenizer)
    assert compiler.compile(Grammar("regex", "a0", "x"), compiler.base.tokenizer) is first
    for number in range(constraints.CACHED_GRAMMARS):
        compiler.compile(Grammar("regex", f"b{number}", "x"), compiler.base.tokenizer)
    assert compiler.compile(Grammar("regex", "a0", "x"), compiler.base.tokenizer) is not first


def check_schemas(compiler, schemas, seed, limit):
    """Sample an output for each schema at temperature 1, all in one batch; return the number that ended."""
    sequences = [
        sequence(compiler, "json", json.dumps(schema), seed + number, max_new_tokens=limit)
        for number, schema in enumerate(schemas)
    ]
    texts = run(compiler.base, sequences)
    for schema, row, text in zip(schemas, sequences, texts, strict=True):
        if row.finish_reason == "stop":
            # JSON has numbers that are too large for a float, such as 1e999, which the validator takes for none.
            value = json.loads(text, parse_float=lambda number: max(-1e308, min(1e308, float(number))))
            assert jsonschema_rs.validator_for(schema).is_valid(value), (schema, text)
        else:
            assert len(row.output_ids) == limit
    return sum(row.finish_reason == "stop" for row in sequences)


def check_random_schemas(compiler, examples, rows, limit):
    ended = []

    @given(schemas=st.lists(SCHEMAS, min_size=rows, max_size=rows), seed=st.integers(0, 2**30))
    @settings(
        phases=[Phase.generate],  # a smaller failing batch is not searched for
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    def check(schemas, seed):
        ended.append(check_schemas(compiler, schemas, seed, limit))

    check()
    assert sum(ended) > 0.5 * rows * len(ended)


def test_random_schemas_give_valid_json(compiler):
    check_random_schemas(compiler, 2, 20, 100)


@pytest.mark.slow
def test_thousand_schemas_give_valid_json(compiler):
    check_random_schemas(compiler, 25, 40, LIMIT)
