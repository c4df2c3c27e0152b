"""compare: one prompt, the base and several adapters, in columns."""

import json

from lora_tuner.models.resolve import find_base

from .test_commands import error, other_base, run

BOTH = ["--adapter", "noir", "--adapter", "verse", "--device", "cpu", "--max-new-tokens", "6"]
MODELS = ["(base)", "noir", "verse"]


def flat(text):
    return " ".join(text.split())


def test_compare_in_columns(two, columns):
    answers = json.loads(run("compare", *BOTH, "--greedy", "--json", "the actor").stdout)
    assert [answer["adapter"] for answer in answers] == [None, "noir", "verse"]
    assert len({answer["text"] for answer in answers}) == 3
    for width in (36 * 3, 300):
        columns(width)
        head, *lines = run("compare", *BOTH, "--greedy", "the actor").stdout.splitlines()
        assert head.split() == MODELS
        assert max(len(line) for line in lines) <= width
        assert sum(line.count("the actor") for line in lines) == 3
    shown = flat("\n".join(lines))
    places = [shown.find(flat(f"the actor{answer['text']}")) for answer in answers]
    assert places == sorted(places)
    assert places[0] == 0


def test_compare_on_narrow_terminal(two, columns):
    answers = json.loads(run("compare", *BOTH, "--greedy", "--json", "the actor").stdout)
    expected = [
        f"--- {model}\nthe actor{answer['text']}\n\n" for model, answer in zip(MODELS, answers, strict=True)
    ]
    for width in (36 * 3 - 1, 30):
        columns(width)
        assert run("compare", *BOTH, "--greedy", "the actor").stdout == "".join(expected)


def test_compare_equals_single_generation(two, gpt2):
    drawn = ["--seed", "4", "--n", "2", "--json", "the actor"]
    answers = json.loads(run("compare", *BOTH, *drawn).stdout)
    assert [(answer["adapter"], answer["seed"]) for answer in answers] == [
        (who, seed) for who in (None, "noir", "verse") for seed in (4, 5)
    ]
    alone = [["--base", gpt2], ["--adapter", "noir"], ["--adapter", "adapters/verse"]]
    for number, who in enumerate(alone):
        one = run("generate", *who, "--max-new-tokens", "6", *drawn)
        assert json.loads(one.stdout) == answers[2 * number : 2 * number + 2]


def test_compare_several_prompts_and_samples(two, tmp_path, columns):
    (tmp_path / "prompts.txt").write_text("the actor\n\nthis film\n")
    columns(50)
    how = [*BOTH, "--seed", "1", "--n", "2"]
    shown = run("compare", *how, "--file", "prompts.txt").stdout
    heads = [line.removeprefix("--- ") for line in shown.splitlines() if line.startswith("--- ")]
    assert heads == [who for _ in range(2) for who in MODELS for _ in range(2)]
    assert shown == run("compare", *how, "-", stdin="the actor\nthis film\n").stdout
    assert shown == "".join(run("compare", *how, prompt).stdout for prompt in ("the actor", "this film"))
    columns(150)
    wide = run("compare", *how, "the actor").stdout
    assert wide.splitlines()[0].split() == MODELS
    assert wide.count("the actor") == 6
    answers = json.loads(run("compare", *how, "--file", "prompts.txt", "--json").stdout)
    assert [answer["prompt"] for answer in answers] == ["the actor"] * 6 + ["this film"] * 6


def test_compare_uses_same_seed(two):
    answers = json.loads(run("compare", *BOTH, "--n", "2", "--json", "the").stdout)
    seeds = [answer["seed"] for answer in answers]
    assert seeds == seeds[:2] * 3
    assert seeds[1] == seeds[0] + 1


def test_compare_errors(two, gpt2, tmp_path):
    stranger = other_base(tmp_path)
    assert error("compare", *BOTH) == (
        "Error: There is no prompt: give one as an argument, --file, or - for stdin."
    )
    assert (
        error("compare", *BOTH, "x", "--file", "y") == "Error: A prompt and --file exclude each other: give one."
    )
    assert error("compare", *BOTH, "--adapter", "noir", "x") == (
        "Error: Two of these adapters have the name noir: list each once, or rename one."
    )
    assert error("compare", *BOTH, "--adapter", "adapters/noir", "x") == (
        "Error: Two of these adapters have the name noir: list each once, or rename one."
    )
    assert error("compare", *BOTH, "--adapter", "nobody", "x") == (
        "Error: There is no adapter 'nobody', neither in adapters (noir, verse) nor as a path."
    )
    assert error("compare", *BOTH, "--n", "2", "--greedy", "x") == (
        "Error: n above 1 needs sampling: greedy outputs are all the same"
    )
    prints = [find_base(str(folder)).fingerprint[:12] for folder in (gpt2, stranger)]
    assert error("compare", *BOTH, "--base", stranger, "x") == (
        f"Error: noir was trained on {gpt2} (fingerprint {prints[0]}, a local folder), not on {stranger} (fingerprint "
        f"{prints[1]}, a local folder). Name the right base with --base, or use --force to try it anyway."
    )
    forced = run("compare", *BOTH, "--base", stranger, "--force", "--json", "x")
    assert len(json.loads(forced.stdout)) == 3
    assert forced.stderr.count("FORCED: ") == 2
    assert "Missing option '--adapter'" in flat(run("compare", "x", exit_code=2).stderr.replace("│", " "))
