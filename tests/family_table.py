"""Each family of models tried on a tiny random one: `python -m tests.family_table` writes docs/models.md.

`yes` stands for what was done and whose outputs were compared; other words have the reason that the error or notice
gave. With names of families it computes their rows alone, and keeps the others of the page.
"""

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoConfig, PreTrainedModel

from lora_tuner import Library, ModelOptions, SamplingParams, TrainConfig, blend, compress, merge, train
from lora_tuner.adapters.compatibility import check_compatibility
from lora_tuner.convert.export_gguf import to_gguf
from lora_tuner.convert.gguf_model import write_model_gguf
from lora_tuner.errors import AdapterError, BaseModelError, LoraTunerError, Notice
from lora_tuner.inference.batch import GenerationEngine
from lora_tuner.inference.multi_lora import LoadedAdapter
from lora_tuner.inference.sequence import Sequence
from lora_tuner.models.loading import auto_class, open_base
from lora_tuner.text import format_coverage
from lora_tuner.training.setup import TrainingSetup, prepare_training

from . import method_table, tiny_models
from .conftest import prepare_process
from .model_families import save_family

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
NO_WINDOW = {"sliding_window": None}
# Name -> model type, changes to its settings in `model_families.FAMILIES`.
ROWS: dict[str, tuple[str, Mapping[str, object]]] = {
    "Llama, SmolLM2": ("llama", {}),
    "Mistral": ("mistral", NO_WINDOW),
    "Mistral with a sliding window": ("mistral", {}),
    "Mistral Small 3": ("mistral3", {}),
    "Ministral 3": ("ministral3", {}),
    "Mixtral": ("mixtral", {}),
    "Qwen2, Qwen2.5": ("qwen2", {}),
    "Qwen2-MoE": ("qwen2_moe", {}),
    "Qwen3": ("qwen3", {}),
    "Qwen3-MoE": ("qwen3_moe", {}),
    "Qwen3-Next": ("qwen3_next", {}),
    "Qwen3.5": ("qwen3_5", {}),
    "Qwen3.5, text model alone": ("qwen3_5_text", {}),
    "Qwen3.5-MoE": ("qwen3_5_moe", {}),
    "Gemma": ("gemma", {}),
    "Gemma 2": ("gemma2", {}),
    "Gemma 3, text": ("gemma3_text", {}),
    "Gemma 3": ("gemma3", {}),
    "Gemma 4": ("gemma4", {}),
    "gpt-oss": ("gpt_oss", {}),
    "Phi-2": ("phi", {}),
    "Phi-3, Phi-4": ("phi3", {}),
    "Phi-3.5-MoE": ("phimoe", {}),
    "OLMo 2": ("olmo2", {}),
    "OLMoE": ("olmoe", {}),
    "SmolLM3": ("smollm3", {}),
    "GLM 4": ("glm4", {}),
    "GLM 4.5": ("glm4_moe", {}),
    "DeepSeek-V3": ("deepseek_v3", {}),
    "Llama 4, text": ("llama4_text", {}),
    "Granite": ("granite", {}),
    "Granite-MoE": ("granitemoe", {}),
    "Granite 4": ("granitemoehybrid", {}),
    "Command R7B": ("cohere2", {}),
    "ERNIE 4.5": ("ernie4_5", {}),
    "Hy4": ("hy_v4", {}),
    "Laguna": ("laguna", {}),
    "StarCoder2": ("starcoder2", {}),
    "StableLM": ("stablelm", {}),
    "GPT-2": ("gpt2", {}),
    "GPT-J": ("gptj", {}),
    "GPT-Neo": ("gpt_neo", {}),
    "GPT-NeoX, Pythia": ("gpt_neox", {}),
    "OPT": ("opt", {}),
    "XGLM": ("xglm", {}),
    "BLOOM": ("bloom", {}),
    "Falcon": ("falcon", {}),
    "MPT": ("mpt", {}),
    "CTRL": ("ctrl", {}),
    "Mamba": ("mamba", {}),
    "Mamba 2": ("mamba2", {}),
    "Falcon-Mamba": ("falcon_mamba", {}),
    "Bamba": ("bamba", {}),
    "Falcon-H1": ("falcon_h1", {}),
    "Jamba": ("jamba", {}),
    "Nemotron-H": ("nemotron_h", {}),
    "LFM2": ("lfm2", {}),
    "RecurrentGemma": ("recurrent_gemma", {}),
    "RWKV": ("rwkv", {}),
    "BART, decoder": ("bart", {}),
    "BERT, as decoder": ("bert", {}),
    "RoBERTa, as decoder": ("roberta", {}),
}
IDS = torch.arange(100, 124)[None]
PROMPTS = ([105, 110, 120], [*range(130, 141)], [200, 7])
GREEDY = SamplingParams(greedy=True, max_new_tokens=4, repetition_penalty=1.0)
TOLERANCE = 1e-4  # of logits, relative to the largest where that is over 1
INT8_ERROR = 0.15  # of logits in int8; Mamba has 0.09, others under 0.06
Row = dict[str, str]  # column -> cell: a word, or "word: reason"


def logits(model: PreTrainedModel | PeftModel, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits[0].float()
    return found


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference of logits, relative to the largest of them where that is over 1."""
    return float((one - other).abs().max()) / max(1.0, float(other.abs().max()))


def with_reason(word: str, reasons: list[str]) -> str:
    return f"{word}: {'; '.join(reason.rstrip('.') for reason in reasons)}" if reasons else word


class Trial:
    """A tiny random base of a family, and all that is done with an adapter of it."""

    def __init__(self, folder: Path, model_type: str, changes: Mapping[str, object]) -> None:
        self.folder, self.model_type = folder, model_type
        self.base = save_family(folder / model_type, model_type, **changes)
        self.library = Library(folder / "adapters")
        self.notices: list[str] = []
        self.options = ModelOptions(device="cpu", notify=self.notify)

    def notify(self, event: object) -> None:
        if isinstance(event, Notice):
            self.notices.append(event.text)

    def train(self) -> str:
        texts = self.folder / "reviews.csv"
        texts.write_text("text\n" + "\n".join(tiny_models.reviews(40)) + "\n", encoding="utf-8")
        config = TrainConfig(
            base=str(self.base),
            dataset=str(texts),
            name="NAME",
            adapters_dir=self.library.path,
            runs_dir=self.folder / "runs",
            max_steps=4,
            max_length=32,
            batch_size=2,
            rank=4,
            eval_rows=4,
            device="cpu",
            dtype="float32",
        )
        setups: list[TrainingSetup] = []

        def prepare(requested: TrainConfig, notify: Callable[..., None]) -> TrainingSetup:
            setups.append(prepare_training(requested, notify))
            return setups[-1]

        self.adapter = train(config, self.notify, prepare)
        (self.setup,) = setups
        self.expected = logits(self.setup.model)
        return "yes"

    def describe_rows(self) -> str:
        return "packed" if self.setup.packing else "padded"

    def load_base(self, folder: Path) -> PreTrainedModel:
        """The base, or a model made of it, as transformers loads it."""
        kind = auto_class(AutoConfig.from_pretrained(folder), self.adapter.modules)
        model: PreTrainedModel = kind.from_pretrained(folder, dtype=torch.float32)
        return model

    def load_in_peft(self) -> str:
        report = check_compatibility(self.adapter, "peft")
        base = self.load_base(self.base)
        plain = logits(base)
        self.peft = PeftModel.from_pretrained(base, self.adapter.path)
        assert report.accepted, report.errors
        assert difference(plain, self.expected) > 30 * TOLERANCE  # else nothing is compared
        assert difference(logits(self.peft), self.expected) < TOLERANCE
        return with_reason("yes", report.notes)

    def merge(self) -> str:
        merged = merge(self.adapter, self.folder / "merged", options=ModelOptions())
        assert difference(logits(self.load_base(merged.path)), self.expected) < TOLERANCE
        return "yes"

    def blend_and_compress(self) -> str:
        blend([(self.adapter, -0.5)], "other", self.library, options=self.options)
        compress(self.adapter, "small", self.library, energy=0.9, options=self.options)
        return "yes"

    def generate(
        self, engine: GenerationEngine, *requests: tuple[list[int], LoadedAdapter | None]
    ) -> list[list[int]]:
        """Greedy continuations of prompts with adapters, in one batch."""
        sequences = [Sequence(engine.base, ids, GREEDY, lora=lora) for ids, lora in requests]
        engine.add(list(sequences))
        while engine.sequences:
            engine.step()
        assert not any(sequence.error for sequence in sequences)
        return [sequence.output_ids for sequence in sequences]

    def mix_batch(self) -> str:
        self.engine = GenerationEngine(open_base(self.adapter, self.options), self.notify)
        one, other = (self.engine.multi_lora.load(self.library.get(name)) for name in ("NAME", "other"))
        requests = [(prompt, lora) for prompt in PROMPTS for lora in (one, None, other)]
        self.notices.clear()
        mixed = self.generate(self.engine, *requests)
        assert mixed == [self.generate(self.engine, request)[0] for request in requests]
        for prompt, output in zip(PROMPTS, mixed[::3], strict=True):
            if output:
                scores = logits(self.peft, torch.tensor([prompt + output]))[len(prompt) - 1 : -1]
                chosen = scores.gather(1, torch.tensor(output)[:, None])[:, 0]
                assert difference(chosen, scores.max(1).values) < 10 * TOLERANCE
        word = "separate" if any("its own batch" in notice for notice in self.notices) else "yes"
        return with_reason(word, self.notices)

    def generate_in_int8(self) -> str:
        options = ModelOptions(device="cpu", dtype="int8", notify=self.notify)
        self.notices.clear()
        engine = GenerationEngine(open_base(self.adapter, options), self.notify)
        loaded = engine.multi_lora.load(self.adapter)
        self.generate(engine, *((prompt, loaded) for prompt in PROMPTS))
        with engine.multi_lora.apply_hooks(engine.multi_lora.hooks([loaded])):
            found = logits(engine.base.model)
        assert (found - self.expected).norm() < INT8_ERROR * self.expected.norm()
        left_out = [re.sub(r" \(.*?B\)", "", notice) for notice in self.notices if "experts" in notice]
        return with_reason("in part" if left_out else "yes", left_out)

    def describe_fast_path(self) -> str:
        """Where own kernels compute the decoder blocks on a CPU."""
        parts = {"training": self.setup.kernels, "generation": self.engine.cpu_decoder}
        return ", ".join(part for part, used in parts.items() if used) or "transformers"

    def export_gguf(self) -> str:
        accepted = check_compatibility(self.adapter, "llama.cpp").accepted
        try:
            to_gguf(self.adapter, self.folder / "NAME.gguf")
        except AdapterError:
            assert not accepted
            raise
        assert accepted
        accepted = check_compatibility(self.adapter, "gguf-merged").accepted
        try:
            write_model_gguf(self.folder / "merged", self.folder / "merged.gguf", "float32", notify=self.notify)
        except BaseModelError as error:
            assert not accepted
            return with_reason("adapter", [str(error)])
        assert accepted
        return "yes"

    def check_vllm(self) -> str:
        report = check_compatibility(self.adapter, "vllm")
        return with_reason("yes", report.notes) if report.accepted else with_reason("no", report.errors)


COLUMNS: dict[str, Callable[[Trial], str]] = {
    "trains": Trial.train,
    "packing": Trial.describe_rows,
    "saved = reloaded": Trial.load_in_peft,
    "merged = adapter": Trial.merge,
    "blend, compress": Trial.blend_and_compress,
    "mixed batch = solo": Trial.mix_batch,
    "int8": Trial.generate_in_int8,
    "fast CPU path": Trial.describe_fast_path,
    "GGUF": Trial.export_gguf,
    "vLLM": Trial.check_vllm,
}
LAYERS = """## Layers that are adapted

Targets are the layers that the default, `--target-modules auto`, adapts; the share is that of the weights of all blocks, in
the tiny model. Of a large model, convolutions, biases, routers and single dense layers are a smaller part.
"""
LAYER_COLUMNS = ("share", "targets", "not adapted")


def compute_row(folder: Path, name: str) -> Row:
    """Try a family. `folder` must be empty."""
    model_type, changes = ROWS[name]
    trial, row = Trial(folder, model_type, changes), Row()
    for column, attempt in COLUMNS.items():
        try:
            row[column] = attempt(trial)
        except LoraTunerError as error:
            row[column] = with_reason("no", [str(error)])
        row[column] = re.sub(rf"\b{model_type}\b", "TYPE", row[column].replace(f"{folder}/", ""))
    targets = trial.setup.targets
    # PEFT needs the number of a block where another part of a wrapper has layers of that name.
    names = dict.fromkeys(re.sub(r"^.*\b\d+\.", "", target) for target in targets.names)
    layers = (format_coverage(targets.coverage), ", ".join(names), ", ".join(targets.not_adapted))
    return row | dict(zip(LAYER_COLUMNS, layers, strict=True))


def render(rows: Mapping[str, Row]) -> str:
    """Two tables, and the reasons of the first."""
    reasons: dict[str, int] = {}

    def cell(text: str) -> str:
        word, _, reason = text.partition(": ")
        return f"{word} ({reasons.setdefault(reason, len(reasons) + 1)})" if reason else word

    works = _table(COLUMNS, {name: [cell(row[column]) for column in COLUMNS] for name, row in rows.items()})
    layers = _table(
        LAYER_COLUMNS, {name: [row[column] for column in LAYER_COLUMNS] for name, row in rows.items()}
    )
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([*works, "", *notes, "", LAYERS, *layers]) + "\n"


def _table(columns: Iterable[str], rows: Mapping[str, list[str]]) -> list[str]:
    lines = [
        ["family", *columns],
        ["---"] * (1 + len([*columns])),
        *([name, *cells] for name, cells in rows.items()),
    ]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def read_rows(text: str) -> dict[str, Row]:
    """The rows of the page, with their reasons."""
    text = text.partition(method_table.BEGIN)[2]
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    rows: dict[str, Row] = {}
    columns: list[str] = []
    for line in re.findall(r"^\| (.*) \|$", text, re.MULTILINE):
        name, *cells = (cell.strip() for cell in line.split(" | "))
        if name == "family":
            columns = cells
        elif name != "---":
            found = (re.sub(r" \((\d+)\)$", lambda match: f": {reasons[match[1]]}", cell) for cell in cells)
            rows.setdefault(name, Row()).update(zip(columns, found, strict=True))
    return rows


def main(names: list[str]) -> None:
    prepare_process()
    rows = read_rows(PAGE.read_text(encoding="utf-8"))
    for name in names or ROWS:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["LORA_TUNER_CACHE"] = f"{folder}/cache"
            rows[name] = compute_row(Path(folder), name)
    rows = {name: rows[name] for name in ROWS if name in rows}
    PAGE.write_text(method_table.page(render(rows), PAGE), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
