"""What works with each method, tried on a tiny model: `python -m tests.method_table` writes the table of docs/methods.md."""

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from lora_tuner import Generator, Library, ModelOptions, SamplingParams, TrainConfig, evaluation, train
from lora_tuner.config import METHODS
from lora_tuner.convert import blend as convert_blend
from lora_tuner.convert import compress, export_gguf
from lora_tuner.convert import merge as convert_merge
from lora_tuner.errors import LoraTunerError

from . import tiny_models

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
BEGIN, END = "<!-- made by `make docs` -->\n", "<!-- end -->\n"
ROWS: dict[str, dict[str, object]] = {f"`--method {name}`": {"method": name} for name in METHODS}
ROWS |= {f"`--load-in {bits}`": {"load_in": bits} for bits in ("8bit", "4bit")}


class Tried:
    """One adapter, and all that can be done with it. What is wrong is a LoraTunerError, with its reason, or a broken test."""

    def __init__(self, folder: Path, model: Path, texts: Path, given: dict[str, object]) -> None:
        self.library, self.model, self.folder = Library(folder / "adapters"), str(model), folder
        places = {"adapters_dir": self.library.path, "runs_dir": folder / "runs"}
        short = {"max_steps": 6, "max_length": 64, "batch_size": 2, "rank": 4, "eval_rows": 8, "device": "cpu"}
        self.settings = {"base": self.model, "dataset": str(texts), **places, **short}
        self.given = given
        self.load_in = str(given.get("load_in", "auto"))

    def train(self) -> None:
        self.adapter = train(TrainConfig.model_validate(self.settings | {"name": "one"} | self.given))
        assert self.adapter.manifest is not None
        assert self.adapter.manifest.result is not None
        assert self.adapter.manifest.result.gain > 0
        self.loss = self.adapter.manifest.result.loss

    def go_on(self) -> None:
        kept = {key: value for key, value in self.settings.items() if key not in ("rank", "base")}
        train(TrainConfig.model_validate(kept | {"name": "two", "parent": "one", "max_steps": 2}))

    def generator(self) -> Generator:
        return Generator(
            "one", adapters_dir=self.library.path, options=ModelOptions(device="cpu", load_in=self.load_in)
        )

    def generate(self) -> None:
        generator = self.generator()
        assert generator.generate("the actor", SamplingParams(greedy=True, max_new_tokens=8)).tokens

    def compare(self) -> None:
        asked = [("the actor", None), ("the actor", "one")]
        generator = self.generator()
        both = generator.generate_batch(asked, SamplingParams(greedy=True, max_new_tokens=8))
        alone = generator.generate("the actor", SamplingParams(greedy=True, max_new_tokens=8))
        assert both[1].text == alone.text

    def evaluate(self) -> None:
        cell = evaluation.evaluate(
            [self.library.get("one")], options=ModelOptions(device="cpu", load_in=self.load_in)
        ).cells[0][0]
        assert cell is not None
        assert abs(cell.loss - self.loss) < 1e-3

    def merge(self) -> None:
        convert_merge.merge(self.adapter, self.folder / "merged")

    def blend(self) -> None:
        convert_blend.blend([(self.adapter, 0.5)], "blended", self.library, options=ModelOptions(device="cpu"))

    def compress_it(self) -> None:
        compress.compress(self.adapter, "compressed", self.library, energy=0.9, options=ModelOptions(device="cpu"))

    def export(self) -> None:
        export_gguf.to_gguf(self.adapter, self.folder / "one.gguf")


ACTIONS: dict[str, Callable[[Tried], None]] = {
    "train": Tried.train,
    "train --from": Tried.go_on,
    "generate": Tried.generate,
    "compare, serve": Tried.compare,
    "evaluate": Tried.evaluate,
    "merge": Tried.merge,
    "blend": Tried.blend,
    "compress": Tried.compress_it,
    "export": Tried.export,
}


def table(folder: Path) -> str:
    """Of each row and action: yes, or the number of the reason for which it is refused. `folder` is empty."""
    model = tiny_models.save_model(folder / "llama", "llama", width=64)  # blocks of 4 bits have 64 weights
    texts = folder / "reviews.csv"
    texts.write_text("text\n" + "\n".join(tiny_models.reviews(120)) + "\n", encoding="utf-8")
    lines = ["| | " + " | ".join(f"`{name}`" for name in ACTIONS) + " |", "| --- |" + " --- |" * len(ACTIONS)]
    reasons: dict[str, int] = {}
    for number, (name, given) in enumerate(ROWS.items()):
        tried, cells = Tried(folder / str(number), model, texts, given), []
        for action in ACTIONS.values():
            try:
                action(tried)
                cells.append("yes")
            except LoraTunerError as error:
                reason = re.sub(r"\S*/adapters/one\b|\bone\b", "NAME", str(error).replace(f"{tried.folder}/", ""))
                cells.append(f"no ({reasons.setdefault(reason, len(reasons) + 1)})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([*lines, "", *notes]) + "\n"


def page(found: str) -> str:
    """The page with this table in it."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return before + BEGIN + "\n" + found + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        os.environ["LORA_TUNER_CACHE"] = f"{place}/cache"
        PAGE.write_text(page(table(Path(place))), encoding="utf-8")
