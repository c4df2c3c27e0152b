"""Every method and command tried on a tiny model: `python -m tests.method_table` writes the table of docs/methods.md."""

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from lora_tuner import Generator, Library, ModelOptions, SamplingParams, TrainConfig, train
from lora_tuner.config import METHODS
from lora_tuner.convert import blend as convert_blend
from lora_tuner.convert import compress, export_gguf
from lora_tuner.convert import merge as convert_merge
from lora_tuner.errors import LoraTunerError
from lora_tuner.evaluation import gain_matrix

from . import tiny_models

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
BEGIN, END = "<!-- made by `make docs` -->\n", "<!-- end -->\n"
VARIANTS: dict[str, dict[str, object]] = {f"`--method {name}`": {"method": name} for name in METHODS}
VARIANTS |= {f"`--load-in {bits}`": {"load_in": bits} for bits in ("8bit", "4bit")}
GREEDY = SamplingParams(greedy=True, max_new_tokens=8)


class Trial:
    """One adapter and all commands on it. An unsupported command raises LoraTunerError; any other error fails the test."""

    def __init__(self, folder: Path, model: Path, texts: Path, variant: dict[str, object]) -> None:
        self.library, self.folder = Library(folder / "adapters"), folder
        folders = {"adapters_dir": self.library.path, "runs_dir": folder / "runs"}
        short = {"max_steps": 6, "max_length": 64, "batch_size": 2, "rank": 4, "eval_rows": 8, "device": "cpu"}
        self.settings = {"base": str(model), "dataset": str(texts), **folders, **short}
        self.variant = variant
        self.options = ModelOptions(device="cpu", load_in=str(variant.get("load_in", "auto")))

    def train(self) -> None:
        self.adapter = train(TrainConfig.model_validate(self.settings | {"name": "one"} | self.variant))
        assert self.adapter.manifest is not None
        assert self.adapter.manifest.result is not None
        assert self.adapter.manifest.result.gain > 0
        self.loss = self.adapter.manifest.result.loss

    def train_from(self) -> None:
        settings = {key: value for key, value in self.settings.items() if key not in ("rank", "base")}
        train(TrainConfig.model_validate(settings | {"name": "two", "parent": "one", "max_steps": 2}))

    def generator(self) -> Generator:
        return Generator("one", adapters_dir=self.library.path, options=self.options)

    def generate(self) -> None:
        assert self.generator().generate("the actor", GREEDY).tokens

    def compare(self) -> None:
        generator = self.generator()
        batched = generator.generate_batch([("the actor", None), ("the actor", "one")], GREEDY)
        assert batched[1].text == generator.generate("the actor", GREEDY).text

    def evaluate(self) -> None:
        cell = gain_matrix.evaluate([self.library.get("one")], options=self.options).cells[0][0]
        assert cell is not None
        assert abs(cell.loss - self.loss) < 1e-3

    def merge(self) -> None:
        convert_merge.merge(self.adapter, self.folder / "merged")

    def blend(self) -> None:
        convert_blend.blend([(self.adapter, 0.5)], "blended", self.library, options=ModelOptions(device="cpu"))

    def compress(self) -> None:
        compress.compress(
            self.adapter, "compressed", self.library, energy=0.9, options=ModelOptions(device="cpu")
        )

    def export(self) -> None:
        export_gguf.to_gguf(self.adapter, self.folder / "one.gguf")


COMMANDS: dict[str, Callable[[Trial], None]] = {
    "train": Trial.train,
    "train --from": Trial.train_from,
    "generate": Trial.generate,
    "compare, serve": Trial.compare,
    "evaluate": Trial.evaluate,
    "merge": Trial.merge,
    "blend": Trial.blend,
    "compress": Trial.compress,
    "export": Trial.export,
}


def table(folder: Path) -> str:
    """For each variant and command: yes, or the number of the reason why it is refused. `folder` must be empty."""
    model = tiny_models.save_model(folder / "llama", "llama", width=64)  # 4-bit blocks have 64 weights
    texts = folder / "reviews.csv"
    texts.write_text("text\n" + "\n".join(tiny_models.reviews(120)) + "\n", encoding="utf-8")
    lines = ["| | " + " | ".join(f"`{name}`" for name in COMMANDS) + " |", "| --- |" + " --- |" * len(COMMANDS)]
    reasons: dict[str, int] = {}
    for number, (name, variant) in enumerate(VARIANTS.items()):
        trial, cells = Trial(folder / str(number), model, texts, variant), []
        for command in COMMANDS.values():
            try:
                command(trial)
                cells.append("yes")
            except LoraTunerError as error:
                reason = re.sub(r"\S*/adapters/one\b|\bone\b", "NAME", str(error).replace(f"{trial.folder}/", ""))
                cells.append(f"no ({reasons.setdefault(reason, len(reasons) + 1)})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([*lines, "", *notes]) + "\n"


def page(table: str, path: Path = PAGE) -> str:
    """Return a page of the docs with this table in it."""
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    return before + BEGIN + "\n" + table + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LORA_TUNER_CACHE"] = f"{folder}/cache"
        PAGE.write_text(page(table(Path(folder))), encoding="utf-8")
