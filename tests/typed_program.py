"""A user's program with every public name: tests/test_types.py has it type-checked outside of this folder. Never run."""

from pathlib import Path
from typing import assert_type

import lora_tuner
from lora_tuner import (
    Adapter,
    BlendResult,
    Classification,
    CompressResult,
    EvalSet,
    GainMatrix,
    GenerationOutput,
    Generator,
    Interrupted,
    Library,
    LoraTunerError,
    Manifest,
    MergeResult,
    ModelExport,
    ModelOptions,
    Notice,
    OllamaExport,
    Progress,
    Report,
    RunEstimate,
    SamplingParams,
    SweepResult,
    TrainConfig,
    blend,
    classify,
    compress,
    evaluate,
    export_model,
    export_ollama,
    make_report,
    merge,
    plan,
    pull,
    push,
    resume,
    run_sweep,
    to_gguf,
    to_mlx,
    train,
)

assert_type(lora_tuner.__version__, str)
assert_type(lora_tuner.__all__, list[str])


def show(event: Notice | Progress) -> None:
    if isinstance(event, Notice):
        assert_type(event.text, str)
    else:
        assert_type((event.stage, event.done, event.total, event.detail), tuple[str, int, int, str])


def training() -> Adapter:
    config = TrainConfig(
        dataset="reviews.csv", name="noir", minutes=2, rank=8, where=["label=1"], learning_rate="probe"
    )
    assert_type(config.dataset, str | list[str])
    assert_type(config.max_steps, int | None)
    assert_type(config.adapters_dir, Path)
    changes: dict[str, object] = {"rank": 4, "name": "small"}
    assert_type(config.model_copy(update=changes), TrainConfig)
    estimate = plan(config, notify=None)
    assert_type(estimate, RunEstimate)
    assert_type((estimate.steps, estimate.training_seconds, estimate.advice), tuple[int, float, str | None])
    try:
        assert_type(train(config, notify=show), Adapter)
    except Interrupted:
        assert_type(resume("noir", Path("runs"), threads=2, accept=["threads"]), Adapter)
    except LoraTunerError as error:
        assert_type(str(error), str)
    result = run_sweep([config, config.model_copy(update=changes)])
    assert_type(result, SweepResult)
    assert_type((result.recommended, result.path, result.base_loss), tuple[str, Path, float])
    assert_type([trial.loss for trial in result.trials], list[float | None])
    assert_type(result.to_dict(), dict[str, object])
    return Library().get(result.recommended)


def reading(library: Library) -> None:
    assert_type(library.names(), list[str])
    adapter = library.get("noir")
    assert_type(adapter, Adapter)
    assert_type((adapter.name, adapter.path, adapter.rank, adapter.base), tuple[str, Path, int, str])
    assert_type((adapter.parameters, adapter.bytes), tuple[int, int])
    assert_type([sample.adapter for sample in adapter.final_samples], list[str])
    assert_type(adapter.summary_rows(), list[tuple[str, str]])
    assert_type(adapter.manifest, Manifest | None)
    if adapter.manifest is not None and adapter.manifest.result is not None:
        assert_type(adapter.manifest.result.gain, float)
        assert_type(adapter.manifest.result.standard_error, float | None)
    for name, entry in library.entries():
        assert_type(name, str)
        if isinstance(entry, LoraTunerError):
            continue
        assert_type(entry, Adapter)


def generating() -> None:
    generator = Generator("noir", options=ModelOptions(device="cpu", notify=show))
    sampling = SamplingParams(max_new_tokens=40, temperature=0.8, seed=1, n=2, stop=["\n"])
    output = generator.generate("Acting", sampling, on_text=print)
    assert_type(output, GenerationOutput)
    assert_type((output.text, output.adapter, output.tokens), tuple[str, str | None, int])
    assert_type((output.finished, output.seed), tuple[bool, int | None])
    assert_type(generator.generate_all([{"role": "user", "content": "Hello"}], sampling), list[GenerationOutput])
    assert_type(generator.generate_batch([("Acting", None), ("Acting", "noir")]), list[GenerationOutput])
    assert_type(generator.set_adapter(None), str | None)
    assert_type(generator.loaded_adapters, list[str])
    told = classify(generator, ["A film to remember.", {"title": "Noir", "text": "Dark."}])
    assert_type(told, list[Classification])
    assert_type((told[0].label, told[0].probabilities), tuple[str, dict[str, float]])


def measuring(adapters: list[Adapter]) -> None:
    matrix = evaluate(adapters, [EvalSet("mine", ["One row.", "Another."])], eval_rows=50)
    assert_type(matrix, GainMatrix)
    for row in matrix.cells:
        for cell in row:
            if cell is not None:
                assert_type((cell.loss, cell.gain, cell.perplexities), tuple[float, float, tuple[float, float]])
    matrix.plot(Path("gains.png"))
    assert_type(matrix.to_dict(), dict[str, object])
    report = make_report(adapters[0], skip=["memorization"])
    assert_type(report, Report)
    assert_type((report.adapter, report.seconds, report.missing), tuple[str, float, dict[str, str]])


def converting(one: Adapter, other: Adapter, library: Library) -> None:
    blended = blend([(one, 0.5), (other, 0.5)], "both", library, rank=8)
    assert_type(blended, BlendResult)
    assert_type((blended.adapter, blended.exact_rank), tuple[Adapter, int])
    compressed = compress(blended.adapter, "small", library, energy=0.9)
    assert_type(compressed, CompressResult)
    assert_type(compressed.ranks, dict[str, tuple[int, int]])
    merged = merge(one, Path("merged/noir"), dtype="bfloat16")
    assert_type(merged, MergeResult)
    assert_type((merged.path, merged.comparison.max_logit_difference), tuple[Path, float])
    whole = export_model(one, Path("noir.gguf"), quantization="q8_0")
    assert_type(whole, ModelExport)
    assert_type((whole.path, whole.bytes, whole.precision), tuple[Path, int, str])
    ollama = export_ollama(one, Path("noir-ollama"))
    assert_type(ollama, OllamaExport)
    assert_type((ollama.template, ollama.stops), tuple[str, list[str]])
    assert_type(to_gguf(one, Path("lora.gguf")).path, Path)
    assert_type(to_mlx(one, Path("noir-mlx")).path, Path)
    assert_type(push(one, "me/noir", dry_run=True).files, dict[str, int])
    assert_type(pull("me/noir", library).adapter, Adapter | None)
