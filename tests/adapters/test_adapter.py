import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lora_tuner import atomic_io
from lora_tuner.adapters.adapter import (
    CARD_FILE,
    CONFIG_FILE,
    LOSS_PLOT_FILE,
    MANIFEST_FILE,
    METRICS_FILE,
    RUN_FILE,
    WEIGHTS_FILE,
    check_weights_hash,
    load_adapter_folder,
    validate_name,
    verify_adapter,
)
from lora_tuner.adapters.safetensors_header import all_finite
from lora_tuner.errors import AdapterError

from .. import adapter_files

MODULE = adapter_files.MODULES[0]
A, B = (f"base_model.model.{MODULE}.lora_{part}.weight" for part in "AB")


def refusal(folder):
    """The message of the error, without the folder of the test."""
    with pytest.raises(AdapterError) as error:
        load_adapter_folder(folder)
    return str(error.value).replace(f"{folder.parent}/", "")


# Reading


def test_load_adapter_with_manifest(tmp_path):
    adapter = load_adapter_folder(adapter_files.write(tmp_path / "imdb", facts=adapter_files.manifest()))
    assert (adapter.name, adapter.base, adapter.rank) == ("imdb", "distilgpt2", 4)
    assert adapter.modules == list(adapter_files.MODULES)
    assert adapter.targets == ["c_attn"]
    assert adapter.parameters == 2 * (4 * 6 + 18 * 4)
    assert adapter.bytes == sum((tmp_path / "imdb" / name).stat().st_size for name in (WEIGHTS_FILE, CONFIG_FILE))
    assert adapter.tensors[A] == ("F32", (4, 6))
    facts = json.loads(json.dumps(adapter.to_dict()))
    assert {key: facts[key] for key in ("name", "path", "rank", "alpha", "targets", "parameters", "bytes")} == {
        "name": "imdb",
        "path": str(tmp_path / "imdb"),
        "rank": 4,
        "alpha": 8,
        "targets": ["c_attn"],
        "parameters": 192,
        "bytes": adapter.bytes,
    }
    assert facts["result"]["gain"] == 0.25
    assert facts["weights"]["sha256"] == atomic_io.sha256_file(tmp_path / "imdb" / WEIGHTS_FILE)


def test_name_of_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(adapter_files.write(tmp_path / "imdb"))
    assert load_adapter_folder(Path(".")).name == "imdb"


def test_load_adapter_without_manifest(tmp_path):
    adapter = load_adapter_folder(adapter_files.write(tmp_path / "theirs"))
    assert adapter.manifest is None
    assert adapter.base == "distilbert/distilgpt2"
    assert adapter.to_dict()["base"] == {"name": "distilbert/distilgpt2"}


def test_load_incomplete_folder_fails(tmp_path):
    assert refusal(tmp_path / "none") == "There is no adapter folder none."
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty") == "empty has no adapter_config.json: it is incomplete or not an adapter."
    folder = adapter_files.write(tmp_path / "half")
    (folder / WEIGHTS_FILE).unlink()
    assert refusal(folder) == "half has no adapter_model.safetensors: it is incomplete or not an adapter."


# Weights


def test_truncated_weights_are_rejected(tmp_path):
    folder = adapter_files.write(tmp_path / "a")
    whole = (folder / WEIGHTS_FILE).read_bytes()
    for data in (b"", whole[:5], whole[:300], b"\x80\x04pickle" * 10):
        (folder / WEIGHTS_FILE).write_bytes(data)
        assert refusal(folder) == (
            f"a/{WEIGHTS_FILE}: it is cut off, or no safetensors file. Copy it again from its source."
        )
    (folder / WEIGHTS_FILE).write_bytes(whole[:-1])
    assert refusal(folder) == (
        f"a/{WEIGHTS_FILE}: it is cut off: base_model.model.{adapter_files.MODULES[1]}.lora_B.weight ends beyond the file. "
        "Copy it again from its source."
    )


def test_header_with_false_sizes_is_rejected(tmp_path):
    folder = adapter_files.write(tmp_path / "a")
    whole = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", 8_000_000_000) + whole[8:])
    assert refusal(folder) == (
        f"a/{WEIGHTS_FILE}: it is cut off, or no safetensors file. Copy it again from its source."
    )
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    header[A]["shape"] = [4, 6_000_000_000]
    head = json.dumps(header).encode()
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(head)) + head + whole[8 + size :])
    assert refusal(folder) == (f"a/{WEIGHTS_FILE}: its header is wrong about {A}. Copy it again from its source.")


def test_tensor_without_counterpart_is_rejected(tmp_path):
    for missing, letter in ((A, "A"), (B, "B")):
        weights = {name: tensor for name, tensor in adapter_files.tensors().items() if name != missing}
        assert (
            refusal(adapter_files.write(tmp_path / "a", weights=weights))
            == f"a/{WEIGHTS_FILE}: {MODULE} has no lora_{letter}."
        )


def test_tensors_with_different_ranks_are_rejected(tmp_path):
    weights = adapter_files.tensors() | {B: np.ones((18, 5), np.float32)}
    assert refusal(adapter_files.write(tmp_path / "a", weights=weights)) == (
        f"a/{WEIGHTS_FILE}: {MODULE} has shapes (4, 6) and (18, 5), which do not share a rank."
    )
    weights = adapter_files.tensors() | {B: np.ones(18, np.float32)}
    assert refusal(adapter_files.write(tmp_path / "a", weights=weights)) == (
        f"a/{WEIGHTS_FILE}: {MODULE} has shapes (4, 6) and (18,), which do not share a rank."
    )


def test_tensor_rank_must_match_config(tmp_path):
    assert refusal(adapter_files.write(tmp_path / "a", {"r": 8})) == (
        f"a/{WEIGHTS_FILE}: {MODULE} has rank 4, but {CONFIG_FILE} says 8; "
        f"{adapter_files.MODULES[1]} has rank 4, but {CONFIG_FILE} says 8."
    )
    assert (
        load_adapter_folder(adapter_files.write(tmp_path / "a", {"r": 8, "rank_pattern": {"c_attn": 4}})).rank
        == 8
    )


WHOLE = " (whole weights, which PEFT does not load under this name: modules_to_save does not list them)"


@pytest.mark.parametrize(
    ("name", "origin"),
    [
        ("head.weight", ""),
        ("base_model.model.score.weight", WHOLE),
        ("base_model.model.score.modules_to_save.weight", WHOLE),
        (f"base_model.model.{MODULE}.weight", ""),
        (f"base_model.model.{MODULE}.bias", " (a trained bias, which is not supported)"),
        (
            f"base_model.model.{MODULE}.lora_embedding_A",
            (
                " (LoRA on embeddings or output head, not adapted here: merge it with PEFT's merge_and_unload, and give the "
                "result as --base)"
            ),
        ),
        (
            "base_model.model.wte.trainable_tokens_delta.default",
            " (of trainable tokens in a form that PEFT does not load)",
        ),
        (
            f"base_model.model.{MODULE}.lora_A.default.weight",
            " (it holds the name of an adapter: save it with PEFT's save_pretrained)",
        ),
        (f"base_model.model.{MODULE}.lora_B.bias", " (of lora_bias, which is not supported)"),
        ("model.layers.0.self_attn.q_proj.lora_a", " (of an adapter of MLX)"),
        ("lora_unet_down_blocks_0.lora_down.weight", " (of a LoRA for image models)"),
        ("lora_unet_down_blocks_0.hada_w1_a", " (of LyCORIS)"),
        ("base_model.model.a/b.lora_A.weight", ""),
        (f"base_model.model.{MODULE}.lora_A.weight\n", ""),
    ],
)
def test_non_lora_tensor_is_rejected(tmp_path, name, origin):
    weights = adapter_files.tensors() | {name: np.ones((4, 6), np.float32)}
    assert (
        refusal(adapter_files.write(tmp_path / "a", weights=weights))
        == f"a/{WEIGHTS_FILE}: {name} is not a LoRA tensor{origin}."
    )


def test_integer_tensors_are_rejected(tmp_path):
    weights = adapter_files.tensors() | {A: np.ones((4, 6), np.int64)}
    assert (
        refusal(adapter_files.write(tmp_path / "a", weights=weights)) == f"a/{WEIGHTS_FILE}: {A} has dtype I64."
    )


def test_error_lists_five_tensors(tmp_path):
    weights = {f"x{number}": np.ones(2, np.float32) for number in range(9)}
    said = "; ".join(f"x{number} is not a LoRA tensor" for number in range(5))
    assert (
        refusal(adapter_files.write(tmp_path / "a", weights=adapter_files.tensors() | weights))
        == f"a/{WEIGHTS_FILE}: {said}."
    )


def test_weights_folder_is_rejected(tmp_path):
    folder = adapter_files.write(tmp_path / "a")
    (folder / WEIGHTS_FILE).unlink()
    (folder / WEIGHTS_FILE).mkdir()
    assert refusal(folder) == f"a/{WEIGHTS_FILE}: it is not a file. Copy it again from its source."


def dora(magnitude):
    """Tensors with a magnitude of this shape in each layer."""
    return adapter_files.tensors() | {
        f"base_model.model.{module}.lora_magnitude_vector": np.ones(magnitude, np.float32)
        for module in adapter_files.MODULES
    }


def test_dora_adapter_is_accepted(tmp_path):
    adapter = load_adapter_folder(adapter_files.write(tmp_path / "a", {"use_dora": True}, dora(18)))
    assert adapter.parameters == 2 * (4 * 6 + 18 * 4 + 18)
    assert adapter.modules == list(adapter_files.MODULES)


@pytest.mark.parametrize("use_dora", [False, None])
def test_magnitude_without_dora_is_rejected(tmp_path, use_dora):
    assert refusal(adapter_files.write(tmp_path / "a", {"use_dora": use_dora}, dora(18))) == (
        f"a/{WEIGHTS_FILE}: {MODULE} has a magnitude of shape (18,), but {CONFIG_FILE} says use_dora: false; "
        f"{adapter_files.MODULES[1]} has a magnitude of shape (18,), but {CONFIG_FILE} says use_dora: false."
    )


@pytest.mark.parametrize(
    ("weights", "has"),
    [(adapter_files.tensors(), "None"), (dora(17), "(17,)"), (dora((18, 1)), "(18, 1)"), (dora(6), "(6,)")],
)
def test_dora_wrong_magnitude_is_rejected(tmp_path, weights, has):
    assert refusal(adapter_files.write(tmp_path / "a", {"use_dora": True}, weights)) == (
        f"a/{WEIGHTS_FILE}: {MODULE} has a magnitude of shape {has}, but {CONFIG_FILE} says use_dora: true; "
        f"{adapter_files.MODULES[1]} has a magnitude of shape {has}, but {CONFIG_FILE} says use_dora: true."
    )


def test_magnitude_without_matrices_is_rejected(tmp_path):
    weights = {f"base_model.model.{MODULE}.lora_magnitude_vector": np.ones(18, np.float32)}
    assert (
        refusal(adapter_files.write(tmp_path / "a", {"use_dora": True}, weights))
        == f"a/{WEIGHTS_FILE}: {MODULE} has no lora_A."
    )


def test_empty_weights_are_rejected(tmp_path):
    assert (
        refusal(adapter_files.write(tmp_path / "a", weights={})) == f"a/{WEIGHTS_FILE}: it has no LoRA tensors."
    )


# Ranks and scales


def test_verify_detects_edited_config(tmp_path):
    folder = adapter_files.write(tmp_path / "a", facts=adapter_files.manifest(run=None))
    assert verify_adapter(load_adapter_folder(folder)) == []
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["weights"]["config"] = atomic_io.sha256_file(folder / CONFIG_FILE)
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert verify_adapter(load_adapter_folder(folder)) == []
    (folder / CONFIG_FILE).write_text(
        (folder / CONFIG_FILE).read_text().replace('"lora_alpha": 8', '"lora_alpha": 800')
    )
    assert verify_adapter(load_adapter_folder(folder)) == [
        f"{CONFIG_FILE} does not match its hash in {MANIFEST_FILE}"
    ]


def test_name_of_symlink(tmp_path):
    (tmp_path / "noir").symlink_to(adapter_files.write(tmp_path / "v3"))
    assert load_adapter_folder(tmp_path / "noir").name == "noir"


# Shapes of the base


def test_check_shapes_accepts_matching_base(tmp_path):
    adapter = load_adapter_folder(adapter_files.write(tmp_path / "a"))
    assert adapter.layer_size(MODULE) == (6, 18)
    adapter.check_shapes(dict.fromkeys(adapter_files.MODULES, (6, 18)) | {"another": (1, 1)})


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ({adapter_files.MODULES[0]: (6, 18)}, f"the base has no linear layer {adapter_files.MODULES[1]}"),
        (
            {adapter_files.MODULES[0]: (6, 18), adapter_files.MODULES[1]: (18, 6)},
            f"{adapter_files.MODULES[1]} is 18 -> 6 in the base, 6 -> 18 in the adapter",
        ),
        (
            {adapter_files.MODULES[1]: (768, 2304)},
            f"the base has no linear layer {adapter_files.MODULES[0]}; "
            f"{adapter_files.MODULES[1]} is 768 -> 2304 in the base, 6 -> 18 in the adapter",
        ),
    ],
)
def test_check_shapes_rejects_other_base(tmp_path, sizes, why):
    adapter = load_adapter_folder(adapter_files.write(tmp_path / "a"))
    with pytest.raises(AdapterError) as error:
        adapter.check_shapes(sizes)
    assert str(error.value) == f"{adapter.path} does not fit the base: {why}."


@pytest.mark.parametrize(("count", "more"), [(3, ""), (4, ", and 1 more"), (9, ", and 6 more")])
def test_check_shapes_lists_three_layers(tmp_path, count, more):
    modules = [f"h.{number}.c_attn" for number in range(count)]
    adapter = load_adapter_folder(adapter_files.write(tmp_path / "a", weights=adapter_files.tensors(4, modules)))
    with pytest.raises(AdapterError) as error:
        adapter.check_shapes({})
    first = "; ".join(f"the base has no linear layer {module}" for module in modules[:3])
    assert str(error.value) == f"{adapter.path} does not fit the base: {first}{more}."


# Manifests


@pytest.mark.parametrize("name", ["a", "Imdb-2_x", "a" * 64])
def test_validate_name_accepts_valid_names(name):
    assert validate_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "2x",
        "-a",
        "_a",
        ".a",
        "..",
        "a.b",
        "a/b",
        "../a",
        "/tmp/a",
        "a\\b",
        "a b",
        "a\n",
        "a\0",
        "é",
        "a" * 65,
    ],
)
def test_validate_name_rejects_invalid_names(name):
    with pytest.raises(AdapterError) as error:
        validate_name(name)
    assert str(error.value) == (
        f"'{name}' is not a valid adapter name: use a letter, then up to 63 letters, digits, '-' or '_'; names of "
        "Windows devices are reserved."
    )


# Start-up


def test_adapter_never_imports_torch(tmp_path):
    adapter_files.write(tmp_path / "imdb", facts=adapter_files.manifest())
    program = """
import sys
from pathlib import Path
from lora_tuner.adapters.adapter import load_adapter_folder
adapter = load_adapter_folder(Path(sys.argv[1]))
adapter.to_dict(), adapter.modules, adapter.scale_of(adapter.modules[0]), adapter.parent_info(), adapter.sha256
print(*sorted({module.partition(".")[0] for module in sys.modules}))
"""
    command = [sys.executable, "-c", program, tmp_path / "imdb"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "pydantic" in loaded
    assert not loaded & {"torch", "transformers", "peft", "datasets", "numpy", "safetensors", "accelerate"}


# Verification


@pytest.fixture
def complete(tmp_path):
    folder = adapter_files.write(tmp_path / "imdb", facts=adapter_files.manifest())
    for name in (
        RUN_FILE,
        METRICS_FILE,
        LOSS_PLOT_FILE,
        CARD_FILE,
    ):
        (folder / name).write_text("")
    return folder


def test_verify_intact_adapter(complete):
    assert verify_adapter(load_adapter_folder(complete)) == []


def test_verify_detects_changed_weights(complete):
    data = bytearray((complete / WEIGHTS_FILE).read_bytes())
    data[-1] ^= 1
    (complete / WEIGHTS_FILE).write_bytes(data)
    assert verify_adapter(load_adapter_folder(complete)) == [
        f"{WEIGHTS_FILE} does not match its hash in {MANIFEST_FILE}"
    ]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_verify_detects_non_finite_values(tmp_path, value, kind):
    weights = {name: tensor.astype(kind) for name, tensor in adapter_files.tensors().items()}
    name = sorted(weights)[1]
    weights[name][0, 0] = value
    adapter = load_adapter_folder(adapter_files.write(tmp_path / "a", weights=weights))
    assert verify_adapter(adapter) == [f"{name} has values that are not finite"]


@pytest.mark.parametrize(
    ("bits", "finite"), [(0x7F80, False), (0xFF80, False), (0x7FC0, False), (0x7F7F, True), (0, True)]
)
def test_verify_checks_bfloat16(bits, finite):
    assert all_finite(np.array([0, bits], np.uint16).tobytes(), "BF16") is finite


@pytest.mark.parametrize(("end", "why"), [(-1, "it is cut off: "), (20, "it is cut off, or no safetensors file")])
def test_verify_detects_truncated_weights(complete, end, why):
    adapter = load_adapter_folder(complete)
    (complete / WEIGHTS_FILE).write_bytes((complete / WEIGHTS_FILE).read_bytes()[:end])
    assert verify_adapter(adapter)[0].startswith(f"{WEIGHTS_FILE} cannot be read: {why}")


def test_verify_detects_deleted_weights(complete):
    adapter = load_adapter_folder(complete)
    (complete / WEIGHTS_FILE).unlink()
    with pytest.raises(
        AdapterError, match=f"{complete} is damaged: {WEIGHTS_FILE} cannot be read: .*No such file"
    ):
        check_weights_hash(adapter)


def test_verify_lists_missing_files(complete):
    (complete / RUN_FILE).unlink()
    assert verify_adapter(load_adapter_folder(complete)) == ["run.yaml is missing"]
    for name in (METRICS_FILE, LOSS_PLOT_FILE, CARD_FILE):
        (complete / name).unlink()
    assert verify_adapter(load_adapter_folder(complete)) == [
        f"{name} is missing" for name in ("run.yaml", "metrics.jsonl", "loss.png", "README.md")
    ]
