"""adapters: list, show, verify, rename, remove, adopt."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from lora_tuner import Library, TrainConfig, atomic_io, train
from lora_tuner.adapters.adapter import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE, verify_adapter
from lora_tuner.models.resolve import find_base
from lora_tuner.settings_files import resolve_settings

from .. import adapter_files, tiny_models
from ..parameters import sampled
from .test_commands import GREEDY, ROOT, error, listed, other_base, run


def process(*arguments, **options):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, timeout=120, **options
    )


def test_verify_rename_remove(adapter, tmp_path):
    assert run("adapters", "verify").stdout == "reviews: OK\n"
    assert json.loads(run("adapters", "verify", "reviews", "--json").stdout) == [
        {"name": "reviews", "problems": []}
    ]
    assert run("adapters", "rename", "reviews", "old").stdout == "adapters/old\n"
    (tmp_path / "adapters" / "old" / "run.yaml").unlink()
    assert run("adapters", "verify", "old", exit_code=1).stdout == "old: run.yaml is missing\n"
    assert "There is no adapter 'reviews'" in run("adapters", "verify", "reviews", exit_code=1).stdout
    run("adapters", "remove", "old", stdin="n\n", exit_code=1)
    assert Library().names() == ["old"]
    assert run("adapters", "remove", "old", "--yes").stderr == "Removed adapters/old.\n"
    assert Library().names() == []


def test_show_tells_general_text(tmp_path):
    general = {"base_loss": 3.0, "loss": 3.02, "gain": -0.02, "standard_error": 0.01, "rows": 40, "tokens": 2_000}
    adapter_files.write(tmp_path / "adapters" / "poems", facts=adapter_files.manifest(general=general))
    shown = " ".join(run("adapters", "show", "poems").stdout.split())
    assert "general text +0.020 ± 0.010 (change of loss on 40 rows; above zero is worse)" in shown


def test_remove_names_missing_adapter_unasked(adapter):
    assert error("adapters", "remove", "nope") == "Error: There is no adapter 'nope' in adapters (reviews)."


def test_rename_renames_card_and_settings(adapter, tmp_path):
    card, before = ((adapter.path / name).read_text() for name in ("README.md", "run.yaml"))
    (adapter.path / "README.md").write_text(f"{card}\nLicense: mine. Made from reviews.csv for reviews.\n")
    renamed = Library().rename("reviews", "critic")
    text = (renamed.path / "README.md").read_text()
    assert text.endswith("\nLicense: mine. Made from reviews.csv for reviews.\n")
    assert "\n# critic\n" in text
    assert "path/to/critic" in text
    assert "path/to/reviews" not in text
    assert (renamed.path / "run.yaml").read_text() == before.replace("name: reviews\n", "name: critic\n")
    assert resolve_settings(TrainConfig, {}, renamed.path / "run.yaml").name == "critic"
    assert verify_adapter(renamed) == []
    for name in ("null", "yes", "critic"):  # which YAML reads as other values
        renamed = Library().rename(renamed.name, name)
        assert resolve_settings(TrainConfig, {}, renamed.path / "run.yaml").name == name
    assert [path.name for path in (tmp_path / "adapters").iterdir()] == ["critic"]


def test_renamed_link_leaves_its_target(adapter, tmp_path):
    before = (adapter.path / "README.md").read_text()
    adapter.path.rename(tmp_path / "elsewhere")
    (tmp_path / "adapters" / "reviews").symlink_to(tmp_path / "elsewhere")
    Library().rename("reviews", "critic")
    assert (tmp_path / "elsewhere" / "README.md").read_text() == before


def test_show_has_words_of_list(adapter, columns):
    columns(250)
    words = run("adapters", "list").stdout.splitlines()[0].split()
    shown = [line.split(maxsplit=1)[0] for line in run("adapters", "show", "reviews").stdout.splitlines()]
    assert set(words) - {"parent"} <= set(shown)  # this adapter has no parent


def test_narrow_list_breaks_no_name(adapter, columns):
    names = {"base": adapter.manifest.base.model_copy(update={"name": "smollm2-135m"})}
    data = adapter.manifest.data.model_copy(update={"name": "poems-of-the-sea.txt + data/notes"})
    manifest = adapter.manifest.model_copy(update=names | {"data": data})
    (adapter.path / MANIFEST_FILE).write_text(manifest.to_json())
    for width, is_whole in ((80, False), (120, True)):
        columns(width)
        header, line = run("adapters", "list").stdout.splitlines()
        assert "smollm2-135m" in line
        assert "poems-of-the-sea.txt + data/notes" in line
        assert ("size" in header) == is_whole
    assert str(adapter.path / "README.md") in run("adapters", "show", "reviews").stdout


def test_list_shows_broken_adapters(adapter):
    (adapter.path.parent / "broken").mkdir()
    result = run("adapters", "list")
    assert "reviews" in result.stdout
    assert "broken is broken: adapters/broken has no adapter_config.json" in result.stderr


def test_adapters_dir_option(settings, tmp_path):
    train(settings(adapters_dir=tmp_path / "shelf", name="a"))
    assert run("adapters", "list", "--adapters-dir", "shelf").stdout.splitlines()[1].startswith("a ")
    assert run("generate", "--adapters-dir", "shelf", "--adapter", "a", *GREEDY, "the").stdout.startswith("the")
    assert Library().names() == []


def test_adopt_command(two, tmp_path, gpt2, columns):
    columns(200)
    shutil.copytree(two[0].path, tmp_path / "elsewhere" / "guest")
    (tmp_path / "elsewhere" / "guest" / MANIFEST_FILE).unlink()
    before = (tmp_path / "elsewhere" / "guest" / WEIGHTS_FILE).read_bytes()
    shown = run("adapters", "show", "elsewhere/guest").stdout
    assert "by another tool, without a manifest (run `adapters adopt` to write one)" in shown
    adopted = run("adapters", "adopt", "elsewhere/guest")
    assert adopted.stdout == "adapters/guest\n"
    assert (
        adopted.stderr
        == f"guest fits {gpt2} by its layer sizes; it cannot be verified that it was trained on it.\n"
        "The adapter covers 100% of the block weights.\n"
    )
    assert run("adapters", "adopt", "elsewhere/guest", "--name", "b", "--base", gpt2).stdout == "adapters/b\n"
    assert (tmp_path / "adapters" / "guest" / WEIGHTS_FILE).read_bytes() == before
    assert not (tmp_path / "elsewhere" / "guest" / MANIFEST_FILE).exists()
    lines = dict(
        re.split(r" {2,}", line.strip(), maxsplit=1)
        for line in run("adapters", "show", "guest").stdout.splitlines()
    )
    assert lines["gain"] == "not evaluated"
    assert lines["fingerprint"] == find_base(str(gpt2)).fingerprint
    assert lines["created"].startswith("by another tool, adopted 20")
    assert "parent" not in lines
    assert run("adapters", "verify", "guest", "b").stdout == "guest: OK\nb: OK\n"
    assert (
        error("adapters", "adopt", "guest") == "Error: adapters/guest has a manifest: there is nothing to adopt."
    )
    assert error("adapters", "adopt", "elsewhere/guest").startswith(
        "Error: adapters/guest exists: choose another --name"
    )
    stranger = other_base(tmp_path)
    assert error("generate", "--adapter", "guest", "--base", stranger, "x").startswith(
        "Error: guest was trained on "
    )
    wider = tiny_models.save_model(tmp_path / "wider", "gpt2", width=48)
    assert error("adapters", "adopt", "elsewhere/guest", "--name", "c", "--base", wider).startswith(
        "Error: elsewhere/guest does not fit the base: transformer.h.0.attn.c_attn is "
    )
    assert Library().names() == ["b", "guest", "noir", "verse"]


def test_list_and_show_lineage(two, columns):
    columns(250)
    how = ["--max-steps", 1, "--max-length", 64, "--eval-rows", 2, "--device", "cpu"]
    trained = run("train", "--from", "noir", "--dataset", "verse.json", "--name", "child", *how)
    assert trained.stdout.startswith("adapters/child  ")
    run("train", "--from", "child", "--dataset", "noir.json", "--name", "grandchild", *how)
    prints = {name: Library().get(name).sha256[:12] for name in ("noir", "child")}

    def lineage():
        lines = run("adapters", "show", "grandchild").stdout.splitlines()
        start = next(number for number, line in enumerate(lines) if line.startswith("parent"))
        return [line[len("fingerprint  ") :].rstrip() for line in lines[start : start + 2]]

    assert lineage() == [f"from child ({prints['child']})", f"  from noir ({prints['noir']})"]
    rows = listed()
    assert {name: row["parent"] for name, row in rows.items()} == {
        "child": "noir",
        "grandchild": "child",
        "noir": "",
        "verse": "",
    }
    assert all(re.fullmatch(r"(\d+ s|[\d.]+ min) ago", row["created"]) for row in rows.values())
    assert (rows["child"]["rank"], rows["child"]["data"]) == ("4", "verse.json")
    run("adapters", "rename", "child", "old")
    run("adapters", "remove", "noir", "--yes")
    assert lineage() == [
        f"from child ({prints['child']}, now named old)",
        f"  from noir ({prints['noir']}, not in this library)",
    ]
    assert listed()["grandchild"]["parent"] == "old"
    facts = json.loads(run("adapters", "show", "grandchild", "--json").stdout)
    assert [(parent["name"], parent["generation"], parent["here"]) for parent in facts["ancestors"]] == [
        ("child", 1, "old"),
        ("noir", 2, None),
    ]
    assert facts["parents"][0]["parents"][0]["name"] == "noir"


def test_list_shows_age(two, columns):
    columns(250)
    days = two[0].manifest.model_copy(update={"created": "2020-01-01T00:00:00+00:00"})
    (two[0].path / MANIFEST_FILE).write_text(days.to_json())
    soon = two[1].manifest.model_copy(update={"created": "2999-01-01T00:00:00+00:00"})
    (two[1].path / MANIFEST_FILE).write_text(soon.to_json())
    rows = listed()
    assert re.fullmatch(r"[\d,]+ d ago", rows["noir"]["created"])
    assert int(rows["noir"]["created"][:-6].replace(",", "")) > 2000
    assert rows["verse"]["created"] == "0 s ago"
    (two[1].path / MANIFEST_FILE).unlink()
    assert (listed()["verse"]["created"], listed()["verse"]["parent"], listed()["verse"]["gain"]) == (
        "?",
        "?",
        "?",
    )


def test_verify_explains_ok(two):
    result = run("adapters", "verify")
    assert result.stdout == "noir: OK\nverse: OK\n"
    assert result.stderr == (
        "OK: files are valid, values finite, hashes as in the manifest if there is one. Use `evaluate` to measure "
        "quality.\n"
    )
    assert run("adapters", "verify", "--json").stderr == ""


@pytest.mark.parametrize(
    "config", sampled([{"base_model_name_or_path": "\ud800"}, {"\ud800": 1}, {"x\ngood: OK\ny": 1}], 3)
)
def test_hostile_config_prints_one_line(tmp_path, config):
    adapter_files.write(tmp_path / "adapters" / "evil", config)
    for command in ("list", "verify"):
        done = process("cli.py", "adapters", command, "--adapters-dir", tmp_path / "adapters")
        assert "Traceback" not in done.stderr
        assert "good: OK" not in done.stdout.splitlines() + done.stderr.splitlines()


def test_brackets_are_not_markup(adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    adapter.path.rename(tmp_path / "[b]x[")
    assert "[b]x[" in run("compare", "--adapter", "[b]x[", "--max-new-tokens", 2, "x").stdout
    (tmp_path / "d[").mkdir()
    for name in ("d[red].csv", "d[/y].csv"):
        (tmp_path / name).write_text("text\n" + "\n".join(tiny_models.reviews(5)))
        assert name in run("evaluate", "[b]x[", "--eval-dataset", name).stdout


def test_verify_problem_hides_explanation(adapter):
    (adapter.path / "run.yaml").unlink()
    assert "OK: " not in run("adapters", "verify", "reviews", exit_code=1).stderr


def test_adapters_commands_json(adapter, tmp_path):
    assert json.loads(run("adapters", "rename", "reviews", "old", "--json").stdout)["name"] == "old"
    (tmp_path / "adapters" / "old" / MANIFEST_FILE).unlink()
    adopted = json.loads(run("adapters", "adopt", "old", "--json").stdout)
    assert adopted["weights"]["config"] == atomic_io.sha256_file(tmp_path / "adapters" / "old" / CONFIG_FILE)
    assert json.loads(run("adapters", "remove", "old", "--yes", "--json").stdout) == {"removed": "old"}
    assert run("adapters", "verify").stderr == "No adapters in adapters yet: train one.\n"
