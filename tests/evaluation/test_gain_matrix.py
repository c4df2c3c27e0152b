"""Gains of adapters on sets of rows: those of plain PEFT, from the cache where they were measured."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_tuner import EvalSet, Library, ModelOptions, Notice, TrainConfig, evaluate, train
from lora_tuner.adapters.adapter import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE, load_adapter_folder
from lora_tuner.adapters.gains import paired_gain
from lora_tuner.data import eval_sets
from lora_tuner.data.dataset import load_dataset
from lora_tuner.errors import AdapterError, WrongBaseError
from lora_tuner.evaluation import gain_matrix, held_out_loss
from lora_tuner.inference.multi_lora import MultiLora
from lora_tuner.models import loading
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base

from .. import tiny_models
from ..inference.test_multi_lora import save_peft_adapter


def styles():
    """Texts of three styles, one for each adapter."""
    return {
        "noir": tiny_models.reviews(60),
        "verse": [f"{text.replace('. ', ', ')} o!" for text in tiny_models.reviews(50, seed=1)],
        "notes": [
            f"{number} - {' '.join(text.split()[::-1])}"
            for number, text in enumerate(tiny_models.reviews(40, seed=2))
        ],
    }


def train_in(folder, base, names):
    """Train adapters in `folder/adapters`, with their data in `folder` and the cache in `folder/cache`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_TUNER_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        for number, name in enumerate(names):
            (folder / f"{name}.json").write_text(json.dumps(styles()[name]))
            settings = {
                "rank": 4,
                "max_steps": 3,
                "max_length": 64,
                "learning_rate": 0.02,
                "eval_rows": 6 + number,
            }
            train(TrainConfig(dataset=f"{name}.json", base=str(base), device="cpu", batch_size=4, **settings))
    return folder


@pytest.fixture(scope="module")
def trained(gpt2, tmp_path_factory):
    """Trained once; tests use copies."""
    return train_in(tmp_path_factory.mktemp("trained"), gpt2, styles())


@pytest.fixture
def adapters(trained, tmp_path, monkeypatch):
    """Three adapters of one base, without their data, and with a cache for this test."""
    for folder in ("adapters", "cache"):
        shutil.copytree(trained / folder, tmp_path / folder)
    monkeypatch.setenv("LORA_TUNER_CACHE", str(tmp_path / "cache"))
    return [Library().get(name) for name in styles()]


def rows_path(adapter, tmp_path):
    return tmp_path / "cache" / "held-out" / f"{adapter.manifest.data.held_out_hash}.json"


def with_manifest(adapter, **changes):
    """The adapter with changes in its manifest."""
    text = adapter.manifest.model_copy(update=changes).to_json()
    (adapter.path / MANIFEST_FILE).write_text(text)
    return load_adapter_folder(adapter.path)


@pytest.fixture
def measured(monkeypatch):
    """Names of the measurements from now on that do not come from the cache."""
    stages = []

    def count(*args, stage="held-out loss", **kwargs):
        stages.append(stage)
        return measure(*args, stage=stage, **kwargs)

    measure = held_out_loss.measure_loss
    monkeypatch.setattr(held_out_loss, "measure_loss", count)
    return stages


def peft_gain(folder, adapter, texts):
    """The gain computed with plain PEFT."""
    base = load_base(find_base(str(folder)), ModelOptions(device="cpu"))
    rows = held_out_loss.encode_held_out(base, texts)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter.path)
    peft_base = dataclasses.replace(base, model=model)
    return paired_gain(
        held_out_loss.measure_loss(base.model, base, rows), held_out_loss.measure_loss(model, peft_base, rows)
    )


def approx(result):
    return pytest.approx(result.model_dump(), abs=1e-5)


def test_gain_matrix_matches_plain_peft(adapters, gpt2):
    matrix = evaluate(adapters, options=ModelOptions(device="cpu"))
    assert matrix.base == str(gpt2)
    assert matrix.adapters == [rows.name for rows in matrix.sets] == ["noir", "verse", "notes"]
    for adapter, line in zip(adapters, matrix.cells, strict=True):
        for rows, cell in zip(matrix.sets, line, strict=True):
            assert cell.model_dump() == approx(peft_gain(gpt2, adapter, rows.texts))
    assert len({cell.gain for line in matrix.cells for cell in line}) == 9


@pytest.mark.slow
def test_gain_matrix_matches_peft_on_llama(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_TUNER_CACHE", str(train_in(tmp_path, llama, ["noir", "verse"]) / "cache"))
    two_adapters = [Library().get("noir"), Library().get("verse")]
    matrix = evaluate(two_adapters, options=ModelOptions(device="cpu"))
    for number, adapter in enumerate(two_adapters):
        cell = matrix.cells[number][1 - number]
        assert cell.model_dump() == approx(peft_gain(llama, adapter, matrix.sets[1 - number].texts))


def test_own_rows_give_training_result(adapters):
    matrix = evaluate(adapters, options=ModelOptions(device="cpu"))
    for number, adapter in enumerate(adapters):
        assert matrix.cells[number][number].model_dump() == approx(adapter.manifest.result)
        assert matrix.cells[number][number].rows == 6 + number


def test_rows_come_from_cache(adapters, trained, tmp_path):
    assert not list(tmp_path.glob("*.json"))
    matrix = evaluate(adapters, options=ModelOptions(device="cpu"))
    for number, (adapter, rows) in enumerate(zip(adapters, matrix.sets, strict=True)):
        held_out = load_dataset(TrainConfig(dataset=str(trained / f"{adapter.name}.json"))).held_out
        assert rows == EvalSet(adapter.name, held_out[: 6 + number])
        assert json.loads(rows_path(adapter, tmp_path).read_text(encoding="utf-8")) == rows.texts


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "its held-out rows are not in the cache: it was trained elsewhere, or the cache was emptied"),
        ("[]", "its held-out rows in the cache have changed"),
        ('["other"]', "its held-out rows in the cache have changed"),
        (
            "{broken",
            "its held-out rows in the cache cannot be read (Expecting property name enclosed in double quotes: line 1 "
            "column 2 (char 1))",
        ),
        ("[1]", "its held-out rows in the cache cannot be read ('int' object has no attribute 'encode')"),
        ("7", "its held-out rows in the cache cannot be read ('int' object is not iterable)"),
    ],
)
def test_missing_rows_leave_cells_empty(adapters, tmp_path, content, reason):
    rows_path(adapters[1], tmp_path).unlink()
    if content is not None:
        rows_path(adapters[1], tmp_path).write_text(content)
    matrix = evaluate(adapters[:2], options=ModelOptions(device="cpu"))
    assert matrix.sets[1] == EvalSet("verse", [], reason)
    assert [[cell is None for cell in line] for line in matrix.cells] == [[False, True], [False, True]]
    assert matrix.cells[0][0].model_dump() == approx(adapters[0].manifest.result)
    with pytest.raises(AdapterError) as error:
        evaluate(adapters[1:2], options=ModelOptions(device="cpu"))
    assert (
        str(error.value)
        == f"There are no rows to evaluate on. verse: {reason}. Name other data with --eval-dataset."
    )


def test_foreign_adapter_has_no_rows(adapters, gpt2):
    (adapters[1].path / MANIFEST_FILE).unlink()
    events = []
    foreign = load_adapter_folder(adapters[1].path)
    matrix = evaluate([adapters[0], foreign], options=ModelOptions(device="cpu", notify=events.append))
    assert matrix.sets[1] == EvalSet(
        "verse", [], "it was trained by another tool, so its held-out rows are unknown"
    )
    assert matrix.cells[1][1] is matrix.cells[0][1] is None
    assert matrix.cells[1][0].model_dump() == approx(peft_gain(gpt2, foreign, matrix.sets[0].texts))
    assert [event.text for event in events if isinstance(event, Notice)] == [
        f"verse has no manifest, so only its shapes can be compared with {gpt2}."
    ]


def test_losses_are_measured_once(adapters, measured):
    first = evaluate(adapters, options=ModelOptions(device="cpu"))
    # Training has measured the base, and each adapter on its own rows.
    assert measured == [
        f"{one} on {other} (adapter {number} of 3)"
        for number, one in enumerate(styles(), 1)
        for other in styles()
        if one != other
    ]
    measured.clear()
    assert evaluate(adapters, options=ModelOptions(device="cpu")) == first
    assert evaluate(adapters[::-1], options=ModelOptions(device="cpu")).cells == [
        line[::-1] for line in first.cells[::-1]
    ]
    assert measured == []


def test_changed_inputs_are_measured_anew(adapters, measured, gpt2):
    """Other weights, settings, rows or dtypes are not taken from the cache."""
    texts = tiny_models.reviews(5, seed=8)

    def cell(texts=texts, **options):
        model_options = ModelOptions(**{"device": "cpu"} | options)
        matrix = evaluate(
            [load_adapter_folder(adapters[0].path)], [EvalSet("five", texts)], options=model_options
        )
        return matrix.cells[0][0]

    def measured_cell(stages, **options):
        measured.clear()
        result = cell(**options)
        assert len(measured) == stages
        return result

    results = [measured_cell(2), measured_cell(2, dtype="bfloat16")]
    results += [measured_cell(2, texts=texts[:4]), measured_cell(2, texts=texts[::-1][:4])]
    config = json.loads((adapters[0].path / CONFIG_FILE).read_text())
    (adapters[0].path / MANIFEST_FILE).unlink()  # its hashes would not match
    (adapters[0].path / CONFIG_FILE).write_text(json.dumps(config | {"lora_alpha": 3}))
    results.append(measured_cell(1))
    (adapters[0].path / CONFIG_FILE).write_text(json.dumps(config | {"use_rslora": True}))
    results.append(measured_cell(1))
    assert results[-1].model_dump() == approx(peft_gain(gpt2, adapters[0], texts))
    (adapters[0].path / CONFIG_FILE).write_text(json.dumps(config))
    tensors = load_file(adapters[0].path / WEIGHTS_FILE)
    save_file({name: 0.5 * tensor for name, tensor in tensors.items()}, adapters[0].path / WEIGHTS_FILE)
    results.append(measured_cell(1))
    assert len({result.loss for result in results}) == len(results)


def test_adapter_replaced_while_loading_is_refused(adapters, monkeypatch):
    """Its loss would be cached under the hash of the new weights."""
    (adapters[0].path / MANIFEST_FILE).unlink()
    tensors, load = load_file(adapters[0].path / WEIGHTS_FILE), MultiLora.load

    def replaced(multi_lora, adapter):
        loaded = load(multi_lora, adapter)
        save_file({name: 0.5 * tensor for name, tensor in tensors.items()}, adapter.path / WEIGHTS_FILE)
        return loaded

    monkeypatch.setattr(MultiLora, "load", replaced)
    with pytest.raises(AdapterError, match="was replaced while it was loaded: evaluate it again"):
        evaluate(
            [load_adapter_folder(adapters[0].path)],
            [EvalSet("five", tiny_models.reviews(5, seed=8))],
            options=ModelOptions(device="cpu"),
        )

    def removed(multi_lora, adapter):
        loaded = load(multi_lora, adapter)
        (adapter.path / WEIGHTS_FILE).unlink()
        return loaded

    monkeypatch.setattr(MultiLora, "load", removed)
    with pytest.raises(AdapterError, match="cannot be read"):
        evaluate(
            [load_adapter_folder(adapters[0].path)],
            [EvalSet("five", tiny_models.reviews(5, seed=8))],
            options=ModelOptions(device="cpu"),
        )


def test_damaged_held_out_rows_are_loaded_again(adapters, trained, tmp_path):
    path = rows_path(adapters[0], tmp_path)
    before, notices = path.read_text(encoding="utf-8"), []
    shutil.copy(trained / "noir.json", tmp_path)
    path.write_text(before.replace("actor", "arctic"), encoding="utf-8")
    for _ in range(2):
        rows = gain_matrix.cached_rows(adapters[0], notices.append)
        assert rows == EvalSet("noir", json.loads(before))
    assert notices == [Notice(f"{path} is damaged: the held-out rows of noir are loaded again.")]
    assert path.read_text(encoding="utf-8") == before


def test_rows_are_cached_for_each_grouping(adapters, tmp_path):
    texts = tiny_models.reviews(4, seed=11)
    sets = [EvalSet("noir", texts, groups=groups) for groups in ([0, 0, 1, 1], [], [0, 1, 1, 1])]
    data = adapters[0].manifest.data
    for rows in sets:
        eval_sets.cache_rows(rows)
    for rows in sets:
        changed = data.model_copy(update={"held_out_hash": rows.hash()})
        assert gain_matrix.cached_rows(with_manifest(adapters[0], data=changed)) == rows
    # As the first version with groups wrote it.
    path = tmp_path / "cache" / "held-out" / f"{sets[1].hash()}.json"
    path.write_text(json.dumps({"texts": texts, "groups": sets[0].groups}))
    changed = data.model_copy(update={"held_out_hash": sets[1].hash()})
    assert gain_matrix.cached_rows(with_manifest(adapters[0], data=changed)) == sets[0]


def test_loss_cache_of_other_rows_is_ignored(adapters, tmp_path, measured):
    first = evaluate(adapters[:1], options=ModelOptions(device="cpu"))
    for file in (tmp_path / "cache" / "losses").iterdir():
        file.write_text('{"nll": [1.0], "predictions": [3]}')
    measured.clear()
    again = evaluate(adapters[:1], options=ModelOptions(device="cpu")).cells[0][0]
    assert again.loss == pytest.approx(first.cells[0][0].loss, abs=1e-6)  # the value from training
    assert measured == ["held-out loss of the base", "noir on noir (adapter 1 of 1)"]


def test_eval_rows_takes_the_first(adapters):
    whole = evaluate(adapters[:2], options=ModelOptions(device="cpu"))
    limited = evaluate(adapters[:2], eval_rows=3, options=ModelOptions(device="cpu"))
    assert [rows.texts for rows in limited.sets] == [rows.texts[:3] for rows in whole.sets]
    assert [[cell.rows for cell in line] for line in limited.cells] == [[3, 3], [3, 3]]
    first_rows = [EvalSet(rows.name, rows.texts[:3]) for rows in whole.sets]
    assert evaluate(adapters[:2], first_rows, options=ModelOptions(device="cpu")) == limited
    assert evaluate(adapters[:2], eval_rows=1000, options=ModelOptions(device="cpu")) == whole


def test_eval_dataset_rows_are_used(adapters, tmp_path):
    texts = tiny_models.reviews(20, seed=9)
    (tmp_path / "other.json").write_text(json.dumps([*texts, texts[0], ""]))
    events = []
    rows = eval_sets.load_eval_set(TrainConfig(eval_dataset="other.json", eval_rows=5), events.append)
    everything = eval_sets.load_eval_set(TrainConfig(eval_dataset="other.json"))
    assert sorted(everything.texts) == sorted(texts)
    assert rows == EvalSet("other.json", everything.texts[:5])
    assert [event.text for event in events] == [
        "Evaluation on other.json: 20 usable rows of 22.",
        "Rows of other.json that an adapter was trained on count as held out here.",
    ]
    matrix = evaluate(adapters[:2], [rows], options=ModelOptions(device="cpu"))
    assert [[cell.rows for cell in line] for line in matrix.cells] == [[5], [5]]


def test_get_all_refuses_duplicate_names(adapters, tmp_path):
    shutil.copytree(adapters[1].path, tmp_path / "elsewhere" / "noir")
    for names in (
        ["noir", "verse", "elsewhere/noir"],
        ["noir", "noir"],
        ["noir", tmp_path / "adapters" / "noir"],
    ):
        with pytest.raises(AdapterError) as error:
            Library().get_all(names)
        assert str(error.value) == "Two of these adapters have the name noir: list each once, or rename one."
    assert [adapter.name for adapter in Library().get_all(["verse", "elsewhere/noir"])] == ["verse", "noir"]


@pytest.fixture
def other_base(tmp_path):
    return tiny_models.save_model(tmp_path / "other", "gpt2", seed=7)


def test_wrong_base_error_names_both(adapters, other_base, gpt2, measured):
    with pytest.raises(WrongBaseError) as error:
        evaluate(adapters, options=ModelOptions(base=str(other_base), device="cpu"))
    fingerprints = [find_base(str(folder)).fingerprint[:12] for folder in (gpt2, other_base)]
    assert str(error.value) == (
        f"noir was trained on {gpt2} (fingerprint {fingerprints[0]}, a local folder), not on {other_base} (fingerprint "
        f"{fingerprints[1]}, a local folder). Name the right base with --base, or use --force to try it anyway."
    )
    other = find_base(str(other_base)).base_info()
    adapters[2] = with_manifest(adapters[2], base=other)
    with pytest.raises(WrongBaseError, match=r"^notes was trained on .*/other .* not on .*/gpt2 "):
        evaluate(adapters, options=ModelOptions(device="cpu"))
    assert measured == []


def test_forced_base_gives_notices(adapters, other_base):
    events = []
    matrix = evaluate(
        adapters[:2], options=ModelOptions(base=str(other_base), device="cpu", force=True, notify=events.append)
    )
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert [text.partition(" was ")[0] for text in notices] == ["FORCED: noir", "FORCED: verse"]
    assert all(text.endswith("Its output may be meaningless.") for text in notices)
    assert matrix.base == str(other_base)
    for adapter, line in zip(adapters, matrix.cells, strict=False):
        assert line[0].model_dump() == approx(peft_gain(other_base, adapter, matrix.sets[0].texts))


def test_different_split_salts_give_notice(adapters):
    events = []
    evaluate(adapters, options=ModelOptions(device="cpu", notify=events.append))
    assert not [event for event in events if isinstance(event, Notice)]
    data = adapters[1].manifest.data.model_copy(update={"split_salt": "x"})
    evaluate(
        [adapters[0], with_manifest(adapters[1], data=data)],
        options=ModelOptions(device="cpu", notify=events.append),
    )
    assert [event.text for event in events if isinstance(event, Notice)] == [
        "The adapters differ in --split-salt, so one may have been trained on rows that another holds out."
    ]


def test_different_groups_of_dataset_give_notice(adapters):
    data = adapters[1].manifest.data.model_copy(update={"group_by": "author"})
    for name, expected in ((adapters[0].manifest.data.name, 1), ("another.csv", 0)):
        events = []
        changed = with_manifest(adapters[1], data=data.model_copy(update={"name": name}))
        gain_matrix.notify_eval_rows([adapters[0], changed], events.append)
        assert ["differ in --group-by" in event.text for event in events] == [True] * expected


def test_evaluate_leaves_base_unchanged(adapters, monkeypatch):
    opened = []

    def record(*args, **kwargs):
        opened.append(load_base(*args, **kwargs))
        return opened[0]

    monkeypatch.setattr(loading, "load_base", record)
    first = evaluate(adapters, eval_rows=4, options=ModelOptions(device="cpu"))
    (base,) = opened
    plain = AutoModelForCausalLM.from_pretrained(base.files.folder)
    assert [name for name, _ in base.model.named_modules()] == [name for name, _ in plain.named_modules()]
    for name, tensor in plain.state_dict().items():
        assert torch.equal(base.model.state_dict()[name], tensor), name
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.model.modules())
    assert not base.model.training
    assert first.cells[0][0].base_loss == first.cells[1][0].base_loss == first.cells[2][0].base_loss


def test_interrupt_leaves_no_hooks(adapters, monkeypatch):
    models = []

    def interrupted(model, *args, **kwargs):
        models.append(model)
        raise KeyboardInterrupt

    monkeypatch.setattr(held_out_loss, "measure_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(adapters, options=ModelOptions(device="cpu"))
    assert not any(module._forward_hooks for module in models[0].modules())


def test_matrix_json_contains_no_rows(adapters, tmp_path):
    rows_path(adapters[1], tmp_path).unlink()
    matrix = evaluate(adapters, options=ModelOptions(device="cpu"))
    text = json.dumps(matrix.to_dict(), allow_nan=False)
    data = json.loads(text)
    assert not any(row in text for rows in matrix.sets for row in rows.texts)
    assert data["base"] == matrix.base
    assert data["sets"] == [
        {"name": "noir", "rows": 6, "missing": None},
        {"name": "verse", "rows": 0, "missing": matrix.sets[1].missing},
        {"name": "notes", "rows": 8, "missing": None},
    ]
    assert [adapter["name"] for adapter in data["adapters"]] == ["noir", "verse", "notes"]
    assert [adapter["results"][1] for adapter in data["adapters"]] == [None] * 3
    cell = matrix.cells[2][0]
    assert data["adapters"][2]["results"][0] == cell.model_dump() | {"perplexity": math.exp(cell.loss)}


def test_deeply_nested_row_cache_is_missing(adapters, tmp_path):
    rows_path(adapters[0], tmp_path).write_text("[" * 200_000)
    assert "cannot be read" in evaluate(adapters[:2], options=ModelOptions(device="cpu")).sets[0].missing


def test_single_row_set_is_missing(adapters):
    sets = [EvalSet("x", tiny_models.reviews(1)), EvalSet("y", tiny_models.reviews(3))]
    matrix = evaluate(adapters[:1], sets, options=ModelOptions(device="cpu"))
    assert [rows.missing for rows in matrix.sets] == ["a standard error needs two rows", None]
    assert [cell is None for cell in matrix.cells[0]] == [True, False]


def test_evaluate_refuses_duplicate_names(adapters, tmp_path):
    shutil.copytree(adapters[1].path, tmp_path / "elsewhere" / adapters[0].name)
    with pytest.raises(AdapterError) as error:
        evaluate(
            [adapters[0], load_adapter_folder(tmp_path / "elsewhere" / adapters[0].name)],
            options=ModelOptions(device="cpu"),
        )
    assert str(error.value) == "Two of these adapters have the name noir: list each once, or rename one."


def test_one_eval_row_is_refused(adapters):
    with pytest.raises(AdapterError) as error:
        evaluate(
            adapters[:1], [EvalSet("x", tiny_models.reviews(5))], eval_rows=1, options=ModelOptions(device="cpu")
        )
    assert str(error.value) == (
        "There are no rows to evaluate on. x: a standard error needs two rows. Name other data with --eval-dataset."
    )


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"load_in": "8bit"}, {"load_in": "4bit"}])
def test_quantized_loss_has_its_own_cache(adapters, options):
    """All have the dtype float32."""
    full, quantized, again = (
        evaluate(adapters[:1], eval_rows=4, options=ModelOptions(device="cpu", **chosen)).cells[0][0]
        for chosen in ({}, options, {})
    )
    assert full == again
    assert full.base_loss != quantized.base_loss == pytest.approx(full.base_loss, abs=0.4)
    assert full.loss != quantized.loss


def test_pattern_order_changes_loss_key(gpt2, tmp_path):
    """The first key of a pattern that matches counts, so the order decides the scale."""
    patterns = {"c_attn": 1, "0.attn.c_attn": 60}
    orders = (patterns, dict(reversed(patterns.items())))
    written_adapters = [
        save_peft_adapter(gpt2, tmp_path / str(i) / "one", target_modules=["c_attn"]) for i in range(2)
    ]
    for adapter, pattern in zip(written_adapters, orders, strict=True):
        config = json.loads((adapter.path / CONFIG_FILE).read_text()) | {"alpha_pattern": pattern}
        (adapter.path / CONFIG_FILE).write_text(json.dumps(config))
    base = load_base(find_base(str(gpt2)), ModelOptions(device="cpu"))
    rows = [EvalSet("some", tiny_models.reviews(6, seed=9))]
    first, second = (
        gain_matrix.held_out_losses(base, {"one": load_adapter_folder(adapter.path)}, rows)[0][0][1].loss
        for adapter in written_adapters
    )
    assert abs(first - second) > 1e-3


def test_shared_base_is_clean_between_batches(adapters, gpt2, monkeypatch):
    """Between batches the base is plain, its head included, for other users."""
    monkeypatch.setattr(held_out_loss, "BATCH_TOKENS_CPU", 64)
    base = load_base(find_base(str(gpt2)), ModelOptions(device="cpu"))
    ids = torch.arange(9)[None]
    batches = []

    def plain():
        with torch.inference_mode():
            return base.model(ids).logits

    def access(work):
        assert plain().equal(before)
        batches.append(work)
        return work()

    before = plain()
    matrix = gain_matrix.evaluate_on(base, adapters, eval_rows=4, access=access)
    assert plain().equal(before)
    assert len(batches) > 3 + 3 * 2 + 9  # tokenization, the base and the cells have several batches each
    assert matrix == evaluate(adapters, eval_rows=4, options=ModelOptions(device="cpu"))
